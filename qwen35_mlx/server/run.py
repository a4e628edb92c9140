"""Runs the server: binds its port, loads the model, and shuts down on signals."""

import asyncio
import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ..errors import Qwen35Error
from .faults import RETRY_AFTER_S, ApiError, dialect_of
from .models import watch_engine
from .protocol import Protocol

# At shutdown, answers may continue for so long; then they are cancelled.
FINISH_SECONDS = 5
# Time for the streams to end after that; then connections are aborted.
CUT_SECONDS = 5
KEEP_ALIVE_SECONDS = 65
MAX_HEAD_BYTES = 65_536
# Limit of open files and sockets; the default of macOS is 256.
WANTED_FILES = 4096


class Gate:
    """Passes requests to the application; until it exists, they get 503 with Retry-After."""

    app: Starlette | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
            return
        wait = {"retry-after": str(RETRY_AFTER_S)}
        fault = ApiError(503, "the model is loading", code="loading", headers=wait)
        is_health = scope["path"] in ("/health", "/v1/health")
        loading = JSONResponse({"status": "loading"}, 503, wait)
        await (loading if is_health else fault.response(dialect_of(scope)))(scope, receive, send)


class Server(uvicorn.Server):
    """uvicorn's server, which answers while the application is still being made.

    The first signal ends it, and the process returns 0.
    """

    def __init__(self, make: Callable[[], Starlette], on_ready: Callable[[], None] = lambda: None):
        """`make` runs in its own thread, because loading a model may take minutes."""
        self._gate = Gate()
        super().__init__(
            uvicorn.Config(
                self._gate,
                interface="asgi3",
                http=Protocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=FINISH_SECONDS + CUT_SECONDS,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            )
        )
        self._make, self._on_ready = make, on_ready
        self._watcher: asyncio.Task[None] | None = None
        # The exception of `make`.
        self.error: BaseException | None = None

    @property
    def app(self) -> Starlette | None:
        """The application, once it is made."""
        return self._gate.app

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            loop = asyncio.get_running_loop()
            # A daemon, because no signal ends the loading of a model.
            threading.Thread(target=self._load, args=(loop,), daemon=True).start()

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        made: Starlette | BaseException
        try:
            made = self._make()
        except BaseException as error:
            made = error
        # The loop is closed if the server has ended.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._open, made)

    def _open(self, made: Starlette | BaseException) -> None:
        if isinstance(made, BaseException):
            self.error, self.should_exit = made, True
            return
        self._gate.app = made
        self._watcher = asyncio.create_task(watch_engine(made.state.service))
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for answers to end; after a while the engine cancels them, and their streams end."""
        if self._gate.app is None:
            await super().shutdown(sockets)
            return
        loop = asyncio.get_running_loop()
        service = self._gate.app.state.service
        service.is_stopping = True
        # Its own thread, because the loop would wait for an executor's forever.
        stop = threading.Thread(target=service.engine.stop, args=(False,), daemon=True)
        timer = loop.call_later(FINISH_SECONDS, stop.start)
        await super().shutdown(sockets)
        timer.cancel()
        assert self._watcher is not None
        self._watcher.cancel()
        service.close()
        for connection in list(self.server_state.connections):
            # Connections of clients that do not read their answer.
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let signals end the server; they are not raised again afterwards."""
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
    """A bound socket; raises Qwen35Error if the address cannot be used."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise Qwen35Error(
            "unknown host", got=host, expected="127.0.0.1 or a name", hint=str(error)
        ) from None
    # IPPROTO_TCP is explicit: asyncio sets TCP_NODELAY only if the protocol is TCP.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    # Connections of a server that has just ended may still exist.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(1)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise Qwen35Error(
                f"{host} is no address of this machine",
                expected="127.0.0.1, 0.0.0.0 for all of its addresses, or one of them",
            ) from None
        raise Qwen35Error(
            f"port {port} of {host} cannot be used",
            got=error.strerror,
            expected="a free port",
            hint="another server may run there; choose one with --port, or 0 for any",
        ) from None
    return bound


def allow_many_files() -> None:
    """Raise the limit of open files, for many connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def serve(
    make: Callable[[], Starlette], bound: socket.socket, on_ready: Callable[[], None]
) -> None:
    """Run the server until a signal; afterwards the engine has ended."""
    allow_many_files()
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    server = Server(make, on_ready)
    try:
        server.run(sockets=[bound])
    finally:
        bound.close()
        if server.app is not None:
            server.app.state.service.engine.stop(False)
    if server.error is not None:
        raise server.error
    if server.app is None:
        # The model is still loading: Python would wait for MLX, or be aborted.
        os._exit(0)
