"""The delta rule's ops against the naive truth, over shapes where a mix-up shows."""

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday

from qwen35_mlx.kernels.gated_delta_rule import (
    _unit_lower_inverse,
    chunk_gated_delta_rule,
    gated_delta_rule,
)
from qwen35_mlx.kernels.naive import naive_gated_delta_rule

# B, Hk, Hv, Dk, Dv: Hk != Hv and Dk != Dv hide no transposed state.
SHAPES = [(1, 2, 6, 16, 32), (2, 3, 3, 32, 8), (3, 1, 4, 8, 64)]


def inputs(shape, num_tokens, seed, decay=1.0):
    batch, key_heads, value_heads, key_dim, value_dim = shape
    rng = np.random.default_rng(seed)

    def normal(*size):
        return rng.standard_normal(size, dtype=np.float32)

    q, k = (
        normal(batch, num_tokens, key_heads, key_dim),
        normal(batch, num_tokens, key_heads, key_dim),
    )
    q /= np.linalg.norm(q, axis=-1, keepdims=True) * key_dim**0.5
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    g = -decay * np.abs(normal(batch, num_tokens, value_heads))
    beta = rng.random((batch, num_tokens, value_heads), dtype=np.float32)
    v = normal(batch, num_tokens, value_heads, value_dim)
    state = normal(batch, value_heads, value_dim, key_dim)
    return tuple(mx.array(x) for x in (q, k, v, g, beta, state))


def assert_close(ours, truth, tolerance=1e-5):
    for a, b in zip(ours, truth, strict=True):
        assert a.shape == b.shape
        scale = mx.sqrt(mx.mean(mx.square(b))).item()
        assert mx.sqrt(mx.mean(mx.square(a - b))).item() <= tolerance * scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_tokens", everyday([1, 2, 3, 63, 64, 65, 130], 0, 4, 5))
def test_ops_equal_the_naive_rule(shape, num_tokens):
    values = inputs(shape, num_tokens, seed=num_tokens)
    assert_close(gated_delta_rule(*values), naive_gated_delta_rule(*values))


def test_the_state_starts_at_zero():
    q, k, v, g, beta, state = inputs(SHAPES[0], 5, seed=0)
    with_zeros = gated_delta_rule(q, k, v, g, beta, mx.zeros_like(state))
    assert_close(gated_delta_rule(q, k, v, g, beta), with_zeros)


@pytest.mark.parametrize("pieces", [(1, 64, 5), (65, 3, 2), (1, 1, 1, 67)])
def test_pieces_with_the_state_carried_equal_the_whole(pieces):
    *values, state = inputs(SHAPES[0], sum(pieces), seed=3)
    whole = gated_delta_rule(*values, state)
    outputs, start = [], 0
    for size in pieces:
        out, state = gated_delta_rule(*(x[:, start : start + size] for x in values), state)
        outputs.append(out)
        start += size
    assert_close((mx.concatenate(outputs, axis=1), state), whole)


def test_repeated_keys_with_full_strength_lose_no_digits():
    """A product of powers of the chunk's matrix would overflow its digits here."""
    q, k, v, g, beta, state = inputs(SHAPES[0], 130, seed=5, decay=1e-3)
    k = mx.broadcast_to(k[:, :1], k.shape)
    values = (q, k, v, g, mx.full(beta.shape, 0.9999), state)
    assert_close(gated_delta_rule(*values), naive_gated_delta_rule(*values))


@pytest.mark.parametrize("decay", [0.0, 30.0, 1000.0])
def test_no_decay_and_total_decay_are_finite(decay):
    """exp of a positive difference of cumulated decays would overflow."""
    values = inputs(SHAPES[1], 70, seed=7, decay=decay)
    ours = gated_delta_rule(*values)
    assert all(mx.isfinite(x).all().item() for x in ours)
    assert_close(ours, naive_gated_delta_rule(*values))


def test_half_precision_inputs_are_computed_in_fp32():
    values = inputs(SHAPES[0], 66, seed=9)
    halves = tuple(x.astype(mx.bfloat16) for x in values[:5])
    out, state = gated_delta_rule(*halves, values[5])
    assert out.dtype == state.dtype == mx.float32
    assert_close((out, state), naive_gated_delta_rule(*halves, values[5]))


@pytest.mark.parametrize("chunk_size", [1, 2, 16, 128])
def test_the_chunk_size_does_not_change_the_result(chunk_size):
    values = inputs(SHAPES[2], 37, seed=11)
    ours = chunk_gated_delta_rule(*values, chunk_size=chunk_size)
    assert_close(ours, naive_gated_delta_rule(*values))


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_triangular_inverse_is_one(size):
    rng = np.random.default_rng(size)
    lower = np.tril(rng.uniform(-1, 1, (3, 2, size, size)), -1)
    inverse = np.array(_unit_lower_inverse(mx.array(lower.astype(np.float32))))
    truth = np.linalg.inv(np.eye(size) + lower)
    np.testing.assert_allclose(inverse, truth, rtol=2e-4, atol=2e-5 * np.abs(truth).max())
