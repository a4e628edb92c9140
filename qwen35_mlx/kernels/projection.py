"""Several linear layers of one input, in one dispatch.

N rows of activations, H their width.
"""

import functools
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .matrix import FLOATS, MAX_ROWS, Matrix, lanes_per_row, matrices, names
from .metal import NONE, KernelSet, kernel

SIMDGROUPS = 2
# From so many rows of weights on, there are simdgroups enough for four rows each.
MANY_ROWS = 8192


def project(
    x: mx.array,
    modules: Sequence[nn.Module],
    kernels: KernelSet = NONE,
    *,
    norm: nn.RMSNorm | None = None,
    dtype: mx.Dtype | None = None,
) -> list[mx.array]:
    """`[..., H]`, after `norm`, times each of the modules' weights.

    Of type `dtype`, or of what x, the norm's weight and the module's promote to.
    """
    rows = x.size // x.shape[-1]
    if "projection" in kernels and rows <= MAX_ROWS and x.dtype in FLOATS:
        weights = matrices(modules)
        if weights is not None:
            outputs = project_kernel(x.reshape(rows, -1), weights, dtype, norm)
            return [y.reshape(*x.shape[:-1], -1) for y in outputs]
    x = x if norm is None else norm(x)
    return [module(x) if dtype is None else module(x).astype(dtype) for module in modules]


def project_kernel(
    x: mx.array,
    weights: Sequence[Matrix],
    dtype: mx.Dtype | None = None,
    norm: nn.RMSNorm | None = None,
) -> list[mx.array]:
    """x `[N, H]`, N up to 8 -> `[N, out]` of each matrix."""
    num_rows = x.shape[0]
    lanes = lanes_per_row(x.shape[1])
    out_dims = [w.out_dims for w in weights]
    many = num_rows == 1 and sum(out_dims) >= MANY_ROWS
    rows = 4 if many else 2 if num_rows <= 4 else 1
    per_group = SIMDGROUPS * rows * (32 // lanes)
    template = [t for i, w in enumerate(weights) for t in w.template(f"m{i}")]
    template += [("ROWS", rows), ("TOKENS", num_rows), ("LANES", lanes)]
    template += [("NORM", norm is not None), ("SIMDGROUPS", SIMDGROUPS)]
    num_groups = sum(-(-out // per_group) for out in out_dims)
    inputs, outputs, generated = _signature(len(weights))
    return kernel(
        "projection", inputs, outputs, label=f"projection_{len(weights)}", generated=generated
    )(
        # Without a norm anything fills its place.
        inputs=[
            *((x, x, 0.0) if norm is None else (x, norm.weight, norm.eps)),
            *(a for w in weights for a in w.arrays),
        ],
        template=template,
        grid=(num_groups * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=[(num_rows, out) for out in out_dims],
        output_dtypes=[
            dtype or mx.result_type(x if norm is None else norm.weight, x, w.arrays[2])
            for w in weights
        ],
    )


@functools.cache
def _signature(count: int) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Inputs and outputs for so many matrices, and the code that finds that of a threadgroup."""
    prefixes = [f"m{i}" for i in range(count)]
    generated = "".join(
        f"""
{{
  const int out = {m}_w_shape[0];
  if (block * rows_per_group < out) {{
    project<{m}_BITS, {m}_GROUP, ROWS, TOKENS, LANES, NORM>(
        {m}_w, {m}_scales, {m}_biases, x, norm_weight, eps, y{i}, in, out,
        block * rows_per_group + offset, lane);
    return;
  }}
  block -= (out + rows_per_group - 1) / rows_per_group;
}}
"""
        for i, m in enumerate(prefixes)
    )
    inputs = ("x", "norm_weight", "eps", *names(*prefixes))
    return inputs, tuple(f"y{i}" for i in range(count)), generated
