"""Models on the kernels take tokens back: states stay behind a tape until somebody wants them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from everyday import everyday
from metal.emulator import Log, emulated
from rollback import CONTINUATIONS, differences, held, kept_pass, one_by_one, step

from qwen35_mlx.kernels import metal, tiers
from qwen35_mlx.kernels.delta_step import Tape
from qwen35_mlx.kernels.tiers import DECODE_OPERATIONS, OPS, PORTABLE, Tiers, with_kernels
from qwen35_mlx.model.cache import ArraysCache
from qwen35_mlx.model.loading import load_model

DELTA_STEP = with_kernels(["delta_step"], OPS)


@pytest.fixture(scope="module")
def moe(converted_golden: Any) -> Any:
    return load_model(converted_golden("moe"))[0]


@pytest.fixture
def log() -> Iterator[Log]:
    with emulated() as log:
        metal.clear()
        yield log
    metal.clear()


@pytest.fixture
def put(log: Log) -> Iterator[Any]:
    """Puts a model on a tier, and back on plain operations in the end."""
    used = []

    def put(model: Any, kernels: Tiers) -> Any:
        tiers.use(model, kernels)
        used.append(model)
        return model

    yield put
    for model in used:
        tiers.use(model, PORTABLE)


def random_ids(seed: int, number: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 43, number).tolist()


def linear_entries(cache: Any) -> list[ArraysCache]:
    return [entry for entry in cache.entries if isinstance(entry, ArraysCache)]


def test_a_round_takes_the_dispatches_of_a_plain_step(moe, put, log):
    """States are written by the next pass, however many tokens were accepted."""
    model = put(moe, DELTA_STEP)
    cache, _ = one_by_one(model, random_ids(1, 11), ())
    num_layers = len(linear_entries(cache))
    for tokens, accepted in ((3, 1), (3, 0), (3, 3)):
        before = log.num_dispatches
        cache, _ = kept_pass(cache, random_ids(2, tokens), accepted)
        assert log.num_dispatches - before == num_layers
        assert all(isinstance(entry.pending, Tape) for entry in linear_entries(cache))
    before = log.num_dispatches
    step(cache, 5)
    assert log.num_dispatches - before == num_layers
    assert all(entry.pending is None for entry in linear_entries(cache))


@pytest.mark.parametrize("go_on", everyday(CONTINUATIONS, 1), ids=lambda f: f.__name__)
def test_whatever_comes_next_is_as_after_single_steps(moe, put, tmp_path, go_on):
    model, prompt, ids = put(moe, DELTA_STEP), random_ids(1, 11), random_ids(2, 5)
    want, _ = one_by_one(model, prompt, ids[:3])
    got, _ = kept_pass(one_by_one(model, prompt, ())[0], ids, 3)
    assert go_on(got, tmp_path) == go_on(want, tmp_path)


def test_states_are_looked_at_once(moe, put, log):
    cache, _ = one_by_one(put(moe, DELTA_STEP), random_ids(1, 11), ())
    cache, _ = kept_pass(cache, random_ids(2, 4), 2)
    before = log.num_dispatches
    first = held(cache)
    assert log.num_dispatches - before == len(linear_entries(cache))
    assert held(cache) == first
    assert log.num_dispatches - before == len(linear_entries(cache))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moe", "demo"])
def test_accepted_tokens_have_the_bits_of_single_steps_on_all_kernels(moe, demo, put, name):
    model = put({"moe": moe, "demo": demo[0]}[name], with_kernels(DECODE_OPERATIONS))
    for tokens, accepted in [(1, 0), (2, 1), (5, 3), (8, 8)] if name == "moe" else [(3, 2)]:
        assert differences(model, random_ids(1, 11), random_ids(2, tokens), accepted) == 0


@pytest.mark.slow
@pytest.mark.parametrize("go_on", CONTINUATIONS, ids=lambda f: f.__name__)
def test_whatever_comes_next_on_all_kernels(moe, put, tmp_path, go_on):
    model, prompt, ids = put(moe, with_kernels()), random_ids(1, 11), random_ids(2, 6)
    for accepted in (0, 1, 6):
        want, _ = one_by_one(model, prompt, ids[:accepted])
        got, _ = kept_pass(one_by_one(model, prompt, ())[0], ids, accepted)
        assert go_on(got, tmp_path) == go_on(want, tmp_path)
