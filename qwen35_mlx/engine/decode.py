"""The only loop that decodes: from the hidden state of a prompt to token ids."""

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, cast

import mlx.core as mx
import numpy as np

from ..sampling import SamplingParams
from .prompt_cache import PromptCache
from .requests import Top
from .sampler import Sampler
from .speculate import Drafter


class Step(NamedTuple):
    """A drawn token, and the logits `[1, V]` it was drawn from."""

    token: int
    logits: mx.array
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
    if max_tokens:
        yield from Decoding(cache, hidden, sampler).steps(max_tokens, drafter)


def greedy(
    cache: PromptCache, ids: Sequence[int], max_tokens: int, drafter: Drafter | None = None
) -> Generator[Step, None, None]:
    """Read `ids`, and yield the likeliest tokens that follow; see `decode`."""
    cache.feeds_mtp = drafter is not None and drafter.uses_mtp
    hidden = cache.read(ids)
    assert hidden is not None
    sampler = Sampler(SamplingParams(), mx.array(list(ids)))
    yield from decode(cache, hidden, sampler, max_tokens, drafter)


class Decoding:
    """A text that is being decoded: its next token is drawn and not read yet."""

    def __init__(
        self,
        cache: PromptCache,
        hidden: mx.array,
        sampler: Sampler,
        forbidden: mx.array | None = None,
        forbidden_behind: Callable[[mx.array], mx.array | None] | None = None,
    ):
        """Draw the token behind `hidden` `[1, 1, H]`, none that a mask `[V]` forbids.

        Later, `forbidden_behind` gives a mask `[T, V]` for tokens `[T]`, the last ones drafts.
        """
        self.cache = cache
        self.sampler = sampler
        self._forbidden_behind = forbidden_behind
        # The token `[1]` and the logits `[1, V]` it was drawn from.
        self.token, self.logits = self._draw(hidden, len(cache.ids), forbidden)

    def _draw(
        self,
        hidden: mx.array,
        place: int,
        forbidden: mx.array | None,
        drafts: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        logits = self.cache.model.head(hidden)[0]
        tokens = self.sampler(logits, place, drafts, forbidden)
        mx.async_eval(tokens)
        return tokens, logits

    def _read(self, tokens: mx.array, drafts: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """Read tokens `[T]`, the last ones `drafts`, and draw what follows each."""
        place, hidden = len(self.cache.ids) + 1, self.cache.step(tokens)
        forbidden = None
        if self._forbidden_behind:
            # It runs while the host finds out what may follow.
            mx.async_eval(hidden)
            forbidden = self._forbidden_behind(tokens)
        return self._draw(hidden, place, forbidden, drafts)

    def steps(self, max_tokens: int, drafter: Drafter | None = None) -> Generator[Step, None, None]:
        """See `decode`; once closed, another call goes on where this one ended."""
        cache, sampler = self.cache, self.sampler
        if drafter:
            drafter.begin()
        try:
            left = max_tokens
            while left:
                if left > 1:
                    # Not before it is certain that a token follows: a discarded one is not
                    # penalised.
                    sampler.accept(self.token)
                drafts = drafter.propose(cache, self.token, sampler, left - 2) if drafter else None
                if drafts is None:
                    read, row = self.token, self.logits
                    if left > 1:
                        self.token, self.logits = self._read(read)
                    token_id = int(cast(int, read.item()))
                    if drafter:
                        drafter.record()
                    if left > 1:
                        cache.commit(token_id)
                    left -= 1
                    yield Step(token_id, row)
                    continue
                # One pass over the token and its drafts; row r says what follows r drafts.
                read = mx.concatenate([self.token, drafts])
                rows, row_logits = self._read(read, drafts)
                read_ids, drawn_ids = (cast(list[int], ids.tolist()) for ids in (read, rows))
                right = [a == b for a, b in zip(read_ids[1:], drawn_ids, strict=False)]
                num_right = [*right, False].index(False)
                assert drafter
                drafter.record(len(right), num_right)
                params = sampler.params
                for i in range(num_right + 1):
                    if i:
                        sampler.accept(read[i : i + 1])
                    cache.commit(read_ids[i])
                    left -= 1
                    row = self.logits
                    self.token, self.logits = rows[i : i + 1], row_logits[i : i + 1]
                    yield Step(read_ids[i], row, from_draft=i > 0)
                    if sampler.params is not params or not cache.has_pass:
                        # Whoever reads the answer changed them, or looked at the cache, which
                        # ended the pass: what comes later is read again.
                        break
        except RuntimeError as error:
            # Of MLX, in the middle of a pass that other processes may take part in.
            if ring := getattr(cache.model, "ring", None):
                ring.fail(error)
            raise
        finally:
            cache.settle()


def embedding(hidden: mx.array) -> mx.array:
    """The hidden state `[1, 1, H]` of a prompt's last token -> `[H]` of length 1, in float32."""
    row = hidden[0, 0].astype(mx.float32)
    return row / mx.linalg.norm(row)


def log_probabilities(logits: mx.array) -> mx.array:
    """`[1, V]` -> `[V]`, in float32."""
    row = logits[0].astype(mx.float32)
    return row - mx.logsumexp(row)


def likeliest(row: np.ndarray, num_top: int) -> Top:
    """The likeliest tokens by log probabilities `[V]`; of equal ones the lowest id first."""
    if num_top == 0:
        return ()
    candidates = np.argpartition(-row, min(num_top, len(row) - 1))[:num_top]
    order = sorted(candidates.tolist(), key=lambda i: (-row[i], i))
    return [(i, float(row[i])) for i in order]
