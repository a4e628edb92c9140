"""Prefill layer by layer, so that each layer reads each expert from disk only once.

T tokens, H hidden.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import mlx.core as mx

from .attention import attention_mask
from .cache import holds_keys
from .feed_forward import SparseMoE
from .language import Trunk
from .rope import RopeDelta

# The entries of a `Snapshot`.
Kept = list[int | tuple[mx.array, ...]]


class Sweep(NamedTuple):
    """Tokens that go through a layer together, in pieces that end at `ends`.

    `marks`: the ends at which to keep the state of the cache. `on_layer` is called with the share
    of layers that are done.
    """

    ends: Sequence[int]
    marks: Collection[int]
    on_layer: Callable[[float], None]


def piece_ends(start: int, cuts: Iterable[int], step_size: int) -> list[int]:
    """The ends of pieces of up to `step_size` tokens; every cut is an end too."""
    ends: list[int] = []
    for cut in cuts:
        ends += [*range(start + step_size, cut, step_size), *([cut] if cut > start else [])]
        start = cut
    return ends


def sweep_ends(start: int, ends: Sequence[int], most: int) -> list[int]:
    """The ends of sweeps: groups of whole pieces with up to `most` tokens."""
    found = []
    for before, end in pairwise([start, *ends]):
        if end - start > most and before > start:
            found.append(before)
            start = before
    return [*found, *ends[-1:]]


def read_by_layer(
    trunk: Trunk,
    x: mx.array,
    cache: Sequence[Any],
    sweep: Sweep,
    positions: mx.array | None = None,
    rope_delta: RopeDelta = 0,
    last_only: bool = False,
) -> tuple[mx.array, dict[int, Kept]]:
    """Embeddings `[1, T, H]` of new tokens -> hidden states as of `Trunk`; cache states at marks.

    The result is bit-equal to reading the pieces one after the other.
    """
    spans = list(pairwise([0, *sweep.ends]))
    pieces = [x[:, start:end] for start, end in spans]
    points: dict[int, Kept] = {end: [] for end in sweep.ends if end in sweep.marks}
    for done, (layer, entry) in enumerate(zip(trunk.layers, cache, strict=True), 1):
        is_last = last_only and layer is trunk.layers[-1]
        for i, (start, end) in enumerate(spans):
            piece, places = pieces[i], None
            if layer.is_linear:
                mask = entry.make_mask(end - start)
            else:
                mask = attention_mask(end - start, entry)
                at = None if positions is None else positions[..., start:end]
                places = layer.self_attn.places(piece, entry, at, rope_delta)
            piece = layer.attend(piece, mask, entry, places)
            pieces[i] = piece[:, -1:] if is_last else piece
            mx.eval(pieces[i], entry.state)
            if end in points:
                kept = entry.offset if holds_keys(entry) else tuple(entry.cache)
                points[end].append(kept)
        if is_last:
            del pieces[:-1]
        assert isinstance(layer.mlp, SparseMoE)
        pieces = layer.mlp.read(pieces, layer.post_attention_layernorm)
        mx.eval(pieces)
        sweep.on_layer(done / len(trunk.layers))
    hidden = [trunk.norm(piece) for piece in pieces]
    return mx.concatenate(hidden, axis=1), points
