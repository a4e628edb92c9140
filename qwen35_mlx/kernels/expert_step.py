"""Routed experts and the shared one for few tokens, in two steps: gate and up, then down.

N tokens, K experts per token, E experts, H hidden, I/Is width of a routed/the shared expert.
A dense feed-forward layer is a shared expert alone, of weight one.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .matrix import FLOATS, MAX_ROWS, Matrix, lanes_per_row, matrices, names
from .metal import NONE, KernelSet, Template, kernel
from .router import Routing

SIMDGROUPS = 2


def expert_gate_up(
    x: mx.array,
    shared: nn.Module,
    routing: Routing | None = None,
    routed: nn.Module | None = None,
    kernels: KernelSet = NONE,
) -> list[mx.array]:
    """silu(gate) * up of the shared expert, `[N, Is]`, and of the chosen ones, `[N, K, I]`.

    x `[N, H]`; shared and routed hold gate_proj, up_proj and down_proj, routed as stacks; without
    routing the first alone.
    """
    if "expert_gate_up" in kernels and x.shape[0] <= MAX_ROWS and x.dtype in FLOATS:
        mlps = [shared] if routed is None else [shared, routed]
        weights = matrices([proj for mlp in mlps for proj in (mlp.gate_proj, mlp.up_proj)])
        if weights is not None:
            return expert_gate_up_kernel(x, weights[:2], routing, weights[2:])
    outputs = [nn.silu(shared.gate_proj(x)) * shared.up_proj(x)]
    if routing is not None and routed is not None:
        rows = x[:, None, None, :]
        gate, up = routed.gate_proj(rows, routing.indices), routed.up_proj(rows, routing.indices)
        outputs.append((nn.silu(gate) * up)[:, :, 0])
    return outputs


def expert_down(
    hidden: Sequence[mx.array],
    residual: mx.array,
    shared: nn.Module,
    routing: Routing | None = None,
    routed: nn.Module | None = None,
    kernels: KernelSet = NONE,
) -> mx.array:
    """residual `[N, H]` + down_proj of what `expert_gate_up` gives, weighted by the routing."""
    if "expert_down" in kernels and residual.shape[0] <= MAX_ROWS and residual.dtype in FLOATS:
        mlps = [shared] if routed is None else [shared, routed]
        weights = matrices([mlp.down_proj for mlp in mlps])
        if weights is not None:
            return expert_down_kernel(hidden, residual, weights[0], routing, weights[1:])
    out = shared.down_proj(hidden[0])
    if routing is not None and routed is not None:
        out = out * routing.shared_scores.astype(out.dtype)
        chosen = routed.down_proj(hidden[1][:, :, None, :], routing.indices)[:, :, 0]
        out = out + (chosen * routing.scores[..., None].astype(out.dtype)).sum(axis=1)
    return residual + out


def expert_gate_up_kernel(
    x: mx.array,
    shared: Sequence[Matrix],
    routing: Routing | None = None,
    routed: Sequence[Matrix] = (),
) -> list[mx.array]:
    """The same for N up to 8, in one dispatch."""
    num_tokens = x.shape[0]
    inputs, num_pairs = [x], 0
    prefixes: tuple[str, ...] = ("shared_gate", "shared_up")
    shapes: list[tuple[int, ...]] = [(num_tokens, shared[0].out_dims)]
    if routing is not None:
        inputs.append(routing.indices)
        prefixes += ("gate", "up")
        shapes.append((*routing.indices.shape, routed[0].out_dims))
        num_pairs = routing.indices.size
    weights = dict(zip(prefixes, [*shared, *routed], strict=True))
    template, per_group = _tiling(weights, num_tokens, x.shape[1], num_pairs // num_tokens)
    blocks = -(-max(shape[-1] for shape in shapes) // per_group)
    return kernel(
        "expert_gate_up",
        ("x", "indices")[: len(inputs)] + names(*prefixes),
        ("shared_out", "routed_out")[: len(shapes)],
        label="expert_gate_up" if routing else "expert_gate_up_dense",
        generated=ROUTED_GATE_UP if routing else "",
    )(
        inputs=[*inputs, *(a for w in weights.values() for a in w.arrays)],
        template=template,
        grid=(blocks * SIMDGROUPS * 32, 1 + num_pairs, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=shapes,
        output_dtypes=[x.dtype] * len(shapes),
    )


ROUTED_GATE_UP = """
const int out = gate_w_shape[1];
swiglu<gate_BITS, gate_GROUP, up_BITS, up_GROUP, ROWS, 1, LANES>(
    gate_w, gate_scales, gate_biases, up_w, up_scales, up_biases, x + (pair - 1) / K * in,
    routed_out + (pair - 1) * out, in, out, size_t(indices[pair - 1]), first, lane);
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
    # Without routing K is 0, and what is not read is filled by anything.
    weights = {"shared": shared, "down": routed[0] if routed else shared}
    chosen = routing or (residual, residual, residual)
    template, per_group = _tiling(
        weights,
        num_tokens,
        max(h.shape[-1] for h in hidden),
        routing.indices.shape[1] if routing else 0,
    )
    (y,) = kernel(
        "expert_down",
        ("residual", "shared_in", "routed_in", *Routing._fields, *names(*weights)),
        ("y",),
    )(
        inputs=[
            *(residual, hidden[0], hidden[-1], *chosen),
            *(a for w in weights.values() for a in w.arrays),
        ],
        template=[("T", residual.dtype), *template],
        grid=(-(-width // per_group) * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=[residual.shape],
        output_dtypes=[residual.dtype],
    )
    return y


def _tiling(
    weights: dict[str, Matrix], num_tokens: int, in_dims: int, per_token: int
) -> tuple[Template, int]:
    """Template arguments, and how many rows a threadgroup makes."""
    # Twice as many accumulators with more tokens would spill.
    rows, lanes = 2 if num_tokens <= 2 else 1, lanes_per_row(in_dims)
    template = [t for prefix, w in weights.items() for t in w.template(prefix)]
    template += [("ROWS", rows), ("TOKENS", num_tokens), ("LANES", lanes)]
    template += [("SIMDGROUPS", SIMDGROUPS), ("K", per_token)]
    return template, SIMDGROUPS * rows * (32 // lanes)
