"""Messages and options of Ollama's API, converted to the form of `messages.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.requests import Grammar
from ..sampling import SamplingParams
from ..text.media_parts import text_of
from . import options
from .body import parse_object
from .events import dumps
from .faults import ApiError
from .fields import Fields
from .messages import (
    Message,
    assistant_message,
    call_id,
    check_media,
    folded,
    picture,
)
from .messages import tool_call as history_call

ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(body: Fields) -> list[Message]:
    """The messages, folded; empty if there are none."""
    given = body.records("messages") or []
    return check_media(folded([_message(message) for message in given])) if given else []


def _message(message: Fields) -> Message:
    role = message.needed_choice("role", ROLES)
    role = "system" if role == "developer" else role
    text = message.text("content") or ""
    pictures = images(message)
    content: Any = [*pictures, {"type": "text", "text": text}] if pictures else text
    if role != "assistant":
        return {"role": role, "content": content}
    calls = []
    for call in message.records("tool_calls") or ():
        function = call.record("function")
        name = function.text("name") if function is not None else None
        if function is None or not name:
            raise call.missing("function.name")
        calls.append(history_call(name, function.raw("arguments"), call.text("id") or call_id()))
    return assistant_message(content, message.text("thinking"), calls)


def context_of(messages: Sequence[Mapping[str, Any]], answer: str) -> list[int]:
    """A conversation as a list of integers, which clients send back; without pictures."""
    texts = [{"role": m["role"], "content": text_of(m["content"])} for m in messages]
    texts.append({"role": "assistant", "content": answer})
    return list(dumps({"messages": texts}).encode())


def read_context(body: Fields) -> list[Message]:
    """The conversation that `context_of` wrote."""
    given = body.items("context")
    if not given:
        return []
    try:
        return read_messages(Fields(parse_object(bytes(given))))
    except (TypeError, ValueError, ApiError):
        raise body.refuse("context", "the context of an answer of this server") from None


def images(holder: Fields) -> list[dict[str, Any]]:
    """Pictures, from base64."""
    found = []
    for image in holder.items("images") or ():
        if not isinstance(image, str):
            raise holder.refuse("images", "a list of base64 texts", "invalid_type")
        is_url = image[:5].lower() == "data:"
        # The real type follows from the bytes.
        source = image if is_url else f"data:image/png;base64,{image}"
        found.append(picture(source, holder, "images"))
    return found


def sampling(given: Fields, defaults: SamplingParams) -> SamplingParams:
    """Sampling parameters as in OpenAI's API; a repeat_penalty of 0 means off."""
    if given.raw("repeat_penalty") == 0:
        given = Fields({**given.values, "repeat_penalty": None}, "options")
    return options.sampling(given, defaults)


def max_tokens(given: Fields) -> int | None:
    """The maximum length of the answer; -1 and -2 mean no limit."""
    value = given.integer("num_predict", -2)
    return None if value is None or value < 0 else max(1, value)


def read_format(body: Fields) -> Grammar | None:
    """The grammar for `format`: "json" or a schema."""
    value = body.raw("format")
    if value is None or value == "":
        return None
    if value == "json":
        return Grammar("json_object")
    if isinstance(value, dict):
        return Grammar("json_schema", value)
    raise body.refuse("format", '"json" or a JSON schema')


def read_thinking(body: Fields) -> options.Thinking:
    """The thinking options: true, false or a level."""
    value = body.raw("think")
    if value is None:
        return options.Thinking()
    if isinstance(value, bool):
        return options.Thinking(enable_thinking=value)
    if isinstance(value, str) and value in options.EFFORTS:
        return options.of_effort(value)
    raise body.refuse("think", "true, false, low, medium or high")


def read_logprobs(body: Fields) -> int | None:
    """Number of likeliest tokens to return with each token; None: no log probabilities."""
    num_top = body.integer("top_logprobs", 0, 20)
    return (num_top or 0) if body.flag("logprobs") else None


def unsupported(body: Fields, *names: str) -> None:
    """Refuse fields that would change the answer."""
    for name in names:
        if body.raw(name):
            raise ApiError(400, f"{name} is not supported by this server")
