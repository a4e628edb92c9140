"""/v1/chat/completions: its fields, its objects, its stream."""

from types import SimpleNamespace

import pytest
from server.fake_engine import call, thought
from server.running import MODEL, data_lines

from qwen35_mlx.engine.output import Piece
from qwen35_mlx.engine.requests import Done, Grammar, Progress, Token, ToolName, Usage

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def test_an_answer_has_all_fields_of_the_api(server):
    server.engine.say = [thought("It is"), "Paris."]
    server.engine.cached_tokens = 3
    answer = server.chat()
    assert answer.status == 200
    choice = answer.json["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["index"] == 0
    message = choice["message"]
    assert message["content"] == "Paris." and message["role"] == "assistant"
    assert message["reasoning"] == message["reasoning_content"] == "It is"
    usage = answer.json["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]
    assert answer.json["object"] == "chat.completion" and answer.json["model"] == MODEL


def test_null_is_as_good_as_absent(server):
    names = (
        "temperature top_p top_k min_p n stop stream stream_options max_tokens tools tool_choice "
        "max_completion_tokens seed logprobs top_logprobs logit_bias response_format user store "
        "presence_penalty frequency_penalty parallel_tool_calls reasoning_effort functions "
        "function_call chat_template_kwargs metadata modalities audio prediction"
    ).split()
    answer = server.chat(**dict.fromkeys(names))
    assert answer.status == 200, answer.text


def test_a_stream_has_one_id_the_role_first_and_done_last(server):
    server.engine.say = [thought("Hm."), "Par", "is"]
    answer = server.chat(stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = data_lines(answer.text)
    assert chunks.pop() == "[DONE]"
    usage = chunks.pop()
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 0
    assert len({c["id"] for c in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [c["choices"][0]["delta"] for c in chunks[1:]]
    assert deltas[0] == {"reasoning_content": "Hm.", "reasoning": "Hm."}
    assert [d["content"] for d in deltas[1:-1]] == ["Par", "is"] and deltas[-1] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert all("usage" not in c for c in chunks)


def test_streamed_calls_begin_with_name_and_id_and_have_an_index(server):
    server.engine.say = [call("get_weather", city="Rome"), call("get_weather", city="Oslo")]
    server.engine.finish = "tool_calls"
    chunks = data_lines(server.chat(stream=True, tools=[TOOL]).text)[1:-1]
    deltas = [c["choices"][0]["delta"].get("tool_calls", [{}])[0] for c in chunks]
    assert [d.get("index") for d in deltas] == [0, 0, 1, 1, None]
    assert deltas[0]["type"] == "function" and deltas[0]["function"]["name"] == "get_weather"
    assert deltas[1]["function"]["arguments"] == '{"city":"Rome"}'
    assert len({d["id"] for d in deltas if "id" in d}) == 2
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_calls_that_end_with_the_same_token_have_indices_of_their_own(server):
    both = (call("get_weather", city="Rome"), call("get_weather", city="Oslo"))
    server.engine.say = [Token(both, 0, None, [], index=0)]
    chunks = data_lines(server.chat(stream=True, tools=[TOOL]).text)[1:-2]
    assert [c["choices"][0]["delta"]["tool_calls"][0]["index"] for c in chunks] == [0, 0, 1, 1]


def test_whole_calls_have_text_of_json_and_no_content(server):
    server.engine.say = [call("get_weather", city="Rome")]
    server.engine.finish = "tool_calls"
    choice = server.chat(tools=[TOOL]).json["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    function = choice["message"]["tool_calls"][0]["function"]
    assert function == {"name": "get_weather", "arguments": '{"city":"Rome"}'}


def test_the_oldest_form_of_calls_is_answered_in_it(server):
    server.engine.say = [call("get_weather", city="Rome")]
    server.engine.finish = "tool_calls"
    choice = server.chat(functions=[TOOL["function"]], function_call="auto").json["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"]["name"] == "get_weather"


def test_fields_reach_the_engine(server):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    server.chat(
        temperature=0.3,
        top_p=0.5,
        top_k=7,
        min_p=0.1,
        presence_penalty=1,
        seed=-1,
        n=2,
        stop="x",
        max_completion_tokens=9,
        max_tokens=3,
        logit_bias={"5": -100},
        logprobs=True,
        top_logprobs=2,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        parallel_tool_calls=False,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        reasoning_effort="low",
        prompt_cache_key="k",
        return_progress=True,
    )
    request = server.engine.last
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.3, 0.5, 7, 0.1)
    assert params.presence_penalty == 1 and request.seed == 2**63 - 1 and request.n == 2
    assert request.stop == ["x"] and request.max_tokens == 9 and request.logit_bias == {5: -100}
    assert request.logprobs == 2 and request.tool_choice == ToolName("get_weather")
    assert not request.parallel_tool_calls and request.wants_progress
    assert request.grammar == Grammar("json_schema", schema)
    assert request.enable_thinking and request.think_budget == 2048


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({"reasoning_effort": "none"}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"enable_thinking": True}, True),
        ({"thinking_budget": 0}, False),
        ({}, None),
    ],
)
def test_every_way_to_switch_thoughts(server, fields, thinks):
    assert server.chat(**fields).status == 200
    assert server.engine.last.enable_thinking is thinks
    # The engine takes no thought of 0 tokens.
    assert server.engine.last.think_budget is None


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (
            "/v1/chat/completions",
            {"tools": [TOOL | {"function": TOOL["function"] | {"strict": True}}]},
        ),
        (
            "/v1/responses",
            {"input": "hi", "tools": [{"type": "function", "strict": True, **TOOL["function"]}]},
        ),
        (
            "/v1/messages",
            {
                "max_tokens": 5,
                "tools": [{"name": "get_weather", "strict": True, "input_schema": {}}],
            },
        ),
    ],
)
def test_strict_tools_are_strict_in_each_dialect(server, path, fields):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
    assert server.post(path, body).status == 200
    assert server.engine.last.strict_tools == ["get_weather"]
    assert "strict" not in str(server.engine.last.tools)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": None},
        {"messages": "hi"},
        {"messages": [{"role": "king", "content": "hi"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        {"messages": [7]},
        {"temperature": "warm"},
        {"temperature": 2.1},
        {"temperature": True},
        {"top_p": -0.1},
        {"n": 0},
        {"n": 129},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"stop": ["a", "b", "c", "d", "e"]},
        {"stop": [1]},
        {"stream": "yes"},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"99999": 1}},
        {"logit_bias": {"5": 101}},
        {"logit_bias": [1]},
        {"top_logprobs": 21, "logprobs": True},
        {"top_logprobs": 2},
        {"seed": "a"},
        {"seed": 10**30},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": "all"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": [TOOL], "tool_choice": "sometimes"},
        {"tool_choice": "required"},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s"}}},
        {"reasoning_effort": "enormous"},
        {"modalities": ["audio"]},
    ],
)
def test_bad_fields_are_refused_with_openais_object(server, fields):
    answer = server.chat(**fields)
    assert answer.status == 400, answer.text
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(next(iter(fields)).partition("s[")[0][:4])


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object")),
        ({"structured_outputs": {"json": {}}}, Grammar("json_schema", {})),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
        ({"structured_outputs": {"choice": ["a.", "b"]}}, Grammar("regex", r"a\.|b")),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar("lark", 'start: "a"')),
        ({"structured_outputs": {}}, None),
        ({"guided_json": {}}, Grammar("json_schema", {})),
        ({"guided_regex": "a+"}, Grammar("regex", "a+")),
        ({"guided_choice": ["a.", "b"]}, Grammar("regex", r"a\.|b")),
        ({"guided_grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
    ],
)
def test_every_way_to_ask_for_a_grammar(server, fields, grammar):
    assert server.chat(**fields).status == 200
    assert server.engine.last.grammar == grammar


def test_an_unknown_model_is_404(server):
    answer = server.chat(model="gpt-9")
    assert answer.status == 404 and answer.json["error"]["code"] == "model_not_found"


def test_a_prompt_that_is_too_long_has_the_text_that_agents_match(server):
    answer = server.chat("word " * 6000)
    assert answer.status == 400
    error = answer.json["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("This model's maximum context length is 4096 tokens. ")
    assert "However, your messages resulted in " in error["message"]


def test_logprobs_are_those_of_the_answer_alone(server, tokenizer):
    # Between the two: no text of the answer.
    (line,) = tokenizer.encode("\n\n", add_special_tokens=False)
    server.engine.say = [thought("long thought"), Token((), line, -0.5, []), "Paris", "."]
    choice = server.chat(logprobs=True, top_logprobs=1).json["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == "Paris."
    assert content[0]["bytes"] == list(content[0]["token"].encode())
    assert len(content[0]["top_logprobs"]) == 1
    chunks = data_lines(server.chat(logprobs=True, stream=True).text)[:-1]
    entries = [
        entry
        for chunk in chunks
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert "".join(entry["token"] for entry in entries) == "Paris."


def test_a_token_that_ends_in_several_pieces_has_one_logprob_in_a_stream(server):
    pieces = Piece("answer", "Pa"), Piece("answer", "ris")
    token, end = Token(pieces, 7, -0.5, []), Done("stop", None, Usage(), pieces=pieces)
    for event, expected in ((token, [-0.25, -0.5]), (end, [-0.25])):
        server.engine.say = [Token((), 5, -0.25, []), event]
        chunks = data_lines(server.chat(logprobs=True, stream=True).text)[:-1]
        given = [chunk["choices"][0].get("logprobs") for chunk in chunks]
        values = [entry["logprob"] for one in given if one for entry in one["content"]]
        assert values == expected
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("content") or "" for delta in deltas) == "Paris"


def test_several_answers_are_choices_of_their_own(server):
    assert [c["index"] for c in server.chat(n=3).json["choices"]] == [0, 1, 2]
    chunks = data_lines(server.chat(n=2, stream=True).text)[:-1]
    ends = [c["choices"][0] for c in chunks if c["choices"][0]["finish_reason"]]
    assert [end["index"] for end in ends] == [0, 1]


def test_a_failure_in_a_stream_is_an_event(server):
    server.engine.say = ["Pa", RuntimeError("metal is gone")]
    events = data_lines(server.chat(stream=True).text)
    assert events[-1]["error"]["type"] == "server_error" and "[DONE]" not in events
    assert server.chat().status == 500


def test_progress_says_how_long_the_prompt_has_been_read(server, monkeypatch):
    clock = SimpleNamespace(time=lambda: 2e9)
    monkeypatch.setattr("qwen35_mlx.server.openai.time", clock)
    server.engine.say = [Progress(3, 7), "A"]
    server.engine.cached_tokens = 2
    answer = server.chat(stream=True, return_progress=True)
    (chunk,) = (c for c in data_lines(answer.text) if "prompt_progress" in c)
    time_ms = chunk["prompt_progress"].pop("time_ms")
    assert chunk["prompt_progress"] == {"total": 7, "cache": 2, "processed": 3}
    assert 0 <= (2e9 - chunk["created"]) * 1000 - time_ms <= 1000
    assert server.engine.last.wants_progress
