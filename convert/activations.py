"""Activations of a whole text between two layers: in memory, or in a temporary file."""

# B texts, T tokens, H hidden size.

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import mlx.core as mx
import numpy as np

from qwen35_mlx.checkpoint.headers import read_header

from .plan import OutputTensor
from .shards import ShardWriter, raw_bytes
from .transform import MLX_DTYPES

STORED = {dtype: code for code, dtype in MLX_DTYPES.items()}


class Activations:
    """Activations `[B, T, H]` in memory or in a file; texts or tokens are read as arrays."""

    def __init__(self, rows: Any, dtype: mx.Dtype):
        """rows: an MLX array `[B, T, H]`, or a numpy memory map `[B, T, H * item bytes]`."""
        self._rows, self.dtype = rows, dtype
        *texts, width = rows.shape
        self.shape = (*texts, width if isinstance(rows, mx.array) else width // dtype.size)

    @classmethod
    def joined(cls, parts: Iterable[mx.array], folder: Path | None) -> "Activations":
        """Concatenate arrays `[b, T, H]`, evaluated one by one, in memory or in a file in `folder`.

        The file has no name: the system deletes it when the process ends.
        """
        if folder is None:
            kept = []
            for part in parts:
                mx.eval(part)
                kept.append(part)
            return cls(mx.concatenate(kept), kept[0].dtype)
        with TemporaryFile(dir=folder) as file:
            num_texts = 0
            for part in parts:
                file.write(raw_bytes(part))
                num_texts += len(part)
            file.flush()
            shape = num_texts, part.shape[1], part.shape[2] * part.itemsize
            return cls(np.memmap(file, np.uint8, "r", 0, shape), part.dtype)

    def __getitem__(self, texts: slice) -> mx.array:
        return self._read(self._rows[texts])

    def tokens(self, at: np.ndarray) -> mx.array:
        """Activations `[n, H]` of the tokens with the indices `at [n]` in `[B * T]`."""
        rows = self._rows.reshape(-1, self._rows.shape[-1])
        return self._read(rows[mx.array(at) if isinstance(rows, mx.array) else at])

    def _read(self, rows: Any) -> mx.array:
        return rows if isinstance(rows, mx.array) else mx.array(rows).view(self.dtype)


def save(file: Path, named: Mapping[str, Activations], batches: Sequence[slice]) -> None:
    """Write a safetensors file atomically, one batch at a time."""
    tensors = [OutputTensor(name, STORED[rows.dtype], rows.shape) for name, rows in named.items()]
    writer = ShardWriter(file, tensors)
    for name, rows in named.items():
        at = 0
        for texts in batches:
            data = raw_bytes(rows[texts])
            writer.write(name, at, data)
            at += len(data)
        writer.missing_bytes -= at
    writer.finish()


def load(file: Path, on_disk: bool) -> dict[str, Activations]:
    """Read a file of `save`: into memory, or with `on_disk` only what is accessed."""
    found = {}
    for tensor in read_header(file):
        shape = *tensor.shape[:-1], tensor.row_bytes
        rows: Any = np.memmap(file, np.uint8, "r", tensor.offset, shape)
        dtype = MLX_DTYPES[tensor.dtype]
        found[tensor.name] = Activations(rows if on_disk else mx.array(rows).view(dtype), dtype)
    return found
