"""One sequence: its token ids, the caches of all layers, and the points it can go back to.

The recurrent state of a linear layer cannot be trimmed, so a sequence goes back only to points
where a snapshot was made.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import mlx.core as mx

from ..errors import Qwen35Error
from ..media.tokens import MediaToken
from ..memory import POOL_TOKENS, PREFILL_STEP_SIZE
from ..model import cache as caches
from ..model.cache import CacheEntry, Snapshot
from ..model.language import Model
from ..model.rope import media_positions
from ..model.sweep import Kept, Sweep, piece_ends, read_by_layer, sweep_ends
from .features import FeatureStore
from .mtp_state import MTPState
from .piece_size import PieceSize

# Whoever stops a long prompt waits for a piece to end, and may lose it.
PIECE_SECONDS = 15.0
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
        self._entries: list[CacheEntry] = model.make_cache() if entries is None else entries
        # Where the model has an MTP layer: what that has read of the same tokens.
        layer = getattr(model, "mtp", None)
        self.mtp = None if layer is None else MTPState(model, layer)
        # Whether the layer reads along: what it misses makes drafts worse, and changes no text.
        self.feeds_mtp = False
        self.snapshots: dict[int, Snapshot] = {}
        # Who may continue this sequence; a weak reference, so that a forgotten chat holds nothing.
        self.owner: Callable[[], object] | None = None
        # Where the last answer begins, as far as later prompts show it otherwise.
        self.answer_start: int | None = None
        self._ids = list(ids)
        self._piece_size = PieceSize()
        # The position of the next token less the number of tokens: behind pictures it is below 0.
        self.rope_delta = rope_delta(self._ids)
        # False while layers may have read different numbers of tokens.
        self._is_consistent = True
        # While its recurrent states are those of a batch: its end is no point to go back to.
        self.in_batch = False
        # The hidden state `[1, T, H]` of the last `step`, and how many ids there were before it.
        self._pass: tuple[mx.array, int] | None = None

    @property
    def entries(self) -> list[CacheEntry]:
        """The caches of the layers, which have read `ids`."""
        self._end_pass()
        return self._entries

    @property
    def all_entries(self) -> list[CacheEntry]:
        """`entries`, and the cache of the MTP layer where the model has one."""
        return [*self.entries, self.mtp.cache] if self.mtp else self.entries

    @property
    def can_go_back(self) -> bool:
        """Whether tokens of a pass can be taken back: not in caches of mlx-lm."""
        own = all(isinstance(entry, caches.KVCache | caches.ArraysCache) for entry in self._entries)
        return own and isinstance(self.model, Model)

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
        every: Callable[[Model, mx.array], None] | None = None,
    ) -> mx.array | None:
        """Append `ids`, in pieces; take a snapshot when the length reaches a mark.

        A piece has at most `step_size` tokens, no more than 2,048, and no more than are read in
        15 seconds; with experts from disk many pieces go through a layer together. Returns the
        hidden state `[1, 1, H]` of the last token, or None if `should_stop()` was true before a
        piece, or between two layers. `every` gets the hidden states `[1, T, H]` of each piece.
        """
        start, end, marks = len(self._ids), len(self._ids) + len(ids), set(marks)
        cuts = sorted({m for m in marks if start < m <= end} | {end})
        ends = []
        if experts := getattr(self.model, "experts", None):
            ends = piece_ends(start, cuts, min(step_size or PREFILL_STEP_SIZE, PREFILL_STEP_SIZE))
            cuts = sweep_ends(start, ends, experts.sweep_tokens) or cuts
        hidden = None
        if progress:
            progress(0, len(ids))
        for cut in cuts:
            while (at := len(self._ids)) < cut:
                if should_stop and should_stop():
                    return None
                size = min(step_size or PREFILL_STEP_SIZE, self._piece_size.next(PIECE_SECONDS))
                sweep = None
                if experts:
                    size = cut - at
                    inside = [end - at for end in ends if at < end <= cut]
                    show = _of_layers(progress, at - start, size, len(ids), should_stop)
                    sweep = Sweep(inside, [mark - at for mark in marks], show)
                piece = list(ids[at - start : min(at + size, cut) - start])
                started = time.perf_counter()
                try:
                    hidden = self._read_piece(piece, every is None, sweep)
                except SweepStopped:
                    return None
                self._piece_size.record(len(piece), time.perf_counter() - started)
                if every:
                    every(self.model, hidden)
                    hidden = hidden[:, -1:]
                if progress:
                    progress(len(self._ids) - start, len(ids))
                if len(piece) >= PREFILL_STEP_SIZE:
                    # Its buffers are of a size that the next piece does not have.
                    mx.clear_cache()
            if cut in marks:
                self.snapshot()
        self.features.trim()
        return hidden

    def _read_piece(
        self, piece: list[int], last_only: bool, sweep: Sweep | None = None
    ) -> mx.array:
        if not self.can_go_back:
            return self._read_all(piece, last_only, sweep)
        before = self.end()
        try:
            return self._read_all(piece, last_only, sweep)
        except BaseException:
            # What the pieces before it have read stays.
            self._is_consistent = False
            self._return_to(before)
            del self._ids[before.num_tokens :]
            self.snapshots = {n: p for n, p in self.snapshots.items() if n <= before.num_tokens}
            self._is_consistent = True
            raise

    def _read_all(self, piece: list[int], last_only: bool, sweep: Sweep | None) -> mx.array:
        entries = self.entries
        self._is_consistent = False
        start, delta = len(self._ids), self.rope_delta
        feeds_mtp = bool(self.mtp and self.feeds_mtp)
        wants_last, last_only = last_only, last_only and not feeds_mtp
        positions = embeddings = None
        if shown := [token for token in piece if isinstance(token, MediaToken)]:
            # A piece may end inside a picture: positions count on from where that begins.
            numbers, following = media_positions(piece, start + delta)
            positions = mx.array(numbers)[:, None]
            delta = following - start - len(piece)
            embeddings = self.model.embed(piece, self.features.rows(shown))
        points: dict[int, Kept] = {}
        if sweep:
            trunk, x = self.model.language_model.model, embeddings
            x = self.model.embed(piece) if x is None else x
            hidden, points = read_by_layer(trunk, x, entries, sweep, positions, delta, last_only)
        else:
            given: dict[str, Any] = {"rope_delta": self.rope_delta} if self.rope_delta else {}
            if shown:
                given |= {"embeddings": embeddings, "positions": positions}
            ids = None if shown else mx.array([piece])
            hidden = self.model.trunk(ids, entries, last_only=last_only, **given)
        if self.mtp and self.feeds_mtp:
            self.mtp.read(hidden, piece, embeddings, positions, self._ids, self.rope_delta)
            hidden = hidden[:, -1:] if wants_last else hidden
        elif self.mtp:
            self.mtp.hidden = None
        mx.eval(hidden, self._held())
        self._ids += piece
        self.rope_delta = delta
        self._is_consistent = True
        for num_tokens, kept in points.items():
            at = start + num_tokens
            if at < len(self._ids):
                self.snapshots[at] = Snapshot(at, tuple(kept), rope_delta(self._ids[:at]))
                self.mark_used(at)
        return hidden

    def step(self, tokens: mx.array) -> mx.array:
        """Read tokens `[T]` that need not be evaluated; `commit` follows for those that stay.

        Of several, these may be the first ones; at least one stays. Returns the hidden state
        `[1, T, H]`, not evaluated.
        """
        entries = self.entries
        self._is_consistent = False
        # A pass of one token is as it would be if nothing could be taken back.
        given: dict[str, Any] = {"keep_states": True} if len(tokens) > 1 else {}
        if self.rope_delta:
            given["rope_delta"] = self.rope_delta
        hidden = self.model.trunk(tokens[None], entries, **given)
        self._pass = hidden, len(self._ids)
        return hidden

    def begin_pass(self) -> None:
        """Another object reads a token into the layer caches: until `commit` they do not agree."""
        self._end_pass()
        self._is_consistent = False

    def end_pass(self, hidden: mx.array) -> None:
        """That pass gave the hidden state `[1, 1, H]`; `commit` follows."""
        self._pass = hidden, len(self._ids)

    def commit(self, token: int) -> None:
        """The id of the next token that stays of those that the last `step` has read."""
        assert self._pass
        # One act, between two of which an interrupt may come.
        self._ids.append(token)
        self._is_consistent = True
        if len(self._ids) % POOL_TOKENS == 0:
            mx.clear_cache()

    @property
    def has_pass(self) -> bool:
        """Whether tokens of the last step may still be committed: nobody looked since then."""
        return self._pass is not None

    def _end_pass(self) -> None:
        """Forget the tokens of the last step that do not stay."""
        if not self._pass or not self._is_consistent:
            return
        (hidden, start), self._pass = self._pass, None
        num_committed = len(self._ids) - start
        if hidden.shape[1] > 1:
            # An interrupt may come when some layers have accepted them and others have not.
            self._is_consistent = False
            caches.accept(self._entries, num_committed)
            self._is_consistent = True
        if self.mtp and self.feeds_mtp:
            self.mtp.keep(hidden[:, :num_committed], self._ids, self.rope_delta)
        elif self.mtp:
            self.mtp.hidden = None

    def drafts(
        self, token: mx.array, num_drafts: int, draw: Callable[[mx.array, int], mx.array]
    ) -> list[mx.array]:
        """What the MTP layer expects behind `token`, the next one to read; see MTPState."""
        self._end_pass()
        if not self.mtp:
            return []
        return self.mtp.draft(token, num_drafts, self._ids, self.rope_delta, draw)

    def settle(self) -> None:
        """Evaluate the caches: a lazy array cannot be used by another thread."""
        mx.eval(self._held())

    def _held(self) -> list[Any]:
        states: list[Any] = [entry.state for entry in self.all_entries]
        return [*states, self.mtp.hidden] if self.mtp else states

    def snapshot(self) -> Snapshot:
        """Remember this point. It costs the recurrent state; keys and values cost an offset."""
        point = self.snapshots.get(len(self._ids)) or self.end()
        self.snapshots[point.num_tokens] = point
        self.mark_used(point.num_tokens)
        return point

    def end(self) -> Snapshot:
        """The point behind all ids, which is not remembered."""
        point = caches.snapshot(self.all_entries, len(self._ids), self.rope_delta)
        point.mtp_hidden = self.mtp.hidden if self.mtp else None
        return point

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
        self._end_pass()
        kept = self._point_before(num_tokens)
        # What was read and never committed goes too.
        self._pass = None
        if kept == 0:
            self._entries = self.model.make_cache()
            self.rope_delta = 0
            self.mtp = self.mtp and MTPState(self.model, self.mtp.layer)
        elif kept < len(self._ids) or not self._is_consistent:
            self._return_to(self.snapshots[kept])
        self.mark_used(kept)
        self._ids = self._ids[:kept]
        self.snapshots = {n: point for n, point in self.snapshots.items() if n <= kept}
        # A batch that was abandoned never gives its states back.
        self._is_consistent, self.in_batch = True, False
        return kept

    def _return_to(self, point: Snapshot) -> None:
        """Bring the layer caches to a point; the ids behind it are for the caller to drop."""
        caches.restore(self.all_entries, point)
        self.rope_delta = point.rope_delta
        if self.mtp:
            self.mtp.hidden = point.mtp_hidden

    def fork(self, num_tokens: int) -> "PromptCache":
        """A second cache that holds the first `num_tokens`, one of this one's points."""
        if num_tokens == 0:
            return PromptCache(self.model, features=self.features)
        # Without a snapshot there, it is the end.
        point = self.snapshots.get(num_tokens) or self.end()
        forked = caches.fork(self.all_entries, point)
        num_layers = len(self._entries)
        copy = PromptCache(self.model, self._ids[:num_tokens], forked[:num_layers], self.features)
        if copy.mtp:
            copy.mtp.cache, copy.mtp.hidden = cast(caches.KVCache, forked[-1]), point.mtp_hidden
        copy.snapshots = {n: s for n, s in self.snapshots.items() if n <= num_tokens}
        return copy

    def release(self) -> None:
        """End the owner's use; the end stays as a point that another owner may continue."""
        if self._is_consistent and self._ids:
            self.snapshot()
        self.owner = None

    def _point_before(self, num_tokens: int) -> int:
        """The last point at or before `num_tokens`; an empty cache is always one."""
        has_end = self._is_consistent and not self.in_batch
        points = (*self.snapshots, len(self._ids)) if has_end else self.snapshots
        return max((n for n in points if n <= num_tokens), default=0)


class SweepStopped(Exception):
    """What was read by some of the layers alone is forgotten."""


def _of_layers(
    progress: Progress | None,
    before: int,
    num_tokens: int,
    total: int,
    should_stop: Callable[[], bool] | None,
) -> Callable[[float], None]:
    """Shows the share of layers that these tokens went through as a share of the tokens."""

    def on_layer(share: float) -> None:
        if share < 1 and should_stop and should_stop():
            raise SweepStopped
        if progress:
            progress(before + int(share * num_tokens), total)

    return on_layer


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
