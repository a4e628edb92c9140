"""Converts source rows to output rows: dequantize FP8, transform, cast, quantize."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from qwen35_mlx.checkpoint.adapter import Adapter
from qwen35_mlx.checkpoint.headers import FP8
from qwen35_mlx.checkpoint.resolver import Segment
from qwen35_mlx.checkpoint.tensor_table import Transform
from qwen35_mlx.errors import CheckpointError, Qwen35Error
from qwen35_mlx.quant import quantize
from qwen35_mlx.quant.affine import largest_bits
from qwen35_mlx.quant.packing import Quantized, joined
from qwen35_mlx.quant.statistics import Calibration

from .distilled import Distilled
from .fp8 import dequantize_fp8, float32, scale_rows
from .plan import Entry
from .source import as_mlx, read_rows
from .tasks import Task, entry_tasks

MLX_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
# A mask for the bits of the magnitude, and the lowest magnitude that is not finite.
NOT_FINITE = {
    "F32": (0x7FFFFFFF, 0x7F800000),
    "F16": (0x7FFF, 0x7C00),
    "BF16": (0x7FFF, 0x7F80),
    FP8: (0x7F, 0x7F),
}


class Known(NamedTuple):
    """What changes or improves the conversion of a source's tensors."""

    calibration: Calibration | None = None
    adapter: Adapter | None = None
    distilled: Distilled | None = None


NOTHING = Known()


def read_entry(entry: Entry) -> mx.array:
    """Read and transform the whole output tensor of an entry that is not quantized."""
    parts = [transform(task, read_segment(task.segment))[0] for task in entry_tasks(entry)]
    return mx.concatenate(parts).reshape(entry.shape)


def read_segment(segment: Segment) -> np.ndarray:
    """Read the rows of a segment `[rows, columns]`: as stored, or FP8 times its scales in float32.

    Raises CheckpointError for values that are not finite.
    """
    rows = read_rows(segment.tensor, segment.start_row, segment.stop_row)
    _check_finite(rows, segment.tensor.dtype, segment)
    if segment.scale is None or segment.block is None:
        return rows
    at = scale_rows(segment)
    scales = read_rows(segment.scale, int(at[0]), int(at[-1]) + 1)
    _check_finite(scales, segment.scale.dtype, segment)
    factors = float32(scales, segment.scale.dtype)[at - at[0]]
    return dequantize_fp8(rows, factors, segment.block[1])


def transform(task: Task, rows: np.ndarray, known: Known = NOTHING) -> list[mx.array]:
    """The output rows of a task, from source rows: the weight, or weight, scales and biases.

    Raises CheckpointError for weights that cannot be cast or quantized.
    """
    entry, segment, adapter = task.entry, task.segment, known.adapter
    if known.distilled and (
        found := known.distilled.rows(entry.module, task.row, task.row + task.num_rows)
    ):
        return found
    if segment.tensor.dtype not in NOT_FINITE:
        # Already quantized: the bytes are copied.
        return [mx.array(rows)]
    if segment.scale is None:
        x = as_mlx(rows, segment.tensor.dtype)
    else:
        x = mx.array(rows).astype(mx.bfloat16)
    if entry.transform is Transform.ADD_ONE:
        # fp32: bf16 has too few digits for the sum, and the output may be float32.
        x = x.astype(mx.float32) + 1
    elif entry.transform is Transform.CHANNELS_LAST:
        x = x.reshape(segment.tensor.shape).moveaxis(1, -1)
    if adapter and entry.module in adapter.changes:
        # fp32: the change may be smaller than the precision of bf16.
        x = adapter.changes[entry.module].of_rows(x, task.row)
    dtype = MLX_DTYPES[entry.dtype]
    if x.dtype != dtype:
        x = x.astype(dtype)
        if not mx.all(mx.isfinite(x)).item():
            raise _unusable(segment, f"has values outside the range of {dtype}")
    parts: list[mx.array] = [x]
    if entry.method is not None:
        try:
            parts = list(quantize_rows(x, entry, task.row, known.calibration))
        except Qwen35Error as error:
            raise CheckpointError(f"{segment.tensor.name} cannot be quantized: {error}") from error
    parts = [mx.contiguous(part) for part in parts]
    mx.eval(parts)
    return parts


def quantize_rows(
    rows: mx.array, entry: Entry, start: int, calibration: Calibration | None
) -> Quantized:
    """Quantize rows of an entry, `[rows, inputs]`; the first one is row `start` of the entry.

    The rows of an expert are quantized with the statistics of its own inputs. Without a Hessian, as
    for an embedding, the method "search" replaces "gptq".
    """
    bits, group_size, method = entry.bits, entry.group_size, entry.method
    assert bits and group_size and method
    if calibration is None or method == "minmax":
        return quantize(rows, bits, group_size, "search" if method == "gptq" else method)

    def calibrated(rows: mx.array, moments: mx.array | None, hessian: mx.array | None) -> Quantized:
        if method == "gptq" and hessian is not None:
            return quantize(rows, bits, group_size, "gptq", hessian=hessian)
        return quantize(rows, bits, group_size, "search", moments)

    moments, hessian = calibration.of(entry.module)
    # Experts that share a Hessian are quantized together.
    is_shared = method == "gptq" and hessian is not None and hessian.ndim == 2
    if moments is None or moments.ndim == 1 or is_shared:
        return calibrated(rows, moments, hessian)
    rows_per_expert, row, stop = entry.shape[1], start, start + len(rows)
    parts = []
    while row < stop:
        expert, row_of_expert = divmod(row, rows_per_expert)
        num_whole = (stop - row) // rows_per_expert if row_of_expert == 0 else 0
        if method == "gptq" and hessian is not None and num_whole:
            # GPTQ takes the same number of steps for a stack of experts as for one.
            end = row + num_whole * rows_per_expert
            stack = rows[row - start : end - start].reshape(num_whole, rows_per_expert, -1)
            part = joined([calibrated(stack, None, hessian[expert : expert + num_whole])], [-1])
        else:
            end = (expert + 1) * rows_per_expert
            statistics = calibration.of(entry.module, expert)
            part = calibrated(rows[row - start : end - start], *statistics)
        mx.eval(part)
        parts.append(part)
        row = end
    return joined(parts, [-1])


def _check_finite(rows: np.ndarray, dtype: str, segment: Segment) -> None:
    if dtype not in NOT_FINITE:
        return
    mask, limit = NOT_FINITE[dtype]
    if largest_bits(rows.view(f"<u{rows.itemsize}"), mask) >= limit:
        raise _unusable(segment, "has values that are not finite")


def _unusable(segment: Segment, problem: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {segment.tensor.name} {problem}",
        got=f"nan or inf in rows {segment.start_row} to {segment.stop_row - 1}",
        expected="finite values",
        hint=f"download {segment.tensor.file.name} again: it may be damaged",
    )
