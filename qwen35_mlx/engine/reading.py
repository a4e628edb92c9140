"""Prompts that the engine reads: which fit into memory, and the choice of the next piece."""

import time
from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx
import numpy as np

from ..kernels.matrix import arrays_of
from ..machine import describe
from ..memory import count, kv_bytes, kv_capacity, state_bytes, sweep_bytes
from ..model.language import Model
from .decode import likeliest, log_probabilities
from .prefix_store import MIN_POINT_TOKENS, PrefixStore, snapshot_marks
from .prepare import Prepared
from .prompt_cache import PieceSize, PromptCache, common_prefix
from .requests import Progress, PromptLogprobs, Started, Ticket, Top, Usage

# Target time of a piece if other requests wait, and if none does.
SHARED_SECONDS, ALONE_SECONDS = 0.4, 1.0
FIRST_PIECE_TOKENS = 256
# Positions of a prompt whose logits are computed at a time.
SCORED_TOKENS = 64
# At most so many tokens of an answer are counted: clients ask for 64,000 and seldom use a tenth.
COUNTED_TOKENS = 16_384
# Share of the memory to use on a machine without Metal.
SHARE_WITHOUT_GPU = 0.5


class Reading:
    """A request whose prompt is being prefilled, or waits for it."""

    def __init__(self, prepared: Prepared, ticket: Ticket, model: Model):
        self.prepared, self.ticket, self.model = prepared, ticket, model
        self.usage = Usage(prompt_tokens=len(prepared.ids))
        self.cache: PromptCache | None = None
        self.submitted = time.perf_counter()
        # Tokens prefilled since it left the queue.
        self.num_read = 0
        self._marks: set[int] = set()
        self._scores = Scores(prepared) if prepared.request.prompt_logprobs is not None else None

    @property
    def position(self) -> int:
        """Number of tokens of the prompt in the cache."""
        return 0 if self.cache is None else len(self.cache.ids)

    def start(self, store: PrefixStore) -> None:
        """Take the cache with the longest prefix from the store."""
        ids, usage = self.prepared.ids, self.usage
        if self._scores is None and not self.prepared.request.embeds:
            self.cache = store.take(ids[:-1], owner=self, model=self.model)
        else:
            # Log probabilities need every token; an embedding has no continuation.
            self.cache = PromptCache(self.model, features=store.features)
        kept = usage.cached_tokens = len(self.cache.ids)
        usage.queue_seconds = time.perf_counter() - self.submitted
        boundary = self.prepared.boundary
        self._marks = {*self.prepared.marks, *snapshot_marks(kept, boundary)}
        for mark in self.prepared.marks:
            self.cache.mark_used(mark)
        self.ticket.send(Started(len(ids), kept))
        self._send_progress()

    @property
    def num_left(self) -> int:
        """Number of tokens that are left to prefill."""
        return len(self.prepared.ids) - self.position

    def read_piece(
        self, num_tokens: int, feeds_mtp: bool, meanwhile: Callable[[], None] | None = None
    ) -> mx.array | None:
        """Prefill up to `num_tokens`; returns the hidden state `[1, 1, H]` at the prompt's end.

        With experts from disk, `meanwhile` is called between layers.
        """
        cache, ids = self.cache, self.prepared.ids
        assert cache is not None
        started = time.perf_counter()
        cache.feeds_mtp = feeds_mtp
        at = self.position
        piece = ids[at : at + num_tokens]

        def should_stop() -> bool:
            if meanwhile:
                meanwhile()
            return self.ticket.cancelled

        hidden = cache.read(
            piece,
            marks=self._marks,
            should_stop=should_stop,
            every=None if self._scores is None else self._scores.add,
        )
        self.num_read += self.position - at
        self.usage.prefill_seconds += time.perf_counter() - started
        self._send_progress()
        if self.position < len(ids):
            return None
        cache.answer_start = self.prepared.boundary
        if self._scores is not None:
            self.ticket.send(self._scores.event())
        return hidden

    def _send_progress(self) -> None:
        if self.prepared.request.wants_progress:
            self.ticket.send(Progress(self.position, len(self.prepared.ids)))


class Scores:
    """Log probabilities of a prompt's tokens, collected during the prefill."""

    def __init__(self, prepared: Prepared):
        self._ids = prepared.ids
        self._num_top = prepared.request.prompt_logprobs or 0
        self._logprobs: list[float | None] = [None]
        self._top: list[Top] = [()]

    def add(self, model: Model, hidden: mx.array) -> None:
        """Add the hidden states `[1, T, H]` of the next tokens."""
        for start in range(0, hidden.shape[1], SCORED_TOKENS):
            logits = model.head(hidden[:, start : start + SCORED_TOKENS])[0]
            for row in logits:
                # The successor of the last token is not a part of the prompt.
                if (place := len(self._logprobs)) == len(self._ids):
                    return
                logprobs = np.array(log_probabilities(row[None]))
                self._logprobs.append(float(logprobs[self._ids[place]]))
                self._top.append(likeliest(logprobs, self._num_top))

    def event(self) -> PromptLogprobs:
        """The event with all of them."""
        return PromptLogprobs(list(self._ids), self._logprobs, self._top)


class Pieces(PieceSize):
    """Chooses the next prompt and the size of its piece, so that no request waits long."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = 0

    def next_size(self, is_shared: bool) -> int:
        """Size of a piece that takes about the target time."""
        seconds = SHARED_SECONDS if is_shared else ALONE_SECONDS
        return self.next(seconds, FIRST_PIECE_TOKENS)

    def choose(
        self, readings: Sequence[Reading], store: PrefixStore, among: Sequence[Reading]
    ) -> Reading | None:
        """The next one: alternately the oldest, and the one with the fewest prefilled tokens.

        So a short prompt overtakes a long one, and a long one never starves. A prompt that shares
        a prefix with one in progress waits for it. None if all of `among` wait.
        """
        ready = [r for r in among if not any(_shares(r, other, store) for other in readings)]
        if not ready:
            return None
        self._turn += 1
        if self._turn % 2:
            return min(ready, key=lambda r: r.num_read)
        return ready[0]


def _shares(reading: Reading, other: Reading, store: PrefixStore) -> bool:
    """Whether `other` will soon have a snapshot from which `reading` can start."""
    if reading.cache is not None or other.cache is None or other is reading:
        return False
    if other.model is not reading.model:
        return False
    ids = reading.prepared.ids[:-1]
    shared = common_prefix(other.prepared.ids, ids)
    points = [n for n in other.prepared.marks if other.position < n <= shared]
    if not points:
        return False
    caches = [cache for cache in store.caches if cache.model is reading.model]
    known = max((cache.reusable_tokens(ids) for cache in caches), default=0)
    return max(points) >= known + MIN_POINT_TOKENS


class Admission:
    """Counts keys, values and states of requests, from their prompts and maximum lengths."""

    def __init__(
        self,
        model: Model,
        store: PrefixStore,
        memory_bytes: float | None = None,
        others: Iterable[Model] = (),
    ):
        """`memory_bytes` None: what the machine has left after weights, a prefill and snapshots.

        `others`: the model with adapters, which shares its weights.
        """
        self._config = model.config
        self._models, self._store = [model, *others], store
        self.memory_bytes = memory_bytes

    def fits(self, prepared: Prepared, running: Sequence[Prepared]) -> bool:
        """Whether a request may start beside others."""
        if self.memory_bytes is None:
            self.memory_bytes = self._left()
        needed = sum(self._bytes_of(p) for p in running)
        needed += self._bytes_of(prepared) * prepared.request.n
        return needed <= self.memory_bytes

    def _bytes_of(self, prepared: Prepared) -> int:
        """Bytes of one answer."""
        tokens = len(prepared.ids) + min(prepared.max_tokens, COUNTED_TOKENS)
        return kv_bytes(self._config, kv_capacity(tokens)) + 2 * state_bytes(self._config)

    def _left(self) -> float:
        """Bytes that the machine has left for answers."""
        machine = describe()
        limit = machine.gpu_limit_bytes or machine.memory_bytes * SHARE_WITHOUT_GPU
        parameters = arrays_of([model.parameters() for model in self._models]).values()
        weights = sum({id(array): array.nbytes for array in parameters}.values())
        context = min(self._config.context_length, 32_768)
        counted = count(self._config, weights, context, int(limit))
        spent = counted.total - counted.kv_cache - counted.states - counted.snapshots
        if self._models[0].experts:
            spent += sweep_bytes(self._config, context)
        return max(limit - spent - self._store.memory_bytes, 0.0)
