"""The prompt caches of all conversations with one model; the longest matching prefix is reused.

Ids decide, never text: what differs in one id is read again. Ids of pictures name the picture.
"""

import weakref
from collections.abc import Sequence

from ..memory import Allowance
from ..model.cache import kv_bytes
from ..model.language import Model
from .background import BackgroundJob
from .features import FeatureStore
from .prompt_cache import PREFILL_STEP_SIZE, PromptCache

# A long prefill keeps at most this many points, or they would push out all others.
MAX_SNAPSHOTS_A_PREFILL = 8
# Fewer are read again sooner than a recurrent state is kept for them.
MIN_POINT_TOKENS = 32
# Conversations that nobody continues at the moment; the oldest ones are dropped.
MAX_IDLE_CACHES = 64


class PrefixStore:
    """Prompt caches, of which the least recently used snapshots are dropped first.

    `memory_bytes` bounds the snapshots of all caches, and keys and values of those not in use.
    Not for use from several threads; `background` is stopped before anything else is done.
    """

    def __init__(self, model: Model, memory_bytes: float | None = None):
        """`memory_bytes` None: what `load` found to be left for snapshots."""
        if memory_bytes is None:
            memory_bytes = getattr(model, "allowance", Allowance()).snapshot_bytes
        self.model = model
        self.memory_bytes = memory_bytes
        self.caches: list[PromptCache] = []
        self.features = FeatureStore(model)
        self.background = BackgroundJob()

    def take(
        self, ids: Sequence[int], current: PromptCache | None = None, owner: object = None
    ) -> PromptCache:
        """A cache that holds the longest prefix of `ids` that any of them can give.

        `current`, the caller's own, is changed in place; if another one holds more, `current` is
        released to the store. The caches of others stay as they are.
        """
        # The caller's own comes first among equals: it costs no copy.
        candidates = [
            current or PromptCache(self.model, features=self.features),
            *(c for c in self.caches if c is not current),
        ]
        best = max(candidates, key=lambda c: c.reusable_tokens(ids))
        num_tokens = best.reusable_tokens(ids)
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
        """Drop idle caches of few tokens, and the least recently used until the rest fits."""
        idle = [c for c in self.caches if not c.in_use]
        worth = [c for c in idle if len(c.ids) >= MIN_POINT_TOKENS]
        for cache in {*idle}.difference(worth[-MAX_IDLE_CACHES:]):
            self.drop(cache)
        while self.nbytes > self.memory_bytes:
            points = [(s.last_used, n, c) for c in self.caches for n, s in c.snapshots.items()]
            if not points:
                break
            _, num_tokens, cache = min(points, key=lambda point: point[0])
            # Forks share their snapshots: dropped here, it is dropped there too.
            old = cache.snapshots[num_tokens]
            for other in self.caches:
                if other.snapshots.get(num_tokens) is old:
                    del other.snapshots[num_tokens]
            self.caches = [c for c in self.caches if c.in_use or c.snapshots]


def snapshot_marks(start: int, end: int) -> range:
    """Where a prefill from `start` to `end` takes snapshots besides the turns' boundaries."""
    interval = max(PREFILL_STEP_SIZE, -(-(end - start) // MAX_SNAPSHOTS_A_PREFILL))
    interval = -(-interval // PREFILL_STEP_SIZE) * PREFILL_STEP_SIZE
    return range(start + interval, end, interval)
