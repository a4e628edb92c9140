"""The prompt caches of all conversations with one model; the longest matching prefix is reused.

Prefixes are compared by token ids, never by text. The ids of a picture identify the picture.
"""

import itertools
import logging
import weakref
from collections import deque
from collections.abc import Generator, Sequence

from ..memory import Allowance
from ..model.cache import kv_bytes
from ..model.language import Model
from .background import BackgroundJob
from .features import FeatureStore
from .foreign import as_model
from .prompt_cache import PREFILL_STEP_SIZE, PromptCache
from .segments import Segments

log = logging.getLogger(__name__)
# Shorter prefixes are prefilled again: a recurrent state for them is not worth its memory.
MIN_POINT_TOKENS = 32
# Maximum number of caches without an owner; the oldest ones are dropped.
MAX_IDLE_CACHES = 64


class PrefixStore:
    """Prompt caches with a memory budget; old snapshots are dropped first.

    `memory_bytes` bounds the snapshots of all caches, and the keys and values of those not in use.
    Not thread-safe; `background` has to be stopped before anything else is done.
    """

    def __init__(
        self, model: Model, memory_bytes: float | None = None, disk: Segments | None = None
    ):
        """`memory_bytes` None: the model's allowance for snapshots."""
        if memory_bytes is None:
            memory_bytes = getattr(model, "allowance", Allowance()).snapshot_bytes
        self.model = as_model(model)
        self.memory_bytes = memory_bytes
        self.caches: list[PromptCache] = []
        self.features = FeatureStore(model)
        self.background = BackgroundJob()
        # Saved caches, read and written in the engine's thread.
        self.disk = disk
        self._unsaved: deque[PromptCache] = deque()
        self._writing: Generator[None] | None = None

    def take(
        self,
        ids: Sequence[int],
        current: PromptCache | None = None,
        owner: object = None,
        disk: Segments | None = None,
        model: Model | None = None,
    ) -> PromptCache:
        """A cache with the longest prefix of `ids` that any cache or the disk has.

        `current`, the caller's own cache, is changed in place; if another one has more, `current`
        is released to the store. Caches of other owners do not change. `model`: if it is not the
        store's own, it is the model with an adapter, which uses only its own caches.
        """
        model = model or self.model
        # The caller's own cache is preferred among equals, because it needs no copy.
        candidates = [
            current or PromptCache(model, features=self.features),
            *(c for c in self.caches if c is not current and c.model is model),
        ]
        best = max(candidates, key=lambda c: c.reusable_tokens(ids))
        num_tokens = best.reusable_tokens(ids)
        # Saved caches are only for the model without an adapter.
        if (disk := disk or self.disk) and disk.model is model:
            at_least = num_tokens + (MIN_POINT_TOKENS if num_tokens else 1)
            if saved := disk.read(ids, at_least, self.features):
                best, num_tokens = saved, len(saved.ids)
        if best is candidates[0]:
            best.rewind(num_tokens)
        else:
            if current is not None:
                current.release()
            # Only the last answer comes after its start: dropping it is cheaper than a copy.
            is_branch = num_tokens < best.last_point and num_tokens != best.answer_start
            if best.in_use or is_branch:
                best.mark_used(num_tokens)
                best = best.fork(num_tokens)
            else:
                best.rewind(num_tokens)
        # A cache from the disk has its own feature store so far.
        best.features = self.features
        if owner is not None:
            best.owner = weakref.ref(owner)
        self.caches = [c for c in self.caches if c is not best] + [best]
        return best

    def save_later(self, cache: PromptCache) -> None:
        """Queue a cache for `save_piece`, if there is a disk."""
        if self.disk is not None and cache.model is self.disk.model:
            self._unsaved = deque([*(c for c in self._unsaved if c is not cache), cache])

    @property
    def is_saved(self) -> bool:
        """Whether nothing waits to be written."""
        return self._writing is None and not self._unsaved

    def save_piece(self) -> None:
        """Write up to 32 MiB of the queued caches; an error is logged and skips its cache."""
        try:
            if self._writing is None:
                self._writing = self._save(self._unsaved.popleft())
            next(self._writing)
        except StopIteration:
            self._writing = None
        # Answers must continue after any error.
        except Exception as error:
            self._writing = None
            log.warning("%s", error)

    def _save(self, cache: PromptCache) -> Generator[None]:
        """Save three points: the first snapshot, the start of the last answer, and the end."""
        points = {min(cache.snapshots, default=0), cache.answer_start or 0, cache.last_point}
        for num_tokens in sorted(points):
            if self.disk is not None:
                yield from self.disk.write(cache, num_tokens)

    def drop(self, cache: PromptCache | None) -> None:
        """Remove a cache."""
        self.caches = [c for c in self.caches if c is not cache]

    @property
    def nbytes(self) -> int:
        """Bytes that count against the budget."""
        points = {id(s): s.nbytes for c in self.caches for s in c.snapshots.values()}
        return sum(points.values()) + sum(
            kv_bytes(c.all_entries) for c in self.caches if not c.in_use
        )

    @property
    def num_snapshots(self) -> int:
        """Number of distinct snapshots."""
        return len({id(s) for c in self.caches for s in c.snapshots.values()})

    def trim(self) -> None:
        """Drop idle caches with few tokens, and snapshots until the rest fits the budget.

        Among the least recently used half, it drops the snapshot whose loss costs the least extra
        prefill in relation to the tokens after it. So snapshots are dense near the end of a text.
        """
        idle = [c for c in self.caches if not c.in_use]
        worth = [c for c in idle if len(c.ids) >= MIN_POINT_TOKENS]
        for cache in {*idle}.difference(worth[-MAX_IDLE_CACHES:]):
            self.drop(cache)
        while self.nbytes > self.memory_bytes:
            points = [(s.last_used, n, c) for c in self.caches for n, s in c.snapshots.items()]
            if not points:
                break
            points.sort(key=lambda point: point[0])
            unused = points[: -(-len(points) // 2)]
            _, num_tokens, cache = min(unused, key=lambda point: _gap(point[2], point[1]))
            # Forks share snapshots, so it is dropped in all of them.
            old = cache.snapshots[num_tokens]
            for other in self.caches:
                if other.snapshots.get(num_tokens) is old:
                    del other.snapshots[num_tokens]
            self.caches = [c for c in self.caches if c.in_use or c.snapshots]


def _gap(cache: PromptCache, num_tokens: int) -> float:
    """The gap in tokens without the snapshot at `num_tokens`, divided by the tokens after it."""
    points = [0, *sorted(cache.snapshots), len(cache.ids)]
    place = points.index(num_tokens, 1)
    return (points[place + 1] - points[place - 1]) / max(points[-1] - num_tokens, 1)


def snapshot_marks(start: int, end: int) -> list[int]:
    """Positions of snapshots in a prefill from `start` to `end`, besides the turns' boundaries.

    Distances from the end double: so an edit prefills at most twice the tokens after it.
    """
    distances = (PREFILL_STEP_SIZE << n for n in itertools.count())
    return sorted(itertools.takewhile(lambda n: n > start, (end - d for d in distances)))
