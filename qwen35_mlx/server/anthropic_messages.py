"""Messages and tools of Anthropic's API, converted to the form of `messages.py`."""

from typing import Any

from ..engine.requests import ToolName
from .faults import ApiError
from .fields import Fields
from .hidden_thoughts import revealed
from .messages import (
    BILLING,
    Message,
    assistant_message,
    check_media,
    folded,
    function_tool,
    given_messages,
    joined,
    picture,
)
from .messages import tool_call as history_call

# Separates text blocks without white space between them.
BETWEEN = "\n"
REMINDER = "<system-reminder>"


def read_messages(body: Fields) -> list[Message]:
    """The system prompt and the messages, folded."""
    given = given_messages(body)
    messages: list[Message] = []
    if "system" in body:
        messages.append({"role": "system", "content": _system(body, "system")})
    for message in given:
        role = message.needed_choice("role", ("user", "assistant", "system"))
        if role == "system":
            messages.append({"role": "system", "content": _system(message, "content")})
        elif role == "user":
            messages += _user(message)
        else:
            messages.append(_assistant(message))
    return check_media(folded(messages))


def _blocks(holder: Fields, field: str) -> list[Fields]:
    """The blocks of a content; a string is one block."""
    value = holder.raw(field)
    if value is None:
        raise holder.missing(field)
    if isinstance(value, str):
        return [Fields({"type": "text", "text": value}, holder.name(field))]
    if not isinstance(value, list):
        raise holder.refuse(field, "a string or a list of blocks", "invalid_type")
    return holder.records(field) or []


def _text(block: Fields) -> str:
    return block.text("text") or ""


def _system(holder: Fields, field: str) -> Any:
    """The text of a system prompt, without the billing line, which changes with each request."""
    blocks = _blocks(holder, field)
    for block in blocks:
        if block.text("type") != "text":
            raise block.refuse("type", "text", "unsupported_content")
    texts = [_text(block) for block in blocks]
    kept = [text for text in texts if not text.startswith(BILLING)]
    return joined([{"type": "text", "text": text} for text in kept], BETWEEN)


def _user(message: Fields) -> list[Message]:
    """A user's message; the results of tools in it become separate messages."""
    messages: list[Message] = []
    parts: list[dict[str, Any]] = []
    for block in _blocks(message, "content"):
        kind = block.text("type")
        if kind == "tool_result":
            block.needed_text("tool_use_id")
            if parts:
                messages.append({"role": "user", "content": joined(parts, BETWEEN)})
                parts = []
            messages.append({"role": "tool", "content": _result(block)})
        elif kind == "text" and not parts and messages and _text(block).startswith(REMINDER):
            # Append it to the result: as a message of the user it would end the turn of the tools.
            result = messages[-1]
            held = result["content"]
            held = held if isinstance(held, list) else [{"type": "text", "text": held}]
            addition = {"type": "text", "text": f"\n\n{_text(block)}"}
            result["content"] = joined([*held, addition])
        else:
            parts.append(_part(block, kind))
    if parts or not messages:
        messages.append({"role": "user", "content": joined(parts, BETWEEN)})
    return messages


def _part(block: Fields, kind: str | None) -> dict[str, Any]:
    if kind == "text":
        return {"type": "text", "text": _text(block)}
    if kind == "image":
        return _picture(block)
    if kind == "tool_reference":
        return {"type": "text", "text": block.text("tool_name") or ""}
    if kind == "document":
        source = block.record("source")
        if source is not None and source.text("type") == "text":
            title = block.text("title")
            text = source.text("data") or ""
            return {"type": "text", "text": f"{title}\n\n{text}" if title else text}
        raise block.refuse("source", "a document of type text", "unsupported_content")
    if kind == "search_result":
        texts = [_text(part) for part in block.records("content") or ()]
        head = f"{block.text('title') or ''} {block.text('source') or ''}".strip()
        return {"type": "text", "text": "\n".join([head, *texts])}
    raise block.refuse("type", "text, image, document or tool_result", "unsupported_content")


def _picture(block: Fields) -> dict[str, Any]:
    source = block.needed_record("source")
    kind = source.text("type")
    if kind == "base64":
        media_type = source.text("media_type") or "image/png"
        data = source.text("data")
        if data is None:
            raise source.missing("data")
        return picture(f"data:{media_type};base64,{data}", block, "source")
    if kind == "url":
        return picture(source.text("url"), source, "url")
    raise source.refuse("type", "base64", "unsupported_content")


def _result(block: Fields) -> Any:
    """The result of a tool; errors are marked in the text."""
    if "content" not in block:
        content: Any = ""
    else:
        parts = [_part(part, part.text("type")) for part in _blocks(block, "content")]
        content = joined(parts, BETWEEN)
    if block.flag("is_error") and isinstance(content, str) and "error" not in content.lower():
        return f"Error: {content}"
    return content


def _assistant(message: Fields) -> Message:
    parts: list[dict[str, Any]] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in _blocks(message, "content"):
        kind = block.text("type")
        if kind == "text":
            parts.append({"type": "text", "text": _text(block)})
        elif kind == "thinking":
            thoughts.append(block.text("thinking") or revealed(block.text("signature")))
        elif kind == "redacted_thinking":
            thoughts.append(revealed(block.text("data")))
        elif kind == "tool_use":
            name = block.needed_text("name")
            calls.append(history_call(name, block.mapping("input"), block.text("id")))
    thought = "\n".join(filter(None, thoughts))
    return assistant_message(joined(parts, BETWEEN), thought, calls)


def read_tools(body: Fields) -> list[dict[str, Any]]:
    """Tools that the client runs, without those of Anthropic's servers.

    Deferred tools are left out too: a model has to search for them first.
    """
    tools = []
    for tool in body.records("tools") or ():
        if (tool.text("type") or "custom") != "custom" or tool.flag("defer_loading"):
            continue
        schema = tool.needed_record("input_schema").values
        tools.append(function_tool(tool.text("name"), tool.text("description"), schema, tool))
    return tools


def read_tool_choice(body: Fields, tools: list[dict[str, Any]]) -> tuple[str | ToolName, bool]:
    """The tool choice, and whether several calls at a time are allowed."""
    given = body.record("tool_choice")
    if given is None:
        return "auto", True
    parallel = not given.flag("disable_parallel_tool_use")
    kind = given.needed_choice("type", ("auto", "any", "tool", "none"))
    if kind in ("auto", "none"):
        return kind, parallel
    if not tools:
        raise ApiError(400, "tool_choice: there are no tools to choose from", param="tool_choice")
    if kind == "any":
        return "required", parallel
    name = given.needed_text("name")
    if name not in [tool["function"]["name"] for tool in tools]:
        raise given.refuse("name", "the name of a tool")
    return ToolName(name), parallel
