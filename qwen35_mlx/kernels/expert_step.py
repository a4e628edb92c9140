"""Routed experts and the shared one for few tokens, in two steps: gate and up, then down.

N tokens, K experts per token, E experts, H hidden, I/Is width of a routed/the shared expert.
A dense feed-forward layer is a shared expert of weight one without routed experts.
"""

from collections.abc import Sequence
from functools import partial
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
from .router import Routing
from .switch import swiglu
from .tiers import PORTABLE, Tiers


def expert_gate_up(
    x: mx.array,
    shared: nn.Module,
    routing: Routing | None = None,
    routed: nn.Module | None = None,
    norm: nn.RMSNorm | None = None,
    kernels: Tiers = PORTABLE,
) -> list[mx.array]:
    """silu(gate) * up of the shared expert, `[N, Is]`, and of the chosen ones, `[N, K, I]`.

    x `[N, H]` is first normalised by `norm`. shared and routed have gate_proj, up_proj and
    down_proj, in routed as stacks. Without routing only the first result is returned.
    """
    if kernels.runs("expert_gate_up", x.shape[0]) and x.dtype in FLOATS:
        mlps = [shared] if routed is None else [shared, routed]
        weights = matrices([proj for mlp in mlps for proj in (mlp.gate_proj, mlp.up_proj)])
        if weights is not None:
            return expert_gate_up_kernel(x, weights[:2], routing, weights[2:], norm)
    x = x if norm is None else norm(x)
    gated = swiglu if kernels.on_mlx else lambda gate, up: nn.silu(gate) * up
    outputs = [gated(shared.gate_proj(x), shared.up_proj(x))]
    if routing is not None and routed is not None:
        rows = x[:, None, None, :]
        gate, up = routed.gate_proj(rows, routing.indices), routed.up_proj(rows, routing.indices)
        outputs.append(gated(gate, up)[:, :, 0])
    return outputs


def expert_down(
    hidden: Sequence[mx.array],
    residual: mx.array,
    shared: nn.Module,
    routing: Routing | None = None,
    routed: nn.Module | None = None,
    kernels: Tiers = PORTABLE,
) -> mx.array:
    """residual `[N, H]` + down_proj of the results of `expert_gate_up`, weighted by the routing."""
    if kernels.runs("expert_down", residual.shape[0]) and residual.dtype in FLOATS:
        mlps = [shared] if routed is None else [shared, routed]
        weights = matrices([mlp.down_proj for mlp in mlps])
        if weights is not None:
            return expert_down_kernel(hidden, residual, weights[0], routing, weights[1:])
    out = shared.down_proj(hidden[0])
    if routing is not None and routed is not None:
        chosen = routed.down_proj(hidden[1][:, :, None, :], routing.indices)[:, :, 0]
        summed = weighted_sum(chosen, routing.scores)
        return add_experts(residual, summed, out, routing.shared_scores, kernels)
    return residual + out


def weighted_sum(outputs: mx.array, scores: mx.array) -> mx.array:
    """Sum of outputs `[N, K, H]` of chosen experts, weighted by scores `[N, K]` -> `[N, H]`."""
    return (outputs * scores[..., None].astype(outputs.dtype)).sum(axis=1)


def add_experts(
    residual: mx.array, routed: mx.array, shared: mx.array, scores: mx.array, kernels: Tiers
) -> mx.array:
    """residual + routed + shared * scores, `[N, H]` each and scores `[N, 1]`."""
    if kernels.on_mlx:
        return _add_experts(residual, routed, shared, scores)
    return residual + (routed + shared * scores.astype(shared.dtype))


@partial(mx.compile, shapeless=True)
def _add_experts(
    residual: mx.array, routed: mx.array, shared: mx.array, scores: mx.array
) -> mx.array:
    return residual + (routed + shared * scores.astype(shared.dtype))


def expert_gate_up_kernel(
    x: mx.array,
    shared: Sequence[Matrix],
    routing: Routing | None = None,
    routed: Sequence[Matrix] = (),
    norm: nn.RMSNorm | None = None,
) -> list[mx.array]:
    """The same for N up to 8, in one dispatch."""
    num_tokens = x.shape[0]
    # Without a norm, another array takes its place.
    inputs: list[Any] = [x, x, 0.0] if norm is None else [x, norm.weight, norm.eps]
    num_pairs = 0
    prefixes: tuple[str, ...] = ("shared_gate", "shared_up")
    shapes: list[tuple[int, ...]] = [(num_tokens, shared[0].out_dims)]
    if routing is not None:
        inputs.append(routing.indices)
        prefixes += ("gate", "up")
        shapes.append((*routing.indices.shape, routed[0].out_dims))
        num_pairs = routing.indices.size
    weights = dict(zip(prefixes, [*shared, *routed], strict=True))
    # Half the rows, because each counts once for gate and once for up.
    rows, routed_rows = rows_per_simdgroup(num_tokens) // 2, 2
    lanes = lanes_per_row(x.shape[1])
    blocks = max(
        -(-shape[-1] // (SIMDGROUPS * n * (32 // lanes)))
        for shape, n in zip(shapes, (rows, routed_rows), strict=False)
    )
    return kernel(
        "expert_gate_up",
        ("x", "norm_weight", "eps", "indices")[: len(inputs)] + names(*prefixes),
        ("shared_out", "routed_out")[: len(shapes)],
        label="expert_gate_up" if routing else "expert_gate_up_dense",
        generated=ROUTED_GATE_UP if routing else "",
    )(
        inputs=[*inputs, *(a for w in weights.values() for a in w.arrays)],
        template=[
            *template(weights, num_tokens, lanes),
            ("K", num_pairs // num_tokens),
            ("ROWS", rows),
            ("ROUTED_ROWS", routed_rows),
            ("NORM", norm is not None),
        ],
        grid=(blocks * SIMDGROUPS * 32, 1 + num_pairs, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=shapes,
        output_dtypes=[x.dtype if norm is None else mx.result_type(x, norm.weight)] * len(shapes),
    )


ROUTED_GATE_UP = """
const int out = gate_w_shape[1];
swiglu<gate_BITS, gate_GROUP, up_BITS, up_GROUP, ROUTED_ROWS, 1, LANES, NORM, CONVERT>(
    gate_w, gate_scales, gate_biases, up_w, up_scales, up_biases, x + (pair - 1) / K * in,
    norm_weight, eps, routed_out + (pair - 1) * out, in, out, 1, int(indices[pair - 1]), block,
    lane);
"""


def expert_down_kernel(
    hidden: Sequence[mx.array],
    residual: mx.array,
    shared: Matrix,
    routing: Routing | None = None,
    routed: Sequence[Matrix] = (),
) -> mx.array:
    """The same for N up to 8, in one dispatch."""
    num_tokens, width = residual.shape
    # Without routing K is 0, and other arrays take the places of those that are not read.
    weights = {"shared": shared, "down": routed[0] if routed else shared}
    # Another tier's scores may have another type.
    chosen = routing and [routing.indices, *(s.astype(mx.float32) for s in routing[1:])]
    chosen = chosen or [residual, residual, residual]
    rows, lanes = rows_per_simdgroup(num_tokens), lanes_per_row(max(h.shape[-1] for h in hidden))
    per_token = routing.indices.shape[1] if routing else 0
    blocks = -(-width // (SIMDGROUPS * rows * (32 // lanes)))
    (y,) = kernel(
        "expert_down",
        ("residual", "shared_in", "routed_in", *Routing._fields, *names(*weights)),
        ("y",),
    )(
        inputs=[
            *(residual, hidden[0], hidden[-1], *chosen),
            *(a for w in weights.values() for a in w.arrays),
        ],
        template=[
            ("T", residual.dtype),
            *template(weights, num_tokens, lanes),
            ("K", per_token),
            ("ROWS", rows),
        ],
        grid=(blocks * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=[residual.shape],
        output_dtypes=[residual.dtype],
    )
    return y
