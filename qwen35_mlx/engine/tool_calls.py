"""Tool calls out of streamed text: Qwen's XML, shown to nobody, coerced by the tools' schemas.

<tool_call>
<function=NAME>
<parameter=NAME>
value, of any number of lines
</parameter>
</function>
</tool_call>
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .output import Piece, ToolCall, held_back

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = re.compile(r"\s*<function=([^>\n]*)>"), re.compile(r"\s*</function>\s*")
PARAMETER, PARAMETER_END = re.compile(r"\s*<parameter=([^>\n]*)>"), "</parameter>"
# A value ends where a tag follows its end: it may hold the end's text itself.
FOLLOWING = ("<parameter=", "</function>")
VALUE = re.compile(rf"\n?(.*?)\n?{PARAMETER_END}(?=\s*(?:{'|'.join(FOLLOWING)}))", re.DOTALL)
Schema = Mapping[str, Any]


class ToolCallParser:
    """Splits an answer's text into what is shown and tool calls, however it is cut."""

    def __init__(self, tools: Sequence[Schema]):
        self._tools = tools
        self._pending = ""
        self._in_call = False
        # Where an end of the call may still be found.
        self._scanned = 0
        # Nothing was said since the last call: its line ends belong to nobody.
        self._after_call = False

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain after `text`."""
        self._pending += text
        pieces: list[Piece] = []
        while True:
            if not self._in_call:
                before, opened, behind = self._pending.partition(OPEN)
                ready = len(before) - (0 if opened else held_back(before, (OPEN,)))
                # The line ends before a call belong to it.
                ready = len(before[:ready].rstrip())
                pieces += self._said(before[:ready])
                if not opened:
                    self._pending = before[ready:]
                    return pieces
                self._pending, self._in_call, self._scanned = behind, True, 0
            end = -1
            if self._pending.find(CLOSE, self._scanned) >= 0:
                call, length = _read_call(self._pending, self._tools)
                # What is in a value ends no call; what cannot be understood is skipped.
                end = self._pending.find(CLOSE, length)
            if end < 0:
                self._scanned = max(0, len(self._pending) - len(CLOSE) + 1)
                return pieces
            pieces.append(Piece("tool_call", "", call))
            self._pending = self._pending[end + len(CLOSE) :]
            self._in_call, self._after_call = False, True

    def finish(self) -> list[Piece]:
        """What was held back, now that nothing follows; a call that is cut is not complete."""
        rest, self._pending = self._pending, ""
        if self._in_call:
            return [Piece("tool_call", "", _read_call(rest, self._tools)[0])]
        # The beginning of a call that was cut is no text either.
        return self._said("" if rest.lstrip().startswith(OPEN[:7]) else rest)

    def _said(self, text: str) -> list[Piece]:
        if self._after_call:
            text = text.lstrip()
        self._after_call = self._after_call and not text
        return [Piece("answer", text)] if text else []


def _read_call(text: str, tools: Sequence[Schema]) -> tuple[ToolCall, int]:
    """The call that `text`, behind its opening tag, begins with, and the length understood."""
    if not (function := FUNCTION.match(text)):
        return _typed("", {}, tools, complete=False), 0
    raw, at = {}, function.end()
    while parameter := PARAMETER.match(text, at):
        if value := VALUE.match(text, parameter.end()):
            said, at = value[1], value.end()
        else:
            said, at = text[parameter.end() :], len(text)
            # Its end may be there, and only what has to follow be cut.
            before, ended, behind = said.rpartition(PARAMETER_END)
            if ended and any(tag.startswith(behind.lstrip()) for tag in FOLLOWING):
                said = before.removesuffix("\n")
            said = said.removeprefix("\n")
        raw[parameter[1].strip()] = said
    end = FUNCTION_END.match(text, at)
    at = end.end() if end else at
    complete = end is not None and (text.startswith(CLOSE, at) or CLOSE.startswith(text[at:]))
    return _typed(function[1].strip(), raw, tools, complete), at


def calls_of(message: Mapping[str, Any], tools: Sequence[Schema]) -> list[ToolCall]:
    """The tool calls of an assistant's message as this module's parser gave them."""
    called = [call["function"] for call in message.get("tool_calls") or ()]
    return [_typed(function["name"], function["arguments"], tools) for function in called]


def _typed(
    name: str, raw: Mapping[str, str], tools: Sequence[Schema], complete: bool = True
) -> ToolCall:
    """A call with its arguments as the tool's schema has them."""
    schema = dict(map(_function, tools)).get(name, {})
    properties = schema.get("properties") or {}
    arguments = {key: coerce(text, properties.get(key, {}), schema) for key, text in raw.items()}
    return ToolCall(name, arguments, dict(raw), complete)


def as_message(call: ToolCall) -> dict[str, Any]:
    """A call as chat templates take it; its arguments as text, to be rendered as they were said."""
    return {
        "type": "function",
        "function": {"name": call.name, "arguments": dict(call.raw_arguments)},
    }


def _function(tool: Schema) -> tuple[str, Schema]:
    """Name and parameters' schema of a tool, with or without the outer {"function": …}."""
    function = tool.get("function", tool)
    return str(function.get("name", "")), function.get("parameters") or {}


def coerce(raw: str, schema: Schema, root: Schema) -> Any:
    """A parameter's text as the type that its JSON schema asks for; text where it does not fit."""
    kinds = _kinds(schema, root)
    if not kinds:
        return raw
    try:
        value = json.loads(raw, parse_constant=_refuse)
    except ValueError:
        # Templates in Python print these so, and the model has read them.
        spoken = {"True": True, "False": False, "None": None}
        if raw.strip() not in spoken:
            return raw
        value = spoken[raw.strip()]
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
    return value if any(fits.get(kind, False) for kind in kinds) else raw


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _kinds(schema: Schema, root: Schema, depth: int = 0) -> set[str]:
    """The JSON types that a schema allows."""
    if depth > 8 or not isinstance(schema, Mapping):
        return set()
    if match := re.fullmatch(r"#/(\$defs|definitions)/([^/]+)", str(schema.get("$ref", ""))):
        target = (root.get(match[1]) or {}).get(match[2], {})
        return _kinds(target, root, depth + 1)
    kinds = schema.get("type", [])
    found = {kinds} if isinstance(kinds, str) else set(kinds)
    for key in ("anyOf", "oneOf", "allOf"):
        for part in schema.get(key) or ():
            found |= _kinds(part, root, depth + 1)
    if not found and "enum" in schema:
        names = {bool: "boolean", int: "integer", float: "number", type(None): "null"}
        found = {names.get(type(choice), "string") for choice in schema["enum"]}
    return found
