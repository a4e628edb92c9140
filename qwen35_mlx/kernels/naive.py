"""The truth: every hot operation in fp32, one token or one expert at a time, to be read.

B batch, T tokens, Hk/Hv key/value heads, Dk/Dv head dims, E experts, K experts per token.
"""

import mlx.core as mx


def naive_gated_delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Gated delta rule (arXiv 2412.06464, eq. 10), token by token.

    q, k: `[B, T, Hk, Dk]`, normalised, q scaled. v: `[B, T, Hv, Dv]`. g (log decay) and beta:
    `[B, T, Hv]`. state: `[B, Hv, Dv, Dk]` or None. Value head h reads key head h // (Hv / Hk).
    Returns the output `[B, T, Hv, Dv]` and the new state, both fp32.
    """
    batch, num_tokens, num_key_heads, key_head_dim = q.shape
    num_value_heads, value_head_dim = v.shape[2:]
    q, k, v, g, beta = (x.astype(mx.float32) for x in (q, k, v, g, beta))
    if state is None:
        state = mx.zeros((batch, num_value_heads, value_head_dim, key_head_dim))
    outputs = []
    for t in range(num_tokens):
        heads = []
        for h in range(num_value_heads):
            key_head = h // (num_value_heads // num_key_heads)
            q_t, k_t, v_t = q[:, t, key_head], k[:, t, key_head], v[:, t, h]
            s = state[:, h] * mx.exp(g[:, t, h])[:, None, None]
            error = v_t - (s @ k_t[..., None])[..., 0]
            s = s + (beta[:, t, h, None] * error)[..., None] * k_t[:, None, :]
            heads.append((s, (s @ q_t[..., None])[..., 0]))
        state = mx.stack([s for s, _ in heads], axis=1)
        outputs.append(mx.stack([o for _, o in heads], axis=1))
    return mx.stack(outputs, axis=1), state


def naive_expert_mlp(
    x: mx.array,
    indices: mx.array,
    scores: mx.array,
    gate_proj: mx.array,
    up_proj: mx.array,
    down_proj: mx.array,
) -> mx.array:
    """Weighted sum of SwiGLU experts, one token and one expert at a time.

    x: `[N, H]`, indices and scores: `[N, K]`, gate_proj and up_proj: `[E, I, H]`, down_proj:
    `[E, H, I]`, all dense. Returns `[N, H]` in fp32.
    """
    x, gate_proj, up_proj, down_proj = (
        t.astype(mx.float32) for t in (x, gate_proj, up_proj, down_proj)
    )
    rows = []
    for n, token in enumerate(x):
        total = mx.zeros_like(token)
        for slot in range(indices.shape[1]):
            expert = indices[n, slot]
            gate = gate_proj[expert] @ token
            hidden = gate * mx.sigmoid(gate) * (up_proj[expert] @ token)
            total = total + scores[n, slot] * (down_proj[expert] @ hidden)
        rows.append(total)
    return mx.stack(rows)
