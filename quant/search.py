"""Searches the scale and bias of each group with the lowest squared error."""

# R rows, K groups a row, G weights a group. Weights have the layout [G, R, K], values of groups
# [1, R, K], so that sums over a group are additions of whole vectors.

from itertools import product
from typing import NamedTuple

import mlx.core as mx

from .packing import Quantized, joined, pack

CHUNK_WEIGHTS = 2**20
# Starts of the search: how far the ends of the code range lie inside the minimum and the maximum of
# a group, in steps. Few bits gain from clipping; many bits gain from many step sizes.
STARTS = {
    2: (0.0, 0.25, 0.5, 0.75, 1.0),
    3: (0.0, 0.25, 0.5, 0.75, 1.0),
    4: (-0.4, -0.1, 0.2, 0.5, 0.8),
    5: (-1.0, -0.6, -0.2, 0.2, 0.6),
    6: (-1.5, -1.0, -0.5, 0.0, 0.5),
    8: (-2.5, -1.9, -1.3, -0.7, -0.1),
}
# More starts with importance, as parts of the range: important weights may be far from its ends.
FAR_STARTS = (0.1, 0.2, 0.4, 0.6)
NUM_KEPT = 2
NUM_IMPROVEMENTS = 2


class Fit(NamedTuple):
    """Scale and bias of each group, and their squared error; all `[1, R, K]` in float32."""

    error: mx.array
    scale: mx.array
    bias: mx.array

    def or_better(self, other: "Fit") -> "Fit":
        """The fit with the lower error, for each group; NaN is never better."""
        better = other.error < self.error
        return Fit(*(mx.where(better, b, a) for a, b in zip(self, other, strict=True)))


def search(
    w: mx.array, bits: int, group_size: int, importance: mx.array | None = None
) -> Quantized:
    """Quantize finite `w [..., inputs]` with the lowest error, weighted by `importance [inputs]`.

    Holds the result and about 12 float32 copies of a chunk of 2**20 weights (or of one row).
    The result of a row does not depend on other rows. The error, computed in float32 from the
    stored scales and biases, is never above that of mx.quantize.
    """
    *leading, inputs = w.shape
    if importance is not None and mx.all(importance == importance[0]).item():
        importance = None
    rows = w.reshape(-1, inputs)
    num_rows = max(CHUNK_WEIGHTS // inputs, 1)
    parts = []
    for start in range(0, rows.shape[0], num_rows):
        chunk = rows[start : start + num_rows]
        scales, biases = fit(chunk, bits, group_size, importance)
        part = (pack(encode(chunk, scales, biases, bits), bits), scales, biases)
        mx.eval(part)
        parts.append(part)
    return joined(parts, leading)


def encode(rows: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """The nearest codes of `rows [R, inputs]`, in their shape, as float32."""
    x = rows.astype(mx.float32).reshape(*scales.shape, -1)
    scale, bias = (array.astype(mx.float32)[..., None] for array in (scales, biases))
    codes = nearest((x - bias) * inverse(scale), 2**bits - 1)
    return codes.reshape(rows.shape)


def fit(
    rows: mx.array,
    bits: int,
    group_size: int,
    importance: mx.array | None = None,
    dtype: mx.Dtype | None = None,
) -> tuple[mx.array, mx.array]:
    """Scales and biases `[R, K]` for `rows [R, inputs]`, in `dtype`, by default that of the rows.

    `importance` is `[inputs]` or `[R, inputs]`. Columns with importance 0 are ignored, except in
    groups where all columns have it.
    """
    dtype, levels = dtype or rows.dtype, 2**bits - 1
    grouped = rows.reshape(rows.shape[0], -1, group_size)
    weight = None
    if importance is not None:
        weight = importance.astype(mx.float32).reshape(*importance.shape[:-1], -1, group_size)
        top = weight.max(axis=-1, keepdims=True)
        # Relative to the maximum of the group: equal importance gives exactly 1, like none.
        weight = mx.where(top > 0, weight / top, 1)
        # Ignored columns get a value inside the range of the others.
        inside = mx.max(mx.where(weight > 0, grouped, -mx.inf), axis=-1, keepdims=True)
        grouped = mx.where(weight > 0, grouped, inside.astype(rows.dtype))
        weight = weight.T[:, None, :] if weight.ndim == 2 else weight.transpose(2, 0, 1)
    x = mx.contiguous(grouped.astype(mx.float32).transpose(2, 0, 1))
    # A power of two near the largest weight, so that squares neither overflow nor underflow.
    unit = power_of_two(mx.abs(x).max(axis=0, keepdims=True))
    problem = Problem(x / unit, weight, levels, dtype, unit)

    low, high = problem.x.min(axis=0, keepdims=True), problem.x.max(axis=0, keepdims=True)
    kept: list[Fit] = []
    insides = STARTS[bits] + (() if weight is None else tuple(levels * f for f in FAR_STARTS))
    step = (high - low) / levels
    for inside_low, inside_high in product(insides, repeat=2):
        start, end = low + inside_low * step, high - inside_high * step
        kept = keep(kept, problem.evaluate((end - start) / levels, start))
        mx.async_eval(kept)
    _, *minmax = mx.quantize(grouped.reshape(rows.shape), group_size=group_size, bits=bits)
    minmax = [problem.stored(array.astype(mx.float32)[None] / unit) for array in minmax]
    best, _ = problem.improve(*minmax)
    # mx.quantize overflows earlier than this search; NaN would never be replaced.
    best = best._replace(error=mx.where(mx.isnan(best.error), mx.inf, best.error))
    for candidate in kept:
        for _ in range(NUM_IMPROVEMENTS + 1):
            found, candidate = problem.improve(candidate.scale, candidate.bias)
            best = best.or_better(found)
            mx.async_eval(best, candidate)
    scales, biases = ((array * unit)[0].astype(dtype) for array in best[1:])
    return scales, biases


def keep(kept: list[Fit], new: Fit) -> list[Fit]:
    """Insert `new` into fits that are sorted by error, for each group; keep the NUM_KEPT best."""
    ordered = []
    for old in kept:
        ordered.append(old.or_better(new))
        new = Fit(*(mx.where(new.error < old.error, a, b) for a, b in zip(old, new, strict=True)))
    return [*ordered, new][:NUM_KEPT]


class Problem:
    """The groups of a chunk: weights x in units of `unit`, their importance, and the dtype."""

    def __init__(
        self, x: mx.array, weight: mx.array | None, levels: int, dtype: mx.Dtype, unit: mx.array
    ):
        self.x, self.weight, self.levels, self.dtype, self.unit = x, weight, levels, dtype, unit
        self.total = fold_sum(mx.ones((x.shape[0], 1, 1)) if weight is None else weight)

    def stored(self, value: mx.array) -> mx.array:
        """`value` rounded to the dtype of scales and biases."""
        return (value * self.unit).astype(self.dtype).astype(mx.float32) / self.unit

    def weighted(self, values: mx.array) -> mx.array:
        """`values` times importance."""
        return values if self.weight is None else values * self.weight

    def evaluate(self, scale: mx.array, bias: mx.array) -> Fit:
        """Scale and bias rounded to their dtype, with their error."""
        scale, bias = self.stored(scale), self.stored(bias)
        steps = (self.x - bias) * inverse(scale)
        rest = steps - nearest(steps, self.levels)
        error = mx.square(scale) * fold_sum(self.weighted(rest) * rest)
        # A scale that is rounded to 0 is used only if there is no other start.
        return Fit(mx.where(scale == 0, mx.inf, error), scale, bias)

    def improve(self, scale: mx.array, bias: mx.array) -> tuple[Fit, Fit]:
        """Scale and bias with their error, and the least squares solution for their codes.

        The error of the solution is that for the same codes.
        """
        offset = self.x - bias
        codes = nearest(offset * inverse(scale), self.levels)
        rest = offset - scale * codes
        # Regression of the residual instead of the weights: no difference of large numbers.
        weighted_codes, weighted_rest = self.weighted(codes), self.weighted(rest)
        c, cc = fold_sum(weighted_codes), fold_sum(weighted_codes * codes)
        r, rc = fold_sum(weighted_rest), fold_sum(weighted_rest * codes)
        error = fold_sum(weighted_rest * rest)
        determinant = self.total * cc - c * c
        # If all codes are equal, the slope is not determined.
        solvable = determinant > 1e-6 * self.total * cc
        slope = (self.total * rc - c * r) / mx.where(solvable, determinant, 1)
        slope = mx.where(solvable, slope, 0)
        new_error = error - slope * rc - (r - slope * c) / self.total * r
        new_scale = self.stored(scale + slope)
        # The bias is computed from the rounded scale, and compensates its rounding.
        new_bias = self.stored(bias + (r - (new_scale - scale) * c) / self.total)
        return Fit(error, scale, bias), Fit(new_error, new_scale, new_bias)


def nearest(steps: mx.array, levels: int) -> mx.array:
    """The nearest codes as float32; halves are rounded to even."""
    # float32 has no fraction above 2**23. mx.round takes three times as long on a CPU.
    return (mx.clip(steps, 0, levels) + 2.0**23) - 2.0**23


def fold_sum(values: mx.array) -> mx.array:
    """Sum over the first axis in a fixed order; its length must be a power of two."""
    # The order of mx.sum depends on the whole shape: a row alone could differ in the last bit.
    while (length := values.shape[0]) > 1:
        values = values[: length // 2] + values[length // 2 :]
    return values


def inverse(scale: mx.array) -> mx.array:
    """1 / scale, or 0 for scale 0: then all codes are 0, and the weights are the bias."""
    return mx.where(scale == 0, 0, 1 / mx.where(scale == 0, 1, scale))


def power_of_two(values: mx.array) -> mx.array:
    """The largest power of two up to each of `values >= 0`, within 2**-120 and 2**120."""
    exponent = mx.view(values, mx.uint32) & 0x7F800000
    return mx.clip(mx.view(exponent, mx.float32), 2.0**-120, 2.0**120)
