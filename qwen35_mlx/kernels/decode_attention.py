"""Attention of a few new tokens over a cache; each key and value is read once for all queries.

Keys and values are floats, or quantized by `mx.quantize`. B batch, T tokens, S keys, Hq/Hk
query/key heads, D head dim.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..memory import KV_GROUP_SIZE
from .matrix import FLOATS
from .metal import kernel
from .tiers import PORTABLE, Tiers

# A simdgroup processes 32 dims of the values.
HEAD_DIMS = range(32, 257, 32)
# The format of packed keys and values that the kernel reads.
PACKED_BITS, PACKED_GROUP_SIZE = 8, KV_GROUP_SIZE
# Numbers of rows for which a threadgroup can keep its sums in registers; a row is one query head
# of one token.
ROW_CLASSES = (8, 16, 32, 64, 96)
# Limit for queries, and for scores, in threadgroup memory, which has 32 KB.
MAX_STAGED_BYTES = 16 * 1024
COMBINING_SIMDGROUPS = 8


class Packed(NamedTuple):
    """Keys or values `[B, Hk, S, D]`, quantized along D."""

    # Codes, scales and biases, all `[B, Hk, S, ...]`, as `mx.quantize` returns them.
    parts: Sequence[mx.array]
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unpacked array."""
        *rows, num_groups = self.parts[1].shape
        return (*rows, num_groups * self.group_size)

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the unpacked array."""
        return self.parts[1].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def times(self, x: mx.array, head: int, transpose: bool) -> mx.array:
        """x `[B, 1, R, D]` times the keys of a head, transposed, or `[B, 1, R, S]` times values."""
        w, scales, biases = (part[:, head : head + 1] for part in self.parts)
        return mx.quantized_matmul(x, w, scales, biases, transpose, self.group_size, self.bits)


Heads = mx.array | Packed


def each(heads: Heads, change: Callable[[mx.array], mx.array]) -> Heads:
    """Apply `change` to floats, or to all parts of a packed array."""
    if isinstance(heads, Packed):
        return heads._replace(parts=[change(part) for part in heads.parts])
    return change(heads)


def first_keys(heads: Heads, num_keys: int) -> Heads:
    """A view of the first `num_keys` keys."""
    return each(heads, lambda a: a[..., :num_keys, :])


def packed(x: mx.array, bits: int) -> Packed:
    """Quantize `[B, Hk, S, D]` in groups of 64."""
    return Packed(mx.quantize(x, PACKED_GROUP_SIZE, bits), bits, PACKED_GROUP_SIZE)


def unpacked(heads: Heads) -> mx.array:
    """`[B, Hk, S, D]` as floats."""
    if not isinstance(heads, Packed):
        return heads
    w, scales, biases = heads.parts
    return mx.dequantize(w, scales, biases, heads.group_size, heads.bits)


def decode_attention(
    q: mx.array, k: Heads, v: Heads, scale: float, mask: Any, kernels: Tiers = PORTABLE
) -> mx.array:
    """q `[B, Hq, T, D]`, k and v `[B, Hk, S, D]` -> `[B, Hq, T, D]`.

    `mask` is as in MLX's attention: None, "causal" or an array. k and v may be views of buffers and
    are not copied; their last axis must be contiguous.
    """
    num_tokens = q.shape[2]
    operation = "packed_attention" if isinstance(k, Packed) else "decode_attention"
    if (
        kernels.runs(operation, num_tokens)
        # Masks that are arrays come from padded batches.
        and (isinstance(mask, str) or (mask is None and num_tokens == 1))
        and q.shape[3] in HEAD_DIMS
        and q.dtype in FLOATS
        and q.dtype == k.dtype == v.dtype
        and _is_readable(k)
        and _is_readable(v)
    ):
        return decode_attention_kernel(q, k, v, scale)
    return portable_attention(q, k, v, scale, mask)


def portable_attention(q: mx.array, k: Heads, v: Heads, scale: float, mask: Any) -> mx.array:
    """The same with MLX operations, for any T; packed arrays are never unpacked as a whole."""
    if isinstance(k, Packed) and isinstance(v, Packed):
        return _packed_attention(q, k, v, scale, mask)
    return mx.fast.scaled_dot_product_attention(q, unpacked(k), unpacked(v), scale=scale, mask=mask)


def _packed_attention(q: mx.array, k: Packed, v: Packed, scale: float, mask: Any) -> mx.array:
    batch, _, num_tokens, dim = q.shape
    num_kv_heads, length = k.shape[1:3]
    # Scores keep float32, as in MLX's own attention.
    rows = (q.astype(mx.float32) * scale).reshape(batch, num_kv_heads, -1, dim)
    if isinstance(mask, str):
        places = mx.arange(length)
        mask = places <= places[length - num_tokens :, None]
    outputs = []
    for head in range(num_kv_heads):
        # One head at a time, because for several MLX would copy the packed array on the CPU.
        scores = k.times(rows[:, head : head + 1], head, True)
        shape = scores.shape
        if mask is not None:
            # [B, query heads, T, S]; the rows are the tokens of each query head in turn.
            scores = scores.reshape(batch, -1, num_tokens, length)
            scores = mx.where(mask, scores, mx.finfo(scores.dtype).min).reshape(shape)
        outputs.append(v.times(mx.softmax(scores, axis=-1), head, False))
    return mx.concatenate(outputs, axis=1).reshape(q.shape).astype(q.dtype)


def _is_readable(heads: Heads) -> bool:
    wanted = PACKED_BITS, PACKED_GROUP_SIZE
    return not isinstance(heads, Packed) or (heads.bits, heads.group_size) == wanted


def decode_attention_kernel(q: mx.array, k: Heads, v: Heads, scale: float) -> mx.array:
    """The same for T up to 8 and causal, in two dispatches; k and v are both packed or neither."""
    batch, num_heads, num_tokens, dim = q.shape
    num_kv_heads, length = k.shape[1:3]
    group = num_heads // num_kv_heads
    num_rows, rows = num_tokens * group, row_class(num_tokens * group)
    num_passes, num_blocks = -(-num_rows // rows), len(key_blocks(length))
    heads = [("T", q.dtype), ("HK", num_kv_heads), ("GROUP", group), ("D", dim)]
    template = [
        *heads,
        ("ROWS", rows),
        ("STAGED", rows * dim * q.itemsize <= MAX_STAGED_BYTES),
        ("PACKED", isinstance(k, Packed)),
    ]
    # Floats also take the places of scales and biases.
    arrays = [a for x in (k, v) for a in (x.parts if isinstance(x, Packed) else (x, x, x))]
    names = (*("k", "k_scales", "k_biases"), *("v", "v_scales", "v_biases"))
    outputs = "sums", "extremes"
    sums, extremes = kernel("decode_attention", ("q", *names, "scale"), outputs, any_strides=True)(
        inputs=[q, *arrays, scale],
        template=template,
        grid=(dim, num_blocks * num_passes, batch * num_kv_heads),
        threadgroup=(dim, 1, 1),
        output_shapes=[(batch, num_kv_heads, num_blocks, num_rows, n) for n in (dim, 2)],
        output_dtypes=[mx.float32] * 2,
    )
    (out,) = kernel("decode_attention_combine", (*outputs, "length"), ("out",))(
        inputs=[sums, extremes, length],
        template=[*heads, ("SIMDGROUPS", COMBINING_SIMDGROUPS)],
        grid=(32 * COMBINING_SIMDGROUPS, num_rows, batch * num_kv_heads),
        threadgroup=(32 * COMBINING_SIMDGROUPS, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )
    return out


def row_class(num_rows: int) -> int:
    """The number of rows of a threadgroup; more than 96 need several passes over the keys."""
    num_passes = -(-num_rows // ROW_CLASSES[-1])
    return next(n for n in ROW_CLASSES if n * num_passes >= num_rows)


def key_blocks(num_keys: int) -> list[tuple[int, int]]:
    """First key and end of each block, as in common.metal."""
    blocks: list[tuple[int, int]] = []
    first, size, end = 0, 128, 4096
    while first < num_keys:
        blocks.append((first, min(first + size, num_keys)))
        first += size
        if first == end:
            size, end = size * 2, end * 4
    return blocks
