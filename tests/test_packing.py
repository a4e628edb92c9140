"""Words as mlx packs them, whatever the codes."""

import mlx.core as mx
import numpy as np
import pytest

from qwen35_mlx.quant.affine import BITS, GROUP_SIZES
from qwen35_mlx.quant.packing import pack


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_codes_of_mlx_pack_to_the_words_of_mlx(bits, group_size):
    w = mx.random.normal((2, 3, 384), key=mx.random.key(bits))
    words, scales, biases = mx.quantize(w, group_size=group_size, bits=bits)
    codes = mx.dequantize(
        words, mx.ones_like(scales), mx.zeros_like(biases), group_size=group_size, bits=bits
    )
    assert codes.max().item() == 2**bits - 1
    packed = pack(codes, bits)
    assert packed.dtype == mx.uint32
    assert packed.shape == words.shape
    assert mx.array_equal(packed, words).item()


@pytest.mark.parametrize("bits", BITS)
def test_words_are_one_little_endian_stream_of_bits(bits):
    codes = np.random.default_rng(bits).integers(2**bits, size=96)
    stream = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    expected = np.frombuffer(stream.to_bytes(96 * bits // 8, "little"), dtype="<u4")
    assert np.array_equal(np.array(pack(mx.array(codes), bits)), expected)
