"""FP8 weights (E4M3) with a scale for each block of rows and columns."""

# n rows, C columns; scales lie in blocks of b rows and c columns, those at the edges partial.

import mlx.core as mx
import numpy as np

from .source import Segment


def scale_rows(segment: Segment) -> np.ndarray:
    """For each row of a segment, the row of the scale tensor that belongs to it."""
    assert segment.block is not None
    rows, block = segment.tensor.shape[-2], segment.block[0]
    at = np.arange(segment.start_row, segment.stop_row)
    return at // rows * -(-rows // block) + at % rows // block


def dequantize_fp8(rows: mx.array, scales: mx.array, columns: int) -> mx.array:
    """`rows [n, C]` of uint8 times `scales [n, ceil(C / c)]`, c = `columns`, in bfloat16.

    The product is taken in float32; holds two such copies.
    """
    values = mx.from_fp8(rows, dtype=mx.float32)
    num_rows, num_columns = values.shape
    whole = num_columns // columns * columns
    scales = scales.astype(mx.float32)
    blocks = values[:, :whole].reshape(num_rows, -1, columns) * scales[:, : whole // columns, None]
    parts = [blocks.reshape(num_rows, whole).astype(mx.bfloat16)]
    if whole < num_columns:
        parts.append((values[:, whole:] * scales[:, -1:]).astype(mx.bfloat16))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
