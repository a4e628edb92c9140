"""Simple references: every hot operation in fp32, one token or one expert at a time.

B batch, T tokens, Hk/Hv key/value heads, Dk/Dv head dims, E experts, K experts per token.
"""

import mlx.core as mx

from .delta_step import DeltaParameters


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


def naive_project(x: mx.array, weights: list[mx.array]) -> list[mx.array]:
    """x `[N, H]` times each `[out, H]`, all dense; fp32."""
    return [x.astype(mx.float32) @ w.astype(mx.float32).T for w in weights]


def naive_rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """RMS norm over the last axis, in fp32; the weight is not zero-centred."""
    x = x.astype(mx.float32)
    return x / mx.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight.astype(mx.float32)


def naive_delta_step(
    qkv: mx.array,
    z: mx.array,
    b: mx.array,
    a: mx.array,
    conv_state: mx.array,
    recurrent_state: mx.array,
    parameters: DeltaParameters,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """A linear attention layer between its projections, as in `delta_step`; fp32."""
    conv_weight, A_log, dt_bias, norm_weight = (p.astype(mx.float32) for p in parameters[:4])
    qkv, z, b, a, conv_state = (x.astype(mx.float32) for x in (qkv, z, b, a, conv_state))
    batch, num_tokens, channels = qkv.shape
    num_value_heads, value_dim, key_dim = recurrent_state.shape[1:]
    num_key_heads = (channels - num_value_heads * value_dim) // (2 * key_dim)
    taps = conv_weight.shape[1]
    real = mx.ones((batch, num_tokens)) if mask is None else mask.astype(mx.float32)
    window = mx.concatenate([conv_state, qkv * real[..., None]], axis=1)
    mixed = mx.zeros_like(qkv)
    for j in range(taps):
        mixed = mixed + window[:, j : j + num_tokens] * conv_weight[:, j, 0]
    mixed = mixed * mx.sigmoid(mixed)
    q, k, v = mx.split(mixed, [num_key_heads * key_dim, 2 * num_key_heads * key_dim], axis=-1)
    q = q.reshape(batch, num_tokens, num_key_heads, key_dim)
    k = k.reshape(batch, num_tokens, num_key_heads, key_dim)
    v = v.reshape(batch, num_tokens, num_value_heads, value_dim)
    q = q / mx.sqrt((q * q).sum(axis=-1, keepdims=True) + 1e-6) * key_dim**-0.5
    k = k / mx.sqrt((k * k).sum(axis=-1, keepdims=True) + 1e-6)
    g = -mx.exp(A_log) * mx.logaddexp(a + dt_bias, mx.array(0.0)) * real[..., None]
    beta = mx.sigmoid(b) * real[..., None]
    out, recurrent_state = naive_gated_delta_rule(q, k, v, g, beta, recurrent_state)
    out = naive_rms_norm(out, norm_weight, parameters.eps).reshape(z.shape) * z * mx.sigmoid(z)
    return out, window[:, num_tokens:], recurrent_state


def naive_route(
    logits: mx.array, shared_logits: mx.array, num_experts_per_tok: int
) -> tuple[mx.array, mx.array, mx.array]:
    """The K most probable experts of each token, lowest index first if equal; weights in fp32."""
    probabilities = mx.softmax(logits.astype(mx.float32), axis=-1)
    indices = mx.argsort(-logits.astype(mx.float32), axis=-1)[:, :num_experts_per_tok]
    scores = mx.take_along_axis(probabilities, indices, axis=-1)
    shared = mx.sigmoid(shared_logits.astype(mx.float32))
    return indices, scores / scores.sum(axis=-1, keepdims=True), shared


def naive_gate_up(x: mx.array, gate_proj: mx.array, up_proj: mx.array) -> mx.array:
    """silu(gate) * up of one expert; x `[N, H]`, projections `[I, H]`, all dense; fp32."""
    gate, up = naive_project(x, [gate_proj, up_proj])
    return gate * mx.sigmoid(gate) * up


def naive_qk_norm_rope(
    x: mx.array, weight: mx.array, positions: mx.array, frequencies: mx.array, eps: float
) -> mx.array:
    """One head of q or k, `[T, D]`, at positions `[T]`; frequencies `[R / 2]` in radians; fp32."""
    x = naive_rms_norm(x, weight, eps)
    half = frequencies.size
    angles = positions[:, None].astype(mx.float32) * frequencies
    a, b, kept = mx.split(x, [half, 2 * half], axis=-1)
    cos, sin = mx.cos(angles), mx.sin(angles)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin, kept], axis=-1)


def naive_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention, one query of one head at a time; the last query sees all keys; fp32.

    q: `[B, Hq, T, D]`, k and v: `[B, Hk, S, D]`. Query head h reads key head h // (Hq / Hk).
    """
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    num_heads, num_tokens = q.shape[1:3]
    num_keys, group = k.shape[2], num_heads // k.shape[1]
    heads = []
    for h in range(num_heads):
        rows = []
        for t in range(num_tokens):
            end = num_keys - num_tokens + t + 1
            keys, values = (x[:, h // group, :end] for x in (k, v))
            scores = (keys @ q[:, h, t, :, None])[..., 0] * scale
            rows.append((mx.softmax(scores, axis=-1)[:, None] @ values)[:, 0])
        heads.append(mx.stack(rows, axis=1))
    return mx.stack(heads, axis=1)


def naive_output_gate(x: mx.array, gate: mx.array) -> mx.array:
    """x times the sigmoid of the gate, element by element, in fp32."""
    return x.astype(mx.float32) * mx.sigmoid(gate.astype(mx.float32))
