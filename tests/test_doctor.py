"""The doctor on a faked Mac whose GPU is the emulator."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from metal.emulator import emulated
from typer.testing import CliRunner

from qwen35_mlx.cli import main as cli
from qwen35_mlx.kernels import checks, choice, doctor, metal
from qwen35_mlx.kernels.checks import SMALL, Setting

DENSE = SMALL._replace(name="dense", hidden_size=64, num_experts=0, per_token=0)
# By operation and way; all that is not named takes 10 us as kernel and 30 as ops.
TIMES = {("router", "kernel"): 60e-6, ("delta_step", "kernel"): 30e-6}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Small family, few parity cases, and times that depend on nothing but the operation."""
    info = {
        "device_name": "Apple M9",
        "memory_size": 64 * 2**30,
        "max_recommended_working_set_size": 48 * 2**30,
    }
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(doctor, "FAMILY", (SMALL, DENSE))
    monkeypatch.setattr(
        checks,
        "parity_settings",
        lambda check: [Setting(mx.float32, num_tokens=40 if check.is_prefill else 2)],
    )
    monkeypatch.setattr(checks, "PREFILL_TOKENS", 40)
    monkeypatch.setattr(checks, "CACHED_TOKENS", 140)

    def seconds(case: Any, kernels: metal.KernelSet, runs: int) -> float:
        # The only operation, or the last that ran as a kernel.
        state.op = next(iter(kernels), state.op)
        way = "kernel" if kernels else "ops"
        return TIMES.get((state.op, way), 10e-6 if kernels else 30e-6)

    state = SimpleNamespace(op="")
    monkeypatch.setattr(doctor, "seconds", seconds)
    metal.clear()
    with emulated(metal_available=True):
        yield state
    metal.clear()


def examine_and_store(*progress: Any) -> dict[str, Any]:
    report = doctor.run(*progress)
    doctor.store(report)
    return report


def only(monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    monkeypatch.setattr(checks, "CHECKS", [c for c in checks.CHECKS if c.op in ops])


def change_source(monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str) -> None:
    """What `<file>.metal` says from now on."""
    read = metal._read

    def changed(name: str) -> tuple[str, str]:
        functions, body = read(name)
        if name == file:
            assert old in functions + body
            functions, body = functions.replace(old, new), body.replace(old, new)
        return functions, body

    monkeypatch.setattr(metal, "_read", changed)


def test_there_is_a_check_of_every_kernel() -> None:
    assert [check.op for check in checks.CHECKS] == list(metal.OPS)


def test_right_kernels_are_timed_stored_and_chosen_where_faster(mac: Any) -> None:
    steps: list[tuple[int, int, str]] = []
    report = examine_and_store(lambda *step: steps.append(step))
    assert [what for _, _, what in steps] == list(metal.OPS)
    assert report["machine"]["chip"] == "Apple M9"
    for op, result in report["kernels"].items():
        assert (result["matched"], result["problem"]) == (True, None), op
        needs_experts = op in ("router", "grouped_expert_matmul")
        assert set(result["members"]) == ({"small"} if needs_experts else {"small", "dense"})
    figures = report["kernels"]["projection"]["members"]["small"]
    assert (figures["kernel_us"], figures["ops_us"], figures["speedup"]) == (10.0, 30.0, 3.0)
    case = checks.CHECKS[0].build(SMALL, Setting())
    assert figures["kernel_gb_per_s"] == round(case.num_bytes / 10e-6 / 1e9, 1)
    # The router was slower, the step no faster.
    assert choice.choose("auto", SMALL) == set(metal.OPS) - {"router", "delta_step"}
    # On paper and on disk it is the same.
    assert choice.read() == json.loads(json.dumps(report))["kernels"]


def test_a_kernel_that_computes_something_else_is_never_used(
    mac: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "qk_norm_rope", "output_gate")
    change_source(monkeypatch, "output_gate", "sigmoid(", "1.01f * sigmoid(")
    found = examine_and_store()["kernels"]
    assert found["qk_norm_rope"]["matched"]
    assert not found["output_gate"]["matched"]
    assert found["output_gate"]["problem"].startswith("relative error 0.01, at most 0.0001: small")
    assert choice.choose("auto", SMALL) == {"qk_norm_rope"}


def test_a_kernel_that_does_not_compile_is_never_used(
    mac: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "qk_norm_rope", "router", "output_gate")
    change_source(monkeypatch, "router", ";", "; oops();")
    found = examine_and_store()["kernels"]
    assert [found[op]["matched"] for op in found] == [True, True, False]
    assert "oops" in found["router"]["problem"]
    assert choice.choose("auto", SMALL) == {"qk_norm_rope", "output_gate"}


def test_a_kernel_that_did_not_run_has_not_matched(
    mac: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "chunk_delta_rule")
    monkeypatch.setattr(checks, "SMALL", SMALL._replace(value_head_dim=12))
    found = examine_and_store()["kernels"]["chunk_delta_rule"]
    assert not found["matched"]
    assert found["problem"].startswith("the kernel did not run")


def test_outputs_that_are_not_numbers_do_not_match(
    mac: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "output_gate")
    change_source(monkeypatch, "output_gate", "sigmoid(", "NAN * sigmoid(")
    found = examine_and_store()["kernels"]["output_gate"]
    assert not found["matched"]
    assert "relative error inf" in found["problem"]


def test_the_rotation_is_judged_at_the_end_of_the_context(
    mac: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cosine that is good for small angles alone is found out."""
    only(monkeypatch, "qk_norm_rope")
    assert examine_and_store()["kernels"]["qk_norm_rope"]["matched"]
    good = mx.cos
    monkeypatch.setattr(
        mx, "cos", lambda x: mx.where(mx.abs(x) < 1000, good(x), good(x * (1 + 3e-7)))
    )
    found = examine_and_store()["kernels"]["qk_norm_rope"]
    assert not found["matched"]
    assert "relative error" in found["problem"]


def test_shapes_that_do_not_fit_are_left_out(mac: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "expert_down")
    huge = SMALL._replace(name="huge", hidden_size=8192, width=4096, num_experts=4096)
    monkeypatch.setattr(doctor, "FAMILY", (huge, SMALL))
    found = examine_and_store()["kernels"]["expert_down"]
    assert found["members"]["huge"] == "not enough memory"
    assert found["matched"]
    assert choice.shape_key(huge) not in found["speedup"]


def test_messages_lose_the_paths_in_them() -> None:
    error = RuntimeError("cannot open /Users/ada/Library/x.metallib: ~/secret C:\\Users\\ada\nmore")
    message = doctor._impersonal(error)
    assert "ada" not in message
    assert "secret" not in message
    assert message.startswith("cannot open <path>")


def test_timing_evaluates_every_run() -> None:
    ran = []

    def run(kernels: metal.KernelSet) -> list[mx.array]:
        ran.append(kernels)
        return [mx.ones(4) * len(ran)]

    taken = doctor.seconds(checks.Case(run, 1), metal.NONE, 5)
    assert len(ran) == 5
    assert 0 < taken < 1


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.op)
def test_cases_of_ops_alone_are_finite_and_the_same_for_a_seed(check: checks.Check) -> None:
    outputs = []
    for _ in range(2):
        mx.random.seed(3)
        case = check.build(SMALL, Setting(num_tokens=40))
        outputs.append([np.array(a.astype(mx.float32)) for a in case.run(metal.NONE)])
        assert case.num_bytes > 0
    for a, b in zip(*outputs, strict=True):
        assert np.isfinite(a).all()
        assert (a == b).all()
        assert np.abs(a).max() > 0


@pytest.fixture
def run_cli() -> Callable[..., Any]:
    return lambda *arguments: CliRunner().invoke(cli.app, ["doctor", *arguments])


def test_without_metal_the_command_says_so_and_runs_the_rest(run_cli: Any, cache: Path) -> None:
    if mx.metal.is_available():
        pytest.skip("this machine has Metal")
    result = run_cli()
    assert result.exit_code == 0
    assert "no GPU with Metal" in result.stdout
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["kernels"] is None
    assert report["machine"]["memory_gb"] > 0
    assert not cache.exists()


def test_json_alone_goes_to_standard_output(
    mac: Any, monkeypatch: pytest.MonkeyPatch, run_cli: Any
) -> None:
    only(monkeypatch, "qk_norm_rope")
    result = run_cli("--json")
    assert json.loads(result.stdout)["kernels"]["qk_norm_rope"]["matched"]
    assert result.stderr == "Checking kernels: qk_norm_rope (1/1)\n"


def test_the_command_prints_what_it_found(
    mac: Any, monkeypatch: pytest.MonkeyPatch, run_cli: Any
) -> None:
    only(monkeypatch, "qk_norm_rope", "output_gate")
    change_source(monkeypatch, "output_gate", "sigmoid(", "2.0f * sigmoid(")
    text = run_cli().stdout
    assert "Apple M9" in text
    assert "sudo sysctl iogpu.wired_limit_mb=57344" in text
    assert "qk_norm_rope: matches" in text
    assert "small      3.00x: 10.0 us" in text
    assert "output_gate: not used: relative error" in text


def test_a_result_that_cannot_be_stored_takes_nothing_from_the_report(
    mac: Any, monkeypatch: pytest.MonkeyPatch, run_cli: Any, tmp_path: Path
) -> None:
    only(monkeypatch, "qk_norm_rope")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "file"))
    result = run_cli("--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["kernels"]["qk_norm_rope"]["matched"]
    assert "QWEN35_MLX_CACHE" in result.stderr
    assert "Traceback" not in result.output
