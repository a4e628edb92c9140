"""Write a safetensors file whose header is known before any of its data."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import mlx.core as mx
import numpy as np

from .names import Role
from .plan import OutputTensor, Plan

METADATA = {"format": "mlx"}


class ShardWriter:
    """One file, filled tensor by tensor and piece by piece, under a temporary name until whole.

    Pieces of one tensor come in order, tensors in any. Leaving the block without an error
    checks that every byte came, and sets `sha256`.
    """

    def __init__(self, path: Path, tensors: Sequence[OutputTensor]):
        self.path, self.sha256 = path, ""
        self._partial = path.with_name(f".{path.name}.partial")
        self._next: dict[str, int] = {}
        self._end: dict[str, int] = {}
        header = _header(tensors)
        offset = len(header)
        for tensor in tensors:
            self._next[tensor.name] = offset
            offset += tensor.nbytes
            self._end[tensor.name] = offset
        self._stream = self._partial.open("w+b")
        self._stream.write(header)

    def write(self, name: str, piece: mx.array) -> None:
        """Append `piece` to the region of tensor `name`."""
        data = _bytes(piece)
        start = self._next[name]
        if start + len(data) > self._end[name]:
            raise RuntimeError(f"{name}: {start + len(data) - self._end[name]} bytes too many")
        self._stream.seek(start)
        self._stream.write(data)
        self._next[name] = start + len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stream:
            if kind is not None:
                return
            if lacking := [name for name, end in self._end.items() if self._next[name] != end]:
                raise RuntimeError(f"{self.path.name}: data of {lacking} did not come")
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.seek(0)
            self.sha256 = hashlib.file_digest(self._stream, "sha256").hexdigest()
        self._partial.rename(self.path)


def header_bytes(plan: Plan, carried: bool = True) -> int:
    """Bytes of all files that are no tensor, of those that hold more than carried tensors."""
    return sum(
        len(_header(shard.tensors))
        for shard in plan.shards
        if carried or any(entry.role is not Role.CARRIED for entry in shard.entries)
    )


def _header(tensors: Sequence[OutputTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": METADATA}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(entries, separators=(",", ":")).encode()
    # Padded with spaces, so that the data begin at a multiple of 8.
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _bytes(piece: mx.array) -> memoryview:
    if piece.dtype == mx.bfloat16:
        piece = piece.view(mx.uint16)
    return np.array(piece).reshape(-1).view(np.uint8).data
