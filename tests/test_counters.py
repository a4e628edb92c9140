"""The counters of the engine, which the server shows as metrics."""

from typing import Any

import pytest

from qwen35_mlx.engine.requests import Done, Request, Token
from qwen35_mlx.engine.row import Row
from qwen35_mlx.engine.scheduler import Engine
from qwen35_mlx.engine.speculate import Drafter
from qwen35_mlx.sampling import SamplingParams
from qwen35_mlx.server.models import GAUGES


def request(ids: list[int], **options: Any) -> Request:
    given = dict(params=SamplingParams(), ignore_eos=True, stop_loops=False)
    return Request(prompt=ids, **given | options)  # type: ignore[arg-type]


def test_what_two_requests_took_is_counted(demo: Any) -> None:
    model, tokenizer = demo
    engine = Engine(model, tokenizer)
    assert engine.stats() == dict(running=0, queued=0, rows=0, cached_points=0, cache_bytes=0)
    ids, seen, waited = [*range(10, 42)], [], []
    for _, event in engine.answer([request(ids, max_tokens=2, n=2), request(ids, max_tokens=3)]):
        if isinstance(event, Token):
            seen.append(engine.stats())
        if isinstance(event, Done):
            waited.append(event.usage.queue_seconds)
    assert waited and min(waited) > 0
    # Of three rows two end earlier.
    assert max(s["rows"] for s in seen) == 3 and seen[-1]["rows"] <= 1
    assert max(s["running"] for s in seen) == 2 and max(s["queued"] for s in seen) <= 1
    found = engine.stats()
    assert (found["prompt_tokens"], found["generated_tokens"]) == (64, 7)
    assert found["prefilled_tokens"] == 64 - found["cached_tokens"]
    assert found["finished_length"] == 3 and found["draft_tokens"] == 0
    assert 2 <= found["decode_steps"] <= 6
    assert found["decode_seconds"] > 0 and found["prefill_seconds"] > 0
    assert (found["running"], found["queued"], found["rows"]) == (0, 0, 0)
    assert found["cached_points"] == engine.store.num_snapshots > 0
    assert found["cache_bytes"] == engine.store.nbytes > 0
    # What does not only grow is a gauge.
    assert {"running", "queued", "rows", "cached_points", "cache_bytes"} <= set(GAUGES)


def test_a_row_feeds_the_mtp_layer_again_when_it_is_alone(
    demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside others it does not; without that layer's keys and values, drafts would be worse."""
    step, alone = Row.speculative_step, []

    def spied(row: Row, drafter: Drafter) -> Any:
        found = step(row, drafter)
        alone.append((drafter.uses_mtp, row.cache.feeds_mtp))
        return found

    monkeypatch.setattr(Row, "speculative_step", spied)
    requests = [request([*range(10, 42)], max_tokens=n, draft="mtp") for n in (3, 8)]
    list(Engine(*demo).answer(requests))
    assert set(alone) == {(True, True)} and len(alone) < 8


def test_a_request_that_fails_is_counted_and_leaves_nothing(
    demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise ValueError("gone")

    engine = Engine(*demo)
    monkeypatch.setattr(engine, "_begin", fail)
    for number, ids in enumerate(([5, 6], [7]), 1):
        with pytest.raises(ValueError, match="gone"):
            list(engine.answer([request(ids)]))
        assert engine.stats()["failed"] == number
    assert engine.stats()["running"] == engine.stats()["cached_points"] == 0
