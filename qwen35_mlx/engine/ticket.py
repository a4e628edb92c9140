"""Ticket: the sender's handle of a request in the engine."""

from collections import deque
from collections.abc import Callable, Iterator
from threading import Condition

from .requests import Done, Event, Failed

Listener = Callable[[Event], None]


class Ticket:
    """Events of one request, for one iterator or for listeners; thread-safe."""

    def __init__(self, num_answers: int, wake: Callable[[], None]):
        """`wake`: makes the engine check its tickets."""
        self.cancelled = False
        self._wake = wake
        self._left = num_answers
        self._events: deque[Event] = deque()
        self._listeners: list[Listener] = []
        self._changed = Condition()

    @property
    def is_over(self) -> bool:
        """Whether the last event was sent."""
        return self._left == 0

    def events(self) -> Iterator[Event]:
        """The events until the last `Done`, or `Failed`; waits for them."""
        while True:
            with self._changed:
                while not self._events:
                    if self.is_over:
                        return
                    self._changed.wait()
                event = self._events.popleft()
            yield event

    def add_listener(self, listener: Listener) -> None:
        """Call `listener` for each event, earlier ones first, from the engine's thread.

        An exception in it cancels the request.
        """
        with self._changed:
            self._listeners.append(listener)
            while self._events:
                listener(self._events.popleft())

    def cancel(self) -> None:
        """End the request after the current piece or token; the event `Done` still comes."""
        self.cancelled = True
        self._wake()

    def send(self, event: Event) -> None:
        """Send an event to the receivers; events after the last one are dropped."""
        with self._changed:
            if self.is_over:
                return
            if isinstance(event, Failed):
                self._left = 0
            elif isinstance(event, Done):
                self._left -= 1
            if not self._listeners:
                self._events.append(event)
            for listener in self._listeners:
                try:
                    listener(event)
                except Exception:
                    # Its event loop is closed.
                    self.cancelled = True
            self._changed.notify_all()
