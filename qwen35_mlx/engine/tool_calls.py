"""Tool calls: parsed from text, typed by the schemas of the tools, put into messages.

Qwen3.5 and Qwen3-Coder write XML, Qwen3-Next and models after Hermes write JSON:

<function=NAME>
<parameter=NAME>
value, of any number of lines
</parameter>
</function>

{"name": "NAME", "arguments": {"NAME": value}}
"""

import ast
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import Qwen35Error
from ..text import messages

TOOL_FORM = '{"type": "function", "function": {"name": …, "parameters": {…}}}'
FUNCTION = re.compile(r"\s*<function=([^>\n]+)>")
FUNCTION_END = re.compile(r"\s*</function>\s*")
PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>")
# A value ends at an end tag before another tag; the value itself may contain the text of one.
VALUE_END = re.compile(r"</parameter>\s*(?=<parameter=|</function>)")
# The end of a value after which the text is cut.
CUT_VALUE_END = re.compile(r"\n?</parameter>\s*(?:<[a-z/]*)?\Z")
Schema = Mapping[str, Any]
# Python's constants: chat templates print them, and the model copies the form.
CONSTANTS = {"True": True, "False": False, "None": None}
MAX_LITERAL_CHARS = 100_000
MAX_DEPTH = 64
# JSON's constants outside of quotes.
JSON_WORD = re.compile(
    r""""[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*'|\b(true|false|null)\b""", re.DOTALL
)
# Python's names of the types, which many schemas hold in place of JSON's.
PYTHON_TYPES = {
    "str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array",
    "dict": "object", "NoneType": "null",
}  # fmt: skip
PYTHON_WORDS = {"true": "True", "false": "False", "null": "None"}


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
    function = _mapping(tool.get("function", tool))
    return str(function.get("name") or ""), _mapping(function.get("parameters"))


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


def coerce(raw: str, schema: Schema, root: Schema) -> Any:
    """Convert a parameter's text to the type of its JSON schema; text if it does not fit."""
    kinds = kinds_of(schema, root)
    text = raw.strip()
    try:
        if kinds and text in CONSTANTS:
            value = CONSTANTS[text]
        elif kinds & {"array", "object"} and text[:1] in ("[", "{", "("):
            value = read_literal(text)
        else:
            value = read_json(raw)
    except ValueError:
        return raw
    if "integer" in kinds and isinstance(value, float) and value.is_integer():
        return value if "number" in kinds else int(value)
    fits = {
        "integer": isinstance(value, int) and not isinstance(value, bool),
        "number": isinstance(value, int | float) and not isinstance(value, bool),
        "boolean": isinstance(value, bool),
        "null": value is None,
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
    }
    # Without a type: an array, an object, or text.
    return value if any(fits.get(kind, False) for kind in kinds or ("array", "object")) else raw


def read_literal(text: str) -> Any:
    """Parse JSON, Python's spelling of it, or a mix; raises ValueError."""
    try:
        return read_json(text)
    except ValueError:
        if len(text) > MAX_LITERAL_CHARS:
            raise
    python = JSON_WORD.sub(lambda m: PYTHON_WORDS[m[1]] if m[1] else m[0], text)
    try:
        with warnings.catch_warnings():
            # Warnings about unknown escapes in strings.
            warnings.simplefilter("ignore")
            value = ast.literal_eval(python.strip())
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"neither JSON nor a literal: {type(error).__name__}") from None
    return _json_value(value)


def read_json(text: str) -> Any:
    """Parse JSON, also with line breaks in strings; raises ValueError."""
    try:
        return _json_value(json.loads(text, strict=False))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _json_value(value: Any, depth: int = 0) -> Any:
    """The value in JSON's types, with tuples as lists; raises ValueError."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, list | tuple):
        return [_json_value(item, depth + 1) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("keys of objects are text")
        return {_json_value(k): _json_value(v, depth + 1) for k, v in value.items()}
    if isinstance(value, str):
        # Lone surrogates could not be encoded.
        value.encode()
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not a finite number")
    elif not isinstance(value, bool | int | float | None):
        raise ValueError(f"{type(value).__name__} is not of JSON")
    return value


def kinds_of(schema: Any, root: Schema, depth: int = 0) -> set[str]:
    """The JSON types that a schema allows; empty if it has no type."""
    if depth > 8 or not isinstance(schema, Mapping):
        return set()
    if match := re.fullmatch(r"#/(\$defs|definitions)/([^/]+)", str(schema.get("$ref", ""))):
        return kinds_of(_mapping(root.get(match[1])).get(match[2]), root, depth + 1)
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    found = {PYTHON_TYPES.get(kind, kind) for kind in kinds if isinstance(kind, str)}
    for key in ("anyOf", "oneOf", "allOf"):
        for part in schema.get(key) or ():
            found |= kinds_of(part, root, depth + 1)
    if not found and ("enum" in schema or "const" in schema):
        choices = schema["enum"] or () if "enum" in schema else [schema["const"]]
        found = {PYTHON_TYPES.get(type(choice).__name__, "string") for choice in choices}
    return found | {"null"} if found and schema.get("nullable") is True else found


def _mapping(value: Any) -> Schema:
    return value if isinstance(value, Mapping) else {}
