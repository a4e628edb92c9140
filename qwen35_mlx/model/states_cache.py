"""The cache of a recurrent layer, in mlx-lm's protocol: states of the sequences of a batch.

B batch, T new tokens.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..kernels.delta_step import KeptStates, Tape
from .layer_cache import LayerCache


class ArraysCache(LayerCache):
    """The states of a recurrent layer: replaced at each step, never written in place.

    `left_padding` and `lengths` `[B]` are how many of the next tokens are padding, and how many
    are left before the padding at a row's end.
    """

    # A pass that can be taken back, in place of the states.
    pending: Tape | KeptStates | None = None

    def __init__(self, size: int, left_padding: Sequence[int] | None = None) -> None:
        self.cache = [None] * size
        self.left_padding = mx.array(list(left_padding)) if left_padding else None
        self.lengths: mx.array | None = None

    @property
    def cache(self) -> list[Any]:
        """The states. Whoever asks for them accepts what is left of the last pass."""
        if self.pending is not None:
            self.cache = list(self.pending.states())
        return self._states

    @cache.setter
    def cache(self, states: list[Any]) -> None:
        self._states, self.pending, self.num_kept = states, None, 0

    def keep(self, pending: Tape | KeptStates) -> None:
        """Count a pass that can be taken back as read."""
        self._states = [None] * len(self._states)
        self.pending, self.num_kept = pending, pending.num_accepted

    def accept(self, num_tokens: int) -> None:
        """Keep the first tokens of the last pass."""
        assert self.pending is not None
        self.pending, self.num_kept = self.pending._replace(num_accepted=num_tokens), 0

    def __getitem__(self, index: int) -> Any:
        return self.cache[index]

    def __setitem__(self, index: int, value: Any) -> None:
        self.cache[index] = value

    @property
    def batch_size(self) -> int:
        """The number of rows; 1 while nothing tells."""
        known = (*self.cache, self.left_padding, self.lengths)
        return next((a.shape[0] for a in known if a is not None), 1)

    @property
    def state(self) -> tuple[Any, ...]:
        return self.cache, self.left_padding, self.lengths

    @state.setter
    def state(self, value: Any) -> None:
        self.cache, self.left_padding, self.lengths = value

    def make_mask(self, num_tokens: int) -> mx.array | None:
        """False at padding, `[B, T]`; None where there is none."""
        positions = mx.arange(num_tokens)
        mask = None
        if self.left_padding is not None:
            mask = positions >= self.left_padding[:, None]
        if self.lengths is not None:
            inside = positions < self.lengths[:, None]
            mask = inside if mask is None else mask & inside
        return mask

    def prepare(self, lengths: Sequence[int] | None = None, **unused: Any) -> None:
        """Announce how many tokens of each row come before the padding at its end."""
        self.lengths = None if lengths is None else mx.array(list(lengths))

    def advance(self, num_tokens: int) -> None:
        """Count tokens that were read."""
        if self.left_padding is not None:
            self.left_padding = self.left_padding - num_tokens
        if self.lengths is not None:
            self.lengths = self.lengths - num_tokens

    def finalize(self) -> None:
        """No more padding comes."""
        self.left_padding = self.lengths = None

    def filter(self, rows: Any) -> None:
        """Keep these rows only."""
        kept = [None if a is None else a[rows] for a in (*self.cache, *self._paddings)]
        *self.cache, self.left_padding, self.lengths = kept

    def extend(self, other: "ArraysCache") -> None:
        """Append the rows of another batch; a state that one side lacks is zero there."""
        sizes = self.batch_size, other.batch_size

        def joined(pair: tuple[mx.array | None, mx.array | None]) -> mx.array | None:
            known = next((a for a in pair if a is not None), None)
            if known is None:
                return None
            return mx.concatenate(
                [
                    mx.zeros((size, *known.shape[1:]), known.dtype) if a is None else a
                    for a, size in zip(pair, sizes, strict=True)
                ]
            )

        mine, theirs = (*self.cache, *self._paddings), (*other.cache, *other._paddings)
        pairs = zip(mine, theirs, strict=True)
        *self.cache, self.left_padding, self.lengths = map(joined, pairs)

    def extract(self, row: int) -> "ArraysCache":
        """One row as a cache of its own."""
        cache = ArraysCache(len(self.cache))
        cache.cache = [None if a is None else a[row : row + 1] for a in self.cache]
        return cache

    @staticmethod
    def merge(caches: Sequence[Any]) -> "ArraysCache":
        """One batch of several sequences."""
        batch = ArraysCache(len(caches[0].cache), [0] * len(caches))
        if all(cache.empty() for cache in caches):
            return batch
        batch.left_padding = None
        for index in range(len(batch.cache)):
            states = [cache[index] for cache in caches]
            known = next((a for a in states if a is not None), None)
            if known is not None:
                batch[index] = mx.concatenate(
                    [mx.zeros_like(known) if a is None else a for a in states]
                )
        return batch

    @property
    def _paddings(self) -> tuple[mx.array | None, mx.array | None]:
        return self.left_padding, self.lengths

    def empty(self) -> bool:
        """Whether nothing was ever read."""
        return self.pending is None and self._states[0] is None

    @property
    def nbytes(self) -> int:
        """Memory of the states, of all points that the last pass can be taken back to."""
        arrays = self._states if self.pending is None else self.pending.arrays
        return sum(a.nbytes for a in arrays if a is not None)
