"""The engine's form of messages, for all APIs, with prefixes that stay the same.

Prompts are cached by prefix, so a history that a client sends again must render as before:

- System and developer messages at the beginning become one system message. Later ones stay in
  place, as a `<system-reminder>` at the end of the previous message: the template accepts no system
  message there, and a system prompt that grows would be prefilled again each turn.
- A call that the client did not change, by its id, is rendered as the model wrote it. Its thought
  is restored if the client left it out.
- Lines that change with each request and have no meaning for the model are dropped.
"""

import base64
import json
import secrets
import threading
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.tool_calls import ToolCall, as_message
from ..text.media_parts import text_of
from .faults import ApiError
from .fields import Fields

Message = dict[str, Any]
MAX_MEDIA = 64
MAX_CALLS_KEPT = 1000
BILLING = "x-anthropic-billing-header:"
IMAGE = "image_url"
# The beginning of a hidden thought, and the most characters that one has.
HIDDEN, MAX_HIDDEN_CHARS = "q35.", 2_000_000


def call_id(prefix: str = "call_") -> str:
    """A new id of a tool call."""
    return f"{prefix}{secrets.token_hex(12)}"


def given_messages(body: Fields) -> list[Fields]:
    """The messages of a request, at least one."""
    given = body.records("messages")
    if given is None:
        raise body.missing("messages")
    if not given:
        raise body.refuse("messages", "at least one message")
    return given


def assistant_message(content: Any, thought: str | None, calls: list[dict[str, Any]]) -> Message:
    """A message of the assistant, with its thought and calls, if there are any."""
    message: Message = {"role": "assistant", "content": content}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return message


class CallMemory:
    """Recently sent calls with their thoughts, by id."""

    def __init__(self, typed: bool = False):
        """typed: whether the chat template renders arguments as JSON."""
        self._typed = typed
        self._calls: OrderedDict[str, tuple[ToolCall, str]] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, name: str, call: ToolCall, thought: str) -> None:
        """Store a call; the oldest one is dropped if there are too many."""
        with self._lock:
            self._calls[name] = call, thought
            while len(self._calls) > MAX_CALLS_KEPT:
                self._calls.popitem(last=False)

    def restored(self, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """The messages with calls as the model wrote them, and with missing thoughts."""
        changed = []
        for message in map(dict, messages):
            if calls := message.get("tool_calls"):
                written, thoughts = zip(*map(self._as_written, calls), strict=True)
                message["tool_calls"] = list(written)
                if thoughts[0] and not message.get("reasoning_content"):
                    message["reasoning_content"] = thoughts[0]
            changed.append(message)
        return changed

    def _as_written(self, given: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        """The call as the model wrote it, if the client did not change it; and its thought."""
        call, thought = self._calls.get(str(given.get("id")), (None, ""))
        function = given["function"]
        if call and call.name == function["name"] and call.arguments == function["arguments"]:
            return as_message(call, typed=self._typed), thought
        return {"type": "function", "function": function}, thought


def history_call(name: str, arguments: Any, identity: str | None) -> dict[str, Any]:
    """A call in a history; arguments that are not a JSON object become one argument."""
    if isinstance(arguments, str):
        text = arguments
        try:
            arguments = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError):
            arguments = text
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        arguments = {"arguments": arguments}
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def folded(messages: list[Message]) -> list[Message]:
    """The messages with at most one system message, at the beginning; see this module's head."""
    num_leading = 0
    while num_leading < len(messages) and messages[num_leading]["role"] == "system":
        num_leading += 1
    leading, rest = messages[:num_leading], messages[num_leading:]
    if not any(message["role"] in ("user", "tool") for message in rest):
        # The template needs a message of the user: take the last instruction.
        question = leading.pop() if leading else {"content": ""}
        rest = [{**question, "role": "user"}, *rest]
    result: list[Message] = []
    system = "\n\n".join(text for m in leading if (text := text_of(m["content"]).strip()))
    if system:
        result.append({"role": "system", "content": system})
    for i, message in enumerate(rest):
        if message["role"] != "system":
            result.append(message)
            continue
        text = text_of(message["content"]).strip()
        if not text:
            continue
        reminder = f"<system-reminder>\n{text}\n</system-reminder>"
        if result and result[-1]["role"] in ("user", "tool"):
            before = result.pop()
            result.append({**before, "content": _appended(before["content"], reminder)})
        elif i + 1 < len(rest) and rest[i + 1]["role"] == "user":
            rest[i + 1] = {**rest[i + 1], "content": _prepended(rest[i + 1]["content"], reminder)}
        else:
            result.append({"role": "user", "content": reminder})
    return result


def _appended(content: Any, text: str) -> Any:
    if isinstance(content, list):
        return [*content, {"type": "text", "text": f"\n\n{text}"}]
    return f"{content}\n\n{text}" if content else text


def _prepended(content: Any, text: str) -> Any:
    if isinstance(content, list):
        return [{"type": "text", "text": f"{text}\n\n"}, *content]
    return f"{text}\n\n{content}"


def joined(parts: list[dict[str, Any]], between: str = "") -> str | list[dict[str, Any]]:
    """Merge text parts; the result is a text, or a list of parts if there is a picture.

    `between` separates texts without white space between them.
    """
    merged: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] == "text" and merged and merged[-1]["type"] == "text":
            before, text = merged[-1]["text"], part["text"]
            needs = before and text and not before[-1].isspace() and not text[0].isspace()
            merged[-1] = {"type": "text", "text": before + (between if needs else "") + text}
        else:
            merged.append(part)
    if not merged:
        return ""
    return str(merged[0]["text"]) if len(merged) == 1 and merged[0]["type"] == "text" else merged


def picture(source: str | None, where: Fields, field: str) -> dict[str, Any]:
    """A part for a picture from a data: URL; nothing is fetched, and no file is read."""
    if source is None:
        raise where.missing(field)
    if source[:5].lower() != "data:":
        name = where.name(field)
        raise ApiError(
            400,
            f"{name}: only data: URLs are read, such as data:image/png;base64,…; nothing is "
            "fetched and no file is opened for a client",
            param=name,
            code="invalid_image_url",
        )
    return {"type": IMAGE, IMAGE: {"url": source}}


def check_media(messages: list[Message]) -> list[Message]:
    """The messages, if they do not have too many pictures."""
    contents = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    num_media = sum(part["type"] != "text" for content in contents for part in content)
    if num_media > MAX_MEDIA:
        raise ApiError(400, f"messages: got {num_media} pictures, expected at most {MAX_MEDIA}")
    return messages


def function_tool(
    name: str | None, description: Any, parameters: Any, where: Fields
) -> dict[str, Any]:
    """A tool for the chat template, with its keys in a fixed order."""
    if not name:
        raise where.missing("name")
    if len(name) > 256 or any(c in "<>\"'" or c.isspace() or not c.isprintable() for c in name):
        raise where.refuse("name", "a name without spaces, quotes and angle brackets")
    if parameters is not None and not isinstance(parameters, dict):
        raise where.refuse("parameters", "a JSON schema", "invalid_type")
    if isinstance(parameters, dict) and not isinstance(parameters.get("properties") or {}, dict):
        raise where.refuse("parameters", "a JSON schema whose properties are an object")
    function: dict[str, Any] = {"name": name}
    if isinstance(description, str):
        function["description"] = description
    if parameters:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


def read_function(function: Fields) -> dict[str, Any]:
    """A tool of OpenAI's and Ollama's APIs."""
    description, parameters = function.text("description"), function.raw("parameters")
    return function_tool(function.text("name"), description, parameters, function)


def read_functions(body: Fields) -> list[dict[str, Any]]:
    """The functions among the tools, without kinds that only OpenAI runs."""
    tools = [t for t in body.records("tools") or () if (t.text("type") or "function") == "function"]
    # In the responses API the fields are in the tool itself.
    return [read_function(tool.record("function") or tool) for tool in tools]


def strict_names(body: Fields) -> list[str]:
    """Names of the strict tools, in any API."""
    holders = [tool.record("function") or tool for tool in body.records("tools") or ()]
    return [holder.text("name") or "" for holder in holders if holder.flag("strict")]


def hidden(thought: str) -> str:
    """Encode a thought for a field that clients send back unchanged: a signature, for example.

    It is not secret. A client that does not show thoughts returns it in this form, also after a
    restart of the server, so the prompt has the same prefix as before.
    """
    return HIDDEN + base64.b64encode(zlib.compress(thought.encode())).decode()


def revealed(text: str | None) -> str:
    """Decode a thought; empty if the text is not from `hidden`."""
    if not text or not text.startswith(HIDDEN):
        return ""
    try:
        unpacked = zlib.decompressobj()
        data = unpacked.decompress(base64.b64decode(text.removeprefix(HIDDEN)), MAX_HIDDEN_CHARS)
        return data.decode()
    except (ValueError, zlib.error):
        return ""
