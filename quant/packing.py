"""Packs codes as MLX does: a stream of bits in little-endian uint32, the first code lowest."""

from collections.abc import Iterable

import mlx.core as mx

WORD_BITS = 32
# Packed uint32 weight, scales, biases.
Quantized = tuple[mx.array, mx.array, mx.array]


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack `codes [..., inputs]`, integers below 2**bits, into uint32 `[..., inputs * bits / 32]`.

    `inputs` must be a multiple of 32: each 32 codes fill `bits` words.
    """
    *leading, inputs = codes.shape
    lanes = codes.astype(mx.uint32).reshape(*leading, inputs // WORD_BITS, WORD_BITS)
    words = [mx.zeros(lanes.shape[:-1], dtype=mx.uint32)] * bits
    for i in range(WORD_BITS):
        word, shift = divmod(i * bits, WORD_BITS)
        lane = lanes[..., i]
        words[word] = words[word] | (lane << shift)
        if shift + bits > WORD_BITS:
            # With 3, 5 and 6 bits, a code may continue in the next word.
            words[word + 1] = words[word + 1] | (lane >> (WORD_BITS - shift))
    return mx.stack(words, axis=-1).reshape(*leading, inputs * bits // WORD_BITS)


def joined(parts: Iterable[Iterable[mx.array]], leading: Iterable[int]) -> Quantized:
    """Concatenate quantized chunks of rows; `leading`: the dims of the result before the last."""
    wholes = (mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True))
    wq, scales, biases = (array.reshape(*leading, array.shape[-1]) for array in wholes)
    return wq, scales, biases
