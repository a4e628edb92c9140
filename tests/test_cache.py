"""Snapshots: coming back to a point must leave no trace of what was read after it."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import VOCAB, write_checkpoint
from everyday import everyday

from qwen35_mlx.convert import convert
from qwen35_mlx.model.cache import (
    ArraysCache,
    KVCache,
    cached_tokens,
    restore,
    snapshot,
)
from qwen35_mlx.model.loading import load_model


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("cache")
    write_checkpoint(folder / "src", moe=request.param)
    return load_model(convert(folder / "src", folder / "out", dtype="float32"))[0]


IDS = mx.array(np.random.default_rng(0).integers(VOCAB, size=(1, 300)))


def read(model: Any, cache: list[Any], start: int, end: int) -> np.ndarray:
    return np.array(model(IDS[:, start:end], cache=cache))


# 256 is the step by which the arrays of a KVCache grow.
@pytest.mark.parametrize(
    ("point", "end"), everyday([(1, 2), (20, 21), (20, 90), (255, 258), (256, 300)], 0, 3)
)
def test_what_is_read_after_a_restore_is_as_if_never_read_before(
    model: Any, point: int, end: int
) -> None:
    cache = model.make_cache()
    read(model, cache, 0, point)
    kept = snapshot(cache, point)
    expected = read(model, cache, point, end)
    for detour in (1, 30):
        restore(cache, kept)
        assert cached_tokens(cache) == point
        read(model, cache, 0, detour)
        restore(cache, kept)
        np.testing.assert_array_equal(read(model, cache, point, end), expected)


def test_restoring_an_empty_cache_empties_it(model: Any) -> None:
    cache = model.make_cache()
    kept = snapshot(cache, 0)
    expected = read(model, cache, 0, 10)
    restore(cache, kept)
    assert cached_tokens(cache) == 0
    np.testing.assert_array_equal(read(model, cache, 0, 10), expected)


def test_an_older_snapshot_stays_good_after_a_younger_one(model: Any) -> None:
    cache = model.make_cache()
    read(model, cache, 0, 10)
    older = snapshot(cache, 10)
    expected = read(model, cache, 10, 30)
    younger = snapshot(cache, 30)
    read(model, cache, 30, 50)
    restore(cache, younger)
    restore(cache, older)
    np.testing.assert_array_equal(read(model, cache, 10, 30), expected)


def test_entries_follow_the_layers(model: Any) -> None:
    cache = model.make_cache()
    assert [type(entry) for entry in cache] == [ArraysCache, KVCache] * 2
    assert cached_tokens(cache) == 0
    read(model, cache, 0, 7)
    assert cached_tokens(cache) == 7
    # 2 key heads of 16, 4 value heads of 32: [B, kernel - 1, channels] and [B, Hv, Dv, Dk].
    assert cache[0][0].shape == (1, 3, 2 * 2 * 16 + 4 * 32)
    assert cache[0][1].shape == (1, 4, 32, 16)
    assert cache[0][1].dtype == mx.float32


def test_a_batch_reads_each_row_as_if_alone(model: Any) -> None:
    cache = model.make_cache([3, 0])
    pads, short, long, last = mx.split(IDS[:, :19], [3, 9, 18], axis=1)
    rows = mx.concatenate([mx.concatenate([pads, short], axis=1), long])
    together = [model(rows, cache=cache), model(mx.concatenate([last, last]), cache=cache)]
    for row, ids in enumerate([short, long]):
        alone = model.make_cache()
        for batch, part in zip(together, [ids, last], strict=True):
            single = model(part, cache=alone)
            np.testing.assert_allclose(batch[row, -1], single[0, -1], atol=2e-4)
