"""Prefill and decode: the only loop from token ids to token ids."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import wired_limit

from ..model.language import Model
from .sampler import Sampler

PREFILL_STEP_SIZE = 2048
Progress = Callable[[int, int], None]


@contextmanager
def wired(model: Model) -> Iterator[None]:
    """Keep the weights in the GPU's memory meanwhile."""
    with ExitStack() as stack:
        # Its warning about large models would land in the answer.
        with redirect_stdout(sys.stderr):
            stack.enter_context(wired_limit(model))
        yield


def prefill(
    model: Model,
    ids: mx.array,
    cache: list[Any],
    step_size: int = PREFILL_STEP_SIZE,
    progress: Progress | None = None,
) -> mx.array:
    """Read ids `[T]` into the cache in pieces; returns the last hidden state `[1, 1, H]`."""
    total = ids.size
    for start in range(0, total, step_size):
        if progress:
            progress(start, total)
        hidden = model.trunk(ids[None, start : start + step_size], cache, last_only=True)
        if start + step_size < total:
            mx.eval([entry.state for entry in cache])
            mx.clear_cache()
    mx.eval(hidden, [entry.state for entry in cache])
    if progress:
        progress(total, total)
    return hidden


def decode_steps(
    model: Model,
    ids: mx.array,
    cache: list[Any],
    sampler: Sampler,
    max_tokens: int,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    progress: Progress | None = None,
) -> Iterator[tuple[int, mx.array]]:
    """Yield up to `max_tokens` tokens with their log probabilities `[V]` (lazy).

    The graph of step N + 1 is built and started before token N is read, so the device never
    waits for Python; the last token asked for is not fed back.
    """

    def step(hidden: mx.array) -> tuple[mx.array, mx.array]:
        logits = model.head(hidden)[:, -1]
        return sampler(logits), logits

    token, logits = step(prefill(model, ids, cache, prefill_step_size, progress))
    mx.async_eval(token)
    for count in range(1, max_tokens + 1):
        following = None
        if count < max_tokens:
            following = step(model.trunk(token[:, None], cache))
            mx.async_eval(following[0])
        row = logits[0].astype(mx.float32)
        yield int(cast(int, token.item())), row - mx.logsumexp(row)
        if following is None:
            return
        token, logits = following
