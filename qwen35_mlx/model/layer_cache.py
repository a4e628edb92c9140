"""The cache of a full-attention layer, in mlx-lm's protocol: keys and values.

B batch, H key/value heads, S cached tokens, T new tokens, D head dim. mlx-lm's generators, its
batches and its cache files find the names, attributes and states of its own classes here.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, cast

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
from ..memory import kv_capacity

# Of what is quantized, as `mx.quantize` gives them.
PARTS = ("weight", "scales", "biases")


class LayerCache:
    """What the caches of all layers have in common."""

    # Everything that has to be evaluated, moved or stored; set it to restore the cache.
    state: Any
    # Tokens of the last pass that `accept` may take back.
    num_kept = 0
    # Of the first layer's, where other processes have a part of the cache; see `model.ring`.
    handle: Any = None

    @classmethod
    def from_state(cls, state: Any) -> Self:
        """A cache that continues at `state`."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    def is_trimmable(self) -> bool:
        """Whether `trim` can forget the last tokens."""
        return False

    def size(self) -> int:
        """How many tokens are held; 0 where that is not known."""
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
    """`buffer`, grown where it has no room, with `new` behind its first `used` tokens."""
    if isinstance(new, Packed):
        buffers = [None] * len(new.parts) if buffer is None else buffer.parts
        pairs = zip(buffers, new.parts, strict=True)
        return new._replace(parts=[written(old, used, part) for old, part in pairs])
    buffer = grown(buffer, used, new)
    buffer[..., used : used + new.shape[2], :] = new
    return buffer


class KeysAndValues(LayerCache):
    """Buffers `[B, H, room, D]` that grow; which part is in use, the subclasses know."""

    keys: Any = None
    values: Any = None

    def _append(self, keys: Heads, values: Heads, start: int) -> tuple[Any, Any]:
        """Write `[B, H, T, D]` behind the first `start` tokens; returns all up to there."""
        self.keys = written(self.keys, start, keys)
        self.values = written(self.values, start, values)
        end = start + keys.shape[2]
        return first_keys(self.keys, end), first_keys(self.values, end)

    def is_trimmable(self) -> bool:
        return True

    def empty(self) -> bool:
        """Whether nothing was ever read."""
        return self.keys is None

    @property
    def nbytes(self) -> int:
        """Memory of keys and values, with their room to grow."""
        return sum(a.nbytes for a in (self.keys, self.values) if a is not None)


class KVCache(KeysAndValues):
    """Keys and values of one sequence, or of rows of equal length; `bits` of each if quantized."""

    bits: tuple[int, int] | None = None

    def __init__(self, bits: tuple[int, int] | None = None) -> None:
        self.offset, self.bits = 0, bits

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append `[B, H, T, D]`; returns all keys and values, `[B, H, S + T, D]`."""
        k: Heads = keys
        v: Heads = values
        if self.bits:
            k, v = packed(keys, self.bits[0]), packed(values, self.bits[1])
        held = self._append(k, v, self.offset)
        self.num_kept = keys.shape[2]
        self.offset += self.num_kept
        return held

    def rows(self, start: int, stop: int) -> dict[str, mx.array]:
        """Views of keys and values of these tokens, by name; of what is quantized, of its parts."""
        arrays: dict[str, mx.array] = {}
        for name, heads in (("keys", self.keys), ("values", self.values)):
            if isinstance(heads, Packed):
                arrays |= {f"{name}.{k}": a for k, a in zip(PARTS, heads.parts, strict=True)}
            elif heads is not None:
                arrays[name] = heads
        return {name: array[..., start:stop, :] for name, array in arrays.items()}

    def append_rows(self, rows: Mapping[str, mx.array]) -> None:
        """Append what `rows` gives, of a cache with the same bits."""
        k, v = (self._of_rows(rows, name, i) for i, name in enumerate(("keys", "values")))
        self._append(k, v, self.offset)
        self.offset += k.shape[2]
        self.num_kept = 0

    def _of_rows(self, rows: Mapping[str, mx.array], name: str, place: int) -> Heads:
        if self.bits is None:
            return rows[name]
        parts = [rows[f"{name}.{part}"] for part in PARTS]
        return Packed(parts, self.bits[place], PACKED_GROUP_SIZE)

    def fork(self, num_tokens: int) -> "KVCache":
        """A cache of the first tokens; of the two, the one that goes on first copies them."""
        other = KVCache(self.bits)
        if num_tokens:
            # Few tokens are copied: they would keep the memory of all.
            shares = 2 * num_tokens >= self.keys.shape[2]
            other.keys, other.values = (
                # Another object of the same memory: one object would be written to by both.
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
        """Forget the last tokens; returns how many."""
        num_tokens = min(self.offset, num_tokens)
        self.offset -= num_tokens
        self.num_kept = 0
        return num_tokens

    def make_mask(
        self, num_tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """What T new tokens may see, as MLX's attention takes it."""
        if return_array or window_size is not None:
            return causal_mask(num_tokens, self.offset, window_size=window_size)
        return None if num_tokens == 1 else "causal"

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Any:
        """For mlx-lm's option kv_bits: its own cache that quantizes what it holds."""
        if self.bits:
            return self
        # Never reached from this program; whoever calls it has mlx-lm.
        from mlx_lm.models.cache import KVCache as Theirs

        return Theirs.from_state(self.state).to_quantized(group_size, bits)

    def size(self) -> int:
        return self.offset

    @staticmethod
    def merge(caches: Sequence[Any]) -> "BatchKVCache":
        """One batch of several sequences, padded at their start."""
        longest = max(c.offset for c in caches)
        batch = BatchKVCache([longest - c.offset for c in caches])
        if longest:
            batch.keys, batch.values = (
                in_line([(unpacked(getattr(c, name)), 1, c.offset) for c in caches], longest)
                for name in ("keys", "values")
            )
            batch.offset = batch.offset + longest
            batch._idx = longest
        return batch


def in_line(parts: Sequence[tuple[mx.array | None, int, int]], end: int) -> mx.array:
    """Stack buffers so that all end at `end`; parts: buffer, number of rows, tokens used."""
    known = next(buffer for buffer, _, _ in parts if buffer is not None)
    heads, dim, dtype = known.shape[1], known.shape[3], known.dtype
    stacked = []
    for buffer, rows, used in parts:
        padding = mx.zeros((rows, heads, end - used, dim), dtype)
        if buffer is not None and used:
            padding = mx.concatenate([padding, buffer[..., :used, :]], axis=2)
        stacked.append(padding)
    return mx.concatenate(stacked)


def causal_mask(
    num_tokens: int,
    offset: int,
    *,
    left_padding: mx.array | None = None,
    window_size: int | None = None,
    **unused: Any,
) -> mx.array:
    """True where a query may look: `[T, S + T]`, or `[B, 1, T, S + T]` with paddings `[B]`."""
    keys = mx.arange(offset + num_tokens)
    queries = mx.arange(offset, offset + num_tokens)[:, None]
    mask = keys <= queries
    if window_size is not None:
        mask = mask & (queries < keys + window_size)
    if left_padding is not None:
        mask = mask & (keys >= left_padding.reshape(-1, 1, 1, 1))
    return mask


class BatchKVCache(KeysAndValues):
    """Keys and values of rows of different lengths: padded at their start, ends in line.

    `offset` `[B]` counts each row's own tokens, negative while only padding was read; `_idx` is
    the common end in the buffers. Both, and `left_padding`, have mlx-lm's names.
    """

    _right_padding: mx.array | None = None

    def __init__(self, left_padding: Iterable[int]) -> None:
        padding = list(left_padding)
        self.left_padding = mx.array(padding)
        self.offset = mx.array([-n for n in padding])
        self._idx = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append `[B, H, T, D]`; returns all keys and values, `[B, H, S + T, D]`."""
        held = self._append(keys, values, self._idx)
        self._idx += keys.shape[2]
        self.offset = self.offset + keys.shape[2]
        return held

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce padding at the start of the next tokens or, until `finalize`, at their end."""
        if left_padding is not None:
            if self.keys is not None:
                raise ValueError("left padding needs a cache that has read nothing")
            padding = mx.array(list(left_padding))
            self.left_padding = self.left_padding + padding
            self.offset = self.offset - padding
        if right_padding is not None and max(right_padding) > 0:
            self._right_padding = mx.array(list(right_padding))

    def finalize(self) -> None:
        """Turn the padding at the rows' ends into padding at their starts."""
        if (padding := self._right_padding) is None:
            return
        self._right_padding = None
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (self._rolled(a, padding) for a in (self.keys, self.values))
        self.offset = self.offset - padding
        self.left_padding = self.left_padding + padding

    def _rolled(self, buffer: mx.array, shifts: mx.array) -> mx.array:
        """Each row moved towards its end by its own shift; what falls off the end comes first."""
        used = buffer[..., : self._idx, :]
        sources = (mx.arange(self._idx) - shifts[:, None]) % self._idx
        return mx.take_along_axis(used, sources[:, None, :, None], axis=2)

    @property
    def state(self) -> tuple[Any, ...]:
        return self.keys, self.values, self.offset, self.left_padding, self._idx

    @state.setter
    def state(self, value: Any) -> None:
        self.keys, self.values, self.offset, self.left_padding, self._idx = value

    def trim(self, num_tokens: int) -> int:
        """Forget the last tokens of every row; returns how many."""
        num_tokens = min(self._idx, num_tokens)
        self._idx -= num_tokens
        self.offset = self.offset - num_tokens
        return num_tokens

    def make_mask(self, num_tokens: int, return_array: bool = False, **options: Any) -> mx.array:
        """What T new tokens of each row may see, `[B, 1, T, S + T]`."""
        return causal_mask(num_tokens, self._idx, left_padding=self.left_padding, **options)

    def filter(self, rows: Any) -> None:
        """Keep these rows only, and no more padding than they need."""
        self.offset, self.left_padding = self.offset[rows], self.left_padding[rows]
        spare = min(cast(list[int], self.left_padding.tolist()), default=0)
        if self.keys is not None and self.values is not None:
            self.keys = self.keys[rows][..., spare:, :]
            self.values = self.values[rows][..., spare:, :]
            self._idx -= spare
            self.left_padding = self.left_padding - spare

    def extend(self, other: "BatchKVCache") -> None:
        """Append the rows of another batch."""
        end = max(self._idx, other._idx)
        if end:
            self.keys, self.values = (
                in_line([(getattr(c, name), c.offset.size, c._idx) for c in (self, other)], end)
                for name in ("keys", "values")
            )
        padding = [c.left_padding + (end - c._idx) for c in (self, other)]
        self.left_padding = mx.concatenate(padding)
        self.offset = mx.concatenate([self.offset, other.offset])
        self._idx = end

    def extract(self, row: int) -> KVCache:
        """One row as a cache of its own."""
        cache = KVCache()
        if self.keys is not None and self.values is not None:
            start = int(cast(int, self.left_padding[row].item()))
            cache.keys, cache.values = (
                mx.contiguous(a[row : row + 1, :, start : self._idx])
                for a in (self.keys, self.values)
            )
            cache.offset = self._idx - start
        return cache

    merge = KVCache.merge

    def size(self) -> int:
        return self._idx


class RowsKVCache(LayerCache):
    """Sequences with keys and values of their own, of which a pass reads one token each.

    Attention takes the rows one by one; nothing is padded or copied.
    """

    def __init__(self, rows: Sequence[KVCache]) -> None:
        self.rows = list(rows)

    @property
    def offset(self) -> mx.array:
        """How many tokens each row has read, `[B]`."""
        return mx.array([row.offset for row in self.rows])

    @property
    def state(self) -> list[Any]:
        return [row.state for row in self.rows]

    def make_mask(self, num_tokens: int, **unused: Any) -> None:
        """One token of each row sees all of its own."""
        assert num_tokens == 1
