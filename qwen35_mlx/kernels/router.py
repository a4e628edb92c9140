"""Which experts a token goes to, and with what weights.

N tokens, E experts, K experts per token.
"""

import mlx.core as mx

from .metal import NONE, Choice, kernel

# One simdgroup holds the logits of a token in registers, and an expert a lane is its answer.
MAX_EXPERTS, MAX_EXPERTS_PER_TOK = 1024, 32


def route(
    logits: mx.array, shared_logits: mx.array, num_experts_per_tok: int, kernels: Choice = NONE
) -> tuple[mx.array, mx.array, mx.array]:
    """Chosen experts and their weights, `[N, K]` each, and the shared expert's weight `[N, 1]`.

    From logits `[N, E]` and `[N, 1]`: softmax over all experts in fp32, the K largest,
    renormalised to sum to one; sigmoid. Weights are fp32; the order of the K is free.
    """
    if (
        "router" in kernels
        and logits.shape[-1] <= MAX_EXPERTS
        and num_experts_per_tok <= MAX_EXPERTS_PER_TOK
    ):
        return route_kernel(logits, shared_logits, num_experts_per_tok)
    return route_ops(logits, shared_logits, num_experts_per_tok)


def route_ops(
    logits: mx.array, shared_logits: mx.array, num_experts_per_tok: int
) -> tuple[mx.array, mx.array, mx.array]:
    """The same on any device."""
    probabilities = mx.softmax(logits.astype(mx.float32), axis=-1)
    k = num_experts_per_tok
    indices = mx.argpartition(probabilities, kth=-k, axis=-1)[..., -k:]
    scores = mx.take_along_axis(probabilities, indices, axis=-1)
    scores = scores / scores.sum(axis=-1, keepdims=True)
    return indices, scores, mx.sigmoid(shared_logits.astype(mx.float32))


def route_kernel(
    logits: mx.array, shared_logits: mx.array, num_experts_per_tok: int
) -> tuple[mx.array, mx.array, mx.array]:
    """The same in one dispatch, the largest weight first."""
    num_tokens, num_experts = logits.shape
    indices, scores, shared_scores = kernel(
        "router", ("logits", "shared_logits"), ("indices", "scores", "shared_scores")
    )(
        inputs=[logits, shared_logits],
        template=[("EXPERTS", num_experts), ("K", num_experts_per_tok)],
        grid=(32, num_tokens, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(num_tokens, num_experts_per_tok)] * 2 + [(num_tokens, 1)],
        output_dtypes=[mx.uint32, mx.float32, mx.float32],
    )
    return indices, scores, shared_scores
