"""The gated delta rule with MLX operations, by step for decode, by chunk for prefill; or kernels.

B batch, T tokens, Hk/Hv key/value heads, Dk/Dv head dims, C chunk_size, N chunks.
The state is always `[B, Hv, Dv, Dk]` in fp32.
"""

import mlx.core as mx

from . import chunk_delta_rule as chunk_kernel
from .matrix import MAX_ROWS
from .tiers import PORTABLE, Tiers

CHUNK_SIZE = 64


def gated_delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    kernels: Tiers = PORTABLE,
) -> tuple[mx.array, mx.array]:
    """Output `[B, T, Hv, Dv]` and new state; shapes as in `naive_gated_delta_rule`, fp32 inside."""
    batch, num_tokens, _, key_head_dim = q.shape
    num_value_heads, value_head_dim = v.shape[2:]
    if state is None:
        state = mx.zeros((batch, num_value_heads, value_head_dim, key_head_dim))
    if runs_chunk_kernel(q, k, v, kernels):
        return chunk_kernel.chunk_delta_rule(q, k, v, g, beta, state)
    q, k, v, g, beta = (x.astype(mx.float32) for x in (q, k, v, g, beta))
    if num_tokens <= MAX_ROWS:
        out, states = recurrent_gated_delta_rule(q, k, v, g, beta, state)
        return out, states[-1]
    return chunk_gated_delta_rule(q, k, v, g, beta, state)


def runs_chunk_kernel(q: mx.array, k: mx.array, v: mx.array, kernels: Tiers) -> bool:
    """Whether this call runs the chunked kernels; a single token does not."""
    num_tokens = q.shape[1]
    return (
        num_tokens > 1
        and kernels.runs("chunk_delta_rule", num_tokens)
        and chunk_kernel.is_eligible(q, k, v)
    )


def is_fused(num_key_heads: int, num_value_heads: int, key_dim: int, value_dim: int) -> bool:
    """Whether MLX runs `gated_delta_update` as a kernel for such heads, and not as a graph."""
    # True for all heads of the family; other heads for which MLX has a kernel do not occur here.
    return (
        num_key_heads == 16 and num_value_heads in (16, 32, 48, 64) and key_dim == value_dim == 128
    )


def recurrent_gated_delta_rule(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, list[mx.array]]:
    """Output, and the state after each token; fp32.

    A token's result does not depend on how many tokens come with it.
    """
    batch, num_tokens, num_key_heads, key_head_dim = q.shape
    num_value_heads, value_head_dim = v.shape[2:]
    # Group the value heads of a key head, so that q and k are not copied for each.
    grouped = (batch, num_key_heads, num_value_heads // num_key_heads)
    s = state.reshape(*grouped, value_head_dim, key_head_dim)
    shapes = (
        *((batch, num_key_heads, 1, 1, key_head_dim),) * 2,
        *((*grouped, value_head_dim, 1), (*grouped, 1, 1), (*grouped, 1, 1)),
    )
    inputs = (q, k, v, mx.exp(g), beta)
    outputs, states = [], []
    for t in range(num_tokens):
        # One token needs no slices, which on the CPU cost as much as the computation.
        parts = inputs if num_tokens == 1 else [x[:, t] for x in inputs]
        q_t, k_t, v_t, decay, rate = (
            x.reshape(shape) for x, shape in zip(parts, shapes, strict=True)
        )
        s = s * decay
        error = rate * (v_t - (s * k_t).sum(axis=-1, keepdims=True))
        s = s + error * k_t
        outputs.append((s * q_t).sum(axis=-1).reshape(batch, 1, num_value_heads, value_head_dim))
        states.append(s.reshape(state.shape))
    return mx.concatenate(outputs, axis=1), states


def chunk_gated_delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[mx.array, mx.array]:
    """The rule for any number of tokens in T / chunk_size steps (arXiv 2412.06464, section 3.3).

    Within a chunk the updates of all tokens solve one unit lower triangular system. Memory is
    O(T * chunk_size) per head.
    """
    num_tokens, num_key_heads, key_head_dim = q.shape[1:]
    num_value_heads, value_head_dim = v.shape[2:]
    # A short prompt gets a short chunk, still a power of two for the triangular inverse.
    chunk_size = min(chunk_size, 1 << (num_tokens - 1).bit_length())
    pad = -num_tokens % chunk_size

    def chunks(x: mx.array, heads_per_key: int) -> mx.array:
        """`[B, T, H, ...]` -> `[N, B, Hk, H / Hk, C, ...]`; padding with zeros changes nothing."""
        x = mx.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], -1, chunk_size, num_key_heads, heads_per_key, *x.shape[3:])
        return x.transpose(1, 0, 3, 4, 2, *range(5, x.ndim))

    group = num_value_heads // num_key_heads
    q, k = chunks(q, 1), chunks(k, 1)
    v, g, beta = chunks(v, group), chunks(g, group), chunks(beta, group)[..., None]

    cumulative = mx.cumsum(g, axis=-1)
    causal = mx.tri(chunk_size, chunk_size, 0, dtype=mx.bool_)
    # Masked before exp, because the differences above the diagonal are positive and could overflow.
    log_decay = mx.where(causal, cumulative[..., :, None] - cumulative[..., None, :], -mx.inf)
    decay = mx.exp(log_decay)
    # Transposed in memory, because the CPU's matmul is three times slower on a transposed view.
    k_transposed = mx.contiguous(k.swapaxes(-1, -2))
    strictly_causal = mx.tri(chunk_size, chunk_size, -1, dtype=mx.bool_)
    system = mx.where(strictly_causal, beta * decay * (k @ k_transposed), 0)
    inverse = _unit_lower_inverse(system)
    from_start = mx.exp(cumulative)[..., None]
    values = inverse @ (beta * v)
    keys = inverse @ (beta * from_start * k)
    scores = decay * (q @ k_transposed)
    q_decayed = from_start * q
    k_to_end = mx.exp(cumulative[..., -1:] - cumulative)[..., None, :] * k_transposed
    total_decay = from_start[..., -1:, :]

    batch = state.shape[0]
    s = state.reshape(batch, num_key_heads, group, value_head_dim, key_head_dim)
    # [..., Dk, Dv] during the scan.
    s = mx.contiguous(s.swapaxes(-1, -2))
    outputs = []
    for n in range(q.shape[0]):
        update = values[n] - keys[n] @ s
        outputs.append(q_decayed[n] @ s + scores[n] @ update)
        s = total_decay[n] * s + k_to_end[n] @ update
    # [N, B, Hk, G, C, Dv] -> [B, T, Hv, Dv]
    out = mx.stack(outputs).transpose(1, 0, 4, 2, 3, 5)
    out = out.reshape(batch, -1, num_value_heads, value_head_dim)[:, :num_tokens]
    return out, s.swapaxes(-1, -2).reshape(state.shape)


def _unit_lower_inverse(lower: mx.array) -> mx.array:
    """Inverse of I + lower for strictly lower triangular `[..., C, C]`, C a power of two.

    Inverts diagonal blocks whose size doubles at each level. This is as stable as substitution,
    while a product of powers loses all digits if keys repeat; and the GPU has all operations.
    """
    *batch, size, _ = lower.shape
    # [..., P, R, R]: the P inverted diagonal blocks of R rows.
    inverses = mx.ones((*batch, size, 1, 1))
    while (rows := inverses.shape[-1]) < size:
        pairs = size // (2 * rows)
        pair_blocks = lower.reshape(*batch, pairs, 2 * rows, pairs, 2 * rows)
        diagonal = mx.diagonal(pair_blocks, axis1=-4, axis2=-2).moveaxis(-1, -3)
        corner = diagonal[..., rows:, :rows]
        upper, under = inverses[..., 0::2, :, :], inverses[..., 1::2, :, :]
        # [[A, 0], [C, B]] has the inverse [[A', 0], [-B' C A', B']].
        below = -(under @ corner @ upper)
        top = mx.concatenate([upper, mx.zeros_like(below)], axis=-1)
        inverses = mx.concatenate([top, mx.concatenate([below, under], axis=-1)], axis=-2)
    return inverses[..., 0, :, :]
