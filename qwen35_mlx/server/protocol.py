"""uvicorn's HTTP/1.1 on h11, with time limits, half-closed clients and answers to bad requests."""

import asyncio
import json
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .faults import ApiError

MAX_CONNECTIONS = 1000
# Limits: for an idle connection, for a head, between two pieces of a body, and for a whole body.
IDLE_SECONDS = 60.0
HEAD_SECONDS = 10.0
BODY_PIECE_SECONDS = 10.0
BODY_SECONDS = 300.0
# Time to read a refused body: if the connection closed at once, the client would not get the error.
LINGER_SECONDS = 5.0
# Limit for a client that does not read its answer.
WRITE_SECONDS = 60.0
HALF_CLOSED = "is_half_closed"


class _GentleTransport:
    """A transport whose `close` first reads what the client still sends."""

    def __init__(self, transport: asyncio.Transport, protocol: "Protocol"):
        self._transport = transport
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._protocol.close_gently(self._transport)

    def is_closing(self) -> bool:
        return self._protocol.is_closing or self._transport.is_closing()


class Protocol(H11Protocol):
    """One connection.

    A client that closes its side while it waits for an answer is either gone, or only sends no
    more. `scope["state"]["is_half_closed"]` tells the application, which can find out by writing;
    an empty `http.request` message wakes it.
    """

    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _body_since = 0.0
    _is_in_head = False
    _is_half_closed = False
    is_closing = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        gentle: Any = _GentleTransport(transport, self)
        super().connection_made(gentle)
        self._set_timer(IDLE_SECONDS)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(ApiError(503, "too many connections", headers={"retry-after": "2"}))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closing = True
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.is_closing:
            return
        super().data_received(data)
        self._after_events()

    def _after_events(self) -> None:
        """Give a new request its connection's state; limit the time of an incomplete one."""
        if self.cycle is not None:
            self.cycle.scope.setdefault("state", {})[HALF_CLOSED] = lambda: self._is_half_closed
        if self.is_closing:
            return
        now = self.loop.time()
        if self.conn.their_state is h11.SEND_BODY:
            if not self._body_since:
                self._body_since = now
            left_s = self._body_since + BODY_SECONDS - now
            answered = self.conn.our_state is h11.DONE
            self._is_in_head = False
            self._set_timer(min(left_s, LINGER_SECONDS if answered else BODY_PIECE_SECONDS))
            return
        self._body_since = 0.0
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            # The limit of a head starts at its first byte.
            if not self._is_in_head:
                self._set_timer(HEAD_SECONDS)
            self._is_in_head = True
        else:
            self._is_in_head = False
            self._set_timer(None)

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._too_slow)

    def _too_slow(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:
            self._refuse(ApiError(408, "the request did not arrive in time"))
        else:
            self.transport.close()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Handle a half-close of the client; True keeps the connection for the answer."""
        self._is_half_closed = True
        if self.is_closing:
            return None
        if self.conn.their_state is h11.SEND_BODY or self._is_idle():
            self._end_half_closed()
            return None
        self.cycle.message_event.set()
        return True

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _end_half_closed(self) -> None:
        """Close, with an error if a request is incomplete."""
        if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:
            self._refuse(ApiError(400, "the request ended early"))
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP; uvicorn calls this while it handles h11's error."""
        error: Any = sys.exc_info()[1]
        # Not h11's 501 for encodings: clients repeat a request after a 5xx.
        is_long = getattr(error, "error_status_hint", 400) == 431
        self._refuse(ApiError(431 if is_long else 400, f"{msg} {error or ''}"))

    def _refuse(self, fault: ApiError) -> None:
        """Send an error without the application, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(fault.body("openai")).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
                *fault.headers.items(),
            ]
            reason = HTTPStatus(fault.status).phrase.encode()
            reply = h11.Response(status_code=fault.status, headers=headers, reason=reason)
            for part in (reply, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._after_events()
        if self._is_half_closed and self._is_idle() and not self.is_closing:
            self._end_half_closed()

    def close_gently(self, transport: asyncio.Transport) -> None:
        """Close, after discarding what the client still sends; otherwise it may lose the answer."""
        if self.is_closing:
            return
        self.is_closing = True
        self._stop_timers()
        self._unset_keepalive_if_required()
        may_send = self.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if self._is_half_closed or not may_send or transport.is_closing():
            transport.close()
            return
        transport.write_eof()
        transport.resume_reading()
        self._timer = self.loop.call_later(LINGER_SECONDS, transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _stop_timers(self) -> None:
        self._set_timer(None)
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
