"""Write a safetensors file whose header is known before any of its data."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from qwen35_mlx.files import flush, sync_folder
from qwen35_mlx.headers import PREFIX_BYTES
from qwen35_mlx.tensor_table import Role

from .plan import OutputTensor, Plan

METADATA = {"format": "mlx"}


class ShardWriter:
    """One file, filled in any order, under a temporary name until it is whole.

    An existing temporary file is gone on with. Threads may write at once: each call has its own
    region.
    """

    def __init__(self, path: Path, tensors: Sequence[OutputTensor]):
        self.path = path
        self._partial = path.with_name(f".{path.name}.partial")
        header = _header(tensors)
        self._start: dict[str, int] = {}
        end = len(header)
        for tensor in tensors:
            self._start[tensor.name] = end
            end += tensor.nbytes
        self._end = {t.name: self._start[t.name] + t.nbytes for t in tensors}
        self.missing_bytes = end - len(header)
        self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if os.pread(self._file, len(header), 0) != header:
            os.ftruncate(self._file, 0)
            write_all(self._file, header, 0)
        os.ftruncate(self._file, end)

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Write `data` at byte `start` of tensor `name`."""
        begin = self._start[name] + start
        if begin + len(data) > self._end[name]:
            raise RuntimeError(f"{name}: {begin + len(data) - self._end[name]} bytes too many")
        write_all(self._file, data, begin)

    def read(self, name: str, start: int, nbytes: int) -> bytes:
        """What lies at byte `start` of tensor `name`."""
        return os.pread(self._file, nbytes, self._start[name] + start)

    def sync(self) -> None:
        """Return when all that was written survives a loss of power."""
        flush(self._file)

    def finish(self) -> str:
        """Give the whole file its name; returns its SHA-256."""
        if self.missing_bytes:
            raise RuntimeError(f"{self.path.name}: {self.missing_bytes} bytes did not come")
        self.sync()
        self.close()
        digest = sha256(self._partial)
        self._partial.rename(self.path)
        sync_folder(self.path.parent)
        return digest

    def close(self) -> None:
        """Leave the temporary file as it is."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write `data` at byte `offset` of a file."""
    view = memoryview(data)
    while view:
        # A full disk writes a part before it fails.
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def text_header_bytes(plan: Plan) -> int:
    """Bytes that are no tensor, of all files that hold more than carried tensors."""
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
    # Padded with spaces, so that the data begin at a multiple of 8.
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(PREFIX_BYTES, "little") + raw
