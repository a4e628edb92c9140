"""Passes whose last tokens are taken back, against reading the accepted tokens one by one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from qwen35_mlx.engine.prompt_cache import PromptCache
from qwen35_mlx.engine.segments import Segments
from qwen35_mlx.model.cache import accept, holds_keys

Ids = Sequence[int]


def bits(array: mx.array) -> bytes:
    """As they are in memory."""
    return np.array(mx.contiguous(array).view(mx.uint8)).tobytes()


def held(cache: PromptCache) -> list[bytes]:
    """Every bit that the layers have of the tokens that were read."""
    arrays: list[mx.array] = []
    for entry in cache.entries:
        if holds_keys(entry):
            assert entry.offset == len(cache.ids)
            arrays += entry.rows(0, entry.offset).values()
        else:
            arrays += entry.cache
    return [bits(a) for a in arrays]


def step(cache: PromptCache, token: int) -> bytes:
    """Logits of one more token."""
    hidden = cache.step(mx.array([token]))
    cache.commit(token)
    return bits(cache.model.head(hidden))


def one_by_one(model: Any, prompt: Ids, tokens: Ids) -> tuple[PromptCache, list[bytes]]:
    """A cache that has read a prompt and then token after token, and the tokens' logits."""
    cache = PromptCache(model)
    if prompt:
        cache.read(prompt)
    return cache, [step(cache, token) for token in tokens]


def kept_pass(cache: PromptCache, tokens: Ids, accepted: int) -> tuple[PromptCache, list[bytes]]:
    """Read `tokens` in one pass and take back all but the first; the logits of all of them."""
    hidden = cache.model.trunk(mx.array([tokens]), cache.entries, keep_states=True)
    logits = cache.model.head(hidden)
    rows = [bits(logits[:, t : t + 1]) for t in range(len(tokens))]
    accept(cache.entries, accepted)
    return PromptCache(cache.model, [*cache.ids, *tokens[:accepted]], cache.entries), rows


def differences(model: Any, prompt: Ids, tokens: Ids, accepted: int) -> int:
    """Rows of logits, keys, values and states that are other bits than those of single steps."""
    _, want_rows = one_by_one(model, prompt, tokens)
    want, _ = one_by_one(model, prompt, tokens[:accepted])
    got, rows = kept_pass(one_by_one(model, prompt, ())[0], tokens, accepted)
    pairs = [*zip(rows, want_rows, strict=True), *zip(held(got), held(want), strict=True)]
    return sum(a != b for a, b in pairs)


def plain_steps(cache: PromptCache, folder: Path) -> list[bytes]:
    return [*(step(cache, token) for token in (5, 3, 9)), *held(cache)]


def more_kept_passes(cache: PromptCache, folder: Path) -> list[bytes]:
    """With some of the tokens accepted, none, or all."""
    results = []
    for tokens, accepted in (([4, 8, 15, 16, 23], 2), ([42, 1, 2], 0), ([7, 7], 2), ([11], 1)):
        cache, rows = kept_pass(cache, tokens, accepted)
        results += rows
    return [*results, step(cache, 12), *held(cache)]


def a_prefill(cache: PromptCache, folder: Path) -> list[bytes]:
    hidden = cache.read([(7 * n) % 43 for n in range(70)])
    assert hidden is not None
    return [bits(hidden), *held(cache), step(cache, 3)]


def a_short_piece(cache: PromptCache, folder: Path) -> list[bytes]:
    hidden = cache.read([6, 2, 8])
    assert hidden is not None
    return [bits(hidden), *held(cache)]


def a_snapshot_and_the_way_back(cache: PromptCache, folder: Path) -> list[bytes]:
    end = len(cache.ids)
    cache.snapshot()
    step(cache, 3)
    later, _ = kept_pass(cache, [4, 8, 15], 1)
    later.snapshots = cache.snapshots
    assert later.rewind(end) == end
    return [*held(later), step(later, 9)]


def a_fork(cache: PromptCache, folder: Path) -> list[bytes]:
    fork = cache.fork(len(cache.ids))
    results = [step(fork, 3), *held(fork)]
    return [*results, step(cache, 4), *held(cache)]


def a_session(cache: PromptCache, folder: Path) -> list[bytes]:
    disk = Segments(folder, cache.model)
    for _ in disk.write(cache, len(cache.ids)):
        pass
    loaded = Segments(folder, cache.model).read(cache.ids)
    assert loaded is not None and len(loaded.ids) == len(cache.ids)
    return [*held(loaded), step(loaded, 9), step(cache, 2)]


# What may come after a pass of which tokens were taken back.
CONTINUATIONS = (
    plain_steps,
    more_kept_passes,
    a_prefill,
    a_short_piece,
    a_snapshot_and_the_way_back,
    a_fork,
    a_session,
)
