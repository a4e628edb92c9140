"""From the engine's events to a response: keepalives, and cancellation when a client leaves."""

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ..engine.requests import Done, Event, Failed, Request, Ticket
from .faults import ApiError, Dialect, as_fault
from .protocol import HALF_CLOSED

# A keepalive is sent after so much silence.
KEEPALIVE_SECONDS = 2.0
# A half-closed client either waits or is gone; only a write shows which.
PROBE_SECONDS = 0.2
# Maximum prompts of one HTTP request in the engine at a time.
MAX_PROMPTS_AT_ONCE = 8
EVENT_STREAM, NDJSON = "text/event-stream; charset=utf-8", "application/x-ndjson"


class Mailbox:
    """Passes events from the engine's thread to the event loop, in batches."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._is_woken = False

    def put(self, queue: "asyncio.Queue[Any]", item: Any) -> None:
        """Add an item; thread-safe."""
        self._events.append((queue, item))
        if not self._is_woken:
            self._is_woken = True
            # The loop is closed if the server is ending.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # First, so that an item that comes now wakes the loop again.
        self._is_woken = False
        while self._events:
            queue, item = self._events.popleft()
            queue.put_nowait(item)


class ClientGone(Exception):
    """The client has disconnected."""


class Answer:
    """The answers to one or several prompts, as events (index of the prompt, event).

    `submit` may fail for any prompt. `cancel` ends all of them, and may be called again.
    """

    def __init__(
        self,
        submit: Callable[[Request], Coroutine[Any, Any, Ticket]],
        requests: Sequence[Request],
        mailbox: Mailbox,
    ):
        self._submit = submit
        self._requests = requests
        self._mailbox = mailbox
        self._tickets: dict[int, Ticket] = {}
        self._num_submitted = 0
        self._is_cancelled = False
        # None in the queue: the client is gone.
        self._queue: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self.created_s = time.time()

    async def start(self) -> "Answer":
        """Submit the first prompts; raises their errors."""
        try:
            while len(self._tickets) < MAX_PROMPTS_AT_ONCE and self._has_more():
                await self._submit_next()
        except BaseException:
            self.cancel()
            raise
        return self

    def _has_more(self) -> bool:
        return self._num_submitted < len(self._requests)

    async def _submit_next(self) -> None:
        place = self._num_submitted
        self._num_submitted += 1
        ticket = await self._submit(self._requests[place])
        if self._is_cancelled:
            ticket.cancel()
            return
        self._tickets[place] = ticket
        ticket.add_listener(lambda event: self._mailbox.put(self._queue, (place, event)))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield all events; raises failures, and `ClientGone` after `leave`."""
        num_open = {place: request.n for place, request in enumerate(self._requests)}
        while num_open:
            item = await self._queue.get()
            if item is None:
                raise ClientGone
            place, event = item
            if isinstance(event, Failed):
                raise as_fault(event.error)
            if isinstance(event, Done):
                if event.finish_reason == "cancelled":
                    raise ApiError(503, "the server is shutting down", code="cancelled")
                num_open[place] -= 1
            yield place, event
            if not num_open.get(place, 1):
                del num_open[place]
                self._tickets.pop(place, None)
                if self._has_more():
                    await self._submit_next()

    def leave(self) -> None:
        """Cancel, because the client is gone."""
        self.cancel()
        self._queue.put_nowait(None)

    def cancel(self) -> None:
        """Cancel everything that still runs."""
        self._is_cancelled = True
        for ticket in self._tickets.values():
            ticket.cancel()
        self._tickets = {}


class _Sender(Response):
    """Sends an answer; meanwhile watches the connection and sends keepalives."""

    def __init__(self, answer: Answer, media_type: str):
        self._answer = answer
        self._head = [(b"content-type", media_type.encode())]
        self._has_begun = False
        self._sent_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        half_closed = scope.get("state", {}).get(HALF_CLOSED, lambda: False)
        self._attendant = asyncio.create_task(self._attend(receive, half_closed))
        try:
            await self._answered(scope, receive, send)
        except ClientGone:
            pass
        finally:
            self._answer.cancel()
            self._attendant.cancel()

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole answer."""
        raise NotImplementedError

    def _breath(self, is_probe: bool) -> bytes:
        """Keepalive data; a probe tests whether a half-closed client still exists."""
        raise NotImplementedError

    async def _attend(self, receive: Receive, is_half_closed: Callable[[], bool]) -> None:
        heard = asyncio.ensure_future(receive())
        try:
            while True:
                is_probe = is_half_closed()
                silence_s = PROBE_SECONDS if is_probe else KEEPALIVE_SECONDS
                left_s = self._sent_s + silence_s - time.monotonic()
                await asyncio.wait({heard}, timeout=max(left_s, 0))
                if heard.done():
                    if heard.result()["type"] == "http.disconnect":
                        self._answer.leave()
                        return
                    # The client is half-closed.
                    heard = asyncio.ensure_future(receive())
                elif time.monotonic() >= self._sent_s + silence_s:
                    self._sent_s = time.monotonic()
                    if data := self._breath(is_probe):
                        await self._write(data)
        finally:
            heard.cancel()

    async def _write(self, data: bytes) -> None:
        """Send a part of the body, and the head before the first part."""
        self._sent_s = time.monotonic()
        if not self._has_begun:
            self._has_begun = True
            start = {"type": "http.response.start", "status": 200, "headers": self._head}
            await self._send(start)
        await self._send({"type": "http.response.body", "body": data, "more_body": True})


class StreamedAnswer(_Sender):
    """Sends frames as they come, and `keepalive()` after a silence."""

    def __init__(
        self,
        answer: Answer,
        frames: AsyncGenerator[bytes, None],
        keepalive: Callable[[], bytes],
        media_type: str = EVENT_STREAM,
    ):
        super().__init__(answer, media_type)
        self._head += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        self._frames = frames
        self._keepalive = keepalive

    def _breath(self, is_probe: bool) -> bytes:
        return self._keepalive()

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # Send the head at once.
            await self._write(b"")
            async for data in self._frames:
                await self._write(data)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._frames.aclose()


class WholeAnswer(_Sender):
    """Sends one JSON object when it is complete; cancels the work if the client leaves."""

    def __init__(self, answer: Answer, work: Coroutine[Any, Any, Any], dialect: Dialect):
        super().__init__(answer, "application/json")
        self._work, self._dialect = work, dialect

    def _breath(self, is_probe: bool) -> bytes:
        # White space before the object is valid JSON.
        return b" " if is_probe else b""

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response: Response = JSONResponse(await self._work)
        except ClientGone:
            raise
        except Exception as error:
            response = as_fault(error).response(self._dialect)
        self._attendant.cancel()
        if self._has_begun:
            await send({"type": "http.response.body", "body": bytes(response.body)})
        else:
            await response(scope, receive, send)


def dumps(value: Any) -> str:
    """JSON in one line, without escapes for characters beyond ASCII."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def sse(value: Any, event: str | None = None) -> bytes:
    """A server-sent event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {dumps(value)}\n\n".encode()
