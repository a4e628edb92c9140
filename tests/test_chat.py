"""A conversation: equal to one begun afresh, read once, and whole after every accident."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday

from qwen35_mlx import Chat, generate
from qwen35_mlx.engine import decode as decode_module
from qwen35_mlx.errors import PromptError, Qwen35Error
from qwen35_mlx.prompt import encode_messages

FRANCE, WHO, HOT = "What is the capital of France?", "Who are you?", "What is the opposite of hot?"


@pytest.fixture
def chat(demo: Any) -> Chat:
    return Chat(*demo, max_tokens=30, sampling={"temperature": 0.0})


def ask(chat: Chat, text: str) -> str:
    return "".join(piece.text for piece in chat.send(text) if piece.kind == "answer")


def afresh(chat: Chat) -> Chat:
    """The same conversation before its last turn, with nothing in the cache."""
    return Chat(
        chat.model,
        chat.tokenizer,
        enable_thinking=chat.enable_thinking,
        max_tokens=chat.max_tokens,
        sampling=chat.sampling,
        messages=chat.messages[:-2],
    )


def test_thought_and_answer_come_apart(chat: Chat) -> None:
    pieces = list(chat.send(FRANCE))
    kinds = [piece.kind for piece in pieces]
    assert kinds == sorted(kinds, reverse=True) and set(kinds) == {"thought", "answer"}
    assert "Paris" in "".join(p.text for p in pieces if p.kind == "answer")
    assert not any("think>" in p.text or "<|" in p.text for p in pieces)
    user, assistant = chat.messages
    assert user == {"role": "user", "content": FRANCE}
    raw = generate(chat.model, chat.tokenizer, [user], temperature=0.0)
    thought, _, answer = raw.partition("\n</think>\n\n")
    assert assistant == {"role": "assistant", "content": answer, "reasoning_content": thought}
    assert chat.stats.finish_reason == "stop"


@pytest.mark.parametrize("enable_thinking", [None, True, False])
def test_thinking_follows_the_setting(demo: Any, enable_thinking: bool | None) -> None:
    chat = Chat(*demo, enable_thinking=enable_thinking, sampling={"temperature": 0.0})
    kinds = {piece.kind for piece in chat.send(FRANCE)}
    assert ("thought" in kinds) == (enable_thinking is not False)
    assert ("reasoning_content" in chat.messages[1]) == (enable_thinking is not False)


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Every row of logits that a token is drawn from: a wrong cache need not change the text."""
    probabilities, rows = decode_module.log_probabilities, []

    def record(logits: mx.array) -> mx.array:
        rows.append(np.array(logits[0]))
        return probabilities(logits)

    monkeypatch.setattr(decode_module, "log_probabilities", record)
    return rows


def assert_as_if_afresh(chat: Chat, question: str, logits: list[np.ndarray]) -> None:
    """Ask, and ask again in the same conversation with an empty cache; the first tokens show it."""
    chat.max_tokens = 8
    logits.clear()
    ask(chat, question)
    ours = list(logits)
    logits.clear()
    fresh = afresh(chat)
    ask(fresh, question)
    assert fresh.messages == chat.messages
    np.testing.assert_allclose(ours, logits, atol=1e-3)


@pytest.mark.parametrize("enable_thinking", everyday([None, False], 0))
def test_later_turns_equal_a_conversation_begun_afresh(
    demo: Any, logits: list[np.ndarray], enable_thinking: bool | None
) -> None:
    chat = Chat(
        *demo, enable_thinking=enable_thinking, max_tokens=30, sampling={"temperature": 0.0}
    )
    for question in (FRANCE, WHO, HOT):
        assert_as_if_afresh(chat, question, logits)


@pytest.mark.slow
def test_the_repetition_penalty_counts_every_turn(demo: Any) -> None:
    """Not only the tokens that are read anew."""
    options: dict[str, Any] = dict(max_tokens=20, temperature=0.0)
    chat = Chat(*demo, enable_thinking=False, max_tokens=20)
    chat.sampling = {"temperature": 0.0, "repetition_penalty": 3.0}
    for question in (FRANCE, WHO, FRANCE):
        said = ask(chat, question)
    raw = generate(
        *demo, chat.messages[:-1], enable_thinking=False, repetition_penalty=3.0, **options
    )
    assert said == raw
    assert said != generate(*demo, chat.messages[:-1], enable_thinking=False, **options)


def test_a_turn_reads_only_what_is_new(chat: Chat) -> None:
    ask(chat, FRANCE)
    first = chat.stats
    assert first.prefilled_tokens == first.prompt_tokens
    history = encode_messages(chat.tokenizer, chat.messages[:1], add_generation_prompt=False)
    ask(chat, WHO)
    second = chat.stats
    assert second.prefilled_tokens == second.prompt_tokens - len(history)
    assert second.prompt_tokens > first.prompt_tokens
    assert min(second.prefill_tps, second.decode_tps, second.peak_memory_gb) > 0
    assert second.generation_tokens > 5


def test_a_system_prompt_is_part_of_every_turn(demo: Any) -> None:
    chat = Chat(*demo, system="Answer briefly.", max_tokens=3)
    ask(chat, FRANCE)
    num_first = chat.stats.prompt_tokens
    assert chat.messages[0] == {"role": "system", "content": "Answer briefly."}
    bare = Chat(*demo, max_tokens=3)
    ask(bare, FRANCE)
    assert num_first > bare.stats.prompt_tokens


@pytest.mark.parametrize("num_pieces", everyday([0, 1, 12], 1))
@pytest.mark.parametrize("interrupt", everyday([False, True], 1))
def test_what_was_said_stays_when_an_answer_is_stopped(
    chat: Chat, logits: list[np.ndarray], num_pieces: int, interrupt: bool
) -> None:
    ask(chat, HOT)
    pieces = chat.send(FRANCE)
    shown = [next(pieces) for _ in range(num_pieces)]
    if interrupt:
        with pytest.raises(KeyboardInterrupt):
            pieces.throw(KeyboardInterrupt)
    else:
        pieces.close()
    if num_pieces == 0:
        # Nothing was said yet, the question neither.
        assert len(chat.messages) == 2
    else:
        said = {
            kind: "".join(p.text for p in shown if p.kind == kind) for kind in ("thought", "answer")
        }
        assert chat.messages[2] == {"role": "user", "content": FRANCE}
        assert chat.messages[3]["content"] == said["answer"].strip()
        assert chat.messages[3].get("reasoning_content", "") == said["thought"].strip()
    assert_as_if_afresh(chat, HOT, logits)
    assert chat.stats.prefilled_tokens < chat.stats.prompt_tokens


@pytest.mark.slow
def test_an_interrupt_inside_a_step_keeps_what_was_said(
    chat: Chat, logits: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, calls = type(chat.model).trunk, 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        return trunk(*args, **options)

    monkeypatch.setattr(type(chat.model), "trunk", interrupted)
    shown = []
    with pytest.raises(KeyboardInterrupt):
        shown += chat.send(FRANCE)
    assert chat.messages[1]["reasoning_content"]
    assert_as_if_afresh(chat, HOT, logits)


def test_an_interrupt_while_the_prompt_is_read_takes_the_message_back(
    chat: Chat, logits: list[np.ndarray]
) -> None:
    ask(chat, WHO)
    before = list(chat.messages)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(chat.send(FRANCE, progress=interrupt))
    assert chat.messages == before
    assert_as_if_afresh(chat, HOT, logits)


@pytest.mark.slow
def test_an_interrupt_while_another_conversation_is_read_forgets_the_first(
    chat: Chat, logits: list[np.ndarray]
) -> None:
    ask(chat, FRANCE)
    first = list(chat.messages)
    chat.messages.clear()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(chat.send(WHO, progress=interrupt))
    chat.messages += first
    assert_as_if_afresh(chat, HOT, logits)


@pytest.mark.slow
def test_a_refused_prompt_takes_the_message_back(chat: Chat, logits: list[np.ndarray]) -> None:
    ask(chat, WHO)
    before, stats = list(chat.messages), chat.stats
    for text, what in (("word " * 5000, "longer than the model's"), ("\udce9", "not valid")):
        with pytest.raises(PromptError, match=what):
            list(chat.send(text))
        assert chat.messages == before and chat.stats is stats
    assert_as_if_afresh(chat, HOT, logits)
    assert chat.stats.prefilled_tokens < chat.stats.prompt_tokens


@pytest.mark.parametrize("wrong", everyday([{"temperature": -1}, {"top_q": 1}, {"seed": -1}], 0, 1))
def test_a_refused_setting_takes_the_message_back(demo: Any, wrong: dict[str, Any]) -> None:
    chat = Chat(*demo, sampling=wrong)
    with pytest.raises(Qwen35Error):
        list(chat.send(FRANCE))
    assert chat.messages == []
    chat.sampling = {"temperature": 0.0}
    assert "Paris" in ask(chat, FRANCE)


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"max_tokens": -3}, {"think_budget": -1}])
def test_numbers_of_tokens_below_one_are_refused(demo: Any, wrong: dict[str, int]) -> None:
    chat = Chat(*demo, **wrong)  # type: ignore[arg-type]
    with pytest.raises(Qwen35Error, match="is not usable"):
        list(chat.send(FRANCE))
    assert chat.messages == []


END_WHILE_READING = """
import sys, time
from qwen35_mlx import Chat, load
chat = Chat(*load(sys.argv[1]))
list(chat.send("What is the capital of France?"))
chat.start_reading_ahead()
time.sleep(0.01)
"""


@pytest.mark.slow
def test_a_script_may_end_while_it_reads_ahead(converted_demo: Path) -> None:
    for _ in range(2):
        command = [sys.executable, "-c", END_WHILE_READING, str(converted_demo)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_conversation(demo: Any) -> None:
    def talk() -> list[dict[str, str]]:
        chat = Chat(*demo, max_tokens=15, sampling={"temperature": 5.0, "top_k": 0, "seed": 3})
        for question in (FRANCE, WHO):
            ask(chat, question)
        return chat.messages

    assert talk() == talk()


@pytest.mark.slow
def test_messages_edited_between_turns_are_read_again(chat: Chat, logits: list[np.ndarray]) -> None:
    ask(chat, FRANCE)
    chat.messages[0]["content"] = WHO
    assert_as_if_afresh(chat, HOT, logits)
    assert chat.stats.prefilled_tokens == chat.stats.prompt_tokens


def test_a_template_without_thoughts_works(demo: Any, scripted: Callable[..., Any]) -> None:
    tokenizer = demo[1]
    ids = tokenizer.encode("Yes.")
    chat = Chat(scripted([*ids, tokenizer.eos_token_id]), tokenizer, enable_thinking=False)
    assert list(chat.send("Ready?"))
    assert chat.messages[1] == {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(("asked_before", "num_written"), [(0, 0), (2, 2), (9, 4)])
def test_writing_in_the_background_stops_between_two_pieces(
    asked_before: int, num_written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, written = iter([False] * asked_before), list[int]()

    def write_cache(chat: Chat) -> Iterator[None]:
        try:
            for piece in range(4):
                written.append(piece)
                yield None
        finally:
            written.append(-1)

    monkeypatch.setattr(Chat, "write_cache", write_cache)
    monkeypatch.setattr(Chat, "read_ahead", lambda chat, should_stop: None)
    Chat._work_ahead(object.__new__(Chat), lambda: next(said, True))
    # And it closes what it wrote to, if it has begun.
    assert written == [*range(num_written)] + [-1] * (num_written > 0)


@pytest.mark.parametrize("thinking", everyday([False, True], 0))
def test_every_answer_is_valid_for_the_schema(demo: Any, thinking: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "sure": {"type": "boolean"}},
        "required": ["city", "sure"],
    }
    settings: dict[str, Any] = {"sampling": {"temperature": 0.0}, "enable_thinking": thinking}

    def is_valid(text: str) -> bool:
        said = json.loads(text)
        right = said["city"] in ("Paris", "Rome") and isinstance(said["sure"], bool)
        return right and list(said) == ["city", "sure"]

    chats = [Chat(*demo, schema=schema, draft=draft, **settings) for draft in ("off", "auto")]
    for question in (FRANCE, HOT):
        said = [ask(chat, question) for chat in chats]
        assert said[0] == said[1] and is_valid(said[0])
        for chat in chats:
            chat.read_ahead()
    again = "".join(piece.text for piece in chats[0].regenerate() if piece.kind == "answer")
    assert again == said[0]
    # A thought that is closed early, and a turn without the schema.
    chats[0].think_budget = 2
    assert is_valid(ask(chats[0], WHO))
    chats[0].schema = None
    assert ask(chats[0], WHO).startswith("I am")
    # A schema that cannot be used changes nothing.
    chats[1].schema, before = {"type": "strin"}, list(chats[1].messages)
    with pytest.raises(Qwen35Error, match="not usable at"):
        list(chats[1].send(WHO))
    assert chats[1].messages == before


def test_nothing_is_read_ahead_beyond_the_context(demo: Any, scripted: Callable[..., Any]) -> None:
    said = [{"role": "user", "content": FRANCE}, {"role": "assistant", "content": "Paris. " * 40}]
    read = []
    for context_length in (64, 4096):
        chat = Chat(scripted([5], context_length=context_length), demo[1], messages=said)
        chat.read_ahead()
        read.append(chat._read_ahead_tokens)
    assert read[0] == 0 < read[1]
