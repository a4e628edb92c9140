"""Activations of a whole text between two layers: in memory, or in a temporary file."""

# B texts, T tokens, H hidden.

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import mlx.core as mx
import numpy as np

from qwen35_mlx.checkpoint.headers import read_header

from .plan import DTYPES, OutputTensor
from .shards import ShardWriter

STORED = {getattr(mx, name): dtype for name, dtype in DTYPES.items()}


class Activations:
    """`[B, T, H]`, of which texts or tokens are read as arrays."""

    def __init__(self, rows: Any, dtype: mx.Dtype):
        """rows: an array, or its bytes `[B, T, H * size]` as numpy maps them."""
        self._rows, self.dtype = rows, dtype
        *texts, width = rows.shape
        self.shape = (*texts, width if isinstance(rows, mx.array) else width // dtype.size)

    @classmethod
    def joined(cls, parts: Iterable[mx.array], folder: Path | None) -> "Activations":
        """Join arrays `[b, T, H]`, each evaluated alone; with a folder, in a file without a name.

        Such a file is gone with its last user, however the process ends.
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
                file.write(_bytes(part))
                num_texts, (_, *tokens, width), dtype = (
                    num_texts + len(part),
                    part.shape,
                    part.dtype,
                )
            file.flush()
            shape = num_texts, *tokens, width * dtype.size
            return cls(np.memmap(file, np.uint8, "r", 0, shape), dtype)

    def __getitem__(self, texts: slice) -> mx.array:
        return self._read(self._rows[texts])

    def tokens(self, at: np.ndarray) -> mx.array:
        """Activations `[n, H]` of tokens, counted through all texts."""
        rows = self._rows.reshape(-1, self._rows.shape[-1])
        return self._read(rows[mx.array(at) if isinstance(rows, mx.array) else at])

    def _read(self, rows: Any) -> mx.array:
        return rows if isinstance(rows, mx.array) else mx.array(rows).view(self.dtype)


def save(file: Path, named: Mapping[str, Activations], batches: Sequence[slice]) -> None:
    """Write a safetensors file, whole or not at all, a batch at a time."""
    tensors = [OutputTensor(name, STORED[rows.dtype], rows.shape) for name, rows in named.items()]
    writer = ShardWriter(file, tensors)
    for name, rows in named.items():
        at = 0
        for texts in batches:
            data = _bytes(rows[texts])
            writer.write(name, at, data)
            at += data.nbytes
        writer.missing_bytes -= at
    writer.finish()


def load(file: Path, on_disk: bool) -> dict[str, Activations]:
    """What `save` wrote: in memory, or read from the file on demand."""
    dtypes = {stored: dtype for dtype, stored in STORED.items()}
    found = {}
    for tensor in read_header(file):
        shape = *tensor.shape[:-1], tensor.row_bytes
        rows: Any = np.memmap(file, np.uint8, "r", tensor.offset, shape)
        dtype = dtypes[tensor.dtype]
        found[tensor.name] = Activations(rows if on_disk else mx.array(rows).view(dtype), dtype)
    return found


def _bytes(array: mx.array) -> memoryview:
    return memoryview(np.array(array.view(mx.uint8)))  # type: ignore[arg-type]
