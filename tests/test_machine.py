"""What a machine says about itself, on faked Macs."""

import json
import platform
import socket
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest

from qwen35_mlx import machine
from qwen35_mlx.errors import Qwen35Error

GB = 2**30


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch):
    """Turns this into a Mac of some memory, with the given answers of sysctl."""

    def become(memory_gb: int, **sysctl: int | str) -> machine.Machine:
        info = {
            "device_name": "Apple M3 Ultra",
            "memory_size": memory_gb * GB,
            "max_recommended_working_set_size": memory_gb * GB * 3 // 4,
        }
        monkeypatch.setattr(mx, "device_info", lambda: info)
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(platform, "mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))

        def run(command: list[str], **_: object) -> str:
            assert command[:2] == ["sysctl", "-n"]
            return str(sysctl.get(command[2].split(".")[-1], "")) + "\n"

        monkeypatch.setattr(subprocess, "check_output", run)
        return machine.describe()

    return become


@pytest.mark.parametrize(
    ("memory_gb", "megabytes"),
    # A tenth for the rest of the machine, 8 GiB at least.
    [(512, 471859), (256, 235929), (192, 176947), (64, 57344), (36, 28672)],
)
def test_the_line_that_raises_the_limit(mac, memory_gb: int, megabytes: int) -> None:
    described = mac(memory_gb, wired_limit_mb=0)
    assert described.chip == "Apple M3 Ultra"
    assert described.os == "macOS 15.5"
    assert described.gpu_limit_bytes == memory_gb * GB * 3 // 4
    command = f"sudo sysctl iogpu.wired_limit_mb={megabytes}"
    assert machine.raise_limit_command(described) == command
    assert machine.summary(described)["raise_gpu_limit"] == command


def test_no_line_where_it_would_not_raise_the_limit(mac) -> None:
    # Small machines have three quarters already, and a raised limit stays.
    assert machine.raise_limit_command(mac(16)) is None
    raised = mac(192, wired_limit_mb=180000)
    assert raised.gpu_limit_bytes == 180000 * 2**20
    assert machine.raise_limit_command(raised) is None


@pytest.mark.parametrize("answer", ["", "0", "unknown", "-1", "iogpu.wired_limit_mb: 60000"])
def test_an_answer_that_is_no_limit_leaves_the_recommendation(mac, answer: str) -> None:
    assert mac(64, wired_limit_mb=answer).gpu_limit_bytes == 48 * GB


def test_no_limit_is_above_the_memory(mac) -> None:
    assert mac(64, wired_limit_mb=90_000).gpu_limit_bytes == 64 * GB


def test_the_line_asks_for_what_is_needed_and_no_more(mac) -> None:
    described = mac(192, wired_limit_mb=0)
    needed = 150 * GB + 1
    command = machine.raise_limit_command(described, needed)
    assert command == f"sudo sysctl iogpu.wired_limit_mb={151 * 1024}"
    assert machine.raise_limit_command(described, 100 * GB) is None
    assert machine.raise_limit_command(described, 190 * GB) is None
    # Never more than is sane, though whole GiB would be.
    assert machine.raise_limit_command(described, 176947 * 2**20 - 1).endswith("=176947")


def test_limits_rise_with_memory_and_leave_room() -> None:
    for memory in (64, 96, 128, 192, 256, 512):
        limit, raised = (
            f(memory * GB) for f in (machine.default_limit_bytes, machine.raised_limit_bytes)
        )
        assert limit < raised <= (memory - 8) * GB
    assert 165e9 < machine.raised_limit_bytes(192 * GB) < 190e9
    assert machine.default_limit_bytes(16 * GB) == 16 * GB * 2 // 3
    assert machine.wired_limit_mb(170 * GB + 1) == 171 * 1024


@pytest.mark.parametrize("text", ["", "much", "-4GB", "0", "12 parsecs"])
def test_what_is_no_memory_is_refused(text: str) -> None:
    with pytest.raises(Qwen35Error, match="not a size of memory"):
        machine.parse_memory(text)


def test_memory_of_a_mac_is_in_gibibytes() -> None:
    assert all(machine.parse_memory(text) == 192 * GB for text in ("192GB", "192 GiB", "192"))
    assert machine.parse_memory("0.5g") == GB // 2


def test_without_metal_there_is_no_limit() -> None:
    described = machine.describe()
    if mx.metal.is_available():
        pytest.skip("this machine has Metal")
    assert described.gpu_limit_bytes is None
    assert machine.raise_limit_command(described) is None
    assert described.memory_bytes > GB
    assert described.versions["mlx"] == mx.__version__


def test_a_user_without_a_home_can_run_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The free space of a folder that is not there ended every load."""
    monkeypatch.setenv("HOME", "/nonexistent")
    assert machine.describe().disk_free_bytes > 0


def test_the_summary_names_no_person_no_host_and_no_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("USER", "ada")
    monkeypatch.setattr(socket, "gethostname", lambda: "adas-mac")
    text = json.dumps(machine.summary(machine.describe()))
    assert not any(private in text for private in ("ada", str(Path.home()), "/", platform.node()))
