"""Recipes, budgets, calibration and fidelity as a user types them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from typer.testing import CliRunner

from qwen35_mlx.cli import convert_commands
from qwen35_mlx.cli import main as cli
from qwen35_mlx.cli.local_models import SOURCE
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.quant.statistics import load

CALIBRATE_TO = ("convert", SOURCE, "x", "--calibrate", "--calibration")


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result
    return result


@pytest.mark.slow
def test_calibrate_convert_reuse_and_compare(tmp_path: Path) -> None:
    text, out, file = tmp_path / "t.txt", tmp_path / "out", tmp_path / "out.calibration.safetensors"
    text.write_text("Q: What is the capital of France?\nA: The capital of France is Paris.")
    budget = ("--bits-per-weight", "3.7")
    result = run("convert", SOURCE, out, *budget, "--calibrate", "--calibration-text", text)
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
        (
            ("plan", SOURCE, "--bits", 4, "--recipe", "q4"),
            2,
            "--bits and --recipe exclude",
        ),
        (("plan", SOURCE, "--recipe", "q7"), 1, "q8, q6, q5, q4, q3, q2"),
        (("plan", SOURCE, "--fit", "enough"), 1, "such as 192GB"),
        (("plan", SOURCE, "--fit", "1GB"), 1, "smaller than the smallest plan"),
        (("plan", SOURCE, "--bits-per-weight", 1), 1, "at least"),
        (
            ("plan", SOURCE, "--fit", "8GB", "--calibration", SOURCE / "config.json"),
            1,
            "cannot be read as a",
        ),
        (("plan", SOURCE, "--fit", "8GB", "--prefer", "both"), 2, "'quality', 'speed'"),
        (
            ("convert", SOURCE, "x", "--calibration-text", "t"),
            2,
            "--calibration-text needs --calibrate",
        ),
        (("convert", SOURCE, "x", "--method", "gptq"), 1, "needs a calibration"),
        (("convert", "absent", "x", "--calibrate"), 1, "no checkpoint at absent"),
        # Before a calibration, which may take hours: nothing of one is there.
        (("convert", SOURCE, "x", "--calibrate", "--recipe", "q9"), 1, "no recipe 'q9'"),
        (("convert", SOURCE, "x", "--calibrate", "--bits-per-weight", 1), 1, "at least"),
        ((*CALIBRATE_TO, "cal.txt"), 1, "expected: NAME.safetensors"),
        ((*CALIBRATE_TO, SOURCE / "config.json" / "x.safetensors"), 1, "cannot write"),
        (("plan", SOURCE, "--bits-per-weight", 1), 1, "hint: use more --bits-per-weight"),
        (("plan", SOURCE, "--macs", "0"), 2, "--macs takes 1 or more"),
        (("upload", "absent", "a/b"), 1, "got: no such folder"),
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


def test_plan_prints_a_table_and_writes_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src", moe=True)
    result = run("plan", tmp_path / "src", "--bits", "3", "--group-size", "128")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["module", "count", "shape", "source", "becomes", "bpw", "MB"]
    embedding = next(line for line in lines if line.startswith("embed_tokens"))
    assert embedding.split()[1:-1] == ["1", "96x128", "BF16", "3-bit", "g128", "3.25"]
    assert any("bits per weight of the text model" in line for line in lines)
    assert any(line.startswith("conversion: peak memory ") for line in lines)
    assert any(line.split()[:5] == ["M2", "Ultra", "192", "GB", "155"] for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_convert_tells_progress_on_stderr_and_the_result_on_stdout(tmp_path: Path) -> None:
    out = tmp_path / "[out] put"
    result = run("convert", SOURCE, out, "--bits", "4")
    assert result.exit_code == 0
    assert f"written to {out}" in result.stdout
    assert "\nConverting demo …\n" in result.stderr
    assert "MB read in" in result.stderr
    assert f"next: qwen35-mlx chat '{out}'" in result.stderr
    assert json.loads((out / "config.json").read_text())["quantization"]["bits"] == 4


def test_a_folder_in_the_way_is_told_before_hours_of_calibration(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = run("convert", "no/source", tmp_path / "out", "--calibrate")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {tmp_path / 'out'} exists already")


def test_verify_reads_everything_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("convert", SOURCE, out, "--verify")
    assert result.exit_code == 0
    assert "verified: all checksums match" in result.stdout
    result = run("convert", SOURCE, out, "--verify")
    assert (result.exit_code, "written to" in result.stdout) == (0, False)
    # All of it is read by this run, none by one before.
    assert re.search(r": [3-9]\.\d MB read in [^,]*\n", result.stderr)
    for name in ("model.safetensors", "tokenizer.json"):
        path = out / name
        raw = bytearray(path.read_bytes())
        raw[-2] ^= 1
        path.write_bytes(raw)
        result = run("convert", SOURCE, out, "--verify")
        assert result.exit_code == 1
        assert f"got: {name} has another checksum" in result.stderr
        raw[-2] ^= 1
        path.write_bytes(raw)
    (out / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in run("convert", SOURCE, out, "--verify").stderr


@pytest.mark.slow
def test_plan_without_a_source_is_about_this_machine() -> None:
    result = run("plan")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    row = next(line for line in lines if line.startswith("Qwen3.5-397B-A17B"))
    assert row.split()[1:3] == ["178.2", "GB,"]


def test_convert_refuses_to_write_over_a_folder(tmp_path: Path) -> None:
    result = run("convert", SOURCE, tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"error: {tmp_path} exists already\n" in result.stderr


def test_a_conversion_that_cannot_be_recorded_is_still_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "file" / "cache"))
    result = run("convert", SOURCE, tmp_path / "out")
    assert result.exit_code == 0 and (tmp_path / "out" / "config.json").exists()
    assert "chat without a model will not find this folder" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "demo-4bit"),
        (["--bits", 4], "demo-4bit"),
        (["--bits", 3, "--group-size", 32], "demo-3bit-g32"),
        (["--group-size", 128], "demo-4bit-g128"),
        (["--recipe", "q4"], "demo-q4"),
        (["--dtype", "bfloat16"], "demo-bf16"),
        (["--dtype", "float32"], "demo-fp32"),
        (["--bits", 8, "--dtype", "float16"], "demo-8bit-fp16"),
        (["--method", "search"], "demo-4bit-search"),
        (["--fit", "24 GiB"], "demo-24GB"),
        (["--fit", "24gb", "--prefer", "speed"], "demo-24GB-speed"),
        (["--bits-per-weight", 3.75], "demo-3.75bpw"),
    ],
)
def test_without_out_the_settings_name_the_folder(
    arguments: list[object], name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    # Nothing is converted: what the name is can be seen where it is taken.
    (tmp_path / name).mkdir()
    result = run("convert", SOURCE, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"OUT is {name}\n")
    assert f"error: {name} exists already" in result.stderr


@pytest.mark.parametrize(
    ("source", "name"),
    [("Qwen/Qwen3.5-4B", "Qwen3.5-4B-4bit"), (".", "here-4bit"), ("../here/", "here-4bit")],
)
def test_without_out_the_folder_has_the_name_of_the_source(
    source: str, name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "here" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert run("convert", source).stderr.startswith(f"OUT is {name}\n")


def test_without_out_the_model_is_in_the_current_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("convert", SOURCE)
    assert result.exit_code == 0 and "next: qwen35-mlx chat " in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["demo-4bit"]


def test_verify_refuses_settings_that_the_folder_does_not_have(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("convert", SOURCE, out, "--bits", 3).exit_code == 0
    again = ("convert", SOURCE, out, "--verify")
    for same in ((), ("--bits", 3), ("--bits", 3, "--group-size", 64, "--method", "minmax")):
        assert run(*again, *same).exit_code == 0
    for other in (("--bits", 4), ("--recipe", "q3"), ("--method", "search"), ("--fit", "8GB")):
        result = run(*again, *other)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "was converted from another source or with other settings" in result.stderr
    assert run("convert", tmp_path, out, "--verify").exit_code == 1
    # The source may be gone by now.
    assert run("convert", "elsewhere/demo/", out, "--verify").exit_code == 0
    for useless in (("--calibrate",), ("--revision", "v1")):
        assert run(*again, *useless).exit_code == 2


@pytest.mark.slow
def test_a_text_with_a_byte_order_mark_is_run_without_it(tmp_path: Path) -> None:
    text = "The capital of France is Paris. " * 3
    outputs = []
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / encoding).write_bytes(text.encode(encoding))
        result = run("fidelity", SOURCE, SOURCE, "--text", tmp_path / encoding, "--tokens", 9999)
        outputs.append(json.loads(result.stdout.splitlines()[-1])["num_tokens"])
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.slow
def test_a_report_is_printed_where_its_picture_cannot_be_written(tmp_path: Path) -> None:
    text = tmp_path / "t"
    text.write_text("The capital of France is Paris.")
    arguments = ("--text", text, "--tokens", 5, "--png", tmp_path / "none" / "x.png")
    result = run("fidelity", SOURCE, SOURCE, *arguments)
    assert result.exit_code == 1 and result.stderr.splitlines()[-1]
    assert json.loads(result.stdout.splitlines()[-1])["num_tokens"] == 5


@pytest.mark.parametrize("method", [None, "gptq", "distill"])
def test_a_calibration_is_made_saved_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str | None
) -> None:
    steps: list[Any] = []

    def calibrate(source: str, ids: Any, hessians: bool, keep_hessians: bool, progress: Any) -> str:
        steps.append((source, ids.size, hessians, keep_hessians))
        progress(0, 1, "layer 0")
        return "made"

    monkeypatch.setattr("qwen35_mlx.convert.calibrate.calibrate", calibrate)
    monkeypatch.setattr(
        "qwen35_mlx.quant.statistics.save", lambda found, file: steps.append((found, file))
    )
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("What is the capital of France? " * 3)
    found = convert_commands.calibration_for(str(SOURCE), out, None, True, text, method)
    assert found == "made"
    (source, num_tokens, hessians, are_kept), saved = steps
    assert source == str(SOURCE) and num_tokens > 10
    # A distillation collects its own; the errors of settings are those of error feedback.
    assert hessians == (method is not None) and are_kept == (method == "gptq")
    assert saved == ("made", tmp_path / "out.calibration.safetensors")
    # Without the option nothing is made.
    assert convert_commands.calibration_for(str(SOURCE), out, None) is None
    saved[1].touch()
    with pytest.raises(Qwen35Error, match="exists already"):
        convert_commands.calibration_for(str(SOURCE), out, None, True, text, method)
    assert len(steps) == 2


def test_a_folder_of_another_program_is_verified_by_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = run("convert", SOURCE, tmp_path, "--verify")
    assert result.exit_code == 1 and "another source" not in result.stderr
    assert "checksums" in result.stderr
