"""Adapters by request: each row its own, in one server, and no cache entry for two of them."""

import copy
from pathlib import Path
from typing import Any

import pytest
from server.fake_engine import FakeEngine
from server.running import MODEL, Running
from test_adapters import random_adapter

import qwen35_mlx
from qwen35_mlx.checkpoint.adapter import write_adapter
from qwen35_mlx.engine import exact_rows
from qwen35_mlx.engine.prefix_store import PrefixStore
from qwen35_mlx.engine.requests import Done, Request, Started, Token
from qwen35_mlx.engine.scheduler import Engine
from qwen35_mlx.engine.segments import Segments
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.model.adapters import with_adapter
from qwen35_mlx.sampling import SamplingParams

QUESTION = "What is the capital of France? Say nothing else, and do not ask me anything. "


@pytest.fixture(scope="module")
def engine(demo: tuple[Any, Any], converted_demo: Path) -> Any:
    of = {name: random_adapter(converted_demo, seed=i, size=3.0) for i, name in enumerate("ab")}
    engine = Engine(*demo, adapters={name: with_adapter(demo[0], of[name]) for name in of})
    engine.adapters_of_test = of  # type: ignore[attr-defined]
    engine.start()
    yield engine
    engine.stop()


def ask(adapter: str, **options: Any) -> Request:
    messages = [{"role": "user", "content": QUESTION}]
    settings = dict(params=SamplingParams(), max_tokens=4, stop_loops=False, ignore_eos=True)
    return Request(messages=messages, adapter=adapter, **settings | options)


def tokens_and_cached(ticket: Any) -> tuple[list[int], int]:
    events = list(ticket.events())
    assert isinstance(events[-1], Done)
    cached = next(e.cached_tokens for e in events if isinstance(e, Started))
    return [e.token for e in events if isinstance(e, Token)], cached


def answers(engine: Engine, requests: list[Request]) -> list[list[int]]:
    """All are decoded together."""
    found: list[list[int]] = [[] for _ in requests]
    for place, event in engine.answer(requests):
        if isinstance(event, Token):
            found[place].append(event.token)
    return found


@pytest.mark.slow
def test_rows_of_several_adapters_are_answered_as_by_models_of_their_own(
    engine, demo, converted_demo, tmp_path
):
    order = ["a", "", "b", "a"]
    together = Engine(*demo, adapters={name: engine.models[name] for name in "ab"})
    found = answers(together, [ask(name) for name in order])
    write_adapter(tmp_path, engine.adapters_of_test["a"])
    with_a = Engine(*qwen35_mlx.load(converted_demo, adapter=tmp_path))
    assert [found[0], found[3]] == answers(with_a, [ask("")]) * 2
    assert [found[1]] == answers(Engine(*demo), [ask("")])
    assert len({tuple(tokens) for tokens in found}) == 3


@pytest.mark.slow
def test_two_adapters_in_one_server_never_share_a_cache_entry(engine):
    first = {name: tokens_and_cached(engine.submit(ask(name, seed=1))) for name in ("", "a", "b")}
    again = {name: tokens_and_cached(engine.submit(ask(name, seed=1))) for name in ("b", "", "a")}
    assert {name: tokens for name, (tokens, _) in again.items()} == {
        name: tokens for name, (tokens, _) in first.items()
    }
    assert all(cached > 20 for _, cached in again.values())
    engine.store.caches = []
    assert [tokens_and_cached(engine.submit(ask(name)))[1] for name in ("a", "b", "")] == [0] * 3


def test_a_thought_of_one_adapter_is_not_put_into_the_prompts_of_another(engine):
    """Clients that drop thoughts get them restored, from the same adapter alone."""
    answers = engine._preparer.answers
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
    answers.remember(answers.restored(said[:1], "a")[1], "x", "a thought", [], False)
    assert answers.restored(said, "a")[0][1]["reasoning_content"] == "a thought"
    assert answers.restored(said, "b")[0] == answers.restored(said, "")[0] == said


def test_an_unknown_adapter_is_refused(engine):
    with pytest.raises(Qwen35Error, match="no such adapter") as raised:
        engine.submit(ask("c"))
    assert "a, b" in str(raised.value)


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, ""),
        ({"model": MODEL}, ""),
        ({"model": f"{MODEL}:fine"}, "fine"),
        ({"adapters": "fine"}, "fine"),
        ({"model": MODEL, "adapters": "other"}, "other"),
    ],
)
def test_a_request_names_its_adapter(adapter_server, fields, expected):
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    answer = adapter_server.post("/v1/chat/completions", body)
    assert answer.status == 200, answer.text
    assert adapter_server.engine.tickets[-1].request.adapter == expected


def test_adapters_are_listed_and_others_refused(adapter_server):
    names = [model["id"] for model in adapter_server.get("/v1/models").json["data"]]
    assert names == [MODEL, f"{MODEL}:fine", f"{MODEL}:other"]
    assert adapter_server.get(f"/v1/models/{MODEL}:fine").json["id"] == f"{MODEL}:fine"
    tags = adapter_server.get("/api/tags").json["models"]
    assert [model["name"] for model in tags] == names
    body = {"messages": [{"role": "user", "content": "hi"}]}
    wrong = ({"model": f"{MODEL}:none"}, {"adapters": "../secret"}, {"adapters": "none"})
    for fields in (*wrong, {"model": f"{MODEL}:fine", "adapters": "other"}):
        assert adapter_server.post("/v1/chat/completions", body | fields).status in (400, 404)


@pytest.fixture(scope="module")
def adapter_server(demo: tuple[Any, Any]) -> Any:
    tokenizer = demo[1]
    server = Running(FakeEngine(tokenizer), tokenizer, adapters=["fine", "other"])
    yield server
    server.stop()


@pytest.mark.parametrize("given", ["DIR", "a/b=DIR", "=DIR", "latest=DIR"])
def test_an_adapter_of_a_server_needs_a_plain_name(run_cli, given):
    result = run_cli("serve", "--demo", "--adapter-path", given)
    assert result.exit_code == 1 and "NAME=DIR" in result.stderr


def test_drafts_with_an_adapter_are_not_those_that_the_model_alone_reads_exactly(
    demo, converted_demo, monkeypatch
):
    asked = []
    monkeypatch.setattr(exact_rows, "runs_on_cpu", lambda: False)
    monkeypatch.setattr(exact_rows, "_exact_rows_of", lambda model: asked.append(model) or 8)
    model = copy.copy(demo[0])
    exact_rows.exact_rows(model)
    twin = with_adapter(model, random_adapter(converted_demo))
    for each in (twin, twin, model):
        exact_rows.exact_rows(each)
    assert asked == [model, twin]


def test_answers_in_the_callers_thread_end_where_a_disk_keeps_what_was_read(demo, tmp_path):
    disk = Segments(tmp_path, demo[0])
    engine = Engine(*demo, store=PrefixStore(demo[0], disk=disk))
    assert len(answers(engine, [ask("")])[0]) == 4
    assert disk.nbytes > 0


def test_requests_get_the_memory_that_adapters_leave(engine, demo):
    left = [e._admission._left() for e in (Engine(*demo, store=engine.store), engine)]
    assert left[0] - left[1] == sum(found.nbytes for found in engine.adapters_of_test.values()) > 0
