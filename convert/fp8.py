"""FP8 weights (E4M3) with a scale for each block of rows and columns."""

# n rows, C columns; scales lie in blocks of b rows and c columns, those at the edges partial.

import mlx.core as mx
import numpy as np

from qwen35_mlx.checkpoint.resolver import Segment

BYTES = mx.array(np.arange(256, dtype=np.uint8))
# The number that each stands for; on the CPU, so that importing this wakes no GPU.
VALUES = np.array(mx.from_fp8(BYTES, mx.float32, stream=mx.cpu))
# Two bytes at a time: half the look-ups. A pair of float32 travels as 64 bits.
PAIRS = np.stack([np.tile(VALUES, 256), VALUES.repeat(256)], axis=1).view("<u8").reshape(-1)


def scale_rows(segment: Segment) -> np.ndarray:
    """For each row of a segment, the row of the scale tensor that belongs to it."""
    assert segment.block is not None
    rows, block = segment.tensor.shape[-2], segment.block[0]
    at = np.arange(segment.start_row, segment.stop_row)
    return at // rows * -(-rows // block) + at % rows // block


def dequantize_fp8(rows: np.ndarray, scales: np.ndarray, columns: int) -> np.ndarray:
    """`rows [n, C]` of bytes times `scales [n, ceil(C / c)]`, c = `columns`, in float32."""
    if rows.size % 2:
        values = VALUES[rows]
    else:
        values = PAIRS[rows.reshape(-1).view("<u2")].view("<f4").reshape(rows.shape)
    whole = rows.shape[1] // columns * columns
    # A view: the last dim is split.
    blocks = values[:, :whole].reshape(len(rows), whole // columns, columns)
    blocks *= scales[:, : whole // columns, None]
    if whole < rows.shape[1]:
        values[:, whole:] *= scales[:, -1:]
    return values


def float32(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers as stored, in float32; bfloat16 comes as its bits."""
    if dtype == "BF16":
        return (rows.astype("<u4") << 16).view("<f4")
    return rows.astype("<f4")
