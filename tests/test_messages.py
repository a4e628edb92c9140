"""Tool calls in a history, as OpenAI's API gives them and as chat templates take them."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from test_prompt import with_template

from qwen35_mlx import Chat
from qwen35_mlx.engine.tool_calls import calls_of
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.prompt import encode_messages, render_messages
from qwen35_mlx.text.messages import for_template

MULTIPLY = {
    "type": "function",
    "function": {
        "name": "mul",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {}, "c": {"type": "array"}},
        },
    },
}
USER = {"role": "user", "content": "3 times 18?"}


def assistant(arguments: Any, **message: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "mul", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call], **message}


VALUES = {"a": 3, "b": None, "c": [1, {"x": False}], "d": "two\nlines", "e": 1.5, "f": {"g": []}}


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (json.dumps(VALUES), VALUES), (VALUES, VALUES), ("", {}), ("  ", {}), ("{}", {}), ({}, {}),
        (None, {}),
        # As a chat keeps what was written in XML.
        ({"a": "3", "b": "true", "c": "['x']"}, {"a": 3, "b": "true", "c": ["x"]}),
        ('{"a": "3", "b": "[1]"}', {"a": 3, "b": "[1]"}),
    ],
)  # fmt: skip
def test_arguments_in_every_form(demo: Any, arguments: Any, values: dict[str, Any]) -> None:
    message = assistant(arguments)
    (call,) = calls_of(message, [MULTIPLY])
    assert (call.name, call.arguments, call.complete) == ("mul", values, True)
    text = render_messages(demo[1], [USER, message], add_generation_prompt=False)
    assert "None" not in text.partition("<tool_call>")[0]
    assert text.count("<parameter=") == len(values)
    # Given in another form, it is the same prompt.
    given = json.loads(arguments.strip() or "{}") if isinstance(arguments, str) else arguments
    flat = {"role": "assistant", "tool_calls": [{"name": "mul", "arguments": given}]}
    assert text == render_messages(demo[1], [USER, flat], add_generation_prompt=False)
    assert message == assistant(arguments)
    old = {"role": "assistant", "function_call": {"name": "mul", "arguments": arguments}}
    assert text == render_messages(demo[1], [USER, old], add_generation_prompt=False)
    assert calls_of(old, [MULTIPLY]) == [call]


def test_other_names_of_roles(demo: Any) -> None:
    def shown(system: str, tool: str) -> str:
        messages = [{"role": system, "content": "Be brief."}, USER, assistant("{}")]
        messages.append({"role": tool, "name": "mul", "content": "54"})
        return str(render_messages(demo[1], messages, add_generation_prompt=True))

    assert shown("developer", "function") == shown("system", "tool")
    assert "Be brief." in shown("developer", "function")


@pytest.mark.parametrize(
    "calls",
    [
        [{"function": {"name": "mul", "arguments": "{'a': 3"}}],
        [{"function": {"name": "mul", "arguments": "[1]"}}],
        [{"function": {"name": "mul", "arguments": "3"}}],
        [{"function": {"name": "mul", "arguments": "[" * 100_000}}],
        [{"function": {"name": "mul", "arguments": [1]}}],
        [{"function": {"name": "mul", "arguments": {1: 2}}}],
        [{"function": {"name": "", "arguments": {}}}],
        [{"function": {"name": None, "arguments": {}}}],
        [{"function": {"arguments": {}}}],
        [{"function": "mul", "arguments": {}}],
        [{"id": "1", "type": "function"}],
        [None],
        ["mul"],
        {"function": {"name": "mul", "arguments": {}}},
        "mul",
        7,
    ],
    ids=repr,
)
def test_calls_that_cannot_be_used_are_refused(demo: Any, calls: Any) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    with pytest.raises(Qwen35Error, match="not usable"):
        calls_of(message, [MULTIPLY])
    with pytest.raises(Qwen35Error, match="not usable"):
        encode_messages(demo[1], [USER, message], add_generation_prompt=True)


@pytest.mark.parametrize(
    ("tool", "problem"),
    [("mul", "is no object"), (None, "is no object"), ({"function": {}}, "has no name"),
     (MULTIPLY, "same name as another"), ({"name": "f", "parameters": True}, "no JSON schema")],
)  # fmt: skip
def test_what_is_no_tool_is_refused_when_a_chat_begins(demo: Any, tool: Any, problem: str) -> None:
    with pytest.raises(Qwen35Error, match=f"tool 2.* {problem}|parameters of tool 2 .*{problem}"):
        Chat(*demo, tools=[MULTIPLY, tool])


@pytest.mark.parametrize("calls", [None, [], ()])
def test_no_calls_are_no_calls(calls: Any) -> None:
    assert calls_of({"role": "assistant", "content": "Hi", "tool_calls": calls}, []) == []


@pytest.mark.parametrize("arguments", ['{"a": 3, "b": 18}', {"a": 3, "b": 18}])
def test_a_conversation_goes_on_from_a_history(
    demo: Any, scripted: Callable[..., Any], arguments: Any
) -> None:
    tokenizer = demo[1]
    model = scripted([*tokenizer.encode("54"), tokenizer.eos_token_id])
    history = [USER, assistant(arguments)]
    chat = Chat(model, tokenizer, tools=[MULTIPLY], messages=history, enable_thinking=False)
    assert [(c.name, c.arguments) for c in chat.tool_calls] == [("mul", {"a": 3, "b": 18})]
    assert "".join(piece.text for piece in chat.answer_tools([54])) == "54"
    assert chat.messages[:2] == history


HERMES = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.mark.parametrize(
    "said",
    [
        '<tool_call>\n{"name": "mul", "arguments": {"a": 3, "b": true, "c": ["x"]}}\n</tool_call>',
        "<tool_call>\n<function=mul>\n<parameter=a>\n3\n</parameter>\n<parameter=b>\n{}\n"
        "</parameter>\n<parameter=c>\n['x']\n</parameter>\n</function>\n</tool_call>",
    ],
)
def test_a_template_that_renders_json_gets_typed_values(
    demo: Any, scripted: Callable[..., Any], said: str
) -> None:
    tokenizer = with_template(demo[1], HERMES)
    ids = tokenizer.encode(said, add_special_tokens=False)
    chat = Chat(scripted([*ids, tokenizer.eos_token_id]), tokenizer, tools=[MULTIPLY])
    (piece,) = chat.send("go")
    assert piece.call and piece.call.complete
    text = render_messages(tokenizer, chat.messages, add_generation_prompt=False)
    arguments = json.dumps(piece.call.arguments)
    assert f'"arguments": {arguments}' in text
    # What the model wrote in JSON comes back as it is.
    assert said.startswith("<tool_call>\n<") or said in text


def test_a_call_in_a_thought_that_never_closes_waits_for_its_answer(
    demo: Any, scripted: Callable[..., Any]
) -> None:
    tokenizer = demo[1]
    call = "<tool_call>\n<function=mul>\n<parameter=a>\n3\n</parameter>\n</function>\n</tool_call>"
    said = tokenizer.encode(f"I should multiply.\n\n{call}", add_special_tokens=False)
    answer = tokenizer.encode("Done.\n</think>\n\n9", add_special_tokens=False)
    end = [tokenizer.eos_token_id]
    chat = Chat(scripted([*said, *end, *answer, *end]), tokenizer, tools=[MULTIPLY])
    list(chat.send("3 times 3?"))
    assert [(c.name, c.arguments) for c in chat.tool_calls] == [("mul", {"a": 3})]
    assert chat.messages[-1]["reasoning_content"] == "I should multiply."
    assert "".join(p.text for p in chat.answer_tools([9]) if p.kind == "answer") == "9"


def test_an_answer_that_spells_the_tag_of_a_thought_is_no_thought_in_the_next_prompt(
    demo: Any, scripted: Callable[..., Any]
) -> None:
    tokenizer = demo[1]
    spelled = [token for char in "</think>" for token in tokenizer.encode(char)]
    ids = [*tokenizer.encode("Split at "), *spelled, *tokenizer.encode("!")]
    chat = Chat(scripted([*ids, tokenizer.eos_token_id]), tokenizer, enable_thinking=False)
    assert "".join(piece.text for piece in chat.send("How?")) == "Split at </think>!"
    # With text there, Qwen's template does not look for a thought in the content.
    assert chat.messages[1]["reasoning_content"] == ""


def test_a_call_without_a_function_keeps_its_other_keys_beside_one() -> None:
    call = {"id": "a", "type": "function", "name": "f", "arguments": '{"x": 1}'}
    (message,) = for_template([{"role": "assistant", "content": None, "tool_calls": [call]}])
    function = {"name": "f", "arguments": {"x": 1}}
    assert message["tool_calls"] == [{"id": "a", "type": "function", "function": function}]
    assert message["content"] == ""
