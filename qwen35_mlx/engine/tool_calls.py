"""Tool calls: parsed from text, typed by the tools' schemas, put into messages.

Qwen3.5 and Qwen3-Coder write XML, Qwen3-Next and models after Hermes write JSON:

<function=NAME>
<parameter=NAME>
value, of any number of lines
</parameter>
</function>

{"name": "NAME", "arguments": {"NAME": value}}
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import Qwen35Error
from ..text import messages
from .tool_values import Schema, coerce, kinds_of, read_literal

TOOL_FORM = '{"type": "function", "function": {"name": …, "parameters": {…}}}'
FUNCTION = re.compile(r"\s*<function=([^>\n]+)>")
FUNCTION_END = re.compile(r"\s*</function>\s*")
PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>")
# A value ends at an end tag before another tag; the value itself may contain the text of one.
VALUE_END = re.compile(r"</parameter>\s*(?=<parameter=|</function>)")
# The end of a value after which the text is cut.
CUT_VALUE_END = re.compile(r"\n?</parameter>\s*(?:<[a-z/]*)?\Z")


class ToolCall(NamedTuple):
    """A call of a function by the model."""

    name: str
    arguments: dict[str, Any]
    # Parameters as the model wrote them; empty if it wrote JSON.
    raw_arguments: dict[str, str]
    # False if the call was cut or cannot be parsed: do not run it.
    complete: bool = True


UNREADABLE = ToolCall("", {}, {}, complete=False)


def check_tools(tools: Sequence[Any], where: str = "") -> None:
    """Refuse tools that are no objects, have no name or a repeated one, or an invalid schema."""
    names = set()
    for i, tool in enumerate(tools, 1):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        what = f"tool {i}{where}"
        if not isinstance(function, Mapping):
            raise Qwen35Error(f"{what} is no object", got=repr(tool)[:60], expected=TOOL_FORM)
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not name:
            raise Qwen35Error(f"{what} has no name", got=repr(name), expected=TOOL_FORM)
        if name in names:
            raise Qwen35Error(f"{what} has the same name as another", got=name)
        parameters = {} if parameters is None else parameters
        is_schema = isinstance(parameters, Mapping)
        if not is_schema or not isinstance(parameters.get("properties"), Mapping | None):
            raise Qwen35Error(
                f"the parameters of {what} are no JSON schema", got=repr(parameters)[:60]
            )
        names.add(name)


def tool_names(tools: Sequence[Schema]) -> list[str]:
    """Names of the tools, with or without the outer {"function": …}."""
    return [name for tool in tools if (name := function_of(tool)[0])]


def function_of(tool: Schema) -> tuple[str, Schema]:
    """Name and parameters of a tool; empty if they are missing or of another type."""
    function = tool.get("function", tool)
    function = function if isinstance(function, Mapping) else {}
    parameters = function.get("parameters")
    return str(function.get("name") or ""), parameters if isinstance(parameters, Mapping) else {}


def read_xml(text: str, tools: Sequence[Schema]) -> ToolCall:
    """Parse a call; `complete` is False if the text is not a whole call."""
    if not (function := FUNCTION.match(text)):
        return UNREADABLE
    raw, at = {}, function.end()
    while parameter := PARAMETER.match(text, at):
        if end := VALUE_END.search(text, parameter.end()):
            value, at = text[parameter.end() : end.start()], end.end()
        else:
            value, at = CUT_VALUE_END.sub("", text[parameter.end() :]), len(text)
        value = value.removeprefix("\n")
        raw[parameter[1].strip()] = value.removesuffix("\n") if end else value
    name = function[1].strip()
    complete = bool(name) and FUNCTION_END.fullmatch(text, at) is not None
    return ToolCall(name, _typed(name, raw, tools), raw, complete)


def read_json_calls(text: str, tools: Sequence[Schema]) -> list[ToolCall]:
    """The calls in an object or a list, in JSON or Python's spelling; empty if invalid."""
    try:
        value = read_literal(text)
        return [_json_call(v, tools) for v in (value if isinstance(value, list) else [value])]
    except (ValueError, AttributeError):
        return []


def _json_call(value: Any, tools: Sequence[Schema]) -> ToolCall:
    """A call from {"name", "arguments"}; raises ValueError or AttributeError if it is invalid."""
    value = value.get("function", value)
    arguments = value["arguments"] if "arguments" in value else value.get("parameters", "none")
    if isinstance(arguments, str):
        arguments = read_literal(arguments) if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    name = value.get("name")
    if not isinstance(arguments, dict) or not isinstance(name, str) or not name.strip():
        raise ValueError("not a call")
    return ToolCall(name.strip(), _typed(name.strip(), arguments, tools, is_json=True), {})


def _typed(
    name: str, arguments: Mapping[str, Any], tools: Sequence[Schema], is_json: bool = False
) -> dict[str, Any]:
    """The arguments, with texts converted to the types of the schema; JSON has its own types."""
    schema = dict(map(function_of, tools)).get(name, {})
    properties = schema.get("properties") or {}
    typed = {}
    for key, value in arguments.items():
        known = properties.get(key) or {}
        is_text = isinstance(value, str) and not (is_json and not kinds_of(known, schema))
        typed[key] = coerce(value, known, schema) if is_text else value
    return typed


def calls_of(message: Mapping[str, Any], tools: Sequence[Schema]) -> list[ToolCall]:
    """The tool calls of an assistant's message, from `as_message` or in OpenAI's form."""
    return [
        ToolCall(
            name,
            _typed(name, arguments, tools, is_json),
            {} if is_json else {k: v for k, v in arguments.items() if isinstance(v, str)},
        )
        for name, arguments, is_json in messages.tool_calls(message)
    ]


def as_message(call: ToolCall, *, typed: bool = False) -> dict[str, Any]:
    """A call for chat templates, so that it is rendered as the model wrote it.

    typed: for templates that render the arguments as JSON. Others print each value, so arguments
    in XML are passed as text.
    """
    arguments = {**call.arguments, **({} if typed else call.raw_arguments)}
    return {"type": "function", "function": {"name": call.name, "arguments": arguments}}
