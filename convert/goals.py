"""Losses of a distillation: how far the output of a part of a layer is from the source's output."""

# B texts, T tokens, H hidden size.

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwen35_mlx.quant.divergence import log_probabilities

from .activations import Activations

# Weight of the penalty for wrong experts in the loss of a router.
FLIP_PENALTY = 0.1
TINY = 1e-30


def half_loss(
    half: Callable[[Any, mx.array], mx.array],
    x: Activations,
    wanted: Activations,
    batches: Sequence[slice],
) -> Callable[[Any, int], mx.array]:
    """The loss of half a layer, with input `x` and wanted output `[B, T, H]`, for a batch."""
    return lambda root, i: relative_error(half(root, x[batches[i]]), wanted[batches[i]])


def relative_error(out: mx.array, wanted: mx.array) -> mx.array:
    """The squared error relative to the energy of the wanted output, of the same shape.

    Summed over tokens before the division: all errors of the hidden states count equally.
    """
    return mx.square(out - wanted).sum() / mx.maximum(mx.square(wanted).sum(), TINY)


def router_loss(logits: mx.array, wanted: mx.array, per_token: int) -> mx.array:
    """KL of the probabilities, plus the margin of the best wrong expert over the worst right one.

    logits and wanted `[..., E]`; the right experts are the `per_token` with the largest wanted.
    """
    order = mx.stop_gradient(mx.argsort(wanted, axis=-1))
    right = mx.take_along_axis(logits, order[..., -per_token:], axis=-1).min(axis=-1)
    wrong = mx.take_along_axis(logits, order[..., :-per_token], axis=-1).max(axis=-1)
    return divergence(wanted, logits) + FLIP_PENALTY * nn.relu(wrong - right).mean()


def divergence(wanted: mx.array, logits: mx.array) -> mx.array:
    """The mean of KL(wanted || logits) in nats, both `[..., choices]`."""
    p, q = log_probabilities(wanted), log_probabilities(logits)
    return (mx.exp(p) * (p - q)).sum(axis=-1).mean()
