"""The weight of a linear layer in the form for kernels: dense, or affine in MLX's layout."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoint.quantization import BITS, GROUP_SIZES
from .metal import Template

FLOATS = (mx.bfloat16, mx.float16, mx.float32)
# Maximum rows of activations for which a decode kernel keeps its sums in registers.
MAX_ROWS = 8
# True: kernels convert integers to floats. False: they set bits of a mantissa, which takes fewer
# issue slots and gives the same numbers. No Mac has measured which is faster.
CONVERT = False
# Number of simdgroups in a threadgroup.
SIMDGROUPS = 2
# Columns that a lane processes at a time; MLX passes arrays with fewer elements in another way.
CHUNK, MIN_ELEMENTS = 32, 8


class Matrix(NamedTuple):
    """`[..., out, in]` for a kernel; if dense, bits are 0 and the weight takes all three places."""

    arrays: tuple[mx.array, mx.array, mx.array]
    bits: int
    group_size: int
    in_dims: int

    @property
    def out_dims(self) -> int:
        """Number of rows, for each expert if they are stacked."""
        return self.arrays[0].shape[-2]

    def template(self, prefix: str) -> Template:
        """Bits and group size as template arguments."""
        return [(f"{prefix}_BITS", self.bits), (f"{prefix}_GROUP", self.group_size)]


@functools.cache
def names(*prefixes: str) -> tuple[str, ...]:
    """Names in a kernel of the arrays of matrices."""
    return tuple(f"{prefix}_{part}" for prefix in prefixes for part in ("w", "scales", "biases"))


def matrix(module: nn.Module) -> Matrix | None:
    """The weight of a linear layer or stack of experts; None if no kernel supports it."""
    # A module is a dict of its parameters. `get` is fast, and this runs for each layer and token.
    weight = module.get("weight")
    # A matrix with an adapter has no weight of its own.
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
    """The matrices of all modules, or None if no kernel supports one of them."""
    found = [m for m in map(matrix, modules) if m is not None]
    return found if len(found) == len(modules) else None


def template(weights: Mapping[str, Matrix], num_tokens: int, lanes: int) -> Template:
    """Template arguments of kernels for matrices, by the prefixes of the matrices' names."""
    found = [t for prefix, w in weights.items() for t in w.template(prefix)]
    found += [("TOKENS", token_class(num_tokens)), ("LANES", lanes)]
    return [*found, ("CONVERT", CONVERT), ("SIMDGROUPS", SIMDGROUPS)]


def token_class(num_tokens: int) -> int:
    """The number of rows for which the kernel is compiled that runs this many tokens."""
    return 1 << (num_tokens - 1).bit_length()


def rows_per_simdgroup(num_tokens: int) -> int:
    """Number of rows of weights that share the loaded part of x, with registers for all sums."""
    return 4 if num_tokens <= 4 else 2


def lanes_per_row(in_dims: int) -> int:
    """Number of lanes that share a row so that none is idle: a power of two up to 32."""
    chunks = in_dims // CHUNK
    return min(32, 1 << (chunks - 1).bit_length())
