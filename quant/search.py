"""Searches scale and bias of the least squared error for each group."""

# R rows, K groups a row, G weights a group. Weights lie as [G, R, K], numbers of groups as
# [1, R, K]: sums over a group are then additions of whole vectors.

from itertools import product
from typing import NamedTuple

import mlx.core as mx

from .packing import Quantized, joined, pack

CHUNK_WEIGHTS = 2**20
# Starts of the search: the ends of the range, in steps inside of minimum and maximum. Few bits
# gain from clipping the ends; many bits from trying many step sizes, larger ones too.
STARTS = {
    2: (0.0, 0.25, 0.5, 0.75, 1.0),
    3: (0.0, 0.25, 0.5, 0.75, 1.0),
    4: (-0.4, -0.1, 0.2, 0.5, 0.8),
    5: (-1.0, -0.6, -0.2, 0.2, 0.6),
    6: (-1.5, -1.0, -0.5, 0.0, 0.5),
    8: (-2.5, -1.9, -1.3, -0.7, -0.1),
}
# With importance, as parts of the range: the important weights may lie far inside.
FAR_STARTS = (0.1, 0.2, 0.4, 0.6)
NUM_KEPT = 2
NUM_IMPROVEMENTS = 2


class Fit(NamedTuple):
    """Scale and bias of each group, and their squared error; all [1, R, K] in float32."""

    error: mx.array
    scale: mx.array
    bias: mx.array

    def or_better(self, other: "Fit") -> "Fit":
        """The fit of less error for each group; NaN is never better."""
        better = other.error < self.error
        return Fit(*(mx.where(better, b, a) for a, b in zip(self, other, strict=True)))


def search(
    w: mx.array, bits: int, group_size: int, importance: mx.array | None = None
) -> Quantized:
    """Quantize finite `w [..., inputs]` with the least error, weighted by `importance [inputs]`.

    Holds the result and about 12 float32 copies of a chunk of 2**20 weights (or of one row).
    The bits of a row do not depend on other rows. The error, in float32 arithmetic on scales and
    biases as stored, is never above the error of mx.quantize.
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
    """The nearest codes, as float32 of the shape of `rows [R, inputs]`."""
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
    """Scales and biases [R, K] for `rows [R, inputs]`, in `dtype` or theirs.

    `importance` is [inputs], or [R, inputs] for each row. Columns of zero importance do not count,
    except in groups that have no others.
    """
    dtype, levels = dtype or rows.dtype, 2**bits - 1
    grouped = rows.reshape(rows.shape[0], -1, group_size)
    weight = None
    if importance is not None:
        weight = importance.astype(mx.float32).reshape(*importance.shape[:-1], -1, group_size)
        top = weight.max(axis=-1, keepdims=True)
        # Relative to the group's largest: equal importance gives exactly 1, as without importance.
        weight = mx.where(top > 0, weight / top, 1)
        weighty = mx.max(mx.where(weight > 0, grouped, -mx.inf), axis=-1, keepdims=True)
        grouped = mx.where(weight > 0, grouped, weighty.astype(rows.dtype))
        weight = weight.T[:, None, :] if weight.ndim == 2 else weight.transpose(2, 0, 1)
    x = mx.contiguous(grouped.astype(mx.float32).transpose(2, 0, 1))
    # A power of two near the largest weight: squares neither overflow nor underflow.
    unit = power_of_two(mx.abs(x).max(axis=0, keepdims=True))
    problem = Problem(x / unit, weight, levels, dtype, unit)

    low, high = problem.x.min(axis=0, keepdims=True), problem.x.max(axis=0, keepdims=True)
    kept: list[Fit] = []
    insides = STARTS[bits] + (() if weight is None else tuple(levels * f for f in FAR_STARTS))
    step = (high - low) / levels
    for inside_low, inside_high in product(insides, repeat=2):
        start, end = low + inside_low * step, high - inside_high * step
        kept = keep(kept, problem.tried((end - start) / levels, start))
        mx.async_eval(kept)
    _, *minmax = mx.quantize(grouped.reshape(rows.shape), group_size=group_size, bits=bits)
    minmax = [problem.stored(array.astype(mx.float32)[None] / unit) for array in minmax]
    best, _ = problem.improved(*minmax)
    # mx.quantize overflows earlier than this search, and NaN would never be replaced.
    best = best._replace(error=mx.where(mx.isnan(best.error), mx.inf, best.error))
    for candidate in kept:
        for _ in range(NUM_IMPROVEMENTS + 1):
            found, candidate = problem.improved(candidate.scale, candidate.bias)
            best = best.or_better(found)
            mx.async_eval(best, candidate)
    scales, biases = ((array * unit)[0].astype(dtype) for array in best[1:])
    return scales, biases


def keep(kept: list[Fit], new: Fit) -> list[Fit]:
    """Insert `new` into fits ordered by error, for each group; keep the NUM_KEPT best."""
    ordered = []
    for old in kept:
        ordered.append(old.or_better(new))
        new = Fit(*(mx.where(new.error < old.error, a, b) for a, b in zip(old, new, strict=True)))
    return [*ordered, new][:NUM_KEPT]


class Problem:
    """All groups of a chunk: weights `x` in units of `unit`, their importance, and rounding."""

    def __init__(
        self, x: mx.array, weight: mx.array | None, levels: int, dtype: mx.Dtype, unit: mx.array
    ):
        self.x, self.weight, self.levels, self.dtype, self.unit = x, weight, levels, dtype, unit
        self.total = fold_sum(mx.ones((x.shape[0], 1, 1)) if weight is None else weight)

    def stored(self, value: mx.array) -> mx.array:
        """`value` rounded to the dtype of scales and biases."""
        return (value * self.unit).astype(self.dtype).astype(mx.float32) / self.unit

    def weighed(self, values: mx.array) -> mx.array:
        """`values` times importance."""
        return values if self.weight is None else values * self.weight

    def tried(self, scale: mx.array, bias: mx.array) -> Fit:
        """The error of scale and bias after rounding."""
        scale, bias = self.stored(scale), self.stored(bias)
        steps = (self.x - bias) * inverse(scale)
        rest = steps - nearest(steps, self.levels)
        error = mx.square(scale) * fold_sum(self.weighed(rest) * rest)
        # A scale that rounds to 0 is a start only where there is no other.
        return Fit(mx.where(scale == 0, mx.inf, error), scale, bias)

    def improved(self, scale: mx.array, bias: mx.array) -> tuple[Fit, Fit]:
        """Scale and bias with their error, and the least squares solution for their codes.

        The error of the solution is its error before rounding.
        """
        offset = self.x - bias
        codes = nearest(offset * inverse(scale), self.levels)
        rest = offset - scale * codes
        # Regression of the residual on the codes: no difference of large numbers.
        weighed_codes, weighed_rest = self.weighed(codes), self.weighed(rest)
        c, cc = fold_sum(weighed_codes), fold_sum(weighed_codes * codes)
        r, rc = fold_sum(weighed_rest), fold_sum(weighed_rest * codes)
        error = fold_sum(weighed_rest * rest)
        determinant = self.total * cc - c * c
        # One code for all: any slope would do.
        solvable = determinant > 1e-6 * self.total * cc
        slope = (self.total * rc - c * r) / mx.where(solvable, determinant, 1)
        slope = mx.where(solvable, slope, 0)
        left = error - slope * rc - (r - slope * c) / self.total * r
        new_scale = self.stored(scale + slope)
        # The bias is solved after the scale is rounded, and compensates the rounding.
        new_bias = self.stored(bias + (r - (new_scale - scale) * c) / self.total)
        return Fit(error, scale, bias), Fit(left, new_scale, new_bias)


def nearest(steps: mx.array, levels: int) -> mx.array:
    """The nearest code, halves to even, as float32."""
    # Adding 2**23 leaves no bits for a fraction: mx.round takes three times as long on a CPU.
    return (mx.clip(steps, 0, levels) + 2.0**23) - 2.0**23


def fold_sum(values: mx.array) -> mx.array:
    """Sum over the first axis, whose length is a power of two, in a fixed order."""
    # The order of mx.sum depends on the whole shape: separate rows would differ in the last bit.
    while (length := values.shape[0]) > 1:
        values = values[: length // 2] + values[length // 2 :]
    return values


def inverse(scale: mx.array) -> mx.array:
    """1 / scale, and 0 for 0: every code is then 0, and the weight is the bias."""
    return mx.where(scale == 0, 0, 1 / mx.where(scale == 0, 1, scale))


def power_of_two(values: mx.array) -> mx.array:
    """The power of two at or below each of `values >= 0`, in float32, far from its limits."""
    exponent = mx.view(values, mx.uint32) & 0x7F800000
    return mx.clip(mx.view(exponent, mx.float32), 2.0**-120, 2.0**120)
