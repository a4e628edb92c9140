"""The delta rule in chunks of 64 tokens as two Metal kernels, for prefill.

B batch, T tokens, Hk/Hv key/value heads, Dk/Dv head dims, N chunks.
"""

import mlx.core as mx

from .matrix import FLOATS
from .metal import kernel

CHUNK_SIZE = 64
# 8x8 blocks in the lower triangle of a chunk, diagonal included.
TRIANGLE = 36


def is_eligible(q: mx.array, k: mx.array, v: mx.array) -> bool:
    """Whether the kernel runs these heads; the state of larger ones does not fit in registers."""
    key_head_dim, value_head_dim = q.shape[3], v.shape[3]
    return (
        key_head_dim % 8 == value_head_dim % 8 == 0
        and key_head_dim <= 128
        and {q.dtype, k.dtype, v.dtype} <= set(FLOATS)
    )


def chunk_delta_rule(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Output `[B, T, Hv, Dv]` and new state in fp32; shapes as in `naive_gated_delta_rule`.

    The first kernel prepares all chunks in parallel. The second processes them in order, with the
    state in registers. The first passes 18.9 KB per chunk and value head to the second.
    """
    batch, num_tokens, num_key_heads, key_head_dim = q.shape
    num_value_heads, value_head_dim = v.shape[2:]
    num_chunks = -(-num_tokens // CHUNK_SIZE)
    heads = [("HK", num_key_heads), ("HV", num_value_heads), ("DK", key_head_dim)]
    per_chunk = (batch, num_value_heads, num_chunks)
    prepare = kernel(
        "chunk_delta_prepare", ("q", "k", "g", "beta"), ("cumulative", "inverse", "scores")
    )
    cumulative, inverse, scores = prepare(
        inputs=[q, k, g, beta],
        template=heads,
        grid=(128 * num_chunks, num_value_heads, batch),
        threadgroup=(128, 1, 1),
        output_shapes=[
            (*per_chunk, CHUNK_SIZE, 2),
            (*per_chunk, TRIANGLE, 64),
            (*per_chunk, TRIANGLE, 64),
        ],
        output_dtypes=[mx.float32] * 3,
    )
    # Each simdgroup has eight columns; up to four simdgroups share what they read.
    columns = value_head_dim // 8
    simdgroups = next(n for n in (4, 3, 2, 1) if columns % n == 0)
    scan = kernel(
        "chunk_delta_scan",
        ("q", "k", "v", "beta", "cumulative", "inverse", "scores", "state"),
        ("out", "new_state"),
    )
    out, new_state = scan(
        inputs=[q, k, v, beta, cumulative, inverse, scores, state.astype(mx.float32)],
        template=[*heads, ("DV", value_head_dim), ("SIMDGROUPS", simdgroups)],
        grid=(32 * columns, num_value_heads, batch),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[(batch, num_tokens, num_value_heads, value_head_dim), state.shape],
        output_dtypes=[mx.float32] * 2,
    )
    return out, new_state
