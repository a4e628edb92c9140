"""The server before its model is there, and when it ends."""

import asyncio
import socket
import threading
import time
from http.client import HTTPConnection

import pytest
from server.fake_engine import FakeEngine
from server.running import MODEL, Running

from qwen35_mlx.cli.serve_commands import running_server
from qwen35_mlx.engine.requests import EngineBusy, EngineStopped
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.server import run
from qwen35_mlx.server.faults import as_fault

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def asked(port: int, path: str) -> tuple[int, dict[str, str], bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    got = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    connection.close()
    return got


def test_the_socket_answers_while_the_model_loads(tokenizer):
    loads = threading.Event()
    running = Running(FakeEngine(tokenizer), tokenizer, loads=loads)
    status, headers, body = asked(running.port, "/health")
    assert (status, body) == (503, b'{"status":"loading"}') and int(headers["retry-after"]) > 0
    for path in ("/v1/models", "/v1/messages", "/api/tags"):
        status, headers, body = asked(running.port, path)
        assert status == 503 and b"loading" in body and int(headers["retry-after"]) > 0
    loads.set()
    running.wait_until_ready()
    status, headers, _ = asked(running.port, "/health")
    assert status == 200 and "server" not in headers
    running.stop()


def test_a_model_that_does_not_load_ends_the_server_with_its_error():
    def fails():
        raise Qwen35Error("no such model")

    bound = run.bind("127.0.0.1", 0)
    with pytest.raises(Qwen35Error, match="no such model"):
        run.serve(fails, bound, lambda: None)


@pytest.mark.parametrize("error, status", [(EngineBusy("full"), 429), (EngineStopped("no"), 503)])
def test_who_comes_at_a_bad_time_is_told_to_come_again(error, status):
    fault = as_fault(error)
    assert fault.status == status and int(fault.headers["retry-after"]) > 0


def test_a_server_that_still_loads_ends_at_once():
    loads = threading.Event()
    server = run.Server(loads.wait)
    bound = run.bind("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
    thread.start()
    while not server.started:
        time.sleep(0.002)
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive() and server.app is None
    loads.set()
    bound.close()


@pytest.mark.slow
def test_neither_a_deaf_client_nor_a_stuck_engine_holds_the_end(start, tokenizer, monkeypatch):
    """Whoever reads nothing, and whatever does not stop, is left behind in time."""
    monkeypatch.setattr(run, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(run, "CUT_SECONDS", 0.3)
    engine = FakeEngine(tokenizer)
    engine.say = ["word " * 2000] * 2000
    stuck = threading.Event()
    monkeypatch.setattr(engine, "stop", lambda finish=False: stuck.wait(60))
    server = Running(engine, tokenizer)
    deaf = socket.create_connection(("127.0.0.1", server.port))
    server.send(deaf, "/v1/chat/completions", CHAT | {"stream": True})
    while not engine.tickets:
        time.sleep(0.005)
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 18
    stuck.set()
    deaf.close()


def test_launch_says_that_the_model_still_loads(tokenizer):
    loads = threading.Event()
    running = Running(FakeEngine(tokenizer), tokenizer, loads=loads)
    with pytest.raises(Qwen35Error, match="loading"):
        running_server(running.url, None)
    loads.set()
    running.wait_until_ready()
    assert running_server(running.url, None).model == MODEL
    running.stop()


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [(256, 10**6, run.WANTED_FILES), (256, 512, 512), (10**6, 10**6, None), (256, -1, "all")],
)
def test_as_many_files_are_allowed_as_connections_want(monkeypatch, soft, hard, raised):
    limits = []
    monkeypatch.setattr(run.resource, "RLIM_INFINITY", -1)
    monkeypatch.setattr(run.resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(run.resource, "setrlimit", lambda *given: limits.append(given))
    run.allow_many_files()
    wanted = run.WANTED_FILES if raised == "all" else raised
    assert limits == ([(run.resource.RLIMIT_NOFILE, (wanted, hard))] if wanted else [])
