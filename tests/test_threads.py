"""Arrays cross threads evaluated, and only two threads of the program use MLX.

MLX gives each thread streams of its own, on the CPU as on a GPU, and raises where a lazy array of
one thread is evaluated in another: that these tests pass here is a check of Metal, too.
"""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import qwen35_mlx
from qwen35_mlx import Chat
from qwen35_mlx.engine.decode import decode
from qwen35_mlx.engine.prompt_cache import PromptCache
from qwen35_mlx.engine.sampler import Sampler
from qwen35_mlx.model.language import Model
from qwen35_mlx.sampling import SamplingParams

GREEDY: dict[str, Any] = dict(max_tokens=12, sampling={"temperature": 0.0})


def in_another_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        mx.clear_streams()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def ask(chat: Chat, text: str) -> str:
    return "".join(piece.text for piece in chat.send(text))


@pytest.mark.slow
def test_what_one_thread_leaves_another_can_use(converted_demo: Path, tmp_path: Path) -> None:
    questions = ["Who are you?", "What is the capital of France?", "And of Italy?"]
    chat = in_another_thread(lambda: Chat(*qwen35_mlx.load(converted_demo), **GREEDY))
    alone = Chat(chat.model, chat.tokenizer, **GREEDY)
    expected = [ask(alone, question) for question in questions]
    answers = [in_another_thread(lambda: ask(chat, questions[0]))]
    chat.start_reading_ahead()
    chat.stop_reading_ahead(wait_for_end=True)
    answers.append(ask(chat, questions[1]))
    # Read from a file in one thread, read ahead in the background, continued in a third.
    chat.save(tmp_path / "chat.json")
    later = Chat(chat.model, chat.tokenizer, **GREEDY)
    in_another_thread(lambda: later.load(tmp_path / "chat.json"))
    later.start_reading_ahead()
    later.stop_reading_ahead(wait_for_end=True)
    answers.append(in_another_thread(lambda: ask(later, questions[2])))
    assert answers == expected


@pytest.mark.parametrize("copied", [False, True])
def test_what_an_abandoned_answer_leaves_is_evaluated(demo: Any, copied: bool) -> None:
    def abandoned() -> PromptCache:
        cache = PromptCache(demo[0])
        hidden = cache.read([5, 6, 7])
        assert hidden is not None
        steps = decode(cache, hidden, Sampler(SamplingParams(), mx.array([5, 6, 7])), 9)
        next(steps)
        steps.close()
        return cache.fork(len(cache.ids)) if copied else cache

    cache = in_another_thread(abandoned)
    mx.eval([entry.state for entry in cache.entries])


@pytest.mark.slow
def test_mlx_runs_in_the_callers_thread_and_the_one_in_the_background(
    demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()

    def recording(run: Callable[..., None]) -> Callable[..., None]:
        def recorded(*arrays: Any) -> None:
            threads.add(threading.current_thread())
            run(*arrays)

        return recorded

    for name in ("eval", "async_eval"):
        monkeypatch.setattr(mx, name, recording(getattr(mx, name)))
    chats = [Chat(*demo, **GREEDY) for _ in range(2)]
    for chat in chats:
        ask(chat, "Who are you?")
        chat.start_reading_ahead()
    for chat in chats:
        chat.stop_reading_ahead(wait_for_end=True)
        ask(chat, "Why?")
    other = threads - {threading.current_thread()}
    assert len(threads) == 2 and {t.name for t in other} == {"qwen35-mlx-background"}


def test_a_lazy_array_of_another_thread_is_refused(demo: Any) -> None:
    """What the tests of this file rest on."""
    model: Model = demo[0]
    hidden = in_another_thread(lambda: model.trunk(mx.array([[1, 2]]), model.make_cache()))
    with pytest.raises(RuntimeError, match="Stream"):
        mx.eval(hidden)


@pytest.mark.slow
def test_a_program_that_ends_while_it_reads_ahead_is_not_aborted(converted_demo: Path) -> None:
    program = f"""
import mlx.core as mx
import qwen35_mlx
from qwen35_mlx.engine.background import BackgroundJob
from threading import Event

model, tokenizer = qwen35_mlx.load({str(converted_demo)!r})
started = Event()

def job(should_stop):
    cache = model.make_cache()
    while not should_stop():
        mx.eval(model.trunk(mx.array([[1] * 32]), cache))
        started.set()

BackgroundJob().start(job)
assert started.wait(30)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
