"""Bits, group sizes and modes of quantized weights; those of a checkpoint, from its shapes."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ConfigError
from .headers import FLOATS, SourceTensor
from .names import bare

log = logging.getLogger(__name__)

# The settings that this project writes, and has kernels for.
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# Mode -> bits and group sizes of MLX; with other group sizes MLX may divide by zero.
MODES = {
    "affine": ((1, *BITS), GROUP_SIZES),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


class Quantization(NamedTuple):
    """How one matrix is quantized."""

    bits: int
    group_size: int
    mode: str = "affine"

    def as_config(self) -> dict[str, Any]:
        """An entry of config.json; without a mode, mlx-lm assumes affine."""
        entry: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits}
        return entry if self.mode == "affine" else entry | {"mode": self.mode}


def infer(
    in_dims: int, weight: SourceTensor, scales: SourceTensor, biases: SourceTensor | None
) -> Quantization | None:
    """The only quantization of a matrix with `in_dims` columns that fits shapes and types."""
    packed_bits, num_groups = 32 * weight.shape[-1], scales.shape[-1]
    if not num_groups or packed_bits % in_dims or in_dims % num_groups:
        return None
    bits, group_size = packed_bits // in_dims, in_dims // num_groups
    # Affine scales are floats, with biases; scales of the other modes are bytes, without biases.
    affine = scales.dtype in FLOATS and biases is not None
    microscaled = scales.dtype == "U8" and biases is None
    for mode, (all_bits, group_sizes) in MODES.items():
        fits = affine if mode == "affine" else microscaled
        if fits and bits in all_bits and group_size in group_sizes:
            return Quantization(bits, group_size, mode)
    return None


def quantization_block(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization block of config.json, of any program; empty without one."""
    text = config.get("text_config")
    levels = [config, text if isinstance(text, Mapping) else {}]
    found = [level.get(key) for level in levels for key in ("quantization", "quantization_config")]
    return next((block for block in found if isinstance(block, Mapping) and block), {})


class Claims:
    """What config.json says about quantized modules. Files decide; differences are collected."""

    def __init__(self, config: Mapping[str, Any]):
        self.block = quantization_block(config)
        # Some programs leave out leading components of the names.
        self.entries = {bare(key): value for key, value in self.block.items()}
        self.num_quantized = 0
        self.differences: list[str] = []

    def compare(self, names: Sequence[str], found: Quantization) -> None:
        """Record a difference of config.json and files; a module may have several names."""
        self.num_quantized += 1
        entry = next((self.entries[name] for name in names if name in self.entries), None)
        claim = self._claim(entry if isinstance(entry, Mapping) else self.block)
        if entry is False:
            claim = {"quantized": False}
        wrong = {key: value for key, value in claim.items() if value != getattr(found, key, None)}
        if wrong:
            says = ", ".join(f"{key}={value!r}" for key, value in wrong.items())
            self.differences.append(f"{names[0]} ({says}; the files: {found.as_config()})")

    def _claim(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """The stated settings of an entry; null means a default."""
        claim = {k: entry[k] for k in Quantization._fields if entry.get(k) is not None}
        mode = claim.get("mode", "affine")
        if not isinstance(mode, str) or mode not in MODES:
            raise ConfigError(
                f"quantization mode {mode!r} is not supported",
                got=repr(mode),
                expected=", ".join(MODES),
            )
        return claim

    def warn(self) -> None:
        """Warn where the files were followed instead of config.json."""
        if self.num_quantized and not self._claim(self.block):
            log.warning("config.json does not say how the weights are quantized: taken from them")
        if self.differences:
            log.warning(
                "config.json says otherwise of %d quantized tensors, the files count: %s",
                len(self.differences),
                self.differences[0],
            )


def common_quantization(found: Iterable[Quantization], config: Mapping[str, Any]) -> Quantization:
    """The default of a quantization block: that of `config` if it occurs, else the commonest."""
    block = quantization_block(config)
    stated = block.get("bits"), block.get("group_size"), block.get("mode", "affine")
    all_found = list(found)
    return max(all_found, key=lambda one: (one == stated, all_found.count(one)))
