"""All answers that are being decoded: in batches, or a single one with drafts.

B rows, one token each per pass. Recurrent states are stacked, without padding, since every row
reads one token. Keys and values stay with their row, and attention runs row by row. So a row has
the same bits as alone, and rows join and leave without copying the keys and values of others.
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import mlx.core as mx

from ..kernels.matrix import MAX_ROWS, arrays_of
from ..model.cache import join, part
from ..model.language import Model
from .exact_rows import runs_on_cpu
from .prompt_cache import PromptCache
from .requests import Ticket
from .row import Row
from .sampler import draw_rows
from .speculate import OFF, Drafter

T = TypeVar("T")

# With more, rows would not be bit-equal to single rows, and kernels for few rows would not run.
MAX_BATCH_ROWS = MAX_ROWS
# Bytes of weights that a batch reads, rows together: with fewer, building the graph of a second
# batch takes longer than computing both in parallel saves.
PARALLEL_BYTES = 64 * 2**20
# Streams of each thread; they are reused, because MLX never frees one.
_of_thread = threading.local()


def rows_a_stream(model: Model) -> int:
    """Minimum rows of a batch with its own stream; on a CPU, streams run in parallel on cores."""
    # Processes that share a model compute one pass after the other.
    if not runs_on_cpu() or getattr(model, "ring", None):
        return MAX_BATCH_ROWS
    num_bytes = sum(array.nbytes for array in arrays_of(model.parameters()).values())
    return max(1, -(-PARALLEL_BYTES // num_bytes))


def groups(rows: Sequence[T], rows_a_stream: int) -> list[list[T]]:
    """Split rows into batches of about the same size, one per stream."""
    streams = min(os.cpu_count() or 1, len(rows) // rows_a_stream)
    number = max(-(-len(rows) // MAX_BATCH_ROWS), streams)
    cuts = [len(rows) * i // number for i in range(number + 1)] if number else []
    return [list(rows[start:end]) for start, end in itertools.pairwise(cuts)]


class RowBatch:
    """Up to 8 prompt caches, whose recurrent states are stacked while they are in the batch."""

    def __init__(self, model: Model, stream: mx.Stream):
        """`stream`: must belong to this thread."""
        self.model, self.stream = model, stream
        self.rows: list[PromptCache] = []
        self._entries: list[Any] = []
        self._rope_delta: Any = 0

    def put(self, rows: Sequence[PromptCache]) -> None:
        """Add rows that are in no batch to this empty one."""
        assert not self.rows
        self.rows = list(rows)
        if len(rows) < 2:
            return
        self._entries = join([row.entries for row in rows])
        for row in rows:
            row.in_batch = True
        deltas = [row.rope_delta for row in rows]
        self._rope_delta = mx.array(deltas) if any(deltas) else 0

    def clear(self) -> None:
        """Remove all rows and give them their states back."""
        if len(self.rows) > 1:
            part(self._entries, [row.entries for row in self.rows])
            for row in self.rows:
                row.in_batch = False
                row.settle()
        self.rows, self._entries = [], []

    def step(self, tokens: mx.array) -> mx.array:
        """Append a token `[B]` to each row -> the lazy hidden state `[B, 1, H]`.

        Then `commit` has to be called for each row.
        """
        with mx.stream(self.stream):
            if len(self.rows) == 1:
                return self.rows[0].step(tokens)
            for row in self.rows:
                row.begin_pass()
            hidden = self.model.trunk(tokens[:, None], self._entries, rope_delta=self._rope_delta)
            for place, row in enumerate(self.rows):
                row.end_pass(hidden[place : place + 1])
            return hidden


class Rows:
    """Rows that join and leave between steps; an error in one fails its request."""

    def __init__(self, model: Model, fail: Callable[[Ticket, Exception], None]):
        """`fail(ticket, error)` removes all rows of a request."""
        self._fail = fail
        self._rows: list[Row] = []
        self._batches: list[RowBatch] = []
        self._drafters: dict[tuple[int, str], Drafter] = {}
        self._rows_a_stream = rows_a_stream(model)

    def __iter__(self) -> Iterator[Row]:
        return iter(list(self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Add rows; their first token must be sampled before the next step."""
        self._rows += rows

    def remove(self, rows: Sequence[Row]) -> None:
        """Remove rows; their caches then hold their states."""
        for row in rows:
            row.pause()
            self._rows.remove(row)
            for batch in self._batches:
                if row.cache in batch.rows:
                    batch.clear()

    def drafter(self, model: Model, mode: str) -> Drafter:
        """The drafter for single rows of a model; it keeps its measurements."""
        key = id(model), mode
        if key not in self._drafters:
            self._drafters[key] = Drafter(model, mode)
        return self._drafters[key]

    def step(self) -> list[Row]:
        """Decode one token of each row; returns the rows that have not failed."""
        rows = list(self._rows)
        if len(rows) == 1 and rows[0].can_draft and rows[0].prepared.request.draft != OFF:
            return self._step_alone(rows[0])
        return self._step_together(rows)

    def read_forced(self) -> None:
        """Append the forced tokens of rows."""
        forced = [row for row in self._rows if row.forced]
        if forced:
            # Take their states out of the batches.
            self._arrange([])
        for row in forced:
            try:
                row.read_forced()
            except Exception as error:
                self._fail(row.ticket, error)

    def _step_alone(self, row: Row) -> list[Row]:
        self._arrange([])
        try:
            step = row.speculative_step(self.drafter(row.cache.model, row.prepared.request.draft))
            row.take(step.token, step.logits, step.from_draft)
        except Exception as error:
            self._fail(row.ticket, error)
        return list(self._rows)

    def _step_together(self, rows: list[Row]) -> list[Row]:
        try:
            for row in rows:
                row.pause()
            self._arrange(rows)
            # The pass of all rows starts before the host knows their tokens.
            drawn_from = []
            for batch, members in zip(self._batches, self._groups(rows), strict=True):
                for row in members:
                    row.sampler.accept(row.token)
                hidden = batch.step(mx.concatenate([row.token for row in members]))
                with mx.stream(batch.stream):
                    logits = batch.model.head(hidden)[:, 0]
                drawn_from.append((members, logits, batch.stream))
            # In one call: in several, MLX nearly finishes one before it starts the next.
            mx.async_eval([logits for _, logits, _ in drawn_from])
            ids = cast(list[int], mx.concatenate([row.token for row in rows]).tolist())
        except Exception as error:
            # The state of its rows is unknown.
            self._batches = []
            for row in rows:
                self._fail(row.ticket, error)
            return []
        for row, token in zip(rows, ids, strict=True):
            row.cache.commit(token)
        for row, token in zip(rows, ids, strict=True):
            # It was removed if another answer of its request has failed.
            if row not in self._rows:
                continue
            try:
                row.take(token, row.decoding.logits)
            except Exception as error:
                self._fail(row.ticket, error)
        for members, logits, stream in drawn_from:
            self._draw(members, logits, stream)
        return [row for row in rows if row in self._rows]

    def _draw(self, rows: list[Row], logits: mx.array, stream: mx.Stream) -> None:
        """Sample the next token of each unfinished row, from logits `[B, V]`."""
        chosen, forbidden = [], []
        for i, row in enumerate(rows):
            if not row.goes_on or row not in self._rows:
                continue
            try:
                forbidden.append(row.forbidden())
                chosen.append(i)
            except Exception as error:
                self._fail(row.ticket, error)
        drawing = [rows[i] for i in chosen]
        if not drawing:
            return
        with mx.stream(stream):
            if len(chosen) < len(rows):
                logits = logits[mx.array(chosen)]
            samplers = [row.sampler for row in drawing]
            places = [len(row.cache.ids) for row in drawing]
            tokens = draw_rows(samplers, logits, places, forbidden)
            mx.async_eval(tokens)
            for i, row in enumerate(drawing):
                row.decoding.token, row.decoding.logits = tokens[i], logits[i : i + 1]

    def _groups(self, rows: list[Row]) -> list[list[Row]]:
        """Split rows into batches by adapter, of about the same size."""

        def model_of(row: Row) -> int:
            return id(row.cache.model)

        of_models = itertools.groupby(sorted(rows, key=model_of), model_of)
        return [group for _, some in of_models for group in groups([*some], self._rows_a_stream)]

    def _arrange(self, rows: list[Row]) -> None:
        """Arrange exactly these rows in batches; only changed batches move their states."""
        wanted = [[row.cache for row in group] for group in self._groups(rows)]
        held = self._batches
        kept = [i for i in range(min(len(held), len(wanted))) if held[i].rows == wanted[i]]
        if len(kept) == len(held) == len(wanted):
            return
        for i, batch in enumerate(held):
            if i not in kept:
                batch.clear()
        self._batches = []
        for i, group in enumerate(wanted):
            if i in kept:
                self._batches.append(held[i])
                continue
            for cache in group:
                # The MTP layer does not support batches.
                cache.feeds_mtp = False
            self._batches.append(RowBatch(group[0].model, self._stream(i)))
            self._batches[-1].put(group)

    def _stream(self, number: int) -> mx.Stream:
        """The stream of a batch; the first batch uses the thread's default stream."""
        device = mx.default_device()
        if not hasattr(_of_thread, "streams"):
            _of_thread.streams = [mx.default_stream(device)]
        streams: list[mx.Stream] = _of_thread.streams
        while len(streams) <= number:
            streams.append(mx.new_stream(device))
        return streams[number]
