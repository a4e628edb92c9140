"""Quantizes rows of a tensor with what calibration knows about their inputs."""

from typing import Protocol

import mlx.core as mx

from qwen35_mlx.quant import quantize
from qwen35_mlx.quant.calibrate import Calibration, Setting


class Named(Protocol):
    """A tensor to quantize: rows are all dims but the last."""

    @property
    def module(self) -> str:
        """Its name on disk, without `.weight`."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor, `[..., I]`."""
        ...


def quantize_rows(
    rows: mx.array,
    tensor: Named,
    start: int,
    setting: Setting,
    method: str,
    calibration: Calibration | None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Quantize rows `start`, `start + 1`, … of a tensor, those of an expert by its own inputs.

    "gptq" falls back to "search" where there is no Hessian, as for an embedding.
    """
    (bits, group_size), shape, module = setting, tensor.shape, tensor.module
    if calibration is None or method == "minmax" or rows.ndim != 2:
        return quantize(rows, bits, group_size, method)
    moments, hessian = calibration.of(module)
    by_expert = len(shape) == 3 and any(
        array is not None and array.ndim > own for array, own in ((moments, 1), (hessian, 2))
    )
    if not by_expert:
        return _quantize(rows, bits, group_size, method, moments, hessian)
    parts, done = [], 0
    while done < rows.shape[0]:
        expert, row = divmod(start + done, shape[1])
        whole = (rows.shape[0] - done) // shape[1]
        if method == "gptq" and hessian is not None and hessian.ndim == 3 and not row and whole:
            # Experts together: the same steps for each, once.
            stack = rows[done : done + whole * shape[1]].reshape(whole, shape[1], -1)
            own = hessian[expert : expert + whole]
            found = quantize(stack, bits, group_size, "gptq", hessian=own)
            parts.append([part.reshape(-1, part.shape[-1]) for part in found])
            done += whole * shape[1]
        else:
            stop = min(done + shape[1] - row, rows.shape[0])
            one = calibration.of(module, expert)
            parts.append([*_quantize(rows[done:stop], bits, group_size, method, *one)])
            done = stop
        mx.eval(parts[-1])
    wq, scales, biases = (mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True))
    return wq, scales, biases


def _quantize(
    rows: mx.array,
    bits: int,
    group_size: int,
    method: str,
    moments: mx.array | None,
    hessian: mx.array | None,
) -> tuple[mx.array, mx.array, mx.array]:
    if method == "gptq" and hessian is not None:
        return quantize(rows, bits, group_size, "gptq", hessian=hessian)
    return quantize(rows, bits, group_size, "search", moments)
