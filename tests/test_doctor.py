"""The doctor on a faked Mac whose GPU is the emulator."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday
from faked_mac import DENSE, PREFILL_TOKENS, change_source, faked_mac, only
from typer.testing import CliRunner

from qwen35_mlx.cli import main as cli
from qwen35_mlx.family import FAMILY
from qwen35_mlx.kernels import checks, choice, doctor, measure, verdicts
from qwen35_mlx.kernels.checks import SMALL, Setting
from qwen35_mlx.kernels.tiers import MLX, OPERATIONS, PORTABLE, Tiers
from qwen35_mlx.kernels.verdicts import Format
from qwen35_mlx.quant.affine import BITS, GROUP_SIZES

FLOAT = Format("float32", 4, 64)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small family."""
    monkeypatch.setattr(doctor, "FAMILY", (SMALL, DENSE))
    monkeypatch.setattr(choice, "TOKENS", (1, 2))
    monkeypatch.setattr(checks, "CACHED_TOKENS", 140)
    with faked_mac(monkeypatch, {"router": 60e-6, "delta_step": 30e-6}):
        yield


def examine(formats: tuple[Format, ...] = (FLOAT,), *progress: Any) -> dict[str, Any]:
    report = doctor.run(*progress, formats=formats)
    doctor.store(report)
    return report


def used(report: dict[str, Any]) -> set[str]:
    """Operations used everywhere."""
    rows = report["kernels"]
    return {r["op"] for r in rows} - {r["op"] for r in rows if not r["used"]}


def test_there_is_a_check_of_every_kernel() -> None:
    assert [check.op for check in checks.CHECKS] == list(OPERATIONS)


@pytest.mark.slow
def test_right_kernels_are_timed_for_every_size_and_stored(mac: None) -> None:
    steps: list[tuple[int, int, str]] = []
    report = doctor.run(lambda *step: steps.append(step), [FLOAT])
    doctor.store(report)
    assert [what for _, _, what in steps] == list(OPERATIONS)
    assert report["doctor"] == 2
    assert report["machine"]["chip"] == "Apple M3 Ultra"
    assert report["machine"]["bandwidth_gb_per_s"] == 819
    rows = report["kernels"]
    assert all(row["problem"] is None for row in rows)
    sizes = {(r["op"], r["member"], r["num_tokens"]) for r in rows}
    assert len(sizes) == len(rows)
    assert sizes == {
        (check.op, member.name, n)
        for check in checks.CHECKS
        for member in ((SMALL,) if check.needs_experts else (SMALL, DENSE))
        for n in ((PREFILL_TOKENS,) if check.is_prefill else (1, 2))
    }
    # The router was slower, the step no faster.
    assert used(report) == set(OPERATIONS) - {"router", "delta_step"}
    row = rows[0]
    assert (row["metal_us"], row["mlx_us"], row["speedup"]) == (10.0, 30.0, 3.0)
    case = checks.CHECKS[0].build(SMALL, Setting(mx.float32))
    assert row["metal_gb_per_s"] == round(case.num_bytes / 10e-6 / 1e9, 1)
    assert row["bandwidth_share"] == round(row["metal_gb_per_s"] / 819, 3)
    # On paper and on disk it is the same.
    stored = [v._asdict() for v in verdicts.read()]
    assert stored == [{n: r[n] for n in stored[0]} for r in json.loads(json.dumps(rows))]


def test_a_verdict_is_about_its_own_bits(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "projection")
    timed = measure.seconds

    def slow_at_two_bits(cases: Any, tiers: Any, runs: int) -> float:
        return timed(cases, tiers, runs) * (9 if tiers.kernel_rows and bits[0] == 2 else 1)

    bits: list[int] = []
    build = checks._projection

    def noted(member: Any, setting: Setting) -> Any:
        bits[:] = [setting.bits]
        return build(member, setting)

    monkeypatch.setattr(checks, "CHECKS", [checks.Check("projection", noted)])
    monkeypatch.setattr(measure, "seconds", slow_at_two_bits)
    report = examine((FLOAT, FLOAT._replace(bits=2)))
    assert {(r["bits"], r["used"]) for r in report["kernels"]} == {(4, True), (2, False)}


def test_a_kernel_that_computes_something_else_is_never_used(
    mac: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "qk_norm_rope", "output_gate")
    change_source(monkeypatch, "output_gate", "sigmoid(", "1.01f * sigmoid(")
    report = examine()
    assert used(report) == {"qk_norm_rope"}
    problems = {r["problem"] for r in report["kernels"] if r["op"] == "output_gate"}
    assert len(problems) == 1
    assert problems.pop().startswith("relative error 0.01, at most 0.0001: small")


def test_a_kernel_that_does_not_compile_is_never_used(
    mac: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "qk_norm_rope", "router", "output_gate")
    change_source(monkeypatch, "router", ";", "; oops();")
    report = examine()
    assert used(report) == {"qk_norm_rope", "output_gate"}
    assert "oops" in next(r["problem"] for r in report["kernels"] if r["op"] == "router")


def test_a_kernel_that_did_not_run_has_not_matched(
    mac: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "chunk_delta_rule")
    monkeypatch.setattr(checks, "SMALL", SMALL._replace(linear_value_head_dim=12))
    report = examine()
    assert used(report) == set()
    assert report["kernels"][0]["problem"].startswith("the kernel did not run")


def test_outputs_that_are_not_numbers_do_not_match(
    mac: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "output_gate")
    change_source(monkeypatch, "output_gate", "sigmoid(", "NAN * sigmoid(")
    assert "relative error inf" in examine()["kernels"][0]["problem"]


def test_the_rotation_is_judged_at_the_end_of_the_context(
    mac: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cosine that is good for small angles alone is found out."""
    only(monkeypatch, "qk_norm_rope")
    assert used(examine()) == {"qk_norm_rope"}
    good = mx.cos
    monkeypatch.setattr(
        mx, "cos", lambda x: mx.where(mx.abs(x) < 1000, good(x), good(x * (1 + 3e-7)))
    )
    assert "relative error" in examine()["kernels"][0]["problem"]


def test_shapes_that_do_not_fit_are_left_out(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "grouped_expert_matmul")
    huge = SMALL._replace(name="huge", hidden_size=8192, width=4096, num_experts=4096)
    monkeypatch.setattr(doctor, "FAMILY", (huge, SMALL))
    assert {row["member"] for row in examine()["kernels"]} == {"small"}


@pytest.mark.parametrize("dtype", everyday([mx.float32, mx.bfloat16, mx.float16], 1))
def test_the_mlx_tier_computes_each_operation_within_tolerance(dtype: mx.Dtype) -> None:
    """The rival is right too, and the tolerance of a type is not that of another."""
    worst = 0.0
    for check in checks.CHECKS:
        setting = Setting(dtype, num_tokens=40 if check.is_prefill else 3)
        mx.random.seed(1)
        exact = check.build(SMALL, setting.exact)
        wanted = exact.run(PORTABLE, exact.x)
        mx.random.seed(1)
        case = check.build(SMALL, setting)
        assert case.x.dtype == (mx.float32 if check.op == "router" else dtype)
        error = checks.relative_error(case.run(Tiers(MLX), case.x), wanted)
        # MLX rounds between its steps.
        assert error < 3 * checks.TOLERANCE[dtype], check.op
        worst = max(worst, error)
    assert worst > 0


def test_outputs_are_chained_and_weights_take_turns() -> None:
    ran: list[tuple[int, float]] = []

    def case(number: int) -> checks.Case:
        def run(tiers: Tiers, x: mx.array) -> list[mx.array]:
            ran.append((number, x[0].item()))
            return [x + 1, mx.full(4, mx.inf)] if number == 9 else [mx.sin(x), mx.zeros((2, 2))]

        return checks.Case(run, mx.ones(4), 1)

    taken = measure.seconds([case(0), case(1), case(2)], PORTABLE, 5)
    assert [number for number, _ in ran] == [0, 1, 2, 0, 1]
    assert 0 < taken < 1


def test_copies_of_weights_are_larger_than_any_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    check, setting = checks.CHECKS[0], Setting()
    case = check.build(SMALL, setting)
    monkeypatch.setattr(measure, "COLD_BYTES", 5 * case.num_bytes)
    copies = [case, *measure._copies(check, SMALL, setting, case)]
    assert sum(c.num_bytes for c in copies) > measure.COLD_BYTES
    outputs = [c.run(PORTABLE, case.x)[0] for c in copies]
    assert not any(mx.array_equal(outputs[0], other) for other in outputs[1:])


def test_messages_lose_the_paths_in_them() -> None:
    error = RuntimeError("cannot open /Users/ada/Library/x.metallib: ~/secret C:\\Users\\ada\nmore")
    message = measure.impersonal(error)
    assert "ada" not in message
    assert "secret" not in message
    assert message.startswith("cannot open <path>")


@pytest.mark.parametrize(
    "check", everyday([(c,) for c in checks.CHECKS], 0, 4, 10), ids=lambda c: c.op
)
def test_cases_of_ops_alone_are_finite_and_the_same_for_a_seed(check: checks.Check) -> None:
    outputs = []
    for _ in range(2):
        mx.random.seed(3)
        case = check.build(SMALL, Setting(num_tokens=40))
        outputs.append([np.array(a.astype(mx.float32)) for a in case.run(PORTABLE, case.x)])
        assert case.num_bytes > 0
    for a, b in zip(*outputs, strict=True):
        assert np.isfinite(a).all()
        assert (a == b).all()
        assert np.abs(a).max() > 0


def test_the_memory_of_a_case_is_known_before_it_is_made() -> None:
    mixture = SMALL._replace(hidden_size=512, width=512, num_experts=64)
    for check in checks.CHECKS:
        if check.op in ("projection", "expert_gate_up", "grouped_expert_matmul"):
            member = mixture if check.needs_experts else FAMILY[0]
            case = check.build(member, Setting(bits=8, num_tokens=4))
            weights = checks.num_bytes_needed(check, member, 4) - 10**9
            assert case.num_bytes < weights < 15 * case.num_bytes


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
    mac: None, monkeypatch: pytest.MonkeyPatch, run_cli: Any
) -> None:
    only(monkeypatch, "qk_norm_rope")
    result = run_cli("--json")
    assert all(row["used"] for row in json.loads(result.stdout)["kernels"])
    assert result.stderr == "Checking kernels: qk_norm_rope (1/1)\n"


def test_the_command_prints_a_line_for_every_size(
    mac: None, monkeypatch: pytest.MonkeyPatch, run_cli: Any
) -> None:
    only(monkeypatch, "qk_norm_rope", "output_gate")
    change_source(monkeypatch, "output_gate", "sigmoid(", "2.0f * sigmoid(")
    text = run_cli().stdout
    assert "Apple M3 Ultra" in text
    assert "sudo sysctl iogpu.wired_limit_mb=" in text
    assert "qk_norm_rope: right, faster in 4 of 4" in text
    assert "small      4 bits g64    1 tokens: 3.00x, 10.0 us" in text
    assert "output_gate: not used: relative error" in text


def test_the_formats_asked_for_are_measured(
    mac: None, monkeypatch: pytest.MonkeyPatch, run_cli: Any
) -> None:
    only(monkeypatch, "projection")
    report = json.loads(run_cli("--json", "--bits", "3", "--group-size", "32").stdout)
    assert {(r["bits"], r["group_size"]) for r in report["kernels"]} == {(3, 32)}
    result = run_cli("--bits", "7")
    assert result.exit_code == 2


def test_a_models_own_sizes_and_bits_are_measured_too(
    mac: None, monkeypatch: pytest.MonkeyPatch, run_cli: Any, converted_demo: Path
) -> None:
    only(monkeypatch, "router", "output_gate")
    report = json.loads(run_cli(str(converted_demo), "--json").stdout)
    own = {(r["member"], r["dtype"]) for r in report["kernels"]} - {
        (m, "bfloat16") for m in ("small", "dense")
    }
    assert own == {("model", "float32")}


def test_a_result_that_cannot_be_stored_takes_nothing_from_the_report(
    mac: None, monkeypatch: pytest.MonkeyPatch, run_cli: Any, tmp_path: Path
) -> None:
    only(monkeypatch, "qk_norm_rope")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "file"))
    result = run_cli("--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["kernels"][0]["used"]
    assert "QWEN35_MLX_CACHE" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.op)
def test_every_width_and_type_is_tried_with_all_lengths_and_groups(check: checks.Check) -> None:
    settings = list(checks.parity_settings(check))
    assert {(s.bits, s.dtype) for s in settings} == {
        (bits, dtype) for bits in BITS for dtype in checks.TOLERANCE
    }
    lengths = (70, 33, 130) if check.is_prefill else (1, 3, 8)
    assert {s.num_tokens for s in settings} == set(lengths)
    assert {s.group_size for s in settings} == set(GROUP_SIZES)
    for dtype in checks.TOLERANCE:
        assert {s.num_tokens for s in settings if s.dtype == dtype} == set(lengths)
    assert all(s.padded == (s.num_tokens > 1) for s in settings)
