"""Engine: one thread that owns MLX and answers many requests at a time.

Prompts are prefilled in pieces. Between two pieces all answers are decoded together, one token each
per pass, for as long as the piece took. A single answer is decoded with drafts.
"""

import atexit
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock, Thread, current_thread
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import Qwen35Error
from ..memory import PREFILL_STEP_SIZE
from ..model.language import Model
from ..prompt import banned_ids, without_media
from .decode import embedding
from .prefix_store import PrefixStore
from .prepare import Prepared, Preparer
from .reading import Admission, Pieces, Reading
from .requests import (
    Done,
    Embedding,
    EngineBusy,
    EngineStopped,
    Event,
    Failed,
    FinishReason,
    Request,
    Ticket,
)
from .row import Row, Vocabulary
from .rows import Rows
from .sampler import Sampler

log = logging.getLogger(__name__)

# Interval of saving while requests run, so that a killed server keeps its caches.
SAVE_SECONDS = 1.0


@dataclass
class Limits:
    """Limits of an engine."""

    # Answers in progress, and further requests that may wait.
    max_running: int = 16
    max_queued: int = 64
    # Bytes for keys, values and states of running requests; None: what the machine has left.
    memory_bytes: float | None = None


class Engine:
    """Answers requests; every method may be called from any thread."""

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        *,
        store: PrefixStore | None = None,
        limits: Limits | None = None,
        adapters: Mapping[str, Model] | None = None,
    ):
        """`adapters`: name -> the model with this adapter; see `with_adapter`."""
        self.model, self.tokenizer = model, tokenizer
        self.models = {"": model, **(adapters or {})}
        self.store = store or PrefixStore(model)
        self.limits = limits or Limits()
        self._preparer = Preparer(model, tokenizer)
        others = (adapters or {}).values()
        self._admission = Admission(model, self.store, self.limits.memory_bytes, others)
        self._inbox: SimpleQueue[Reading | None] = SimpleQueue()
        self._tickets: set[Ticket] = set()
        self._lock = Lock()
        self._thread: Thread | None = None
        self._stopping: str | None = "not started"
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._reset()

    def _reset(self) -> None:
        """Set the state of an engine without requests."""
        self._queue: deque[Reading] = deque()
        self._readings: list[Reading] = []
        self._rows = Rows(self.model, self._fail)
        self._pieces = Pieces()
        # Readings in the middle of a piece, and the start of the current layer.
        self._under_way: list[Reading] = []
        self._layer_started = 0.0
        self._saved_at = time.perf_counter()
        self._vocabulary: Vocabulary | None = None

    def start(self) -> None:
        """Start the thread."""
        with self._lock:
            if self.is_alive:
                return
            self._stopping = None
            self._thread = Thread(target=self._run, name="qwen35-mlx-engine", daemon=True)
            self._thread.start()
        # A computation at exit would abort the process.
        atexit.register(self.stop)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def prepare(self, request: Request) -> Prepared:
        """Check a request and encode its prompt; raises Qwen35Error. Uses no MLX."""
        if request.adapter not in self.models:
            names = ", ".join(filter(None, self.models)) or "none"
            raise Qwen35Error("no such adapter", got=repr(request.adapter)[:80], expected=names)
        return self._preparer.prepare(request)

    def count_tokens(self, request: Request) -> int:
        """Number of tokens of the prompt."""
        return self._preparer.count(request)

    def submit(self, request: Request | Prepared) -> Ticket:
        """Queue a request; raises errors of the request, EngineBusy and EngineStopped."""
        prepared = request if isinstance(request, Prepared) else self.prepare(request)
        ticket = Ticket(prepared.request.n, self._wake)
        reading = Reading(prepared, ticket, self.models[prepared.request.adapter])
        with self._lock:
            if self._stopping is not None or not self.is_alive:
                raise EngineStopped("the engine does not run", got=self._stopping or "it has died")
            waiting = len(self._tickets) - self._num_started()
            if waiting >= self.limits.max_queued:
                raise EngineBusy("the queue is full", got=f"{waiting} requests wait")
            self._tickets.add(ticket)
            self._inbox.put(reading)
        return ticket

    def stop(self, finish: bool = False) -> None:
        """End the thread; running requests are completed if `finish`, otherwise cancelled."""
        with self._lock:
            thread = self._thread
            self._stopping = "it finishes what it was asked" if finish else "it was stopped"
            if not finish:
                for ticket in self._tickets:
                    ticket.cancelled = True
        self._wake()
        if thread is not None:
            thread.join()
        atexit.unregister(self.stop)

    def answer(self, requests: Iterable[Request | Prepared]) -> Iterator[tuple[int, Event]]:
        """Answer in the caller's thread; yields indices of requests with events, raises errors."""
        events: list[tuple[int, Event]] = []

        def take(place: int, event: Event) -> None:
            events.append((place, event))

        with self._lock:
            self._thread, self._stopping = current_thread(), None
        try:
            for place, request in enumerate(requests):
                self.submit(request).add_listener(partial(take, place))
            while self._has_work():
                self._take_inbox()
                self._admit()
                # All prompts first: no client waits for a first token, and full batches are fast.
                if self._readings:
                    self._read_piece(self._readings)
                elif self._rows:
                    self._step()
                self._save()
                for place, event in events:
                    if isinstance(event, Failed):
                        raise event.error
                    yield place, event
                events.clear()
        finally:
            self._thread, self._stopping = None, "not started"
            self._tickets = set()
            self._reset()

    def stats(self) -> dict[str, float]:
        """Counters since the start, and the numbers of running and queued requests."""
        counts = dict(self._counts)
        with self._lock:
            started = self._num_started()
            counts |= {"running": started, "queued": max(0, len(self._tickets) - started)}
        experts = getattr(self.model, "experts", None)
        return counts | {
            "rows": len(self._rows),
            "cached_points": self.store.num_snapshots,
            "cache_bytes": self.store.nbytes,
            **(experts.figures() if experts else {}),
        }

    def _num_started(self) -> int:
        return len(self._readings) + len({row.ticket for row in list(self._rows)})

    def _wake(self) -> None:
        self._inbox.put(None)

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            while self._has_work() or self._stopping is None:
                self._take_inbox()
                self._drop_cancelled()
                self._admit()
                self._go_on()
                self._save()
        except BaseException as error:
            log.exception("the engine's thread has died")
            reason: Exception = EngineStopped("the engine has died", got=repr(error)[:200])
        else:
            reason = EngineStopped("the engine was stopped")
        with self._lock:
            self._stopping = self._stopping or "it has died"
            tickets, self._tickets = self._tickets, set()
            while not self._inbox.empty():
                self._inbox.get()
        for ticket in tickets:
            ticket.send(Failed(reason))
        self._reset()
        # MLX frees a thread's streams late, and aborts a process that exits before that.
        mx.clear_streams()

    def _has_work(self) -> bool:
        return not (self._is_idle and self._inbox.empty() and self.store.is_saved)

    @property
    def _is_idle(self) -> bool:
        return not (self._rows or self._readings or self._queue)

    def _save(self) -> None:
        """Write a piece of the unsaved caches if the engine is idle, or the last write is old."""
        if self.store.is_saved:
            return
        if self._is_idle or time.perf_counter() - self._saved_at > SAVE_SECONDS:
            self.store.save_piece()
            self._saved_at = time.perf_counter()

    def _take_inbox(self) -> None:
        """Queue submitted requests; waits for one if there is nothing else to do."""
        waits = self._is_idle and self.store.is_saved
        while True:
            try:
                reading = self._inbox.get(block=waits and self._stopping is None)
            except Empty:
                return
            waits = False
            if reading is not None:
                self._queue.append(reading)

    def _drop_cancelled(self) -> None:
        for reading in [r for r in [*self._queue, *self._readings] if r.ticket.cancelled]:
            if reading in self._under_way:
                # It stops by itself.
                continue
            # Its cache stays in the store.
            self._readings = [r for r in self._readings if r is not reading]
            self._queue = deque(r for r in self._queue if r is not reading)
            if reading.cache is not None:
                reading.cache.release()
                self.store.save_later(reading.cache)
                self.store.trim()
            for index in range(reading.prepared.request.n):
                reading.ticket.send(Done("cancelled", None, reading.usage, index=index))
            self._forget(reading.ticket)
        self._leave([(row, "cancelled") for row in self._rows if row.ticket.cancelled])

    def _admit(self) -> None:
        """Start queued requests in order; one that has to wait also holds up later ones."""
        while self._queue:
            reading = self._queue[0]
            num_rows = len(self._rows) + sum(r.prepared.request.n for r in self._readings)
            running = [*(r.prepared for r in self._readings), *(row.prepared for row in self._rows)]
            is_first = not self._rows and not self._readings
            if not is_first and (
                num_rows + reading.prepared.request.n > self.limits.max_running
                or not self._admission.fits(reading.prepared, running)
            ):
                return
            self._readings.append(self._queue.popleft())

    def _go_on(self) -> None:
        """Read a piece of a prompt, then decode all answers for as long as it took."""
        self._layer_started = time.perf_counter()
        if self._readings:
            self._read_piece(self._readings, self._between_layers)
        self._decode_for(time.perf_counter() - self._layer_started)

    def _between_layers(self) -> None:
        """Serve other requests between the layers of a prompt that reads experts from disk.

        Short prompts are prefilled whole; between their layers only answers continue.
        """
        now = time.perf_counter()
        seconds, self._layer_started = now - self._layer_started, now
        self._take_inbox()
        self._drop_cancelled()
        self._admit()
        if len(self._under_way) == 1:
            others = [r for r in self._readings if r not in self._under_way]
            short = [r for r in others if r.num_left <= PREFILL_STEP_SIZE]
            self._read_piece(short, self._between_layers)
        self._decode_for(seconds)
        self._layer_started = time.perf_counter()

    def _decode_for(self, seconds: float) -> None:
        """Decode a token of all answers, and more for `seconds` while prompts wait."""
        end = time.perf_counter() + seconds
        while self._rows:
            self._step()
            if self._readings and time.perf_counter() < end and self._inbox.empty():
                continue
            if self._readings or self._queue or not self._inbox.empty():
                return
            if any(row.ticket.cancelled for row in self._rows) or not self.store.is_saved:
                return

    def _read_piece(
        self, among: Sequence[Reading], meanwhile: Callable[[], None] | None = None
    ) -> None:
        reading = self._pieces.choose(self._readings, self.store, among)
        if reading is None:
            return
        started = time.perf_counter()
        self._under_way.append(reading)
        try:
            if reading.cache is None:
                reading.start(self.store)
            is_shared = len(self._readings) > 1 or bool(self._rows or self._queue)
            experts = getattr(self.model, "experts", None)
            size = experts.sweep_tokens if experts else self._pieces.next_size(is_shared)
            meanwhile = meanwhile if experts else None
            before = reading.position
            drafter = self._rows.drafter(reading.model, reading.prepared.request.draft)
            hidden = reading.read_piece(size, drafter.uses_mtp, meanwhile)
            num_read = reading.position - before
            seconds = time.perf_counter() - started
            self._pieces.record(num_read, seconds)
            self._counts["prefilled_tokens"] += num_read
            self._counts["prefill_seconds"] += seconds
            if hidden is not None:
                self._begin(reading, hidden)
        except Exception as error:
            self._fail(reading.ticket, error)
        finally:
            self._under_way.remove(reading)

    def _begin(self, reading: Reading, hidden: mx.array) -> None:
        """Start the answers to a prefilled prompt."""
        prepared, ticket = reading.prepared, reading.ticket
        request, cache = prepared.request, reading.cache
        assert cache is not None
        self.store.trim()
        self._counts["prompt_tokens"] += len(prepared.ids)
        self._counts["cached_tokens"] += reading.usage.cached_tokens
        if request.embeds:
            self._readings.remove(reading)
            ticket.send(Embedding(np.array(embedding(hidden))))
            ticket.send(Done("stop", None, reading.usage))
            self._forget(ticket)
            return
        if self._vocabulary is None:
            width = self.model.head(hidden).shape[-1]
            never = banned_ids(self.model, self.tokenizer)
            self._vocabulary = Vocabulary(self.tokenizer, width, never)
        caches = [cache, *(cache.fork(len(cache.ids)) for _ in range(request.n - 1))]
        counted = mx.array(without_media(self.tokenizer, prepared.ids))
        banned = self._vocabulary.banned(prepared)
        rows = []
        for index, own in enumerate(caches):
            seed = None if request.seed is None else (request.seed + index) % 2**63
            bans = () if banned is None else banned
            sampler = Sampler(prepared.params, counted, seed, bans, request.logit_bias)
            own.owner = cache.owner
            rows.append(Row(reading, own, sampler, self._vocabulary, self.tokenizer, index))
        self._readings.remove(reading)
        self._rows.add(rows)
        if prepared.max_tokens == 0:
            self._leave([(row, "length") for row in rows])
            return
        for row in rows:
            row.begin(hidden)

    def _step(self) -> None:
        """Decode one token of each answer, or several of a single answer."""
        started = time.perf_counter()
        rows = self._rows.step()
        ended = [(row, row.finish_reason) for row in rows if row.finish_reason is not None]
        self._leave(ended)
        self._rows.read_forced()
        self._counts["generated_tokens"] += len(rows)
        self._counts["decode_seconds"] += time.perf_counter() - started
        self._counts["decode_steps"] += 1

    def _leave(self, ended: list[tuple[Row, FinishReason]]) -> None:
        """End rows: release their caches to the store, and remember their answers."""
        if not ended:
            return
        self._rows.remove([row for row, _ in ended])
        for row, reason in ended:
            prepared = row.prepared
            row.cache.release()
            self.store.save_later(row.cache)
            end = row.end(reason)
            # Before the event is sent, because the next request may come at once.
            if prepared.key is not None:
                content, thought, calls = row.answer()
                self._preparer.answers.remember(
                    prepared.key, content, thought, calls, prepared.typed_calls
                )
            self._counts["draft_tokens"] += row.num_drafted
            self._counts[f"finished_{end.finish_reason}"] += 1
            row.ticket.send(end)
            if row.ticket.is_over:
                self._forget(row.ticket)
        self.store.trim()

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        """End one request with an error; the others continue."""
        if isinstance(error, RuntimeError) and self.model.ring is not None:
            # MLX failed in a pass in which other processes take part.
            self.model.ring.fail(error)
        log.warning("a request failed: %r", error, exc_info=error)
        self._counts["failed"] += 1
        # Drop its caches: they may be the reason of the error.
        for reading in [r for r in self._readings if r.ticket is ticket]:
            self._readings.remove(reading)
            self.store.drop(reading.cache)
        failed = [row for row in self._rows if row.ticket is ticket]
        self._rows.remove(failed)
        for row in failed:
            self.store.drop(row.cache)
        ticket.send(Failed(error))
        self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        with self._lock:
            self._tickets.discard(ticket)
