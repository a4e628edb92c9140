"""The commands serve and launch, and the server as a process."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from qwen35_mlx.cli import serve_commands
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.server import clients
from qwen35_mlx.server.run import bind

MAIN = "from qwen35_mlx.cli.main import main; main()"
SERVER = clients.Endpoint("http://127.0.0.1:9", "my model", 65_536, "k'ey")


def test_a_taken_port_is_one_clear_error(run_cli, converted_demo):
    taken = bind("127.0.0.1", 0)
    port = taken.getsockname()[1]
    result = run_cli("serve", converted_demo, "--port", port)
    taken.close()
    assert result.exit_code == 1
    assert f"port {port} of 127.0.0.1 cannot be used" in result.output
    assert "Traceback" not in result.output and "--port" in result.output


def test_other_machines_need_a_key(run_cli, converted_demo):
    result = run_cli("serve", converted_demo, "--host", "0.0.0.0")
    assert result.exit_code == 1 and "--api-key" in result.output


def test_a_missing_extra_is_named_with_its_pip_line(run_cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwen35_mlx.server.run", None)
    result = run_cli("serve", "--demo")
    assert result.exit_code == 1 and "pip install 'qwen35-mlx[server]'" in result.output


def test_an_agent_is_started_without_what_the_server_needs(run_cli, monkeypatch):
    for name in ("starlette", "uvicorn"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install" not in run_cli("launch", "codex", "--url", "http://127.0.0.1:1").output


def test_serve_tells_the_address_and_the_settings_that_were_asked_for(
    run_cli, monkeypatch, demo, converted_demo, tmp_path
):
    """Up to the loop of events, which runs in other tests."""
    loaded, served, adapters = [], [], []

    def load(folder, **options):
        loaded.append((folder, options))
        return demo

    def with_adapter(model, path):
        adapters.append(path)
        return model

    def run(make, bound, is_ready):
        try:
            app = make()
            served.append((app.state.service, bound.getsockname()))
            is_ready()
        finally:
            app.state.service.engine.stop()
            bound.close()

    monkeypatch.setattr("qwen35_mlx.model.loading.load", load)
    monkeypatch.setattr("qwen35_mlx.server.run.serve", run)
    monkeypatch.setattr("qwen35_mlx.checkpoint.adapter.read_adapter", lambda path: path)
    monkeypatch.setattr("qwen35_mlx.model.adapters.with_adapter", with_adapter)
    options = (
        *("--port", 0, "--api-key", "k", "--allow-host", "my.box", "--queue", 3, "--max-context"),
        *(500, "--cache-dir", tmp_path / "cache", "--force", "--kv-bits", "8", "--kernels", "ops"),
        *("--experts-memory", "2GB", "--adapter-path", f"one={tmp_path}", "--cache-limit", 2),
    )
    result = run_cli("serve", converted_demo, *options)
    assert result.exit_code == 0, result.output
    given = dict(kernels="ops", context=500, force=True, kv_bits="8", experts_memory="2GB")
    assert loaded == [(str(converted_demo), given)]
    (service, (host, port)), settings = served[0], served[0][0].settings
    assert host == "127.0.0.1" and f"http://127.0.0.1:{port}" in result.stdout
    name = converted_demo.resolve().name
    assert service.model_names == [name, f"{name}:one"]
    assert (settings.api_key, settings.hosts) == ("k", ["my.box"])
    assert settings.aliases == [str(converted_demo)]
    engine = service.engine
    assert adapters == [str(tmp_path)] and set(engine.models) == {"", "one"}
    assert engine.limits.max_queued == 3 and engine.store.disk.max_bytes == 2e9
    assert f"serving {name}, :one, {settings.context_length:,} tokens" in result.output
    assert "ANTHROPIC_AUTH_TOKEN=k" in result.output
    named = run_cli("serve", converted_demo, "--port", 0, "--model-name", "x")
    assert named.exit_code == 0 and "serving x, " in named.output
    assert served[1][0].settings.hosts == []
    assert served[1][0].knows(str(converted_demo))


@pytest.mark.parametrize("given", ["one", "=a", "a b=c", "latest=a", "one=b"])
def test_an_adapter_without_a_name_of_its_own_is_refused(run_cli, converted_demo, given):
    options = ("--adapter-path", "one=a", "--adapter-path", given)
    result = run_cli("serve", converted_demo, *options)
    assert result.exit_code == 1 and "expected: NAME=DIR" in result.output


def test_an_unknown_host_is_an_error():
    with pytest.raises(Qwen35Error, match="unknown host"):
        bind("no such host.invalid", 0)


@pytest.mark.parametrize("name", clients.LAUNCHES)
def test_each_agent_is_told_where_which_model_and_how_long(name, tmp_path):
    launch = clients.LAUNCHES[name](SERVER)
    environment = clients.prepared(launch, tmp_path)
    files = "".join(file.read_text() for file in tmp_path.iterdir())
    told = " ".join([*launch.arguments, *environment.values(), files])
    for fact in (SERVER.url, SERVER.model, "65536", SERVER.key):
        assert fact in told, fact
    assert "{folder}" not in told
    for file in tmp_path.iterdir():
        json.loads(file.read_text())


def test_an_agent_that_is_not_installed_is_said_how_to_install():
    launch = clients.codex(SERVER)
    with pytest.raises(Qwen35Error, match=r"npm install -g @openai/codex"):
        clients.command_of(launch, [], None)
    assert clients.command_of(launch, ["exec", "hi"], "codex")[-2:] == ["exec", "hi"]


def test_the_settings_can_be_pasted():
    text = clients.settings_text(SERVER)
    for client in ("Qwen Code", "Claude Code", "opencode", "Codex", "Open WebUI", "openai-python"):
        assert client in text
    line = next(line for line in text.splitlines() if line.startswith("Claude Code"))
    script = line.removeprefix("Claude Code").strip().replace(" claude ", " env # ")
    shown = subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout
    assert f"ANTHROPIC_AUTH_TOKEN={SERVER.key}\n" in shown


def test_launch_asks_the_running_server(live_server, monkeypatch, run_cli, tmp_path):
    started = {}

    def replace(path, command, environment):
        started.update(command=command, environment=environment)

    monkeypatch.setattr(serve_commands.shutil, "which", lambda name: str(tmp_path / name))
    monkeypatch.setattr(os, "execve", replace)
    result = run_cli("launch", "claude", "--url", live_server.url, "--", "-p", "hi")
    assert result.exit_code == 0, result.output
    assert started["command"][-2:] == ["-p", "hi"]
    assert started["environment"]["ANTHROPIC_BASE_URL"] == live_server.url
    assert started["environment"]["ANTHROPIC_MODEL"] == "demo"


def test_launch_without_a_server_says_how_to_start_one(run_cli):
    free = bind("127.0.0.1", 0)
    free.close()
    result = run_cli("launch", "codex", "--url", f"http://127.0.0.1:{free.fileno()}9")
    assert result.exit_code == 1 and "qwen35-mlx serve" in result.output
    assert run_cli("launch", "emacs").exit_code == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_with_0_even_while_it_answers(converted_demo, number):
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from qwen35_mlx.cli.main import main; main()",
            "serve",
            str(converted_demo),
            "--port",
            "0",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:")
    body = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.readline().startswith(b"data: ")
        process.send_signal(number)
        answer.read()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors


def test_the_page_and_a_program_get_what_they_want_at_the_root(server):
    assert server.get("/", Accept="application/json").text == "Ollama is running"
    page = server.get("/", Accept="text/html,*/*")
    assert page.headers["content-type"].startswith("text/html")
    assert Path(clients.__file__).parent.joinpath("page", "index.html").read_text() == page.text
