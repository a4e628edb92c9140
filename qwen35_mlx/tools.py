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

from .prompt import Piece, ToolCall, held_back

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
Schema = Mapping[str, Any]


class ToolCallParser:
    """Splits an answer's text into what is shown and tool calls, however it is cut."""

    def __init__(self, tools: Sequence[Schema]):
        self._schemas = dict(map(_function, tools))
        self._pending = ""
        self._state = self._text
        # Nothing was said since the last call: its line ends belong to nobody.
        self._after_call = False
        self._name = self._parameter = ""
        self._raw: dict[str, str] = {}
        self._scanned = 0

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain after `text`."""
        self._pending += text
        pieces: list[Piece] = []
        # Each state takes what it is sure of, and says whether to go on.
        while self._state(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back, now that nothing follows; a call that is cut is not complete."""
        rest, self._pending = self._pending, ""
        if self._state == self._text:
            # The beginning of a call that was cut is no text either.
            return self._said("" if rest.lstrip().startswith(OPEN[:7]) else rest)
        if self._state == self._value:
            # Its end may be there, and only what has to follow be cut.
            closed = rest.startswith(PARAMETER_END, self._scanned)
            value = rest[: self._scanned].removesuffix("\n") if closed else rest
            self._raw[self._parameter] = value.removeprefix("\n")
        return [self._call(complete=self._state == self._end)]

    def _text(self, pieces: list[Piece]) -> bool:
        at = self._pending.find(OPEN)
        if at >= 0:
            pieces += self._said(self._pending[:at].rstrip())
            self._become(self._function_name, at + len(OPEN))
            self._name, self._raw = "", {}
            return True
        ready = len(self._pending) - held_back(self._pending, (OPEN,))
        # The line ends before a call belong to it.
        ready = len(self._pending[:ready].rstrip())
        pieces += self._said(self._pending[:ready])
        self._pending = self._pending[ready:]
        return False

    def _said(self, text: str) -> list[Piece]:
        if self._after_call:
            text = text.lstrip()
        if not text:
            return []
        self._after_call = False
        return [Piece("answer", text)]

    def _function_name(self, pieces: list[Piece]) -> bool:
        return self._tag(pieces, {FUNCTION: self._named})

    def _inside(self, pieces: list[Piece]) -> bool:
        return self._tag(pieces, {PARAMETER: self._parameter_named, FUNCTION_END: self._ended})

    def _end(self, pieces: list[Piece]) -> bool:
        def closed(length: int) -> bool:
            self._become(self._text, length)
            pieces.append(self._call(complete=True))
            return True

        return self._tag(pieces, {CLOSE: closed})

    def _tag(self, pieces: list[Piece], tags: Mapping[str, Any]) -> bool:
        """Whichever of `tags` follows; anything else spoils the call."""
        text = self._pending.lstrip()
        start = len(self._pending) - len(text)
        for tag, found in tags.items():
            if text.startswith(tag):
                if not tag.endswith("="):
                    return bool(found(start + len(tag)))
                line, closed, _ = text[len(tag) :].partition(">")
                if closed and "\n" not in line:
                    return bool(found(line.strip(), start + len(tag) + len(line) + 1))
                if "\n" not in line:
                    return False
            elif tag.startswith(text):
                return False
        self._become(self._spoilt, 0)
        return True

    def _named(self, name: str, length: int) -> bool:
        self._name = name
        self._become(self._inside, length)
        return True

    def _parameter_named(self, name: str, length: int) -> bool:
        self._parameter = name
        self._become(self._value, length)
        return True

    def _ended(self, length: int) -> bool:
        self._become(self._end, length)
        return True

    def _value(self, pieces: list[Piece]) -> bool:
        """A value ends where a tag follows its end: it may hold the end's text itself."""
        while (at := self._pending.find(PARAMETER_END, self._scanned)) >= 0:
            behind = self._pending[at + len(PARAMETER_END) :].lstrip()
            following = (PARAMETER, FUNCTION_END)
            if behind.startswith(following):
                value = self._pending[:at]
                self._raw[self._parameter] = value.removeprefix("\n").removesuffix("\n")
                self._become(self._inside, at + len(PARAMETER_END))
                return True
            if any(tag.startswith(behind) for tag in following):
                self._scanned = at
                return False
            self._scanned = at + 1
        self._scanned = max(self._scanned, len(self._pending) - len(PARAMETER_END) + 1)
        return False

    def _spoilt(self, pieces: list[Piece]) -> bool:
        """Skip what cannot be understood, up to the end of the call."""
        at = self._pending.find(CLOSE)
        if at < 0:
            return False
        self._become(self._text, at + len(CLOSE))
        pieces.append(self._call(complete=False))
        return True

    def _become(self, state: Any, consumed: int) -> None:
        self._state = state
        self._pending = self._pending[consumed:]
        self._scanned = 0

    def _call(self, complete: bool) -> Piece:
        self._after_call = True
        arguments = _coerced(self._raw, self._schemas.get(self._name, {}))
        return Piece("tool_call", "", ToolCall(self._name, arguments, dict(self._raw), complete))


def calls_of(message: Mapping[str, Any], tools: Sequence[Schema]) -> list[ToolCall]:
    """The tool calls of an assistant's message as this module's parser gave them."""
    schemas = dict(map(_function, tools))
    calls = []
    for call in message.get("tool_calls") or ():
        name, raw = call["function"]["name"], call["function"]["arguments"]
        schema = schemas.get(name, {})
        calls.append(ToolCall(name, _coerced(raw, schema), dict(raw)))
    return calls


def as_message(call: ToolCall) -> dict[str, Any]:
    """A call as chat templates take it; its arguments as text, to be rendered as they were said."""
    return {
        "type": "function",
        "function": {"name": call.name, "arguments": dict(call.raw_arguments)},
    }


def _coerced(raw: Mapping[str, str], schema: Schema) -> dict[str, Any]:
    properties = schema.get("properties") or {}
    return {name: coerce(text, properties.get(name, {}), schema) for name, text in raw.items()}


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
