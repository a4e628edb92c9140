"""Writes safetensors files; the header is written before the data."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import mlx.core as mx
import numpy as np

from qwen35_mlx.checkpoint.headers import PREFIX_BYTES
from qwen35_mlx.checkpoint.names import OF_EXPERTS
from qwen35_mlx.checkpoint.tensor_table import Role
from qwen35_mlx.files import flush, sync_folder

from .plan import OutputTensor, Plan

METADATA = {"format": "mlx"}
# Page size of macOS; data at a multiple of it can be read without a copy.
PAGE_BYTES = 16_384


class ShardWriter:
    """Writes one file in any order, under a temporary name until it is complete.

    Continues an existing temporary file. Several threads may write, each to regions of its own.
    """

    def __init__(self, path: Path, tensors: Sequence[OutputTensor]):
        self.path = path
        self._partial = path.with_name(f".{path.name}.partial")
        header = _header(tensors)
        end = len(header)
        # By tensor: its offset, its bytes, the bytes of one piece, and the stride of pieces.
        self._places: dict[str, tuple[int, int, int, int]] = {}
        for together in _groups(tensors):
            num_pieces, stride = _pieces(together)
            start = end
            for tensor in together:
                piece = tensor.nbytes // num_pieces
                self._places[tensor.name] = start, tensor.nbytes, piece, stride
                start += piece
            end += num_pieces * stride
        self.missing_bytes = end - len(header)
        self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if os.pread(self._file, len(header), 0) != header:
            os.ftruncate(self._file, 0)
            write_all(self._file, header, 0)
        os.ftruncate(self._file, end)

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Write `data` at byte `start` of tensor `name`. Raises RuntimeError beyond its end."""
        if (excess := start + len(data) - self._places[name][1]) > 0:
            raise RuntimeError(f"{name}: {excess} bytes too many")
        for offset, nbytes in self._ranges(name, start, len(data)):
            write_all(self._file, data[:nbytes], offset)
            data = data[nbytes:]

    def read(self, name: str, start: int, nbytes: int) -> bytes:
        """Read `nbytes` bytes of tensor `name` from byte `start` on, before `finish`."""
        return b"".join(os.pread(self._file, n, at) for at, n in self._ranges(name, start, nbytes))

    def _ranges(self, name: str, start: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """The offset in the file and the length of each piece of these bytes of a tensor."""
        begin, _, piece, stride = self._places[name]
        while nbytes > 0:
            index, inside = divmod(start, piece)
            length = min(piece - inside, nbytes)
            yield begin + index * stride + inside, length
            start, nbytes = start + length, nbytes - length

    def sync(self) -> None:
        """Flush everything that was written to the disk."""
        flush(self._file)

    def finish(self) -> str:
        """Rename the complete file to its final name; returns its SHA-256.

        Raises RuntimeError if `missing_bytes`, which the caller counts down, is not 0.
        """
        if self.missing_bytes:
            raise RuntimeError(f"{self.path.name}: {self.missing_bytes} bytes are missing")
        self.sync()
        self.close()
        digest = sha256(self._partial)
        self._partial.rename(self.path)
        sync_folder(self.path.parent)
        return digest

    def close(self) -> None:
        """Close the file; an incomplete file stays under its temporary name."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def raw_bytes(array: mx.array) -> memoryview:
    """The bytes of an array with one or more dims."""
    return np.asarray(array.view(mx.uint8)).reshape(-1).data


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at byte `offset` of a file."""
    view = memoryview(data)
    while view:
        # On a full disk, a part is written before the error.
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def text_header_bytes(plan: Plan) -> int:
    """Header bytes of all files, except files that contain only carried tensors."""
    return sum(
        len(_header(shard.tensors))
        for shard in plan.shards
        if any(entry.role is not Role.CARRIED for entry in shard.entries)
    )


def _header(tensors: Sequence[OutputTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": METADATA}
    offset = 0
    for together in _groups(tensors):
        num_pieces, _ = _pieces(together)
        for names in zip(*(tensor.names for tensor in together), strict=True):
            for tensor, name in zip(together, names, strict=True):
                end = offset + tensor.nbytes // num_pieces
                entries[name] = {
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape[tensor.is_apart :]),
                    "data_offsets": [offset, end],
                }
                offset = end
    raw = json.dumps(entries, separators=(",", ":")).encode()
    # Padded with spaces: data start at a multiple of 8, separate experts at a multiple of a page.
    multiple = PAGE_BYTES if any(tensor.is_apart for tensor in tensors) else 8
    raw += b" " * (-(PREFIX_BYTES + len(raw)) % multiple)
    return len(raw).to_bytes(PREFIX_BYTES, "little") + raw


def _groups(tensors: Sequence[OutputTensor]) -> list[list[OutputTensor]]:
    """Groups of tensors with alternating pieces: the stacks of a layer's separate experts."""
    layer = (t.name.partition(OF_EXPERTS)[0] if t.is_apart else t.name for t in tensors)
    keyed = zip(layer, tensors, strict=True)
    return [[tensor for _, tensor in found] for _, found in groupby(keyed, lambda pair: pair[0])]


def _pieces(together: Sequence[OutputTensor]) -> tuple[int, int]:
    """The number of pieces of each tensor, and the bytes of one piece of all tensors together."""
    num_pieces = together[0].shape[0] if together[0].is_apart else 1
    return num_pieces, sum(tensor.nbytes for tensor in together) // num_pieces
