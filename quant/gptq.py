"""GPTQ: rounds column after column; later columns compensate the error of earlier ones."""

# E experts, R rows, G weights a group. Within a group, the columns are the first axis: [G, E, R].

import mlx.core as mx
import numpy as np

from qwen35_mlx.errors import Qwen35Error

from .packing import Quantized, joined, pack
from .search import CHUNK_WEIGHTS, fit, inverse, nearest

DAMPING = 0.01
# Below twice this size, a triangular matrix is inverted directly.
SMALL_INVERSE = 256


def gptq(
    w: mx.array, bits: int, group_size: int, hessian: mx.array, damping: float = DAMPING
) -> Quantized:
    """Quantize finite `w [..., inputs]` with the lowest error of `w @ x` for typical inputs x.

    `hessian [inputs, inputs]` is proportional to the mean of x x^T; `damping` times the mean of
    its diagonal is added to the diagonal. `w [E, R, inputs]` may have one Hessian for each E.
    Scale and bias of each group are searched after the compensation of all earlier columns.
    Holds the result, 3 float64 matrices of the size of `hessian`, and the memory of `search`.
    Raises Qwen35Error for a Hessian that does not fit or is not positive definite.
    Source: Frantar et al. 2022, arXiv 2210.17323; columns in their stored order.
    """
    *leading, inputs = w.shape
    # [E, R, inputs]; with one Hessian for all rows, E = 1.
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
    """Upper triangular U `[inputs, inputs]` in float32: U^T U is the inverse damped Hessian."""
    if hessian.shape != (inputs, inputs):
        raise Qwen35Error(
            "the Hessian does not fit the weight",
            got=list(hessian.shape),
            expected=[inputs, inputs],
        )
    # numpy, because MLX has no float64 on a GPU; with correlated inputs, H is nearly singular.
    h = np.array(hessian.astype(mx.float32)).astype(np.float64)
    if not np.isfinite(h).all() or not np.allclose(h, h.T, rtol=1e-3, atol=1e-6 * np.abs(h).max()):
        raise Qwen35Error(
            "the Hessian is not a matrix of second moments",
            expected="a symmetric matrix of finite numbers",
        )
    mean = np.trace(h) / inputs
    h += np.eye(inputs) * (damping * mean if mean > 0 else 1)
    try:
        # Reversed columns: the inverse of this factor is U, without inverting the whole Hessian.
        lower = np.linalg.cholesky(h[::-1, ::-1])
    except np.linalg.LinAlgError:
        raise Qwen35Error(
            "the Hessian is not positive definite",
            got=f"damping={damping}",
            hint="use a larger damping: 0.01 or 0.1",
        ) from None
    upper = _inverse_of_lower(lower)[::-1, ::-1]
    return mx.array(np.triu(upper).astype(np.float32))


def _inverse_of_lower(lower: np.ndarray) -> np.ndarray:
    """The inverse of a lower triangular matrix by halves, several times faster than a general."""
    half = len(lower) // 2
    if half < SMALL_INVERSE:
        return np.linalg.inv(lower)
    first, last = _inverse_of_lower(lower[:half, :half]), _inverse_of_lower(lower[half:, half:])
    result = np.zeros_like(lower)
    result[:half, :half], result[half:, half:] = first, last
    result[half:, :half] = -(last @ lower[half:, :half]) @ first
    return result


def feedback_gain(hessian: mx.array, damping: float = DAMPING) -> float:
    """The error of GPTQ relative to plain rounding: the mean over `hessian [..., I, I]`.

    With plain rounding, the error of a column is weighted with the variance of its input; with
    GPTQ, with the part of this variance that later inputs do not explain.
    """
    gains = []
    for matrix in hessian.reshape(-1, *hessian.shape[-2:]):
        factor = inverse_factor(matrix, len(matrix), damping)
        left = float((1 / mx.square(mx.diag(factor))).sum())
        total = float(mx.diag(matrix).sum()) * (1 + damping)
        gains.append(left / total if total > 0 else 1.0)
    return sum(gains) / len(gains)


def _feed_back(rows: mx.array, bits: int, group_size: int, factor: mx.array) -> Quantized:
    """Codes `[E * R, inputs]`, scales and biases of rows `[E, R, inputs]`.

    factor: `[E, inputs, inputs]`, from `inverse_factor`.
    """
    dtype, levels = rows.dtype, 2**bits - 1
    num, num_rows, inputs = rows.shape
    rest = rows.astype(mx.float32)
    # Cost of an error in a column, after its compensation by later columns.
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
