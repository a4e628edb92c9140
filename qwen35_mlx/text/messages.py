"""Messages of users and tools, and tool calls from OpenAI's form to that of chat templates."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import PromptError
from .media_parts import Part, is_media, part_for_template

Message = dict[str, Any]
# Other names of roles that OpenAI's API has.
ROLES = {"developer": "system", "function": "tool"}


def tool_calls(message: Mapping[str, Any]) -> list[tuple[str, dict[str, Any], bool]]:
    """Name and arguments of each call, and whether the arguments were given as JSON text."""
    calls = message.get("tool_calls") or ()
    if not calls and (call := message.get("function_call")):
        # OpenAI's older form of one call.
        calls = [{"function": call}]
    if not isinstance(calls, list | tuple):
        raise _unusable("the tool calls of a message are", calls, "a list of calls")
    return [_tool_call(call) for call in calls]


def _tool_call(call: Any) -> tuple[str, dict[str, Any], bool]:
    function = (call.get("function") or call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not name or not isinstance(name, str):
        expected = '{"type": "function", "function": {"name": …, "arguments": …}}'
        raise _unusable("a tool call of a message is", call, expected)
    given: Any = function.get("arguments")
    arguments = {} if given is None else given
    if is_text := isinstance(given, str):
        try:
            arguments = json.loads(given) if given.strip() else {}
            arguments = {} if arguments is None else arguments
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        expected = "a mapping by parameter names, or JSON text of an object"
        raise _unusable(f"the arguments of a call of {name} are", given, expected)
    return name, dict(arguments), is_text


def _unusable(what: str, got: object, expected: str) -> PromptError:
    return PromptError(f"{what} not usable", got=repr(got)[:200], expected=expected)


def for_template(messages: Sequence[Any]) -> list[Any]:
    """The messages in the form that templates take.

    Arguments of calls are mappings, missing content is empty, pictures are parts with a type only.
    """
    return [_for_template(m) if isinstance(m, Mapping) else m for m in messages]


def _for_template(message: Mapping[str, Any]) -> Mapping[str, Any]:
    changed: dict[str, Any] = {}
    if isinstance(role := message.get("role"), str) and role in ROLES:
        changed["role"] = ROLES[role]
    if message.get("content", "") is None:
        changed["content"] = ""
    elif isinstance(content := message.get("content"), list | tuple):
        changed["content"] = [part_for_template(part) for part in content]
    if calls := tool_calls(message):
        given = message.get("tool_calls") or [{}]
        changed["tool_calls"] = [
            {
                **{key: value for key, value in call.items() if key not in ("name", "arguments")},
                "function": {"name": name, "arguments": arguments},
            }
            for call, (name, arguments, _) in zip(given, calls, strict=True)
        ]
    return {**message, **changed} if changed else message


def user_message(text: str, media: Sequence[Part] = ()) -> Message:
    """A message of the user; pictures and videos come before the text."""
    content = [*media, {"type": "text", "text": text}] if media else text
    return {"role": "user", "content": content}


def tool_message(result: Any) -> Message:
    """The message for a tool's result: text and parts with a picture as given, all else as JSON."""
    is_parts = (
        isinstance(result, list | tuple)
        and all(isinstance(part, Mapping) for part in result)
        and any(map(is_media, result))
    )
    if isinstance(result, str) or is_parts:
        return {"role": "tool", "content": result}
    return {"role": "tool", "content": json.dumps(result, ensure_ascii=False)}
