"""Headers of safetensors files: parsed, and refused unless every byte belongs to one tensor."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35_mlx.errors import CheckpointError

HEADER_LIMIT_BYTES = 100_000_000
PREFIX_BYTES = 8
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class SourceTensor:
    """Where a tensor lies; its rows are all dims but the last, and a vector is one row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.nbytes // max(self.num_rows, 1)


def read_header(file: Path) -> list[SourceTensor]:
    """Tensors of one safetensors file, in file order."""
    try:
        file_bytes = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = header_length(file, stream.read(PREFIX_BYTES), file_bytes)
            raw = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read", got=error) from error
    return parse_header(file, raw, file_bytes)


def header_length(file: Path, prefix: bytes, file_bytes: int) -> int:
    """Bytes of the JSON that follows the first 8 bytes of `file`."""
    header_bytes = int.from_bytes(prefix, "little")
    if len(prefix) < PREFIX_BYTES or header_bytes > file_bytes - PREFIX_BYTES:
        raise CheckpointError(
            f"{file.name} is truncated: its header is longer than the file",
            got=f"{file_bytes} bytes",
            expected=f"at least {PREFIX_BYTES + header_bytes} bytes",
            hint="download the file again; a git-lfs pointer is not the file itself",
        )
    if header_bytes > HEADER_LIMIT_BYTES:
        raise _damaged(
            file,
            "the header is too long",
            f"{header_bytes} bytes",
            f"at most {HEADER_LIMIT_BYTES} bytes",
        )
    return header_bytes


def parse_header(file: Path, raw: bytes, file_bytes: int) -> list[SourceTensor]:
    """Tensors of `file` from the JSON of its header; every byte must belong to exactly one."""
    try:
        header = json.loads(raw, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "the header is not JSON", error, "a JSON object") from None
    if not isinstance(header, dict):
        raise _damaged(file, "the header is not an object", type(header).__name__, "an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _damaged(file, "__metadata__ is not an object", metadata, "an object of strings")
    data_start = PREFIX_BYTES + len(raw)
    tensors = [_tensor(file, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    end, before = data_start, "the header"
    for tensor in tensors:
        if tensor.offset != end:
            kind = "overlaps" if tensor.offset < end else "leaves a gap after"
            raise _damaged(
                file,
                f"tensor {tensor.name} {kind} {before}",
                f"offset {tensor.offset - data_start}",
                f"offset {end - data_start}",
            )
        end, before = tensor.offset + tensor.nbytes, tensor.name
        if end > file_bytes:
            raise CheckpointError(
                f"{file.name} is truncated: tensor {tensor.name} ends after the file",
                got=f"{file_bytes} bytes",
                expected=f"at least {end} bytes",
                hint="download the file again",
            )
    if end != file_bytes:
        raise _damaged(file, "bytes after the last tensor", f"{file_bytes} bytes", f"{end} bytes")
    return tensors


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: an object in which no key comes twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} appears twice")
    return result


def _tensor(file: Path, name: str, entry: Any, data_start: int) -> SourceTensor:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _damaged(
            file, f"entry of tensor {name}", entry, "an object with dtype, shape, data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _damaged(file, f"dtype of tensor {name}", dtype, ", ".join(ITEM_BYTES))
    if not _whole_numbers(shape):
        raise _damaged(file, f"shape of tensor {name}", shape, "a list of whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise _damaged(file, f"data_offsets of tensor {name}", offsets, "[begin, end]")
    begin, end = offsets
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != nbytes:
        raise _damaged(
            file,
            f"length of tensor {name}",
            f"{end - begin} bytes",
            f"{nbytes} bytes ({dtype} {shape})",
        )
    return SourceTensor(name, dtype, tuple(shape), file, data_start + begin, nbytes)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values
    )


def _damaged(file: Path, what: str, got: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{file.name} is damaged: {what}",
        got=str(got)[:200],
        expected=expected,
        hint="download the file again",
    )
