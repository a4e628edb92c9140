"""Models of mlx-lm's interface, such as mlx-lm's own, and stubs: what they lack gets a default."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx

from ..errors import Qwen35Error
from ..model.language import Model
from ..sampling import SamplingParams

# What the engine needs of every model.
NEEDED = ("config", "sampling_defaults", "make_cache", "trunk", "head")
# Bounds for a model that does not state its own.
UNKNOWN = 2**31 - 1


def as_model(model: Any) -> Model:
    """The model itself if it has all that the engine needs, else a view of it that has."""
    return cast(Model, model if _is_complete(model) else ForeignModel(model))


def check_own(model: Any, task: str) -> None:
    """Raise Qwen35Error if the model was not loaded by this package; `task` needs that."""
    if not _is_complete(model):
        raise Qwen35Error(
            f"{task} needs a model that qwen35_mlx.load has loaded",
            got=f"{type(model).__module__}.{type(model).__qualname__}",
            hint="generate, stream_generate and Chat take other models too",
        )


def _is_complete(model: Any) -> bool:
    return all(hasattr(model, name) for name in NEEDED)


class ForeignModel:
    """A model that is called as `model(ids, cache=cache)` and returns logits; text only.

    It has no drafts, because its caches cannot take tokens back.
    """

    experts = ring = mtp = None
    cache_key = ""

    def __init__(self, model: Any):
        self._model = model
        self.config = _config_of(model)
        self.sampling_defaults = getattr(model, "sampling_defaults", None) or SamplingParams()
        is_split = hasattr(model, "trunk") and hasattr(model, "head")
        self.trunk = model.trunk if is_split else self._logits
        self.head = model.head if is_split else lambda logits: logits

    def make_cache(self) -> list[Any]:
        """An empty cache; without a method of its own, as mlx-lm makes one."""
        if hasattr(self._model, "make_cache"):
            return list(self._model.make_cache())
        from mlx_lm.models.cache import make_prompt_cache

        return list(make_prompt_cache(self._model))

    def parameters(self) -> Any:
        """The weights, by which a saved conversation knows its model; none of a stub."""
        return self._model.parameters() if hasattr(self._model, "parameters") else {}

    def _logits(self, ids: mx.array, cache: Sequence[Any], *, last_only: bool = False) -> mx.array:
        """Logits `[B, T, V]` in the place of hidden states; `last_only`: `[B, 1, V]`."""
        if last_only and ids.shape[1] > 1:
            # Its logits are not used, so they are never computed.
            self._model(ids[:, :-1], cache=cache)
            ids = ids[:, -1:]
        return cast(mx.array, self._model(ids, cache=cache))


def _config_of(model: Any) -> Any:
    """What the engine reads of a config, by the model's own or by mlx-lm's `args`."""
    args = vars(getattr(model, "config", None) or getattr(model, "args", SimpleNamespace()))
    args = args | (args.get("text_config") or {})
    return SimpleNamespace(
        vocab_size=args.get("vocab_size") or UNKNOWN,
        context_length=args.get("context_length") or args.get("max_position_embeddings") or UNKNOWN,
        rope=args.get("rope_parameters"),
    )
