"""The router: chooses the experts of each token and their weights.

N tokens, E experts, K experts per token.
"""

from typing import NamedTuple

import mlx.core as mx

from .metal import kernel
from .tiers import PORTABLE, Tiers

# A simdgroup keeps the logits of a token in registers and returns one expert per lane.
MAX_EXPERTS, MAX_EXPERTS_PER_TOK = 1024, 32


class Routing(NamedTuple):
    """The experts of each token: indices and scores `[N, K]`, shared_scores `[N, 1]`.

    Scores are computed in fp32; on the mlx tier they are then cast to the logits' type.
    """

    indices: mx.array
    scores: mx.array
    shared_scores: mx.array


def route(
    logits: mx.array, shared_logits: mx.array, num_experts_per_tok: int, kernels: Tiers = PORTABLE
) -> Routing:
    """The routing from logits `[N, E]` and, for the shared expert, `[N, 1]`.

    Scores are the K largest of a softmax over all experts in fp32, in any order, renormalised to
    sum to one. The shared expert's score is a sigmoid.
    """
    if (
        kernels.runs("router", logits.shape[0])
        and logits.shape[-1] <= MAX_EXPERTS
        and num_experts_per_tok <= MAX_EXPERTS_PER_TOK
    ):
        return route_kernel(logits, shared_logits, num_experts_per_tok)
    k = num_experts_per_tok
    if kernels.on_mlx:
        indices = _largest(logits, k)
        # A softmax of the chosen ones is the same as one over all, renormalised.
        chosen = mx.take_along_axis(logits, indices, axis=-1)
        return Routing(
            indices, mx.softmax(chosen, axis=-1, precise=True), mx.sigmoid(shared_logits)
        )
    probabilities = mx.softmax(logits.astype(mx.float32), axis=-1)
    indices = _largest(probabilities, k)
    scores = mx.take_along_axis(probabilities, indices, axis=-1)
    scores = scores / scores.sum(axis=-1, keepdims=True)
    return Routing(indices, scores, mx.sigmoid(shared_logits.astype(mx.float32)))


def _largest(values: mx.array, k: int) -> mx.array:
    # MLX has no gradient of indices; only the scores have one.
    return mx.stop_gradient(mx.argpartition(values, kth=-k, axis=-1)[..., -k:])


def route_kernel(logits: mx.array, shared_logits: mx.array, num_experts_per_tok: int) -> Routing:
    """`route` in one dispatch, with the largest weight first."""
    num_tokens, num_experts = logits.shape
    return Routing(
        *kernel("router", ("logits", "shared_logits"), Routing._fields)(
            inputs=[logits, shared_logits],
            template=[("EXPERTS", num_experts), ("K", num_experts_per_tok)],
            grid=(32, num_tokens, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(num_tokens, num_experts_per_tok)] * 2 + [(num_tokens, 1)],
            output_dtypes=[mx.uint32, mx.float32, mx.float32],
        )
    )
