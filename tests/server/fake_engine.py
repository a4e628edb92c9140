"""An engine that says what a test tells it, event by event."""

import threading
import time
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

from qwen35_mlx.engine.output import Piece
from qwen35_mlx.engine.requests import Done, Event, Failed, Request, Started, Token, Usage
from qwen35_mlx.engine.tool_calls import ToolCall
from qwen35_mlx.errors import ContextFull

Part = str | Piece | float
CONTEXT = 4096


def thought(text: str) -> Piece:
    return Piece("thought", text)


def call(name: str, **arguments: Any) -> Piece:
    raw = {key: str(value) for key, value in arguments.items()}
    return Piece("tool_call", "", ToolCall(name, arguments, raw))


class FakeTicket:
    def __init__(self, engine: "FakeEngine", request: Request):
        self.request = request
        self.is_cancelled = threading.Event()
        self.has_ended = threading.Event()
        self._engine = engine

    def add_listener(self, listener: Callable[[Event], None]) -> None:
        threading.Thread(target=self._run, args=(listener,), daemon=True).start()

    def cancel(self) -> None:
        self.is_cancelled.set()

    def _run(self, listener: Callable[[Event], None]) -> None:
        try:
            for event in self._engine.events(self):
                listener(event)
        finally:
            self.has_ended.set()


class FakeEngine:
    """`say` is what follows: text, pieces, seconds of silence; an exception fails the request."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.say: list[Any] = ["Paris", "."]
        self.finish = "stop"
        self.stop_text: str | None = None
        self.refusal: Exception | None = None
        self.cached_tokens = 0
        self.tickets: list[FakeTicket] = []
        self.is_alive = True
        self.num_restarts = 0

    @property
    def last(self) -> Request:
        return self.tickets[-1].request

    def start(self) -> None:
        self.num_restarts += not self.is_alive
        self.is_alive = True

    def stop(self, finish: bool = False) -> None:
        for ticket in self.tickets:
            ticket.cancel()

    def stats(self) -> dict[str, float]:
        return {"prompt_tokens_total": 7, "running": 1}

    def num_prompt(self, request: Request) -> int:
        given = request.prompt if request.messages is None else str(request.messages)
        if not isinstance(given, str):
            return len(given or ())
        # One word of a megabyte takes a tokenizer minutes.
        return len(self.tokenizer.encode(given)) if len(given) < 100_000 else len(given) // 4

    def count_tokens(self, request: Request) -> int:
        return self.num_prompt(request)

    def submit(self, request: Request) -> FakeTicket:
        if self.refusal is not None:
            raise self.refusal
        if (num_tokens := self.num_prompt(request)) >= CONTEXT:
            raise ContextFull(num_tokens, CONTEXT)
        ticket = FakeTicket(self, request)
        self.tickets.append(ticket)
        return ticket

    def events(self, ticket: FakeTicket) -> Iterator[Event]:
        request = ticket.request
        usage = Usage(prompt_tokens=self.num_prompt(request), cached_tokens=self.cached_tokens)
        yield Started(usage.prompt_tokens, usage.cached_tokens)
        for index in range(request.n):
            yield from self._answer(ticket, usage, index)

    def _answer(self, ticket: FakeTicket, usage: Usage, index: int) -> Iterator[Event]:
        request = ticket.request
        for part in self.say:
            if ticket.is_cancelled.is_set():
                yield Done("cancelled", None, usage, index=index)
                return
            if isinstance(part, float):
                end = time.monotonic() + part
                while time.monotonic() < end and not ticket.is_cancelled.wait(0.005):
                    pass
                continue
            if isinstance(part, Exception):
                yield Failed(part)
                return
            if not isinstance(part, str | Piece):
                yield part
                continue
            piece = Piece("answer", part) if isinstance(part, str) else part
            ids = self.tokenizer.encode(piece.text) or [0]
            scores = None if request.logprobs is None else -0.5
            top = [(token, -0.5 - i) for i, token in enumerate(ids[: request.logprobs or 0])]
            usage.generated_tokens += len(ids)
            usage.thought_tokens += len(ids) if piece.kind == "thought" else 0
            for token in ids[:-1]:
                yield Token((), token, scores, top, index=index)
            yield Token((piece,), ids[-1], scores, top, index=index)
        # Counting goes on, in another thread.
        yield Done(self.finish, self.stop_text, copy(usage), index=index)
