"""/v1/completions: lists of prompts, echo, and scores."""

import pytest
from server.running import MODEL, data_lines

from qwen35_mlx.engine.requests import PromptLogprobs


def ask(server, prompt="one two", **fields):
    return server.post("/v1/completions", {"model": MODEL, "prompt": prompt, **fields})


def test_a_text_is_continued_with_sixteen_tokens_by_default(server):
    answer = ask(server).json
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "Paris.", "logprobs": None, "finish_reason": "stop"}
    ]
    request = server.engine.last
    assert (request.prompt, request.max_tokens, request.messages) == ("one two", 16, None)


@pytest.mark.parametrize("stream", [False, True])
def test_every_prompt_of_a_list_gets_its_choices_in_order(server, stream):
    prompts = [f"p{i}" for i in range(11)]
    answer = ask(server, prompts, n=2, stream=stream)
    if stream:
        events = data_lines(answer.text)
        assert events.pop() == "[DONE]"
        choices = [e["choices"][0] for e in events if e["choices"][0]["finish_reason"]]
    else:
        choices = answer.json["choices"]
        assert answer.json["usage"]["completion_tokens"] >= 22
    assert sorted(c["index"] for c in choices) == list(range(22))
    assert [t.request.prompt for t in server.engine.tickets] == prompts


def test_a_prompt_that_is_refused_ends_those_before_it(server):
    server.engine.say = [60.0]
    assert ask(server, ["one", "two " * 5000]).status == 400
    (ticket,) = server.engine.tickets
    assert ticket.is_cancelled.wait(30)


def test_ids_are_prompts(server):
    assert len(ask(server, [5, 6, 7]).json["choices"]) == 1
    assert server.engine.last.prompt == [5, 6, 7]
    assert len(ask(server, [[5], [6, 7]]).json["choices"]) == 2


def test_echo_without_tokens_scores_the_prompt(server, tokenizer):
    ids = tokenizer.encode("one two")
    scores = [None, *(-0.25 for _ in ids[1:])]
    server.engine.say = [PromptLogprobs(ids, scores, [((9, -0.1),) for _ in ids])]
    choice = ask(server, max_tokens=0, echo=True, logprobs=1).json["choices"][0]
    assert choice["text"] == "one two"
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == "one two"
    assert logprobs["token_logprobs"] == scores and logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    request = server.engine.last
    assert (request.max_tokens, request.prompt_logprobs) == (0, 1)


def test_echo_puts_the_prompt_in_front(server):
    assert ask(server, echo=True).json["choices"][0]["text"] == "one twoParis."
    events = data_lines(ask(server, echo=True, stream=True).text)[:-1]
    assert "".join(e["choices"][0]["text"] for e in events) == "one twoParis."


def test_the_best_of_several_is_given(server):
    answer = ask(server, best_of=3, n=1).json
    assert len(answer["choices"]) == 1 and answer["choices"][0]["logprobs"] is None
    assert server.engine.last.n == 3


def test_scores_of_the_answer(server):
    logprobs = ask(server, logprobs=2).json["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == "Paris."
    assert all(score == -0.5 for score in logprobs["token_logprobs"])


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": None},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": {"a": 1}},
        {"prompt": ["a", 1]},
        {"prompt": [-1]},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"logprobs": 6},
        {"best_of": 1, "n": 2},
        {"best_of": 3, "n": 1, "stream": True},
        {"suffix": "x"},
        {"logit_bias": {"x": 1}},
    ],
)
def test_bad_fields_are_refused(server, fields):
    answer = ask(server, **fields)
    assert answer.status == 400 and set(answer.json["error"]) >= {"message", "type", "code"}
