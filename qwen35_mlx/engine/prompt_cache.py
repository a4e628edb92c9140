"""One sequence: its token ids, the caches of all layers, and its snapshots.

The recurrent state of a linear layer cannot be trimmed, so a sequence can only be rewound to a
point with a snapshot.
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

# Pieces are multiples of the delta rule's chunk.
PIECE_MULTIPLE = 64
# Stopping a long prefill waits for the end of a piece.
PIECE_SECONDS = 15.0
# Stands for tokens in a caller's own cache whose ids are not given.
UNKNOWN_ID = -1
# Tokens read so far, tokens to read.
Progress = Callable[[int, int], None]
_clock = itertools.count(1)


class PieceSize:
    """Measures the prefill speed, which falls as the context grows."""

    def __init__(self) -> None:
        self._tokens_per_second = 0.0

    def next(self, seconds: float, first: int = PREFILL_STEP_SIZE) -> int:
        """Number of tokens that take about `seconds`; `first` if no speed is known."""
        if not self._tokens_per_second:
            return first
        size = int(self._tokens_per_second * seconds) // PIECE_MULTIPLE * PIECE_MULTIPLE
        return min(max(size, PIECE_MULTIPLE), PREFILL_STEP_SIZE)

    def record(self, num_tokens: int, seconds: float) -> None:
        """Record the time of a piece."""
        if num_tokens >= PIECE_MULTIPLE:
            rate = num_tokens / max(seconds, 1e-9)
            known = self._tokens_per_second or rate
            self._tokens_per_second = 0.5 * known + 0.5 * rate


class PromptCache:
    """Token ids, and the layer caches that have read exactly these ids.

    No other code writes to either. Between calls they agree; after an interrupt in the middle of a
    step the cache knows that they do not, and goes back to a snapshot. Ids of pictures are
    `MediaToken`s, which differ between pictures.
    """

    def __init__(
        self,
        model: Model,
        ids: Iterable[int] = (),
        entries: list[Any] | None = None,
        features: FeatureStore | None = None,
    ):
        """`entries`: layer caches that have read `ids`; None: empty ones."""
        self.model = model
        self.features = features or FeatureStore(model)
        self._entries: list[CacheEntry] = model.make_cache() if entries is None else entries
        # The MTP layer's cache for the same tokens, if the model has that layer.
        layer = getattr(model, "mtp", None)
        self.mtp = None if layer is None else MTPState(model, layer)
        # Whether the MTP layer reads the same tokens. Tokens that it misses only make drafts worse.
        self.feeds_mtp = False
        self.snapshots: dict[int, Snapshot] = {}
        # The owner, who may continue this sequence; a weak reference, so forgotten chats are freed.
        self.owner: Callable[[], object] | None = None
        # Where the last answer begins, which later prompts render differently.
        self.answer_start: int | None = None
        self._ids = list(ids)
        self._piece_size = PieceSize()
        # The position of the next token minus the number of tokens; negative after pictures.
        self.rope_delta = rope_delta(self._ids)
        # False while layers may have read different numbers of tokens.
        self._is_consistent = True
        # True while a batch holds its recurrent states: then its end is no point to go back to.
        self.in_batch = False
        # The hidden state `[1, T, H]` of the last `step`, and the number of ids before it.
        self._pass: tuple[mx.array, int] | None = None

    @property
    def entries(self) -> list[CacheEntry]:
        """The caches of the layers, which hold `ids`."""
        self._end_pass()
        return self._entries

    @property
    def all_entries(self) -> list[CacheEntry]:
        """`entries`, and the cache of the MTP layer if the model has one."""
        return [*self.entries, self.mtp.cache] if self.mtp else self.entries

    @property
    def can_go_back(self) -> bool:
        """Whether tokens of a pass can be rewound; not in caches of mlx-lm."""
        own = all(isinstance(entry, caches.KVCache | caches.ArraysCache) for entry in self._entries)
        return own and isinstance(self.model, Model)

    @property
    def ids(self) -> Sequence[int]:
        """The token ids in the cache; do not change them."""
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
        """Append `ids` in pieces; take a snapshot when the length reaches a mark.

        A piece has at most `step_size` tokens, at most 2,048, and takes at most about 15 seconds;
        with experts from disk many pieces go through a layer together. Returns the hidden state
        `[1, 1, H]` of the last token, or None if `should_stop()` was true before a piece or between
        two layers. `every` gets the hidden states `[1, T, H]` of each piece.
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
                    # Free its buffers: the next piece needs other sizes.
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
            # Rewind to the end of the previous piece.
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
            # If a piece ends inside a picture, the next one continues from the picture's position.
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
        """Run a pass over lazy tokens `[T]`; call `commit` for each token that is kept.

        Kept tokens are the first ones, at least one. Returns the lazy hidden state `[1, T, H]`.
        """
        entries = self.entries
        self._is_consistent = False
        # A pass of one token is never rewound.
        given: dict[str, Any] = {"keep_states": True} if len(tokens) > 1 else {}
        if self.rope_delta:
            given["rope_delta"] = self.rope_delta
        hidden = self.model.trunk(tokens[None], entries, **given)
        self._pass = hidden, len(self._ids)
        return hidden

    def begin_pass(self) -> None:
        """Prepare for a batch's pass; ids and layer caches agree again after `commit`."""
        self._end_pass()
        self._is_consistent = False

    def end_pass(self, hidden: mx.array) -> None:
        """Store the hidden state `[1, 1, H]` of the batch's pass; `commit` follows."""
        self._pass = hidden, len(self._ids)

    def commit(self, token: int) -> None:
        """Keep the next token of the last `step`; `token` is its id."""
        assert self._pass
        # An interrupt may come between two commits, not within one.
        self._ids.append(token)
        self._is_consistent = True
        if len(self._ids) % POOL_TOKENS == 0:
            mx.clear_cache()

    @property
    def has_pass(self) -> bool:
        """Whether tokens of the last step may still be committed: the cache was not accessed."""
        return self._pass is not None

    def _end_pass(self) -> None:
        """End the last step: drop its tokens that were not committed."""
        if not self._pass or not self._is_consistent:
            return
        (hidden, start), self._pass = self._pass, None
        num_committed = len(self._ids) - start
        if hidden.shape[1] > 1:
            # An interrupt may come after some layers have accepted them.
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
        """Drafts of the MTP layer after `token`, the next one to read; see MTPState."""
        self._end_pass()
        if not self.mtp:
            return []
        return self.mtp.draft(token, num_drafts, self._ids, self.rope_delta, draw)

    def settle(self) -> None:
        """Evaluate the caches, because another thread cannot use lazy arrays."""
        mx.eval(self._held())

    def _held(self) -> list[Any]:
        states: list[Any] = [entry.state for entry in self.all_entries]
        return [*states, self.mtp.hidden] if self.mtp else states

    def snapshot(self) -> Snapshot:
        """Take a snapshot here; it keeps the recurrent states, and only an offset of keys."""
        point = self.snapshots.get(len(self._ids)) or self.end()
        self.snapshots[point.num_tokens] = point
        self.mark_used(point.num_tokens)
        return point

    def end(self) -> Snapshot:
        """A snapshot of the end, which is not stored."""
        point = caches.snapshot(self.all_entries, len(self._ids), self.rope_delta)
        point.mtp_hidden = self.mtp.hidden if self.mtp else None
        return point

    def mark_used(self, num_tokens: int) -> None:
        """Mark the snapshot at `num_tokens`, if there is one, as used now."""
        if point := self.snapshots.get(num_tokens):
            point.last_used = next(_clock)

    def reusable_tokens(self, ids: Sequence[int]) -> int:
        """Length of the longest prefix of `ids` that this cache can be rewound to."""
        return self._point_before(common_prefix(self._ids, ids))

    @property
    def last_point(self) -> int:
        """The largest number of tokens that this cache can be rewound to."""
        return self._point_before(len(self._ids))

    def rewind(self, num_tokens: int) -> int:
        """Go back to the last point at or before `num_tokens`; returns the tokens left."""
        if num_tokens < 0:
            raise Qwen35Error("cannot rewind", got=num_tokens, expected="0 tokens or more")
        self._end_pass()
        kept = self._point_before(num_tokens)
        # Drops tokens that were read and never committed.
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
        # An abandoned batch never gives the states back.
        self._is_consistent, self.in_batch = True, False
        return kept

    def _return_to(self, point: Snapshot) -> None:
        """Rewind the layer caches to a point; the caller drops the ids after it."""
        caches.restore(self.all_entries, point)
        self.rope_delta = point.rope_delta
        if self.mtp:
            self.mtp.hidden = point.mtp_hidden

    def fork(self, num_tokens: int) -> "PromptCache":
        """A second cache with the first `num_tokens`, which must be a point of this one."""
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
        """End the owner's use; the end becomes a snapshot for other owners."""
        if self._is_consistent and self._ids:
            self.snapshot()
        self.owner = None

    def _point_before(self, num_tokens: int) -> int:
        """The last point at or before `num_tokens`; an empty cache is always one."""
        has_end = self._is_consistent and not self.in_batch
        points = (*self.snapshots, len(self._ids)) if has_end else self.snapshots
        return max((n for n in points if n <= num_tokens), default=0)


class SweepStopped(Exception):
    """Stops a sweep; tokens that only some layers have read are dropped."""


def _of_layers(
    progress: Progress | None,
    before: int,
    num_tokens: int,
    total: int,
    should_stop: Callable[[], bool] | None,
) -> Callable[[float], None]:
    """A callback that reports finished layers as a share of the tokens; raises SweepStopped."""

    def on_layer(share: float) -> None:
        if share < 1 and should_stop and should_stop():
            raise SweepStopped
        if progress:
            progress(before + int(share * num_tokens), total)

    return on_layer


def rope_delta(ids: Iterable[int]) -> int:
    """The position of the token after `ids` minus their number."""
    shown = [token for token in ids if isinstance(token, MediaToken)]
    return media_positions(shown, 0)[1] - len(shown)


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common prefix of two sequences."""
    # By bisection, because slices compare at the speed of C; there may be 100,000 ids.
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
