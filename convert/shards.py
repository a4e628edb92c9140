"""Writes safetensors files; a header is written before any of the data."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from qwen35_mlx.checkpoint.headers import PREFIX_BYTES
from qwen35_mlx.checkpoint.tensor_table import Role
from qwen35_mlx.files import flush, sync_folder

from .plan import OutputTensor, Plan

METADATA = {"format": "mlx"}


class ShardWriter:
    """Writes one file in any order, under a temporary name until it is complete.

    Continues an existing temporary file. Threads may write at the same time, as each call has its
    own region.
    """

    def __init__(self, path: Path, tensors: Sequence[OutputTensor]):
        self.path = path
        self._partial = path.with_name(f".{path.name}.partial")
        header = _header(tensors)
        # First byte and end of each tensor.
        self._range: dict[str, tuple[int, int]] = {}
        end = len(header)
        for tensor in tensors:
            start, end = end, end + tensor.nbytes
            self._range[tensor.name] = start, end
        self.missing_bytes = end - len(header)
        self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if os.pread(self._file, len(header), 0) != header:
            os.ftruncate(self._file, 0)
            write_all(self._file, header, 0)
        os.ftruncate(self._file, end)

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Write `data` at byte `start` of tensor `name`."""
        begin, end = self._range[name]
        if (excess := begin + start + len(data) - end) > 0:
            raise RuntimeError(f"{name}: {excess} bytes too many")
        write_all(self._file, data, begin + start)

    def read(self, name: str, start: int, nbytes: int) -> bytes:
        """`nbytes` bytes of the temporary file from byte `start` of tensor `name` on."""
        return os.pread(self._file, nbytes, self._range[name][0] + start)

    def sync(self) -> None:
        """Return when all written bytes would survive a loss of power."""
        flush(self._file)

    def finish(self) -> str:
        """Give the complete file its name; returns its SHA-256."""
        if self.missing_bytes:
            raise RuntimeError(f"{self.path.name}: {self.missing_bytes} bytes are missing")
        self.sync()
        self.close()
        digest = sha256(self._partial)
        self._partial.rename(self.path)
        sync_folder(self.path.parent)
        return digest

    def close(self) -> None:
        """Close the file; a temporary file stays."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write `data` at byte `offset` of a file."""
    view = memoryview(data)
    while view:
        # On a full disk a part is written before the error.
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def text_header_bytes(plan: Plan) -> int:
    """Header bytes of all files except those with carried tensors only."""
    return sum(
        len(_header(shard.tensors))
        for shard in plan.shards
        if any(entry.role is not Role.CARRIED for entry in shard.entries)
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
    # Padded with spaces: the data begin at a multiple of 8.
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(PREFIX_BYTES, "little") + raw
