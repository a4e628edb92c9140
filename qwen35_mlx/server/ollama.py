"""Ollama's /api/chat and /api/generate."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ..engine.requests import Request
from . import ollama_messages as reading
from . import options
from .events import NDJSON, dumps
from .faults import ApiError
from .fields import Fields
from .messages import folded, read_functions
from .replies import Reply, ReplyWriter, SentCall
from .service import Service, begun

MAX_STOPS = 64
REASONS = {"loop": "length", "tool_calls": "stop"}


async def chat(http: HttpRequest) -> Response:
    """Answer messages; an empty list only loads the model."""
    service, body = await begun(http)
    name = check_model(service, body)
    messages = reading.read_messages(body)
    if not messages:
        message = {"role": "assistant", "content": ""}
        return JSONResponse(_loaded(name, body) | {"message": message})
    request = _request(service, body)
    request.messages = messages
    request.tools = read_functions(body)
    return await _respond(service, body, _Lines(service, name, request, is_chat=True))


async def generate(http: HttpRequest) -> Response:
    """Answer a prompt, as a message or raw."""
    service, body = await begun(http)
    name = check_model(service, body)
    reading.unsupported(body, "suffix", "template")
    prompt = body.text("prompt") or ""
    pictures = reading.images(body)
    if not prompt and not pictures:
        return JSONResponse(_loaded(name, body) | {"response": ""})
    request = _request(service, body)
    if body.flag("raw"):
        if pictures:
            raise ApiError(400, "raw: got pictures, expected text alone")
        request.prompt = prompt
    else:
        content: Any = [*pictures, {"type": "text", "text": prompt}] if pictures else prompt
        messages = [*reading.read_context(body), {"role": "user", "content": content}]
        if system := body.text("system"):
            messages.insert(0, {"role": "system", "content": system})
        request.messages = folded(messages)
    return await _respond(service, body, _Lines(service, name, request, is_chat=False))


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
    thinking = reading.read_thinking(body)
    return Request(
        adapter=service.adapter(body),
        **vars(thinking),
        params=reading.sampling(given, service.settings.defaults),
        seed=options.seed(given),
        max_tokens=reading.max_tokens(given),
        stop=given.texts("stop", MAX_STOPS),
        grammar=reading.read_format(body),
        logprobs=reading.read_logprobs(body),
    )


async def _respond(service: Service, body: Fields, lines: "_Lines") -> Response:
    answer = await service.answer(lines.request)
    return lines.response(answer, body.flag("stream") is not False)


class _Lines(ReplyWriter):
    """An answer as lines of JSON, or as one object."""

    dialect = "ollama"
    media_type = NDJSON

    def __init__(self, service: Service, name: str, request: Request, is_chat: bool):
        super().__init__(service, "", name, request)
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
        usage, reply, messages = self._usage, self._replies[0], self.request.messages
        reason = reply.finish_reason or "stop"
        context = {}
        if messages is not None and not self._is_chat:
            context["context"] = reading.context_of(messages, reply.text)
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
