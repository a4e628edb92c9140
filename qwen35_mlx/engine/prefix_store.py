"""The prompt caches of all conversations with one model; the longest matching prefix is reused.

Ids decide, never text: what differs in one id is read again. Ids of pictures name the picture.
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
from .prompt_cache import PREFILL_STEP_SIZE, PromptCache
from .segments import Segments

log = logging.getLogger(__name__)
# Fewer are read again sooner than a recurrent state is kept for them.
MIN_POINT_TOKENS = 32
# Conversations that nobody continues at the moment; the oldest ones are dropped.
MAX_IDLE_CACHES = 64


class PrefixStore:
    """Prompt caches, of which the least recently used snapshots are dropped first.

    `memory_bytes` bounds the snapshots of all caches, and keys and values of those not in use.
    Not for use from several threads; `background` is stopped before anything else is done.
    """

    def __init__(
        self, model: Model, memory_bytes: float | None = None, disk: Segments | None = None
    ):
        """`memory_bytes` None: what `load` found to be left for snapshots."""
        if memory_bytes is None:
            memory_bytes = getattr(model, "allowance", Allowance()).snapshot_bytes
        self.model = model
        self.memory_bytes = memory_bytes
        self.caches: list[PromptCache] = []
        self.features = FeatureStore(model)
        self.background = BackgroundJob()
        # What is read and written there in the engine's thread.
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
        """A cache that holds the longest prefix of `ids` that any of them can give, or the disk.

        `current`, the caller's own, is changed in place; if another one holds more, `current` is
        released to the store. The caches of others stay as they are. `model`, if it is not the
        store's own, is that with an adapter: caches that another one has read are not taken.
        """
        model = model or self.model
        # The caller's own comes first among equals: it costs no copy.
        candidates = [
            current or PromptCache(model, features=self.features),
            *(c for c in self.caches if c is not current and c.model is model),
        ]
        best = max(candidates, key=lambda c: c.reusable_tokens(ids))
        num_tokens = best.reusable_tokens(ids)
        # Its files are of one model, not of that with an adapter.
        if (disk := disk or self.disk) and disk.model is model:
            at_least = num_tokens + (MIN_POINT_TOKENS if num_tokens else 1)
            if saved := disk.read(ids, at_least, self.features):
                best, num_tokens = saved, len(saved.ids)
        if best is candidates[0]:
            best.rewind(num_tokens)
        else:
            if current is not None:
                current.release()
            # Behind where an answer begins there is that answer alone: not worth a copy.
            is_branch = num_tokens < best.last_point and num_tokens != best.answer_start
            if best.in_use or is_branch:
                best.mark_used(num_tokens)
                best = best.fork(num_tokens)
            else:
                best.rewind(num_tokens)
        # One that comes from a file has a store of its own until now.
        best.features = self.features
        if owner is not None:
            best.owner = weakref.ref(owner)
        self.caches = [c for c in self.caches if c is not best] + [best]
        return best

    def save_later(self, cache: PromptCache) -> None:
        """Write a cache to the disk, where there is one, by later calls of `save_piece`."""
        if self.disk is not None and cache.model is self.disk.model:
            self._unsaved = deque([*(c for c in self._unsaved if c is not cache), cache])

    @property
    def is_saved(self) -> bool:
        """Whether nothing waits to be written."""
        return self._writing is None and not self._unsaved

    def save_piece(self) -> None:
        """Write up to 32 MiB of what waits; an error is logged, and its cache is not written."""
        try:
            if self._writing is None:
                self._writing = self._save(self._unsaved.popleft())
            next(self._writing)
        except StopIteration:
            self._writing = None
        # Answers go on, whatever it is.
        except Exception as error:
            self._writing = None
            log.warning("%s", error)

    def _save(self, cache: PromptCache) -> Generator[None]:
        """The beginning that conversations share, where the last answer begins, and the end."""
        points = {min(cache.snapshots, default=0), cache.answer_start or 0, cache.last_point}
        for num_tokens in sorted(points):
            if self.disk is not None:
                yield from self.disk.write(cache, num_tokens)

    def drop(self, cache: PromptCache | None) -> None:
        """Forget a cache."""
        self.caches = [c for c in self.caches if c is not cache]

    @property
    def nbytes(self) -> int:
        """What the budget counts."""
        points = {id(s): s.nbytes for c in self.caches for s in c.snapshots.values()}
        return sum(points.values()) + sum(
            kv_bytes(c.all_entries) for c in self.caches if not c.in_use
        )

    @property
    def num_snapshots(self) -> int:
        """How many points there are to continue from."""
        return len({id(s) for c in self.caches for s in c.snapshots.values()})

    def trim(self) -> None:
        """Drop idle caches of few tokens, and snapshots until the rest fits the budget.

        Of the half that was not used for the longest time, that one without which the least has
        to be read again for what comes behind it: so points are dense near the end of a text.
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
            # Forks share their snapshots: dropped here, it is dropped there too.
            old = cache.snapshots[num_tokens]
            for other in self.caches:
                if other.snapshots.get(num_tokens) is old:
                    del other.snapshots[num_tokens]
            self.caches = [c for c in self.caches if c.in_use or c.snapshots]


def _gap(cache: PromptCache, num_tokens: int) -> float:
    """What would lie between two points without the one at `num_tokens`, over what follows it."""
    points = [0, *sorted(cache.snapshots), len(cache.ids)]
    place = points.index(num_tokens, 1)
    return (points[place + 1] - points[place - 1]) / max(points[-1] - num_tokens, 1)


def snapshot_marks(start: int, end: int) -> list[int]:
    """Where a prefill from `start` to `end` takes snapshots besides the turns' boundaries.

    Twice as far from the end each time: an edit reads at most twice as much as follows it.
    """
    distances = (PREFILL_STEP_SIZE << n for n in itertools.count())
    return sorted(itertools.takewhile(lambda n: n > start, (end - d for d in distances)))
