"""Messages and tools of OpenAI's chat completions, converted to the form of `messages.py`."""

from typing import Any

from ..engine.requests import ToolName
from .faults import ApiError
from .fields import Fields
from .messages import (
    Message,
    assistant_message,
    call_id,
    check_media,
    folded,
    given_messages,
    joined,
    picture,
    read_function,
    read_functions,
)
from .messages import tool_call as history_call

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Types of text parts, and the field with the text.
TEXTS = dict.fromkeys(("text", "input_text", "output_text", "summary_text"), "text")
TEXTS |= {"reasoning_text": "text", "refusal": "refusal"}


def read_messages(body: Fields) -> list[Message]:
    """The messages, folded; see `messages.py`."""
    return check_media(folded([_message(message) for message in given_messages(body)]))


def _message(message: Fields) -> Message:
    role = message.needed_choice("role", ROLES)
    content = read_parts(message, sees=role in ("user", "tool"))
    if role in ("system", "developer"):
        return {"role": "system", "content": content}
    if role in ("tool", "function"):
        return {"role": "tool", "content": content}
    if role == "user":
        if "content" not in message:
            raise message.missing("content")
        return {"role": "user", "content": content}
    thought = message.text("reasoning_content") or message.text("reasoning")
    calls = [_call(call) for call in message.records("tool_calls") or ()]
    if (old := message.record("function_call")) is not None:
        calls.append(history_call(old.needed_text("name"), old.raw("arguments"), call_id()))
    return assistant_message(content, thought, calls)


def read_parts(holder: Fields, field: str = "content", sees: bool = True) -> Any:
    """A content of OpenAI's APIs as text, or as parts if there are pictures; None is empty."""
    content = holder.raw(field)
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise holder.refuse(field, "a string or a list of parts", "invalid_type")
    # Strings in the list are not valid parts, but some clients send them.
    texts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in content]
    return joined([_part(part, sees) for part in holder.records(field, texts) or ()])


def _part(part: Fields, sees: bool) -> dict[str, Any]:
    kind = part.text("type") or ("text" if "text" in part else "")
    if kind in TEXTS:
        return {"type": "text", "text": part.text(TEXTS[kind]) or ""}
    if kind in ("thinking", "reasoning"):
        return {"type": "text", "text": ""}
    if kind in ("image_url", "input_image") and sees:
        is_object = isinstance(part.raw("image_url"), dict)
        holder = part.record("image_url") if is_object else None
        return picture(
            part.text("image_url") if holder is None else holder.text("url"), part, "image_url"
        )
    raise part.refuse("type", "text or image_url" if sees else "text", "unsupported_content")


def _call(call: Fields) -> dict[str, Any]:
    kind = call.text("type") or "function"
    if kind == "custom":
        custom = call.record("custom") or call
        holder, arguments = custom, {"input": custom.text("input") or ""}
    else:
        holder = call.needed_record("function")
        arguments = holder.raw("arguments")
    return history_call(holder.needed_text("name"), arguments, call.text("id"))


def read_tools(body: Fields) -> list[dict[str, Any]]:
    """The tools, or the field `functions` of the oldest form of the API."""
    functions = body.records("functions") or ()
    return read_functions(body) or [read_function(function) for function in functions]


def read_tool_choice(
    body: Fields, tools: list[dict[str, Any]]
) -> tuple[str | ToolName, list[dict[str, Any]]]:
    """The tool choice (auto, none, required or a name), and the tools to choose from."""
    field = "tool_choice" if "tool_choice" in body else "function_call"
    choice = body.raw(field)
    if choice is None:
        return "auto", tools
    names = [tool["function"]["name"] for tool in tools]
    if isinstance(choice, str):
        if choice == "any":
            choice = "required"
        if choice not in ("auto", "none", "required"):
            raise body.refuse(field, "auto, none, required or a function")
        if choice == "required" and not tools:
            raise _without_tools(body, field)
        return choice, tools
    given = body.record(field)
    assert given is not None
    kind = given.text("type") or "function"
    if kind == "allowed_tools":
        allowed = given.record("allowed_tools") or given
        wanted = [_chosen(tool) for tool in allowed.records("tools") or ()]
        mode = allowed.choice("mode", ("auto", "required")) or "auto"
        kept = [tool for tool in tools if tool["function"]["name"] in wanted]
        if mode == "required" and not kept:
            raise _without_tools(body, field)
        return mode, kept
    name = _chosen(given)
    if not tools:
        raise _without_tools(body, field)
    if name not in names:
        expected = ", ".join(names)[:200]
        raise ApiError(400, f"{field}: got {name[:80]!r}, expected one of {expected}", param=field)
    return ToolName(name), tools


def _chosen(choice: Fields) -> str:
    """The name in a tool choice of OpenAI's APIs."""
    inner = choice.record("function") or choice.record("custom") or choice
    return inner.needed_text("name")


def _without_tools(body: Fields, field: str) -> ApiError:
    return ApiError(
        400,
        f"{field}: there are no tools to choose from",
        param=body.name(field),
        code="invalid_value",
    )
