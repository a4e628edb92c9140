"""GPTQ: rounds column after column; later columns compensate the error of earlier ones."""

# R rows, G weights a group. Within a group columns lie first: [G, R].

import mlx.core as mx
import numpy as np

from qwen35_mlx.errors import Qwen35Error

from .packing import Quantized, joined, pack
from .search import CHUNK_WEIGHTS, fit, inverse, nearest

DAMPING = 0.01
# Where a triangular matrix is no longer inverted by halves.
SMALL_INVERSE = 256


def gptq(
    w: mx.array, bits: int, group_size: int, hessian: mx.array, damping: float = DAMPING
) -> Quantized:
    """Quantize finite `w [..., inputs]` with the least error of `w @ x` for typical inputs x.

    `hessian [inputs, inputs]` is the mean of x x^T, up to a factor; `damping` times the mean of
    its diagonal is added to it. `w [E, R, inputs]` may have a Hessian for each E. Scales and biases
    are searched group by group, on the weights as compensated so far.
    Holds the result, 3 float64 matrices of the size of `hessian`, and what `search` holds.
    Source: Frantar et al. 2022, arXiv 2210.17323, in the order of the columns.
    """
    *leading, inputs = w.shape
    # [E, R, inputs]; without a Hessian for each E, all rows are one stack.
    if hessian.ndim == 3 and w.ndim == 3 and len(hessian) == len(w):
        stack, hessians, rows_at_once = w, hessian, w.shape[1]
    else:
        stack, hessians = w.reshape(1, -1, inputs), hessian[None]
        rows_at_once = max(CHUNK_WEIGHTS // inputs, 1)
    experts_at_once = max(CHUNK_WEIGHTS // (rows_at_once * inputs), 1)
    parts = []
    for first in range(0, len(stack), experts_at_once):
        experts = slice(first, first + experts_at_once)
        factors = mx.stack([inverse_factor(h, inputs, damping) for h in hessians[experts]])
        for row in range(0, stack.shape[1], rows_at_once):
            rows = stack[experts, row : row + rows_at_once]
            codes, scales, biases = _feed_back(rows, bits, group_size, factors)
            part = (pack(codes, bits), scales, biases)
            mx.eval(part)
            parts.append(part)
    return joined(parts, leading)


def inverse_factor(hessian: mx.array, inputs: int, damping: float) -> mx.array:
    """Upper triangular U in float32 with U^T U the inverse of the damped Hessian."""
    if hessian.shape != (inputs, inputs):
        raise Qwen35Error(
            "the hessian does not fit the weight",
            got=list(hessian.shape),
            expected=[inputs, inputs],
        )
    # float64, which mlx lacks on a GPU: a Hessian of correlated inputs is nearly singular.
    h = np.array(hessian.astype(mx.float32)).astype(np.float64)
    if not np.isfinite(h).all() or not np.allclose(h, h.T, rtol=1e-3, atol=1e-6 * np.abs(h).max()):
        raise Qwen35Error(
            "the hessian is not a matrix of second moments",
            expected="finite numbers, the same across the diagonal",
        )
    mean = np.trace(h) / inputs
    h += np.eye(inputs) * (damping * mean if mean > 0 else 1)
    try:
        # From the last column to the first: in this order the whole need not be inverted.
        lower = np.linalg.cholesky(h[::-1, ::-1])
    except np.linalg.LinAlgError:
        raise Qwen35Error(
            "the hessian has directions of no or negative weight",
            got=f"damping={damping}",
            hint="damp more: 0.01 or 0.1",
        ) from None
    upper = _inverse_of_lower(lower)[::-1, ::-1]
    return mx.array(np.triu(upper).astype(np.float32))


def _inverse_of_lower(lower: np.ndarray) -> np.ndarray:
    """By halves, of a lower triangular matrix: a general inverse takes several times as long."""
    half = len(lower) // 2
    if half < SMALL_INVERSE:
        return np.linalg.inv(lower)
    first, last = _inverse_of_lower(lower[:half, :half]), _inverse_of_lower(lower[half:, half:])
    result = np.zeros_like(lower)
    result[:half, :half], result[half:, half:] = first, last
    result[half:, :half] = -(last @ lower[half:, :half]) @ first
    return result


def feedback_gain(hessian: mx.array, damping: float = DAMPING) -> float:
    """Error of products with feedback relative to without, for `hessian [..., I, I]`.

    Without feedback, rounding a column costs the variance of its input. With feedback it costs the
    part of that variance that later inputs do not explain.
    """
    gains = []
    for matrix in hessian.reshape(-1, *hessian.shape[-2:]):
        factor = inverse_factor(matrix, len(matrix), damping)
        left = float((1 / mx.square(mx.diag(factor))).sum())
        total = float(mx.diag(matrix).sum()) * (1 + damping)
        gains.append(left / total if total > 0 else 1.0)
    return sum(gains) / len(gains)


def _feed_back(rows: mx.array, bits: int, group_size: int, factor: mx.array) -> Quantized:
    """Codes [E * R, inputs], scales, biases of rows [E, R, inputs], factors [E, inputs, inputs]."""
    dtype, levels = rows.dtype, 2**bits - 1
    num, num_rows, inputs = rows.shape
    rest = rows.astype(mx.float32)
    # Cost of an error in a column after the later columns have compensated it.
    cost = 1 / mx.square(mx.diagonal(factor, axis1=1, axis2=2))
    parts = []
    for start in range(0, inputs, group_size):
        stop = start + group_size
        importance = cost[0, start:stop]
        if num > 1:
            importance = mx.repeat(cost[:, start:stop], num_rows, axis=0)
        first = rest[..., :group_size]
        scales, biases = fit(
            first.reshape(-1, group_size), bits, group_size, importance, dtype=dtype
        )
        scale, bias = (
            array.astype(mx.float32).reshape(num, num_rows) for array in (scales, biases)
        )
        group, within = first.transpose(2, 0, 1), factor[:, start:stop, start:stop]
        codes, errors = [], []
        for j in range(group_size):
            code = nearest((group[0] - bias) * inverse(scale), levels)
            error = (group[0] - (scale * code + bias)) / within[:, j, j, None]
            codes.append(code)
            errors.append(error)
            group = group[1:] - within[:, j, j + 1 :].T[..., None] * error
        rest = rest[..., group_size:] - mx.stack(errors, axis=-1) @ factor[:, start:stop, stop:]
        parts.append((mx.stack(codes, axis=-1).reshape(-1, group_size), scales, biases))
        mx.async_eval(rest, parts[-1])
    wholes = [mx.concatenate(list(arrays), axis=1) for arrays in zip(*parts, strict=True)]
    return wholes[0], wholes[1], wholes[2]
