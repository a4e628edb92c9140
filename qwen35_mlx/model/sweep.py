"""A prompt through the model layer by layer, so that each expert is read from disk once a layer.

T tokens, H hidden.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx

from .attention import attention_mask
from .cache import holds_keys
from .feed_forward import SparseMoE
from .language import Trunk
from .rope import RopeDelta

# What `Snapshot` keeps of each layer.
Kept = list[int | tuple[mx.array, ...]]


def read_by_layer(
    trunk: Trunk,
    x: mx.array,
    cache: Sequence[Any],
    ends: Sequence[int],
    marks: Collection[int],
    positions: mx.array | None = None,
    rope_delta: RopeDelta = 0,
    last_only: bool = False,
    on_layer: Callable[[float], None] = lambda share: None,
) -> tuple[mx.array, dict[int, Kept]]:
    """Embeddings `[1, T, H]` of new tokens -> hidden states, as the trunk gives them; see there.

    Attention takes pieces that end at `ends`, so that all numbers are those of these pieces one
    after the other. Also what the cache of each layer was at those ends that are marks. `on_layer`
    gets the share of the layers that are done.
    """
    spans = list(pairwise([0, *ends]))
    pieces = [x[:, start:end] for start, end in spans]
    points: dict[int, Kept] = {end: [] for end in ends if end in marks}
    for done, (layer, entry) in enumerate(zip(trunk.layers, cache, strict=True), 1):
        is_last = last_only and layer is trunk.layers[-1]
        for i, (start, end) in enumerate(spans):
            piece, tables = pieces[i], None
            if layer.is_linear:
                mask = entry.make_mask(end - start)
            else:
                mask = attention_mask(end - start, entry)
                at = None if positions is None else positions[..., start:end]
                tables = layer.self_attn.rope_tables(piece, entry, at, rope_delta)
            piece = layer.attend(piece, mask, entry, tables, rope_delta)
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
        on_layer(done / len(trunk.layers))
    hidden = [trunk.norm(piece) for piece in pieces]
    return mx.concatenate(hidden, axis=1), points
