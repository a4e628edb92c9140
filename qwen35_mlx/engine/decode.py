"""The only loop that decodes: from the hidden state of a prompt to token ids."""

from collections.abc import Generator
from typing import NamedTuple, cast

import mlx.core as mx

from .prompt_cache import PromptCache
from .sampler import Sampler


class Step(NamedTuple):
    """A drawn token, and the log probabilities `[V]` it was drawn from before sampling (lazy)."""

    token: int
    logprobs: mx.array


def decode(
    cache: PromptCache, hidden: mx.array, sampler: Sampler, max_tokens: int
) -> Generator[Step, None, None]:
    """Yield up to `max_tokens` tokens that follow `hidden` `[1, 1, H]`, the last one read.

    At every yield `cache` has read the token, except the last of `max_tokens`. The graph of step
    N + 1 is built and started before token N is read, so the device never waits for Python.
    """

    def draw(hidden: mx.array) -> tuple[mx.array, mx.array]:
        logits = cache.model.head(hidden)[:, -1]
        token = sampler(logits)
        mx.async_eval(token)
        return token, logits

    try:
        token, logits = draw(hidden)
        for count in range(1, max_tokens + 1):
            drawn, row = token, logits[0].astype(mx.float32)
            if count < max_tokens:
                # Not before it is certain that a token follows: a discarded one is not penalised.
                sampler.accept(drawn)
                token, logits = draw(cache.step(drawn))
            token_id = int(cast(int, drawn.item()))
            if count < max_tokens:
                cache.commit(token_id)
            yield Step(token_id, row - mx.logsumexp(row))
    finally:
        cache.settle()
