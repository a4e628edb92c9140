"""Base classes that turn the engine's events into answers of an API."""

import secrets
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from ..engine.output import Piece
from ..engine.requests import Done, Event, Request, Started, Token, Usage
from ..engine.tool_calls import ToolCall
from .events import EVENT_STREAM, Answer, StreamedAnswer, WholeAnswer, dumps, sse
from .faults import ApiError, Dialect
from .messages import call_id
from .service import FINGERPRINT, Service

COMMENT = b": keepalive\n\n"


@dataclass
class SentCall:
    """A tool call with the id for the client."""

    id: str
    name: str
    arguments: str
    call: ToolCall

    @property
    def function(self) -> dict[str, str]:
        """Name and arguments in OpenAI's form."""
        return {"name": self.name, "arguments": self.arguments}


@dataclass
class Reply:
    """The content of one answer so far."""

    index: int = 0
    id_prefix: str = "call_"
    text: str = ""
    thought: str = ""
    calls: list[SentCall] = field(default_factory=list)
    finish_reason: str | None = None
    stop_text: str | None = None
    # Set if log probabilities are requested.
    tokens: "AnswerTokens | None" = None
    entries: list[dict[str, Any]] = field(default_factory=list)

    def add(self, event: Token | Done, service: Service) -> list[tuple[Piece, SentCall | None]]:
        """Add an event; returns its pieces, calls with their ids, without incomplete calls."""
        if isinstance(event, Done):
            self.finish_reason, self.stop_text = event.finish_reason, event.stop_text
        added: list[tuple[Piece, SentCall | None]] = []
        for piece in event.pieces:
            if (call := piece.call) is not None:
                if not call.complete or not call.name:
                    continue
                identity = call_id(self.id_prefix)
                sent = SentCall(identity, call.name, dumps(call.arguments), call)
                self.calls.append(sent)
                service.calls.keep(sent.id, call, self.thought)
                added.append((piece, sent))
            elif piece.text:
                if piece.kind == "thought":
                    self.thought += piece.text
                else:
                    self.text += piece.text
                added.append((piece, None))
        return added


class Writer:
    """One answer in the form of an API: frames of a stream, or the whole object."""

    dialect: Dialect = "openai"
    media_type = EVENT_STREAM
    # One for each prompt.
    requests: Sequence[Request] = ()
    is_stream = False

    def __init__(self, service: Service, identity: str, model: str):
        self._service = service
        self._id, self._model = f"{identity}{secrets.token_hex(12)}", model
        # By the index of the prompt.
        self._usages: defaultdict[int, Usage] = defaultdict(Usage)
        self._created_s = 0.0
        self._num_keepalives = 0

    async def respond(self) -> Response:
        """Submit the requests; the response for the handler to return."""
        return self.response(await self._service.answer(*self.requests))

    def response(self, answer: Answer) -> Response:
        """The response that sends an answer."""
        if self.is_stream:
            return StreamedAnswer(answer, self.frames(answer), self.keepalive, self.media_type)
        return WholeAnswer(answer, self.whole(answer), self.dialect)

    def keepalive(self) -> bytes:
        """A comment; every fifth time an event, for clients that ignore comments."""
        self._num_keepalives += 1
        return COMMENT if self._num_keepalives % 5 else self._sign_of_life()

    def _sign_of_life(self) -> bytes:
        return COMMENT

    async def frames(self, answer: Answer) -> AsyncGenerator[bytes, None]:
        """The frames of a stream; an error is the last one."""
        self._created_s = answer.created_s
        try:
            yield self._begin()
            async for place, event in answer.events():
                if data := self._seen(place, event):
                    yield data
        except ApiError as fault:
            yield self._failed(fault)
        else:
            yield self._end()

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """The object of an answer that is not streamed."""
        self._created_s = answer.created_s
        async for place, event in answer.events():
            self._seen(place, event)
        return self._object()

    def _seen(self, place: int, event: Event) -> bytes:
        if isinstance(event, Started):
            self._usages[place] = Usage(event.prompt_tokens, event.cached_tokens)
        elif isinstance(event, Done):
            self._usages[place] = event.usage
        return self._take(place, event)

    @property
    def _usage(self) -> Usage:
        """The usage of all prompts together."""
        total = Usage()
        for usage in self._usages.values():
            for name, value in vars(usage).items():
                setattr(total, name, getattr(total, name) + value)
        return total

    def _begin(self) -> bytes:
        """Frames before the first event."""
        return b""

    def _take(self, place: int, event: Any) -> bytes:
        """Add an event, also for `_object`; returns its frames."""
        raise NotImplementedError

    def _end(self) -> bytes:
        """Frames after the last event."""
        return b""

    def _failed(self, fault: ApiError) -> bytes:
        """The frame of an error."""
        return sse(fault.body(self.dialect))

    def _object(self) -> dict[str, Any]:
        """The whole answer."""
        raise NotImplementedError

    def _completion(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The object of chat completions and completions."""
        return {
            "id": self._id,
            "object": kind,
            "created": int(self._created_s),
            "model": self._model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            **more,
        }


class ReplyWriter(Writer):
    """Writes answers with thoughts, text and calls, for one request."""

    def __init__(
        self, service: Service, identity: str, model: str, request: Request, prefix: str = "call_"
    ):
        """prefix: the prefix of ids of calls."""
        super().__init__(service, identity, model)
        self.requests = [request]
        self._replies = [Reply(index, prefix) for index in range(request.n)]
        if request.logprobs is not None:
            for reply in self._replies:
                reply.tokens = AnswerTokens(service)

    def _take(self, place: int, event: Any) -> bytes:
        if not isinstance(event, Token | Done):
            return b""
        reply, data = self._replies[event.index], b""
        entries = reply.tokens.add(event) if reply.tokens else []
        reply.entries += entries
        for piece, call in reply.add(event, self._service):
            if call is not None:
                data += self._call(reply, call)
            elif piece.kind == "thought":
                data += self._thought(reply, piece.text)
            else:
                data += self._text(reply, piece.text, entries)
                entries = []
        return data + self._done(reply, entries) if isinstance(event, Done) else data

    def _thought(self, reply: Reply, text: str) -> bytes:
        """The frames of a piece of a thought."""
        raise NotImplementedError

    def _text(self, reply: Reply, text: str, entries: list[dict[str, Any]]) -> bytes:
        """The frames of a piece of an answer, with the log probabilities of its tokens."""
        raise NotImplementedError

    def _call(self, reply: Reply, call: SentCall) -> bytes:
        """The frames of a call, which is in `reply.calls` already."""
        raise NotImplementedError

    def _done(self, reply: Reply, entries: list[dict[str, Any]]) -> bytes:
        """The frames at the end of an answer, with unsent `entries`."""
        raise NotImplementedError


class AnswerTokens:
    """Log probabilities of the answer's tokens, without the thought and its end."""

    def __init__(self, service: Service):
        self._service = service
        self._thought_end = service.id_of("</think>")
        self._pending: list[dict[str, Any]] = []
        self._has_begun = False

    def add(self, event: Token | Done) -> list[dict[str, Any]]:
        """Add an event; returns the entries that certainly belong to the answer."""
        if isinstance(event, Token) and event.token not in self._service.ends:
            entry = self._service.token_entry(event.token, event.logprob, event.top)
            if event.token == self._thought_end:
                self._pending.clear()
            elif self._has_begun or entry["token"].strip():
                self._pending.append(entry)
        kinds = {piece.kind for piece in event.pieces if piece.text or piece.call}
        if "thought" in kinds and "answer" not in kinds:
            self._pending.clear()
        if "answer" not in kinds and not isinstance(event, Done):
            return []
        self._has_begun = True
        entries, self._pending = self._pending, []
        return entries


def timings(usage: Usage) -> dict[str, Any]:
    """Counts and times under llama.cpp's names."""
    num_read = usage.prompt_tokens - usage.cached_tokens
    prompt_s, decode_s = usage.prefill_seconds, usage.decode_seconds
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": num_read,
        "prompt_ms": round(prompt_s * 1000, 3),
        "prompt_per_second": round(num_read / prompt_s, 3) if prompt_s > 0 else 0.0,
        "predicted_n": usage.generated_tokens,
        "predicted_ms": round(decode_s * 1000, 3),
        "predicted_per_second": (
            round(usage.generated_tokens / decode_s, 3) if decode_s > 0 else 0.0
        ),
        "draft_n_accepted": usage.draft_tokens,
        "queue_ms": round(usage.queue_seconds * 1000, 3),
    }
