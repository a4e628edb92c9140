"""Drawing against a slow reference of the distribution, and penalties against hand computation."""

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from dispatches import Graph, leaf
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from qwen35_mlx.engine import sampler as sampler_module
from qwen35_mlx.engine.sampler import MAX_SEED, Masks, Sampler, draw, penalise, scalars, smallest
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.sampling import PRESETS, SamplingParams

VOCAB, DRAWS = 40, 20_000


def reference(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probability of each token, by the definitions, one token at a time."""
    order = sorted(range(VOCAB), key=lambda i: -logits[i])
    if params.top_k:
        order = order[: params.top_k]
    weights = {i: np.exp(logits[i] - logits.max()) for i in order}
    total, covered, nucleus = sum(weights.values()), 0.0, {}
    for i in order:
        # The token that crosses top_p still belongs.
        if covered < params.top_p:
            nucleus[i] = weights[i]
        covered += weights[i] / total
    best = max(nucleus.values())
    kept = {i: w for i, w in nucleus.items() if w >= params.min_p * best}
    result = np.zeros(VOCAB)
    for i, weight in kept.items():
        result[i] = weight / sum(kept.values())
    return result


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    list(itertools.product([0, 1, 7, VOCAB, VOCAB + 5], [1.0, 0.7, 1e-6], [0.0, 0.15])),
)
def test_draws_follow_the_distribution(top_k: int, top_p: float, min_p: float) -> None:
    params = SamplingParams(1.0, top_p=top_p, top_k=top_k, min_p=min_p)
    logits = np.random.default_rng(1).normal(scale=1.5, size=VOCAB).astype(np.float32)
    rows = mx.broadcast_to(mx.array(logits), (DRAWS, VOCAB))
    counts = np.bincount(
        np.array(draw(rows, params, mx.random.split(mx.random.key(3), DRAWS))), minlength=VOCAB
    )
    expected = reference(logits.astype(np.float64), params)
    likely = expected * DRAWS > 5
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    assert set(np.flatnonzero(counts)) >= set(np.flatnonzero(likely))
    chi_square = ((counts - expected * DRAWS) ** 2)[likely] / (expected * DRAWS)[likely]
    degrees = max(int(likely.sum()) - 1, 1)
    assert chi_square.sum() < degrees + 4 * np.sqrt(2 * degrees)


def test_top_k_never_draws_the_next_one() -> None:
    logits = np.random.default_rng(2).normal(size=(3000, 250)).astype(np.float32)
    keys = mx.random.split(mx.random.key(0), len(logits))
    drawn = np.array(draw(mx.array(logits), SamplingParams(1.0, top_k=5), keys))
    ranks = (logits > logits[np.arange(len(drawn)), drawn][:, None]).sum(axis=1)
    assert set(ranks) == {0, 1, 2, 3, 4}


def test_temperature_divides_the_logits() -> None:
    logits = mx.array([[0.0, 1.0]])
    sampler = Sampler(SamplingParams(0.5), mx.array([0]), seed=0)
    ones = sum(int(sampler(logits, place).item()) for place in range(2000)) / 2000
    assert abs(ones - 1 / (1 + np.exp(-2))) < 0.03


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-30, 1e-6, 2e-5])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature, top_p=0.9, top_k=3), mx.array([0]), seed=0)
    logits = mx.array([[-50.0, 90.0, 80.0, -mx.inf]])
    assert {int(sampler(logits, place).item()) for place in range(20)} == {1}


def penalised(sampler: Sampler, logits: mx.array) -> mx.array:
    return penalise(logits, scalars(sampler.params), sampler._masks(logits.shape[-1]))


def test_repetition_penalty_counts_prompt_and_answer_once_each() -> None:
    """transformers: positive logits divided, negative ones multiplied, however often said."""
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), mx.array([0, 0, 1]))
    logits = mx.array([[8.0, -1.0, 5.0, 3.0, 1.0]])
    seen = []
    for _ in range(3):
        seen.append(penalised(sampler, logits).tolist()[0])
        sampler.accept(sampler(logits, 0))
    assert seen[0] == [4.0, -2.0, 5.0, 3.0, 1.0]
    # 2 was said first; halved to 2.5 it loses to 0, which was penalised already.
    assert seen[1] == seen[2] == [4.0, -2.0, 2.5, 3.0, 1.0]


def drawn_and_accepted(sampler: Sampler, logits: mx.array) -> int:
    token = sampler(logits, 0)
    sampler.accept(token)
    return int(token.item())


def test_a_token_that_was_drawn_and_discarded_is_not_penalised() -> None:
    sampler = Sampler(SamplingParams(presence_penalty=1.5, repetition_penalty=2.0), mx.array([2]))
    logits = mx.array([[2.0, 1.0, -3.0]])
    assert [int(sampler(logits, place).item()) for place in range(3)] == [0, 0, 0]
    sampler.accept(mx.array([0, 1]))
    assert penalised(sampler, logits).tolist()[0] == [-0.5, -1.0, -6.0]


def test_presence_penalty_counts_the_answer_alone() -> None:
    sampler = Sampler(SamplingParams(presence_penalty=1.5), mx.array([0, 1, 2]))
    logits = mx.array([[2.0, 1.0, -3.0]])
    drawn = [drawn_and_accepted(sampler, logits) for _ in range(3)]
    assert drawn == [0, 1, 0]
    assert penalised(sampler, logits).tolist()[0] == [0.5, -0.5, -3.0]


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    logits = mx.zeros((1, 1000))

    def said(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(1.0), mx.array([0]), seed)
        return [int(sampler(logits, place).item()) for place in range(4)]

    assert said(5) == said(5)
    assert said(0) == said(0)
    assert len({tuple(said(seed)) for seed in (0, 1, MAX_SEED, None, None)}) == 5


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "1"])
def test_seeds_that_are_refused(seed: Any) -> None:
    with pytest.raises(Qwen35Error, match="seed is not usable"):
        Sampler(SamplingParams(), mx.array([0]), seed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
        ("temperature", "0.6"), ("top_p", 0.0), ("top_p", 1.01), ("top_k", -1), ("top_k", 2.5),
        ("min_p", -0.1), ("min_p", 1.1), ("presence_penalty", 11), ("repetition_penalty", 0),
        ("repetition_penalty", [1.0]),
    ],
)  # fmt: skip
def test_values_that_are_refused(name: str, value: Any) -> None:
    with pytest.raises(Qwen35Error, match=f"{name} is not usable"):
        SamplingParams().updated(**{name: value})


def test_unknown_options_are_refused_and_none_means_default() -> None:
    params = SamplingParams(0.7, top_k=20)
    assert params.updated(temperature=None, top_k=0) == SamplingParams(0.7)
    with pytest.raises(Qwen35Error, match="unknown sampling option"):
        params.updated(temprature=1.0)


@pytest.mark.parametrize(
    ("config", "params"),
    [
        ({}, SamplingParams()),
        ({"temperature": 0.6, "top_k": 20}, SamplingParams()),
        ({"do_sample": True}, SamplingParams(1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 1},
            SamplingParams(0.6, top_p=0.95, top_k=20),
        ),
        ({"do_sample": False, "repetition_penalty": 1.1, "top_p": None},
         SamplingParams(repetition_penalty=1.1)),
    ],
)  # fmt: skip
def test_defaults_from_generation_config(config: dict[str, Any], params: SamplingParams) -> None:
    assert SamplingParams.from_generation_config(config) == params


@pytest.mark.parametrize(
    ("vocab", "k"), [(1, 1), (7, 3), (250, 5), (1000, 999), (1009, 20), (4096, 64), (9001, 0)]
)
@pytest.mark.parametrize("kind", ["normal", "ties", "infinite"])
def test_the_kept_tokens_are_those_of_a_full_sort(vocab: int, k: int, kind: str) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(5, vocab)).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits * 2) / 2
    if kind == "infinite":
        logits[rng.random(logits.shape) < 0.9] = -np.inf
    costs, ids = smallest(mx.array(-logits), k)
    order = np.argsort(-logits, axis=1, kind="stable")[:, : k or vocab]
    places = mx.broadcast_to(mx.arange(order.shape[1]), order.shape)
    assert np.array_equal(np.array(ids(places)), order)
    assert np.array_equal(np.array(costs), np.take_along_axis(-logits, order, axis=1))


@pytest.mark.parametrize(
    "params",
    [*PRESETS.values(), SamplingParams(1.0), SamplingParams(1.0, top_p=0.9, min_p=0.01)],
)
def test_a_row_of_a_batch_is_drawn_as_it_is_alone(params: SamplingParams) -> None:
    logits = mx.random.normal((6, 1009), key=mx.random.key(1))
    keys = mx.random.split(mx.random.key(2), 6)
    said = Masks(in_answer=mx.arange(1009) % 3 == 0 if params.presence_penalty else None)
    together = draw(logits, params, keys, said).tolist()
    alone = [draw(logits[i : i + 1], params, keys[i : i + 1], said) for i in range(6)]
    assert together == [int(token.item()) for token in alone]
    assert len(set(together)) > 1


def test_neither_another_token_nor_another_value_compiles_again(
    compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces: list[object] = []

    def traced(*arguments: Any) -> mx.array:
        traces.append(arguments)
        return penalise(*arguments)

    monkeypatch.setattr(sampler_module, "penalise", traced)
    # A vocabulary of no other test: its first draw is traced.
    logits = mx.random.normal((1, 1013), key=mx.random.key(1))
    for temperature in (1.0, 0.5, 0.7):
        params = PRESETS["thinking"].updated(temperature=temperature)
        sampler = Sampler(params, mx.array([0]), seed=0)
        for _ in range(3):
            drawn_and_accepted(sampler, logits)
    assert len(traces) == 1


@pytest.mark.parametrize(
    "params",
    [
        *PRESETS.values(), SamplingParams(), SamplingParams(1.0), SamplingParams(1.0, top_p=0.9),
        SamplingParams(1.0, top_k=40, min_p=0.05), SamplingParams(1.0, min_p=0.05),
        SamplingParams(0.0, presence_penalty=1.0), SamplingParams(1.0, repetition_penalty=1.1),
    ],
)  # fmt: skip
def test_a_token_takes_no_more_dispatches_than_mlx_lms(params: SamplingParams) -> None:
    """Counted by the rule of tools/bench_kernels.py, from logits to the state of the next draw."""
    logits = leaf((1, 248_320), mx.bfloat16)
    ours = Sampler(params, mx.array([1, 2]), seed=0)
    ours.accept(ours(logits, 0))
    mx.eval(*(mask for mask in ours._masks(248_320) if mask is not None))
    token = ours(logits, 1)
    ours.accept(token)
    masks = [mask for mask in ours._masks(248_320) if mask is not None]
    dispatches = Graph().finish(token, *masks).total()

    repetition = params.repetition_penalty if params.repetition_penalty != 1 else None
    processors = make_logits_processors(
        presence_penalty=params.presence_penalty or None, repetition_penalty=repetition
    )
    tokens, theirs = mx.arange(30), logits
    mx.eval(tokens, mx.random.state)
    for process in processors:
        theirs = process(tokens, theirs)
    draw_theirs = make_sampler(params.temperature, params.top_p, params.min_p, top_k=params.top_k)
    drawn = draw_theirs(theirs - mx.logsumexp(theirs, keepdims=True))
    assert dispatches <= Graph().finish(drawn, *mx.random.state).total()


def test_a_penalty_from_now_on_counts_what_was_said_before() -> None:
    sampler = Sampler(PRESETS["coding"].updated(temperature=0.0), mx.array([1]))
    logits = mx.array([[0.0, 1.0, 0.9, 0.8]])
    assert sampler(logits, 0).item() == 1
    sampler.penalise_repeats(0.5, [1, 2])
    drawn = []
    for _ in range(3):
        token = sampler(logits, 1)
        sampler.accept(token)
        drawn.append(int(token.item()))
    assert drawn == [3, 1, 1]
