"""Several linear layers of one input, in one dispatch.

N rows of activations, H their width.
"""

import functools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .matrix import (
    FLOATS,
    SIMDGROUPS,
    Matrix,
    lanes_per_row,
    matrices,
    names,
    rows_per_simdgroup,
    template,
)
from .metal import kernel
from .tiers import PORTABLE, Tiers

# With fewer rows of weights, a simdgroup gets few rows, so that more simdgroups run.
FEW_ROWS = 2048


def project(
    x: mx.array,
    modules: Sequence[nn.Module],
    kernels: Tiers = PORTABLE,
    *,
    norm: nn.RMSNorm | None = None,
    residual: mx.array | None = None,
    dtype: mx.Dtype | None = None,
) -> list[mx.array]:
    """`[..., H]`, after `norm`, times each of the modules' weights, plus `residual`.

    The result has the type to which x, the residual, and the weights of the norm and the module
    promote. The kernel can write another `dtype` at no cost; other tiers do not cast.
    """
    rows = x.size // x.shape[-1]
    if kernels.runs("projection", rows) and x.dtype in FLOATS:
        weights = matrices(modules)
        if weights is not None:
            if residual is not None:
                residual = residual.reshape(rows, -1)
            outputs = project_kernel(x.reshape(rows, -1), weights, dtype, norm, residual)
            return [y.reshape(*x.shape[:-1], -1) for y in outputs]
    x = x if norm is None else norm(x)
    # Tied embeddings are the head too.
    layers: list[Any] = [getattr(module, "as_linear", module) for module in modules]
    outputs = [layer(x) for layer in layers]
    return outputs if residual is None else [residual + y for y in outputs]


def project_kernel(
    x: mx.array,
    weights: Sequence[Matrix],
    dtype: mx.Dtype | None = None,
    norm: nn.RMSNorm | None = None,
    residual: mx.array | None = None,
) -> list[mx.array]:
    """x `[N, H]`, N up to 8 -> `[N, out]` of each matrix, residual `[N, out]` added."""
    num_rows = x.shape[0]
    # Dense matrices go first: they take a simdgroup four times as long, and would end last.
    order = sorted(range(len(weights)), key=lambda i: weights[i].bits > 0)
    weights = [weights[i] for i in order]
    lanes = lanes_per_row(x.shape[1])
    out_dims = [w.out_dims for w in weights]
    rows = 2 if sum(out_dims) < FEW_ROWS else rows_per_simdgroup(num_rows)
    per_group = SIMDGROUPS * rows * (32 // lanes)
    named = {f"m{i}": w for i, w in enumerate(weights)}
    num_groups = sum(-(-out // per_group) for out in out_dims)
    inputs, outputs, generated = _signature(len(weights))
    activations = [x, *([] if norm is None else [norm.weight])]
    activations += [] if residual is None else [residual]
    made = kernel(
        "projection", inputs, outputs, label=f"projection_{len(weights)}", generated=generated
    )(
        # Without a norm or a residual, another array takes its place.
        inputs=[
            *((x, x, 0.0) if norm is None else (x, norm.weight, norm.eps)),
            x if residual is None else residual,
            *(a for w in weights for a in w.arrays),
        ],
        template=[
            *template(named, num_rows, lanes),
            ("ROWS", rows),
            ("NORM", norm is not None),
            ("RESIDUAL", residual is not None),
        ],
        grid=(num_groups * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=[(num_rows, out) for out in out_dims],
        output_dtypes=[dtype or mx.result_type(*activations, w.arrays[2]) for w in weights],
    )
    return [made[order.index(i)] for i in range(len(order))]


@functools.cache
def _signature(count: int) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Inputs and outputs for `count` matrices, and the code that picks a threadgroup's matrix."""
    prefixes = [f"m{i}" for i in range(count)]
    generated = "".join(
        f"""
{{
  const int out = {m}_w_shape[0];
  if (block * rows_per_group < out) {{
    project<{m}_BITS, {m}_GROUP, ROWS, TOKENS, LANES, NORM, RESIDUAL, CONVERT>(
        {m}_w, {m}_scales, {m}_biases, x, norm_weight, eps, residual, y{i}, in, out, num_tokens,
        block * rows_per_group + offset, lane);
    return;
  }}
  block -= (out + rows_per_group - 1) / rows_per_group;
}}
"""
        for i, m in enumerate(prefixes)
    )
    inputs = ("x", "norm_weight", "eps", "residual", *names(*prefixes))
    return inputs, tuple(f"y{i}" for i in range(count)), generated
