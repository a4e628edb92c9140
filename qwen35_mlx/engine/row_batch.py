"""Sequences that are decoded together, one token each per pass.

B rows. Recurrent states are stacked, without padding, since every row reads one token. Keys and
values stay with their row, and attention runs row by row. So a row has the same bits as alone, and
rows join and leave without copying the keys and values of others.
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import mlx.core as mx

from ..kernels.matrix import MAX_ROWS, arrays_of
from ..model.cache import join, part
from ..model.language import Model
from .exact_rows import runs_on_cpu
from .prompt_cache import PromptCache

T = TypeVar("T")

# With more, rows would not be bit-equal to single rows, and kernels for few rows would not run.
MAX_BATCH_ROWS = MAX_ROWS
# Bytes of weights that a batch reads, rows together: with fewer, building the graph of a second
# batch takes longer than computing both in parallel saves.
PARALLEL_BYTES = 64 * 2**20


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
