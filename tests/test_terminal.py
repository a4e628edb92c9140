"""What a person sees of errors, plans and progress, on consoles of several kinds."""

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import write_checkpoint

from qwen35_mlx.cli import terminal
from qwen35_mlx.convert import plan
from qwen35_mlx.convert.plan import PlanRow
from qwen35_mlx.errors import Qwen35Error

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def test_errors_show_brackets_and_colons(consoles: Any) -> None:
    _, err = consoles(width=30)
    long = "[4bit] :x: " + "path/" * 20
    terminal.print_error(Qwen35Error("no model", got=long))
    assert err.getvalue() == f"error: no model\n  got: {long}\n"


# The widest rows of the 397B model.
LAYERS = "language_model.model.layers.*.mlp."
WIDE = [
    PlanRow(LAYERS + "switch_mlp.down_proj", (512, 4096, 1024), "F8_E4M3", "BF16",
            4, 64, 60, 1, 72_477_573_120),
    PlanRow(LAYERS + "shared_expert.down_proj", (4096, 1024), "F8_E4M3", "BF16",
            4, 64, 60, 1, 141_557_760),
    PlanRow("vision_tower.*", (), "BF16", "BF16", count=333, nbytes=912_345_678),
    PlanRow("model.language_model.old", (3,), "BF16", "dropped"),
]  # fmt: skip


def fake_plan() -> Any:
    return SimpleNamespace(
        table=lambda: WIDE,
        num_parameters=10**9,
        bits_per_weight=4.5,
        output_bytes=10**9,
        shards=[1],
        source_bytes=10**9,
    )


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        (dict(width=80, force_terminal=True), 5),
        (dict(width=120, force_terminal=True), 7),
        (dict(width=40), 7),
    ],
    ids=["narrow terminal", "wide terminal", "pipe"],
)
def test_nothing_in_a_plan_is_cut(consoles: Any, options: dict[str, Any], columns: int) -> None:
    out, _ = consoles(**options)
    terminal.print_plan(fake_plan())
    lines = out.getvalue().splitlines()[:-1]
    assert "…" not in out.getvalue()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 5
    assert len(lines[0].split()) == columns
    assert len(lines[0]) <= (80 if columns == 5 else 120)
    assert lines[1].split()[:3] == ["layers.*.mlp.switch_mlp.down_proj", "60", "512x4096x1024"]
    words = lines[1].split()
    assert words[-1] == "72,478"
    assert words[-3:-1] == ["4-bit", "g64"] if columns == 5 else words[-4:-2] == ["4-bit", "g64"]
    zeros = ["0.00"] * (1 if columns == 5 else 2)
    assert lines[4].split()[-1 - len(zeros) :] == ["dropped", *zeros]


def test_a_real_plan_is_shown_whole(consoles: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src", moe=True, vision=True, mtp=True)
    planned = plan(tmp_path / "src")
    out, _ = consoles()
    terminal.print_plan(planned)
    lines = out.getvalue().splitlines()
    assert len(lines) == len(planned.table()) + 2
    megabytes = sum(float(line.split()[-1]) for line in lines[1:-1])
    assert megabytes == pytest.approx(planned.output_bytes / 1e6, abs=0.005 * len(lines))
    assert f"{planned.bits_per_weight:.3f} bits per weight" in lines[-1]


def test_progress_is_two_lines_in_a_log(consoles: Any) -> None:
    out, err = consoles()
    with terminal.byte_progress("Converting [x]") as progress:
        for done in range(0, 101):
            progress(done * 10**6, 100 * 10**6, "language_model.model.norm.weight", "a.safetensors")
    first, last = err.getvalue().splitlines()
    assert first == "Converting [x] …"
    assert re.fullmatch(r"Converting \[x\]: 100\.0 MB read in \d+\.\d s", last)
    assert out.getvalue() == ""


def test_a_long_job_tells_a_log_every_half_minute(
    consoles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err = consoles()
    now = 1000.0
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: now)
    file = "model-00003-of-00094.safetensors"
    with terminal.byte_progress("Converting") as progress:
        for done in range(100, 201):
            progress(done * 10**9, 200 * 10**9, f"tensor {done}", file)
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
    with terminal.byte_progress("Converting [x]") as progress:
        progress(2 * 10**9, 7 * 10**9, tensor, "model-00003-of-00094.safetensors")
        time.sleep(0.3)
    lines = [ESCAPES.sub("", line) for line in re.split(r"[\r\n]", err.getvalue())]
    middle = next(line for line in lines if "layers.17" in line)
    assert middle.startswith("Converting [x] ━") and "2.0/7.0 GB" in middle
    assert re.search(r"\d\d?:\d\d", middle) or "-:--" in middle
    assert all(len(line) <= 80 for line in lines)
    assert out.getvalue() == ""


def test_a_failure_leaves_the_spinner_and_the_error_readable(consoles: Any) -> None:
    _, err = consoles(force_terminal=True, width=80)
    with pytest.raises(Qwen35Error), terminal.loading("[odd] name"):
        time.sleep(0.2)
        raise Qwen35Error("no model")
    assert "Loading [odd] name" in ESCAPES.sub("", err.getvalue())
    # The cursor is shown again.
    assert err.getvalue().rstrip().endswith("\x1b[2K") or "\x1b[?25h" in err.getvalue()
