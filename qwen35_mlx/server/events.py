"""From the engine's events to a response: in the event loop, alive by the clock, ended in time."""

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ..engine.requests import Done, Event, Failed, Request
from ..engine.ticket import Ticket
from .faults import ApiError, Dialect, as_fault
from .protocol import HALF_CLOSED

# Silence after which something is sent, whatever the engine does.
KEEPALIVE_SECONDS = 2.0
# A half-closed client is either gone, which only writing shows, or waits.
PROBE_SECONDS = 0.2
# Prompts of one request that the engine has at a time.
MAX_PROMPTS_AT_ONCE = 8
EVENT_STREAM, NDJSON = "text/event-stream; charset=utf-8", "application/x-ndjson"


class Mailbox:
    """Takes events from the engine's thread to the event loop, all that are there at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._is_woken = False

    def put(self, queue: "asyncio.Queue[Any]", item: Any) -> None:
        """From any thread."""
        self._events.append((queue, item))
        if not self._is_woken:
            self._is_woken = True
            # The loop is closed while a server ends.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # First, or what comes now would wait for the next one.
        self._is_woken = False
        while self._events:
            queue, item = self._events.popleft()
            queue.put_nowait(item)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Answer:
    """The answers to one or several prompts; their events come as (place of the prompt, event).

    `submit` may fail for each prompt as for the first. `cancel` ends all, and does no harm later.
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
        # None: the client has gone.
        self._queue: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self.created_s = time.time()

    async def start(self) -> "Answer":
        """Submit the first prompts; a mistake in them is raised here."""
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
        """All events; a failure is raised, and `ClientGone` after `leave`."""
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
        """The client has gone."""
        self.cancel()
        self._queue.put_nowait(None)

    def cancel(self) -> None:
        """End what still runs."""
        self._is_cancelled = True
        for ticket in self._tickets.values():
            ticket.cancel()
        self._tickets = {}


class _Sender(Response):
    """Sends an answer, and meanwhile listens to the client and breaks silences."""

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
        """Send all of the answer."""
        raise NotImplementedError

    def _breath(self, is_probe: bool) -> bytes:
        """What says nothing; a probe is to show whether a client that sends no more is there."""
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
                    # It sends no more.
                    heard = asyncio.ensure_future(receive())
                elif time.monotonic() >= self._sent_s + silence_s:
                    self._sent_s = time.monotonic()
                    if data := self._breath(is_probe):
                        await self._write(data)
        finally:
            heard.cancel()

    async def _write(self, data: bytes) -> None:
        """A part of the body; the head before the first one, without a length."""
        self._sent_s = time.monotonic()
        if not self._has_begun:
            self._has_begun = True
            start = {"type": "http.response.start", "status": 200, "headers": self._head}
            await self._send(start)
        await self._send({"type": "http.response.body", "body": data, "more_body": True})


class StreamedAnswer(_Sender):
    """Sends frames as they come, and `keepalive()` where none come for a while."""

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
            # The head goes out at once.
            await self._write(b"")
            async for data in self._frames:
                await self._write(data)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._frames.aclose()


class WholeAnswer(_Sender):
    """Sends one JSON object when it is complete; ends the work if the client leaves before."""

    def __init__(self, answer: Answer, work: Coroutine[Any, Any, Any], dialect: Dialect):
        super().__init__(answer, "application/json")
        self._work, self._dialect = work, dialect

    def _breath(self, is_probe: bool) -> bytes:
        # Space before the object.
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
    """JSON of one line; characters beyond ASCII as they are."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def sse(value: Any, event: str | None = None) -> bytes:
    """A server-sent event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {dumps(value)}\n\n".encode()
