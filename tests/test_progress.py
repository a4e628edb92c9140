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


def wait_for(text: str, err: Any) -> None:
    """Until the text is drawn, which a thread does ten times a second."""
    end = time.monotonic() + 30
    while text not in err.getvalue():
        assert time.monotonic() < end, f"no {text!r} in {err.getvalue()!r}"
        time.sleep(0.01)


def test_progress_on_a_terminal_fits_its_line(consoles: Any) -> None:
    out, err = consoles(width=80, force_terminal=True, legacy_windows=False)
    tensor = "language_model.model.layers.17.linear_attn.in_proj_qkv.weight"
    with progress.byte_progress("Converting [x]") as update:
        update(2 * 10**9, 7 * 10**9, tensor, "model-00003-of-00094.safetensors")
        wait_for("layers.17", err)
    lines = [ESCAPES.sub("", line) for line in re.split(r"[\r\n]", err.getvalue())]
    middle = next(line for line in lines if "layers.17" in line)
    assert middle.startswith("Converting [x] ━") and "2.0/7.0 GB" in middle
    assert re.search(r"\d\d?:\d\d", middle) or "-:--" in middle
    assert all(len(line) <= 80 for line in lines)
    assert out.getvalue() == ""


def test_a_failure_leaves_the_spinner_and_the_error_readable(consoles: Any) -> None:
    _, err = consoles(force_terminal=True, width=80)
    with pytest.raises(Qwen35Error), progress.spinner("Loading " + "[odd] name"):
        wait_for("Loading", err)
        raise Qwen35Error("no model")
    assert "Loading [odd] name" in ESCAPES.sub("", err.getvalue())
    # The cursor is shown again.
    assert err.getvalue().rstrip().endswith("\x1b[2K") or "\x1b[?25h" in err.getvalue()


def drawn(err: Any) -> list[str]:
    return [ESCAPES.sub("", line).rstrip() for line in re.split(r"[\r\n]+", err.getvalue())]


def test_a_long_prompt_is_counted_and_a_short_one_is_not(
    consoles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = consoles(width=80, force_terminal=True, legacy_windows=False)
    now = [1000.0]
    with progress.token_progress() as update:
        update(511, 511)
    assert err.getvalue() == ""
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with progress.token_progress() as update:
        now[0] += 4
        update(1024, 2048)
        update(2048, 2048)
        # Nothing is drawn behind the end.
        end = err.getvalue()
        time.sleep(0.15)
        assert err.getvalue() == end
    lines = drawn(err)
    last = [line for line in lines if "reading" in line][-1]
    assert re.fullmatch(r"reading the prompt ━{24} 2,048/2,048 tokens 512 tok/s.*", last)
    # It is taken away again.
    assert end.endswith("\x1b[2K") or end.endswith("\x1b[?25h\r\x1b[1A\x1b[2K")
    assert out.getvalue() == ""


@pytest.mark.parametrize("num_tokens", [512, 511])
def test_a_prompt_that_is_interrupted_leaves_no_bar(consoles: Any, num_tokens: int) -> None:
    _, err = consoles(width=80, force_terminal=True, legacy_windows=False)
    with pytest.raises(KeyboardInterrupt), progress.token_progress() as update:
        update(1, num_tokens)
        raise KeyboardInterrupt
    shown = err.getvalue()
    assert ("reading" in shown) == ("\x1b[2K" in shown) == (num_tokens == 512)
    time.sleep(0.15)
    assert err.getvalue() == shown


def test_a_log_is_told_now_and_then_how_long_a_prompt_still_takes(
    consoles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err = consoles()
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with progress.token_progress() as update:
        for now[0], done in ((1.0, 100), (31.0, 3100), (40.0, 4000), (70.0, 10_000)):
            update(done, 10_000)
    lines = "reading the prompt: 3,100 of 10,000 tokens, 100 tok/s, 1 min left\n"
    assert err.getvalue() == lines


def test_a_bar_begins_where_an_earlier_run_ended_and_names_no_tensor_at_its_end(
    consoles: Any,
) -> None:
    _, err = consoles(width=100, force_terminal=True, legacy_windows=False)
    with progress.byte_progress("Converting") as update:
        update(10**9, 4 * 10**9, "language_model.model.norm.weight", "model-1-of-2.safetensors")
        wait_for("norm.weight", err)
        update(4 * 10**9, 4 * 10**9, "model.b", "c.safetensors")
    lines = [line for line in drawn(err) if "Converting" in line]
    first = next(line for line in lines if "norm" in line)
    assert "1.0/4.0 GB" in first and first.endswith(" 1-of-2 norm.weight")
    assert "4.0/4.0 GB" in lines[-1] and "norm" not in lines[-1] and " b" not in lines[-1]
    with progress.byte_progress("Nothing"):
        pass


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min"), (100, "2 min"), (3569, "59 min"),
     (3600, "1 h 0 min"), (3660, "1 h 1 min"), (100_000, "27 h 47 min")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


@pytest.mark.parametrize("is_terminal", [False, True])
def test_steps_are_counted_from_one(consoles: Any, is_terminal: bool) -> None:
    _, err = consoles(**(dict(width=80, force_terminal=True) if is_terminal else {}))
    with progress.step_progress("Checking") as update:
        update(0, 3, "router")
        wait_for("router", err)
        update(2, 3, "last")
        wait_for("last", err)
    text = "\n".join(drawn(err))
    assert "Checking: router (1/3)" in text and "Checking: last (3/3)" in text
    assert ("⠋" in text) == is_terminal
