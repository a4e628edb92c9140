"""A local checkpoint: its safetensors headers, checked, and rows of its tensors, read on demand."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from qwen35_mlx.config import read_config
from qwen35_mlx.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
HEADER_LIMIT_BYTES = 100_000_000
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
# What a weight may be stored as; numpy has no bfloat16, so its bits travel as uint16.
NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


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


@dataclass(frozen=True)
class Segment:
    """Rows `start_row` to `stop_row` of one source tensor."""

    tensor: SourceTensor
    start_row: int
    stop_row: int

    @property
    def nbytes(self) -> int:
        return (self.stop_row - self.start_row) * self.tensor.row_bytes


@dataclass(frozen=True)
class Source:
    """A checkpoint folder: parsed config.json and every tensor by name."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, SourceTensor]


def open_source(folder: Path) -> Source:
    """Read config.json, the index and all headers of `folder`; no weight is read."""
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint at {folder}",
            got="a file" if folder.exists() else "no such folder",
            expected="a local folder with config.json and *.safetensors",
            hint="download it first: hf download OWNER/NAME --local-dir FOLDER",
        )
    config = read_config(folder)
    index = _read_index(folder)
    files = _weight_files(folder) if index is None else sorted(set(index.values()))
    tensors: dict[str, SourceTensor] = {}
    for file in files:
        for tensor in read_header(folder / file):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"tensor {tensor.name} is stored twice",
                    got=f"{tensors[tensor.name].file.name} and {file}",
                    expected="one file",
                )
            tensors[tensor.name] = tensor
    if index is not None:
        _check_index(folder, index, tensors)
    return Source(folder, config, tensors)


def read_rows(tensor: SourceTensor, start: int, stop: int) -> mx.array:
    """Rows `start` to `stop` of a float tensor as `[rows, last dim]`; reads only their bytes."""
    buffer = np.empty((stop - start) * tensor.row_bytes, dtype=np.uint8)
    view, filled = buffer.data, 0
    try:
        with tensor.file.open("rb", buffering=0) as stream:
            stream.seek(tensor.offset + start * tensor.row_bytes)
            while filled < len(view) and (count := stream.readinto(view[filled:])):
                filled += count
    except OSError as error:
        raise CheckpointError(f"{tensor.file} cannot be read", got=error) from error
    if filled < len(view):
        raise CheckpointError(
            f"{tensor.file.name} ends inside tensor {tensor.name}",
            got=f"{filled} bytes",
            expected=f"{len(view)} bytes of rows {start} to {stop}",
            hint="the file changed while it was read: start again",
        )
    rows = mx.array(buffer.view(NUMPY_DTYPES[tensor.dtype]).reshape(stop - start, -1))
    return rows.view(mx.bfloat16) if tensor.dtype == "BF16" else rows


def read_header(file: Path) -> list[SourceTensor]:
    """Tensors of one safetensors file, in file order; every byte must belong to exactly one."""
    header, data_start, file_bytes = _parse_header(file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _damaged(file, "__metadata__ is not an object", metadata, "an object of strings")
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


def _parse_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON header, where the data starts, and the size of the file."""
    try:
        file_bytes = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_bytes > file_bytes - 8:
                raise CheckpointError(
                    f"{file.name} is truncated: its header is longer than the file",
                    got=f"{file_bytes} bytes",
                    expected=f"at least {8 + header_bytes} bytes",
                    hint="download the file again; a git-lfs pointer is not the file itself",
                )
            if header_bytes > HEADER_LIMIT_BYTES:
                raise _damaged(
                    file,
                    "the header is too long",
                    f"{header_bytes} bytes",
                    f"at most {HEADER_LIMIT_BYTES} bytes",
                )
            raw = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read", got=error) from error
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "the header is not JSON", error, "a JSON object") from None
    if not isinstance(header, dict):
        raise _damaged(file, "the header is not an object", type(header).__name__, "an object")
    return header, 8 + header_bytes, file_bytes


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
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


def _weight_files(folder: Path) -> list[str]:
    """Names of the weight files of a checkpoint without an index."""
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"no weights in {folder}",
            got="no *.safetensors file",
            expected="model.safetensors, or shards with model.safetensors.index.json",
            hint="pytorch *.bin checkpoints are not read",
        )
    return files


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name to file name, from the index; None when the folder has no index."""
    path = folder / INDEX_FILE
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read", got=error) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{path.name} has no weight_map", expected="an object of tensor name to file name"
        )
    for name, file in weight_map.items():
        plain = isinstance(file, str) and not set(file) & {"/", "\\", "\0"}
        if not plain or not file.endswith(".safetensors") or file.startswith(".."):
            raise CheckpointError(
                f"{path.name} names a file outside the folder or of another kind",
                got=f"{file!r} for tensor {name}",
                expected="a plain *.safetensors file name",
            )
    missing = sorted(file for file in set(weight_map.values()) if not (folder / file).is_file())
    if missing:
        raise CheckpointError(
            f"{_some(missing)} named in {path.name} is not in the folder",
            got=f"{len(missing)} missing of {len(set(weight_map.values()))} files",
            expected="every file of the index",
            hint="the download may not be complete",
        )
    return weight_map


def _check_index(folder: Path, index: dict[str, str], tensors: dict[str, SourceTensor]) -> None:
    wrong = sorted(
        name
        for name, file in index.items()
        if name not in tensors or tensors[name].file.name != file
    )
    if wrong:
        raise CheckpointError(
            f"tensors are not in the file that {INDEX_FILE} names",
            got=f"{_some(wrong)}, not in {index[wrong[0]]}",
            expected="every tensor of the index in its file",
        )
    unlisted = sorted(tensors.keys() - index.keys())
    stale = sorted({path.name for path in folder.glob("model*.safetensors")} - set(index.values()))
    if unlisted or stale:
        raise CheckpointError(
            f"the folder holds weights that {INDEX_FILE} does not list",
            got=_some(unlisted or stale),
            expected="index and files that agree",
            hint="remove the files of another download, or the index if it is out of date",
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
