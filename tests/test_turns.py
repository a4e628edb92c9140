"""What a turn may cost, and what else it can be: told again, cut short, answered by tools."""

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday

import qwen35_mlx.chat.conversation
from qwen35_mlx import Chat
from qwen35_mlx.engine.output import Piece
from qwen35_mlx.engine.prefix_store import PrefixStore
from qwen35_mlx.engine.prompt_cache import common_prefix
from qwen35_mlx.engine.sampler import Sampler
from qwen35_mlx.errors import ContextFull, Qwen35Error
from qwen35_mlx.sampling import PRESETS

MAX_DIFFERENCE = 3e-4
SYSTEM = "You answer briefly and you are kind. " * 12
QUESTIONS = ("What is the capital of France?", "Who are you?", "What is the opposite of hot?")
# Qwen3.5's way with tools and thoughts, in short.
TEMPLATE = """
{%- macro turn(role, text) %}
{{- '<|im_start|>' + role + '\n' + text + '<|im_end|>\n' }}
{%- endmacro %}
{%- set last = namespace(user=0) %}
{%- for m in messages if m.role == 'user' %}{% set last.user = messages.index(m) %}{% endfor %}
{%- if tools %}{{ turn('system', tools | tojson) }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > last.user %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}
{%- endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}
{{- '\n\n' if loop.first and m.content else '\n' if not loop.first else '' }}
{{- '<tool_call>\n<function=' + call.function.name + '>\n' }}
{%- for name, value in call.function.arguments | items %}
{{- '<parameter=' + name + '>\n' + value | string + '\n</parameter>\n' }}
{%- endfor %}
{{- '</function>\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{{- turn('user', '<tool_response>\n' + m.content + '\n</tool_response>') }}
{%- else %}{{ turn(m.role, m.content) }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}
"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}


def call_text(*arguments: dict[str, str]) -> str:
    calls = []
    for each in arguments:
        body = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in each.items())
        calls.append(f"<tool_call>\n<function=weather>\n{body}</function>\n</tool_call>")
    return "\n".join(calls)


class Script:
    """Makes a chat's model say given texts, one an answer, and sees every prompt's logits."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.answers: list[list[int]] = []
        self.prompts: list[list[int]] = []
        self.logits: list[np.ndarray] = []
        self.penalties: list[float] = []

    def say(self, *texts: str, end: bool = True) -> None:
        for text in texts:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            self.answers.append([*ids, *([self.tokenizer.eos_token_id] if end else [])])

    def sampler(self) -> type[Sampler]:
        script = self

        class Scripted(Sampler):
            def __init__(self, params: Any, prompt: mx.array, seed: Any = None, *_: Any):
                super().__init__(params, prompt, seed)
                script.prompts.append(prompt.tolist())
                self.left: list[int] | None = None
                self.drawn: dict[int, int] = {}

            def __call__(
                self, logits: mx.array, place: int, drafts: Any = None, forbidden: Any = None
            ) -> mx.array:
                if self.left is None:
                    self.left = script.answers.pop(0)
                    script.logits.append(np.array(logits[0]))
                script.penalties.append(self.params.presence_penalty)
                super().__call__(logits, place, drafts)
                # A place may be drawn for a draft first, and again when it is reached.
                for i in range(place, place + len(logits)):
                    if i not in self.drawn:
                        end = script.tokenizer.eos_token_id
                        self.drawn[i] = self.left.pop(0) if self.left else end
                return mx.array([self.drawn[i] for i in range(place, place + len(logits))])

        return Scripted


@pytest.fixture
def script(demo: Any, monkeypatch: pytest.MonkeyPatch) -> Script:
    made = Script(demo[1])
    monkeypatch.setattr(qwen35_mlx.chat.conversation, "Sampler", made.sampler())
    return made


@pytest.fixture
def tooled(demo: Any) -> tuple[Any, Any]:
    """The demo with a template that has tools."""
    model, tokenizer = demo
    inner = copy.deepcopy(tokenizer._tokenizer)
    inner.chat_template = TEMPLATE
    wrapped = copy.copy(tokenizer)
    object.__setattr__(wrapped, "_tokenizer", inner)
    return model, wrapped


def fresh_logits(model: Any, prompt: list[int]) -> np.ndarray:
    return np.array(model(mx.array([prompt]))[0, -1])


def spoken(pieces: Any, kind: str = "answer") -> str:
    return "".join(p.text for p in pieces if p.kind == kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ahead", "thinking", "num_turns"),
    everyday(
        [(False, False, 5), (False, True, 5), (True, False, 5), (True, True, 5), (True, False, 2)],
        4,
    ),
)
def test_a_turn_reads_what_is_new_and_no_more(
    demo: Any, script: Script, ahead: bool, thinking: bool, num_turns: int
) -> None:
    model, tokenizer = demo
    chat = Chat(model, tokenizer, system=SYSTEM, enable_thinking=thinking)
    known: list[list[int]] = []
    for turn in range(num_turns):
        thought = f"thought {turn} " * 20 + "\n</think>\n\n" if thinking else ""
        script.say(thought + f"Answer {turn} is this one.")
        if ahead:
            chat.start_reading_ahead()
            chat.stop_reading_ahead(wait_for_end=True)
        message = f"Message {turn}. {QUESTIONS[turn % 3]}"
        said = list(chat.send(message))
        assert spoken(said) == f"Answer {turn} is this one."
        prompt = script.prompts[-1]
        new = len(prompt) - max((common_prefix(k, prompt) for k in known), default=0)
        # The opening of the assistant's turn may be read again.
        assert chat.stats.prefilled_tokens <= new + 10
        if ahead and turn:
            num_message = len(tokenizer.encode(message, add_special_tokens=False))
            assert chat.stats.prefilled_tokens <= num_message + 20
            assert chat.stats.read_ahead_tokens > 0
        difference = np.abs(script.logits[-1] - fresh_logits(model, prompt)).max()
        assert difference <= MAX_DIFFERENCE
        known.append([*prompt, *tokenizer.encode(thought + f"Answer {turn} is this one.")])
        if ahead and chat._cache:
            known.append(list(chat._cache.ids))


@pytest.mark.slow
def test_undo_retry_edit_and_other_conversations_read_only_what_changed(
    demo: Any, script: Script
) -> None:
    model, tokenizer = demo
    store = PrefixStore(model)
    chats = [Chat(model, tokenizer, system=SYSTEM, store=store) for _ in range(3)]
    num_answer = 12

    def turn(chat: Chat, pieces: Any, num_changed: int) -> None:
        script.say("hm\n</think>\n\nOne two three.")
        list(pieces)
        assert chat.stats.prefilled_tokens <= num_changed + 20
        difference = np.abs(script.logits[-1] - fresh_logits(model, script.prompts[-1])).max()
        assert difference <= MAX_DIFFERENCE

    def length(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    turn(chats[0], chats[0].send(QUESTIONS[0]), 1000)
    # The others know the system prompt from the first.
    for chat in chats[1:]:
        turn(chat, chat.send("An other one"), length("An other one"))
    for round_ in range(2):
        for chat, question in zip(chats, QUESTIONS, strict=True):
            text = f"{question} {round_}"
            turn(chat, chat.send(text), length(text) + num_answer)
    chat = chats[1]
    turn(chat, chat.regenerate(), 0)
    turn(chat, chat.edit("Changed?"), length("Changed?"))
    assert chat.undo() == "Changed?"
    turn(chat, chat.send("After undo?"), length("After undo?") + num_answer)
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == [
        "An other one", "Who are you? 0", "After undo?"
    ]  # fmt: skip


@pytest.mark.slow
def test_an_edit_in_a_long_message_goes_back_to_a_point_inside(
    demo: Any, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qwen35_mlx.engine.prefix_store, "PREFILL_STEP_SIZE", 32)
    model, tokenizer = demo
    chat = Chat(model, tokenizer)
    words = "word and other " * 100
    script.say("a\n</think>\n\nb", "a\n</think>\n\nb")
    list(chat.send(words + "one"))
    assert 1 < chat.prefixes.num_snapshots <= 10
    list(chat.edit(words + "two"))
    assert chat.stats.prefilled_tokens < chat.stats.prompt_tokens / 6


def test_a_budget_closes_the_thought_and_the_answer_begins(demo: Any, script: Script) -> None:
    model, tokenizer = demo
    # The script counts the token that is drawn behind the budget.
    chat = Chat(model, tokenizer, think_budget=20, draft="off")
    script.say("so it goes on and on " * 50 + "\n</think>\n\nNever.")
    script.answers[0][21:] = [*tokenizer.encode("Done."), tokenizer.eos_token_id]
    pieces = list(chat.send("Why?"))
    assert spoken(pieces) == "Done." and chat.stats.thought_tokens == 20
    thought = tokenizer.decode(tokenizer.encode("so it goes on and on " * 50)[:20])
    assert spoken(pieces, "thought") == thought.rstrip()
    assert chat.messages[1] == {
        "role": "assistant", "content": "Done.", "reasoning_content": thought.strip()
    }  # fmt: skip
    # The model has read its thought as closed.
    ids = chat._cache.ids  # type: ignore[union-attr]
    assert tokenizer.decode(ids).rstrip().endswith("\n</think>\n\nDone.<|im_end|>")
    expected = model(mx.array([ids]))[0, -1]
    script.say("x", "x")
    got = model(mx.array([[5]]), cache=chat._cache.entries)[0, -1]  # type: ignore[union-attr]
    expected = model(mx.array([[*ids, 5]]))[0, -1]
    np.testing.assert_allclose(np.array(got), np.array(expected), atol=MAX_DIFFERENCE)


@pytest.mark.slow
def test_a_short_thought_is_left_alone(demo: Any, script: Script) -> None:
    chat = Chat(*demo, think_budget=20)
    script.say("short\n</think>\n\n" + "a long answer " * 20)
    assert spoken(chat.send("Why?")) == ("a long answer " * 20)


@pytest.mark.slow
def test_a_loop_is_stopped_unless_the_question_asked_for_it(
    demo: Any, scripted: Callable[..., Any]
) -> None:
    tokenizer = demo[1]
    sentence = "I will not talk in class. "
    ids = [*tokenizer.encode(sentence * 200), tokenizer.eos_token_id]
    found = {}
    for question in ("Why?", f"Write {sentence.strip()!r} 300 times."):
        model = scripted(ids, context_length=16_384)
        chat = Chat(model, tokenizer, enable_thinking=False)
        text = spoken(chat.send(question))
        found[question] = (chat.stats.finish_reason, text.count("class"))
    (why, num_stopped), (asked, num_asked) = found.values()
    assert (why, asked, num_asked) == ("loop", "stop", 200) and 40 < num_stopped < 160


@pytest.mark.slow
def test_a_loop_is_stopped(demo: Any, script: Script) -> None:
    chat = Chat(*demo)
    script.say("x\n</think>\n\nOn and on. " + "It repeats itself. " * 400)
    said = spoken(chat.send("Why?"))
    assert chat.stats.finish_reason == "loop" and said.startswith("On and on. It repeats")
    assert 500 < chat.stats.generation_tokens < 800
    script.say("y\n</think>\n\nFine.")
    assert spoken(chat.send("Why?")) == "Fine." and chat.stats.finish_reason == "stop"


@pytest.mark.slow
def test_a_loop_may_be_penalised_or_let_be(demo: Any, script: Script) -> None:
    chat = Chat(*demo, on_loop="penalize", max_tokens=1150, sampling={"presence_penalty": 0.5})
    script.say("x\n</think>\n\n" + "It repeats itself. " * 400, end=False)
    list(chat.send("Why?"))
    assert sorted(set(script.penalties)) == [0.5, 1.5, 2.5]
    assert chat.stats.loops == 2 and chat.stats.finish_reason == "length"
    chat = Chat(*demo, on_loop="off", max_tokens=700)
    script.say("x\n</think>\n\n" + "It repeats itself. " * 400, end=False)
    list(chat.send("Why?"))
    assert chat.stats.generation_tokens == 700 and chat.stats.loops == 0
    with pytest.raises(Qwen35Error, match="on_loop"):
        Chat(*demo, on_loop="shout")


@pytest.mark.slow
def test_the_coding_preset_does_not_stop_repetition(demo: Any, script: Script) -> None:
    chat = Chat(*demo, preset="coding", max_tokens=700)
    assert chat.loop_action == "off"
    script.say("x\n</think>\n\n" + "It repeats itself. " * 400, end=False)
    list(chat.send("Why?"))
    assert chat.stats.generation_tokens == 700
    chat.set_on_loop("stop")
    assert chat.loop_action == "stop"
    chat.set_on_loop(None)
    chat.preset = "instruct"
    assert chat.loop_action == "stop"


def test_presets_follow_the_mode(demo: Any) -> None:
    model, tokenizer = demo
    chat = Chat(model, tokenizer, preset="auto")
    assert chat.thinks() and chat.sampling_params() == PRESETS["thinking"]
    chat.enable_thinking = False
    assert chat.sampling_params() == PRESETS["instruct"]
    chat.preset = "coding"
    assert chat.sampling_params() == PRESETS["coding"]
    chat.sampling = {"top_k": 5, "seed": 3}
    assert chat.sampling_params() == PRESETS["coding"].updated(top_k=5)
    chat.preset = "checkpoint"
    chat.sampling = {}
    assert chat.sampling_params() == model.sampling_defaults
    chat.preset = "wild"
    with pytest.raises(Qwen35Error, match="preset"):
        chat.sampling_params()


@pytest.mark.slow
def test_tools_are_called_answered_and_not_read_again(tooled: Any, script: Script) -> None:
    model, tokenizer = tooled
    chat = Chat(model, tokenizer, tools=[WEATHER])
    calls = call_text({"city": "Paris", "days": "3"}, {"city": "Rome\nItaly"})
    script.say(f"I need it.\n</think>\n\nLet me look.\n\n{calls}")
    pieces = list(chat.send("Weather?"))
    assert spoken(pieces) == "Let me look." and "<" not in "".join(p.text for p in pieces)
    assert [p.call.arguments for p in pieces if p.call] == [c.arguments for c in chat.tool_calls]
    assert [c.arguments for c in chat.tool_calls] == [
        {"city": "Paris", "days": 3}, {"city": "Rome\nItaly"}
    ]  # fmt: skip
    # The thought stays until the next question: nothing changes behind it.
    chat.read_ahead()
    held = len(chat._cache.ids)  # type: ignore[union-attr]
    script.say("Good.\n</think>\n\nSunny.")
    with pytest.raises(Qwen35Error, match="do not fit"):
        list(chat.answer_tools(["one"]))
    assert spoken(chat.answer_tools([{"sun": True}, "rain"])) == "Sunny."
    assert chat.stats.prefilled_tokens == chat.stats.prompt_tokens - held
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert chat.messages[2]["content"] == '{"sun": true}' and chat.tool_calls == []
    difference = np.abs(script.logits[-1] - fresh_logits(model, script.prompts[-1])).max()
    assert difference <= MAX_DIFFERENCE
    # Back behind all of it.
    assert chat.undo() == "Weather?" and chat.messages == []


@pytest.mark.slow
def test_a_call_cut_by_max_tokens_is_not_run(tooled: Any, script: Script) -> None:
    chat = Chat(*tooled, tools=[WEATHER], max_tokens=40)
    script.say("x\n</think>\n\nLook: " + call_text({"city": "Paris " * 50}), end=False)
    pieces = list(chat.send("Weather?"))
    assert [p.call.complete for p in pieces if p.call] == [False]
    assert chat.tool_calls == [] and "tool_calls" not in chat.messages[-1]
    assert spoken(pieces) == "Look:"


def test_without_tools_xml_is_text(demo: Any, script: Script) -> None:
    chat = Chat(*demo)
    script.say("x\n</think>\n\n" + call_text({"city": "Paris"}))
    assert spoken(chat.send("Show me a call")) == call_text({"city": "Paris"})


def test_a_failed_retry_loses_nothing(demo: Any, script: Script) -> None:
    chat = Chat(*demo)
    script.say("x\n</think>\n\nYes.")
    list(chat.send("Is it?"))
    before = list(chat.messages)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for again in (chat.regenerate(interrupt), chat.edit("Is it not?", interrupt)):
        with pytest.raises(KeyboardInterrupt):
            list(again)
        assert chat.messages == before
    chat.sampling = {"temperature": -1}
    with pytest.raises(Qwen35Error):
        list(chat.regenerate())
    assert chat.messages == before
    with pytest.raises(Qwen35Error, match="no message"):
        Chat(*demo).undo()


def test_a_full_context_loses_nothing_and_can_be_trimmed(
    demo: Any, scripted: Callable[..., Any]
) -> None:
    tokenizer = demo[1]
    model = scripted([*tokenizer.encode("Yes."), tokenizer.eos_token_id], context_length=200)
    chat = Chat(model, tokenizer, enable_thinking=False, system="Be brief.")
    with pytest.raises(ContextFull, match="longer than the model's context") as caught:
        for _ in range(20):
            model.num_steps = 0
            list(chat.send("Is one and one two?"))
    assert "drop the oldest" in str(caught.value)
    before = list(chat.messages)
    used = chat.num_context_tokens()
    assert before[-1]["role"] == "assistant" and used > 150
    dropped = chat.drop_oldest()
    assert dropped > 1 and chat.num_context_tokens() <= 100
    assert chat.messages == [before[0], *before[1 + 2 * dropped :]]
    list(chat.send("And now?"))


@pytest.mark.slow
def test_conversations_leave_no_trace_in_another(demo: Any) -> None:
    """The same conversation says the same, whatever was said in others of the same store."""
    model, tokenizer = demo
    options: dict[str, Any] = dict(max_tokens=25, sampling={"temperature": 0.0})
    alone = Chat(model, tokenizer, **options)
    expected = [spoken(alone.send(q)) for q in QUESTIONS]
    store = PrefixStore(model)
    one, other = (Chat(model, tokenizer, store=store, **options) for _ in range(2))
    for i, question in enumerate(QUESTIONS):
        list(other.send(QUESTIONS[-1 - i]))
        other.start_reading_ahead()
        assert spoken(one.send(question)) == expected[i]


@pytest.mark.slow
def test_a_little_memory_costs_reading_but_no_truth(demo: Any) -> None:
    model, tokenizer = demo
    options: dict[str, Any] = dict(max_tokens=25, sampling={"temperature": 0.0})
    plain = Chat(model, tokenizer, **options)
    for num_bytes in (0, 200_000):
        tight = Chat(model, tokenizer, store=PrefixStore(model, num_bytes), **options)
        for question in QUESTIONS:
            assert spoken(tight.send(question)) == spoken(plain.send(question))
            assert tight.prefixes.nbytes <= num_bytes
        plain.restart()


def test_pieces_are_tuples_of_kind_and_text() -> None:
    assert Piece("answer", "x") == ("answer", "x", None)


@pytest.mark.slow
def test_a_loop_is_penalised_more_each_time(
    demo: Any, scripted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = demo[1]
    penalties: list[tuple[float, int]] = []
    penalise = Sampler.penalise_repeats

    def recorded(sampler: Sampler, penalty: float, ids: Any) -> None:
        penalties.append((penalty, len(ids)))
        penalise(sampler, penalty, ids)

    monkeypatch.setattr(Sampler, "penalise_repeats", recorded)
    # The penalty is far below what the model is sure of.
    model = scripted(tokenizer.encode("I will not talk in class. " * 300), context_length=16_384)
    chat = Chat(
        model, tokenizer, enable_thinking=False, on_loop="penalize", max_tokens=1800,
        sampling={"presence_penalty": 0.5, "temperature": 0.0},
    )  # fmt: skip
    list(chat.send("Why?"))
    assert [penalty for penalty, _ in penalties] == [0.5 + i + 1 for i in range(len(penalties))]
    assert chat.stats.loops == len(penalties) > 1 and chat.stats.finish_reason == "length"
    # Of the answer, not of the prompt.
    first, second = (num for _, num in penalties[:2])
    assert 100 < first < second - 100 < 1800
    with pytest.raises(Qwen35Error, match="on_loop"):
        Chat(*demo, on_loop="shout")


def test_a_thought_that_cannot_be_closed_any_more_is_cut(demo: Any, script: Script) -> None:
    model, tokenizer = demo
    num_end = len(tokenizer.encode("\n</think>\n\n", add_special_tokens=False))
    for room, reason in ((num_end, "length"), (num_end + 1, "length")):
        chat = Chat(model, tokenizer, think_budget=20, max_tokens=20 + room)
        script.say("so it goes on and on " * 50, end=False)
        pieces = list(chat.send("Why?"))
        assert chat.stats.finish_reason == reason
        assert chat.stats.generation_tokens == (20 if room == num_end else 20 + room)
        assert bool(spoken(pieces)) == (room > num_end)


def test_the_presets_decide_on_loops_unless_told(demo: Any) -> None:
    chat = Chat(*demo, preset="coding")
    assert chat.loop_action == "off"
    chat.set_on_loop("stop")
    assert chat.loop_action == "stop"
    chat.set_on_loop(None)
    assert chat.loop_action == "off"
    chat.preset = "instruct"
    assert chat.loop_action == "stop"
