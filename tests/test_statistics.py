"""Moments against numpy, the file of a calibration, errors of options."""

import mlx.core as mx
import numpy as np
import pytest

from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.quant import dequantize, quantize
from qwen35_mlx.quant import statistics as module
from qwen35_mlx.quant.statistics import (
    FLOOR_TOKENS,
    SETTINGS,
    Calibration,
    Moments,
    input_name,
    load,
    option_errors,
    save,
    unit_of,
)

LAYER = "language_model.model.layers.3."


def rows(num: int, inputs: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num, inputs)).astype(np.float32)


def test_moments_are_means_over_all_that_was_added():
    x = rows(31)
    moments = Moments(5, hessian=True)
    moments.add(mx.array(x[:10]))
    moments.add(mx.array(x[10:]))
    np.testing.assert_allclose(moments.means(), (x**2).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(moments.hessians(), x.T @ x / 31, rtol=1e-4, atol=1e-6)


def test_inputs_in_bfloat16_are_squared_in_float32():
    x = mx.array(rows(31)).astype(mx.bfloat16)
    found, expected = Moments(5, hessian=True), Moments(5, hessian=True)
    found.add(x)
    expected.add(x.astype(mx.float32))
    assert mx.array_equal(found.means(), expected.means())
    assert mx.array_equal(found.hessians(), expected.hessians())


def test_experts_have_their_own_moments_and_lean_on_the_others_when_idle():
    x = rows(900, seed=1) * np.linspace(0.5, 2, 900, dtype=np.float32)[:, None]
    experts = np.where(np.arange(900) < 890, np.arange(900) % 3, 3)
    moments = Moments(5, num_experts=5, hessian=True)
    moments.add(mx.array(x), mx.array(experts))
    means, hessians = np.array(moments.means()), np.array(moments.hessians())
    typical = (x**2).mean(axis=0)
    for e in range(5):
        own = x[experts == e]
        expected = ((own**2).sum(axis=0) + FLOOR_TOKENS * typical) / (len(own) + FLOOR_TOKENS)
        np.testing.assert_allclose(means[e], expected, rtol=1e-4)
        np.testing.assert_allclose(np.diag(hessians[e]), expected, rtol=1e-4)
    # Never routed to: exactly what its layer sees.
    np.testing.assert_allclose(means[4], typical, rtol=1e-4)
    assert not np.allclose(means[0], means[3], rtol=0.05)


def test_hessians_of_few_tokens_lean_on_the_others_the_more_inputs_there_are():
    x, experts = rows(60, inputs=50, seed=4), np.arange(60) % 2
    moments = Moments(50, num_experts=2, hessian=True)
    moments.add(mx.array(x), mx.array(experts))
    for expert, hessian in enumerate(np.array(moments.hessians())):
        own = x[experts == expert]
        # 25 = half the inputs, more than the 16 tokens of the second moments.
        expected = (own.T @ own + 25 * x.T @ x / 60) / (30 + 25)
        np.testing.assert_allclose(hessian, expected, rtol=1e-4, atol=1e-5)
    expected = (np.square(x[::2]).sum(axis=0) + 16 * np.square(x).mean(axis=0)) / (30 + 16)
    np.testing.assert_allclose(np.array(moments.means())[0], expected, rtol=1e-4)


def test_hessians_of_too_many_experts_become_one(monkeypatch):
    x, experts = rows(50), np.arange(50) % 4
    monkeypatch.setattr(module, "MAX_HESSIAN_BYTES", 4 * 4 * 25)
    assert Moments(5, num_experts=4, hessian=True).hessians().shape == (4, 5, 5)
    monkeypatch.setattr(module, "MAX_HESSIAN_BYTES", 4 * 4 * 25 - 1)
    moments = Moments(5, num_experts=4, hessian=True)
    moments.add(mx.array(x), mx.array(experts))
    hessian = np.array(moments.hessians())
    assert moments.means().shape == (4, 5)
    np.testing.assert_allclose(hessian, x.T @ x / 50, atol=1e-5)


def test_matrices_that_read_the_same_share_a_name():
    same = ["gate", "shared_expert_gate", "shared_expert.gate_proj", "shared_expert.up_proj"]
    assert {input_name(f"{LAYER}mlp.{m}") for m in same} == {f"{LAYER}mlp.input"}
    names = [
        "self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.switch_mlp.up_proj",
        "mlp.switch_mlp.down_proj",
        "mlp.shared_expert.down_proj",
    ]
    assert len({input_name(LAYER + n) for n in names}) == len(names)
    assert input_name("language_model.model.embed_tokens") is None
    assert unit_of(f"{LAYER}mlp.switch_mlp.up_proj") == f"{LAYER}mlp.switch_mlp.gate_proj"
    assert unit_of(f"{LAYER}self_attn.v_proj") == f"{LAYER}self_attn.v_proj"


def example() -> Calibration:
    return Calibration(
        "a/b",
        "l" * 16,
        "t" * 32,
        123,
        moments={"x.input": mx.array([1.0, 2.0]), "y.input": mx.arange(6.0).reshape(3, 2)},
        hessians={"x.input": mx.eye(2), "y.input": mx.arange(12.0).reshape(3, 2, 2)},
        errors={"x": {(2, 64): 0.1, (8, 128): 1e-6}},
        kls={"x": {(2, 64): 0.5}},
    )


def test_a_calibration_comes_back_from_its_file(tmp_path):
    save(example(), tmp_path / "c.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
    back = load(tmp_path / "c.safetensors")
    assert (back.source, back.layout, back.num_tokens) == ("a/b", "l" * 16, 123)
    assert (back.errors, back.kls) == (example().errors, example().kls)
    assert back.digest == example().digest
    moments, hessian = back.of("x.q_proj")
    assert moments.tolist() == [1.0, 2.0]
    assert hessian.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    back.kls["x"][2, 64] = 0.6
    assert back.digest != example().digest
    without = example()
    without.hessians.clear()
    assert without.digest != example().digest


def test_an_expert_has_the_statistics_of_its_own_inputs():
    moments, hessian = example().of("y.q_proj", 1)
    assert moments.tolist() == [2.0, 3.0]
    assert hessian.tolist() == [[4.0, 5.0], [6.0, 7.0]]
    # An input that all experts share.
    moments, hessian = example().of("x.q_proj", 1)
    assert moments.tolist() == [1.0, 2.0]
    assert hessian.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert example().of("z.q_proj", 1) == (None, None)


def test_a_calibration_is_read_at_once_and_not_when_a_thread_uses_it(tmp_path):
    path = tmp_path / "c.safetensors"
    save(example(), path)
    back = load(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert back.moments["x.input"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("damage", ["cut", "noise", "foreign", "absent"])
def test_a_file_that_is_no_calibration_is_refused(tmp_path, damage):
    path = tmp_path / "c.safetensors"
    if damage == "cut":
        save(example(), path)
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "noise":
        path.write_bytes(b"\x07" * 100)
    elif damage == "foreign":
        mx.save_safetensors(str(path), {"w": mx.ones(2)}, {"format": "mlx"})
    with pytest.raises(Qwen35Error, match="cannot be read as a calibration"):
        load(path)


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path, full_disk):
    file = tmp_path / "c.safetensors"
    save(example(), file)
    before = file.read_bytes()
    with full_disk(), pytest.raises(Qwen35Error, match=rf"cannot write {file}\n.* are needed"):
        save(example(), file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(Qwen35Error, match="cannot write"):
        save(example(), tmp_path / "no" / "c.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_option_errors_are_those_of_the_quantized_output():
    rng = np.random.default_rng(2)
    w = mx.array(rng.standard_normal((16, 128)).astype(np.float32))
    x = rng.standard_normal((4000, 128)).astype(np.float32) * rng.uniform(0.1, 2, 128)
    moments = mx.array((x**2).mean(axis=0).astype(np.float32))
    errors = option_errors(w, moments)
    assert set(errors) == set(SETTINGS)
    for bits, group_size in ((2, 64), (4, 32), (8, 128)):
        back = dequantize(*quantize(w, bits, group_size, "search", moments), bits, group_size)
        lost = np.square(x @ np.array(back - w).T).sum() / np.square(x @ np.array(w).T).sum()
        assert errors[bits, group_size] == pytest.approx(lost, rel=0.25)
    by_bits = [errors[bits, 64] for bits in (2, 3, 4, 5, 6, 8)]
    assert by_bits == sorted(by_bits, reverse=True)
    # Experts one above the other, each with its own moments.
    stack = mx.stack([w, w[:, ::-1]])
    both = option_errors(stack, mx.stack([moments, moments[::-1]]))
    assert both[4, 64] == pytest.approx(errors[4, 64], rel=0.01)
    assert both[4, 64] != pytest.approx(option_errors(stack, moments)[4, 64], rel=0.01)
    # What no group divides is no option.
    assert {g for _, g in option_errors(mx.ones((2, 96)) * mx.arange(96), None)} == {32}
    assert set(option_errors(mx.zeros((2, 64)), None).values()) == {0.0}
