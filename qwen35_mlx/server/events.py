"""From the engine's events to a response: in the event loop, alive by the clock, ended in time."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from ..engine.requests import Done, Event, Failed, Request
from .faults import ApiError, Dialect, as_fault
from .protocol import HALF_CLOSED

# Silence after which something is sent, whatever the engine does.
KEEPALIVE_SECONDS = 2.0
# A half-closed client is either gone, which only writing shows, or waits.
PROBE_SECONDS = 0.2
# Prompts of one request that the engine has at a time.
MAX_PROMPTS_AT_ONCE = 8
EVENT_STREAM, NDJSON = "text/event-stream; charset=utf-8", "application/x-ndjson"
STREAM_HEADERS = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))


class Ticket(Protocol):
    """What the server needs of an engine's ticket."""

    def add_listener(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` for each event."""

    def cancel(self) -> None:
        """End the request."""


class Answer:
    """The answers to one or several prompts; their events come as (place of the prompt, event).

    `submit` may fail for each prompt as for the first. `cancel` ends all, and does no harm later.
    """

    def __init__(
        self,
        submit: Callable[[Request], Coroutine[Any, Any, Ticket]],
        requests: Sequence[Request],
    ):
        self._submit = submit
        self._requests = requests
        self._tickets: dict[int, Ticket] = {}
        self._num_submitted = 0
        self._is_cancelled = False
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
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
        ticket.add_listener(lambda event: self._put(place, event))

    def _put(self, place: int, event: Event) -> None:
        # The loop is closed while a server ends.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (place, event))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """All events; a failure is raised."""
        num_open = {place: request.n for place, request in enumerate(self._requests)}
        while num_open:
            place, event = await self._queue.get()
            if isinstance(event, Failed):
                raise as_fault(event.error)
            if isinstance(event, Done):
                if event.finish_reason == "cancelled":
                    raise ApiError(503, "the server is shutting down", code="cancelled")
                num_open[place] -= 1
            yield place, event
            if not num_open.get(place, 1):
                del num_open[place], self._tickets[place]
                if self._has_more():
                    await self._submit_next()

    def cancel(self) -> None:
        """End what still runs."""
        self._is_cancelled = True
        for ticket in self._tickets.values():
            ticket.cancel()
        self._tickets = {}


class _Client:
    """Whether the client of a request is still there."""

    def __init__(self, scope: Scope, receive: Receive):
        self._is_half_closed = scope.get("state", {}).get(HALF_CLOSED, lambda: False)
        self._receive = receive
        self._task: asyncio.Task[bool] | None = None
        self.is_gone = False

    @property
    def wait_seconds(self) -> float | None:
        """After which something has to be sent to see whether the client has gone."""
        return PROBE_SECONDS if self._is_half_closed() else None

    async def wait(self, task: "asyncio.Future[Any]", seconds: float | None) -> bool:
        """Until the task is done, the time is over, or the client changes; whether it is done."""
        if self._task is None:
            self._task = asyncio.ensure_future(self._watch())
        await asyncio.wait({task, self._task}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            self.is_gone = self._task.result()
            self._task = None
        return task.done() and not self.is_gone

    async def _watch(self) -> bool:
        """True once the client has gone, False if it may have."""
        return (await self._receive())["type"] == "http.disconnect"

    def forget(self) -> None:
        """Watch no more."""
        if self._task is not None:
            self._task.cancel()


class StreamedAnswer(Response):
    """Sends frames as they come, and `keepalive()` where none come for a while."""

    def __init__(
        self,
        answer: Answer,
        frames: AsyncGenerator[bytes, None],
        keepalive: Callable[[], bytes],
        media_type: str = EVENT_STREAM,
    ):
        self._media_type = media_type
        self._answer = answer
        self._frames = frames
        self._keepalive = keepalive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = _Client(scope, receive)
        frame: asyncio.Future[bytes | None] | None = None
        try:
            await send(_start(self._media_type, STREAM_HEADERS))
            while True:
                if frame is None:
                    frame = asyncio.ensure_future(anext(self._frames, None))
                is_there = await client.wait(frame, client.wait_seconds or KEEPALIVE_SECONDS)
                if client.is_gone:
                    return
                if not is_there:
                    data = self._keepalive()
                else:
                    found = frame.result()
                    frame = None
                    if found is None:
                        break
                    data = found
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._answer.cancel()
            client.forget()
            if frame is not None:
                frame.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await frame
            await self._frames.aclose()


class WholeAnswer(Response):
    """Sends one JSON object when it is complete; ends the work if the client leaves before."""

    def __init__(
        self,
        answer: Answer,
        work: Coroutine[Any, Any, Any],
        dialect: Dialect,
    ):
        self._answer, self._work, self._dialect = answer, work, dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = _Client(scope, receive)
        work = asyncio.ensure_future(self._work)
        has_begun = False
        try:
            while not await client.wait(work, client.wait_seconds):
                if client.is_gone:
                    return
                if client.wait_seconds is None:
                    continue
                # Space before the object, to see whether anybody takes it.
                if not has_begun:
                    await send(_start("application/json"))
                    has_begun = True
                await send({"type": "http.response.body", "body": b" ", "more_body": True})
            try:
                response: Response = Json(work.result())
            except Exception as error:
                response = as_fault(error).response(self._dialect)
            if has_begun:
                await send({"type": "http.response.body", "body": bytes(response.body)})
            else:
                await response(scope, receive, send)
        finally:
            self._answer.cancel()
            client.forget()
            if not work.done():
                work.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await work


def _start(media_type: str, more: Sequence[tuple[bytes, bytes]] = ()) -> Message:
    """The head of an answer whose length is not known."""
    headers = [(b"content-type", media_type.encode()), *more]
    return {"type": "http.response.start", "status": 200, "headers": headers}


class Json(JSONResponse):
    """JSON whose texts may have anything that the model wrote."""

    def render(self, content: Any) -> bytes:
        return dumps(content).encode()


def dumps(value: Any) -> str:
    """JSON of one line; characters beyond ASCII as they are."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def sse(value: Any, event: str | None = None) -> bytes:
    """A server-sent event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {dumps(value)}\n\n".encode()
