"""Rotary embedding: the fast path, explicit positions, and an independent computation agree.

Attention in blocks of queries gives the numbers of all at once.
"""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.base import create_causal_mask

from qwen35_mlx.config import RopeConfig
from qwen35_mlx.kernels import attention_heads
from qwen35_mlx.memory import MAX_SCORES_BYTES
from qwen35_mlx.model.attention import attend
from qwen35_mlx.model.rope import PartialRope, rope_periods

DEFAULT = RopeConfig(theta=1e7, rotary_dim=16)
YARN = RopeConfig(1e4, 16, 4.0, original_max_position_embeddings=64, attention_factor=1.139)


def rotate(x: np.ndarray, positions: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Turn each pair (i, i + R / 2) by position / period, pair by pair, in float64."""
    periods, factor = rope_periods(rope)
    half = rope.rotary_dim // 2
    out = x.astype(np.float64).copy()
    for i in range(half):
        angle = (positions / np.float64(periods[i]))[:, None, :]
        a, b = x[..., i].astype(np.float64), x[..., i + half].astype(np.float64)
        out[..., i] = factor * (a * np.cos(angle) - b * np.sin(angle))
        out[..., i + half] = factor * (b * np.cos(angle) + a * np.sin(angle))
    return out


@pytest.mark.parametrize("rope", [DEFAULT, YARN], ids=["default", "yarn"])
@pytest.mark.parametrize("offset", [0, 5, 1000])
def test_both_paths_rotate_the_first_dims_only(rope, offset):
    x = np.random.default_rng(0).standard_normal((2, 3, 7, 40)).astype(np.float32)
    positions = np.broadcast_to(np.arange(offset, offset + 7), (2, 7))
    truth = rotate(x, positions, rope)
    module = PartialRope(rope)
    fast = np.array(module(mx.array(x), offset))
    explicit = np.array(attention_heads.rotate(mx.array(x), *module.tables(mx.array(positions))))
    np.testing.assert_allclose(fast, truth, atol=2e-4)
    np.testing.assert_allclose(explicit, truth, atol=2e-4)
    np.testing.assert_array_equal(fast[..., 16:], x[..., 16:])


def test_every_row_may_have_its_own_offset():
    x = np.random.default_rng(1).standard_normal((2, 1, 4, 24)).astype(np.float32)
    positions = np.array([[-3, -2, -1, 0], [7, 8, 9, 10]])
    ours = np.array(PartialRope(DEFAULT)(mx.array(x), mx.array([-3, 7])))
    np.testing.assert_allclose(ours, rotate(x, positions, DEFAULT), atol=1e-5)


def test_periods_are_exact_powers_of_theta():
    periods, factor = rope_periods(RopeConfig(1e7, 64))
    assert factor == 1.0
    truth = [1e7 ** (2 * i / 64) for i in range(32)]
    # To the last bit: at the end of the context one more is 0.01 rad.
    np.testing.assert_array_equal(periods, np.array(truth, dtype=np.float32))


def yarn_periods(rope: RopeConfig) -> list[float]:
    """Dim by dim, by the formula of the paper and the bounds of the reference."""
    assert rope.factor and rope.original_max_position_embeddings

    def dim(turns: float) -> float:
        """The dim, counted from 0 to R, that turns so often over the trained length."""
        radians = rope.original_max_position_embeddings / turns / (2 * math.pi)
        return rope.rotary_dim * math.log(radians, rope.theta) / 2

    first, last = dim(rope.beta_fast), dim(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.rotary_dim - 1)
    periods = []
    for i in range(rope.rotary_dim // 2):
        period = rope.theta ** (2 * i / rope.rotary_dim)
        # 1 where a dim is stretched, 0 where it is kept.
        share = (i - first) / (last - first) if last > first else float(i > first)
        share = min(max(share, 0.0), 1.0)
        periods.append(1 / (share / (rope.factor * period) + (1 - share) / period))
    return periods


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(1e7, 64, 4.0, 262144),
        RopeConfig(1e7, 64, 4.0, 262144, truncate=False),
        RopeConfig(1e4, 32, 2.0, 4096, beta_fast=20.0, beta_slow=2.0),
    ],
    ids=["released", "not truncated", "other betas"],
)
def test_yarn_periods_are_those_of_the_formula(rope: RopeConfig) -> None:
    periods, _ = rope_periods(rope)
    np.testing.assert_allclose(periods, yarn_periods(rope), rtol=1e-5)


def test_yarn_keeps_fast_dims_and_stretches_slow_ones():
    rope = RopeConfig(1e7, 64, 4.0, 262144, attention_factor=1.0)
    periods, _ = rope_periods(rope)
    plain, _ = rope_periods(RopeConfig(1e7, 64))
    ratio = periods / plain
    assert ratio[0] == pytest.approx(1.0)
    assert ratio[-1] == pytest.approx(4.0)
    assert np.all(np.diff(ratio) >= -1e-6)
    # A dim that turns beta_fast = 32 times over the trained length is not stretched.
    turns = 262144 / (2 * math.pi * plain)
    np.testing.assert_allclose(ratio[turns > 40], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.5], 4.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("theta", "rotary_dim", "trained_length", "beta_fast", "beta_slow"),
    [
        # The unclamped band of dims would be [-1, 5] and [4, 19], of 8 and of 16 dims.
        (1e4, 8, 64, 32.0, 0.001),
        (100.0, 16, 2048, 32.0, 0.01),
    ],
)
def test_the_yarn_band_is_clamped_to_the_rotated_dims(
    theta, rotary_dim, trained_length, beta_fast, beta_slow
):
    """Outside of the dims, the band would change the slope of the ramp within them."""
    rope = RopeConfig(
        theta, rotary_dim, 4.0, trained_length, attention_factor=1.0,
        beta_fast=beta_fast, beta_slow=beta_slow,
    )  # fmt: skip
    plain, _ = rope_periods(RopeConfig(theta, rotary_dim))

    def dim_of(turns):
        length = math.log(trained_length / (turns * 2 * math.pi))
        return rotary_dim * length / (2 * math.log(theta))

    low, high = math.floor(dim_of(beta_fast)), math.ceil(dim_of(beta_slow))
    assert low < 0 or high > rotary_dim - 1
    low, high = max(low, 0), min(high, rotary_dim - 1)
    stretched = np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0, 1)
    expected = plain / (stretched / 4 + 1 - stretched)
    np.testing.assert_allclose(rope_periods(rope)[0], expected, rtol=1e-5)


def test_a_yarn_band_of_no_width_is_a_step_between_dims():
    rope = RopeConfig(
        1e4, 16, 4.0, 64, attention_factor=1.139, beta_fast=4.0, beta_slow=4.0, truncate=False
    )
    periods, factor = rope_periods(rope)
    assert factor == 1.139
    edge = 16 * math.log(64 / (4 * 2 * math.pi)) / (2 * math.log(1e4))
    assert edge % 1 > 0.1
    plain, _ = rope_periods(RopeConfig(1e4, 16))
    expected = np.where(np.arange(8) > edge, 4.0, 1.0)
    np.testing.assert_allclose(periods / plain, expected, rtol=1e-5)


def heads(rows=1, num_heads=6, num_kv_heads=2, num_tokens=70, num_keys=200, dim=16):
    """Queries, and keys and values as a cache gives them: views of longer buffers."""
    mx.random.seed(0)
    q = mx.random.normal((rows, num_heads, num_tokens, dim))
    k, v = (mx.random.normal((rows, num_kv_heads, num_keys + 24, dim)) for _ in range(2))
    return q, k[:, :, :num_keys], v[:, :, :num_keys]


def padded(num_tokens, num_keys):
    offset, left_padding = num_keys - num_tokens, mx.array([0, 90])
    return create_causal_mask(num_tokens, offset, left_padding=left_padding)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("mask", ["causal", None, "array"])
def test_blocks_of_queries_give_the_same_numbers(rows, mask):
    q, k, v = heads(rows)
    if mask == "array":
        mask = padded(70, 200)[:rows]
    want = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
    # The last block has 6 queries.
    for block in (32, 64):
        got = attend(q, k, v, 0.3, mask, rows * 6 * 200 * 4 * block)
        assert mx.allclose(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_prompt_longer_than_its_keys_allow_at_once_is_read_the_same(demo):
    model = demo[0]
    ids = mx.array([[n % 300 for n in range(150)]])
    attention = [layer.self_attn for layer in model.layers if not layer.is_linear]
    want = model(ids, model.make_cache())
    mx.eval(want)
    for layer in attention:
        layer.max_scores_bytes = 1
    got = model(ids, model.make_cache())
    for layer in attention:
        del layer.max_scores_bytes
    assert attention[0].max_scores_bytes == MAX_SCORES_BYTES
    assert mx.allclose(got, want, atol=1e-4)


def test_scores_of_several_blocks_are_never_there_at_once():
    q, k, v = heads(num_heads=8, num_tokens=512, num_keys=1024)
    mx.eval(q, k, v)
    scores = 8 * 64 * 1024 * 4

    def peak(max_scores_bytes):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(attend(q, k, v, 0.3, "causal", max_scores_bytes))
        return mx.get_peak_memory() - before

    assert peak(8 * scores) >= 8 * scores
    # One block, its mask, and the output twice: in blocks, and put together.
    assert scores <= peak(scores) <= 1.3 * scores + 2 * q.nbytes
