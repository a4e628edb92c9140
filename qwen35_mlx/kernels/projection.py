"""Several linear layers of one input, in one dispatch.

N rows of activations, H their width.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .matrix import FLOATS, MAX_ROWS, Matrix, lanes_per_row, matrices
from .metal import NONE, Choice, kernel

SIMDGROUPS = 2
# From so many rows of weights on, there are simdgroups enough for four rows each.
MANY_ROWS = 8192


def project(
    x: mx.array,
    modules: Sequence[nn.Module],
    kernels: Choice = NONE,
    *,
    norm: nn.RMSNorm | None = None,
    dtype: mx.Dtype | None = None,
) -> list[mx.array]:
    """`[..., H]`, after `norm`, times each of the modules' weights, in x's type or `dtype`."""
    dtype = dtype or x.dtype
    rows = x.size // x.shape[-1]
    if "projection" in kernels and rows <= MAX_ROWS and x.dtype in FLOATS:
        weights = matrices(modules)
        if weights is not None:
            outputs = project_kernel(x.reshape(rows, -1), weights, dtype, norm)
            return [y.reshape(*x.shape[:-1], -1) for y in outputs]
    x = x if norm is None else norm(x)
    return [module(x).astype(dtype) for module in modules]


def project_kernel(
    x: mx.array, weights: Sequence[Matrix], dtype: mx.Dtype, norm: nn.RMSNorm | None = None
) -> list[mx.array]:
    """x `[N, H]`, N up to 8 -> `[N, out]` of each matrix."""
    num_rows = x.shape[0]
    lanes = lanes_per_row(x.shape[1])
    many = num_rows == 1 and sum(w.out_dims for w in weights) >= MANY_ROWS
    rows = 4 if many else 2 if num_rows <= 4 else 1
    per_group = SIMDGROUPS * rows * (32 // lanes)
    prefixes = [f"m{i}" for i in range(len(weights))]
    segments = "".join(
        f"  {{\n    const int out = {p}_w_shape[0];\n"
        f"    if (block * rows_per_group < out) {{\n"
        f"      project<{p}_BITS, {p}_GROUP, ROWS, TOKENS, LANES, NORM>({w.arguments(p)}, x,"
        f" norm_weight, eps, y{i}, in, out, block * rows_per_group + offset, lane);\n"
        f"      return;\n    }}\n"
        f"    block -= (out + rows_per_group - 1) / rows_per_group;\n  }}\n"
        for i, (p, w) in enumerate(zip(prefixes, weights, strict=True))
    )
    names = [n for p, w in zip(prefixes, weights, strict=True) for n in w.names(p)]
    run = kernel(
        "projection",
        ("x", "norm_weight", "eps", *names),
        tuple(f"y{i}" for i in range(len(weights))),
        label="projection_" + "".join("q" if w.bits else "d" for w in weights),
        generated=segments,
    )
    template = [t for p, w in zip(prefixes, weights, strict=True) for t in w.template(p)]
    template += [("ROWS", rows), ("TOKENS", num_rows), ("LANES", lanes)]
    num_groups = sum(-(-w.out_dims // per_group) for w in weights)
    return run(
        # Without a norm anything fills its place.
        inputs=[
            *((x, x, 0.0) if norm is None else (x, norm.weight, norm.eps)),
            *(a for w in weights for a in w.arrays),
        ],
        template=[*template, ("NORM", norm is not None), ("SIMDGROUPS", SIMDGROUPS)],
        grid=(num_groups * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=[(num_rows, w.out_dims) for w in weights],
        output_dtypes=[dtype] * len(weights),
    )
