"""Our layer caches against mlx-lm's: the same masks, states and rows, in fewer buffers."""

import copy
from typing import Any

import mlx.core as mx
import mlx_lm.models.cache as theirs
import numpy as np
import pytest
from mlx_lm.models.base import create_attention_mask, create_ssm_mask

from qwen35_mlx.kernels.decode_attention import unpacked
from qwen35_mlx.model import cache as ours
from qwen35_mlx.model.attention import attention_mask
from qwen35_mlx.model.cache import cached_tokens, fork, kv_bytes, snapshot

HEADS, DK, DV = 2, 5, 3
rng = np.random.default_rng(0)


def new(rows: int, tokens: int) -> tuple[mx.array, mx.array]:
    return tuple(mx.array(rng.standard_normal((rows, HEADS, tokens, d))) for d in (DK, DV))  # type: ignore[return-value]


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, tuple | list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, mx.array):
        np.testing.assert_array_equal(np.array(a), np.array(b))
    else:
        assert a == b


class Both:
    """One cache of each program; what is done to it is done to both and compared."""

    def __init__(self, one: Any, other: Any):
        self.pair = one, other

    def do(self, method: str, *arguments: Any, **options: Any) -> Any:
        results = [getattr(cache, method)(*arguments, **options) for cache in self.pair]
        assert_equal(*results)
        self.check()
        return results[0]

    def check(self) -> None:
        one, other = self.pair
        for name in ("offset", "left_padding", "lengths"):
            assert_equal(getattr(one, name, None), getattr(other, name, None))
        assert (one.size(), one.empty(), one.is_trimmable()) == (
            other.size(), other.empty(), other.is_trimmable(),
        )  # fmt: skip
        x = mx.zeros((1, 4, 1))
        if isinstance(one, ours.ArraysCache):
            assert_equal(create_ssm_mask(x, one), create_ssm_mask(x, other))
            assert_equal(one.cache, other.cache)
        else:
            assert_equal(attention_mask(4, one), create_attention_mask(x, other))
            assert_equal(attention_mask(4, other), create_attention_mask(x, one))


def kv_pair() -> Both:
    return Both(ours.KVCache(), theirs.KVCache())


def test_one_sequence_reads_trims_and_masks_as_in_mlx_lm() -> None:
    both = kv_pair()
    both.check()
    for tokens in (3, 1, 250, 1, 1, 1, 300, 2):
        both.do("update_and_fetch", *new(1, tokens))
        if tokens == 300:
            both.do("trim", 299)
            both.do("update_and_fetch", *new(1, 5))
    both.do("trim", 10**6)


@pytest.mark.parametrize("lengths", [(7, 3), (0, 4), (260, 0), (0, 0)])
@pytest.mark.parametrize("bits", [None, (8, 4)])
def test_sequences_become_a_batch_of_mlx_lm(
    lengths: tuple[int, int], bits: tuple[int, int] | None
) -> None:
    singles, expected = [ours.KVCache(bits) for _ in lengths], []
    for cache, length in zip(singles, lengths, strict=True):
        other = theirs.KVCache()
        if length:
            shape = 1, HEADS, length, 64
            pair = [mx.array(rng.standard_normal(shape)) for _ in range(2)]
            held = cache.update_and_fetch(*pair)
            other.update_and_fetch(*map(unpacked, held))
        expected.append(other)
    batch, wanted = singles[0].merge(singles), theirs.KVCache.merge(expected)
    assert type(batch) is theirs.BatchKVCache
    assert_equal(batch.state, wanted.state)
    # Of rows that went back into a batch beside new ones, the latter may be ours.
    mixed = ours.KVCache.merge([expected[0], singles[1]])
    assert_equal(mixed.state, wanted.state)


def test_states_become_a_batch_of_mlx_lm() -> None:
    def state(rows: int) -> mx.array:
        return mx.array(rng.standard_normal((rows, 3, 4)))

    both = Both(ours.ArraysCache(2), theirs.ArraysCache(2))
    both.check()
    for index in range(2):
        both.do("__setitem__", index, state(1))
    both.do("advance", 3)
    for others in ([ours.ArraysCache(2)], [theirs.ArraysCache(2)], both.pair):
        batch = ours.ArraysCache.merge([both.pair[0], *others])
        wanted = theirs.ArraysCache.merge([both.pair[1], *others])
        assert type(batch) is theirs.ArraysCache
        assert_equal(batch.state, wanted.state)
    none = ours.ArraysCache.merge([ours.ArraysCache(2)] * 2)
    assert none.left_padding.tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["KVCache", "ArraysCache"])
def test_states_go_over_to_mlx_lm_and_back(kind: str) -> None:
    argument = {"KVCache": [], "ArraysCache": [2]}[kind]
    cache = getattr(ours, kind)(*argument)
    if kind == "ArraysCache":
        cache[0], cache[1] = new(2, 1)
    else:
        cache.update_and_fetch(*new(2, 5))
    there = getattr(theirs, kind).from_state(cache.state)
    back = getattr(ours, kind).from_state(there.state)
    both = Both(back, there)
    both.check()
    assert back.nbytes == cache.nbytes > 0
    if kind == "KVCache":
        both.do("update_and_fetch", *new(2, 1))


def test_a_long_answer_moves_its_keys_and_values_rarely() -> None:
    """mlx-lm makes new buffers every 256 tokens: 64 GB of them on the way to 32k tokens."""
    cache, buffers = ours.KVCache(), set()
    step = mx.zeros((1, 1, 1, 1))
    cache.update_and_fetch(*[mx.zeros((1, 1, 2000, 1))] * 2)
    for _ in range(14_000):
        cache.update_and_fetch(step, step)
        buffers.add(cache.keys.shape[2])  # type: ignore[union-attr]
        if cache.offset % 64 == 0:
            mx.eval(cache.state)
    assert len(buffers) <= 18
    assert cache.keys.shape[2] <= 16_000 * 9 / 8 + 256  # type: ignore[union-attr]


def test_a_fork_holds_its_own_memory() -> None:
    """A view of the parent's buffer kept all of it, and the budget counted the view alone."""
    parent = ours.KVCache()
    keys, values = parent.update_and_fetch(*new(1, 3000))
    expected = np.array(keys[..., :10, :])
    mx.eval(parent.state)
    point = snapshot([parent], 3000)
    point.entries = (10,)
    copies = fork([parent], point)
    assert cached_tokens(copies) == 10
    np.testing.assert_array_equal(np.array(copies[0].keys[..., :10, :]), expected)
    del keys, values
    before = mx.get_active_memory()
    size, held = kv_bytes(copies), parent.nbytes
    del parent, point
    # What the fork is said to hold is all that is left.
    assert before - mx.get_active_memory() >= held
    assert size == 256 * HEADS * (DK + DV) * 4
    copies[0].update_and_fetch(*new(1, 1))
    assert kv_bytes(copies) == size


def test_a_copied_cache_goes_its_own_way() -> None:
    """mlx-lm's prompt cache copies deeply."""
    cache = ours.KVCache()
    cache.update_and_fetch(*new(1, 3))
    other = copy.deepcopy(cache)
    other.update_and_fetch(*new(1, 1))
    assert (cache.offset, other.offset) == (3, 4)
    assert_equal(cache.keys[..., :3, :], other.keys[..., :3, :])  # type: ignore[index]
