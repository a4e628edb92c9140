"""Chi-square tests of the tokens that rounds of drafts give against the exact probabilities.

A round is as in `engine/decode.py`: a draft is drawn from other logits with the noise of its
position, and is accepted if the sampler draws the same token from the true logits. The token after
an accepted draft is drawn in the same pass; after a rejected one it is drawn in the next pass, with
the same noise. With penalties, each row of a pass counts the drafts before it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from qwen35_mlx.engine.sampler import Sampler
from qwen35_mlx.engine.speculate import MAX_DRAFTS
from qwen35_mlx.sampling import SamplingParams

VOCAB, NUM_DRAWS = 48, 20_000
# Tokens with fewer expected draws than this are counted together.
MIN_EXPECTED = 8
SETTINGS = (
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.5, min_p=0.05),
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.8),
    SamplingParams(temperature=1.3, top_k=10, top_p=0.95, min_p=0.02),
    SamplingParams(temperature=2.0, min_p=0.2),
    SamplingParams(temperature=1.0, presence_penalty=1.5),
    SamplingParams(temperature=0.8, repetition_penalty=1.3),
    SamplingParams(temperature=1.0, top_k=12, presence_penalty=1.0, repetition_penalty=1.1),
    SamplingParams(temperature=1.2, top_p=0.9, min_p=0.05, presence_penalty=0.5),
)


class Found(NamedTuple):
    """Result for one setting: draws, the chi-square statistic, its degrees of freedom and p."""

    num_draws: int
    statistic: float
    freedom: int
    p: float


def probabilities(
    logits: np.ndarray, params: SamplingParams, text: Sequence[int] = (), said: Sequence[int] = ()
) -> np.ndarray:
    """Probability of every token `[V]`, computed in float64 from the definitions."""
    x = logits.astype(np.float64).copy()
    for token in {*text, *said}:
        x[token] *= params.repetition_penalty ** (-1 if x[token] > 0 else 1)
    for token in set(said):
        x[token] -= params.presence_penalty
    x /= params.temperature
    order = np.argsort(-x, kind="stable")
    kept = np.zeros(len(x), dtype=bool)
    kept[order[: params.top_k or len(x)]] = True
    p = np.where(kept, np.exp(x - x.max()), 0.0)
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    kept[order[before >= params.top_p]] = False
    kept &= p >= params.min_p * p.max()
    p = np.where(kept, p, 0.0)
    return p / p.sum()


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """Statistic and degrees of freedom; rare tokens count as one.

    The statistic is infinite if a token was drawn whose probability is 0.
    """
    if counts[expected == 0].any():
        return math.inf, 1
    is_rare = expected < MIN_EXPECTED
    pairs = [*zip(counts[~is_rare], expected[~is_rare], strict=True)]
    if expected[is_rare].sum() > 0:
        pairs.append((counts[is_rare].sum(), expected[is_rare].sum()))
    return sum((c - e) ** 2 / e for c, e in pairs), len(pairs) - 1


def chance_of(statistic: float, freedom: int) -> float:
    """The p-value: the probability of at least this statistic."""
    import torch

    if not math.isfinite(statistic):
        return 0.0
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def pairs_of_rounds(params: SamplingParams, seed: int) -> Found:
    """Two tokens per round, if nothing depends on more than the token before."""
    rng = np.random.default_rng(seed)
    num_rounds = NUM_DRAWS // 2
    true, behind, drafted = (
        mx.array(rng.normal(0, 2, shape), mx.float32)
        for shape in ((1, VOCAB), (VOCAB, VOCAB), (1, VOCAB))
    )
    # A good drafter is close to the model, and not equal.
    drafted = true + 0.5 * drafted
    sampler = Sampler(params, mx.array([0]), seed)

    def draw(first: mx.array, second: mx.array) -> mx.array:
        """Tokens of all rounds at once `[R, 2]`; the positions of round r are 2r and 2r + 1."""
        rows = [mx.broadcast_to(row, (num_rounds, VOCAB))[:, None] for row in (first, second)]
        logits = mx.concatenate(rows, axis=1).reshape(-1, VOCAB)
        return sampler(logits, 0).reshape(-1, 2)

    drafts = draw(drafted, drafted)[:, 0]
    in_pass = draw(true, behind[drafts])
    stays = in_pass[:, 0] == drafts
    in_next = draw(true, behind[in_pass[:, 0]])
    tokens = mx.stack([in_pass[:, 0], mx.where(stays, in_pass[:, 1], in_next[:, 1])], axis=1)
    first, second = np.array(tokens).T
    exact = probabilities(np.array(true[0]), params)
    found = [chi_square(np.bincount(first, minlength=VOCAB), num_rounds * exact)]
    # The token after an accepted draft and the one after a rejected draft have one distribution.
    for is_accepted in (True, False):
        rows = np.array(stays) == is_accepted
        for token in np.unique(first[rows]):
            counts = np.bincount(second[rows & (first == token)], minlength=VOCAB)
            of_token = probabilities(np.array(behind[int(token)]), params)
            found.append(chi_square(counts, counts.sum() * of_token))
    return _together(2 * num_rounds, found)


def rows_of_passes(params: SamplingParams, seed: int) -> Found:
    """All rows of passes with drafts, each of which changes the penalties of later rows."""
    rng = np.random.default_rng(seed)
    num_rows = MAX_DRAFTS + 1
    logits = rng.normal(0, 2, (num_rows, VOCAB)).astype(np.float32)
    text = rng.integers(0, VOCAB, 10).tolist()
    drafts = rng.integers(0, VOCAB, MAX_DRAFTS).tolist()
    sampler = Sampler(params, mx.array(text), seed)
    # A row is drawn at each of these positions; those of other rows come between.
    passes = [
        sampler(mx.array(logits), len(text) + num_rows * i, mx.array(drafts))
        for i in range(NUM_DRAWS // num_rows)
    ]
    drawn = np.array(mx.stack(passes))
    found = []
    for row in range(num_rows):
        exact = probabilities(logits[row], params, text, drafts[:row])
        counts = np.bincount(drawn[:, row], minlength=VOCAB)
        found.append(chi_square(counts, len(drawn) * exact))
    return _together(drawn.size, found)


def _together(num_draws: int, found: Sequence[tuple[float, int]]) -> Found:
    statistic, freedom = (sum(column) for column in zip(*found, strict=True))
    return Found(num_draws, statistic, int(freedom), chance_of(statistic, int(freedom)))


def chi_squares(seed: int = 0) -> list[Found]:
    """Print a line for each setting; returns the results."""
    rows = []
    print("\nTokens of rounds against exact probabilities: draws, chi-square, freedom, p")
    for index, params in enumerate(SETTINGS):
        has_penalty = params.presence_penalty or params.repetition_penalty != 1
        test = rows_of_passes if has_penalty else pairs_of_rounds
        rows.append(test(params, seed + index))
        print(f"{rows[-1].num_draws:6} {rows[-1].statistic:9.1f} {rows[-1].freedom:5} "
              f"{rows[-1].p:.4f}  {params}")  # fmt: skip
    return rows
