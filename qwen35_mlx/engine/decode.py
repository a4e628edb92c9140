"""The only decode loop: from the hidden state of a prompt to token ids."""

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
    """A sampled token, and the logits `[1, V]` that it was sampled from."""

    token: int
    logits: mx.array
    from_draft: bool = False


def decode(
    cache: PromptCache,
    hidden: mx.array,
    sampler: Sampler,
    max_tokens: int,
    drafter: Drafter | None = None,
    forbidden: mx.array | None = None,
    forbidden_behind: Callable[[mx.array], mx.array | None] | None = None,
) -> Generator[Step, None, None]:
    """Yield up to `max_tokens` tokens after `hidden` `[1, 1, H]`, that of the last cached token.

    `forbidden` and `forbidden_behind` are masks of tokens, as in `Decoding`.
    At every yield `cache` holds the token, except the last of `max_tokens`. Without drafts the
    graph of step N + 1 is built and started before the host reads token N, so the device never
    waits for Python. With drafts one pass reads several tokens; the tokens are the same.
    """
    if max_tokens:
        decoding = Decoding(cache, hidden, sampler, forbidden, forbidden_behind)
        yield from decoding.steps(max_tokens, drafter)


def greedy(
    cache: PromptCache, ids: Sequence[int], max_tokens: int, drafter: Drafter | None = None
) -> Generator[Step, None, None]:
    """Prefill `ids` and yield greedy tokens; see `decode`."""
    cache.feeds_mtp = drafter is not None and drafter.uses_mtp
    hidden = cache.read(ids)
    assert hidden is not None
    sampler = Sampler(SamplingParams(), mx.array(list(ids)))
    yield from decode(cache, hidden, sampler, max_tokens, drafter)


class Decoding:
    """A sequence that is being decoded: its next token is sampled, but not in the cache yet."""

    def __init__(
        self,
        cache: PromptCache,
        hidden: mx.array,
        sampler: Sampler,
        forbidden: mx.array | None = None,
        forbidden_behind: Callable[[mx.array], mx.array | None] | None = None,
    ):
        """Sample the token after `hidden` `[1, 1, H]`, without those in the mask `forbidden` `[V]`.

        For later tokens `[T]`, all but the first drafts, `forbidden_behind` gives a mask `[T, V]`.
        """
        self.cache = cache
        self.sampler = sampler
        self._forbidden_behind = forbidden_behind
        # The token `[1]` and the logits `[1, V]` that it was sampled from.
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
        """Run a pass over tokens `[T]`, the last ones `drafts`; sample the successor of each."""
        place, hidden = len(self.cache.ids) + 1, self.cache.step(tokens)
        forbidden = None
        if self._forbidden_behind:
            # Start it: the device computes while the host makes the mask.
            mx.async_eval(hidden)
            forbidden = self._forbidden_behind(tokens)
        return self._draw(hidden, place, forbidden, drafts)

    def steps(self, max_tokens: int, drafter: Drafter | None = None) -> Generator[Step, None, None]:
        """See `decode`; after it is closed, another call continues."""
        cache, sampler = self.cache, self.sampler
        if drafter:
            drafter.begin()
        try:
            left = max_tokens
            while left:
                if left > 1:
                    # Only if another token follows: the last one is not counted.
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
                # One pass over the token and its drafts; row r is the successor of r drafts.
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
                        # The caller changed the parameters, or accessed the cache, which ends the
                        # pass: the other accepted drafts are dropped and read again.
                        break
        except RuntimeError as error:
            # MLX failed in a pass in which other processes may take part.
            if ring := getattr(cache.model, "ring", None):
                ring.fail(error)
            raise
        finally:
            cache.settle()


def embedding(hidden: mx.array) -> mx.array:
    """The hidden state `[1, 1, H]` of a prompt's last token -> `[H]` with length 1, in float32."""
    row = hidden[0, 0].astype(mx.float32)
    return row / mx.linalg.norm(row)


def log_probabilities(logits: mx.array) -> mx.array:
    """`[1, V]` -> `[V]`, in float32."""
    row = logits[0].astype(mx.float32)
    return row - mx.logsumexp(row)


def likeliest(row: np.ndarray, num_top: int) -> Top:
    """The likeliest tokens by log probabilities `[V]`; ties are sorted by id."""
    if num_top == 0:
        return ()
    candidates = np.argpartition(-row, min(num_top, len(row) - 1))[:num_top]
    order = sorted(candidates.tolist(), key=lambda i: (-row[i], i))
    return [(i, float(row[i])) for i in order]
