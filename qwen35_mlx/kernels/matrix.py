"""How kernels see the weight of a linear layer: dense, or affine quantized in MLX's layout."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoint.quantization import BITS, GROUP_SIZES
from .metal import Template

FLOATS = (mx.bfloat16, mx.float16, mx.float32)
# Most rows of activations for which a decode kernel keeps its sums in registers.
MAX_ROWS = 8
# True: kernels convert integers to floats. False: they set bits of a mantissa, which takes fewer
# issue slots and gives the same numbers. To be changed if a Mac measures otherwise.
CONVERT = False
# Of a threadgroup.
SIMDGROUPS = 2
# Columns that one lane takes at a time; MLX passes smaller arrays than this in another way.
CHUNK, MIN_ELEMENTS = 32, 8


class Matrix(NamedTuple):
    """`[..., out, in]` for a kernel; dense, bits are 0 and the weight fills all three places."""

    arrays: tuple[mx.array, mx.array, mx.array]
    bits: int
    group_size: int
    in_dims: int

    @property
    def out_dims(self) -> int:
        """Rows, of each expert where they are stacked."""
        return self.arrays[0].shape[-2]

    def template(self, prefix: str) -> Template:
        """Bits and group size as template arguments."""
        return [(f"{prefix}_BITS", self.bits), (f"{prefix}_GROUP", self.group_size)]


@functools.cache
def names(*prefixes: str) -> tuple[str, ...]:
    """What the arrays of matrices are called in a kernel."""
    return tuple(f"{prefix}_{part}" for prefix in prefixes for part in ("w", "scales", "biases"))


def matrix(module: nn.Module) -> Matrix | None:
    """The weight of a linear layer or stack of experts; None if no kernel reads such a one."""
    # A module is a dict of its parameters; asked once a layer and token, so without ceremony.
    weight = module.get("weight")
    # A matrix with an adapter beside it has no weight of its own.
    if weight is None or "bias" in module:
        return None
    if "scales" not in module:
        in_dims = weight.shape[-1]
        usable = weight.dtype in FLOATS and in_dims % CHUNK == 0
        return Matrix((weight, weight, weight), 0, CHUNK, in_dims) if usable else None
    scales = module["scales"]
    bits, group_size = module.bits, module.group_size
    if module.mode != "affine" or bits not in BITS or group_size not in GROUP_SIZES:
        return None
    if scales.size < MIN_ELEMENTS or weight.size < MIN_ELEMENTS:
        return None
    arrays = (weight, scales, module["biases"])
    return Matrix(arrays, bits, group_size, scales.shape[-1] * group_size)


def arrays_of(tree: Any) -> dict[str, mx.array]:
    """All arrays of a tree, such as the parameters of a module, by their paths."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(tree)))


def matrices(modules: Sequence[nn.Module]) -> list[Matrix] | None:
    """All of them, or None if one of them is for no kernel."""
    found = [m for m in map(matrix, modules) if m is not None]
    return found if len(found) == len(modules) else None


def template(weights: Mapping[str, Matrix], num_tokens: int, lanes: int) -> Template:
    """What kernels of matrices are compiled for, by the prefixes of the matrices' names."""
    found = [t for prefix, w in weights.items() for t in w.template(prefix)]
    found += [("TOKENS", token_class(num_tokens)), ("LANES", lanes)]
    return [*found, ("CONVERT", CONVERT), ("SIMDGROUPS", SIMDGROUPS)]


def token_class(num_tokens: int) -> int:
    """For how many rows of activations a kernel is compiled that runs for so many."""
    return 1 << (num_tokens - 1).bit_length()


def rows_per_simdgroup(num_tokens: int) -> int:
    """How many rows of weights share what is loaded of x, with registers for all sums."""
    return 4 if num_tokens <= 4 else 2


def lanes_per_row(in_dims: int) -> int:
    """How many lanes share a row so that none is idle: a power of two up to 32."""
    chunks = in_dims // CHUNK
    return min(32, 1 << (chunks - 1).bit_length())
