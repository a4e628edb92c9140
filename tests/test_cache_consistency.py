"""Ids and caches agree, whoever looks, and whenever: open iterators, cut answers, shared stores."""

import threading
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday

from qwen35_mlx import Chat
from qwen35_mlx.engine.prefix_store import PrefixStore
from qwen35_mlx.model.language import Model

MAX_DIFFERENCE = 1e-3
FRANCE, WHO, HOT = "What is the capital of France?", "Who are you?", "What is the opposite of hot?"
GREEDY: dict[str, Any] = dict(max_tokens=30, sampling={"temperature": 0.0})
SHORT = GREEDY | dict(max_tokens=8)


def ask(chat: Chat, text: str) -> str:
    return "".join(piece.text for piece in chat.send(text) if piece.kind == "answer")


def assert_consistent(chat: Chat) -> None:
    """What the caches predict next is what a fresh reading of the ids predicts."""
    cache = chat._cache
    assert cache is not None and cache.ids
    fork = cache.fork(len(cache.ids))
    got = chat.model(mx.array([[5]]), cache=fork.entries)[0, -1]
    expected = chat.model(mx.array([[*cache.ids, 5]]))[0, -1]
    np.testing.assert_allclose(np.array(got), np.array(expected), atol=MAX_DIFFERENCE)


@pytest.fixture
def first_logits(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], np.ndarray]:
    """The logits from which the first token of a turn is drawn."""
    head, rows = Model.head, []

    def record(model: Model, hidden: mx.array) -> mx.array:
        row = head(model, hidden)
        rows.append(np.array(row[0, -1]))
        return row

    monkeypatch.setattr(Model, "head", record)

    def first(turn: Any) -> np.ndarray:
        rows.clear()
        next(turn)
        return rows[0]

    return first


@pytest.mark.parametrize("num_pieces", everyday([1, 7, 12], 1))
@pytest.mark.parametrize("memory_bytes", everyday([0, 10**9], 1))
def test_a_turn_begun_while_an_older_iterator_is_open_has_the_right_state(
    demo: Any, first_logits: Any, num_pieces: int, memory_bytes: int
) -> None:
    chat = Chat(*demo, store=PrefixStore(demo[0], memory_bytes), **GREEDY)
    expected = first_logits(Chat(*demo, **GREEDY).send(FRANCE))
    older = chat.send(FRANCE)
    shown = [next(older) for _ in range(num_pieces)]
    newer = chat.regenerate()
    np.testing.assert_allclose(first_logits(newer), expected, atol=MAX_DIFFERENCE)
    # The older iterator has ended, and what it gave was the answer until then.
    assert shown and list(older) == []
    rest = list(newer)
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert "Paris" in chat.messages[1]["content"] and rest
    assert_consistent(chat)


@pytest.mark.parametrize("begin", everyday(["send", "edit", "undo", "ahead", "restart"], 0))
def test_every_call_ends_the_open_iterator_and_keeps_what_it_gave(demo: Any, begin: str) -> None:
    chat = Chat(*demo, **SHORT)
    ask(chat, HOT)
    older = chat.send(FRANCE)
    thought = "".join(next(older).text for _ in range(5))
    if begin == "send":
        ask(chat, WHO)
        assert chat.messages[3]["reasoning_content"] == thought.strip()
        assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 3
    elif begin == "edit":
        list(chat.edit(WHO))
        assert [m["content"] for m in chat.messages[::2]] == [HOT, WHO]
    elif begin == "undo":
        assert chat.undo() == FRANCE and len(chat.messages) == 2
    elif begin == "ahead":
        chat.start_reading_ahead()
        chat.stop_reading_ahead()
        assert chat.messages[3]["reasoning_content"] == thought.strip()
    else:
        chat.restart()
        assert chat.messages == []
    assert list(older) == []


def test_a_conversation_that_is_left_gives_its_memory_back(demo: Any) -> None:
    chat = Chat(*demo, store=PrefixStore(demo[0], memory_bytes=0), **SHORT)
    ask(chat, HOT)
    assert chat.prefixes.caches
    chat.restart()
    assert chat.prefixes.caches == []


def test_snapshots_beyond_the_budget_go_before_the_answer(demo: Any) -> None:
    """While it is written, only the turn's own cache is left."""
    chat = Chat(*demo, store=PrefixStore(demo[0], memory_bytes=0), **SHORT)
    next(turn := chat.send(HOT * 20))
    assert chat.prefixes.caches and chat.prefixes.num_snapshots == 0
    turn.close()


def test_without_an_answer_nothing_is_read_ahead(demo: Any) -> None:
    chat = Chat(*demo, **SHORT)
    chat.read_ahead()
    chat.messages = [{"role": "user", "content": HOT}]
    chat.read_ahead()
    assert chat.prefixes.caches == []


def test_an_abandoned_iterator_ends_at_once(demo: Any) -> None:
    chat = Chat(*demo, **GREEDY)
    for piece in chat.send(FRANCE):
        assert piece.text
        break
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]


@pytest.mark.slow
@pytest.mark.parametrize("memory_bytes", everyday([0, 10**9], 0))
def test_two_chats_on_one_store_do_not_share_half_an_answer(
    demo: Any, first_logits: Any, memory_bytes: int
) -> None:
    store = PrefixStore(demo[0], memory_bytes)
    one, other = (Chat(*demo, store=store, **GREEDY) for _ in range(2))
    expected = first_logits(Chat(*demo, **GREEDY).send(FRANCE))
    open_turn = one.send(FRANCE)
    for _ in range(9):
        next(open_turn)
    np.testing.assert_allclose(first_logits(other.send(FRANCE)), expected, atol=MAX_DIFFERENCE)
    list(open_turn)
    assert "Paris" in one.messages[1]["content"]
    assert_consistent(one)


@pytest.mark.parametrize("max_tokens", everyday([1, 2, 9], 0, 1))
def test_after_an_answer_cut_by_max_tokens_ids_are_those_that_were_read(
    demo: Any, max_tokens: int
) -> None:
    """The last token was given and never read."""
    chat = Chat(*demo, max_tokens=max_tokens, sampling={"temperature": 0.0})
    ask(chat, FRANCE)
    assert chat.stats.finish_reason == "length"
    assert chat._cache is not None
    assert len(chat._cache.ids) == chat.stats.prompt_tokens + max_tokens - 1
    assert_consistent(chat)


def penalised(chat: Chat, monkeypatch: pytest.MonkeyPatch, question: str) -> tuple[set, list]:
    """Ids that the presence penalty counts at the end of a turn, and those of the answer."""
    import qwen35_mlx.chat.conversation as conversation

    made: list[Any] = []

    class Recorded(conversation.Sampler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(conversation, "Sampler", Recorded)
    list(chat.send(question))
    assert chat._cache is not None
    answer = list(chat._cache.ids[chat.stats.prompt_tokens :])
    return set(np.flatnonzero(np.array(made[0]._in_answer)).tolist()), answer


@pytest.mark.parametrize("budget", everyday([3, 5, 8], 1))
def test_a_token_cut_off_by_the_thought_budget_is_not_penalised(
    demo: Any, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """And the forced end of the thought is."""
    sampling = {"temperature": 0.0, "presence_penalty": 0.1}
    chat = Chat(*demo, max_tokens=40, sampling=sampling, think_budget=budget)
    counted, answer = penalised(chat, monkeypatch, FRANCE)
    assert chat.stats.thought_tokens == budget
    end = chat.tokenizer.encode("\n</think>\n\n", add_special_tokens=False)
    assert answer[budget : budget + len(end)] == end
    assert counted == set(answer)


@pytest.mark.slow
def test_take_keeps_the_callers_cache_when_another_knows_more(demo: Any) -> None:
    model = demo[0]
    store = PrefixStore(model)
    owner, other = (type("Owner", (), {})() for _ in range(2))
    long, question = list(range(100, 400)), list(range(400, 450))
    store.take(question, owner=other).read(question)
    current = store.take(long, owner=owner)
    current.read(long)
    assert list(store.take(question, current, owner).ids) == question
    assert not current.in_use
    again = store.take([*long, 7], owner=other)
    assert list(again.ids) == long


@pytest.mark.slow
def test_undo_and_another_question_keep_the_old_branch(demo: Any) -> None:
    chat = Chat(*demo, system="Answer briefly. " * 10, **SHORT)
    ask(chat, FRANCE)
    ask(chat, HOT)
    chat.read_ahead()
    kept = list(chat.messages)
    chat.undo()
    ask(chat, WHO)
    # Back on the branch that was left.
    chat.undo()
    chat.messages = list(kept)
    ask(chat, WHO)
    message = len(chat.tokenizer.encode(WHO, add_special_tokens=False))
    assert chat.stats.prefilled_tokens <= message + 20


def test_all_reading_ahead_shares_one_thread(demo: Any) -> None:
    # The threads themselves, because another one may have the same name.
    threads = set()
    chats = [Chat(*demo, **SHORT) for _ in range(2)]
    before = threading.active_count()
    for chat in chats:
        ask(chat, FRANCE)
        for _ in range(3):
            chat.start_reading_ahead()
            threads |= {t for t in threading.enumerate() if "qwen35" in t.name}
            chat.stop_reading_ahead(wait_for_end=True)
    assert len(threads) == 1 and threading.active_count() <= before + 1


CALLS = ["undo", "set_system", "restart", "send", "read_ahead", "drop_oldest", "write_cache"]


@pytest.mark.parametrize("call", everyday(CALLS, 1, 3, 4))
def test_every_call_stops_reading_ahead(demo: Any, call: str) -> None:
    chat = Chat(*demo, **SHORT)
    ask(chat, FRANCE)
    started, stopped = threading.Event(), threading.Event()

    def job(should_stop: Callable[[], bool]) -> None:
        started.set()
        while not should_stop():
            stopped.wait(0.001)
        stopped.set()

    chat.prefixes.background.start(job)
    started.wait()
    calls: dict[str, Callable[[], Any]] = {
        "undo": chat.undo,
        "set_system": lambda: chat.set_system("Be kind."),
        "restart": chat.restart,
        "send": lambda: ask(chat, WHO),
        "read_ahead": chat.read_ahead,
        "drop_oldest": chat.drop_oldest,
        "write_cache": lambda: list(chat.write_cache()),
    }
    calls[call]()
    is_stopped = stopped.is_set()
    chat.stop_reading_ahead()
    assert is_stopped


@pytest.mark.parametrize("is_closed", [False, True])
def test_another_chat_stops_reading_ahead_when_an_open_answer_goes_on(
    demo: Any, is_closed: bool
) -> None:
    """Both on one store: its caches are for one thread at a time."""
    store = PrefixStore(demo[0])
    chat, other = (Chat(*demo, store=store, **SHORT) for _ in range(2))
    answer = chat.send(FRANCE)
    next(answer)
    stopped = threading.Event()

    def job(should_stop: Callable[[], bool]) -> None:
        while not should_stop():
            stopped.wait(0.001)
        stopped.set()

    other.prefixes.background.start(job)
    while not other.prefixes.background._running.running():
        time.sleep(0.001)
    answer.close() if is_closed else next(answer)
    is_stopped = stopped.is_set()
    other.stop_reading_ahead()
    assert is_stopped
