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
from mlx.utils import tree_flatten

from ..kernels.matrix import MAX_ROWS
from ..model.cache import join, part
from ..model.language import Model
from .exact_rows import runs_on_cpu
from .prompt_cache import PromptCache

T = TypeVar("T")

# More would lose the bits of a row alone, and the kernels for few rows.
MAX_BATCH_ROWS = MAX_ROWS
# With smaller weights, building a second graph takes longer than computing half of one.
PARALLEL_BYTES = 64 * 2**20


def num_streams(model: Model) -> int:
    """How many batches compute at a time: on a CPU one on each core, where there is much to do."""
    # Other processes compute one pass after the other.
    if not runs_on_cpu() or getattr(model, "ring", None):
        return 1
    weights: Any = tree_flatten(model.parameters())
    is_large = sum(array.nbytes for _, array in weights) >= PARALLEL_BYTES
    return os.cpu_count() or 1 if is_large else 1


def groups(rows: Sequence[T], num_streams: int) -> list[list[T]]:
    """The rows by batches of about the same size, each for a stream of its own."""
    number = max(-(-len(rows) // MAX_BATCH_ROWS), min(num_streams, len(rows)))
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
        deltas = [row.rope_delta for row in rows]
        self._rope_delta = mx.array(deltas) if any(deltas) else 0

    def clear(self) -> None:
        """Give all rows back their states."""
        if len(self.rows) > 1:
            part(self._entries, [row.entries for row in self.rows])
            for row in self.rows:
                row.settle()
        self.rows, self._entries = [], []

    def step(self, tokens: mx.array) -> mx.array:
        """Read a token `[B]` of each row -> the hidden state `[B, 1, H]`, not evaluated.

        `commit` of each row follows.
        """
        with mx.stream(self.stream):
            return self._step(tokens)

    def _step(self, tokens: mx.array) -> mx.array:
        if len(self.rows) == 1:
            return self.rows[0].step(tokens)
        for row in self.rows:
            row.begin_pass()
        delta = {"rope_delta": self._rope_delta} if not isinstance(self._rope_delta, int) else {}
        hidden = self.model.trunk(tokens[:, None], self._entries, **delta)
        for place, row in enumerate(self.rows):
            row.end_pass(hidden[place : place + 1])
        return hidden
