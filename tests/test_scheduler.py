"""The engine of the server: many requests at a time, each as if it were alone."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday

from qwen35_mlx.engine import reading, rows, scheduler
from qwen35_mlx.engine.prompt_cache import PromptCache
from qwen35_mlx.engine.reading import Pieces
from qwen35_mlx.engine.requests import (
    Done,
    EngineBusy,
    EngineStopped,
    Failed,
    Progress,
    PromptLogprobs,
    Request,
    Started,
    Ticket,
    Token,
)
from qwen35_mlx.engine.row import Row
from qwen35_mlx.engine.rows import RowBatch, groups
from qwen35_mlx.engine.scheduler import Engine, Limits
from qwen35_mlx.errors import ContextFull, PromptError, Qwen35Error
from qwen35_mlx.model.loading import load_model
from qwen35_mlx.sampling import SamplingParams

GREEDY = SamplingParams()
QUESTIONS = ("What is the capital of France?", "hi", "Count to ten.", "a b c d e f g h", "Who?")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def shared(demo: Any) -> Iterator[Engine]:
    engine = Engine(*demo)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture
def own(demo: Any) -> Iterator[Engine]:
    engine = Engine(*demo)
    engine.start()
    yield engine
    engine.stop()


def ask(text: str, **options: Any) -> Request:
    options = {"params": GREEDY, "max_tokens": 40} | options
    return Request(messages=[{"role": "user", "content": text}], **options)


class Answer:
    """All that came of a request."""

    def __init__(self, ticket: Ticket):
        self.events = list(ticket.events())
        self.tokens = [e.token for e in self.events if isinstance(e, Token)]
        self.pieces = [p for e in self.events if isinstance(e, Token | Done) for p in e.pieces]
        self.calls = [p.call for p in self.pieces if p.call]
        self.end: Any = self.events[-1]
        self.started = next((e for e in self.events if isinstance(e, Started)), None)

    def text(self, kind: str = "answer") -> str:
        return "".join(p.text for p in self.pieces if p.kind == kind)


def together(engine: Engine, requests: list[Request]) -> list[Answer]:
    return [Answer(ticket) for ticket in [engine.submit(request) for request in requests]]


PARAMS = [
    GREEDY,
    SamplingParams(temperature=0.9, top_p=0.9, top_k=20),
    SamplingParams(temperature=1.0, min_p=0.1, presence_penalty=0.5, frequency_penalty=0.3),
    SamplingParams(temperature=0.7, repetition_penalty=1.2),
    SamplingParams(temperature=0.8, top_p=0.5),
]


@pytest.mark.parametrize("seed", everyday(range(6), 0))
def test_an_answer_does_not_depend_on_who_else_is_served(shared, seed):
    draw = np.random.default_rng(seed)
    requests = []
    for i in range(5):
        text = QUESTIONS[draw.integers(len(QUESTIONS))] + " x" * int(draw.integers(9))
        params = PARAMS[i % len(PARAMS)]
        requests.append(ask(text, params=params, seed=i, max_tokens=int(draw.integers(1, 14))))
    alone = [Answer(shared.submit(request)).tokens for request in requests]
    assert [answer.tokens for answer in together(shared, requests)] == alone


@pytest.mark.slow
@pytest.mark.parametrize("streams", everyday((2, 3), 1))
def test_batches_on_several_streams_give_the_same_answers(demo, shared, monkeypatch, streams):
    """As on a CPU, where each core has one; a row moves between them as others come and go."""
    monkeypatch.setattr(rows, "rows_a_stream", lambda model: 1)
    monkeypatch.setattr(rows.os, "cpu_count", lambda: streams)
    engine = Engine(*demo)
    engine.start()
    requests = [ask(text, max_tokens=6 + 4 * i) for i, text in enumerate(QUESTIONS)]
    alone = [Answer(shared.submit(request)).tokens for request in requests]
    assert [answer.tokens for answer in together(engine, requests)] == alone
    engine.stop()


def test_more_rows_than_a_pass_takes_are_parted_evenly(monkeypatch):
    monkeypatch.setattr(rows.os, "cpu_count", lambda: 2)
    sizes = [[len(g) for g in groups(range(n), 32)] for n in (0, 1, 8, 9, 17)]
    assert sizes == [[], [1], [8], [4, 5], [5, 6, 6]]
    # A core each, from so many rows on that it pays.
    assert groups("abcde", 2) == [["a", "b"], ["c", "d", "e"]] and groups("abc", 2) == [[*"abc"]]
    assert groups("abcde", 1) == [["a", "b"], ["c", "d", "e"]] and groups("a", 1) == [["a"]]


@pytest.mark.parametrize("name", everyday(("dense", "moe", "yarn"), 0))
def test_logits_of_a_row_are_those_of_the_row_alone(converted_golden, name):
    model, _ = load_model(converted_golden(name))
    vocab = model.config.vocab_size
    prompts = [[(37 * i + 11 * j) % vocab for j in range(3 + 5 * i)] for i in range(5)]
    caches, alone = ([PromptCache(model) for _ in prompts] for _ in range(2))
    for row, other, ids in zip(caches, alone, prompts, strict=True):
        row.read(ids)
        other.read(ids)
    batch, tokens = RowBatch(model, mx.default_stream(mx.default_device())), [3, 1, 4, 1, 5]
    # The last ones leave and come back: their states move.
    for number in (5, 5, 2, 5, 1, 3):
        batch.clear()
        batch.put(caches[:number])
        logits = model.head(batch.step(mx.array(tokens[:number])))[:, 0]
        for i in range(number):
            caches[i].commit(tokens[i])
            expected = model.head(alone[i].step(mx.array([tokens[i]])))[0, 0]
            alone[i].commit(tokens[i])
            assert mx.array_equal(expected, logits[i]).item()
            tokens[i] = int(mx.argmax(expected).item())
    batch.clear()
    assert [row.ids for row in caches] == [other.ids for other in alone]


@pytest.mark.slow
def test_pictures_beside_texts_keep_their_positions(demo):
    """A row behind a picture has fewer positions than tokens."""
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    shown = Request(messages=[{"role": "user", "content": content}], params=GREEDY, max_tokens=12)
    engine = Engine(*demo)
    engine.start()
    requests = [shown, ask("hi", max_tokens=12)]
    alone = [Answer(engine.submit(request)).tokens for request in requests]
    assert [answer.tokens for answer in together(engine, requests)] == alone
    engine.stop()


@pytest.mark.slow
def test_a_request_that_fails_takes_no_other_one_with_it(own, monkeypatch):
    take = Row.take

    def failing(row: Row, *args: Any) -> None:
        if row.prepared.request.seed == 13 and row.num_generated == 3:
            raise RuntimeError("broken")
        take(row, *args)

    monkeypatch.setattr(Row, "take", failing)
    alone = Answer(own.submit(ask(QUESTIONS[0]))).tokens
    answers = together(own, [ask(QUESTIONS[0]), ask("hi", seed=13), ask(QUESTIONS[0])])
    assert isinstance(answers[1].end, Failed) and "broken" in str(answers[1].end.error)
    assert [a.tokens for a in answers[::2]] == [alone, alone]
    assert own.is_alive and own.stats()["running"] == 0


def test_a_pass_that_fails_leaves_an_engine_that_answers(own, monkeypatch):
    alone = Answer(own.submit(ask(QUESTIONS[0]))).tokens
    step, passes, broken = RowBatch.step, [], []

    def failing(batch: RowBatch, tokens: Any) -> Any:
        passes.append(len(batch.rows))
        if len(passes) == 6:
            broken.extend(batch.rows)
            raise MemoryError("no room")
        return step(batch, tokens)

    monkeypatch.setattr(RowBatch, "step", failing)
    ends = [answer.end for answer in together(own, [ask(text) for text in QUESTIONS[:3]])]
    assert any(isinstance(end, Failed) for end in ends)
    # Nobody continues from what may be wrong.
    assert broken and not any(cache is bad for cache in own.store.caches for bad in broken)
    assert Answer(own.submit(ask(QUESTIONS[0]))).tokens == alone
    assert own.is_alive and own.stats()["running"] == 0


def test_a_dead_thread_is_noticed_and_started_again(own, monkeypatch):
    with monkeypatch.context() as patch:

        def die(self: Engine) -> None:
            raise SystemExit("dead")

        patch.setattr(Engine, "_go_on", die)
        answer = Answer(own.submit(ask("hi")))
        assert own._thread is not None
        own._thread.join(60)
    assert isinstance(answer.end, Failed) and isinstance(answer.end.error, EngineStopped)
    assert not own.is_alive
    with pytest.raises(EngineStopped):
        own.submit(ask("hi"))
    own.start()
    assert own.is_alive and Answer(own.submit(ask("hi"))).end.finish_reason == "stop"


@pytest.mark.parametrize("while_reading", [True, False])
def test_a_cancelled_request_stops_within_a_piece_or_a_token(own, monkeypatch, while_reading):
    monkeypatch.setattr(reading, "FIRST_PIECE_TOKENS", 64)
    monkeypatch.setattr(Pieces, "record", lambda *_: None)
    ids = [5 + i % 2000 for i in range(2000 if while_reading else 20)]
    request = Request(
        prompt=ids, params=GREEDY, max_tokens=1000, ignore_eos=True, wants_progress=True
    )
    request.stop_loops = False
    ticket = own.submit(request)
    seen: list[Any] = []

    def take(event: Any) -> None:
        seen.append(event)
        if isinstance(event, Progress if while_reading else Token) and len(seen) > 3:
            ticket.cancel()

    ticket.add_listener(take)
    while not ticket.is_over:
        threading.Event().wait(0.01)
    assert seen[-1].finish_reason == "cancelled"
    if while_reading:
        assert max(e.num_read for e in seen if isinstance(e, Progress)) < 1000
    assert len([e for e in seen if isinstance(e, Token)]) < 500
    assert own.stats()["running"] == 0


def test_a_short_question_does_not_wait_for_a_long_prompt(own, monkeypatch):
    monkeypatch.setattr(reading, "FIRST_PIECE_TOKENS", 64)
    monkeypatch.setattr(Pieces, "record", lambda *_: None)
    order = []
    request = Request(
        prompt=[5 + i % 2000 for i in range(450)], max_tokens=1, params=GREEDY, wants_progress=True
    )
    long, short = own.submit(request), []

    def take(event: Any) -> None:
        if isinstance(event, Progress):
            order.append("piece")
            if not short:
                short.append(own.submit(ask("hi", max_tokens=2)))
                short[0].add_listener(
                    lambda e: order.append("token") if isinstance(e, Token) else None
                )

    long.add_listener(take)
    while not (long.is_over and short[0].is_over):
        threading.Event().wait(0.01)
    at = order.index("token")
    assert order[at:].count("piece") > 3, "it came when the long prompt was nearly read"


def test_two_requests_with_the_same_beginning_read_it_once(own):
    system = {"role": "system", "content": "Answer in one word. " * 12}
    requests = [
        Request(messages=[system, {"role": "user", "content": text}], params=GREEDY, max_tokens=3)
        for text in ("hi", "Who are you?")
    ]
    answers = together(own, requests)
    cached = [answer.started.cached_tokens for answer in answers]
    assert cached[0] == 0 and cached[1] > 50


def test_the_queue_has_an_end_and_memory_admits_one_by_one(demo):
    engine = Engine(*demo, limits=Limits(max_queued=2, memory_bytes=1.0))
    engine.start()
    tickets, busy = [], 0
    for _ in range(12):
        try:
            tickets.append(engine.submit(ask(QUESTIONS[0])))
        except EngineBusy:
            busy += 1
    ends = [Answer(ticket).end.finish_reason for ticket in tickets]
    # One runs although it is more than fits, or nothing ever would.
    assert busy and set(ends) == {"stop"}
    engine.stop()
    with pytest.raises(EngineStopped):
        engine.submit(ask("hi"))


@pytest.mark.slow
def test_stop_finishes_what_was_taken_on(demo):
    engine = Engine(*demo)
    engine.start()
    tickets = [engine.submit(ask(text)) for text in QUESTIONS]
    engine.stop(finish=True)
    assert {Answer(ticket).end.finish_reason for ticket in tickets} <= {"stop", "length"}
    assert not engine.is_alive


def conversation(answer: Answer, text: str, **message: Any) -> list[Any]:
    said = {"role": "assistant", "content": answer.text().strip(), **message}
    return [{"role": "user", "content": QUESTIONS[0]}, said, {"role": "user", "content": text}]


@pytest.mark.slow
def test_a_thought_that_the_client_drops_costs_its_answer_alone(own):
    first = Answer(own.submit(ask(QUESTIONS[0])))
    request = Request(messages=conversation(first, "Why?"), params=GREEDY, max_tokens=2)
    second = Answer(own.submit(request))
    # All but the generation prompt of the first turn.
    assert second.started.cached_tokens >= first.started.prompt_tokens - 8
    assert own.store.num_snapshots > 1


@pytest.mark.slow
def test_calls_that_come_back_without_thought_and_spaces_break_no_prefix(own):
    request = ask("Weather in Paris?", tools=[WEATHER], tool_choice="required", think_budget=8)
    first = Answer(own.submit(request))
    (call,) = first.calls[:1]
    assert first.end.finish_reason == "tool_calls"
    sent = [
        {"id": f"c{i}", "type": "function", "function": {"name": c.name, "arguments": _tight(c)}}
        for i, c in enumerate(first.calls)
    ]
    messages = [
        request.messages[0],
        {"role": "assistant", "content": None, "tool_calls": sent},
        *({"role": "tool", "tool_call_id": c["id"], "content": "sunny"} for c in sent),
    ]
    again = Request(messages=messages, tools=[WEATHER], params=GREEDY, max_tokens=2)
    second = Answer(own.submit(again))
    read = first.started.prompt_tokens + len(first.tokens)
    assert second.started.cached_tokens >= read - 2, call


def _tight(call: Any) -> str:
    return json.dumps(call.arguments, separators=(",", ":"))


def test_an_answer_ends_with_the_token_that_completes_a_stop_text(shared):
    plain = Answer(shared.submit(ask(QUESTIONS[0], enable_thinking=False)))
    stop = plain.text()[2:6]
    request = ask(QUESTIONS[0], enable_thinking=False, stop=[stop])
    stopped = Answer(shared.submit(request))
    assert stopped.text() == plain.text()[:2]
    assert (stopped.end.finish_reason, stopped.end.stop_text) == ("stop", stop)
    assert stopped.tokens == plain.tokens[: len(stopped.tokens)]
    assert len(stopped.tokens) < len(plain.tokens) - 1


@pytest.mark.slow
def test_a_stop_text_in_a_thought_does_not_end_the_answer(shared):
    plain = Answer(shared.submit(ask(QUESTIONS[0])))
    word = plain.text("thought").split()[2]
    assert word not in plain.text()
    stopped = Answer(shared.submit(ask(QUESTIONS[0], stop=[word])))
    assert stopped.text() == plain.text() and stopped.end.stop_text is None
    last = plain.text().split()[-1]
    stopped = Answer(shared.submit(ask(QUESTIONS[0], stop=[last])))
    assert stopped.end.stop_text == last and last not in stopped.text()


def test_a_thought_is_closed_at_its_budget(shared):
    answer = Answer(shared.submit(ask(QUESTIONS[0], think_budget=3)))
    assert 3 <= answer.end.usage.thought_tokens <= 4 and answer.text()


@pytest.mark.slow
def test_fields_that_change_the_answer(shared, demo):
    _, tokenizer = demo
    plain = Answer(shared.submit(ask("hi")))
    ends = tokenizer.eos_token_ids
    assert plain.tokens[-1] in ends and plain.end.finish_reason == "stop"
    longer = Answer(shared.submit(ask("hi", min_tokens=len(plain.tokens) + 4)))
    assert len(longer.tokens) > len(plain.tokens) + 3
    endless = Answer(shared.submit(ask("hi", ignore_eos=True)))
    assert endless.end.finish_reason == "length" and not ends & set(endless.tokens)
    biased = Answer(shared.submit(ask("hi", logit_bias={plain.tokens[0]: -100})))
    assert biased.tokens[0] != plain.tokens[0]
    request = ask("hi", params=replace(GREEDY, frequency_penalty=10.0), ignore_eos=True)
    penalised = Answer(shared.submit(request))
    assert len(set(penalised.tokens)) > len(set(endless.tokens)) + 3
    hot = SamplingParams(temperature=3.0)
    twice = [Answer(shared.submit(ask("hi", n=2, seed=4, params=hot))) for _ in range(2)]
    for answer in twice:
        events = [e for e in answer.events if isinstance(e, Token)]
        first, second = ([e.token for e in events if e.index == i] for i in (0, 1))
        assert first != second
        assert sorted(e.index for e in answer.events if isinstance(e, Done)) == [0, 1]
    assert twice[0].tokens and sorted(twice[0].tokens) == sorted(twice[1].tokens)
    assert len(Answer(shared.submit(ask("hi", max_tokens=0))).tokens) == 0


def test_log_probabilities_are_those_of_the_model(shared, demo):
    model, _ = demo
    ids = [5, 80, 300, 21, 7]
    request = Request(prompt=ids, params=GREEDY, max_tokens=3, logprobs=2, prompt_logprobs=1)
    answer = Answer(shared.submit(request))
    logits = model(mx.array([[*ids, *answer.tokens]]))[0].astype(mx.float32)
    expected = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    (scores,) = [e for e in answer.events if isinstance(e, PromptLogprobs)]
    assert scores.tokens == ids and scores.logprobs[0] is None
    for place in range(1, 5):
        assert scores.logprobs[place] == pytest.approx(expected[place - 1, ids[place]], abs=1e-4)
        assert scores.top[place][0][0] == expected[place - 1].argmax()
    tokens = [e for e in answer.events if isinstance(e, Token)]
    for place, event in enumerate(tokens, len(ids) - 1):
        assert event.logprob == pytest.approx(expected[place, event.token], abs=1e-4)
        assert event.top[0] == (event.token, event.logprob) and len(event.top) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"logit_bias": {99999: 1.0}}, "logit_bias"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias"),
        ({"logit_bias": {1: 100.5}}, "logit_bias"),
        ({"logit_bias": {1: True}}, "logit_bias"),
        ({"n": 0}, "n is"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [3]}, "stop"),
        ({"draft": "x"}, "drafts"),
        ({"messages": []}, "no messages"),
        ({"prompt": "x"}, "not both"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "Unicode"),
    ],
)
def test_mistakes_are_refused_before_they_are_queued(shared, options, words):
    with pytest.raises(Qwen35Error, match=words):
        shared.submit(replace(ask("hi"), **options))


def test_the_least_bias_keeps_a_token_out(shared):
    options = {"enable_thinking": False, "max_tokens": 2}
    plain = Answer(shared.submit(ask(QUESTIONS[0], **options)))
    bias = {plain.tokens[0]: -100}
    biased = Answer(shared.submit(ask(QUESTIONS[0], logit_bias=bias, **options)))
    assert plain.tokens[0] not in biased.tokens


def test_a_prompt_that_is_too_long_says_by_how_much(shared):
    with pytest.raises(ContextFull) as caught:
        shared.submit(Request(prompt="a b c d e f g h " * 2000))
    assert caught.value.num_tokens > caught.value.context_length == 4096
    with pytest.raises(PromptError):
        shared.submit(Request(prompt=[]))
    assert (
        shared.count_tokens(ask("hi"))
        == Answer(shared.submit(ask("hi", max_tokens=1))).started.prompt_tokens
    )


@pytest.mark.slow
def test_a_listener_that_raises_ends_its_request_alone(own):
    ticket = own.submit(ask("hi", ignore_eos=True, max_tokens=3000))

    def broken(event: Any) -> None:
        raise RuntimeError("the loop is closed")

    with pytest.raises(RuntimeError):
        ticket._events.append(Started(1, 0))
        ticket.add_listener(broken)
    assert Answer(own.submit(ask("hi"))).end.finish_reason == "stop"
    while not ticket.is_over:
        threading.Event().wait(0.01)


def test_pieces_are_sized_by_time():
    pieces = Pieces()
    assert pieces.next_size(True) == reading.FIRST_PIECE_TOKENS
    for _ in range(8):
        pieces.record(256, 0.5)
    assert pieces.next_size(True) == 192 and pieces.next_size(False) == 512
    for _ in range(30):
        pieces.record(2048, 0.2)
    assert pieces.next_size(True) == 2048
    assert scheduler.Limits().max_running == 16
