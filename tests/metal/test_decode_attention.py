"""The attention kernel of decoding against its naive form, and what it reads."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from metal.draw import ATTENTION_HEADS, Draw
from metal.emulator import emulated
from metal.row_invariance import bits, different_queries
from metal.test_decode_kernels import TOLERANCE, assert_close, deal
from mlx_lm.models.cache import QuantizedKVCache

from qwen35_mlx.config import ModelConfig
from qwen35_mlx.family import family_config
from qwen35_mlx.kernels import metal
from qwen35_mlx.kernels.decode_attention import (
    ROW_CLASSES,
    Packed,
    decode_attention,
    decode_attention_kernel,
    key_blocks,
    row_class,
    unpacked,
)
from qwen35_mlx.kernels.naive import naive_attention
from qwen35_mlx.kernels.tiers import PORTABLE, with_kernels
from qwen35_mlx.model.attention import Attention, attention_mask
from qwen35_mlx.model.layer_cache import KVCache

# Weights of all keys, of some, of one.
SCALES = (0.02, 0.2, 1.0)


@pytest.fixture(scope="module", autouse=True)
def log():
    with emulated() as log:
        metal.clear()
        yield log
    metal.clear()


def unpacked32(held):
    """The numbers that packed heads stand for; MLX rounds them to the type of the scales."""
    w, scales, biases = held.parts
    return mx.dequantize(w, scales.astype(mx.float32), biases.astype(mx.float32), 64, 8)


def assert_right(number, cases, packed):
    draw = Draw(number)
    for case in range(cases):
        num_tokens = 1 if (number + case) % 2 else draw.integer(2, 8)
        # Ends of tiles and blocks, and anything.
        edge = 8 * draw.integer(1, 17) + draw.integer(-1, 1)
        length = max(num_tokens, edge if case % 2 else draw.integer(1, 280))
        make = draw.packed_attention if packed else draw.attention
        q, k, v = make(1 + case % 2, num_tokens, length)
        scale = SCALES[case % 3]
        got = decode_attention_kernel(q, k, v, scale)
        assert got.dtype == draw.dtype
        if packed:
            k, v = unpacked32(k), unpacked32(v)
        assert_close(got, naive_attention(q, k, v, scale), TOLERANCE[draw.dtype])


@deal(33, 10, everyday=0)
def test_decode_attention(number, cases):
    assert_right(number, cases, packed=False)


@deal(33, 10, everyday=3)
def test_packed_attention(number, cases):
    assert_right(number, cases, packed=True)


@pytest.mark.slow
@pytest.mark.parametrize("length", [4096, 4097, 5000, 16_384, 17_000])
def test_blocks_that_grow_with_their_distance(length):
    draw = Draw(6)
    q, k, v = draw.attention(1, 2, length)
    got = decode_attention_kernel(q, k, v, 0.2)
    assert_close(got, naive_attention(q, k, v, 0.2), TOLERANCE[draw.dtype])


@pytest.mark.parametrize(
    ("length", "blocks"),
    [(1, 1), (128, 1), (129, 2), (4096, 32), (4097, 33), (4353, 34), (16_384, 80),
     (65_536, 176), (262_144, 368), (1_048_576, 752)],
)  # fmt: skip
def test_a_long_context_has_few_blocks(length, blocks):
    assert len(key_blocks(length)) == blocks


def test_scores_of_any_size_give_finite_weights():
    q, k, v = (mx.ones((1, 1, n, 32)) for n in (1, 150, 150))
    k[0, 0, 100:] = 2.0
    v[0, 0, 100:] = 3.0
    for scale, want in ((1e4, 3.0), (-1e4, 1.0), (0.0, 1 + 2 * 50 / 150)):
        got = decode_attention_kernel(q, k, v, scale)
        assert mx.allclose(got, mx.full(got.shape, want), atol=1e-5)


def test_a_query_is_the_same_whatever_comes_after_it():
    assert different_queries(1) == (0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("number", range(2, 24))
def test_queries_are_the_same_alone(number, packed):
    wrong, _ = different_queries(number, packed)
    assert wrong == 0


def test_the_room_of_a_buffer_changes_nothing():
    q, k, v = Draw(1).attention(1, 3, 140)
    want = bits(decode_attention_kernel(q, k, v, 0.1))
    for room in (0, 1, 300):
        longer = (mx.pad(a, [(0, 0), (0, 0), (0, room), (0, 0)])[:, :, :140] for a in (k, v))
        assert bits(decode_attention_kernel(q, *longer, 0.1)) == want


def assert_read_once(log, num_kv_heads, group, dim, num_tokens, length, passes=1):
    q = mx.zeros((1, num_kv_heads * group, num_tokens, dim), mx.bfloat16)
    k, v = (mx.zeros((1, num_kv_heads, length + 24, dim), mx.bfloat16) for _ in range(2))
    del log.launches[:]
    decode_attention_kernel(q, k[:, :, :length], v[:, :, :length], 0.1)
    names = [x.kernel for x in log.launches]
    assert names == ["decode_attention", "decode_attention_combine"]
    traffic = log.launches[0].traffic
    needed = num_kv_heads * length * dim * 2
    assert traffic["k"].read_bytes == traffic["v"].read_bytes == passes * needed
    # Not the room behind, and no copy before.
    assert traffic["k"].unique_read_bytes == traffic["v"].unique_read_bytes == needed


@pytest.mark.parametrize("group", [12, 16])
def test_each_key_and_value_is_read_once_for_all_queries(log, group):
    assert_read_once(log, 2, group, 256, 1, 150)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "num_tokens", "passes"),
    [((2, 16, 256), 6, 1), ((2, 16, 256), 8, 2), ((1, 12, 256), 8, 1), ((3, 5, 96), 4, 1)],
)
def test_more_than_96_rows_take_two_passes(log, heads, num_tokens, passes):
    assert_read_once(log, *heads, num_tokens, 300, passes)


@pytest.mark.slow
def test_the_largest_models_cache_is_read_once_at_4096_tokens(log):
    assert_read_once(log, 2, 16, 256, 1, 4096)


@pytest.mark.slow
@pytest.mark.parametrize(("group", "num_tokens"), [(16, 1), (12, 8)])
def test_each_byte_of_packed_keys_and_values_is_read_once(log, group, num_tokens):
    q = mx.zeros((1, 2 * group, num_tokens, 256), mx.bfloat16)
    parts = mx.quantize(mx.zeros((1, 2, 174, 256), mx.bfloat16), 64, 8)
    held = Packed([part[:, :, :150] for part in parts], 8, 64)
    del log.launches[:]
    decode_attention_kernel(q, held, held, 0.1)
    traffic = log.launches[0].traffic
    needed = {"": 2 * 150 * 256, "_scales": 2 * 150 * 4 * 2, "_biases": 2 * 150 * 4 * 2}
    for part, num_bytes in needed.items():
        assert traffic["v" + part].read_bytes == num_bytes
        # Four lanes side by side have a key's group, and read its scale in one instruction.
        lanes = 4 if part else 1
        assert traffic["k" + part].read_bytes == lanes * num_bytes
        assert traffic["k" + part].unique_read_bytes == num_bytes


def test_rows_are_shared_out_evenly():
    for num_rows in range(1, 193):
        rows = row_class(num_rows)
        assert rows in ROW_CLASSES
        assert -(-num_rows // rows) == -(-num_rows // 96)


def test_what_the_kernel_cannot_do_is_left_to_mlx(log):
    chosen = with_kernels(["decode_attention"])
    q, k = mx.random.normal((1, 2, 2, 32)), mx.random.normal((1, 1, 20, 32))
    mask = mx.random.uniform(shape=(1, 1, 2, 20)) > 0.5
    mask[..., 0] = True
    others = [(q, mask), (q, None), (mx.random.normal((1, 2, 9, 32)), "causal"),
              (q.astype(mx.bfloat16), "causal")]  # fmt: skip
    del log.launches[:]
    for query, seen in others:
        got = decode_attention(query, k, k, 0.2, seen, chosen)
        want = mx.fast.scaled_dot_product_attention(query, k, k, scale=0.2, mask=seen)
        assert mx.array_equal(got, want)
    narrow = mx.random.normal((1, 1, 1, 48))
    mx.eval(decode_attention(narrow, narrow, narrow, 0.2, None, chosen))
    assert log.launches == []
    mx.eval(decode_attention(q, k, k, 0.2, "causal", chosen))
    assert len(log.launches) == 2


def test_packed_keys_that_the_kernel_cannot_read_are_multiplied_by_mlx(log):
    q, *held = Draw(1).packed_attention(1, 1, 40)
    chosen = with_kernels(["packed_attention"])
    wide = [mx.quantize(unpacked32(x), 32, 8) for x in held]
    few = [mx.quantize(unpacked32(x), 64, 4) for x in held]
    assert q.dtype == mx.float16
    cases = [
        (q, held, with_kernels(["decode_attention"])),
        (q.astype(mx.float32), [Packed(x, 8, 32) for x in wide], chosen),
        (q.astype(mx.float32), [Packed(x, 4, 64) for x in few], chosen),
        (q.astype(mx.float32), held, chosen),
    ]
    del log.launches[:]
    for query, (k, v), tiers in cases:
        got = decode_attention(query, k, v, 0.2, None, tiers)
        want = mx.fast.scaled_dot_product_attention(query, unpacked(k), unpacked(v), scale=0.2)
        assert mx.allclose(got, want, atol=1e-2)
    assert log.launches == []
    mx.eval(decode_attention(q, *held, 0.2, None, chosen))
    assert len(log.launches) == 2


@pytest.mark.parametrize(
    "make_cache", [lambda: QuantizedKVCache(64, 8), lambda: KVCache((8, 8))], ids=["mlx-lm", "own"]
)
def test_a_layer_reads_a_quantized_cache_through_the_kernel(log, make_cache):
    text = family_config("Qwen3.5-0.8B")["text_config"]
    dims = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    layer, norm = Attention(ModelConfig.from_hf(text | dims)), nn.RMSNorm(64)
    x = [mx.random.normal((1, n, 64)) for n in (20, 1, 5)]
    outputs = []
    for kernels in (PORTABLE, with_kernels(["packed_attention"])):
        cache, layer.kernels = make_cache(), kernels
        del log.launches[:]
        outputs.append([layer(y, norm, attention_mask(y.shape[1], cache), cache) for y in x])
        mx.eval(outputs)
    assert [launch.kernel for launch in log.launches] == 2 * [
        "decode_attention", "decode_attention_combine"
    ]  # fmt: skip
    for a, b in zip(*outputs, strict=True):
        assert mx.abs(a - b).max().item() < 1e-5


def test_heads_of_every_group_and_width_have_a_case():
    assert {(kv_heads, group) for kv_heads, group, dim in ATTENTION_HEADS if dim == 256} >= {
        (2, 12), (2, 16), (4, 4), (4, 6)
    }  # fmt: skip
    assert {dim for *_, dim in ATTENTION_HEADS} == set(range(32, 257, 32))
