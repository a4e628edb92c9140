"""A safetensors file with a checksum, written in pieces, so that other work can run in between.

Its last tensor is the SHA-256 of all bytes before it, with the header.
"""

import hashlib
import json
from collections.abc import Generator, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..files import replacing
from ..model.expert_files import STORED

PIECE_BYTES = 32 * 2**20
NAMES = {dtype: name for name, (_, dtype) in STORED.items()}
METADATA, CHECKSUM, CHECKSUM_BYTES = "__metadata__", "sha256", 32


def write_file(
    file: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]
) -> Generator[None, None, int]:
    """Write a file, whole or not at all; yields after every 32 MiB. Returns its size."""
    header: dict[str, object] = {METADATA: dict(metadata)}
    end = 0
    for name, array in arrays.items():
        place = [end, end := end + array.nbytes]
        header[name] = _entry(NAMES[array.dtype], list(array.shape), place)
    header[CHECKSUM] = _entry("U8", [CHECKSUM_BYTES], [end, end + CHECKSUM_BYTES])
    text = json.dumps(header).encode()
    head = len(text).to_bytes(8, "little") + text
    digest, waiting = hashlib.sha256(head), 0
    with replacing(file, 0o600) as temporary, temporary.open("wb") as out:
        out.write(head)
        for array in arrays.values():
            # As bytes, because numpy has no bfloat16.
            words = mx.contiguous(array).reshape(-1).view(mx.uint8)
            data = np.array(words, copy=False).data
            out.write(data)
            digest.update(data)
            waiting += len(data)
            if waiting >= PIECE_BYTES:
                waiting = 0
                yield
        out.write(digest.digest())
    return len(head) + end + CHECKSUM_BYTES


def _entry(dtype: str, shape: list[int], place: list[int]) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": place}


def read_file(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The tensors and the metadata of a file; raises ValueError or OSError if it is damaged."""
    data = memoryview(file.read_bytes())
    body, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if hashlib.sha256(body).digest() != checksum:
        raise ValueError(f"the checksum of {file.name} does not match")
    start = 8 + int.from_bytes(body[:8], "little")
    header = json.loads(bytes(body[8:start]))
    metadata = header.pop(METADATA)
    del header[CHECKSUM]
    arrays = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        words = np.frombuffer(body[start + first : start + end], np.uint8)
        arrays[name] = mx.array(words).view(STORED[entry["dtype"]][1]).reshape(entry["shape"])
    # Another thread cannot use a lazy array.
    mx.eval(arrays)
    return arrays, metadata
