"""The command cluster: what is wrong on any Mac is said before anything starts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from screen import Screen

from qwen35_mlx.cli import cluster_command
from qwen35_mlx.cli.cluster_command import facts_of
from qwen35_mlx.errors import Qwen35Error

ASK = ["-p", "What is the capital of France?", "--temperature", "0"]
TWO_HERE = ("cluster", "--hosts", "127.0.0.1,127.0.0.1", "--")


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script that is run in place of ssh; it gets host and command last."""
    script = tmp_path / "bin" / "ssh"
    script.parent.mkdir()
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return script


def answer(script: Path, body: str) -> None:
    script.write_text(f"#!/bin/bash\n{body}\n")
    script.chmod(0o755)


def problems(hosts: list[str], model: Path, backend: str = "ring") -> str:
    with pytest.raises(Qwen35Error) as caught:
        cluster_command.check([{"ssh": host} for host in hosts], backend, str(model))
    return str(caught.value)


def test_everything_that_differs_on_any_mac_is_said_at_once(
    fake_ssh: Path, converted_demo: Path
) -> None:
    own = facts_of(str(converted_demo))
    other = own | {"MLX": "0.1", "model": "ff"}
    answer(
        fake_ssh,
        f"""case " $* " in
        *" old.local "*) echo '{json.dumps(other)}';;
        *" empty.local "*) echo '{json.dumps(own | {"model": None})}';;
        *" closed.local "*) echo "Permission denied (publickey)." >&2; exit 255;;
        *" elsewhere.local "*) exit 127;;
        *" broken.local "*) echo "No module named 'qwen35_mlx'" >&2; exit 1;;
        *" odd.local "*) echo "Welcome!";;
        *" good.local "*) echo "a banner"; echo '{json.dumps(own)}';;
        esac""",
    )
    names = "old empty closed elsewhere broken odd good".split()
    hosts = ["127.0.0.1", *(f"{name}.local" for name in names)]
    said = problems(hosts, converted_demo)
    for line in (
        f"old.local: MLX 0.1, here {own['MLX']}",
        f"old.local: another model at {converted_demo}",
        f"empty.local: no model at {converted_demo}",
        "closed.local: ssh fails: Permission denied (publickey).",
        "ssh-copy-id closed.local",
        f"elsewhere.local: no {sys.executable}",
        "broken.local: qwen35-mlx does not start: No module named 'qwen35_mlx'",
        "odd.local: no usable answer over ssh",
    ):
        assert line in said
    assert "good.local" not in said


def test_thunderbolt_needs_rdma_on_every_mac(fake_ssh: Path, converted_demo: Path) -> None:
    own = facts_of(str(converted_demo)) | {"rdma": "disabled"}
    answer(fake_ssh, f"echo '{json.dumps(own)}'")
    said = problems(["127.0.0.1", "b.local"], converted_demo, "jaccl")
    assert "b.local: RDMA is disabled; start in recovery and run rdma_ctl enable" in said
    assert "127.0.0.1: RDMA is missing" in said


@pytest.mark.parametrize(
    ("hosts", "arguments", "said"),
    [
        ("127.0.0.1,127.0.0.1", ["convert", "x"], "not a command for several Macs"),
        ("127.0.0.1,127.0.0.1", ["chat", "owner/name"], "in a folder"),
        ("127.0.0.1", ["chat", "{model}"], "two or more"),
        ("192.0.2.1,127.0.0.1", ["chat", "{model}"], "the first of them this one"),
        ("127.0.0.1,-oProxyCommand=x", ["chat", "{model}"], "no address|not the name of a Mac"),
        ("127.0.0.1,nowhere.invalid", ["chat", "{model}"], "no address of nowhere.invalid"),
    ],
)
def test_what_cannot_run_is_refused_before_any_host_is_asked(
    hosts: str, arguments: list[str], said: str, converted_demo: Path
) -> None:
    command = [word.format(model=converted_demo) for word in arguments]
    with pytest.raises(Qwen35Error, match=said):
        cluster_command.cluster(command, hosts)


def test_a_split_for_another_number_of_macs_is_refused(converted_demo: Path) -> None:
    with pytest.raises(Qwen35Error, match="3 parts for 2 Macs"):
        cluster_command.cluster(["chat", str(converted_demo)], "127.0.0.1,127.0.0.1", split="1,1,1")


@pytest.mark.parametrize("port", [None, 4321])
def test_what_is_launched_has_the_hosts_the_port_and_the_split(
    converted_demo: Path, monkeypatch: pytest.MonkeyPatch, port: int | None
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(cluster_command, "launched", lambda *what: given.extend(what) or 3)
    command = ["chat", str(converted_demo)]
    with pytest.raises(typer.Exit) as ended:
        cluster_command.cluster(command, "127.0.0.1,127.0.0.1", port=port, split="3,1")
    assert ended.value.exit_code == 3
    hosts, first, arguments, reads_input, split = given
    assert json.loads(hosts) == {
        "backend": "ring",
        "envs": [],
        "hosts": [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"], "rdma": []}] * 2,
    }
    assert first > 1024 if port is None else first == port
    assert (arguments, reads_input, split) == (command, True, "3,1")


def test_a_hostfile_of_thunderbolt_stays_as_it_is_but_for_this_mac(tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    hosts = [
        {"ssh": "a.local", "ips": ["127.0.0.1"], "rdma": [None, "rdma_en2"]},
        {"ssh": "b.local", "ips": ["192.0.2.1"], "rdma": ["rdma_en2", None]},
    ]
    file.write_text(json.dumps({"backend": "jaccl", "hosts": hosts}))
    found, backend = cluster_command.read_hosts(None, file)
    assert backend == "jaccl"
    assert found[0]["ssh"] == "127.0.0.1"
    assert found[0]["rdma"] == hosts[0]["rdma"]
    # Its name leads here alone: the others need the address that they see.
    assert found[0]["ips"] != ["127.0.0.1"]
    assert found[1] == hosts[1]
    file.write_text("{")
    with pytest.raises(Qwen35Error, match="no hostfile"):
        cluster_command.read_hosts(None, file)


def test_weights_with_the_same_config_are_another_model(tmp_path: Path) -> None:
    import mlx.core as mx

    digests = []
    for name, shape in (("a", (2, 2)), ("b", (2, 2)), ("c", (2, 4))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        mx.save_safetensors(str(folder / "model.safetensors"), {"x": mx.zeros(shape)})
        digests.append(facts_of(str(folder))["model"])
    assert digests[0] == digests[1] != digests[2]


def run(*arguments: Any, given: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from qwen35_mlx.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        input=given,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


@pytest.mark.slow
def test_a_host_that_is_reached_by_ssh_takes_part(fake_ssh: Path, converted_demo: Path) -> None:
    log, command = fake_ssh.parent / "log", 'given="${!#}"; exec bash -c "${given#stty -echo; }"'
    answer(fake_ssh, f'echo "$@" >> {log}; {command}')
    hosts = ("cluster", "--hosts", "127.0.0.1,localhost", "--")
    found = run(*hosts, "generate", converted_demo, *ASK)
    assert found.returncode == 0, found.stderr
    assert found.stdout == run("generate", converted_demo, *ASK).stdout
    assert "Paris" in found.stdout
    assert len(log.read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_split_reaches_every_process(converted_demo: Path) -> None:
    split = (*TWO_HERE[:-1], "--split", "3,1", "--")
    found = run(*split, "generate", converted_demo, *ASK)
    assert "the Macs have whole layers, one after the other: " in found.stderr
    assert found.stdout == run("generate", converted_demo, *ASK).stdout


@pytest.mark.slow
def test_standard_input_and_the_exit_code_are_those_of_the_command(converted_demo: Path) -> None:
    piped = ("chat", converted_demo, "--temperature", "0")
    found = run(*TWO_HERE, *piped, given="What is the capital of Spain?")
    assert "Madrid" in found.stdout
    assert found.returncode == 0
    found = run(*TWO_HERE, "generate", converted_demo, *ASK, "--context", "5000000")
    assert found.returncode == 1
    assert "the context does not fit the model" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.slow
def test_a_chat_has_the_terminal_and_ctrl_c_stops_an_answer_alone(converted_demo: Path) -> None:
    screen = Screen(*TWO_HERE, "chat", converted_demo, "--temperature", "0")
    prompt, done = r"\n>$", r"tok/s[^>]*\n\n>$"
    try:
        screen.wait_for(prompt)
        screen.type("What is the capital of France?\r")
        assert "Paris" in screen.wait_for(done)
        screen.type("Count to one hundred.\r")
        screen.wait_for("hundred")
        screen.type("\x03")
        screen.wait_for(r"\n\n>$")
        screen.type("What is the capital of Spain?\r")
        assert "Madrid" in screen.wait_for(done)
        screen.type("\x04")
        assert screen.exit_code() == 0
    finally:
        screen.close()
