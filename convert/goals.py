"""Losses of a distillation: how far a part of a layer is from what the source's part gives."""

# B texts, T tokens, H hidden.

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .activations import Activations

# Weight of the router's wrong choices beside the divergence of its probabilities.
FLIP_PENALTY = 0.1
TINY = 1e-30


def goal(
    half: Callable[[Any, mx.array], mx.array],
    x: Activations,
    out: Activations,
    batches: Sequence[slice],
) -> Callable[[Any, int], mx.array]:
    """The loss of half a layer: from activations `x` `[B, T, H]` it shall give `out`."""
    return lambda root, i: relative_error(half(root, x[batches[i]]), out[batches[i]])


def relative_error(out: mx.array, wanted: mx.array) -> mx.array:
    """Squared error relative to the energy of what is wanted, of the same shape.

    Not by token: what a token adds to the stream of activations counts as it is.
    """
    return mx.square(out - wanted).sum() / mx.maximum(mx.square(wanted).sum(), TINY)


def router_loss(logits: mx.array, wanted: mx.array, per_token: int) -> mx.array:
    """Divergence of probabilities, and by how much a wrong expert beats a right one."""
    order = mx.stop_gradient(mx.argsort(wanted, axis=-1))
    right = mx.take_along_axis(logits, order[..., -per_token:], axis=-1).min(axis=-1)
    wrong = mx.take_along_axis(logits, order[..., :-per_token], axis=-1).max(axis=-1)
    return divergence(wanted, logits) + FLIP_PENALTY * nn.relu(wrong - right).mean()


def divergence(wanted: mx.array, logits: mx.array) -> mx.array:
    """Mean KL in nats from `wanted` to `logits`, `[..., choices]` both."""
    p = wanted.astype(mx.float32)
    p = p - mx.logsumexp(p, axis=-1, keepdims=True)
    q = logits.astype(mx.float32)
    q = q - mx.logsumexp(q, axis=-1, keepdims=True)
    return (mx.exp(p) * (p - q)).sum(axis=-1).mean()
