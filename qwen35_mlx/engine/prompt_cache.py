"""One sequence: its token ids, the caches of all layers, and the points it can go back to.

The recurrent state of a linear layer cannot be trimmed, so a sequence goes back only to points
where a snapshot was made.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx

from ..errors import Qwen35Error
from ..media.tokens import MediaToken
from ..memory import PREFILL_STEP_SIZE
from ..model.cache import CacheEntry, Snapshot, fork, restore, snapshot
from ..model.language import Model
from ..model.rope import media_positions
from .features import FeatureStore

# Tokens that a caller's own cache holds and whose ids are not given.
UNKNOWN_ID = -1
# Tokens read so far, tokens to read.
Progress = Callable[[int, int], None]
_clock = itertools.count(1)


class PromptCache:
    """Token ids and the layer caches that have read exactly these ids.

    No other code writes to either. Whenever a caller can look, both agree, or the cache knows
    that they do not (an interrupt in the middle of a step) and goes back to a snapshot.
    Ids of pictures are `MediaToken`s, each of them its own: another picture has other ids.
    """

    def __init__(
        self,
        model: Model,
        ids: Iterable[int] = (),
        entries: list[Any] | None = None,
        features: FeatureStore | None = None,
    ):
        """`entries` are layer caches that have read `ids`; empty ones if None."""
        self.model = model
        self.features = features or FeatureStore(model)
        self.entries: list[CacheEntry] = model.make_cache() if entries is None else entries
        self.snapshots: dict[int, Snapshot] = {}
        # Who may continue this sequence; a weak reference, so that a forgotten chat holds nothing.
        self.owner: Callable[[], object] | None = None
        self._ids = list(ids)
        # The position of the next token less the number of tokens: behind pictures it is below 0.
        self._rope_delta = rope_delta(self._ids)
        # False while layers may have read different numbers of tokens.
        self._is_consistent = True

    @property
    def ids(self) -> Sequence[int]:
        """The token ids that were read; do not change them."""
        return self._ids

    @property
    def in_use(self) -> bool:
        """Whether its owner may continue it at any time."""
        return self.owner is not None and self.owner() is not None

    def read(
        self,
        ids: Sequence[int],
        *,
        marks: Iterable[int] = (),
        step_size: int | None = None,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> mx.array | None:
        """Append `ids`, in pieces; take a snapshot when the length reaches a mark.

        A piece has at most `step_size` tokens, and no more than 2,048. Returns the hidden state
        `[1, 1, H]` of the last token, or None if `should_stop()` was true before a piece.
        """
        start, end, marks = len(self._ids), len(self._ids) + len(ids), set(marks)
        cuts = sorted({m for m in marks if start < m <= end} | {end})
        hidden = None
        if progress:
            progress(0, len(ids))
        for cut in cuts:
            while (at := len(self._ids)) < cut:
                if should_stop and should_stop():
                    return None
                size = min(step_size or PREFILL_STEP_SIZE, PREFILL_STEP_SIZE)
                piece = list(ids[at - start : min(at + size, cut) - start])
                hidden = self._read_piece(piece)
                if progress:
                    progress(len(self._ids) - start, len(ids))
                if len(piece) == PREFILL_STEP_SIZE:
                    # Its buffers are of a size that the next piece does not have.
                    mx.clear_cache()
            if cut in marks:
                self.snapshot()
        self.features.trim()
        return hidden

    def _read_piece(self, piece: list[int]) -> mx.array:
        self._is_consistent = False
        delta = self._rope_delta
        if shown := [token for token in piece if isinstance(token, MediaToken)]:
            # A piece may end inside a picture: positions count on from where that begins.
            positions, following = media_positions(piece, len(self._ids) + delta)
            delta = following - len(self._ids) - len(piece)
            hidden = self.model.trunk(
                None,
                self.entries,
                embeddings=self.model.embed(piece, self.features.rows(shown)),
                positions=mx.array(positions)[:, None],
                last_only=True,
            )
        else:
            ids = mx.array([piece])
            hidden = self.model.trunk(ids, self.entries, last_only=True, **self._behind_pictures())
        mx.eval(hidden, [entry.state for entry in self.entries])
        self._ids += piece
        self._rope_delta = delta
        self._is_consistent = True
        return hidden

    def _behind_pictures(self) -> dict[str, Any]:
        """What the trunk must know of them; text alone is read as if there were none."""
        return {"rope_delta": self._rope_delta} if self._rope_delta else {}

    def step(self, token: mx.array) -> mx.array:
        """Read a token `[1]` that is not evaluated yet; `commit` follows with its id.

        Returns the hidden state `[1, 1, H]`, not evaluated.
        """
        self._is_consistent = False
        return self.model.trunk(token[:, None], self.entries, **self._behind_pictures())

    def commit(self, token: int) -> None:
        """The id of the token that the last `step` has read."""
        self._ids.append(token)
        self._is_consistent = True

    def settle(self) -> None:
        """Evaluate the caches: a lazy array cannot be used by another thread."""
        mx.eval([entry.state for entry in self.entries])

    def snapshot(self) -> Snapshot:
        """Remember this point. It costs the recurrent state; keys and values cost an offset."""
        point = self.snapshots.get(len(self._ids)) or self._end()
        self.snapshots[point.num_tokens] = point
        self.mark_used(point.num_tokens)
        return point

    def _end(self) -> Snapshot:
        return snapshot(self.entries, len(self._ids), self._rope_delta)

    def mark_used(self, num_tokens: int) -> None:
        """Count the snapshot at `num_tokens`, if there is one, as used now."""
        if point := self.snapshots.get(num_tokens):
            point.last_used = next(_clock)

    def reusable_tokens(self, ids: Sequence[int]) -> int:
        """The length of the longest prefix of `ids` that this cache can go back to."""
        return self._point_before(common_prefix(self._ids, ids))

    @property
    def last_point(self) -> int:
        """The largest number of tokens that this cache can go back to."""
        return self._point_before(len(self._ids))

    def rewind(self, num_tokens: int) -> int:
        """Go back to the last point at or before `num_tokens`; returns how many are left."""
        if num_tokens < 0:
            raise Qwen35Error("cannot rewind", got=num_tokens, expected="0 tokens or more")
        kept = self._point_before(num_tokens)
        if kept == 0:
            self.entries = self.model.make_cache()
            self._rope_delta = 0
        elif kept < len(self._ids) or not self._is_consistent:
            restore(self.entries, self.snapshots[kept])
            self._rope_delta = self.snapshots[kept].rope_delta
        self.mark_used(kept)
        self._ids = self._ids[:kept]
        self.snapshots = {n: point for n, point in self.snapshots.items() if n <= kept}
        self._is_consistent = True
        return kept

    def fork(self, num_tokens: int) -> "PromptCache":
        """A second cache that holds the first `num_tokens`, one of this one's points."""
        if num_tokens == 0:
            return PromptCache(self.model, features=self.features)
        # Without a snapshot there, it is the end.
        point = self.snapshots.get(num_tokens) or self._end()
        ids, entries = self._ids[:num_tokens], fork(self.entries, point)
        copy = PromptCache(self.model, ids, entries, self.features)
        copy.snapshots = {n: s for n, s in self.snapshots.items() if n <= num_tokens}
        return copy

    def release(self) -> None:
        """End the owner's use; the end stays as a point that another owner may continue."""
        if self._is_consistent and self._ids:
            self.snapshot()
        self.owner = None

    def _point_before(self, num_tokens: int) -> int:
        """The last point at or before `num_tokens`; an empty cache is always one."""
        points = (*self.snapshots, len(self._ids)) if self._is_consistent else self.snapshots
        return max((n for n in points if n <= num_tokens), default=0)


def rope_delta(ids: Iterable[int]) -> int:
    """The position of the token behind `ids` less their number."""
    shown = [token for token in ids if isinstance(token, MediaToken)]
    return media_positions(shown, 0)[1] - len(shown)


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many ids, or characters, are equal at the beginning of two sequences."""
    # Slices compare at the speed of C; a conversation has a hundred thousand ids.
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
