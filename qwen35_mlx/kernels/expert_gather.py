"""The routed experts on plain MLX ops: gather the chosen experts' matrices and multiply.

N tokens, K experts per token, E experts, H hidden, I expert width.
"""

import mlx.core as mx
import mlx.nn as nn

from .grouped_expert_matmul import eligible, grouped_expert_mlp
from .metal import NONE, Choice

# From this many (token, expert) pairs on, rows of one expert are brought together.
SORT_FROM = 64


def expert_mlp(
    x: mx.array,
    indices: mx.array,
    scores: mx.array,
    gate_proj: nn.Module,
    up_proj: nn.Module,
    down_proj: nn.Module,
    kernels: Choice = NONE,
) -> mx.array:
    """Weighted sum of SwiGLU experts.

    x: `[N, H]`; indices and scores: `[N, K]`; the projections hold `[E, I, H]`, `[E, I, H]`,
    `[E, H, I]`, quantized or not, and are called as `proj(rows, indices, sorted_indices)`.
    Returns `[N, H]` in x's type.
    """
    num_tokens, per_token = indices.shape
    flat = indices.flatten()
    is_sorted = flat.size >= SORT_FROM
    if is_sorted and "grouped_expert_matmul" in kernels:
        found = eligible(x, [gate_proj, up_proj, down_proj])
        if found is not None:
            return grouped_expert_mlp(x, indices, scores, *found)
    if is_sorted:
        order = mx.argsort(flat)
        flat, rows = flat[order], x[order // per_token]
    else:
        rows = mx.repeat(x, per_token, axis=0) if per_token > 1 else x
    rows = rows[:, None, :]
    gate = gate_proj(rows, flat, sorted_indices=is_sorted)
    up = up_proj(rows, flat, sorted_indices=is_sorted)
    out = down_proj(nn.silu(gate) * up, flat, sorted_indices=is_sorted)[:, 0, :]
    if is_sorted:
        out = out[mx.argsort(order)]
    out = out.reshape(num_tokens, per_token, -1)
    return (out * scores[..., None].astype(out.dtype)).sum(axis=1)
