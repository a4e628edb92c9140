"""/v1/responses: events, items, and what is kept."""

import pytest
from server.fake_engine import call, thought
from server.running import MODEL, data_lines

TOOL = {"type": "function", "name": "run", "parameters": {"type": "object", "properties": {}}}


def ask(server, given="hi", **fields):
    return server.post("/v1/responses", {"model": MODEL, "input": given, **fields})


def test_a_response_has_items_and_usage(server):
    server.engine.say = [thought("Hm."), "Hello.", call("run", a=1)]
    server.engine.finish, server.engine.cached_tokens = "tool_calls", 2
    response = ask(server, tools=[TOOL]).json
    assert response["status"] == "completed" and response["object"] == "response"
    assert [item["type"] for item in response["output"]] == [
        "reasoning",
        "message",
        "function_call",
    ]
    assert response["output"][0]["content"][0]["text"] == "Hm."
    part = response["output"][1]["content"][0]
    assert part == {"type": "output_text", "text": "Hello.", "annotations": [], "logprobs": []}
    assert response["output"][2]["arguments"] == '{"a":1}'
    usage = response["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] == 2
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert response["incomplete_details"] is None and response["error"] is None


def test_events_are_numbered_and_complete(server):
    server.engine.say = [thought("Hm."), "He", "llo", call("run", a=1)]
    answer = ask(server, tools=[TOOL], stream=True)
    events = data_lines(answer.text)
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    assert [e["type"].removeprefix("response.") for e in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert events[12]["text"] == "Hello" and events[12]["item_id"] == events[8]["item"]["id"]
    assert events[0]["response"]["status"] == "in_progress"
    assert len(events[-1]["response"]["output"]) == 3
    # Each event names the item that it belongs to, by place and by id.
    output = events[-1]["response"]["output"]
    for place, first, last in ((0, 2, 7), (1, 8, 14), (2, 15, 18)):
        assert {e["output_index"] for e in events[first : last + 1]} == {place}
        assert {e["item_id"] for e in events[first + 1 : last]} == {output[place]["id"]}
        assert events[last]["item"] == output[place]


def test_a_summary_is_streamed_where_it_is_asked_for(server):
    server.engine.say = [thought("Hm."), "Hello"]
    events = data_lines(ask(server, reasoning={"summary": "auto"}, stream=True).text)
    kinds = [e["type"].removeprefix("response.") for e in events]
    assert kinds[3:7] == [
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
    ]
    summary = events[-1]["response"]["output"][0]["summary"]
    assert summary == [{"type": "summary_text", "text": "Hm."}]


def test_a_cut_answer_is_incomplete(server):
    server.engine.finish = "length"
    response = ask(server, max_output_tokens=3).json
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert server.engine.last.max_tokens == 3
    assert data_lines(ask(server, stream=True).text)[-1]["type"] == "response.incomplete"


def test_items_of_a_history_become_messages(server):
    server.engine.say = [thought("plan"), "Looking.", call("run", a=1)]
    output = ask(server, tools=[TOOL]).json["output"]
    # What Codex keeps of a thought.
    output[0] = {k: output[0][k] for k in ("type", "encrypted_content")} | {"summary": []}
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "D"}]},
        {"role": "user", "content": "hi"},
        *output,
        {"type": "function_call_output", "call_id": output[2]["call_id"], "output": "42"},
    ]
    ask(server, items, instructions="Be brief.", tools=[TOOL, {"type": "web_search"}])
    read = server.engine.last.messages
    assert [m["role"] for m in read] == ["system", "user", "assistant", "tool"]
    assert read[0]["content"] == "Be brief.\n\nD"
    assert read[2]["content"] == "Looking." and read[2]["reasoning_content"] == "plan"
    assert read[2]["tool_calls"][0]["function"]["name"] == "run" and read[3]["content"] == "42"
    assert len(server.engine.last.tools) == 1


def test_thoughts_and_calls_of_other_programs_are_read(server):
    items = [
        {"role": "user", "content": "hi"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "first"}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "then"}]},
        {"type": "message", "role": "assistant", "content": "Hello."},
        {"type": "custom_tool_call", "name": "patch", "call_id": "c1", "input": "*** Begin"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"},
        {"type": "local_shell_call", "call_id": "c2", "action": {"command": ["ls"]}},
        {"type": "local_shell_call_output", "call_id": "c2", "output": "a b"},
    ]
    assert ask(server, items).status == 200
    read = server.engine.last.messages
    assert [m["role"] for m in read] == ["user", "assistant", "tool", "assistant", "tool"]
    assert (read[1]["reasoning_content"], read[1]["content"]) == ("first\nthen", "Hello.")
    calls = [m["tool_calls"][0]["function"] for m in (read[1], read[3])]
    assert [(c["name"], c["arguments"]) for c in calls] == [
        ("patch", {"input": "*** Begin"}),
        ("local_shell", {"command": ["ls"]}),
    ]
    assert [read[2]["content"], read[4]["content"]] == ["done", "a b"]


def test_a_response_is_kept_continued_listed_and_deleted(server):
    first = ask(server, "one").json["id"]
    assert ask(server, "two", previous_response_id=first).status == 200
    contents = [m["content"] for m in server.engine.last.messages]
    assert contents == ["one", "Paris.", "two"]
    assert server.get(f"/v1/responses/{first}").json["id"] == first
    items = server.get(f"/v1/responses/{first}/input_items").json
    assert items["data"][0]["content"] == [{"type": "input_text", "text": "one"}]
    assert server.request("DELETE", f"/v1/responses/{first}").json["deleted"] is True
    assert server.get(f"/v1/responses/{first}").status == 404
    gone = ask(server, "three", previous_response_id=first)
    assert gone.status == 400 and gone.json["error"]["code"] == "previous_response_not_found"


def test_what_is_not_stored_is_not_kept(server):
    unstored = ask(server, store=False).json["id"]
    assert server.get(f"/v1/responses/{unstored}").status == 404


def test_truncation_leaves_out_the_oldest_turns_only_where_it_is_asked_for(server):
    items = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "word " * 5000},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "last"},
    ]
    assert ask(server, items).json["error"]["code"] == "context_length_exceeded"
    assert ask(server, items, truncation="auto").status == 200
    assert [m["content"] for m in server.engine.last.messages] == ["S", "last"]


@pytest.mark.parametrize(
    "fields",
    [
        {"given": None},
        {"given": []},
        {"given": [{"type": "riddle"}]},
        {"given": [{"role": "user"}]},
        {"given": 7},
        {"background": True},
        {"conversation": "c"},
        {"text": {"format": {"type": "json_schema", "name": "n"}}},
        {"max_output_tokens": -1},
        {"reasoning": {"effort": "huge"}},
        {"given": [{"type": "message", "role": "user", "content": [{"type": "input_file"}]}]},
    ],
)
def test_bad_fields_are_refused(server, fields):
    answer = ask(server, **fields)
    assert answer.status == 400 and answer.json["error"]["type"] == "invalid_request_error"


def test_a_failure_in_a_stream_ends_it_as_failed(server):
    server.engine.say = ["Pa", RuntimeError("gone")]
    last = data_lines(ask(server, stream=True).text)[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"]["message"]
