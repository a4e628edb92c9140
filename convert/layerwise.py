"""Runs a checkpoint layer by layer: holds the weights of one layer, and all activations."""

# B texts, T tokens, H hidden size, I inputs of a matrix.

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from qwen35_mlx.checkpoint.adapter import Adapter
from qwen35_mlx.checkpoint.headers import read_headers
from qwen35_mlx.checkpoint.quantization import Quantization
from qwen35_mlx.checkpoint.resolver import Resolved, resolve
from qwen35_mlx.checkpoint.tensor_table import Role
from qwen35_mlx.config import ModelConfig, read_config
from qwen35_mlx.errors import CheckpointError
from qwen35_mlx.memory import decode_bytes
from qwen35_mlx.model.adapters import attach
from qwen35_mlx.model.language import DecoderLayer, Model
from qwen35_mlx.model.loading import check_copies, quantize_modules, read_parameters

from .plan import Plan, plan
from .source import check_folder
from .transform import read_entry

TRUNK = "language_model.model."
LAYER = TRUNK + "layers.{}."
# Tokens per call of a layer, and of the head.
LAYER_TOKENS, HEAD_TOKENS = 4096, 256

# Gets the path of a module, its input `[..., I]`, and its other arguments.
OnCall = Callable[[str, mx.array, tuple[Any, ...]], None]


class Checkpoint:
    """A checkpoint whose weights are read on demand, under the names of a converted folder."""

    config: ModelConfig
    quantizations: Mapping[str, Quantization]
    num_parameters: int
    # Name and bytes of the modules of the text model.
    sizes: Sequence[tuple[str, int]]
    # Attached to every layer that is read.
    adapter: Adapter | None = None

    def read(self, prefix: str) -> dict[str, mx.array]:
        """The tensors of the text model whose names start with `prefix`."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of the text model."""
        return sum(nbytes for _, nbytes in self.sizes)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the text model, with scales and biases."""
        return 8 * self.nbytes / self.num_parameters

    def decode_bytes(self, context: int) -> int:
        """Bytes read to decode a token after `context` tokens; see `memory.decode_bytes`."""
        return decode_bytes(self.config, self.sizes, context)


class SourceCheckpoint(Checkpoint):
    """A Hugging Face folder; weights are transformed as in `convert`, without quantization."""

    def __init__(self, folder: Path):
        self.plan: Plan = plan(folder, recipe=lambda module: None)
        self.config, self.quantizations = self.plan.config, {}
        self.entries = self.plan.text_entries
        self.quantizable = {e.module for e in self.entries if e.role is Role.QUANTIZED}
        self.num_parameters = sum(e.num_parameters for e in self.entries)
        self.sizes = [(e.module, e.output_bytes) for e in self.entries]

    def read(self, prefix: str) -> dict[str, mx.array]:
        return {
            entry.tensors[0].name: read_entry(entry)
            for entry in self.entries
            if entry.tensors[0].name.startswith(prefix)
        }


class ConvertedCheckpoint(Checkpoint):
    """A folder written by `convert` or mlx-lm."""

    def __init__(self, found: Resolved):
        check_copies(found)
        self.config, self.quantizations = found.config, found.quantizations
        self.matches = found.text_matches
        self.num_parameters = sum(math.prod(match.shape) for match in self.matches)
        self.sizes = [
            (match.name.rpartition(".")[0], segment.nbytes)
            for match in self.matches
            for part in match.parts
            for segment in part.segments
        ]

    def read(self, prefix: str) -> dict[str, mx.array]:
        """The tensors as lazy arrays: each is read when it is used, and freed with its user."""
        return read_parameters(match for match in self.matches if match.name.startswith(prefix))


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a Hugging Face checkpoint or a converted folder. Raises CheckpointError."""
    folder = Path(folder).expanduser()
    check_folder(folder)
    found = resolve(read_config(folder), read_headers(folder))
    return ConvertedCheckpoint(found) if found.is_converted else SourceCheckpoint(folder)


class Layerwise:
    """Runs texts through a checkpoint. Holds embedding, norm and head; layers are read on demand.

    Raises CheckpointError for missing tensors.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.config = checkpoint, checkpoint.config
        # A model without layers: embedding, last norm and head.
        ends: Any = dict(num_hidden_layers=0, layer_types=(), vision=None, num_mtp_layers=0)
        self.ends = Model(replace(self.config, **ends))
        weights = {
            name: array
            for part in ("embed_tokens.", "norm.")
            for name, array in checkpoint.read(TRUNK + part).items()
        }
        if not self.config.tie_word_embeddings:
            weights |= checkpoint.read("language_model.lm_head.")
        self._fill(self.ends, weights, "")

    def embed(self, ids: mx.array) -> list[mx.array]:
        """Token ids `[B, T]` -> hidden states `[1, T, H]` of each text."""
        hidden = [self.ends.language_model.model.embed_tokens(row[None]) for row in ids]
        mx.eval(hidden)
        return hidden

    def layer(self, index: int) -> DecoderLayer:
        """Read layer `index` from the files."""
        layer = DecoderLayer(self.config, self.config.layer_types[index])
        prefix = LAYER.format(index)
        self._fill(layer, self.checkpoint.read(prefix), prefix)
        if self.checkpoint.adapter is not None:
            attach(layer, self.checkpoint.adapter.part(prefix))
        return layer

    def _fill(self, module: nn.Module, weights: dict[str, mx.array], prefix: str) -> None:
        quantize_modules(module, self.checkpoint.quantizations, prefix)
        parameters: Any = tree_flatten(module.parameters())
        expected = {prefix + name for name, _ in parameters}
        if missing := sorted(expected - weights.keys()):
            raise CheckpointError("the checkpoint lacks tensors", got=", ".join(missing[:8]))
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        loaded = []
        for name in sorted(expected):
            array = weights.pop(name)
            if on_cpu and mx.issubdtype(array.dtype, mx.floating):
                array = array.astype(mx.float32)
            mx.eval(array)
            loaded.append((name.removeprefix(prefix), array))
        module.load_weights(loaded)

    def logits(self, hidden: list[mx.array]) -> Iterator[tuple[int, int, mx.array]]:
        """Index of the text, first position, logits `[N, vocab]`, with N up to HEAD_TOKENS."""
        for i, x in enumerate(hidden):
            normed = self.ends.trunk(None, embeddings=x)[0]
            for start in range(0, normed.shape[0], HEAD_TOKENS):
                yield i, start, self.ends.head(normed[start : start + HEAD_TOKENS])


def run_layer(layer: DecoderLayer, hidden: list[mx.array]) -> list[mx.array]:
    """The hidden states `[1, T, H]` of each text after a layer; runs LAYER_TOKENS at a time."""
    mask = None if layer.is_linear else "causal"
    at_once = max(LAYER_TOKENS // hidden[0].shape[1], 1)
    results = []
    for start in range(0, len(hidden), at_once):
        batch = mx.concatenate(hidden[start : start + at_once])
        out = layer(batch, mask, None, None)
        mx.eval(out)
        results += [row[None] for row in out]
    mx.clear_cache()
    return results


class _Watched(nn.Module):
    def __init__(self, module: nn.Module, name: str, on_call: OnCall):
        super().__init__()
        self.module, self._name, self._on_call = module, name, on_call
        self.is_called = False

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self.is_called = True
        self._on_call(self._name, x, args)
        return self.module(x, *args, **kwargs)


def matrices(root: nn.Module) -> dict[str, nn.Module]:
    """The modules in `root` that can be quantized, by path."""
    found: Any = tree_flatten(root.leaf_modules(), is_leaf=nn.Module.is_module)
    return {path: module for path, module in found if hasattr(module, "to_quantized")}


@contextmanager
def watched(root: nn.Module, on_call: OnCall) -> Iterator[None]:
    """Within the block, each call of a matrix calls `on_call` first; except embedding look-ups.

    Raises RuntimeError if a matrix is not called.
    """
    found = {p: module for p, module in matrices(root).items() if not p.endswith("embed_tokens")}
    wrapped = {path: _Watched(module, path, on_call) for path, module in found.items()}
    root.update_modules(tree_unflatten(list(wrapped.items())))
    try:
        yield
    finally:
        root.update_modules(tree_unflatten(list(found.items())))
    # A kernel that reads the weights without calling the module would cause empty statistics.
    if missed := sorted(path for path, module in wrapped.items() if not module.is_called):
        raise RuntimeError(f"not called: {missed}")
