"""The whole server with the demo: many clients, clients that leave, broken requests."""

import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import server_load
from server.running import MODEL

pytestmark = pytest.mark.slow
QUESTIONS = ("What is the capital of France?", "What is 47 + 85?", "What is the opposite of hot?")


def ask(server, text, **fields):
    answer = server.chat(text, temperature=0, **fields)
    assert answer.status == 200, answer.text
    return answer.json["choices"][0]["message"]["content"]


def test_answers_do_not_depend_on_who_else_is_served(live_server):
    alone = [ask(live_server, text) for text in QUESTIONS]
    together: dict[int, str] = {}

    def one(i: int) -> None:
        together[i] = ask(live_server, QUESTIONS[i % len(QUESTIONS)])

    threads = [threading.Thread(target=one, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(12)] == alone * 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_in_a_long_prompt_ends_its_work(live_server, stream):
    text = f"{time.time()} " + "The cat sat on the mat. " * 330
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "stream": stream}
    request = server_load.request_bytes("/v1/chat/completions", json.dumps(body).encode())
    engine = live_server.engine
    generated = engine.stats().get("generated_tokens", 0)
    sock = socket.create_connection(("127.0.0.1", live_server.port))
    sock.sendall(request)
    end = time.monotonic() + 60
    while not engine.stats()["running"] and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.stats()["running"] == 1
    sock.close()
    while engine.stats()["running"] and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.stats()["running"] == 0
    # It did not come to the answer, or to no more than its beginning.
    assert engine.stats().get("generated_tokens", 0) <= generated + 2


def test_broken_requests_are_all_answered(live_server):
    process = SimpleNamespace(port=live_server.port, model=MODEL, is_running=True)
    tally = server_load.fuzz(process, 300, seed=7)
    assert tally.failures == [] and tally.counts["broken"] >= 300
    assert live_server.get("/health").status == 200 and ask(live_server, QUESTIONS[0])
