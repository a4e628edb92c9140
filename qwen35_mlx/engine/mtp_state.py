"""The MTP layer's cache of one sequence, and its drafts.

H hidden size, M pending tokens, which the layer has not read.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

from ..media.tokens import MediaToken
from ..model.cache import KVCache
from ..model.language import Model
from ..model.mtp import MTP

# Rows of a decode kernel; more pending tokens are read without waiting for the next draft.
MAX_WAITING = 8


class MTPState:
    """The layer's cache, and the hidden states of pending tokens.

    The layer reads a token's state together with the next token, so the last one is always
    pending. What it has read changes only the drafts, never the text: after a gap, drafts are worse
    for a while.
    """

    def __init__(self, model: Model, layer: MTP):
        self.model, self.layer = model, layer
        self.cache = KVCache(model.config.kv_bits)
        # `[1, M, H]`, of the last M tokens of the sequence; None if they are not known.
        self.hidden: mx.array | None = None

    def read(
        self,
        hidden: mx.array,
        piece: Sequence[int],
        embeddings: mx.array | None,
        positions: mx.array | None,
        ids: Sequence[int],
        rope_delta: int,
    ) -> None:
        """Read the states `[1, T, H]` of `piece`, which follows `ids`, except the last one.

        embeddings `[1, T, H]` and positions `[3, 1, T]` of the piece, if it has pictures.
        """
        # The position of a picture token does not follow from its index: it is left out.
        waiting = None if ids and isinstance(ids[-1], MediaToken) else self.hidden
        num_waiting = 0 if waiting is None else waiting.shape[1]
        first = len(ids) - num_waiting
        states, following = hidden[:, :-1], list(ids[first + 1 :]) + list(piece)
        if waiting is not None:
            states = mx.concatenate([waiting, states], axis=1)
        else:
            following = following[1:]
        if positions is not None:
            before = mx.arange(first, len(ids)) + rope_delta
            before = mx.broadcast_to(before, (3, 1, num_waiting)).astype(positions.dtype)
            positions = mx.concatenate([before, positions[..., :-1]], axis=-1)
        if embeddings is None:
            embedded = self.model.embed(following) if following else None
        else:
            of_text = self.model.embed(ids[first + 1 :]) if num_waiting > 1 else None
            parts = [of_text, embeddings if num_waiting else embeddings[:, 1:]]
            embedded = mx.concatenate([p for p in parts if p is not None], axis=1)
        if following and embedded is not None:
            self._read(states, embedded, first + rope_delta, positions)
        self.hidden = hidden[:, -1:]

    def _read(
        self, states: mx.array, embedded: mx.array, place: int, positions: mx.array | None
    ) -> None:
        delta = place - self.cache.offset
        self.layer.read(states, embedded, self.cache, positions=positions, rope_delta=delta)

    def keep(self, hidden: mx.array, ids: Sequence[int], rope_delta: int) -> None:
        """Add the states `[1, T, H]` of the last T of `ids` as pending."""
        if self.hidden is not None:
            hidden = mx.concatenate([self.hidden, hidden], axis=1)
        self.hidden = hidden
        if (num_waiting := hidden.shape[1]) > MAX_WAITING:
            first = len(ids) - num_waiting
            embedded = self.model.embed(ids[first + 1 :])
            self._read(hidden[:, :-1], embedded, first + rope_delta, None)
            self.hidden = hidden[:, -1:]

    def draft(
        self,
        token: mx.array,
        num_drafts: int,
        ids: Sequence[int],
        rope_delta: int,
        draw: Callable[[mx.array, int], mx.array],
    ) -> list[mx.array]:
        """Drafts, lazy tokens `[1]`, after `token` `[1]`, which follows `ids`.

        `draw(logits [1, V], place)` samples the token at this place of the sequence.
        """
        if self.hidden is None or (ids and isinstance(ids[-1], MediaToken)):
            return []
        num_waiting = self.hidden.shape[1]
        place = len(ids) - num_waiting + rope_delta
        known = ids[len(ids) - num_waiting + 1 :]
        following = mx.concatenate([mx.array(list(known), dtype=mx.int32), token.astype(mx.int32)])
        states, drafts = self.hidden, list[mx.array]()
        kept = self.cache.offset
        try:
            for number in range(num_drafts):
                embedded = self.model.language_model.model.embed_tokens(following[None])
                delta = place - self.cache.offset
                out = self.layer(states, embedded, self.cache, rope_delta=delta, last_only=True)
                drafts.append(draw(self.model.head(out)[0], len(ids) + 1 + number))
                place += states.shape[1]
                states, following = out, drafts[-1].astype(mx.int32)
            kept += num_waiting
            self.hidden = None
        finally:
            # Drop the entries of drafts: those of accepted tokens come from the trunk's states.
            # After an interrupt drop all new entries; the pending tokens are read again.
            self.cache.trim(self.cache.offset - kept)
        return drafts
