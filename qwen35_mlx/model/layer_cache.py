"""The caches of the layers, in mlx-lm's protocol: keys and values, or recurrent states.

B batch, H key/value heads, S cached tokens, T new tokens, D head dim. Names, attributes and states
are those of mlx-lm's classes, so its generators and cache files work with these. A batch for its
generators is one of its own classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import mlx.core as mx

from ..kernels.decode_attention import (
    PACKED_GROUP_SIZE,
    Heads,
    Packed,
    each,
    first_keys,
    packed,
    unpacked,
)
from ..kernels.delta_step import KeptStates, Tape
from ..memory import kv_capacity

# Arrays of a quantized tensor, as from `mx.quantize`.
PARTS = ("weight", "scales", "biases")


class LayerCache:
    """Base class of the caches of all layers."""

    # Everything that has to be evaluated, moved or stored; set it to restore the cache.
    state: Any
    # Tokens of the last pass that `accept` may drop.
    num_kept = 0
    # In the first layer's cache, if other processes have a part of it; see `model.ring`.
    handle: Any = None

    @classmethod
    def from_state(cls, state: Any) -> Self:
        """A cache that continues at `state`."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    def is_trimmable(self) -> bool:
        """Whether `trim` can drop the last tokens."""
        return False

    def size(self) -> int:
        """Number of cached tokens; 0 if it is not known."""
        return 0


def grown(buffer: mx.array | None, used: int, new: mx.array) -> mx.array:
    """A buffer `[B, H, >= used + T, D]` whose first `used` tokens are those of `buffer`."""
    batch, heads, num_tokens, dim = new.shape
    needed = used + num_tokens
    if buffer is not None and needed <= buffer.shape[2]:
        return buffer
    if buffer is None or used == 0:
        return mx.zeros((batch, heads, kv_capacity(needed), dim), new.dtype)
    room = mx.zeros((batch, heads, kv_capacity(needed) - used, dim), new.dtype)
    return mx.concatenate([buffer[..., :used, :], room], axis=2)


def written(buffer: Any, used: int, new: Any) -> Any:
    """`buffer`, grown if it is full, with `new` after its first `used` tokens."""
    if isinstance(new, Packed):
        buffers = [None] * len(new.parts) if buffer is None else buffer.parts
        pairs = zip(buffers, new.parts, strict=True)
        return new._replace(parts=[written(old, used, part) for old, part in pairs])
    buffer = grown(buffer, used, new)
    buffer[..., used : used + new.shape[2], :] = new
    return buffer


class KVCache(LayerCache):
    """Keys and values of one sequence, or of rows of equal length; `bits` if they are quantized."""

    # Buffers `[B, H, room, D]` that grow; the first `offset` tokens are in use.
    keys: Any = None
    values: Any = None
    bits: tuple[int, int] | None = None

    def __init__(self, bits: tuple[int, int] | None = None) -> None:
        self.offset, self.bits = 0, bits

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append `[B, H, T, D]`; returns all keys and values, `[B, H, S + T, D]`."""
        k: Heads = keys
        v: Heads = values
        if self.bits:
            k, v = packed(keys, self.bits[0]), packed(values, self.bits[1])
        self._append(k, v)
        self.num_kept = keys.shape[2]
        return first_keys(self.keys, self.offset), first_keys(self.values, self.offset)

    def _append(self, keys: Heads, values: Heads) -> None:
        """Append `[B, H, T, D]`."""
        self.keys = written(self.keys, self.offset, keys)
        self.values = written(self.values, self.offset, values)
        self.offset += keys.shape[2]
        self.num_kept = 0

    def rows(self, start: int, stop: int) -> dict[str, mx.array]:
        """Views of the keys and values of these tokens by name, or of their quantized arrays."""
        arrays: dict[str, mx.array] = {}
        for name, heads in (("keys", self.keys), ("values", self.values)):
            if isinstance(heads, Packed):
                arrays |= {f"{name}.{k}": a for k, a in zip(PARTS, heads.parts, strict=True)}
            elif heads is not None:
                arrays[name] = heads
        return {name: array[..., start:stop, :] for name, array in arrays.items()}

    def append_rows(self, rows: Mapping[str, mx.array]) -> None:
        """Append rows from `rows` of a cache with the same bits."""
        k, v = (self._of_rows(rows, name, i) for i, name in enumerate(("keys", "values")))
        self._append(k, v)

    def _of_rows(self, rows: Mapping[str, mx.array], name: str, place: int) -> Heads:
        if self.bits is None:
            return rows[name]
        parts = [rows[f"{name}.{part}"] for part in PARTS]
        return Packed(parts, self.bits[place], PACKED_GROUP_SIZE)

    def fork(self, num_tokens: int) -> "KVCache":
        """A cache of the first tokens, which shares memory until one of the two appends."""
        other = KVCache(self.bits)
        if num_tokens:
            # Copy a small part: a shared one would keep the whole buffer alive.
            shares = 2 * num_tokens >= self.keys.shape[2]
            other.keys, other.values = (
                # A new array object for the same memory: MLX copies it when one of them is written.
                each(heads, lambda a: a.astype(a.dtype))
                if shares
                else written(None, 0, first_keys(heads, num_tokens))
                for heads in (self.keys, self.values)
            )
            other.offset = num_tokens
        return other

    def accept(self, num_tokens: int) -> None:
        """Keep the first tokens of the last pass."""
        self.trim(self.num_kept - num_tokens)

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None, int]:
        return self.keys, self.values, self.offset

    @state.setter
    def state(self, value: Any) -> None:
        self.keys, self.values, self.offset = value
        if isinstance(self.keys, Packed):
            self.bits = self.keys.bits, self.values.bits

    def trim(self, num_tokens: int) -> int:
        """Drop the last tokens; returns their number."""
        num_tokens = min(self.offset, num_tokens)
        self.offset -= num_tokens
        self.num_kept = 0
        return num_tokens

    def make_mask(self, num_tokens: int, **unused: Any) -> str | None:
        """The mask for T new tokens, for MLX's attention."""
        return None if num_tokens == 1 else "causal"

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Any:
        """For mlx-lm's option kv_bits: its own quantized cache."""
        if self.bits:
            return self
        # Only mlx-lm calls this, so it is installed.
        from mlx_lm.models.cache import KVCache as Theirs

        return Theirs.from_state(self.state).to_quantized(group_size, bits)

    @staticmethod
    def merge(caches: Sequence[Any]) -> Any:
        """A batch of sequences for mlx-lm's generators: its own class, padded at the start."""
        from mlx_lm.models.cache import BatchKVCache
        from mlx_lm.models.cache import KVCache as Theirs

        states = ((unpacked(c.keys), unpacked(c.values), c.offset) for c in caches)
        return BatchKVCache.merge([Theirs.from_state(state) for state in states])

    def is_trimmable(self) -> bool:
        return True

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        """Whether the cache was never written."""
        return self.keys is None

    @property
    def nbytes(self) -> int:
        """Memory of keys and values, with their unused capacity."""
        return sum(a.nbytes for a in (self.keys, self.values) if a is not None)


class RowsKVCache(LayerCache):
    """Keys and values of several sequences, for passes of one token each.

    Attention runs row by row; nothing is padded or copied.
    """

    def __init__(self, rows: Sequence[KVCache]) -> None:
        self.rows = list(rows)

    @property
    def offset(self) -> mx.array:
        """Number of tokens in each row, `[B]`."""
        return mx.array([row.offset for row in self.rows])

    @property
    def state(self) -> list[Any]:
        return [row.state for row in self.rows]

    def make_mask(self, num_tokens: int, **unused: Any) -> None:
        """None: the token of each row sees its whole row."""
        assert num_tokens == 1


class ArraysCache(LayerCache):
    """The states of a recurrent layer; they are replaced, never written in place."""

    # A pass that can be rewound, instead of the states.
    pending: Tape | KeptStates | None = None

    def __init__(self, size: int) -> None:
        self.cache = [None] * size

    @property
    def cache(self) -> list[Any]:
        """The states. Reading them accepts the last pass as far as it was kept."""
        if self.pending is not None:
            self.cache = list(self.pending.states())
        return self._states

    @cache.setter
    def cache(self, states: list[Any]) -> None:
        self._states, self.pending, self.num_kept = states, None, 0

    def keep(self, pending: Tape | KeptStates) -> None:
        """Store a pass that can be rewound, as read."""
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
    def state(self) -> tuple[Any, ...]:
        # mlx-lm's batches have padding and lengths in the other places.
        return self.cache, None, None

    @state.setter
    def state(self, value: Any) -> None:
        self.cache = value[0]

    @classmethod
    def stacked(cls, caches: Sequence["ArraysCache"]) -> "ArraysCache":
        """The stacked states `[B, ...]` of several sequences, none of them empty."""
        batch = cls(len(caches[0].cache))
        columns = zip(*(each.cache for each in caches), strict=True)
        batch.cache = [mx.concatenate(list(states)) for states in columns]
        return batch

    def make_mask(self, num_tokens: int) -> None:
        """None: there is no padding."""

    def advance(self, num_tokens: int) -> None:
        """Nothing to do: only caches with padding count tokens."""

    @staticmethod
    def merge(caches: Sequence[Any]) -> Any:
        """A batch of sequences for mlx-lm's generators: its own class."""
        from mlx_lm.models.cache import ArraysCache as Theirs

        return Theirs.merge(caches)

    def empty(self) -> bool:
        """Whether the cache was never written."""
        return self.pending is None and self._states[0] is None

    @property
    def nbytes(self) -> int:
        """Memory of the states, or of everything needed to rewind the last pass."""
        arrays = self._states if self.pending is None else self.pending.arrays
        return sum(a.nbytes for a in arrays if a is not None)
