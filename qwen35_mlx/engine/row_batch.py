"""Sequences that are decoded together, a token each in one pass.

B rows. Recurrent states are stacked, which takes no padding, since every row reads one token. Keys
and values stay with their row: each is attended alone, so a row has the bits it has alone, and a
row that comes or goes copies no other one's.
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

# More would lose the bits of a row alone, and the kernels for few rows.
MAX_BATCH_ROWS = MAX_ROWS
# Of weights that all rows of a batch read: with fewer, building its graph takes longer than
# computing beside another one saves.
PARALLEL_BYTES = 64 * 2**20


def rows_a_stream(model: Model) -> int:
    """From how many rows on a batch of its own pays: on a CPU each core computes one at a time."""
    # Several processes of one model compute one pass after the other.
    if not runs_on_cpu() or getattr(model, "ring", None):
        return MAX_BATCH_ROWS
    num_bytes = sum(array.nbytes for array in arrays_of(model.parameters()).values())
    return max(1, -(-PARALLEL_BYTES // num_bytes))


def groups(rows: Sequence[T], rows_a_stream: int) -> list[list[T]]:
    """The rows by batches of about the same size, each for a stream of its own."""
    streams = min(os.cpu_count() or 1, len(rows) // rows_a_stream)
    number = max(-(-len(rows) // MAX_BATCH_ROWS), streams)
    cuts = [len(rows) * i // number for i in range(number + 1)] if number else []
    return [list(rows[start:end]) for start, end in itertools.pairwise(cuts)]


class RowBatch:
    """Up to 8 prompt caches; while they are here, their recurrent states are in the batch's."""

    def __init__(self, model: Model, stream: mx.Stream):
        """`stream`: of this thread."""
        self.model, self.stream = model, stream
        self.rows: list[PromptCache] = []
        self._entries: list[Any] = []
        self._rope_delta: Any = 0

    def put(self, rows: Sequence[PromptCache]) -> None:
        """Take in rows that are in no batch; this one is empty."""
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
        """Give all rows back their states."""
        if len(self.rows) > 1:
            part(self._entries, [row.entries for row in self.rows])
            for row in self.rows:
                row.in_batch = False
                row.settle()
        self.rows, self._entries = [], []

    def step(self, tokens: mx.array) -> mx.array:
        """Read a token `[B]` of each row -> the hidden state `[B, 1, H]`, not evaluated.

        `commit` of each row follows.
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
