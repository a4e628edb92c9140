"""Decides which requests fit into memory beside the running ones."""

from collections.abc import Iterable, Sequence

from ..kernels.matrix import arrays_of
from ..machine import describe
from ..memory import count, kv_bytes, kv_capacity, state_bytes, sweep_bytes
from ..model.language import Model
from .prefix_store import PrefixStore
from .prepare import Prepared

# At most so many tokens of an answer are counted: clients ask for 64,000 and seldom use a tenth.
COUNTED_TOKENS = 16_384
# Share of the memory to use on a machine without Metal.
SHARE_WITHOUT_GPU = 0.5


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
