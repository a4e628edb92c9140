"""Residual add and RMS norm in one dispatch."""

import mlx.core as mx

from .matrix import MAX_ROWS
from .metal import NONE, KernelSet, kernel

# Threads enough that each has but few numbers of a wide row.
SIMDGROUPS, WIDE, SIMDGROUPS_IF_WIDE = 8, 2048, 32


def residual_norm(
    x: mx.array, delta: mx.array, weight: mx.array, eps: float, kernels: KernelSet = NONE
) -> tuple[mx.array, mx.array]:
    """`x + delta`, and `rms_norm(x + delta) * weight`; x and delta `[..., H]`, weight `[H]`."""
    few = x.size <= MAX_ROWS * x.shape[-1]
    # Of mixed types plain MLX makes a wider one.
    if "residual_norm" in kernels and few and x.dtype == delta.dtype == weight.dtype:
        return residual_norm_kernel(x, delta, weight, eps)
    total = x + delta
    return total, mx.fast.rms_norm(total, weight, eps)


def residual_norm_kernel(
    x: mx.array, delta: mx.array, weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """The same; the sum is rounded to x's type before the norm, as by ops."""
    width = x.shape[-1]
    rows = x.size // width
    simdgroups = SIMDGROUPS_IF_WIDE if width > WIDE else SIMDGROUPS
    total, normed = kernel("residual_norm", ("x", "delta", "weight", "eps"), ("total", "normed"))(
        inputs=[x.reshape(rows, width), delta.reshape(rows, width), weight, eps],
        template=[("T", x.dtype), ("SIMDGROUPS", simdgroups)],
        grid=(32 * simdgroups, rows, 1),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[(rows, width)] * 2,
        output_dtypes=[x.dtype] * 2,
    )
    return total.reshape(x.shape), normed.reshape(x.shape)
