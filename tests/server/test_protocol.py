"""The time limits of a connection, on a clock that the tests turn."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import h11
import pytest
import uvicorn
from uvicorn.server import ServerState

from qwen35_mlx.server import protocol
from qwen35_mlx.server.protocol import Protocol

HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"


class Clock:
    """In place of a loop: what is due is called when the clock is turned."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[Any] = []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, function: Callable[[], None]) -> Any:
        timer = SimpleNamespace(due=self.now + seconds, function=function)
        timer.cancel = lambda: timer in self.timers and self.timers.remove(timer)
        self.timers.append(timer)
        return timer

    def create_task(self, work: Any, **options: Any) -> Any:
        work.close()
        return MagicMock()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for timer in [t for t in self.timers if t.due <= self.now]:
            if timer in self.timers:
                self.timers.remove(timer)
                timer.function()


class Wire:
    """In place of a transport: what was done with it."""

    def __init__(self) -> None:
        self.sent, self.done = b"", list[str]()

    def get_extra_info(self, name: str) -> None:
        return None

    def write(self, data: bytes) -> None:
        self.sent += data

    def is_closing(self) -> bool:
        return "close" in self.done

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: self.done.append(name)


@pytest.fixture
def connect() -> Callable[[], tuple[Clock, Wire, Protocol]]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        pass

    state = ServerState()
    config = uvicorn.Config(
        app, interface="asgi3", http=Protocol, ws="none", lifespan="off", log_config=None
    )

    def run() -> tuple[Clock, Wire, Protocol]:
        clock, wire = Clock(), Wire()
        loop: Any = clock
        made = Protocol(config, state, {}, loop)
        transport: Any = wire
        made.connection_made(transport)
        return clock, wire, made

    return run


@pytest.mark.parametrize(
    ("pieces", "seconds", "status"),
    [
        # A connection that says nothing is closed without a word.
        ([], protocol.IDLE_SECONDS, None),
        ([b"G"], protocol.HEAD_SECONDS, 408),
        # A head is timed from its first byte.
        ([b"G", 4, b"ET /", 4, b" "], protocol.HEAD_SECONDS - 8, 408),
        ([HEAD], protocol.BODY_PIECE_SECONDS, 408),
        ([HEAD, 4, b"{", 9], protocol.BODY_PIECE_SECONDS - 9, 408),
    ],
)
def test_what_does_not_arrive_in_time_ends_the_connection(
    connect: Any, pieces: list[Any], seconds: float, status: int | None
) -> None:
    clock, wire, made = connect()
    for piece in pieces:
        made.data_received(piece) if isinstance(piece, bytes) else clock.wait(piece)
    clock.wait(seconds - 0.5)
    assert wire.sent == b"" and wire.done.count("close") == 0 and not made.is_closing
    clock.wait(1)
    assert made.is_closing
    assert wire.sent[:12] == (f"HTTP/1.1 {status}".encode() if status else b"")


def test_a_body_that_drips_is_read_for_five_minutes(connect: Any) -> None:
    clock, wire, made = connect()
    made.data_received(HEAD.replace(b" 9\r", b" 9999\r"))
    for _ in range(33):
        clock.wait(9)
        made.data_received(b"=")
    clock.wait(2.5)
    assert not made.is_closing
    clock.wait(1)
    assert made.is_closing and wire.sent.startswith(b"HTTP/1.1 408")


def test_a_whole_request_has_all_the_time_it_needs(connect: Any) -> None:
    clock, _, made = connect()
    made.data_received(HEAD + b"123456789")
    clock.wait(10_000)
    assert not made.is_closing and not clock.timers


def answer(made: Protocol) -> None:
    """What the application does at its end."""
    made.conn.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
    made.conn.send(h11.EndOfMessage())
    made.cycle.response_complete = True
    made.on_response_complete()


def test_a_connection_waits_for_its_next_request_and_times_its_head(connect: Any) -> None:
    clock, _, made = connect()
    made.data_received(HEAD[:5])
    made.data_received(HEAD[5:] + b"123456789")
    answer(made)
    # By uvicorn.
    (timer,) = clock.timers
    assert timer.due == clock.now + made.timeout_keep_alive
    made.data_received(b"G")
    (timer,) = clock.timers
    assert timer.due == clock.now + protocol.HEAD_SECONDS


def test_a_body_that_comes_after_its_answer_has_less_time(connect: Any) -> None:
    clock, _, made = connect()
    made.data_received(HEAD[:5])
    made.data_received(HEAD[5:] + b"1")
    answer(made)
    made.data_received(b"2")
    assert [t.due - clock.now for t in clock.timers] == [protocol.LINGER_SECONDS]
    # The head behind it is another one.
    clock.wait(1)
    made.data_received(b"3456789G")
    assert [t.due - clock.now for t in clock.timers] == [protocol.HEAD_SECONDS]


def test_a_client_that_is_refused_is_listened_to_for_a_while(connect: Any) -> None:
    """A connection closed at once would take the refusal with it."""
    clock, wire, made = connect()
    made.data_received(b"HELLO\r\n\r\n")
    assert wire.sent.startswith(b"HTTP/1.1 400") and wire.done == ["write_eof", "resume_reading"]
    made.data_received(b"more")
    assert made.conn.trailing_data[0] == b""
    clock.wait(protocol.LINGER_SECONDS - 0.5)
    assert wire.done == ["write_eof", "resume_reading"]
    clock.wait(1)
    assert wire.done[2:] == ["abort"] and not clock.timers


def test_a_client_that_reads_nothing_of_its_answer_is_left(connect: Any) -> None:
    clock, wire, made = connect()
    made.data_received(HEAD + b"123456789")
    for _ in range(2):
        made.pause_writing()
        assert made.flow.write_paused
        clock.wait(protocol.WRITE_SECONDS - 1)
        made.resume_writing()
        assert not made.flow.write_paused and not clock.timers
    made.pause_writing()
    clock.wait(protocol.WRITE_SECONDS)
    assert wire.done[-1] == "abort"


def test_no_timer_outlives_its_connection(connect: Any) -> None:
    clock, _, made = connect()
    made.data_received(HEAD)
    made.pause_writing()
    assert len(clock.timers) == 2
    made.connection_lost(ConnectionResetError())
    assert made.is_closing and not clock.timers


def test_a_connection_too_many_is_told_to_come_back(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 1)
    _, wire, made = connect()
    assert not made.is_closing
    _, wire, made = connect()
    assert wire.sent.startswith(b"HTTP/1.1 503") and b"retry-after: 2\r\n" in wire.sent
    assert made.is_closing
