"""Routed experts and the shared one for few tokens, in two steps: gate and up, then down.

N tokens, K experts per token, E experts, H hidden, I/Is width of a routed/the shared expert.
A dense feed-forward layer is a shared expert alone, of weight one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .matrix import FLOATS, MAX_ROWS, Matrix, lanes_per_row, matrices
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


def _rows_per_simdgroup(num_tokens: int) -> int:
    # Twice as many accumulators with more tokens would spill.
    return 2 if num_tokens <= 2 else 1


def _inputs(*named: tuple[str, Matrix]) -> tuple[list[str], list[mx.array], Template]:
    """Names, arrays and template arguments of several matrices."""
    return (
        [n for prefix, w in named for n in w.names(prefix)],
        [a for _, w in named for a in w.arrays],
        [t for prefix, w in named for t in w.template(prefix)],
    )


def expert_gate_up_kernel(
    x: mx.array,
    shared: Sequence[Matrix],
    routing: Routing | None = None,
    routed: Sequence[Matrix] = (),
) -> list[mx.array]:
    """The same for N up to 8, in one dispatch."""
    num_tokens = x.shape[0]
    rows, lanes = _rows_per_simdgroup(num_tokens), lanes_per_row(x.shape[1])
    named = list(zip(("shared_gate", "shared_up", "gate", "up"), [*shared, *routed], strict=False))
    names, arrays, template = _inputs(*named)
    weights = dict(named)
    pairs = routing.indices.size if routing is not None else 0

    def call(gate: str, up: str, tokens: str, rest: str) -> str:
        parameters = f"{gate}_BITS, {gate}_GROUP, {up}_BITS, {up}_GROUP, ROWS, {tokens}, LANES"
        pointers = f"{weights[gate].arguments(gate)}, {weights[up].arguments(up)}"
        return f"swiglu<{parameters}>({pointers}, {rest}, first, lane);"

    # The shared expert, which takes longest, comes first.
    body = "  if (pair == 0) {\n    " + call(
        "shared_gate", "shared_up", "TOKENS", "x, shared_out, in, shared_gate_w_shape[0], 0"
    )
    outputs = ["shared_out"]
    shapes: list[tuple[int, ...]] = [(num_tokens, shared[0].out_dims)]
    if routing is not None:
        per_token = routing.indices.shape[1]
        names, arrays = ["indices", *names], [routing.indices, *arrays]
        template.append(("K", per_token))
        body += (
            "\n  } else {\n    const int out = gate_w_shape[1];\n    "
            + call(
                "gate", "up", "1",
                "x + (pair - 1) / K * in, out_rows + (pair - 1) * out, in, out,"
                " size_t(indices[pair - 1])",
            )
        )  # fmt: skip
        outputs.append("out_rows")
        shapes.append((num_tokens, per_token, routed[0].out_dims))
    per_group = SIMDGROUPS * rows * (32 // lanes)
    blocks = -(-max(shape[-1] for shape in shapes) // per_group)
    return kernel(
        "expert_gate_up",
        ("x", *names),
        tuple(outputs),
        label=_label("expert_gate_up", [w for _, w in named]),
        generated=body + "\n  }\n",
    )(
        inputs=[x, *arrays],
        template=[
            *template,
            *[("ROWS", rows), ("TOKENS", num_tokens), ("LANES", lanes), ("SIMDGROUPS", SIMDGROUPS)],
        ],
        grid=(blocks * SIMDGROUPS * 32, 1 + pairs, 1),
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
    named = [("shared", shared), *(("down", w) for w in routed)]
    names, arrays, template = _inputs(*named)
    body = f"""
  {{
    const int in = shared_in_shape[1];
    float factor[TOKENS];
    for (int t = 0; t < TOKENS; t++) factor[t] = {"shared_scores[t]" if routing else "1.0f"};
    dot_rows<shared_BITS, shared_GROUP, ROWS, TOKENS, LANES, false>(
        {shared.arguments("shared")}, shared_in, shared_in, in, size_t(row), last, lane, factor,
        acc, acc);
  }}
"""
    inputs = [hidden[0]]
    input_names = ["shared_in"]
    if routing is not None:
        inputs += [hidden[1], *routing]
        input_names += ["routed_in", "indices", "scores", "shared_scores"]
        template.append(("K", routing.indices.shape[1]))
        body += f"""
  const int in = routed_in_shape[2];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {{
    float part[ROWS] = {{}};
    for (int slot = 0; slot < K; slot++) {{
      const int pair = t * K + slot;
      const float factor[1] = {{scores[pair]}};
      dot_rows<down_BITS, down_GROUP, ROWS, 1, LANES, false>(
          {routed[0].arguments("down")}, routed_in + pair * in, routed_in, in,
          size_t(indices[pair]) * width + row, last, lane, factor, part, part);
    }}
    for (int r = 0; r < ROWS; r++) acc[r * TOKENS + t] += part[r];
  }}
"""
    body += """
#pragma unroll
  for (int i = 0; i < ROWS * TOKENS; i++) {
    const float sum = lane_sum<LANES>(acc[i]);
    const int r = row + (i / TOKENS) * step, at = (i % TOKENS) * width + r;
    if (lane % LANES == 0 && r < width) y[at] = T(float(residual[at]) + sum);
  }
"""
    per_group = SIMDGROUPS * rows * (32 // lanes)
    (y,) = kernel(
        "expert_down",
        ("residual", *input_names, *names),
        ("y",),
        label=_label("expert_down", [w for _, w in named]),
        generated=body,
    )(
        inputs=[residual, *inputs, *arrays],
        template=[
            ("T", residual.dtype),
            *template,
            *[("ROWS", rows), ("TOKENS", num_tokens), ("LANES", lanes), ("SIMDGROUPS", SIMDGROUPS)],
        ],
        grid=(-(-width // per_group) * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=[residual.shape],
        output_dtypes=[residual.dtype],
    )
    return y


def _label(name: str, weights: Sequence[Matrix]) -> str:
    return name + "_" + "".join("q" if w.bits else "d" for w in weights)
