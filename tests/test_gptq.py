"""Error feedback against a textbook version, and against no feedback."""

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday

from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.quant import dequantize, quantize
from qwen35_mlx.quant.gptq import feedback_gain, inverse_factor

INPUTS, ROWS = 128, 48


def moments(seed: int = 0) -> np.ndarray:
    """Second moments of correlated inputs of unequal size."""
    generator = np.random.default_rng(seed)
    sizes = np.exp(generator.standard_normal(INPUTS))
    mixing = np.diag(sizes) + 0.3 * generator.standard_normal((INPUTS, 16)) @ (
        generator.standard_normal((16, INPUTS))
    )
    x = generator.standard_normal((2000, INPUTS)) @ mixing
    return x.T @ x / len(x)


def weights(seed: int = 0) -> mx.array:
    values = np.random.default_rng(seed).standard_normal((ROWS, INPUTS))
    return mx.array(values.astype(np.float32))


def output_error(w: mx.array, parts, bits: int, group_size: int, hessian: np.ndarray) -> float:
    wq, scales, biases = (p if p.dtype == mx.uint32 else p.astype(mx.float32) for p in parts)
    back = dequantize(wq, scales, biases, bits, group_size)
    difference = np.array(back - w.astype(mx.float32)).astype(np.float64)
    return float(np.einsum("ri,ij,rj->", difference, hessian, difference))


def textbook_codes(w, scales, biases, bits: int, group_size: int, h: np.ndarray) -> np.ndarray:
    """Optimal brain quantization in the order of the columns: the inverse shrinks by one a step."""
    rest, inverse = np.array(w).astype(np.float64), np.linalg.inv(h)
    codes = np.zeros_like(rest)
    for j in range(rest.shape[1]):
        scale, bias = scales[:, j // group_size], biases[:, j // group_size]
        codes[:, j] = np.clip(np.round((rest[:, j] - bias) / scale), 0, 2**bits - 1)
        error = (rest[:, j] - scale * codes[:, j] - bias) / inverse[j, j]
        rest -= error[:, None] * inverse[j]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        # Exactly zero in theory: earlier columns are done.
        inverse[: j + 1] = inverse[:, : j + 1] = 0
    return codes


@pytest.mark.parametrize(("bits", "group_size"), everyday([(2, 64), (3, 32), (4, 64), (6, 128)], 1))
def test_codes_are_those_of_the_textbook(bits, group_size):
    w, h = weights(), moments()
    parts = quantize(w, bits, group_size, "gptq", hessian=mx.array(h.astype(np.float32)))
    codes = dequantize(parts[0], mx.ones_like(parts[1]), mx.zeros_like(parts[2]), bits, group_size)
    damped = h + 0.01 * np.trace(h) / INPUTS * np.eye(INPUTS)
    scales, biases = (np.array(part).astype(np.float64) for part in parts[1:])
    expected = textbook_codes(w, scales, biases, bits, group_size, damped)
    # One rounding that falls the other way changes the rest of its row.
    assert (np.array(codes) == expected).mean() > 0.99


@pytest.mark.parametrize("dtype", everyday([mx.float32, mx.bfloat16], 1))
@pytest.mark.parametrize("bits", everyday([2, 3, 4, 8], 1))
def test_products_are_nearer_than_by_search_with_importance(bits, dtype):
    w, h = weights().astype(dtype), moments()
    importance = mx.array(np.diag(h).astype(np.float32))
    hessian = mx.array(h.astype(np.float32))
    searched = quantize(w, bits, 64, "search", importance)
    fed_back = quantize(w, bits, 64, "gptq", hessian=hessian)
    assert [p.dtype for p in fed_back] == [mx.uint32, dtype, dtype]
    ours, theirs = (output_error(w, parts, bits, 64, h) for parts in (fed_back, searched))
    assert ours < 0.8 * theirs


def test_independent_inputs_leave_nothing_to_feed_back():
    w = weights()
    parts = quantize(w, 4, 64, "gptq", hessian=mx.eye(INPUTS))
    identity = np.eye(INPUTS)
    searched = output_error(w, quantize(w, 4, 64, "search"), 4, 64, identity)
    assert output_error(w, parts, 4, 64, identity) <= searched * 1.0001


@pytest.mark.slow
def test_inputs_that_never_fire_are_no_obstacle():
    w, h = weights(), moments()
    h[5] = h[:, 5] = 0
    for hessian in (h, np.zeros_like(h)):
        parts = quantize(w, 4, 64, "gptq", hessian=mx.array(hessian.astype(np.float32)))
        assert mx.abs(dequantize(*parts) - w).max().item() < 2


@pytest.mark.slow
def test_stacks_and_chunks_of_rows_agree(monkeypatch):
    w, hessian = weights(), mx.array(moments().astype(np.float32))
    whole = quantize(w, 4, 64, "gptq", hessian=hessian)
    stacked = quantize(w.reshape(3, 16, INPUTS), 4, 64, "gptq", hessian=hessian)
    assert mx.array_equal(stacked[0].reshape(whole[0].shape), whole[0]).item()
    monkeypatch.setattr("qwen35_mlx.quant.gptq.CHUNK_WEIGHTS", 5 * INPUTS)
    chunked = quantize(w, 4, 64, "gptq", hessian=hessian)
    # A matrix product may round otherwise for other numbers of rows.
    assert (np.array(chunked[0]) == np.array(whole[0])).mean() > 0.95


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (np.eye(64), r"(?s)does not fit the weight.*\[64, 64\].*\[128, 128\]"),
        (np.full((128, 128), np.nan), "not a matrix of second moments"),
        (np.triu(np.ones((128, 128))), "not a matrix of second moments"),
        (np.diag([-1.0] + [1.0] * 127), "(?s)not positive definite.*larger damping"),
    ],
)
def test_what_is_no_hessian_is_refused(hessian, message):
    with pytest.raises(Qwen35Error, match=message):
        quantize(weights(), 4, 64, "gptq", hessian=mx.array(hessian.astype(np.float32)))


@pytest.mark.slow
@pytest.mark.parametrize("num_experts", everyday([1, 2, 5], 1))
def test_experts_together_give_the_bits_of_each_alone(monkeypatch, num_experts):
    rng = np.random.default_rng(5)
    w = mx.array(rng.standard_normal((num_experts, 7, 96)).astype(np.float32))
    x = rng.standard_normal((num_experts, 50, 96))
    x *= rng.uniform(0.1, 3, size=(num_experts, 1, 96))
    hessians = mx.array((x.transpose(0, 2, 1) @ x).astype(np.float32))
    # Two at a time: the last of five is alone.
    monkeypatch.setattr("qwen35_mlx.quant.gptq.CHUNK_WEIGHTS", 2 * 7 * 96)
    together = quantize(w, 3, 32, "gptq", hessian=hessians)
    for e in range(num_experts):
        alone = quantize(w[e], 3, 32, "gptq", hessian=hessians[e])
        for a, b in zip(together, alone, strict=True):
            assert mx.array_equal(a[e], b)


@pytest.mark.slow
def test_the_predicted_gain_of_feedback_is_the_real_one():
    w, h = weights(), moments()
    hessian = mx.array(h.astype(np.float32))
    for bits in (3, 4):
        searched = quantize(w, bits, 64, "search")
        fed_back = quantize(w, bits, 64, "gptq", hessian=hessian)
        alone, together = (
            np.array(dequantize(*parts, bits, 64) - w) for parts in (searched, fed_back)
        )
        # Without feedback errors of columns have nothing to do with each other.
        lost = (np.square(alone) * np.diag(h)).sum()
        left = np.einsum("ri,ij,rj", together, h, together)
        assert feedback_gain(hessian) == pytest.approx(left / lost, rel=0.3)
    assert feedback_gain(mx.eye(8)) == pytest.approx(1, rel=0.02)


@pytest.mark.slow
def test_the_gain_of_a_stack_is_the_mean_and_that_of_silent_inputs_is_none():
    hessian = mx.array(moments().astype(np.float32))
    gains = [feedback_gain(h) for h in (hessian, mx.eye(INPUTS))]
    assert gains[0] < 0.8 < gains[1]
    assert feedback_gain(mx.stack([hessian, mx.eye(INPUTS)])) == pytest.approx(sum(gains) / 2)
    assert feedback_gain(mx.zeros((8, 8))) == 1


@pytest.mark.parametrize("inputs", [3, 511, 512, 1029])
def test_the_inverse_factor_of_a_large_hessian_is_that_of_a_general_inverse(inputs):
    x = np.random.default_rng(inputs).normal(size=(2 * inputs, inputs))
    hessian = mx.array((x.T @ x / len(x)).astype(np.float32))
    factor = np.array(inverse_factor(hessian, inputs, 0.01))
    damped = np.array(hessian).astype(np.float64)
    damped += 0.01 * np.trace(damped) / inputs * np.eye(inputs)
    assert (factor == np.triu(factor)).all() and (np.diag(factor) > 0).all()
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(inputs), atol=2e-5)
