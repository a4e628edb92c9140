"""The server's cache on disk: it survives kills, damage and a stop, and makes nobody wait."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen35_mlx.engine import reading
from qwen35_mlx.engine.prefix_store import PrefixStore
from qwen35_mlx.engine.requests import Done, Request
from qwen35_mlx.engine.scheduler import Engine
from qwen35_mlx.engine.segments import Segments
from qwen35_mlx.sampling import SamplingParams

SYSTEM = {"role": "system", "content": "You are an agent with tools and rules. " * 8}
FIRST, SECOND = "What is the capital of France?", "And of Italy?"


@pytest.fixture
def start(demo: Any, tmp_path: Path) -> Iterator[Callable[[], Engine]]:
    engines: list[Engine] = []

    def started() -> Engine:
        model, tokenizer = demo
        store = PrefixStore(model, disk=Segments(tmp_path / "cache", model))
        engines.append(Engine(model, tokenizer, store=store))
        engines[-1].start()
        return engines[-1]

    yield started
    for engine in engines:
        engine.stop()


def ask(engine: Engine, messages: list[dict[str, str]], **options: Any) -> Done:
    options = {"params": SamplingParams(), "max_tokens": 12, "enable_thinking": False} | options
    (*_, end) = engine.submit(Request(messages=messages, **options)).events()
    assert isinstance(end, Done), end
    return end


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def saved(engine: Engine) -> None:
    end = time.monotonic() + 60
    while not engine.store.is_saved and time.monotonic() < end:
        time.sleep(0.005)
    assert engine.store.is_saved


def test_another_process_goes_on_where_a_killed_one_was(start: Any) -> None:
    engine = start()
    messages = [SYSTEM, user(FIRST)]
    ask(engine, messages)
    # Written as soon as nobody waits: nothing is left to do for a stop that does not come.
    saved(engine)
    messages += [{"role": "assistant", "content": "Paris."}, user(SECOND)]
    warm = ask(engine, messages).usage
    cold = ask(start(), messages).usage
    assert cold.cached_tokens == warm.cached_tokens > cold.prompt_tokens / 2
    # Another conversation has the beginning that all share.
    other = ask(start(), [SYSTEM, user("Who are you?")]).usage
    assert other.cached_tokens > other.prompt_tokens / 2


@pytest.mark.slow
def test_a_stop_saves_what_a_client_left_in_the_midst_of_its_prompt(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "FIRST_PIECE_TOKENS", 64)
    monkeypatch.setattr(reading.Pieces, "record", lambda *_: None)
    read_piece = reading.Reading.read_piece

    def left(self: Any, *arguments: Any) -> Any:
        hidden = read_piece(self, *arguments)
        if self.position >= 3 * 64:
            self.ticket.cancel()
        return hidden

    engine = start()
    messages = [user("word and other things " * 60)]
    with monkeypatch.context() as patch:
        patch.setattr(reading.Reading, "read_piece", left)
        (*_, end) = engine.submit(Request(messages=messages, max_tokens=4)).events()
        assert isinstance(end, Done) and end.finish_reason == "cancelled"
        engine.stop()
    again = ask(start(), messages, enable_thinking=None).usage
    assert again.cached_tokens == 3 * 64 < again.prompt_tokens


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_harms_no_answer(
    start: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").touch()
    engine = start()
    assert ask(engine, [SYSTEM, user(FIRST)]).finish_reason in ("stop", "length")
    saved(engine)
    assert "cannot be saved" in caplog.text
    assert ask(engine, [SYSTEM, user(FIRST)]).usage.cached_tokens > 0


@pytest.mark.slow
def test_a_server_that_was_killed_answers_the_next_turn_from_its_cache(
    converted_demo: Path, tmp_path: Path
) -> None:
    from server_process import ours

    options = ("--cache-dir", str(tmp_path / "cache"))
    messages: list[Any] = [SYSTEM, user(FIRST)]
    chat = "/v1/chat/completions"
    with ours(converted_demo, *options) as server:
        answer = server.post(chat, {"messages": messages, "temperature": 0, "max_tokens": 20})
        end = time.monotonic() + 60
        while not list((tmp_path / "cache").glob("*.states.*")) and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(1)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    messages += [answer["choices"][0]["message"], user(SECOND)]
    with ours(converted_demo, *options) as server:
        usage = server.post(chat, {"messages": messages, "max_tokens": 4})["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] / 2
