"""`plan` as a user types it: released models, Macs and memories, and options that say nothing."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qwen35_mlx.cli import main as cli
from qwen35_mlx.cli.local_models import SOURCE
from qwen35_mlx.convert import report
from qwen35_mlx.family import FAMILY


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result
    return result


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the family: the largest one takes seconds."""
    monkeypatch.setattr(report, "FAMILY", FAMILY[:2])


def test_a_released_model_is_planned_by_its_name() -> None:
    result = run("plan", "qwen/qwen3.5-0.8b", "--recipe", "q4", "--mac", "M3 Ultra 256GB")
    assert result.exit_code == 0
    assert "Qwen3.5-0.8B: sizes of the released model, nothing is downloaded" in result.stderr
    assert "self_attn.o_proj" in result.stdout and "873.4 M parameters" in result.stdout
    [tower] = [line for line in result.stdout.splitlines() if line.startswith("vision_tower.*")]
    assert tower.split() == ["vision_tower.*", "153", "BF16", "BF16", "16.00", "201.19"]
    [photo] = [line for line in result.stdout.splitlines() if "photo" in line]
    assert photo.split() == "a photo of 12 MP 11,844 tokens 24.3 MB".split()
    assert "bandwidth limit, tok/s" in result.stdout
    assert "M2 Ultra" not in result.stdout
    other = run("plan", "Qwen3.5-0.8B", "--bits", "8", "--mac", "M3 Ultra 256GB")
    assert other.stdout != result.stdout


def test_the_context_of_plan_is_the_one_that_is_asked_for() -> None:
    result = run("plan", SOURCE, "--context", "1024")
    assert "at 1k" in result.stdout and "at 8k" not in result.stdout
    assert "attention scores" in result.stdout
    result = run("plan", SOURCE, "--context", "1000000")
    assert result.exit_code == 1
    assert "context does not fit the model" in result.stderr


@pytest.mark.slow
def test_fit_without_a_source_shows_what_fits_that_memory(few: Any) -> None:
    small, large = (run("plan", "--fit", memory).stdout for memory in ("8GB", "64GB"))
    assert small.startswith("8 GB of memory: a Mac, with a context of 32,768 tokens")
    assert large.startswith("64 GB of memory")
    assert "unquantized" in large
    assert "with a context of 4,096" in run("plan", "--fit", "8GB", "--context", "4096").stdout


@pytest.mark.slow
def test_bits_and_macs_without_a_source_are_honoured(few: Any) -> None:
    by_width = run("plan", "--mac", "M4 Max 128GB")
    assert by_width.stdout.startswith("128 GB of memory: a Mac with M4 Max\n")
    assert "3-bit" in by_width.stdout and "8-bit" in by_width.stdout
    sizes = []
    ways = {"bits": 3, "recipe": "q8", "bits-per-weight": 5, "dtype": "float32"}
    for option, value in ways.items():
        result = run("plan", f"--{option}", value, "--mac", "128GB")
        assert result.exit_code == 0, result.stderr
        row = next(line for line in result.stdout.splitlines() if line.startswith("Qwen3.5-2B"))
        sizes.append(row.split()[1])
    assert sizes == ["1.5", "2.7", "1.9", "8.4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prefer", "speed"), "--prefer needs --fit or --bits-per-weight"),
        (("--png", "a.png"), "--png needs SRC"),
        (("--revision", "main"), "--revision needs SRC"),
        (("--calibration", "a.safetensors"), "--calibration needs --fit or --bits-per-weight"),
        (("--fit", "64GB", "--bits", 4), "--bits and --fit exclude each other"),
        (("--fit", "64GB", "--mac", "64GB"), "--fit with --mac needs SRC"),
        (("--mac", "M3 Ultra"), "several sizes"),
        ((SOURCE, "--prefer", "speed"), "--prefer needs --fit or --bits-per-weight"),
        ((SOURCE, "--recipe", "q4", "--group-size", 32), "--group-size and --recipe exclude"),
        ((SOURCE, "--fit", "8GB", "--group-size", 64), "--group-size and --fit exclude"),
        (
            (SOURCE, "--dtype", "float16", "--group-size", 32),
            "--group-size needs --bits",
        ),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    arguments: tuple[object, ...], message: str
) -> None:
    result = run("plan", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in " ".join(result.stderr.split())


def test_convert_refuses_a_context_without_a_budget(tmp_path: Path) -> None:
    result = run("convert", SOURCE, tmp_path / "out", "--context", 1000)
    assert (result.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert "--context needs --fit" in result.stderr


@pytest.mark.parametrize("name", ["Qwen3.5-28B", "nonsense"])
def test_an_unknown_model_is_told_the_known_ones(name: str) -> None:
    result = run("plan", name)
    assert (result.exit_code, result.stdout) == (1, "")
    assert all(member.full_name in result.stderr for member in FAMILY)
