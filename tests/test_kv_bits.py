"""Quantized keys and values: nearly the same logits, the same bits by every way, fewer bytes."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday
from rollback import bits, differences, step

from qwen35_mlx import memory
from qwen35_mlx.config import ModelConfig
from qwen35_mlx.engine.decode import decode
from qwen35_mlx.engine.exact_rows import kernel_rows
from qwen35_mlx.engine.prompt_cache import PromptCache
from qwen35_mlx.engine.reading import Admission
from qwen35_mlx.engine.rows import RowBatch
from qwen35_mlx.engine.sampler import Sampler
from qwen35_mlx.errors import MemoryRefused, Qwen35Error
from qwen35_mlx.family import family_config
from qwen35_mlx.kernels.decode_attention import (
    Packed,
    first_keys,
    packed,
    portable_attention,
    unpacked,
)
from qwen35_mlx.kernels.tiers import with_kernels
from qwen35_mlx.model.attention import attend
from qwen35_mlx.model.cache import fork, snapshot
from qwen35_mlx.model.language import Model
from qwen35_mlx.model.layer_cache import KVCache
from qwen35_mlx.model.loading import load_model
from qwen35_mlx.quant.divergence import kl_divergence
from qwen35_mlx.sampling import SamplingParams

KINDS = everyday(["8", "k8v4"], 0)
rng = np.random.default_rng(0)


def floats(*shape: int) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32))


def with_bits(model: Model, kv_bits: str) -> Model:
    """The same weights with another cache."""
    other = copy.copy(model)
    other.config = memory.kv_choices(model.config, kv_bits)[0]
    return other


def ids(num: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(500, size=num)]


@pytest.mark.parametrize("value_bits", [8, 4])
@pytest.mark.parametrize(("num_tokens", "budget"), [(1, 10**9), (5, 10**9), (100, 1)])
def test_attention_is_that_of_the_unpacked_numbers(
    num_tokens: int, budget: int, value_bits: int
) -> None:
    """Heads in groups, a causal mask, and blocks of queries."""
    q, k, v = floats(1, 6, num_tokens, 64), floats(1, 2, 150, 64), floats(1, 2, 150, 64)
    held = packed(k, 8), packed(v, value_bits)
    for mask in ("causal", None):
        got = attend(q, *held, 0.1, mask, budget)
        expected = portable_attention(q, *map(unpacked, held), 0.1, mask)
        np.testing.assert_allclose(np.array(got), np.array(expected), atol=1e-5)


def test_nothing_as_large_as_the_cache_is_made_for_a_token() -> None:
    """On the CPU a product with the parts of several heads copies them first."""
    q = floats(1, 4, 1, 64)
    # As in a buffer with room.
    k, v = (first_keys(packed(floats(1, 2, 20_000, 64), 8), 19_000) for _ in range(2))
    mx.eval(q, k, v)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(portable_attention(q, k, v, 0.1, None))
    scores = 4 * 19_000 * 4
    assert mx.get_peak_memory() - before <= 2 * scores < k.nbytes / 4


@pytest.mark.slow
@pytest.mark.parametrize("kv_bits", KINDS)
def test_logits_hardly_change(demo: tuple[Any, Any], kv_bits: str) -> None:
    model, _ = demo
    text = mx.array([ids(180)])
    logits = []
    for each in (model, with_bits(model, kv_bits)):
        cache = each.make_cache()
        # Read in two pieces: the second reads what the first has left in the cache.
        pieces = [each(part, cache) for part in (text[:, :120], text[:, 120:])]
        logits.append(pieces[1][0])
    assert not mx.array_equal(*logits)
    assert mx.mean(kl_divergence(*logits)).item() < {"8": 3e-4, "k8v4": 5e-3}[kv_bits]


@pytest.mark.slow
@pytest.mark.parametrize("kv_bits", KINDS)
def test_drafts_are_taken_back_bit_by_bit(demo: tuple[Any, Any], kv_bits: str) -> None:
    model = with_bits(demo[0], kv_bits)
    for accepted in (1, 3):
        assert not differences(model, ids(30), ids(5, seed=1), accepted)


def test_a_row_of_a_batch_has_the_bits_it_has_alone(demo: tuple[Any, Any]) -> None:
    model = with_bits(demo[0], "8")
    prompts = [ids(20), ids(33, seed=1)]
    alone = []
    for prompt in prompts:
        cache = PromptCache(model)
        cache.read(prompt)
        alone.append(step(cache, 7))
    caches = [PromptCache(model) for _ in prompts]
    for cache, prompt in zip(caches, prompts, strict=True):
        cache.read(prompt)
    batch = RowBatch(model, mx.default_stream(mx.default_device()))
    batch.put(caches)
    logits = model.head(batch.step(mx.array([7, 7])))
    assert [bits(logits[i : i + 1]) for i in range(2)] == alone


def test_a_point_and_a_fork_hold_the_same_bits(demo: tuple[Any, Any]) -> None:
    model = with_bits(demo[0], "8")
    cache = PromptCache(model)
    cache.read(ids(60), marks=[40])
    expected = step(cache, 7)
    other = cache.fork(40)
    other.read(ids(60)[40:])
    cache.rewind(40)
    # The one writes behind the point, and the other must not see it.
    cache.read(ids(20, seed=3))
    assert step(other, 7) == expected
    assert all(entry.bits == (8, 8) for entry in other.all_entries if hasattr(entry, "keys"))


@pytest.mark.parametrize("kv_bits", [None, (8, 4)])
def test_rows_go_into_another_cache(kv_bits: tuple[int, int] | None) -> None:
    cache, other = KVCache(kv_bits), KVCache(kv_bits)
    cache.update_and_fetch(floats(1, 2, 10, 64), floats(1, 2, 10, 64))
    other.append_rows(cache.rows(0, 4))
    other.append_rows(cache.rows(4, 10))
    again = KVCache.from_state(other.state)
    assert again.offset == 10 and again.bits == kv_bits
    rows, expected = again.rows(2, 10), cache.rows(2, 10)
    assert sorted(rows) == sorted(expected)
    assert all(bits(rows[name]) == bits(expected[name]) for name in rows)


def test_a_fork_copies_nothing_until_one_of_both_goes_on() -> None:
    cache = KVCache((8, 8))
    cache.update_and_fetch(floats(1, 2, 3000, 64), floats(1, 2, 3000, 64))
    mx.eval(cache.state)
    before = mx.get_active_memory()
    (other,) = fork([cache], snapshot([cache], 3000))
    assert mx.get_active_memory() - before < 1000
    kept = {name: bits(a) for name, a in other.rows(0, 3000).items()}
    cache.trim(1000)
    cache.update_and_fetch(floats(1, 2, 5, 64), floats(1, 2, 5, 64))
    mx.eval(cache.state)
    assert {name: bits(a) for name, a in other.rows(0, 3000).items()} == kept
    assert mx.get_active_memory() - before >= cache.nbytes * 0.9


@pytest.mark.parametrize("kv_bits", ["16", "8"])
def test_a_long_text_goes_on_without_copies(demo: tuple[Any, Any], kv_bits: str) -> None:
    """A view that is still alive makes MLX copy all of a buffer to write one token."""
    model = with_bits(demo[0], kv_bits)
    cache = PromptCache(model, [1] * 30_000)
    for entry in cache.entries:
        if isinstance(entry, KVCache):
            entry.update_and_fetch(*[mx.zeros((1, 2, 30_000, 64))] * 2)
    cache.settle()
    steps = decode(cache, mx.zeros((1, 1, 256)), Sampler(SamplingParams(), mx.array([1])), 30)
    next(steps)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    held = sum(entry.nbytes for entry in cache.entries if isinstance(entry, KVCache))
    for _ in range(5):
        next(steps)
    assert mx.get_peak_memory() - before < held / 4
    steps.close()


def test_bytes_are_counted_as_they_are_held() -> None:
    config = replace(
        memory_config(), num_key_value_heads=2, head_dim=64, layer_types=("full_attention",)
    )
    for kv_bits, halves in (("16", 32), ("8", 17), ("k8v4", 13)):
        # bfloat16 scales and biases: a ninth of a byte a number.
        chosen = memory.kv_choices(config, kv_bits)[0]
        cache = KVCache(chosen.kv_bits)
        cache.update_and_fetch(*[floats(1, 2, 256, 64).astype(mx.bfloat16)] * 2)
        assert memory.kv_bytes(chosen, memory.kv_capacity(256)) == cache.nbytes
        assert memory.kv_bytes(chosen, 1) == 2 * 64 * halves // 8


def memory_config() -> Any:
    from test_memory import FLAGSHIP

    return FLAGSHIP


def test_eight_bits_are_taken_where_sixteen_do_not_fit(
    converted_demo: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    allow = memory.allow

    def strict(config: Any, weight_bytes: int, **settings: Any) -> Any:
        if config.kv_bits is None:
            raise MemoryRefused("the model does not fit this machine")
        return allow(config, weight_bytes, **settings)

    monkeypatch.setattr(memory, "allow", strict)
    model, _ = load_model(converted_demo)
    assert model.config.kv_bits == (8, 8) and "8 bits" in caplog.text
    assert model.mtp is None or model.config.num_mtp_layers
    assert load_model(converted_demo, kv_bits="k8v4")[0].config.kv_bits == (8, 4)
    with pytest.raises(MemoryRefused):
        load_model(converted_demo, kv_bits=16)


@pytest.mark.parametrize(("head_dim", "kv_bits"), [(64, "4"), (96, 8)])
def test_what_cannot_be_is_refused(head_dim: int, kv_bits: Any) -> None:
    config = replace(memory_config(), head_dim=head_dim)
    with pytest.raises(Qwen35Error):
        memory.kv_choices(config, kv_bits)
    assert memory.kv_choices(replace(config, head_dim=96))[0].kv_bits is None


def test_drafts_need_the_kernel_that_reads_the_cache() -> None:
    """MLX's products of packed matrices choose their sums by the number of rows."""
    every = with_kernels()
    without = with_kernels([op for op in every.kernel_rows if op != "packed_attention"])
    assert kernel_rows(every, False, (8, 8)) == kernel_rows(without, False) == 8
    assert kernel_rows(without, False, (8, 8)) == kernel_rows(every, False, (8, 4)) == 0


def test_packed_heads_have_the_shape_of_floats() -> None:
    x = packed(floats(1, 2, 5, 64), 4)
    assert isinstance(x, Packed) and x.shape == (1, 2, 5, 64) == unpacked(x).shape


@pytest.mark.parametrize("kv_bits", [None, (8, 4)])
def test_a_request_is_admitted_to_the_last_byte(kv_bits: tuple[int, int] | None) -> None:
    config = replace(ModelConfig.from_hf(family_config("Qwen3.5-27B")), kv_bits=kv_bits)
    one, other = (
        SimpleNamespace(ids=[1] * num_ids, max_tokens=max_tokens, request=SimpleNamespace(n=n))
        for num_ids, max_tokens, n in ((100, 50, 2), (700, 10**6, 1))
    )
    # Room for all that may come, up to a bound; one of them runs already.
    tokens = (memory.kv_capacity(150), memory.kv_capacity(150), memory.kv_capacity(700 + 16_384))
    needed = sum(memory.kv_bytes(config, n) + 2 * memory.state_bytes(config) for n in tokens)
    model: Any = SimpleNamespace(config=config)
    for num_bytes, fits in ((needed, True), (needed - 1, False)):
        store: Any = None
        admission = Admission(model, store, num_bytes)
        assert admission.fits(one, [other]) is fits  # type: ignore[arg-type]
