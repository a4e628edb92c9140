"""The only loop that decodes: from the hidden state of a prompt to token ids."""

import time
from collections.abc import Generator
from typing import NamedTuple, cast

import mlx.core as mx

from .prompt_cache import PromptCache
from .sampler import Sampler
from .speculate import Drafter


class Step(NamedTuple):
    """A drawn token, and the log probabilities `[V]` it was drawn from before sampling (lazy)."""

    token: int
    logprobs: mx.array
    from_draft: bool = False


def decode(
    cache: PromptCache,
    hidden: mx.array,
    sampler: Sampler,
    max_tokens: int,
    drafter: Drafter | None = None,
) -> Generator[Step, None, None]:
    """Yield up to `max_tokens` tokens that follow `hidden` `[1, 1, H]`, the last one read.

    At every yield `cache` has read the token, except the last of `max_tokens`. Without drafts the
    graph of step N + 1 is built and started before token N is read, so the device never waits for
    Python. With drafts several tokens are read in one pass; the tokens are the same.
    """

    def draw(hidden: mx.array, place: int, drafts: mx.array | None = None) -> Drawn:
        logits = cache.model.head(hidden)[0]
        tokens = sampler(logits, place, drafts)
        mx.async_eval(tokens)
        return tokens, logits

    try:
        # Drawn and not read; the host need not know it yet.
        token, logits = draw(hidden, len(cache.ids))
        left = max_tokens
        while left:
            started = time.perf_counter()
            if left > 1:
                # Not before it is certain that a token follows: a discarded one is not penalised.
                sampler.accept(token)
            drafts = drafter.propose(cache, token, sampler, left - 2) if drafter else None
            if drafts is None:
                read, row = token, logits
                if left > 1:
                    token, logits = draw(cache.step(token), len(cache.ids) + 1)
                token_id = int(cast(int, read.item()))
                if drafter:
                    drafter.record(time.perf_counter() - started)
                if left > 1:
                    cache.commit(token_id)
                left -= 1
                yield Step(token_id, log_probabilities(row))
                continue
            # One pass over the token and its drafts; row r says what follows the first r drafts.
            read = mx.concatenate([token, drafts])
            rows, row_logits = draw(cache.step(read), len(cache.ids) + 1, drafts)
            read_ids, drawn_ids = (cast(list[int], ids.tolist()) for ids in (read, rows))
            right = [a == b for a, b in zip(read_ids[1:], drawn_ids, strict=False)]
            num_right = [*right, False].index(False)
            assert drafter
            drafter.record(time.perf_counter() - started, len(right), num_right)
            params = sampler.params
            for i in range(num_right + 1):
                if i:
                    sampler.accept(read[i : i + 1])
                cache.commit(read_ids[i])
                left -= 1
                yield Step(read_ids[i], log_probabilities(logits), from_draft=i > 0)
                token, logits = rows[i : i + 1], row_logits[i : i + 1]
                if sampler.params is not params:
                    # Whoever reads the answer changed them: what comes later is drawn again.
                    break
    finally:
        cache.settle()


Drawn = tuple[mx.array, mx.array]


def log_probabilities(logits: mx.array) -> mx.array:
    """`[1, V]` -> `[V]`, in float32."""
    row = logits[0].astype(mx.float32)
    return row - mx.logsumexp(row)
