"""Bars and spinners on a terminal, lines in a log."""

import re
import time
from typing import Any

import pytest

from qwen35_mlx.cli import progress
from qwen35_mlx.errors import Qwen35Error

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def test_progress_is_two_lines_in_a_log(consoles: Any) -> None:
    out, err = consoles()
    with progress.byte_progress("Converting [x]") as update:
        for done in range(0, 101):
            update(done * 10**6, 100 * 10**6, "language_model.model.norm.weight", "a.safetensors")
    first, last = err.getvalue().splitlines()
    assert first == "Converting [x] …"
    assert re.fullmatch(r"Converting \[x\]: 100\.0 MB read in \d+\.\d s", last)
    assert out.getvalue() == ""


def test_a_long_job_tells_a_log_every_half_minute(
    consoles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err = consoles()
    now = 1000.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    file = "model-00003-of-00094.safetensors"
    with progress.byte_progress("Converting") as update:
        for done in range(100, 201):
            update(done * 10**9, 200 * 10**9, f"tensor {done}", file)
            now += 10
        now += 20
    lines = err.getvalue().splitlines()
    # Every third call of the hundred, and the first and last line.
    assert len(lines) == 33 + 2
    assert lines[1] == (
        "Converting: 103.00 of 200.00 GB, 51 %, 100.0 MB/s, 16 min left; "
        "model-00003-of-00094.safetensors: tensor 103"
    )
    assert lines[-1] == "Converting: 100,000.0 MB read in 17 min, 100,000.0 MB before"


def test_progress_on_a_terminal_fits_its_line(consoles: Any) -> None:
    out, err = consoles(width=80, force_terminal=True, legacy_windows=False)
    tensor = "language_model.model.layers.17.linear_attn.in_proj_qkv.weight"
    with progress.byte_progress("Converting [x]") as update:
        update(2 * 10**9, 7 * 10**9, tensor, "model-00003-of-00094.safetensors")
        time.sleep(0.3)
    lines = [ESCAPES.sub("", line) for line in re.split(r"[\r\n]", err.getvalue())]
    middle = next(line for line in lines if "layers.17" in line)
    assert middle.startswith("Converting [x] ━") and "2.0/7.0 GB" in middle
    assert re.search(r"\d\d?:\d\d", middle) or "-:--" in middle
    assert all(len(line) <= 80 for line in lines)
    assert out.getvalue() == ""


def test_a_failure_leaves_the_spinner_and_the_error_readable(consoles: Any) -> None:
    _, err = consoles(force_terminal=True, width=80)
    with pytest.raises(Qwen35Error), progress.spinner("Loading " + "[odd] name"):
        time.sleep(0.2)
        raise Qwen35Error("no model")
    assert "Loading [odd] name" in ESCAPES.sub("", err.getvalue())
    # The cursor is shown again.
    assert err.getvalue().rstrip().endswith("\x1b[2K") or "\x1b[?25h" in err.getvalue()
