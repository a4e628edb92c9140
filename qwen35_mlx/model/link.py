"""Connections between the processes of one model: commands from rank 0, heartbeats both ways."""

import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hmac import compare_digest
from queue import SimpleQueue
from select import select
from typing import Any, NoReturn

import mlx.core as mx

from ..errors import Qwen35Error

BEAT_S, SILENCE_S = 0.5, 5.0
CONNECT_S, CLOSE_S, END_S = 60.0, 1.0, 5.0
SECRET_BYTES = 16
Message = dict[str, Any]


class Link:
    """Sends lines of JSON to the other processes; ends this process if another one is lost.

    A process that waits inside MLX for a lost one cannot be woken, so it prints why and exits.
    """

    def __init__(self, sockets: Mapping[int, socket.socket]):
        """`sockets`: on rank 0 one per other rank, on other ranks the one to rank 0."""
        self.messages: SimpleQueue[Message] = SimpleQueue()
        self._sockets, self._lock, self._is_ending = sockets, threading.Lock(), False
        self._failing = threading.Lock()
        self._terminal = _terminal_settings()
        for each in sockets.values():
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each.settimeout(SILENCE_S)
        threading.Thread(target=self._watch, name="qwen35-mlx-link", daemon=True).start()

    def send(self, message: Message) -> None:
        """Send a message to all connected processes."""
        line = json.dumps(message).encode() + b"\n"
        with uninterrupted(), self._lock:
            for each in self._sockets.values():
                each.sendall(line)

    def end(self) -> None:
        """End the others; from here on, a closed connection is no error."""
        for rank, each in self._sockets.items():
            # A lost process may be the reason for the end, and the thread may not know it yet.
            with suppress(OSError):
                if select([each], [], [], 0)[0] and not each.recv(1, socket.MSG_PEEK):
                    self._lose(f"process {rank} of the model has ended")
        self._is_ending = True
        self._close({"do": "end"})

    def _close(self, last: Message) -> None:
        """Send a last message, then read pending data: unread data would reset the connection."""
        end, left = time.monotonic() + CLOSE_S, list(self._sockets.values())
        for each in left:
            # One of them may belong to the lost process.
            with suppress(OSError):
                each.sendall(json.dumps(last).encode() + b"\n")
                each.shutdown(socket.SHUT_WR)
        while left and time.monotonic() < end:
            for each in select(left, [], [], 0.1)[0]:
                try:
                    is_over = not each.recv(2**16)
                except OSError:
                    is_over = True
                if is_over:
                    left.remove(each)

    def _watch(self) -> None:
        beaten = 0.0
        seen = dict.fromkeys(self._sockets, time.monotonic())
        unread = dict.fromkeys(self._sockets, b"")
        while not self._is_ending:
            ready, _, _ = select([*self._sockets.values()], [], [], BEAT_S)
            for rank, each in self._sockets.items():
                if each in ready:
                    data = b""
                    with suppress(OSError):
                        data = each.recv(2**16)
                    if not data and not self._is_ending:
                        self._lose(f"process {rank} of the model has ended")
                    seen[rank] = time.monotonic()
                    *lines, unread[rank] = (unread[rank] + data).split(b"\n")
                    for line in filter(None, lines):
                        self._take(json.loads(line))
                elif time.monotonic() - seen[rank] > SILENCE_S:
                    self._lose(f"process {rank} of the model does not answer")
            if time.monotonic() - beaten >= BEAT_S and self._lock.acquire(timeout=BEAT_S):
                beaten = time.monotonic()
                with suppress(OSError):
                    for each in self._sockets.values():
                        each.sendall(b"\n")
                self._lock.release()

    def _take(self, message: Message) -> None:
        if message["do"] == "lost":
            self.fail(message["text"])
        self.messages.put(message)
        if message["do"] == "end":
            self._is_ending = True
            with suppress(OSError):
                for each in self._sockets.values():
                    each.shutdown(socket.SHUT_WR)
            # Normally it has ended by then; but rank 0 may have failed while this one waits for it.
            time.sleep(END_S)
            os._exit(1)

    def _lose(self, what: str) -> None:
        hint = "sessions are as they were saved; start it again on all Macs"
        self.fail(str(Qwen35Error(what, hint=hint)))

    def fail(self, text: str) -> NoReturn:
        """End all processes with this error; of several errors the first counts."""
        # Never released: the others end because of this error, and must not report another one.
        self._failing.acquire()
        self._close({"do": "lost", "text": text})
        if self._terminal is not None:
            _set_terminal(self._terminal)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.write(f"\nerror: {text}\n")
            sys.stderr.flush()
        os._exit(1)


def connect(group: mx.distributed.Group) -> Link:
    """Connect rank 0 with all others; they prove who they are by a secret sent over the group."""
    rank, size, host = group.rank(), group.size(), _host_of_rank_0()
    if rank == 0:
        with socket.create_server((host, 0), backlog=size) as server:
            secret = secrets.token_bytes(SECRET_BYTES)
            _told([server.getsockname()[1], *secret], group)
            return Link(_accepted(server, size - 1, secret.hex().encode()))
    port, *words = _told([0] * (1 + SECRET_BYTES), group)
    link = socket.create_connection((host, port), CONNECT_S)
    link.sendall(bytes(words).hex().encode() + b" %d\n" % rank)
    return Link({0: link})


def _told(numbers: list[int], group: mx.distributed.Group) -> list[int]:
    """Broadcast the numbers of rank 0; the other ranks give zeros."""
    told: Any = mx.distributed.all_sum(mx.array(numbers, dtype=mx.int32), group=group).tolist()
    return list(told)


def _accepted(server: socket.socket, number: int, secret: bytes) -> dict[int, socket.socket]:
    found: dict[int, socket.socket] = {}
    end = time.monotonic() + CONNECT_S
    while len(found) < number:
        server.settimeout(max(0.1, end - time.monotonic()))
        try:
            link, _ = server.accept()
            link.settimeout(1)
            with link.makefile("rb", buffering=0) as stream:
                given, _, rank = stream.readline(2 * SECRET_BYTES + 8).strip().partition(b" ")
        except OSError as error:
            if time.monotonic() < end:
                continue
            raise Qwen35Error(
                "not all processes of the model have connected",
                got=f"{len(found)} of {number}: {error}",
                expected=f"all of them within {CONNECT_S:.0f} seconds",
                hint="a firewall may keep them apart",
            ) from None
        if compare_digest(given, secret) and rank.isdigit():
            found[int(rank)] = link
        else:
            link.close()
    return found


def _host_of_rank_0() -> str:
    """The address of rank 0, from the settings of `mlx.launch`."""
    if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        return coordinator.rpartition(":")[0]
    with open(os.environ["MLX_HOSTFILE"], encoding="utf-8") as file:
        return str(json.load(file)[0][0]).rpartition(":")[0]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block: half of it would bring the processes out of step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *signal_and_frame: caught.append(signal_and_frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught and callable(before):
            before(*caught[-1])


def _terminal_settings() -> Any:
    """The settings of the terminal, which a chat changes; None if stdin is no terminal."""
    import termios

    with suppress(ValueError, OSError, AttributeError, termios.error):
        return termios.tcgetattr(sys.stdin.fileno())
    return None


def _set_terminal(settings: Any) -> None:
    import termios

    with suppress(ValueError, OSError, AttributeError, termios.error):
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, settings)
