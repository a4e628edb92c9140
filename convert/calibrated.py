"""Quantizes rows of a tensor with what calibration knows about their inputs."""

import mlx.core as mx

from qwen35_mlx.quant import quantize
from qwen35_mlx.quant.packing import Quantized, joined
from qwen35_mlx.quant.statistics import Calibration

from .plan import Entry


def quantize_rows(
    rows: mx.array, entry: Entry, start: int, calibration: Calibration | None
) -> Quantized:
    """Quantize rows `start`, `start + 1`, … of an entry, those of an expert by its own inputs.

    "gptq" falls back to "search" where there is no Hessian, as for an embedding.
    """
    bits, group_size, method = entry.bits, entry.group_size, entry.method
    assert bits and group_size and method
    if calibration is None or method == "minmax":
        return quantize(rows, bits, group_size, method)

    def calibrated(rows: mx.array, moments: mx.array | None, hessian: mx.array | None) -> Quantized:
        if method == "gptq" and hessian is not None:
            return quantize(rows, bits, group_size, "gptq", hessian=hessian)
        return quantize(rows, bits, group_size, "search", moments)

    moments, hessian = calibration.of(entry.module)
    if moments is None or moments.ndim == 1:
        return calibrated(rows, moments, hessian)
    num_rows, parts, done = entry.shape[1], [], 0
    while done < rows.shape[0]:
        expert, row = divmod(start + done, num_rows)
        whole = (rows.shape[0] - done) // num_rows
        if method == "gptq" and hessian is not None and hessian.ndim == 3 and not row and whole:
            # Experts together: the same steps for each, once.
            stop = done + whole * num_rows
            stack = rows[done:stop].reshape(whole, num_rows, -1)
            found = calibrated(stack, None, hessian[expert : expert + whole])
            parts.append(joined([found], [-1]))
        else:
            stop = min(done + num_rows - row, rows.shape[0])
            own = calibration.of(entry.module, expert)
            parts.append(calibrated(rows[done:stop], *own))
        done = stop
        mx.eval(parts[-1])
    return joined(parts, [-1])
