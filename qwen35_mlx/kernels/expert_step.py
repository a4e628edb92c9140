"""Routed experts and the shared one for few tokens, in two steps: gate and up, then down.

N tokens, K experts per token, E experts, H hidden, I/Is width of a routed/the shared expert.
A dense feed-forward layer is a shared expert alone, of weight one.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .matrix import FLOATS, MAX_ROWS, Matrix, arguments, label, lanes_per_row, matrices, names
from .metal import NONE, Choice, Template, kernel

SIMDGROUPS = 2


class Routing(NamedTuple):
    """Where each token goes: indices and scores `[N, K]`, shared_scores `[N, 1]` fp32."""

    indices: mx.array
    scores: mx.array
    shared_scores: mx.array


def expert_gate_up(
    x: mx.array,
    shared: Sequence[nn.Module],
    routing: Routing | None = None,
    routed: Sequence[nn.Module] = (),
    kernels: Choice = NONE,
) -> list[mx.array]:
    """silu(gate) * up of the shared expert, `[N, Is]`, and of the chosen ones, `[N, K, I]`.

    x `[N, H]`; shared and routed are (gate_proj, up_proj); without routing the first alone.
    """
    if "expert_gate_up" in kernels and x.shape[0] <= MAX_ROWS and x.dtype in FLOATS:
        weights = matrices([*shared, *routed])
        if weights is not None:
            return expert_gate_up_kernel(x, weights[:2], routing, weights[2:])
    outputs = [nn.silu(shared[0](x)) * shared[1](x)]
    if routing is not None:
        gate, up = (proj(x[:, None, None, :], routing.indices)[:, :, 0] for proj in routed)
        outputs.append(nn.silu(gate) * up)
    return outputs


def expert_down(
    hidden: Sequence[mx.array],
    residual: mx.array,
    shared: nn.Module,
    routing: Routing | None = None,
    routed: nn.Module | None = None,
    kernels: Choice = NONE,
) -> mx.array:
    """residual `[N, H]` + down_proj of what `expert_gate_up` gives, weighted by the routing."""
    if "expert_down" in kernels and residual.shape[0] <= MAX_ROWS and residual.dtype in FLOATS:
        weights = matrices([shared] if routed is None else [shared, routed])
        if weights is not None:
            return expert_down_kernel(hidden, residual, weights[0], routing, weights[1:])
    out = shared(hidden[0])
    if routing is not None and routed is not None:
        out = out * routing.shared_scores.astype(out.dtype)
        chosen = routed(hidden[1][:, :, None, :], routing.indices)[:, :, 0]
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
    rows, lanes = _rows_per_simdgroup(num_tokens), lanes_per_row(x.shape[1])
    weights = [*shared, *routed]
    kinds = tuple(w.is_quantized for w in weights)
    inputs, template = [x], _template(GATE_UP, weights, rows, num_tokens, lanes)
    shapes: list[tuple[int, ...]] = [(num_tokens, shared[0].out_dims)]
    num_pairs = 0
    if routing is not None:
        inputs.append(routing.indices)
        shapes.append((*routing.indices.shape, routed[0].out_dims))
        template.append(("K", routing.indices.shape[1]))
        num_pairs = routing.indices.size
    per_group = SIMDGROUPS * rows * (32 // lanes)
    blocks = -(-max(shape[-1] for shape in shapes) // per_group)
    return kernel(
        "expert_gate_up",
        _names(("x", "indices")[: len(inputs)], GATE_UP, kinds),
        ("shared_out", "routed_out")[: len(shapes)],
        label=label("expert_gate_up", kinds),
        generated=_gate_up_body(kinds),
    )(
        inputs=[*inputs, *(a for w in weights for a in w.arrays)],
        template=template,
        # The shared expert, which takes longest, comes first.
        grid=(blocks * SIMDGROUPS * 32, 1 + num_pairs, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=shapes,
        output_dtypes=[x.dtype] * len(shapes),
    )


def expert_down_kernel(
    hidden: Sequence[mx.array],
    residual: mx.array,
    shared: Matrix,
    routing: Routing | None = None,
    routed: Sequence[Matrix] = (),
) -> mx.array:
    """The same for N up to 8, in one dispatch."""
    num_tokens, width = residual.shape
    rows = _rows_per_simdgroup(num_tokens)
    lanes = lanes_per_row(*(h.shape[-1] for h in hidden))
    weights = [shared, *routed]
    kinds = tuple(w.is_quantized for w in weights)
    inputs, template = [residual, *hidden], _template(DOWN, weights, rows, num_tokens, lanes)
    template.append(("T", residual.dtype))
    if routing is not None:
        inputs += routing
        template.append(("K", routing.indices.shape[1]))
    per_group = SIMDGROUPS * rows * (32 // lanes)
    (y,) = kernel(
        "expert_down",
        _names(DOWN_INPUTS[: len(inputs)], DOWN, kinds),
        ("y",),
        label=label("expert_down", kinds),
        generated=_down_body(kinds),
    )(
        inputs=[*inputs, *(a for w in weights for a in w.arrays)],
        template=template,
        grid=(-(-width // per_group) * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=[residual.shape],
        output_dtypes=[residual.dtype],
    )
    return y


# Matrices in the order of the kernels' inputs; those of routed experts may be absent.
GATE_UP = ("shared_gate", "shared_up", "gate", "up")
DOWN = ("shared", "down")
DOWN_INPUTS = ("residual", "shared_in", "routed_in", *Routing._fields)


def _rows_per_simdgroup(num_tokens: int) -> int:
    # Twice as many accumulators with more tokens would spill.
    return 2 if num_tokens <= 2 else 1


def _template(
    prefixes: Sequence[str], weights: Sequence[Matrix], rows: int, num_tokens: int, lanes: int
) -> Template:
    formats = [t for p, w in zip(prefixes, weights, strict=False) for t in w.template(p)]
    tiling = [("ROWS", rows), ("TOKENS", num_tokens), ("LANES", lanes), ("SIMDGROUPS", SIMDGROUPS)]
    return formats + tiling


@functools.cache
def _names(
    first: tuple[str, ...], prefixes: tuple[str, ...], kinds: tuple[bool, ...]
) -> tuple[str, ...]:
    """Of the inputs; kinds tell which matrices are quantized."""
    weights = [n for p, kind in zip(prefixes, kinds, strict=False) for n in names(p, kind)]
    return (*first, *weights)


@functools.cache
def _gate_up_body(kinds: tuple[bool, ...]) -> str:
    """One call of `swiglu`, or two."""

    def call(gate: str, up: str, tokens: str, rest: str) -> str:
        quantized = dict(zip(GATE_UP, kinds, strict=False))
        formats = f"{gate}_BITS, {gate}_GROUP, {up}_BITS, {up}_GROUP"
        return f"""    swiglu<{formats}, ROWS, {tokens}, LANES>(
        {arguments(gate, quantized[gate])},
        {arguments(up, quantized[up])},
        {rest}, first, lane);
"""

    shared = call(
        "shared_gate", "shared_up", "TOKENS", "x, shared_out, in, shared_gate_w_shape[0], 0"
    )
    if len(kinds) == 2:
        return shared
    routed = call(
        "gate",
        "up",
        "1",
        "x + (pair - 1) / K * in, routed_out + (pair - 1) * out, in, out,"
        " size_t(indices[pair - 1])",
    )
    return f"""  if (pair == 0) {{
{shared}  }} else {{
    const int out = gate_w_shape[1];
{routed}  }}
"""


@functools.cache
def _down_body(kinds: tuple[bool, ...]) -> str:
    """The shared expert for all tokens, each token's own experts, and the sum."""
    has_routing = len(kinds) == 2
    shared = f"""
  float factor[TOKENS];
  for (int t = 0; t < TOKENS; t++) factor[t] = {"shared_scores[t]" if has_routing else "1.0f"};
  dot_rows<shared_BITS, shared_GROUP, ROWS, TOKENS, LANES, false>(
      {arguments("shared", kinds[0])}, shared_in, shared_in, shared_in_shape[1],
      size_t(row), last, lane, factor, acc, acc);
"""
    routed = ""
    if has_routing:
        routed = f"""
  const int in = routed_in_shape[2];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {{
    float part[ROWS] = {{}};
    for (int pair = t * K; pair < (t + 1) * K; pair++) {{
      const float score[1] = {{scores[pair]}};
      dot_rows<down_BITS, down_GROUP, ROWS, 1, LANES, false>(
          {arguments("down", kinds[1])}, routed_in + pair * in, routed_in, in,
          size_t(indices[pair]) * width + row, last, lane, score, part, part);
    }}
    for (int r = 0; r < ROWS; r++) acc[r * TOKENS + t] += part[r];
  }}
"""
    return f"""{shared}{routed}
#pragma unroll
  for (int i = 0; i < ROWS * TOKENS; i++) {{
    const float sum = lane_sum<LANES>(acc[i]);
    const int r = row + (i / TOKENS) * step, at = (i % TOKENS) * width + r;
    if (lane % LANES == 0 && r < width) y[at] = T(float(residual[at]) + sum);
  }}
"""
