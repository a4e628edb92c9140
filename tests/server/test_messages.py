"""Histories that clients send again come out as the prompt that was read before."""

import copy
import json

import pytest
from server.fake_engine import call, thought
from server.running import MODEL

from qwen35_mlx.server import messages as messages_module
from qwen35_mlx.server.messages import CallMemory, folded, hidden, history_call, revealed

TOOL = {"type": "function", "function": {"name": "run", "parameters": {"type": "object"}}}


def read(server, messages, **fields):
    answer = server.chat(messages=messages, **fields)
    assert answer.status == 200, answer.text
    return server.engine.last.messages


def test_system_messages_in_the_middle_stay_there(server):
    """Moved to the front they would change it each turn, and the template refuses them."""
    user, late = {"role": "user", "content": "a"}, {"role": "system", "content": "late"}
    messages = read(
        server,
        [
            {"role": "system", "content": "S"},
            {"role": "developer", "content": "D"},
            user,
            {"role": "assistant", "content": "b"},
            late,
            {"role": "user", "content": "c"},
            late,
        ],
    )
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[0]["content"] == "S\n\nD" and messages[1]["content"] == "a"
    reminder = "<system-reminder>\nlate\n</system-reminder>"
    assert messages[3]["content"] == f"{reminder}\n\nc\n\n{reminder}"


def test_a_system_message_behind_a_result_ends_no_turn(server):
    messages = read(
        server,
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "run"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "r"},
            {"role": "system", "content": "late"},
        ],
        tools=[TOOL],
    )
    assert [m["role"] for m in messages] == ["user", "assistant", "tool"]
    assert messages[2]["content"].startswith("r\n\n<system-reminder>")


def test_instructions_alone_are_the_question(server):
    assert read(server, [{"role": "system", "content": "Say hi."}]) == [
        {"role": "user", "content": "Say hi."}
    ]


def test_a_list_of_texts_is_the_text(server):
    """Qwen Code sends lists for users and tools; the next request may send a string."""
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]
    assert read(server, [{"role": "user", "content": parts}])[0]["content"] == "What is 2 + 2?"


def test_a_call_comes_back_as_the_model_wrote_it_with_its_thought(server):
    """Clients write arguments anew, without spaces, and drop thoughts."""
    server.engine.say = [thought("I look."), call("run", a=[1, 2])]
    server.engine.finish = "tool_calls"
    message = server.chat(tools=[TOOL]).json["choices"][0]["message"]
    sent = message["tool_calls"][0]
    assert sent["function"]["arguments"] == '{"a":[1,2]}'
    history = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [sent]},
        {"role": "tool", "tool_call_id": sent["id"], "content": "r"},
    ]
    answer = read(server, history, tools=[TOOL])[1]
    assert answer["tool_calls"][0]["function"]["arguments"] == {"a": "[1, 2]"}
    assert answer["reasoning_content"] == "I look."


def test_a_call_that_the_client_changed_is_the_clients(server):
    server.engine.say, server.engine.finish = [call("run", a=1)], "tool_calls"
    message = server.chat(tools=[TOOL]).json["choices"][0]["message"]
    sent = message["tool_calls"][0]
    sent["function"]["arguments"] = '{"a": 2}'
    history = [{"role": "user", "content": "q"}, message]
    given = read(server, history, tools=[TOOL])[1]["tool_calls"][0]["function"]["arguments"]
    assert given == {"a": 2}


def test_broken_arguments_in_a_history_stay_text(server):
    for text in ("{bro", "[1]", "7"):
        calls = [{"id": "x", "type": "function", "function": {"name": "run", "arguments": text}}]
        history = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": calls}]
        arguments = read(server, history)[1]["tool_calls"][0]["function"]["arguments"]
        assert set(arguments) == {"arguments"}


def test_both_names_of_a_thought_are_taken_once(server):
    for name in ("reasoning", "reasoning_content"):
        history = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", name: "t"},
            {"role": "user", "content": "q"},
        ]
        assert read(server, history)[1]["reasoning_content"] == "t"


def test_nothing_of_a_part_reaches_the_engine_but_its_text_or_data(server):
    """A key `image` beside a text would open a file of the server's machine."""
    sneaky = {"type": "text", "text": "hi", "image": "secret.png", "path": "secret.png"}
    messages = read(server, [{"role": "user", "content": [sneaky]}])
    assert messages == [{"role": "user", "content": "hi"}]
    for part in (
        {"type": "image", "image": "secret.png"},
        {"type": "image_url", "image_url": {"url": "secret.png"}},
        {"type": "image_url", "image_url": "http://127.0.0.1/a.png"},
        {"type": "video", "video": "secret.mp4"},
    ):
        assert server.chat(messages=[{"role": "user", "content": [part]}]).status == 400


def test_other_kinds_of_tools_are_left_out(server):
    server.chat(tools=[TOOL, {"type": "web_search"}, {"type": "custom", "custom": {"name": "p"}}])
    assert [t["function"]["name"] for t in server.engine.last.tools] == ["run"]


def test_allowed_tools_are_those_that_are_left(server):
    other = {"type": "function", "function": {"name": "other"}}
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"function": {"name": "other"}}]},
    }
    server.chat(tools=[TOOL, other], tool_choice=choice)
    request = server.engine.last
    assert request.tool_choice == "required"
    assert [t["function"]["name"] for t in request.tools] == ["other"]


def test_a_template_of_the_client_is_never_used(server):
    server.chat(chat_template_kwargs={"chat_template": "{{ 1 }}", "preserve_thinking": True})
    assert server.engine.last.template == {"preserve_thinking": True}


def test_hidden_thoughts_come_back_whole_and_strange_ones_do_not():
    assert revealed(hidden("plan\n\u00fc")) == "plan\n\u00fc"
    for text in (None, "", "abc", "q35.", "q35.QUJD", hidden("x")[:-3]):
        assert revealed(text) in ("", "x")


def test_seven_megabytes_of_json_are_read_beside_the_loop(server):
    big = "x" * 7_000_000
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": big}]}).encode()
    assert server.post("/v1/chat/completions", body).status == 400


def test_an_answer_without_a_question_gets_an_empty_one(server):
    """The template refuses a conversation in which nobody asks."""
    said = {"role": "assistant", "content": "Hello."}
    assert server.chat(messages=[said]).status == 200
    assert server.engine.last.messages == [{"role": "user", "content": ""}, said]


PICTURE = {"type": "image", "image": "data:image/png;base64,AAAA"}


def text(words):
    return {"type": "text", "text": words}


def user(content):
    return {"role": "user", "content": content}


def said(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def reminder(words):
    return f"<system-reminder>\n{words}\n</system-reminder>"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # At the beginning: one text, whatever parts it came in.
        (
            [system([text("Be "), text("brief.")]), system("  "), system("No lists."), user("Hi")],
            [system("Be brief.\n\nNo lists."), user("Hi")],
        ),
        # Behind a question: a part of it.
        (
            [user([text("Look."), PICTURE]), system([text("Be kind.")])],
            [user([text("Look."), PICTURE, text(f"\n\n{reminder('Be kind.')}")])],
        ),
        ([user("Hi"), system("Be kind.")], [user(f"Hi\n\n{reminder('Be kind.')}")]),
        ([user(""), system("Be kind.")], [user(reminder("Be kind."))]),
        ([user("Hi"), system("\n")], [user("Hi")]),
        # Behind an answer: a part of the next question, or a question of its own.
        (
            [user("a"), said("b"), system("Stop."), user([PICTURE])],
            [user("a"), said("b"), user([text(f"{reminder('Stop.')}\n\n"), PICTURE])],
        ),
        (
            [user("a"), said("b"), system("Stop."), user("c")],
            [user("a"), said("b"), user(f"{reminder('Stop.')}\n\nc")],
        ),
        (
            [user("a"), said("b"), system("Stop.")],
            [user("a"), said("b"), user(reminder("Stop."))],
        ),
        # Nobody asks: the last instruction does.
        ([system("Be brief."), system("Say hi.")], [system("Be brief."), user("Say hi.")]),
        ([said("Hi")], [user(""), said("Hi")]),
    ],
)
def test_instructions_in_the_middle_are_reminders_in_what_the_user_says(given, expected):
    before = copy.deepcopy(given)
    assert folded(given) == expected
    assert given == before


def test_a_count_is_of_the_calls_as_they_were_written(server, monkeypatch):
    server.engine.say = [call("run", a=1)]
    sent = server.chat(tools=[TOOL]).json["choices"][0]["message"]
    counted = []
    monkeypatch.setattr(
        server.engine, "count_tokens", lambda request: counted.append(request.messages) or 5
    )
    use = {"type": "tool_use", "id": sent["tool_calls"][0]["id"], "name": "run", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": "7"}
    body = {
        "model": MODEL,
        "max_tokens": 9,
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result]},
        ],
    }
    assert server.post("/v1/messages/count_tokens", body).json == {"input_tokens": 5}
    assert server.post("/v1/messages", body).status == 200
    assert counted == [server.engine.last.messages]
    # The model wrote a text, the client gives the number.
    (written,) = counted[0][1]["tool_calls"]
    assert written["function"]["arguments"] == {"a": "1"}


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        (" ", {}),
        (None, {}),
        ("{'a'", {"arguments": "{'a'"}),
        ("[1]", {"arguments": [1]}),
        ("[" * 100_000, {"arguments": "[" * 100_000}),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_arguments_of_a_call_are_an_object(given, arguments):
    function = {"name": "run", "arguments": arguments}
    assert history_call("run", given, "1") == {"id": "1", "type": "function", "function": function}


def test_the_oldest_call_is_forgotten_and_a_given_thought_stays(monkeypatch):
    monkeypatch.setattr(messages_module, "MAX_CALLS_KEPT", 2)
    memory = CallMemory()
    for name in "abc":
        memory.keep(name, call("run", n=1).call, f"thought {name}")
    calls = {name: history_call("run", {"n": 1}, name) for name in "abc"}
    sent = [{"role": "assistant", "content": "", "tool_calls": [calls[name]]} for name in "abc"]
    sent.append(sent[2] | {"reasoning_content": "mine"})
    found = memory.restored(sent)
    assert [m.get("reasoning_content") for m in found] == [None, "thought b", "thought c", "mine"]
    read = [m["tool_calls"][0]["function"]["arguments"]["n"] for m in found]
    assert read == [1, "1", "1", "1"]
    # A call that the client changed is taken as it is.
    (changed,) = memory.restored([sent[2] | {"tool_calls": [history_call("run", {"n": 2}, "c")]}])
    assert changed["tool_calls"][0]["function"]["arguments"] == {"n": 2}


def test_an_empty_instruction_in_the_middle_is_left_out_alone():
    asked, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    empty = {"role": "system", "content": " \n"}
    assert folded([asked, empty, said, empty, asked]) == [asked, said, asked]
