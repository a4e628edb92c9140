"""The cache of a sequence or batch: one entry per layer, and cheap snapshots.

Full attention layers have keys and values, linear ones `[conv_state, recurrent_state]`, of shapes
`[B, kernel - 1, channels]` and `[B, Hv, Dv, Dk]`. mlx-lm's own entries work too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..config import FULL, ModelConfig
from ..errors import Qwen35Error
from ..kernels.matrix import MAX_ROWS
from .layer_cache import ArraysCache, KVCache, RowsKVCache

__all__ = ["ArraysCache", "KVCache"]
CacheEntry = KVCache | ArraysCache


def make_cache(config: ModelConfig) -> list[CacheEntry]:
    """An empty cache."""
    bits = config.kv_bits
    return [KVCache(bits) if t == FULL else ArraysCache(size=2) for t in config.layer_types]


def padded_cache(config: ModelConfig, left_padding: Sequence[int]) -> list[Any]:
    """An empty cache of mlx-lm, for rows with `left_padding` pad tokens at their start."""
    # Imported here because it takes long.
    from mlx_lm.models.cache import ArraysCache, BatchKVCache

    padding = [int(n) for n in left_padding]
    if not padding or min(padding) < 0:
        raise Qwen35Error("left_padding is not usable", got=padding, expected="numbers >= 0")
    kinds = config.layer_types
    return [BatchKVCache(padding) if kind == FULL else ArraysCache(2, padding) for kind in kinds]


def check_keeping(cache: Sequence[Any] | None, batch: int, num_tokens: int) -> None:
    """Raise if a pass of this size over this cache could not be rewound token by token."""
    if batch != 1 or not 1 <= num_tokens <= MAX_ROWS:
        raise Qwen35Error(
            "keep_states is for a few tokens of one sequence",
            got=f"{batch} rows of {num_tokens} tokens",
            expected=f"1 row of 1 to {MAX_ROWS} tokens",
        )
    for entry in cache or [None]:
        if not isinstance(entry, KVCache | ArraysCache):
            raise Qwen35Error(
                "keep_states needs a cache that can take tokens back",
                got="no cache" if entry is None else f"{type(entry).__module__}'s",
                expected="one sequence in the cache of model.make_cache()",
            )


def accept(cache: Sequence[Any], num_tokens: int) -> None:
    """Keep the first tokens, from none to all, of the last pass, which had `keep_states`.

    The cache is then bit-equal to one that has read only these, one by one. Accessing the states
    of the cache after the pass accepts all tokens.
    """
    kept = {getattr(entry, "num_kept", 0) for entry in cache}
    if len(kept) != 1 or 0 in kept:
        raise Qwen35Error(
            "the last pass cannot be taken back",
            hint="read it with keep_states=True, and accept tokens once, before anything else",
        )
    if not 0 <= num_tokens <= max(kept):
        raise Qwen35Error(
            "cannot accept so many tokens", got=num_tokens, expected=f"0 to {max(kept)}"
        )
    if handle := _handle(cache):
        handle.tell("accept", num_tokens=num_tokens)
    for entry in cache:
        entry.accept(num_tokens)


def holds_keys(entry: Any) -> bool:
    """Whether this is the cache of a full attention layer, ours or mlx-lm's."""
    return hasattr(entry, "keys")


@dataclass(eq=False)
class Snapshot:
    """A state to go back to: KV entries as an offset, recurrent ones by reference."""

    num_tokens: int
    entries: tuple[int | tuple[mx.array, ...], ...]
    # The position of the next token minus `num_tokens`.
    rope_delta: int = 0
    # Hidden states of the last tokens, which the MTP layer has not read; see MTPState.
    mtp_hidden: mx.array | None = None
    # The tick of its last use; see PrefixStore.
    last_used: int = 0
    # With several processes: its number in all of them; see `model.ring`.
    handle: Any = None

    @property
    def nbytes(self) -> int:
        """Memory that it keeps alive, without keys and values: 192 MB in the 397B model."""
        arrays = (a for kept in self.entries if not isinstance(kept, int) for a in kept)
        return sum(a.nbytes for a in arrays if a is not None)


def snapshot(cache: Sequence[Any], num_tokens: int, rope_delta: int = 0) -> Snapshot:
    """A snapshot of an unbatched cache that has read `num_tokens`; copies nothing.

    Recurrent arrays are replaced, never written in place, so a reference is enough.
    """
    point = Snapshot(
        num_tokens, tuple(c.offset if holds_keys(c) else tuple(c.cache) for c in cache), rope_delta
    )
    if handle := _handle(cache):
        point.handle = handle.make("snapshot", num_tokens=num_tokens)
    return point


def restore(cache: Sequence[Any], point: Snapshot) -> None:
    """Rewind a cache to its snapshot `point`; later tokens are dropped."""
    if handle := _handle(cache):
        handle.tell("restore", point=point.handle.number)
    for entry, kept in zip(cache, point.entries, strict=True):
        if isinstance(kept, int):
            entry.trim(entry.offset - kept)
        else:
            entry.cache = list(kept)


def fork(cache: Sequence[Any], point: Snapshot) -> list[CacheEntry]:
    """A second cache at `point`; the first stays usable."""
    forked: list[Any] = []
    for entry, kept in zip(cache, point.entries, strict=True):
        if isinstance(kept, int):
            own = isinstance(entry, KVCache)
            known = entry if own else KVCache.from_state((entry.keys, entry.values, entry.offset))
            forked.append(known.fork(kept))
        else:
            forked.append(ArraysCache(size=len(kept)))
            forked[-1].cache = list(kept)
    # A lazy array belongs to the thread that made it.
    mx.eval([entry.state for entry in forked])
    if handle := _handle(cache):
        forked[0].handle = handle.make("fork", point=point.handle.number)
    return forked


def join(rows: Sequence[Sequence[Any]]) -> list[Any]:
    """Join caches of single sequences as rows of one cache, for passes of one token per row.

    Recurrent states are stacked; keys and values stay with their row.
    """
    joined: list[Any] = [
        RowsKVCache(layer) if holds_keys(layer[0]) else ArraysCache.stacked(layer)
        for layer in zip(*rows, strict=True)
    ]
    if handle := _handle(rows[0]):
        joined[0].handle = handle.make("join", rows=[row[0].handle.number for row in rows])
    return joined


def part(joined: Sequence[Any], rows: Sequence[Sequence[Any]]) -> None:
    """Write the states of a joined cache back to the caches of its rows."""
    if handle := _handle(joined):
        handle.tell("part", rows=[row[0].handle.number for row in rows])
    for place, row in enumerate(rows):
        for mine, theirs in zip(joined, row, strict=True):
            if isinstance(theirs, ArraysCache):
                # A copy, because a view would keep the states of all rows alive.
                states = (mx.contiguous(a[place : place + 1]) for a in mine.cache)
                theirs.cache = list(states)


def _handle(cache: Sequence[Any]) -> Any:
    """The handle by which other processes follow this cache; None in a single process."""
    return getattr(cache[0], "handle", None) if cache else None


def kv_bytes(cache: Sequence[Any]) -> int:
    """Memory of keys and values, with their unused capacity."""
    arrays = (a for c in cache if holds_keys(c) for a in (c.keys, c.values))
    return sum(a.nbytes for a in arrays if a is not None)


def cached_tokens(cache: Sequence[Any]) -> int:
    """Number of tokens that an unbatched cache has read; 0 if no layer counts them."""
    offsets = (c.offset for c in cache if holds_keys(c))
    return max((n for n in offsets if isinstance(n, int)), default=0)
