"""Random cases of the decode kernels.

A specialisation of a kernel is drawn by its number. Bits, groups and types are dealt out so that
each combination comes up.
"""

import itertools
import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qwen35_mlx.kernels.decode_attention import Packed
from qwen35_mlx.kernels.delta_step import HEAD_DIMS, DeltaParameters
from qwen35_mlx.kernels.expert_step import Routing
from qwen35_mlx.kernels.matrix import BITS, GROUP_SIZES
from qwen35_mlx.kernels.switch import SwitchLinear

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
DENSE = (0, 32)
FORMATS = [*itertools.product(BITS, GROUP_SIZES), DENSE, DENSE]
NUM_EXPERTS = 5
# Heads, key heads, head dim, rotated dims.
HEADS = [(3, 1, 32, 8), (4, 2, 64, 64), (2, 2, 128, 32), (8, 2, 256, 64), (3, 1, 24, 12)]
# Key heads, query heads of each, head dim.
ATTENTION_HEADS = [
    (2, 16, 256), (1, 3, 64), (2, 12, 256), (3, 1, 96), (1, 8, 128), (4, 4, 256), (2, 5, 32),
    (1, 7, 160), (4, 6, 256), (1, 24, 192), (2, 2, 224),
]  # fmt: skip
PACKED_HEADS = [heads for heads in ATTENTION_HEADS if heads[2] % 64 == 0]


def chunk_range(number: int) -> tuple[int, int]:
    """Numbers of chunks that one specialisation's lanes take; the last is several rounds."""
    return [(1, 4), (9, 16), (17, 36), (5, 8)][number % 4]


class Draw:
    """Random numbers of one specialisation; what is dealt comes round again by its number."""

    def __init__(self, number: int, num_tokens: int | None = None):
        self.number = number
        self.rng = np.random.default_rng(number)
        self.dtype = DTYPES[number % 3]
        self.weight_dtype = DTYPES[number // 3 % 3]
        # Half of them are single rows, the case that counts.
        self.num_tokens = num_tokens or (1 if number % 2 else int(self.rng.integers(1, 9)))

    def formats(self, count: int) -> list[tuple[int, int]]:
        order = np.random.default_rng(0).permutation(len(FORMATS))
        return [FORMATS[order[(self.number * count + i) % len(FORMATS)]] for i in range(count)]

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def normal(self, *shape: int, dtype: mx.Dtype | None = None, scale: float = 1.0) -> mx.array:
        values = self.rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        return mx.array(values).astype(dtype or self.dtype)

    def linear(self, out: int, width: int, form: tuple[int, int], experts: int = 0):
        """A layer and its dense weight in fp32."""
        layer = SwitchLinear(width, out, experts) if experts else nn.Linear(width, out, bias=False)
        weight = self.normal(*layer.weight.shape, dtype=self.weight_dtype, scale=width**-0.5)
        bits, group_size = form
        layer.weight = weight
        if not bits:
            return layer, weight.astype(mx.float32)
        layer = layer.to_quantized(group_size, bits)
        dense = mx.dequantize(
            layer.weight,
            *(x.astype(mx.float32) for x in (layer.scales, layer.biases)),
            group_size=group_size,
            bits=bits,
        )
        return layer, dense

    def width(self, forms: list[tuple[int, int]], chunks: tuple[int, int]) -> int:
        """Columns that all formats divide, of a number of chunks in the half-open range."""
        step = math.lcm(*(group for _, group in forms))
        return step * self.integer(max(1, -(-chunks[0] * 32 // step)), chunks[1] * 32 // step)

    def norm(self, width: int, every: int = 3) -> nn.RMSNorm | None:
        """For some of the specialisations."""
        if self.number % every:
            return None
        # So large that it is seen.
        norm = nn.RMSNorm(width, eps=0.01)
        norm.weight = self.normal(width, dtype=self.weight_dtype)
        return norm

    def routing(self) -> Routing:
        per_token = 1 + self.number % 4
        rows = [self.rng.permutation(NUM_EXPERTS)[:per_token] for _ in range(self.num_tokens)]
        return Routing(
            mx.array(np.stack(rows).astype(np.uint32)),
            mx.array(self.rng.random((self.num_tokens, per_token), dtype=np.float32)),
            mx.array(self.rng.random((self.num_tokens, 1), dtype=np.float32)),
        )

    def delta(self, batch: int, num_tokens: int) -> tuple:
        """Arguments of delta_step: unequal dims and counts of heads, an odd number of taps."""
        dims = list(itertools.product(HEAD_DIMS, HEAD_DIMS))
        key_dim, value_dim = dims[(self.number * 7) % len(dims)]
        key_heads, group = [(1, 1), (2, 1), (1, 3), (2, 2)][self.number % 4]
        value_heads = key_heads * group
        taps = 4 if self.number % 3 else 2 + self.number % 2
        channels = 2 * key_heads * key_dim + value_heads * value_dim
        parameters = DeltaParameters(
            self.normal(channels, taps, 1),
            self.normal(value_heads, dtype=mx.float32),
            self.normal(value_heads),
            self.normal(value_dim),
            1e-6,
        )
        mask = None
        if self.number % 3 == 1:
            # Padding on the left, up to all of a row.
            padding = self.rng.integers(0, num_tokens + 1, (batch, 1))
            mask = mx.array(np.arange(num_tokens) >= padding)
        return (
            self.normal(batch, num_tokens, channels),
            self.normal(batch, num_tokens, value_heads * value_dim),
            self.normal(batch, num_tokens, value_heads),
            self.normal(batch, num_tokens, value_heads),
            self.normal(batch, taps - 1, channels),
            self.normal(batch, value_heads, value_dim, key_dim, dtype=mx.float32, scale=0.3),
            parameters,
            mask,
        )

    def attention(self, batch: int, num_tokens: int, length: int) -> list[mx.array]:
        """q as the projection leaves it; keys and values as views of longer buffers of NaN."""
        num_kv_heads, group, dim = ATTENTION_HEADS[self.number % len(ATTENTION_HEADS)]
        q = self.normal(batch, num_tokens, num_kv_heads * group, dim).swapaxes(1, 2)
        known = [self.normal(batch, num_kv_heads, length, dim) for _ in range(2)]
        return [q, *map(self.with_room, known)]

    def with_room(self, known: mx.array) -> mx.array:
        """A view of a longer buffer, whose room is of NaN, or of ones of the bits of words."""
        shape = (*known.shape[:2], self.integer(1, 40), known.shape[3])
        filled = 2**32 - 1 if known.dtype == mx.uint32 else mx.nan
        longer = mx.concatenate([known, mx.full(shape, filled, known.dtype)], axis=2)
        return longer[:, :, : known.shape[2]]

    def packed_attention(self, batch: int, num_tokens: int, length: int) -> list[Any]:
        """The same with packed keys and values; codes, scales and biases in unequal buffers."""
        heads = PACKED_HEADS[self.number % len(PACKED_HEADS)]
        num_kv_heads, group, dim = heads
        q = self.normal(batch, num_tokens, num_kv_heads * group, dim).swapaxes(1, 2)
        held = []
        for _ in range(2):
            known = self.normal(batch, num_kv_heads, length, dim)
            # Groups of unlike scales and biases.
            factors = self.normal(1, num_kv_heads, length, dim // 64)
            known = known * mx.repeat(factors, 64, axis=3)
            parts = mx.quantize(known + self.normal(1, 1, 1, dim), 64, 8)
            held.append(Packed([self.with_room(part) for part in parts], 8, 64))
        return [q, *held]
