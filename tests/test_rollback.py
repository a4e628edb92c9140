"""A pass whose last tokens are taken back leaves what single steps leave, bit by bit."""

import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_checkpoint
from everyday import everyday
from metal.draw import Draw
from mlx_lm.models.cache import make_prompt_cache
from rollback import CONTINUATIONS, differences, held, kept_pass, one_by_one
from test_model import KINDS, config, random_model
from test_tiers import small_model

from qwen35_mlx.convert import convert
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.kernels import tiers
from qwen35_mlx.kernels.delta_step import DeltaInputs, kept_delta_step
from qwen35_mlx.kernels.tiers import MLX, PORTABLE, Tiers
from qwen35_mlx.model.cache import accept
from qwen35_mlx.model.loading import load_model

# MLX's products on a Mac, on both of its devices, depend on how many rows there are.
exact_products = pytest.mark.skipif(
    mx.metal.is_available(), reason="MLX's products of a row are other numbers beside others here"
)
CASES = [(tokens, accepted) for tokens in range(1, 9) for accepted in range(tokens + 1)]
# Bits, group size.
FORMATS = [(2, 32), (3, 64), (4, 64), (5, 128), (6, 32), (8, 128), (None, 0)]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The model of a random checkpoint, quantized or in float32."""

    @functools.cache
    def load(moe: bool, bits: int | None = 4, group_size: int = 64) -> Any:
        folder: Path = tmp_path_factory.mktemp("rollback")
        write_checkpoint(folder / "src", moe=moe)
        form: Any = dict(bits=bits, group_size=group_size) if bits else dict(dtype="float32")
        return load_model(convert(folder / "src", folder / "out", **form))[0]

    return load


@pytest.fixture(params=everyday(["ops", "mlx"], 0))
def on_a_tier(request: pytest.FixtureRequest) -> Iterator[Callable[[Any], Any]]:
    """Puts a model on a tier, and back on plain operations in the end."""
    used: list[Any] = []

    def put(model: Any) -> Any:
        tiers.use(model, Tiers(request.param))
        used.append(model)
        return model

    yield put
    for model in used:
        tiers.use(model, PORTABLE)


def random_ids(seed: int, number: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 43, number).tolist()


def assert_exact(model: Any, cases: list[tuple[int, int]], prompt_tokens: int = 11) -> None:
    for tokens, accepted in cases:
        prompt, ids = random_ids(tokens, prompt_tokens), random_ids(accepted, tokens)
        assert differences(model, prompt, ids, accepted) == 0, (tokens, accepted)


@exact_products
@pytest.mark.parametrize(("tokens", "accepted"), [(1, 0), (3, 3), (8, 2)])
def test_accepted_tokens_have_the_bits_of_single_steps(model_of, on_a_tier, tokens, accepted):
    assert_exact(on_a_tier(model_of(True)), [(tokens, accepted)])


@exact_products
@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_so_they_have_in_every_format_and_number(model_of, on_a_tier, moe, bits, group_size):
    assert_exact(on_a_tier(model_of(moe, bits, group_size)), CASES)


@exact_products
@pytest.mark.slow
def test_so_they_have_in_the_demo(demo, on_a_tier):
    model = on_a_tier(demo[0])
    assert_exact(model, CASES)
    assert_exact(model, [(8, 5), (5, 1)], prompt_tokens=300)


@pytest.mark.slow
@exact_products
@pytest.mark.parametrize("num_experts", everyday([0, 8], 1))
def test_so_they_have_in_heads_that_mlx_has_a_kernel_for(monkeypatch, num_experts):
    model = small_model(num_experts=num_experts)
    real, calls = mx.fast.gated_delta_update, []
    monkeypatch.setattr(mx.fast, "gated_delta_update", lambda *a: calls.append(1) or real(*a))
    tiers.use(model, Tiers(MLX))
    assert_exact(model, [(5, 0), (5, 2), (4, 4)])
    assert calls


@exact_products
@pytest.mark.parametrize("kind", everyday(["linear only", "full only, yarn"], 1))
def test_so_they_have_in_layers_of_one_kind(kind):
    assert_exact(random_model(config(**KINDS[kind])), [(5, 0), (5, 2), (3, 3)])


@exact_products
def test_the_first_tokens_of_all_can_be_taken_back(model_of):
    assert differences(model_of(True), [], random_ids(1, 6), 4) == 0


@exact_products
@pytest.mark.parametrize("go_on", everyday(CONTINUATIONS, 0, 2, 4), ids=lambda f: f.__name__)
def test_whatever_comes_next_is_as_after_single_steps(model_of, tmp_path, go_on):
    model, prompt, ids = model_of(True), random_ids(1, 11), random_ids(2, 5)
    want, _ = one_by_one(model, prompt, ids[:3])
    got, _ = kept_pass(one_by_one(model, prompt, ())[0], ids, 3)
    assert go_on(got, tmp_path) == go_on(want, tmp_path)


@exact_products
@pytest.mark.slow
@pytest.mark.parametrize("go_on", CONTINUATIONS, ids=lambda f: f.__name__)
def test_whatever_comes_next_in_every_case(model_of, demo, on_a_tier, tmp_path, go_on):
    for model in map(on_a_tier, (model_of(False, None, 0), model_of(True, 3, 64), demo[0])):
        for tokens, accepted in [(1, 0), (1, 1), (2, 1), (4, 0), (5, 4), (8, 1), (8, 7), (8, 8)]:
            prompt, ids = random_ids(accepted, 23), random_ids(tokens, tokens)
            want, _ = one_by_one(model, prompt, ids[:accepted])
            got, _ = kept_pass(one_by_one(model, prompt, ())[0], ids, accepted)
            assert go_on(got, tmp_path) == go_on(want, tmp_path), (tokens, accepted)


def test_states_that_were_not_accepted_are_freed():
    """A view of the window or of a stack of states would keep them all alive."""
    draw = Draw(3)
    *inputs, parameters, _ = draw.delta(1, 8)
    mx.eval(inputs, list(parameters[:4]))
    gc.collect()
    before = mx.get_active_memory()
    out, kept = kept_delta_step(DeltaInputs(*inputs, parameters))
    states = kept._replace(num_accepted=3).states()
    mx.eval(out, kept.arrays, states)
    del out, kept
    held = sum(a.nbytes for a in states)
    assert held <= mx.get_active_memory() - before <= held + 8192


def test_no_older_states_are_held_than_a_pass_can_go_back_to(model_of):
    cache, _ = one_by_one(model_of(True), random_ids(1, 11), ())
    entry = cache.entries[0]
    plain, (conv_state, recurrent_state) = entry.nbytes, entry.cache
    a_token = conv_state.nbytes // conv_state.shape[1] + recurrent_state.nbytes
    for _ in range(3):
        cache.model.trunk(mx.array([[1, 2, 3, 4]]), cache.entries, keep_states=True)
        assert entry.nbytes == plain + 4 * a_token
        accept(cache.entries, 2)
    _ = entry.cache
    assert entry.nbytes == plain


@pytest.mark.parametrize("accepted", [0, 2])
def test_a_snapshot_before_the_pass_stays_good(model_of, accepted):
    cache, _ = one_by_one(model_of(False), random_ids(1, 11), ())
    cache.snapshot()
    before = held(cache)
    later, _ = kept_pass(cache, random_ids(2, 5), accepted)
    assert (held(later) == before) == (accepted == 0)
    later.snapshots = cache.snapshots
    assert later.rewind(11) == 11
    assert held(later) == before


def test_a_pass_that_was_not_kept_cannot_be_taken_back(model_of):
    model = model_of(False)
    cache = model.make_cache()
    ids = mx.array([[1, 2, 3]])
    with pytest.raises(Qwen35Error, match="cannot be taken back"):
        accept(cache, 0)
    model.trunk(ids, cache)
    with pytest.raises(Qwen35Error, match="keep_states=True"):
        accept(cache, 2)
    model.trunk(ids, cache, keep_states=True)
    with pytest.raises(Qwen35Error, match="expected: 0 to 3"):
        accept(cache, 4)
    accept(cache, 3)
    with pytest.raises(Qwen35Error, match="accept tokens once"):
        accept(cache, 1)
    model.trunk(ids, cache, keep_states=True)
    model.trunk(ids, cache)
    with pytest.raises(Qwen35Error, match="cannot be taken back"):
        accept(cache, 1)
    assert cache[1].offset == 12


@pytest.mark.parametrize("shape", [(1, 9), (2, 3)])
def test_a_pass_too_large_to_be_kept_is_refused(model_of, shape):
    model = model_of(False)
    with pytest.raises(Qwen35Error, match="a few tokens of one sequence"):
        model.trunk(mx.zeros(shape, mx.int32), model.make_cache(), keep_states=True)


def test_a_cache_that_cannot_take_tokens_back_is_refused(model_of):
    model, ids = model_of(False), mx.array([[1, 2]])
    padded, none = model.make_cache([1]), None
    theirs = make_prompt_cache(_WithoutOurCache(model))
    for cache in (padded, theirs, none):
        with pytest.raises(Qwen35Error, match="a cache that can take tokens back"):
            model.trunk(ids, cache, keep_states=True)


class _WithoutOurCache:
    """What mlx-lm makes its own cache for."""

    def __init__(self, model: Any):
        self.layers = model.layers
