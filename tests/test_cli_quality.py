"""Recipes, budgets, calibration and fidelity as a user types them."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qwen35_mlx.cli import main as cli
from qwen35_mlx.cli.local_models import SOURCE
from qwen35_mlx.quant.statistics import load


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result
    return result


@pytest.mark.slow
def test_calibrate_convert_reuse_and_compare(tmp_path: Path) -> None:
    text, out, file = tmp_path / "t.txt", tmp_path / "out", tmp_path / "out.calibration.safetensors"
    text.write_text("Q: What is the capital of France?\nA: The capital of France is Paris.")
    budget = ("--bits-per-weight", "3.7")
    result = run("convert", SOURCE, out, *budget, "--calibrate", "--text", text)
    assert result.exit_code == 0, result.stderr
    assert "calibration written to" in result.stderr
    assert "predicted KL" in result.stdout
    settings = json.loads((out / "config.json").read_text())["qwen35_mlx"]["settings"]
    assert settings["method"] == "search"
    assert settings["recipe"].startswith("allocated-")
    # The same file gives the same plan.
    again = run("plan", SOURCE, *budget, "--calibration", file)
    assert again.exit_code == 0, again.stderr
    (before, after) = (
        next(line for line in r.stdout.splitlines() if "predicted KL" in line)
        for r in (result, again)
    )
    assert before == after
    assert load(file).kls
    taken = run("convert", SOURCE, tmp_path / "out2", "--calibrate", "--calibration", file)
    assert taken.exit_code == 1
    assert "exists already" in taken.stderr

    result = run("fidelity", SOURCE, out, "--text", text, "--tokens", 16)
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["num_tokens"] == 16
    assert 3.5 < figures["quantized_bits_per_weight"] <= 3.7
    assert 0 < figures["mean_kl_nats"] <= figures["p99_kl_nats"]
    assert len(figures["layer_errors"]) == len(figures["accumulated_errors"])


def test_a_recipe_and_a_mac_have_their_page() -> None:
    result = run("plan", SOURCE, "--recipe", "q3")
    assert result.exit_code == 0, result.stderr
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert "3-bit g64" in rows["layers.*.mlp.switch_mlp.gate_proj"]
    assert "8-bit g64" in rows["layers.*.linear_attn.out_proj"]
    result = run("plan", SOURCE, "--fit", "24GB", "--context", 1000, "--prefer", "speed")
    assert result.exit_code == 0, result.stderr
    assert "a Mac with 24 GB" in result.stdout
    assert "KV cache of 1,000 tokens" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("plan", SOURCE, "--bits", 4, "--recipe", "q4"), 1, "only one may decide on bits"),
        (("plan", SOURCE, "--recipe", "q7"), 1, "q8, q6, q5, q4, q3, q2"),
        (("plan", SOURCE, "--fit", "enough"), 1, "such as 192GB"),
        (("plan", SOURCE, "--fit", "1GB"), 1, "smaller than the smallest plan"),
        (("plan", SOURCE, "--bits-per-weight", 1), 1, "at least"),
        (("plan", SOURCE, "--calibration", SOURCE / "config.json"), 1, "cannot be read as a"),
        (("plan", SOURCE, "--fit", "8GB", "--prefer", "both"), 2, "quality, speed"),
        (("convert", SOURCE, "x", "--text", "t"), 2, "--text goes with --calibrate"),
        (("convert", SOURCE, "x", "--method", "gptq"), 1, "needs a calibration"),
        (("convert", "absent", "x", "--calibrate"), 1, "no checkpoint at absent"),
        (("fidelity", SOURCE, "absent"), 1, "no checkpoint at absent"),
    ],
    ids=lambda value: value[1:] if isinstance(value, tuple) else "",
)
def test_mistakes_are_named(
    arguments: tuple[object, ...], code: int, word: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == code
    assert word in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []
