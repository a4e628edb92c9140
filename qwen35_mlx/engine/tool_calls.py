"""Tool calls: read from the text of a call, typed by the tools' schemas, put into messages.

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
# A value ends where a tag follows its end: it may hold the end's text itself.
VALUE_END = re.compile(r"</parameter>\s*(?=<parameter=|</function>)")
# The end of a value, and what has to follow it is cut.
CUT_VALUE_END = re.compile(r"\n?</parameter>\s*(?:<[a-z/]*)?\Z")


class ToolCall(NamedTuple):
    """A function that the model wants called."""

    name: str
    arguments: dict[str, Any]
    # Texts of the parameters as the model wrote them; none if it wrote JSON.
    raw_arguments: dict[str, str]
    # False if the call was cut or cannot be understood: not to be run.
    complete: bool = True


UNREADABLE = ToolCall("", {}, {}, complete=False)


def check_tools(tools: Sequence[Any], where: str = "") -> None:
    """Refuse what is no tool, has no name or another's, or has parameters without a schema."""
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
            raise Qwen35Error(f"{what} has the name of another", got=name)
        parameters = {} if parameters is None else parameters
        is_schema = isinstance(parameters, Mapping)
        if not is_schema or not isinstance(parameters.get("properties"), Mapping | None):
            raise Qwen35Error(
                f"the parameters of {what} are no JSON schema", got=repr(parameters)[:60]
            )
        names.add(name)


def tool_names(tools: Sequence[Schema]) -> list[str]:
    """Names of the tools, with or without the outer {"function": …} of their schemas."""
    return [name for tool in tools if (name := str(_function(tool).get("name") or ""))]


def read_xml(text: str, tools: Sequence[Schema]) -> ToolCall:
    """The call that `text` is; incomplete, as far as it goes, if it is not all of a call."""
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
    """The calls in a JSON object or a list of them, in JSON or Python's spelling; none if bad."""
    try:
        value = read_literal(text)
        return [_json_call(v, tools) for v in (value if isinstance(value, list) else [value])]
    except (ValueError, AttributeError):
        return []


def _json_call(value: Any, tools: Sequence[Schema]) -> ToolCall:
    """A call of {"name", "arguments"}; ValueError or AttributeError if it is none."""
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
    """Arguments of which texts have the type of the tool's schema; JSON has types of its own."""
    schemas = {str(f.get("name")): f.get("parameters") for f in map(_function, tools)}
    schema = schemas.get(name)
    schema = schema if isinstance(schema, Mapping) else {}
    properties = schema.get("properties") or {}
    typed = {}
    for key, value in arguments.items():
        known = properties.get(key) or {}
        is_text = isinstance(value, str) and not (is_json and not kinds_of(known, schema))
        typed[key] = coerce(value, known, schema) if is_text else value
    return typed


def calls_of(message: Mapping[str, Any], tools: Sequence[Schema]) -> list[ToolCall]:
    """The tool calls of an assistant's message, of `as_message` or as OpenAI's API has them."""
    return [
        ToolCall(
            name,
            _typed(name, arguments, tools, is_json),
            {} if is_json else {k: v for k, v in arguments.items() if isinstance(v, str)},
        )
        for name, arguments, is_json in messages.tool_calls(message)
    ]


def as_message(call: ToolCall, *, typed: bool = False) -> dict[str, Any]:
    """A call as chat templates take it, to be rendered as the model wrote it.

    typed: for templates that render the arguments as JSON. The others print each value, so what
    was written in XML goes in as text.
    """
    arguments = {**call.arguments, **({} if typed else call.raw_arguments)}
    return {"type": "function", "function": {"name": call.name, "arguments": arguments}}


def _function(tool: Schema) -> Schema:
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else {}
