"""Reuse of what was read: only what is new is read, whoever read the rest, and nothing leaks."""

import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import VOCAB, write_checkpoint
from everyday import everyday

from qwen35_mlx.convert import convert
from qwen35_mlx.engine import prefix_store
from qwen35_mlx.engine.prefix_store import PrefixStore, snapshot_marks
from qwen35_mlx.engine.prompt_cache import PromptCache, common_prefix
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.model.loading import load_model

MAX_DIFFERENCE = 3e-4
STEP = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("prefixes")
    write_checkpoint(folder / "src", moe=False)
    return load_model(convert(folder / "src", folder / "out", dtype="float32"))[0]


def ids(num: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(VOCAB, size=num)]


def assert_right(cache: PromptCache) -> None:
    """What the cache predicts next is what a fresh reading of its ids does."""
    token = mx.array([[1]])
    point = cache.snapshot()
    got = cache.model(token, cache=cache.entries)[0, -1]
    cache._is_consistent = False
    assert cache.rewind(point.num_tokens) == point.num_tokens
    expected = cache.model(mx.array([[*cache.ids, 1]]))[0, -1]
    np.testing.assert_allclose(np.array(got), np.array(expected), atol=MAX_DIFFERENCE)


def test_rewind_goes_to_the_nearest_point_at_or_before(model: Any) -> None:
    text = ids(90)
    cache = PromptCache(model)
    cache.read(text, marks=[20, 60], step_size=7)
    assert sorted(cache.snapshots) == [20, 60]
    assert cache.rewind(90) == 90
    assert cache.rewind(89) == 60
    assert cache.ids == text[:60]
    assert_right(cache)
    cache.read(ids(5, seed=1))
    assert_right(cache)
    assert cache.rewind(59) == 20 and sorted(cache.snapshots) == [20]
    assert_right(cache)
    assert cache.rewind(19) == 0 and cache.ids == [] and not cache.snapshots
    with pytest.raises(Qwen35Error, match="rewind"):
        cache.rewind(-1)


def test_a_snapshot_of_kv_is_an_offset(model: Any) -> None:
    cache = PromptCache(model)
    cache.read(ids(30))
    at_30 = cache.snapshot().nbytes
    cache.read(ids(300))
    states = [c.cache for c in cache.entries if hasattr(c, "cache")]
    assert cache.snapshot().nbytes == at_30 == sum(a.nbytes for s in states for a in s)


@pytest.mark.slow
@pytest.mark.parametrize("shared", everyday([1, 40, 99], 1))
def test_two_conversations_share_a_beginning_and_nothing_else(model: Any, shared: int) -> None:
    store = PrefixStore(model)
    owners = [type("Owner", (), {})() for _ in range(2)]
    first = ids(shared) + ids(60, seed=1)
    second = ids(shared) + ids(70, seed=2)
    one = store.take(first, owner=owners[0])
    one.read(first, marks=[shared, shared + 30])
    other = store.take(second, owner=owners[1])
    assert other is not one and other.ids == first[:shared]
    other.read(second[shared:])
    for seed in range(3):
        # In turns: a write to one must not be seen in the other.
        one.read(ids(3, seed=10 + seed))
        other.read(ids(2, seed=20 + seed))
        assert_right(one)
        assert_right(other)
    one.rewind(shared)
    one.read(ids(50, seed=5))
    assert_right(other)


def test_a_conversation_comes_back_to_what_it_left(model: Any) -> None:
    store = PrefixStore(model)
    texts = [ids(50) + ids(40, seed=s) for s in (1, 2, 3)]
    for text in texts:
        cache = store.take(text)
        cache.read(text[len(cache.ids) :], marks=[50])
        cache.release()
    assert len(store.caches) == 3
    for text in texts:
        cache = store.take([*text, 7])
        assert cache.ids == text
        assert_right(cache)
    # Taken up again, not copied.
    assert len(store.caches) == 3


def test_an_interrupted_reading_loses_no_more_than_a_piece(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PromptCache(model)
    text = ids(100)
    layer, calls = type(model.layers[0]).__call__, 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4 * 6 + 2:
            raise KeyboardInterrupt
        return layer(*args, **options)

    monkeypatch.setattr(type(model.layers[0]), "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.read(text, marks=[30], step_size=10)
    # Six pieces were read; the first layer had read more than the others.
    assert len(cache.ids) == 60 and cache.reusable_tokens(text) == 60
    assert_right(cache)
    cache.read(text[60:])
    assert_right(cache)
    assert cache.rewind(59) == 30


def test_the_least_recently_used_points_go_first(model: Any) -> None:
    cache = PromptCache(model)
    cache.read(ids(1))
    one = cache.snapshot().nbytes
    store = PrefixStore(model, memory_bytes=3 * one)
    owner = type("Owner", (), {})()
    text = ids(60)
    cache = store.take(text, owner=owner)
    cache.read(text, marks=[10, 20, 30, 40])
    cache.mark_used(10)
    assert store.nbytes == 4 * one and store.num_snapshots == 4
    store.trim()
    assert sorted(cache.snapshots) == [10, 30, 40] and store.nbytes == 3 * one
    # Unused, its keys and values count as well: they go with its last point.
    del owner
    store.trim()
    assert store.caches == [] and store.nbytes == 0


def test_points_shared_by_forks_count_once_and_go_everywhere(model: Any) -> None:
    store = PrefixStore(model)
    owners = [type("Owner", (), {})() for _ in range(2)]
    text = ids(40)
    store.take(text, owner=owners[0]).read(text, marks=[20])
    fork = store.take(text[:30], owner=owners[1])
    assert fork.ids == text[:20] and store.num_snapshots == 1
    store.memory_bytes = 0
    store.trim()
    assert store.nbytes == 0 and not fork.snapshots
    assert_right(fork)


def test_a_long_prefill_keeps_points_but_not_too_many() -> None:
    assert snapshot_marks(0, 2048) == []
    assert snapshot_marks(5, 5000) == [904, 2952]
    assert len(snapshot_marks(0, 262_144)) <= 7


@pytest.mark.parametrize("end", [9_000, 100_000, 262_144])
def test_an_edit_reads_little_again_before_it(end: int) -> None:
    """With points at even distances, it was up to 32,768 tokens of a long prompt."""
    marks = [0, *snapshot_marks(0, end)]
    for back, most in ((1, 2048), (5_000, 4096), (10_000, 10_000), (60_000, 60_000)):
        if (edit := end - back) > 0:
            assert edit - max(n for n in marks if n <= edit) <= most


def test_points_far_from_the_end_are_given_up_before_near_ones(model: Any) -> None:
    """The oldest ones went first: an edit before them read all of the text again."""
    cache = PromptCache(model)
    cache.read(ids(1))
    store = PrefixStore(model, memory_bytes=5 * cache.snapshot().nbytes)
    cache = store.take(text := ids(200), owner=store)
    cache.read(text, marks=range(10, 200, 10), step_size=10)
    store.trim()
    points = sorted(cache.snapshots)
    assert len(points) == 5 and points[-1] == 190
    for edit in range(points[0], 200):
        assert edit - max(n for n in points if n <= edit) <= 200 - edit + 20
    # By age alone it would be 150.
    assert points[0] <= 120


@pytest.mark.parametrize("length", [0, 1, 2, 100, 1001])
def test_common_prefix(length: int) -> None:
    text = ids(length)
    assert common_prefix(text, text) == length
    assert common_prefix(text, [*text, 5]) == length
    for at in range(0, length, 17):
        assert common_prefix(text, [*text[:at], -1, *text[at + 1 :]]) == at


@pytest.mark.slow
def test_reading_ahead_stops_between_two_pieces(model: Any) -> None:
    store = PrefixStore(model)
    text = ids(300)
    cache = store.take(text)
    pieces = threading.Semaphore(0)
    go_on = threading.Semaphore(2)

    def job(stop: Any) -> None:
        def told(done: int, total: int) -> None:
            pieces.release()
            go_on.acquire()

        cache.read(text, step_size=STEP, should_stop=stop, progress=told)

    store.background.start(job)
    # One call before the first piece, one behind it, and there it waits.
    for _ in range(3):
        pieces.acquire()
    store.background._stopping.set()
    go_on.release(3)
    store.background.stop()
    assert len(cache.ids) == 2 * STEP
    assert_right(cache)
    cache.read(text[len(cache.ids) :])
    assert_right(cache)


def test_what_goes_wrong_in_the_background_is_told(model: Any) -> None:
    store = PrefixStore(model)

    def job(stop: Any) -> None:
        raise Qwen35Error("no")

    store.background.start(job)
    with pytest.raises(Qwen35Error, match="no"):
        store.background.stop(wait_for_end=True)
    store.background.stop()


def test_idle_conversations_do_not_pile_up(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_store, "MAX_IDLE_CACHES", 3)
    store, owner = PrefixStore(model), threading.Event()
    for seed, num_tokens in enumerate((8, 40, 41, 42, 43, 44, 9)):
        cache = store.take(ids(num_tokens, seed), owner=owner)
        cache.read(ids(num_tokens, seed))
        if num_tokens != 40:
            cache.release()
        store.trim()
    # The one in use stays; short ones are read again as fast.
    assert [len(cache.ids) for cache in store.caches] == [40, 42, 43, 44]
