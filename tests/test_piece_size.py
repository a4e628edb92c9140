"""Pieces of a prompt take about as long as they may."""

import time
from typing import Any

import mlx.core as mx
import pytest

from qwen35_mlx.engine import prompt_cache
from qwen35_mlx.engine.prompt_cache import PieceSize


def test_a_piece_has_what_is_read_in_its_time_and_never_none() -> None:
    size = PieceSize()
    assert size.next(1.0) == 2048 and size.next(1.0, 256) == 256
    # Too short to tell a speed.
    size.record(1, 5.0)
    assert size.next(1.0, 256) == 256
    size.record(256, 1.0)
    assert (size.next(1.0), size.next(2.1), size.next(0.01), size.next(100)) == (256, 512, 64, 2048)
    for _ in range(20):
        size.record(256, 2.0)
    assert size.next(1.0) == 128


def test_a_slow_machine_reads_in_short_pieces_so_that_a_stop_is_obeyed_soon(
    demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, now, sizes = prompt_cache.PromptCache(demo[0]), [0.0], list[int]()

    def slow(piece: list[int], *_: Any) -> Any:
        sizes.append(len(piece))
        now[0] += len(piece) / 10
        cache._ids += piece
        return mx.zeros((1, 1, 4))

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(cache, "_read_piece", slow)
    cache.read([5] * 500, step_size=200)
    assert sizes == [200, 128, 128, 44]
