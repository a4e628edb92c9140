"""Log-likelihoods of continuations, and perplexity; shared prefixes are prefilled once.

T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..engine.prompt_cache import PromptCache, common_prefix
from ..errors import Qwen35Error
from ..model.language import Model

# Positions whose logits are computed at a time.
SCORED_TOKENS = 64


class Pair(NamedTuple):
    """Token ids to score, and the ids before them; at least one each."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """Log probability of a continuation in nats, and whether greedy decoding gives it."""

    log_likelihood: float
    is_greedy: bool


class _Passage:
    """One sequence of tokens, for all pairs that need the same one."""

    def __init__(self, ids: Sequence[int], pairs: Sequence[Pair]):
        self.ids, self.pairs = ids, pairs
        # The first token whose successor is scored.
        self.first = min(len(pair.context) for pair in pairs) - 1
        self._place = self.first
        self._sums = [0.0] * len(pairs)
        self._greedy = [True] * len(pairs)

    def add(self, model: Model, hidden: mx.array) -> None:
        """Score the successors of the next T tokens; hidden `[1, T, H]`."""
        for start in range(0, hidden.shape[1], SCORED_TOKENS):
            part = hidden[:, start : start + SCORED_TOKENS]
            logits = model.head(part)[0].astype(mx.float32)
            normalizers, likeliest = mx.logsumexp(logits, axis=-1), mx.argmax(logits, axis=-1)
            mx.eval(logits, normalizers, likeliest)
            for i, (context, continuation) in enumerate(self.pairs):
                # The part of the continuation that follows these tokens.
                begin = self._place + 1 - len(context)
                skipped = max(-begin, 0)
                targets = mx.array(list(continuation[begin + skipped : begin + part.shape[1]]))
                if not targets.size:
                    continue
                rows = mx.arange(skipped, skipped + targets.size)
                found = np.array(logits[rows, targets] - normalizers[rows], dtype=np.float64)
                self._sums[i] += float(found.sum())
                self._greedy[i] &= bool(mx.all(likeliest[rows] == targets))
            self._place += part.shape[1]

    def scores(self) -> list[Score]:
        """One score per pair."""
        return [Score(*both) for both in zip(self._sums, self._greedy, strict=True)]


def score(
    model: Model,
    pairs: Sequence[Pair],
    scored: Callable[[int, Score], None] = lambda place, found: None,
) -> tuple[list[Score], int]:
    """A score for each pair, and the number of tokens that were prefilled.

    Pairs are sorted by their tokens, and each continues from its longest common prefix with the one
    before: n choices prefill their prompt once, and prompts share their common beginning.
    `scored(place, score)` is called for each score at once.
    """
    for pair in pairs:
        if not pair.context or not pair.continuation:
            raise Qwen35Error("nothing to score", got=pair, expected="a token or more of each")
    read = [[*pair.context, *pair.continuation[:-1]] for pair in pairs]
    groups = groupby(sorted(range(len(pairs)), key=read.__getitem__), key=read.__getitem__)
    places = [list(group) for _, group in groups]
    passages = [_Passage(read[some[0]], [pairs[i] for i in some]) for some in places]
    starts = _branches(passages)
    results: dict[int, Score] = {}
    cache, num_read = PromptCache(model), 0
    for number, (some, passage) in enumerate(zip(places, passages, strict=True)):
        kept = cache.rewind(starts[number])
        num_read += len(passage.ids) - kept
        # Snapshots where later passages branch off, up to the first one that branches off earlier.
        marks, bound = [], len(passage.ids) + 1
        for start in starts[number + 1 :]:
            if start < bound:
                marks.append(start)
                bound = start
            if bound <= kept:
                break
        if passage.first > kept:
            cache.read(passage.ids[kept : passage.first], marks=marks)
        cache.read(passage.ids[passage.first :], marks=marks, every=passage.add)
        for place, found in zip(some, passage.scores(), strict=True):
            results[place] = found
            scored(place, found)
    return [results[place] for place in range(len(pairs))], num_read


def _branches(passages: Sequence[_Passage]) -> list[int]:
    """Number of tokens that each passage shares with the one before, only unscored ones."""
    shared = [
        min(common_prefix(before.ids, passage.ids), passage.first)
        for before, passage in pairwise(passages)
    ]
    return [0, *shared]


def perplexity(
    model: Model,
    ids: Sequence[int],
    *,
    window: int = 2048,
    stride: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Perplexity of a text: every token except the first is scored once, in a window.

    Windows begin `stride` tokens after each other, so tokens after the first window have at least
    `window - stride` tokens before them. A stride equal to the window is the fastest.
    """
    stride = window if stride is None else stride
    if not 1 <= stride <= window or not 2 <= window <= model.config.context_length:
        raise Qwen35Error(
            "window and stride are not usable",
            got=f"window {window}, stride {stride}",
            expected=f"1 <= stride <= window <= {model.config.context_length}",
        )
    if len(ids) < 2:
        raise Qwen35Error("the text is too short", got=f"{len(ids)} tokens", expected="2 or more")
    pairs, end = list[Pair](), 1
    while end < len(ids):
        stop = min(len(ids), end + (window - 1 if end == 1 else stride))
        # With a stride equal to the window, one token of context remains.
        start = max(0, min(stop - window, end - 1))
        pairs.append(Pair(ids[start:end], ids[end:stop]))
        end = stop
    total = 0.0
    # One by one, because windows share no prefix.
    for done, pair in enumerate(pairs):
        progress(done, len(pairs))
        scores, _ = score(model, [pair])
        total += scores[0].log_likelihood
    num_scored = len(ids) - 1
    return {
        "num_tokens": num_scored,
        "window": window,
        "stride": stride,
        "nll_nats_per_token": -total / num_scored,
        "perplexity": math.exp(-total / num_scored),
    }
