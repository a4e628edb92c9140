"""Runs the server: a port that is free, signals that end it in order, and the engine behind it."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette

from ..errors import Qwen35Error
from .protocol import Protocol

# Answers that are nearly done may end; the others are cut.
FINISH_SECONDS = 5
KEEP_ALIVE_SECONDS = 65
MAX_HEAD_BYTES = 65_536
# Of files and sockets; macOS begins with 256.
WANTED_FILES = 4096


class Server(uvicorn.Server):
    """uvicorn's server, of which the first signal ends the work and the process returns 0."""

    def __init__(self, app: Starlette):
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=FINISH_SECONDS + 5,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            )
        )
        self._service = app.state.service
        self.on_started: Callable[[], None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.on_started is not None:
            self.on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let answers end for a while; then the engine cancels them, and their streams end."""
        loop = asyncio.get_running_loop()
        self._service.is_stopping = True
        stopping: list[asyncio.Future[Any]] = []
        timer = loop.call_later(
            FINISH_SECONDS,
            lambda: stopping.append(loop.run_in_executor(None, self._service.engine.stop, False)),
        )
        await super().shutdown(sockets)
        timer.cancel()
        if stopping:
            await asyncio.gather(*stopping)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server, and are not raised again once it has ended."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        installed = []
        for number in signals:
            # Only the main thread gets signals.
            with contextlib.suppress(ValueError, RuntimeError):
                loop.add_signal_handler(number, self.handle_exit, number, None)
                installed.append(number)
        try:
            yield
        finally:
            for number in installed:
                loop.remove_signal_handler(number)


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address; raises Qwen35Error if there is none to be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise Qwen35Error(
            "unknown host", got=host, expected="127.0.0.1 or a name", hint=str(error)
        ) from None
    bound = socket.socket(family, socket.SOCK_STREAM)
    # A server that ended a moment ago leaves its connections behind.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(1)
    except OSError as error:
        bound.close()
        raise Qwen35Error(
            f"port {port} of {host} cannot be used",
            got=error.strerror,
            expected="a free port",
            hint="another server may run there; choose one with --port, or 0 for any",
        ) from None
    return bound


def allow_many_files() -> None:
    """Raise the limit of open files, for as many connections."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def serve(
    app: Starlette, bound: socket.socket, on_started: Callable[[], None] | None = None
) -> None:
    """Answer until a signal; the engine is started here and has ended afterwards."""
    allow_many_files()
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    engine = app.state.service.engine
    engine.start()
    server = Server(app)
    server.on_started = on_started
    try:
        server.run(sockets=[bound])
    finally:
        engine.stop(False)
        bound.close()
