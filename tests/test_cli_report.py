"""What a person sees of errors and plans, on consoles of several kinds."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import write_checkpoint

from qwen35_mlx.cli import report, terminal
from qwen35_mlx.convert import plan
from qwen35_mlx.convert.plan import PlanRow
from qwen35_mlx.errors import Qwen35Error


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
    report.print_plan(fake_plan())
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
    report.print_plan(planned)
    lines = out.getvalue().splitlines()
    assert len(lines) == len(planned.table()) + 2
    megabytes = sum(float(line.split()[-1]) for line in lines[1:-1])
    assert megabytes == pytest.approx(planned.output_bytes / 1e6, abs=0.005 * len(lines))
    assert f"{planned.bits_per_weight:.3f} bits per weight" in lines[-1]
