"""The cache of one sequence or batch: mlx-lm's classes, one entry a layer, and cheap snapshots.

Full attention layers hold keys and values, linear ones `[conv_state, recurrent_state]`, of
shapes `[B, kernel - 1, channels]` and `[B, Hv, Dv, Dk]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, BatchKVCache, KVCache

from .config import FULL, ModelConfig
from .errors import Qwen35Error

CacheEntry = KVCache | BatchKVCache | ArraysCache


def make_cache(config: ModelConfig, left_padding: Sequence[int] | None = None) -> list[CacheEntry]:
    """An empty cache; `left_padding` gives each row's number of pad tokens at its start."""
    if left_padding is None:
        return [KVCache() if t == FULL else ArraysCache(size=2) for t in config.layer_types]
    padding = [int(n) for n in left_padding]
    if not padding or min(padding) < 0:
        raise Qwen35Error("left_padding is not usable", got=padding, expected="numbers >= 0")
    return [
        BatchKVCache(padding) if t == FULL else ArraysCache(size=2, left_padding=padding)
        for t in config.layer_types
    ]


@dataclass(frozen=True)
class Snapshot:
    """A point to come back to: KV entries as an offset, recurrent ones by reference."""

    num_tokens: int
    entries: tuple[int | tuple[mx.array, ...], ...]


def snapshot(cache: Sequence[Any], num_tokens: int) -> Snapshot:
    """Remember an unbatched cache that has read `num_tokens`; copies nothing.

    The recurrent arrays are replaced, never written in place, so keeping a reference is a copy.
    """
    return Snapshot(
        num_tokens,
        tuple(c.offset if isinstance(c, KVCache) else tuple(c.cache) for c in cache),
    )


def restore(cache: Sequence[Any], point: Snapshot) -> None:
    """Bring the cache of which `point` was taken back to it; later tokens are forgotten."""
    for entry, kept in zip(cache, point.entries, strict=True):
        if isinstance(kept, int):
            entry.trim(entry.offset - kept)
        else:
            entry.cache = list(kept)


def cached_tokens(cache: Sequence[Any]) -> int:
    """How many tokens an unbatched cache has read; 0 where no layer counts them."""
    return max((c.offset for c in cache if isinstance(c, KVCache)), default=0)
