"""Ollama's /api/chat and /api/generate: messages and options are read, answers written."""

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ..engine.requests import Grammar, Request
from ..sampling import SamplingParams
from ..text.media_parts import text_of
from ..text.messages import user_message
from . import options
from .events import NDJSON, dumps
from .faults import ApiError
from .fields import Fields, parse_object
from .messages import (
    Message,
    assistant_message,
    call_id,
    check_media,
    folded,
    history_call,
    picture,
    read_functions,
)
from .replies import Reply, ReplyWriter, SentCall
from .service import Service, begun

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_STOPS = 64
REASONS = {"loop": "length", "tool_calls": "stop"}


def read_messages(body: Fields) -> list[Message]:
    """The messages, folded; empty if there are none."""
    given = body.records("messages") or []
    return check_media(folded([_message(message) for message in given])) if given else []


def _message(message: Fields) -> Message:
    role = message.needed_choice("role", ROLES)
    role = "system" if role == "developer" else role
    content = user_message(message.text("content") or "", images(message))["content"]
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


async def chat(http: HttpRequest) -> Response:
    """Answer messages; an empty list only loads the model."""
    service, body = await begun(http)
    name = check_model(service, body)
    messages = read_messages(body)
    if not messages:
        message = {"role": "assistant", "content": ""}
        return JSONResponse(_loaded(name, body) | {"message": message})
    request = _request(service, body)
    request.messages = messages
    request.tools = read_functions(body)
    return await _Lines(service, body, name, request, is_chat=True).respond()


async def generate(http: HttpRequest) -> Response:
    """Answer a prompt, as a message or raw."""
    service, body = await begun(http)
    name = check_model(service, body)
    for field in ("suffix", "template"):
        if body.raw(field):
            raise ApiError(400, f"{field} is not supported by this server")
    prompt = body.text("prompt") or ""
    pictures = images(body)
    if not prompt and not pictures:
        return JSONResponse(_loaded(name, body) | {"response": ""})
    request = _request(service, body)
    if body.flag("raw"):
        if pictures:
            raise ApiError(400, "raw: got pictures, expected text alone")
        request.prompt = prompt
    else:
        messages = [*read_context(body), user_message(prompt, pictures)]
        if system := body.text("system"):
            messages.insert(0, {"role": "system", "content": system})
        request.messages = folded(messages)
    return await _Lines(service, body, name, request, is_chat=False).respond()


def check_model(service: Service, body: Fields) -> str:
    """The name of the model, which is required."""
    name = body.text("model") or body.text("name")
    if not name:
        raise ApiError(400, "model is required")
    if not service.knows(name):
        raise ApiError(404, f"model '{name[:200]}' not found")
    return name


def _loaded(name: str, body: Fields) -> dict[str, Any]:
    """The answer to a request that only loads or unloads the model; it always stays loaded."""
    reason = "unload" if body.raw("keep_alive") == 0 else "load"
    return {"model": name, "created_at": now(), "done": True, "done_reason": reason}


def now() -> str:
    """The current time in Ollama's format."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _request(service: Service, body: Fields) -> Request:
    given = body.part("options")
    thinking = read_thinking(body)
    return Request(
        adapter=service.adapter(body),
        **vars(thinking),
        params=sampling(given, service.settings.defaults),
        seed=options.seed(given),
        max_tokens=max_tokens(given),
        stop=given.texts("stop", MAX_STOPS),
        grammar=read_format(body),
        logprobs=read_logprobs(body),
    )


class _Lines(ReplyWriter):
    """An answer as lines of JSON, or as one object."""

    dialect = "ollama"
    media_type = NDJSON

    def __init__(self, service: Service, body: Fields, name: str, request: Request, is_chat: bool):
        super().__init__(service, "", name, request)
        self.is_stream = body.flag("stream") is not False
        self._is_chat = is_chat
        self._began_s = time.perf_counter()

    def keepalive(self) -> bytes:
        """An empty line of text, because NDJSON has no comments."""
        return self._line()

    def _line(self, text: str = "", **more: Any) -> bytes:
        return (dumps(self._value(text, **more)) + "\n").encode()

    def _value(
        self, text: str, thought: str = "", calls: Sequence[dict[str, Any]] = (), **more: Any
    ) -> dict[str, Any]:
        value: dict[str, Any] = {"model": self._model, "created_at": now()}
        thinking = {"thinking": thought} if thought else {}
        if self._is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": text, **thinking}
            if calls:
                message["tool_calls"] = calls
            value["message"] = message
        else:
            value |= {"response": text, **thinking}
        return value | {"done": False} | more

    def _failed(self, fault: ApiError) -> bytes:
        return (dumps(fault.body(self.dialect)) + "\n").encode()

    def _thought(self, reply: Reply, text: str) -> bytes:
        return self._line(thought=text)

    def _text(self, reply: Reply, text: str, entries: list[dict[str, Any]]) -> bytes:
        return self._line(text, **({"logprobs": entries} if entries else {}))

    def _call(self, reply: Reply, call: SentCall) -> bytes:
        return self._line(calls=[_call_object(reply.calls.index(call), call)])

    def _done(self, reply: Reply, entries: list[dict[str, Any]]) -> bytes:
        return self._line(**self._last())

    def _last(self) -> dict[str, Any]:
        """The fields of the last line; times are in nanoseconds."""
        usage, reply, messages = self._usage, self._replies[0], self.requests[0].messages
        reason = reply.finish_reason or "stop"
        context = {}
        if messages is not None and not self._is_chat:
            context["context"] = context_of(messages, reply.text)
        return {
            "done": True,
            "done_reason": REASONS.get(reason, reason),
            **context,
            "total_duration": int((time.perf_counter() - self._began_s) * 1e9),
            "load_duration": int(usage.queue_seconds * 1e9),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_cached_count": usage.cached_tokens,
            "prompt_eval_duration": int(usage.prefill_seconds * 1e9),
            "eval_count": usage.generated_tokens,
            "eval_duration": int(usage.decode_seconds * 1e9),
        }

    def _object(self) -> dict[str, Any]:
        (reply,) = self._replies
        calls = [_call_object(i, call) for i, call in enumerate(reply.calls)]
        more = {"logprobs": reply.entries} if reply.tokens else {}
        return self._value(reply.text, reply.thought, calls, **more, **self._last())


def _call_object(index: int, call: SentCall) -> dict[str, Any]:
    function = {"index": index, "name": call.name, "arguments": call.call.arguments}
    return {"id": call.id, "function": function}
