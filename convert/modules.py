"""Modules by their paths: of a layer, of one expert, and quantized in a file."""

# N tokens, H hidden size.

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwen35_mlx.quant.packing import Quantized

from .distilled import KINDS

EXPERTS, GLU = "mlp.switch_mlp.", ("gate_proj", "up_proj", "down_proj")
Parts = dict[str, Quantized]


class Weights:
    """Matrices by their paths; each is an object with a `weight`."""

    def __init__(self, weights: Mapping[str, mx.array]):
        self.matrices = {path: SimpleNamespace(weight=w) for path, w in weights.items()}


class Expert(Weights):
    """One expert of a stack, called with `[N, H]`; returns the same shape."""

    def __init__(self, experts: Any, number: int):
        super().__init__({EXPERTS + name: experts[name].weight[number] for name in GLU})

    def __call__(self, x: mx.array) -> mx.array:
        gate, up, down = (self.matrices[EXPERTS + name].weight for name in GLU)
        return (nn.silu(x @ gate.T) * (x @ up.T)) @ down.T


def read_parts(file: Path) -> Parts:
    """All quantized matrices of a safetensors file, by module name."""
    stored: Any = mx.load(str(file))
    modules = [name.removesuffix(".scales") for name in stored if name.endswith(".scales")]
    parts: Any = {m: tuple(stored[f"{m}.{kind}"] for kind in KINDS) for m in sorted(modules)}
    return parts


def module_at(root: Any, path: str) -> Any:
    """The module at a path such as `mlp.experts.0`; or the matrix of that path in Weights."""
    if isinstance(root, Weights):
        return root.matrices[path]
    for name in path.split("."):
        root = root[int(name)] if name.isdigit() else root[name]
    return root
