"""mlx-lm's DWQ on this package's model: its `dwq_quantize` with its loss and optimiser, unchanged.

mlx-lm's own model of the family trains at 5 to 7 tokens per second on a CPU, because it computes
the delta rule token by token. This package's model computes it in chunks and gets the same numbers
from the same file. As in mlx-lm, scales, biases and norms are trained, in float32.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.quant.dwq import dwq_quantize

import qwen35_mlx
from qwen35_mlx.kernels.switch import QuantizedSwitchLinear
from qwen35_mlx.kernels.tiers import PORTABLE, use
from qwen35_mlx.training.trainer import ANY_BYTES, compiled_on_gpu

# Learning rates that suit 128 short texts; mlx-lm's default, 1e-6, is for 2048 long ones.
RATES = (1e-4, 3e-4, 1e-3)
NUM_EPOCHS, BATCH_SIZE = 4, 4


def _weight(module: nn.Module) -> mx.array:
    parts = module.weight, module.scales, module.biases
    return mx.dequantize(*parts, group_size=module.group_size, bits=module.bits)


class _Linear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        return x @ _weight(self).T


class _Embedding(nn.QuantizedEmbedding):
    def as_linear(self, x: mx.array) -> mx.array:
        return x @ _weight(self).T


class _Experts(QuantizedSwitchLinear):
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        weight = _weight(self).swapaxes(-1, -2)
        return mx.gather_mm(x, weight, rhs_indices=indices, sorted_indices=sorted_indices)


DEQUANTIZED = {
    nn.QuantizedLinear: _Linear,
    nn.QuantizedEmbedding: _Embedding,
    QuantizedSwitchLinear: _Experts,
}


def differentiable(model: Any) -> Any:
    """Change the model in place to float32 and to operations that have gradients.

    On a CPU, dequantizing and multiplying a matrix takes a 30th of the time of MLX's quantized
    product.
    """
    use(model, PORTABLE)
    model.set_dtype(mx.float32)
    for layer in model.layers:
        if not layer.is_linear:
            layer.self_attn.max_scores_bytes = ANY_BYTES
    for module in model.modules():
        module.__class__ = DEQUANTIZED.get(type(module), type(module))
    return model


def loaded(folder: Path) -> Any:
    """The model in a folder, as `differentiable`."""
    return differentiable(qwen35_mlx.load(folder, kernels="ops")[0])


class Targets:
    """Logits of the reference for batches of `dwq_quantize`; each batch is computed once."""

    def __init__(self, reference: Callable[[mx.array], mx.array]):
        self.reference = reference
        self.known: dict[str, mx.array] = {}

    def __call__(self, batch: mx.array, place: int, split: str) -> mx.array:
        key = str(batch.tolist())
        if key not in self.known:
            self.known[key] = self.reference(batch)
            mx.eval(self.known[key])
        return self.known[key]


def epochs(
    model: nn.Module, targets: Targets, ids: mx.array, rate: float, num_epochs: int
) -> Iterator[int]:
    """Train `model` in place on `ids` `[N, T]`; yields the number of each epoch after it."""
    optimizer = optim.Adam(learning_rate=rate, bias_correction=True)
    texts = [(row, 0) for row in ids.tolist()]
    for epoch in range(1, num_epochs + 1):
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), compiled_on_gpu():
            dwq_quantize(
                model, targets, optimizer, texts, texts[:BATCH_SIZE], BATCH_SIZE, ids.shape[1],
                seed=epoch, dtype=mx.float32,
            )  # fmt: skip
        model.eval()
        yield epoch
