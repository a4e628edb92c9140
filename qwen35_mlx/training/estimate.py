"""Memory that training an adapter needs, and opening a model for it.

B examples a batch, T tokens of each, N = B * T.
"""

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import MemoryRefused
from ..kernels.matrix import arrays_of
from ..machine import describe
from ..memory import PROGRAM_BYTES, layer_bytes
from ..model.adapters import weight_shape
from ..model.hub import resolve
from ..model.language import Model
from ..model.loading import load_tokenizer, open_model, read_generation_config
from .trainer import LOSS_ROWS, TrainSettings

# fp32 copies of each adapter parameter: itself, its gradient, two moments, and three new values.
COPIES = 7
# fp32 copies of the logits: themselves, their softmax, their gradient, and a temporary.
LOGITS_COPIES = 4
# Memory of a layer's backward pass, and of activations kept for it, in forward passes; measured.
BACKWARD, KEPT = 2.8, 1.4


class TrainingBytes(NamedTuple):
    """Peak memory of training, by purpose."""

    weights: int
    adapter: int
    activations: int
    logits: int
    program: int
    checkpointing: bool

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self[:5])

    def lines(self) -> dict[str, int]:
        """The bytes by purpose, for people."""
        kept = "one layer's at a time" if self.checkpointing else "all layers'"
        return {
            "weights": self.weights,
            "adapter, gradients, moments of Adam": self.adapter,
            f"activations, {kept}": self.activations,
            "logits of a block, program (estimate)": self.logits + self.program,
        }


def open_for_training(name: str | Path, revision: str | None = None) -> tuple[Model, Any, int]:
    """The text model of a folder or hub id, its tokenizer, and the bytes of its weights.

    The weights are not read yet. The MTP layer and the vision tower are left out.
    """
    folder = resolve(name, revision)
    model, config, _ = open_model(folder, mtp=False)
    model.vision_tower = None
    tokenizer = load_tokenizer(folder, config, read_generation_config(folder))
    num_bytes = sum(array.nbytes for array in arrays_of(model.parameters()).values())
    return model, tokenizer, num_bytes


def count(
    model: Model, weight_bytes: int, settings: TrainSettings, num_tokens: int, checkpointing: bool
) -> TrainingBytes:
    """Peak memory of a step whose longest example has `num_tokens`."""
    config, batch = model.config, settings.batch_size
    item_bytes = model.language_model.model.norm.weight.dtype.size
    layers = [
        layer_bytes(config, kind, batch, num_tokens, item_bytes) for kind in config.layer_types
    ]
    inputs = len(layers) * batch * num_tokens * config.hidden_size * item_bytes
    if checkpointing:
        activations = inputs + BACKWARD * max(layers)
    else:
        activations = inputs + KEPT * sum(layers) + (BACKWARD - KEPT) * max(layers)
    rows = min(LOSS_ROWS, batch * num_tokens)
    return TrainingBytes(
        weight_bytes,
        4 * COPIES * num_trained(model, settings),
        int(activations),
        4 * LOGITS_COPIES * rows * config.vocab_size,
        PROGRAM_BYTES,
        checkpointing,
    )


def num_trained(model: Model, settings: TrainSettings) -> int:
    """Number of parameters of the adapter, without the magnitudes of DoRA."""
    num_layers = len(model.layers) if settings.num_layers is None else settings.num_layers
    total = 0
    for layer in model.layers[len(model.layers) - num_layers :]:
        for key, base in layer.named_modules():
            if key in settings.keys:
                *experts, out_dims, in_dims = weight_shape(base)
                total += settings.rank * (out_dims + in_dims) * (experts[0] if experts else 1)
    return total


def require_memory(
    model: Model, weight_bytes: int, settings: TrainSettings, num_tokens: int, force: bool = False
) -> TrainingBytes:
    """Memory of training: all activations are kept if they fit, which is faster.

    Raises MemoryRefused, unless forced, if it does not fit with checkpointing either.
    """
    limit = describe().limit_bytes
    kept, counted = (count(model, weight_bytes, settings, num_tokens, way) for way in (False, True))
    if kept.total <= limit:
        return kept
    if counted.total > limit and not force:
        lines = "".join(f"\n    {name:42} {n / 1e9:9.3f} GB" for name, n in counted.lines().items())
        raise MemoryRefused(
            "training does not fit this machine",
            got=f"{counted.total / 1e9:,.3f} GB{lines}",
            expected=f"at most {limit / 1e9:,.3f} GB",
            hint="a lower --batch-size or --max-tokens, or a model of fewer bits; --force tries it",
        )
    return counted


def read_weights(model: Model) -> None:
    """Read the weights of a model from `open_for_training`."""
    mx.eval(model.parameters())
