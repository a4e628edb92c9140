"""The engine of a server: one thread that owns MLX and answers many requests at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..model.language import Model
from .prefix_store import PrefixStore
from .requests import Event, Request


@dataclass
class Limits:
    """What an engine takes on at once."""

    # Requests that are read or answered, and those that wait beyond them.
    max_running: int = 16
    max_queued: int = 64
    # Keys, values and states of what runs; None: what the machine has left.
    memory_bytes: float | None = None


class Ticket:
    """A request on its way; events may be taken by one iterator or given to listeners."""

    def events(self) -> Iterator[Event]:
        """The events until the last `Done`, or `Failed`; waits for them, in any thread."""
        raise NotImplementedError

    def add_listener(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` for each event, earlier ones first, from the engine's thread."""
        raise NotImplementedError

    def cancel(self) -> None:
        """End the request within a piece of the prompt or a token; `Done` comes all the same."""
        raise NotImplementedError


class Engine:
    """Answers requests; every method may be called from any thread."""

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        *,
        store: PrefixStore | None = None,
        limits: Limits | None = None,
    ):
        raise NotImplementedError

    def start(self) -> None:
        """Start the thread."""
        raise NotImplementedError

    def submit(self, request: Request) -> Ticket:
        """Queue a request; a mistake in it is raised here, as is `EngineBusy`."""
        raise NotImplementedError

    def count_tokens(self, request: Request) -> int:
        """How long the prompt is; nothing is computed by MLX."""
        raise NotImplementedError

    def stop(self, finish: bool = False) -> None:
        """End the thread, after what was taken on if `finish`; else that is cancelled."""
        raise NotImplementedError

    def restart(self) -> None:
        """Start again after the thread has died; what waited has failed."""
        raise NotImplementedError

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and makes progress."""
        raise NotImplementedError

    def stats(self) -> dict[str, float]:
        """Counters since the start, and what runs now."""
        raise NotImplementedError
