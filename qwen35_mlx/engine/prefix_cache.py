"""What conversations have read: caches by token ids, of which the longest usable one goes on.

The recurrent state of a linear layer cannot be trimmed, so a cache can be taken up again only
where a snapshot was made. Ids decide, never text: what differs in one id is read again.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from threading import Event, Thread
from typing import Any

import mlx.core as mx

from ..errors import Qwen35Error
from ..model.cache import CacheEntry, Snapshot, fork, kv_bytes, restore, snapshot
from ..model.language import Model
from .decode import PREFILL_STEP_SIZE, Progress, prefill, wired

# A long prefill keeps at most this many points, lest they push out all others.
MAX_SNAPSHOTS_A_PREFILL = 8
# Short, so that whoever presses Enter does not wait for it.
READ_AHEAD_STEP_SIZE = 64
Stop = Callable[[], bool]
_clock = itertools.count(1)


class PromptCache:
    """One sequence: its ids, the layers' caches, and the points it can be taken back to."""

    def __init__(self, model: Model, ids: Iterable[int] = (), entries: list[Any] | None = None):
        """entries: caches that have read `ids`; made empty if None."""
        self.model = model
        self.ids = list(ids)
        self.entries: list[CacheEntry] = model.make_cache() if entries is None else entries
        self.snapshots: dict[int, Snapshot] = {}
        # False while layers may have read different numbers of tokens.
        self.is_whole = True
        # Who goes on here; a weak reference, so that a forgotten chat holds nothing.
        self.owner: Callable[[], object] | None = None

    @property
    def in_use(self) -> bool:
        """Whether its owner may go on here at any time."""
        return self.owner is not None and self.owner() is not None

    def snapshot(self) -> Snapshot:
        """Remember this point; it costs the recurrent state, and of keys and values an offset."""
        point = self.snapshots.get(len(self.ids)) or snapshot(self.entries, len(self.ids))
        point.last_used = next(_clock)
        self.snapshots[point.num_tokens] = point
        return point

    def touch(self, num_tokens: int) -> None:
        """Count the point at `num_tokens`, if there is one, as used now."""
        if point := self.snapshots.get(num_tokens):
            point.last_used = next(_clock)

    def usable(self, ids: Sequence[int]) -> int:
        """The length of the longest prefix of `ids` that this cache can be taken back to."""
        return self._point_before(common_prefix(self.ids, ids))

    def rewind(self, num_tokens: int) -> int:
        """Go back to the nearest point at or before; returns how many tokens are left."""
        if num_tokens < 0:
            raise Qwen35Error("cannot rewind", got=num_tokens, expected="0 tokens or more")
        kept = self._point_before(num_tokens)
        if kept == 0:
            self.entries = self.model.make_cache()
        elif kept < len(self.ids) or not self.is_whole:
            restore(self.entries, self.snapshots[kept])
        self.touch(kept)
        self.ids = self.ids[:kept]
        self.snapshots = {n: point for n, point in self.snapshots.items() if n <= kept}
        self.is_whole = True
        return kept

    def fork(self, num_tokens: int) -> "PromptCache":
        """A second cache that holds the first `num_tokens`, one of this one's points."""
        if num_tokens == 0:
            return PromptCache(self.model)
        # Without a snapshot there, it is the end.
        point = self.snapshots.get(num_tokens) or snapshot(self.entries, num_tokens)
        copy = PromptCache(self.model, self.ids[:num_tokens], fork(self.entries, point))
        copy.snapshots = {n: s for n, s in self.snapshots.items() if n <= num_tokens}
        return copy

    def read(
        self,
        ids: Sequence[int],
        *,
        marks: Iterable[int] = (),
        step_size: int = PREFILL_STEP_SIZE,
        progress: Progress | None = None,
        stop: Stop | None = None,
    ) -> None:
        """Read `ids` behind what is held, with snapshots where `marks` tokens are held.

        Ends early, after a whole piece, once `stop()` is true.
        """
        start, end, marks = len(self.ids), len(self.ids) + len(ids), set(marks)
        cuts = sorted({m for m in marks if start < m <= end} | {end})
        if progress:
            progress(0, len(ids))
        # Not in the background: it would change the other thread's stdout for a moment.
        with wired(self.model) if stop is None else nullcontext():
            for cut in cuts:
                while (at := len(self.ids)) < cut:
                    if stop and stop():
                        return
                    piece = list(ids[at - start : min(at + step_size, cut) - start])
                    self.is_whole = False
                    prefill(self.model, mx.array(piece), self.entries, step_size)
                    self.ids += piece
                    self.is_whole = True
                    if progress:
                        progress(len(self.ids) - start, len(ids))
                    if len(piece) == step_size >= PREFILL_STEP_SIZE:
                        mx.clear_cache()
                if cut in marks:
                    self.snapshot()

    def close(self) -> None:
        """Nobody goes on here for now: keep the end as a point, leave the rest to the store."""
        if self.is_whole and self.ids:
            self.snapshot()
        self.owner = None

    @property
    def furthest(self) -> int:
        """The last point there is."""
        return self._point_before(len(self.ids))

    def _point_before(self, num_tokens: int) -> int:
        """The last point at or before `num_tokens`; an empty cache is always one."""
        points = (*self.snapshots, len(self.ids)) if self.is_whole else self.snapshots
        return max((n for n in points if n <= num_tokens), default=0)


class PrefixStore:
    """The prompt caches of conversations with one model, the least recently used dropped first.

    `memory_bytes` bounds the snapshots of all, and keys and values of those not in use. Not for
    use from several threads; the one that reads ahead is stopped by every call.
    """

    def __init__(self, model: Model, memory_bytes: float | None = None):
        """memory_bytes: what `load` found to be left for it if None."""
        self.model = model
        self.memory_bytes = model.allowance.snapshot_bytes if memory_bytes is None else memory_bytes
        self.caches: list[PromptCache] = []
        self._reader: Thread | None = None
        self._stopping = Event()
        self._failure: BaseException | None = None

    def take(
        self, ids: Sequence[int], own: PromptCache | None = None, owner: object = None
    ) -> PromptCache:
        """A cache that holds the longest prefix of `ids` that any of them can give.

        The caller's `own` is changed in place, and left for the result if another knows more;
        the others' stay as they are.
        """
        # The caller's own comes first among equals: it costs no copy.
        candidates = [own or PromptCache(self.model), *(c for c in self.caches if c is not own)]
        best = max(candidates, key=lambda c: c.usable(ids))
        num_tokens = best.usable(ids)
        if best is not candidates[0] and (best.in_use or num_tokens < best.furthest):
            best.touch(num_tokens)
            best = best.fork(num_tokens)
        else:
            best.rewind(num_tokens)
        if owner is not None:
            best.owner = weakref.ref(owner)
        self.caches = [c for c in self.caches if c is not own and c is not best] + [best]
        return best

    @property
    def nbytes(self) -> int:
        """What the budget counts."""
        points = {id(s): s.nbytes for c in self.caches for s in c.snapshots.values()}
        return sum(points.values()) + sum(kv_bytes(c.entries) for c in self.caches if not c.in_use)

    @property
    def num_snapshots(self) -> int:
        """How many points there are to go on from."""
        return len({id(s) for c in self.caches for s in c.snapshots.values()})

    def trim(self) -> None:
        """Drop what was not used for longest until the rest fits the budget."""
        while self.nbytes > self.memory_bytes:
            points = [(s.last_used, n, c) for c in self.caches for n, s in c.snapshots.items()]
            if not points:
                break
            _, num_tokens, cache = min(points, key=lambda point: point[0])
            # Forks share their snapshots: gone here, it has to go there too.
            old = cache.snapshots[num_tokens]
            for other in self.caches:
                if other.snapshots.get(num_tokens) is old:
                    del other.snapshots[num_tokens]
            self.caches = [c for c in self.caches if c.in_use or c.snapshots]

    def read_ahead(self, job: Callable[[Stop], None]) -> None:
        """Run `job(stop)` in the background until it ends or anything is asked of the store."""
        self.stop_reading()
        self._stopping.clear()

        def run() -> None:
            try:
                job(self._stopping.is_set)
            except BaseException as error:
                self._failure = error
            finally:
                # MLX ends a thread's streams late; a process that exits before is aborted.
                mx.clear_streams()

        self._reader = Thread(target=run, name="read-ahead", daemon=True)
        self._reader.start()
        self._at_exit = weakref.finalize(self, _end, self._reader, self._stopping)

    def stop_reading(self, *, wait_for_end: bool = False) -> None:
        """End the reading ahead, at once or when it is done; raises what went wrong in it."""
        if self._reader is None:
            return
        if not wait_for_end:
            self._stopping.set()
        self._reader.join()
        self._reader = None
        self._at_exit.detach()
        failure, self._failure = self._failure, None
        if failure:
            raise failure


def _end(reader: Thread, stopping: Event) -> None:
    """At exit: a thread that still computes then would abort the process."""
    stopping.set()
    reader.join()


def snapshot_marks(start: int, end: int) -> range:
    """Where a prefill of ids start to end keeps points, besides the turns' boundaries."""
    interval = max(PREFILL_STEP_SIZE, -(-(end - start) // MAX_SNAPSHOTS_A_PREFILL))
    interval = -(-interval // PREFILL_STEP_SIZE) * PREFILL_STEP_SIZE
    return range(start + interval, end, interval)


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many ids, or characters, two sequences begin with alike."""
    # Slices compare at the speed of C; a conversation has a hundred thousand ids.
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
