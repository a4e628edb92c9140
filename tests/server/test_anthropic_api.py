"""/v1/messages: events in their order, blocks, stops, and the traps of Claude Code."""

import pytest
from server.fake_engine import call, thought
from server.running import MODEL, data_lines

from qwen35_mlx.engine.requests import Grammar, ToolName

TOOL = {"name": "run", "input_schema": {"type": "object", "properties": {}}}
THINKING = {"type": "enabled", "budget_tokens": 1024}


def ask(server, **fields):
    body = {
        "model": MODEL,
        "max_tokens": 2048,
        "messages": [{"role": "user", "content": "hi"}],
        **fields,
    }
    return server.post("/v1/messages", body)


def test_a_message_has_blocks_and_usage_without_the_cached_tokens(server):
    server.engine.say = [thought("Hm."), "Let me see.", call("run", a=1)]
    server.engine.finish, server.engine.cached_tokens = "tool_calls", 4
    answer = ask(server, tools=[TOOL], thinking=THINKING)
    message = answer.json
    assert [b["type"] for b in message["content"]] == ["thinking", "text", "tool_use"]
    assert message["content"][0]["signature"] and message["content"][2]["input"] == {"a": 1}
    assert message["content"][2]["id"].startswith("toolu_")
    assert message["stop_reason"] == "tool_use" and message["role"] == "assistant"
    usage = message["usage"]
    assert usage["cache_read_input_tokens"] == 4
    total = server.engine.num_prompt(server.engine.last)
    assert usage["input_tokens"] == total - 4
    assert answer.headers["request-id"].startswith("req_")


def test_events_come_in_the_order_of_the_api(server):
    server.engine.say = [thought("Hm."), "A", "B", call("run", a=1)]
    server.engine.finish = "tool_calls"
    answer = ask(server, tools=[TOOL], thinking=THINKING, stream=True)
    events = data_lines(answer.text)
    names = [line[7:] for line in answer.text.split("\n") if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    kinds = [
        event["delta"]["type"] if event["type"] == "content_block_delta" else event["type"]
        for event in events
    ]
    assert kinds == [
        "message_start",
        "ping",
        "content_block_start",
        "thinking_delta",
        "signature_delta",
        "content_block_stop",
        "content_block_start",
        "text_delta",
        "text_delta",
        "content_block_stop",
        "content_block_start",
        "input_json_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    starts = [e for e in events if e["type"] == "content_block_start"]
    assert [e["index"] for e in starts] == [0, 1, 2]
    assert starts[2]["content_block"]["input"] == {}
    assert events[0]["message"]["usage"]["input_tokens"] > 0
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-2]["usage"]["output_tokens"] > 0


def test_an_omitted_thought_comes_back_in_its_signature(server):
    server.engine.say = [thought("the secret plan"), "Done."]
    content = ask(server, thinking=THINKING | {"display": "omitted"}).json["content"]
    assert content[0]["thinking"] == ""
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": content},
        {"role": "user", "content": "b"},
    ]
    ask(server, messages=messages)
    assert server.engine.last.messages[1]["reasoning_content"] == "the secret plan"


def test_a_signature_of_others_is_no_thought(server):
    block = {"type": "thinking", "thinking": "", "signature": "q35.!!!"}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [block, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c"},
    ]
    assert ask(server, messages=messages).status == 200
    assert "reasoning_content" not in server.engine.last.messages[1]


def test_the_prompt_stays_when_the_client_moves_what_says_nothing(server):
    """Claude Code: a billing line, a system message in the middle, cache_control that moves."""

    def sent(system_line, reminder, messages):
        ask(
            server,
            system=[
                {"type": "text", "text": f"x-anthropic-billing-header: {system_line}"},
                {"type": "text", "text": "You help."},
            ],
            messages=[
                {"role": "user", "content": "Fix it."},
                {"role": "system", "content": reminder},
                *messages,
            ],
        )
        return server.engine.last.messages

    marked = [{"type": "text", "text": "env", "cache_control": {"type": "ephemeral"}}]
    first = sent("cch=11111;", marked, [])
    second = sent(
        "cch=22222;",
        "env",
        [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "go on"}],
    )
    assert second[: len(first)] == first
    assert [m["role"] for m in second] == ["system", "user", "assistant", "user"]
    assert first[0]["content"] == "You help."
    assert first[1]["content"] == "Fix it.\n\n<system-reminder>\nenv\n</system-reminder>"


def test_results_of_tools_become_messages_and_reminders_stay_with_them(server):
    messages = [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "t1", "name": "run", "input": {"a": 1}}],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": True},
                {"type": "text", "text": "<system-reminder>be quick</system-reminder>"},
            ],
        },
    ]
    ask(server, messages=messages, tools=[TOOL])
    read = server.engine.last.messages
    assert [m["role"] for m in read] == ["user", "assistant", "tool"]
    assert read[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert read[2]["content"].startswith("Error: no") and "be quick" in read[2]["content"]


def test_fields_reach_the_engine(server):
    schema = {"type": "object"}
    ask(
        server,
        tools=[TOOL, {"type": "web_search_20250305", "name": "web_search"}],
        tool_choice={"type": "tool", "name": "run", "disable_parallel_tool_use": True},
        stop_sequences=["END"],
        temperature=0.5,
        top_k=3,
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": schema}},
        thinking={"type": "adaptive"},
        context_management={"edits": []},
        betas=["x"],
    )
    request = server.engine.last
    assert [t["function"]["name"] for t in request.tools] == ["run"]
    assert request.tool_choice == ToolName("run") and not request.parallel_tool_calls
    assert request.stop == ["END"] and request.params.top_k == 3
    assert request.grammar == Grammar("json_schema", schema)
    assert request.enable_thinking and request.think_budget == 2048


def test_without_thinking_the_model_does_not_think(server):
    ask(server)
    assert server.engine.last.enable_thinking is False


def test_a_stop_sequence_is_named(server):
    server.engine.stop_text = "END"
    message = ask(server, stop_sequences=["END"]).json
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")
    server.engine.finish, server.engine.stop_text = "length", None
    assert ask(server).json["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": None},
        {"max_tokens": 0},
        {"messages": []},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "hologram"}]}]},
        {"thinking": {"type": "enabled", "budget_tokens": 10}},
        {"thinking": {"type": "enabled", "budget_tokens": 4096}},
        {"thinking": {"type": "loud"}},
        {"tool_choice": {"type": "any"}},
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}},
        {"tools": [{"input_schema": {}}]},
        {"temperature": 1.5},
        {"stop_sequences": [3]},
        {"stop_sequences": "end"},
        {"system": 5},
        {"system": [{"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}]},
        {"tools": [{"name": "run"}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
    ],
)
def test_bad_fields_are_refused_with_anthropics_object(server, fields):
    answer = ask(server, **fields)
    assert answer.status == 400, answer.text
    assert answer.json["type"] == "error" and answer.json["request_id"]
    assert answer.json["error"]["type"] == "invalid_request_error"


def test_too_long_is_said_so_that_claude_code_compacts(server):
    answer = ask(server, messages=[{"role": "user", "content": "word " * 6000}])
    assert answer.status == 400
    import re

    text = answer.json["error"]["message"]
    assert re.fullmatch(r"prompt is too long: \d+ tokens > \d+ maximum", text)


def test_tokens_are_counted(server):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    answer = server.post("/v1/messages/count_tokens", body)
    assert answer.status == 200 and set(answer.json) == {"input_tokens"}


def test_pictures_are_data_and_never_paths_or_addresses(server):
    def show(source):
        content = [{"type": "image", "source": source}, {"type": "text", "text": "what?"}]
        return ask(server, messages=[{"role": "user", "content": content}])

    assert show({"type": "base64", "media_type": "image/png", "data": "AAAA"}).status == 200
    shown = server.engine.last.messages[0]["content"][0]
    assert shown == {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert show({"type": "url", "url": "https://example.com/a.png"}).status == 400
    assert show({"type": "url", "url": "file:///etc/passwd"}).status == 400
    assert show({"type": "file", "file_id": "f"}).status == 400
