"""The check of a model at its first load, on a faked Mac."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from everyday import everyday
from faked_mac import change_source, faked_mac, only

import qwen35_mlx
from qwen35_mlx.kernels import choice, first_load, measure, verdicts
from qwen35_mlx.kernels.tiers import METAL, MLX


@pytest.fixture(autouse=True)
def mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "TOKENS", (1, 2))
    monkeypatch.setattr(first_load, "LIMIT_S", 1e9)
    with faked_mac(monkeypatch, {"delta_step": 40e-6}):
        yield tmp_path / "cache"


def tier_of(demo: Path, op: str, num_rows: int = 1) -> str:
    model, _ = qwen35_mlx.load(demo)
    assert len({layer.kernels.of(op, num_rows) for layer in model.layers}) == 1
    return str(model.layers[0].mlp.kernels.of(op, num_rows))


def test_a_right_and_faster_kernel_is_used_from_the_first_load_on(
    converted_demo: Path, mac: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    only(monkeypatch, "output_gate", "router")
    assert tier_of(converted_demo, "router") == METAL
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Checked this model's Metal kernels in ")
    assert lines[0].endswith("2 of 2 used (all figures: qwen35-mlx doctor)")
    assert {(v.op, v.num_tokens) for v in verdicts.read()} == {
        (op, n) for op in ("output_gate", "router") for n in (1, 2)
    }
    # Of prefill nothing was measured.
    assert tier_of(converted_demo, "chunk_delta_rule", 2048) == MLX


def test_the_second_load_measures_and_says_nothing(
    converted_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    only(monkeypatch, "output_gate")
    qwen35_mlx.load(converted_demo)
    capsys.readouterr()
    monkeypatch.setattr(measure, "judge", None)
    assert tier_of(converted_demo, "output_gate") == METAL
    assert capsys.readouterr().err == ""


def test_a_slower_kernel_is_left_to_mlx_and_not_timed_for_more_tokens(
    converted_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    only(monkeypatch, "delta_step")
    assert tier_of(converted_demo, "delta_step") == MLX
    assert "0 of 1 used (" in capsys.readouterr().err
    assert [v.num_tokens for v in verdicts.read()] == [1]
    monkeypatch.setattr(measure, "judge", None)
    assert tier_of(converted_demo, "delta_step") == MLX


def test_a_wrong_kernel_is_left_to_mlx_and_named(
    converted_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    only(monkeypatch, "output_gate")
    change_source(monkeypatch, "output_gate", "sigmoid(", "1.01f * sigmoid(")
    assert tier_of(converted_demo, "output_gate") == MLX
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "0 of 1 used, not right here: output_gate" in line
    (found,) = verdicts.read()
    assert found.problem is not None
    assert found.problem.startswith("relative error 0.01, at most 0.0001: model")


def test_a_kernel_that_does_not_compile_is_left_to_mlx(
    converted_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    only(monkeypatch, "output_gate", "router")
    change_source(monkeypatch, "router", ";", "; oops();")
    assert tier_of(converted_demo, "router") == MLX
    assert "1 of 2 used, not right here: router" in capsys.readouterr().err
    assert tier_of(converted_demo, "output_gate") == METAL


@pytest.mark.parametrize("what", everyday(["mlx", "os", "kernels"], 0, 2))
def test_what_changes_is_checked_again(
    converted_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, what: str
) -> None:
    only(monkeypatch, "output_gate")
    qwen35_mlx.load(converted_demo)
    other = verdicts.machine_key() | {what: "another"}
    monkeypatch.setattr(verdicts, "machine_key", lambda: other)
    capsys.readouterr()
    qwen35_mlx.load(converted_demo)
    assert "1 of 1 used" in capsys.readouterr().err


@pytest.mark.slow
def test_the_check_ends_with_its_time_and_goes_on_at_the_next_load(
    converted_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    only(monkeypatch, "output_gate", "router")
    monkeypatch.setattr(first_load, "LIMIT_S", 0.5)
    clock = iter(range(1000))
    monkeypatch.setattr(first_load.time, "monotonic", lambda: next(clock) / 3)
    seen = []
    for _ in range(6):
        qwen35_mlx.load(converted_demo)
        seen.append(len(verdicts.read()))
    # Single tokens come first.
    assert [(v.op, v.num_tokens) for v in verdicts.read()] == [
        (op, n) for n in (1, 2) for op in ("output_gate", "router")
    ]
    assert seen[0] == 1
    assert seen[-1] == 4
    assert seen == sorted(seen)


def test_a_result_that_cannot_be_stored_is_used_all_the_same(
    converted_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    only(monkeypatch, "output_gate")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "file"))
    assert tier_of(converted_demo, "output_gate") == METAL
    assert "cannot be stored" in capsys.readouterr().err


def test_other_choices_measure_nothing(
    converted_demo: Path, mac: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "judge", None)
    for kernels in ("ops", "mlx", "metal"):
        qwen35_mlx.load(converted_demo, kernels=kernels)
    assert not mac.exists()


def test_what_is_stored_is_plain_json(converted_demo: Path, monkeypatch: Any) -> None:
    only(monkeypatch, "output_gate")
    qwen35_mlx.load(converted_demo)
    stored = json.loads(verdicts.path().read_text())
    assert set(stored) == {"machine", "verdicts"}
    assert stored["verdicts"][0]["op"] == "output_gate"
    assert stored["machine"]["chip"] == "Apple M3 Ultra"
