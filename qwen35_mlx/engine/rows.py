"""All answers that are being decoded: in batches, or a single one with drafts."""

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import mlx.core as mx

from ..model.language import Model
from .row import Row
from .row_batch import RowBatch, groups, rows_a_stream
from .sampler import draw_rows
from .speculate import OFF, Drafter
from .ticket import Ticket

log = logging.getLogger(__name__)
# Streams of each thread; they are reused, because MLX never frees one.
_of_thread = threading.local()


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
