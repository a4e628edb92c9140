"""FP8 weights (E4M3) with a scale for each block of rows and columns."""

# n rows, C columns; a scale belongs to a block of b rows and c columns; edge blocks are partial.

import mlx.core as mx
import numpy as np

from qwen35_mlx.checkpoint.resolver import Segment

BYTES = mx.array(np.arange(256, dtype=np.uint8))
# The number of each byte. Computed on the CPU, so that an import does not start the GPU.
VALUES = np.array(mx.from_fp8(BYTES, mx.float32, stream=mx.cpu))
# The two numbers of each pair of bytes, as 64 bits: this halves the number of look-ups.
PAIRS = np.stack([np.tile(VALUES, 256), VALUES.repeat(256)], axis=1).view("<u8").reshape(-1)


def scale_rows(segment: Segment) -> np.ndarray:
    """For each row of a segment, the index of its row in the scale tensor."""
    assert segment.block is not None
    rows, block = segment.tensor.shape[-2], segment.block[0]
    at = np.arange(segment.start_row, segment.stop_row)
    return at // rows * -(-rows // block) + at % rows // block


def dequantize_fp8(rows: np.ndarray, scales: np.ndarray, columns: int) -> np.ndarray:
    """Bytes `rows [n, C]` times `scales [n, ceil(C / c)]` in float32; c is `columns`."""
    if rows.size % 2:
        values = VALUES[rows]
    else:
        values = PAIRS[rows.reshape(-1).view("<u2")].view("<f4").reshape(rows.shape)
    whole = rows.shape[1] // columns * columns
    # A view of `values`.
    blocks = values[:, :whole].reshape(len(rows), whole // columns, columns)
    blocks *= scales[:, : whole // columns, None]
    if whole < rows.shape[1]:
        values[:, whole:] *= scales[:, -1:]
    return values


def float32(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Stored values as float32; the values of "BF16" are given as uint16 bits."""
    if dtype == "BF16":
        return (rows.astype("<u4") << 16).view("<f4")
    return rows.astype("<f4")
