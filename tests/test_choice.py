"""Which kernels a model gets: stored results in, names of operations out."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

import qwen35_mlx
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.kernels import choice, metal

SMALL, LARGE, OTHER = (
    SimpleNamespace(hidden_size=h, linear_num_value_heads=v, num_experts=e)
    for h, v, e in ((1024, 16, 0), (4096, 64, 512), (64, 2, 0))
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def with_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))


def result(small: float | None, large: float | None, matched: bool = True) -> dict[str, Any]:
    speedup = {choice.shape_key(SMALL): small, choice.shape_key(LARGE): large}
    return {"matched": matched, "speedup": {k: v for k, v in speedup.items() if v is not None}}


FOUND = {
    "qk_norm_rope": result(1.5, 1.2),
    "projection": result(0.8, 1.9),
    "router": result(None, 1.4),
    "delta_step": result(1.01, 1.3),
    "output_gate": result(2.0, 2.0, matched=False),
    "expert_down": result(None, None),
    "of_another_version": result(2.0, 2.0),
}


def test_auto_takes_what_matched_and_was_faster_at_the_models_shapes(with_metal: None) -> None:
    choice.write(FOUND)
    faster = {"qk_norm_rope", "projection", "router", "delta_step"}
    assert choice.choose("auto", LARGE) == faster
    # A percent may be noise; what has no figure at these shapes is judged by the others.
    assert choice.choose("auto", SMALL) == {"qk_norm_rope", "router"}
    assert choice.choose("auto", OTHER) == {"qk_norm_rope", "router"}


def test_every_size_that_shapes_depend_on_tells_models_apart() -> None:
    sizes = dict(hidden_size=1024, linear_num_value_heads=16, num_experts=0)
    keys = {choice.shape_key(SimpleNamespace(**sizes | {name: 32})) for name in sizes}
    assert len(keys | {choice.shape_key(SimpleNamespace(**sizes))}) == 4


def test_without_a_result_auto_runs_ops(with_metal: None) -> None:
    assert choice.choose("auto", LARGE) == metal.NONE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\udcff",
        '{"machine": {}}',
        '{"machine": MACHINE}',
        '{"machine": MACHINE, "kernels": []}',
        '{"machine": MACHINE, "kernels": {"router": 1}}',
        '{"machine": MACHINE, "kernels": {"router": {"matched": true, "speedup": {"a": "fast"}}}}',
        '{"machine": MACHINE, "kernels": {"router": {"matched": 1, "speedup": {"a": 2}}}}',
    ],
)
def test_a_damaged_result_is_no_result(with_metal: None, text: str) -> None:
    path = choice.write(FOUND)
    path.write_bytes(
        text.replace("MACHINE", json.dumps(choice.machine_key())).encode(errors="surrogateescape")
    )
    assert choice.choose("auto", LARGE) == metal.NONE


@pytest.mark.parametrize("what", ["chip", "os", "mlx", "kernels"])
def test_a_result_of_another_machine_or_version_is_no_result(
    with_metal: None, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = choice.write(FOUND)
    other = choice.machine_key() | {what: "another"}
    monkeypatch.setattr(choice, "machine_key", lambda: other)
    assert choice.read() == {}
    # Even if it came under this machine's name, from another cache folder.
    path.rename(choice.result_path())
    assert choice.read() == {}


def test_writing_is_whole_or_not_at_all(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = choice.write(FOUND)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Qwen35Error, match=r"cannot be stored[^$]*QWEN35_MLX_CACHE"):
        choice.write({})
    assert path.read_bytes() == before
    assert list(cache.iterdir()) == [path]


def test_ops_takes_none_and_metal_takes_all(with_metal: None) -> None:
    choice.write(FOUND)
    assert choice.choose("ops", LARGE) == metal.NONE
    assert choice.choose("metal", LARGE) == set(metal.OPS)


def test_metal_where_there_is_none_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    with pytest.raises(Qwen35Error, match=r"no Metal on this machine[^$]*kernels='auto'"):
        qwen35_mlx.load("no/such-model", kernels="metal")
    with pytest.raises(Qwen35Error, match="'auto', 'ops', 'metal'"):
        qwen35_mlx.load("no/such-model", kernels="fast")


def test_a_mac_told_to_compute_on_the_cpu_runs_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(sys, "platform", "darwin")
    choice.write(FOUND)
    assert choice.choose("auto", LARGE) == metal.NONE
    with pytest.raises(Qwen35Error, match="CPU as default device"):
        choice.require("metal")


def test_load_gives_the_choice_to_every_layer(
    converted_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    gpu = {**mx.device_info(), "max_recommended_working_set_size": 2**37}
    monkeypatch.setattr(mx, "device_info", lambda: gpu)
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: 0)
    choice.write(FOUND)
    for kernels, expected in (
        ("auto", {"qk_norm_rope", "router"}),
        ("metal", set(metal.OPS)),
        ("ops", set()),
    ):
        model, _ = qwen35_mlx.load(converted_demo, kernels=kernels)
        assert {layer.kernels for layer in model.layers} == {frozenset(expected)}
        assert model.layers[0].mlp.kernels == expected
