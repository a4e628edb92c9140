"""Headers of safetensors files and their index; every byte must belong to one tensor."""

import json
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .names import is_mtp, is_of_tower

log = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
# Some releases keep these parts in separate files that the index does not list.
SIDECARS = {"*vision*.safetensors": is_of_tower, "*mtp*.safetensors": is_mtp}
HEADER_LIMIT_BYTES = 100_000_000
PREFIX_BYTES = 8
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
# Types of unquantized weights.
FLOATS = ("F32", "F16", "BF16")
FP8 = "F8_E4M3"


@dataclass(frozen=True)
class SourceTensor:
    """Where a tensor is stored. All dims except the last count as rows; a vector is one row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    # Whether the metadata of its file say that MLX wrote it.
    by_mlx: bool = False

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.nbytes // max(self.num_rows, 1)


def read_header(file: Path) -> list[SourceTensor]:
    """Tensors of one safetensors file, in file order."""
    raw = raw_header(file)[PREFIX_BYTES:]
    return parse_header(file, raw, file.stat().st_size)


def raw_header(file: Path) -> bytes:
    """The bytes of a safetensors file before its tensors."""
    try:
        with file.open("rb") as stream:
            prefix = stream.read(PREFIX_BYTES)
            return prefix + stream.read(header_length(file, prefix, file.stat().st_size))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read", got=error) from error


def header_length(file: Path, prefix: bytes, file_bytes: int) -> int:
    """Length of the JSON after the first 8 bytes of `file`."""
    header_bytes = int.from_bytes(prefix, "little")
    if len(prefix) < PREFIX_BYTES or header_bytes > file_bytes - PREFIX_BYTES:
        raise CheckpointError(
            f"{file.name} is truncated: its header is longer than the file",
            got=f"{file_bytes} bytes",
            expected=f"at least {PREFIX_BYTES + header_bytes} bytes",
            hint="download the file again; a git-lfs pointer is not the file itself",
        )
    if header_bytes > HEADER_LIMIT_BYTES:
        limit = f"at most {HEADER_LIMIT_BYTES} bytes"
        raise _damaged(file, "the header is too long", f"{header_bytes} bytes", limit)
    return header_bytes


def parse_header(file: Path, raw: bytes, file_bytes: int) -> list[SourceTensor]:
    """Tensors of `file` from the JSON of its header; every byte must belong to exactly one."""
    try:
        header = json.loads(raw, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "the header is not JSON", error, "a JSON object") from None
    if not isinstance(header, dict):
        raise _damaged(file, "the header is not an object", type(header).__name__, "an object")
    metadata = header.pop("__metadata__", None)
    # MLX writes null where there is none.
    if not isinstance(metadata, dict | None):
        raise _damaged(file, "__metadata__ is not an object", metadata, "an object of strings")
    data_start = PREFIX_BYTES + len(raw)
    by_mlx = (metadata or {}).get("format") == "mlx"
    tensors = [_tensor(file, name, entry, data_start, by_mlx) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    end, before = data_start, "the header"
    for tensor in tensors:
        if tensor.offset != end:
            kind = "overlaps" if tensor.offset < end else "leaves a gap after"
            what = f"tensor {tensor.name} {kind} {before}"
            got, expected = (f"offset {at - data_start}" for at in (tensor.offset, end))
            raise _damaged(file, what, got, expected)
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
    """For json.loads: refuse an object with a repeated key."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} appears twice")
    return result


def gather(headers: Iterable[Iterable[SourceTensor]]) -> dict[str, SourceTensor]:
    """The tensors of all files by name; no tensor may be in two files."""
    tensors: dict[str, SourceTensor] = {}
    for tensor in chain.from_iterable(headers):
        if tensor.name in tensors:
            raise CheckpointError(
                f"tensor {tensor.name} is stored twice",
                got=f"{tensors[tensor.name].file.name} and {tensor.file.name}",
                expected="one file",
            )
        tensors[tensor.name] = tensor
    return tensors


def read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name; refuses files outside of the folder."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
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
    return weight_map


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files in a folder; a link must lead somewhere."""
    # Without the ._* files that macOS makes on foreign drives; pathlib's glob finds them.
    found = (path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    return sorted(path.name for path in found if path.is_file())


def read_headers(folder: Path, strict: bool = False) -> dict[str, SourceTensor]:
    """All tensors of a folder by name; reads no weight. `strict` as in `gather_checked`."""
    path = folder / INDEX_FILE
    index = read_index(path) if path.exists() else None

    def headers(files: Iterable[str]) -> Iterable[list[SourceTensor]]:
        return (read_header(folder / file) for file in files)

    return gather_checked(folder, weight_files(folder), index, headers, strict)


def gather_checked(
    where: str | Path,
    present: Collection[str],
    index: Mapping[str, str] | None,
    headers: Callable[[Iterable[str]], Iterable[list[SourceTensor]]],
    strict: bool,
) -> dict[str, SourceTensor]:
    """All tensors by name: of the files of the index, else of model.safetensors, else of all.

    `present`: the existing weight files; `headers` reads the headers of files. Files and tensors
    that the index does not list are ignored, or refused if `strict`, except for a vision tower or
    an MTP layer in a separate file, which is taken.
    """
    if index is None:
        tensors = gather(headers(_files_without_index(where, present, strict)))
    else:
        files = set(index.values())
        if missing := sorted(files - set(present)):
            raise CheckpointError(
                f"{some(missing)} named in {INDEX_FILE} is not in the folder",
                got=f"{len(missing)} missing of {len(files)} files",
                expected="every file of the index",
                hint="the download may not be complete",
            )
        tensors = gather(headers(sorted(files)))
        _check_index(index, present, tensors, strict)
    read = {tensor.file.name for tensor in tensors.values()}
    for pattern, belongs in SIDECARS.items():
        beside = sorted(file for file in present if fnmatch(file, pattern) and file not in read)
        if not beside or any(map(belongs, tensors)):
            continue
        found = gather(headers(beside))
        if all(map(belongs, found)):
            tensors |= found
        else:
            log.warning("%s is not read: it has tensors of other kinds", some(beside))
    return tensors


def is_sidecar(file: str) -> bool:
    """Whether a file of this name may hold a part of the model that the index does not list."""
    return any(fnmatch(file, pattern) for pattern in SIDECARS)


def _files_without_index(where: str | Path, present: Collection[str], strict: bool) -> list[str]:
    """model.safetensors, else all files named model*, else all files."""
    if not present:
        raise CheckpointError(
            f"no weights in {where}",
            got="no *.safetensors file",
            expected="model.safetensors, or shards with model.safetensors.index.json",
            hint="pytorch *.bin checkpoints are not read",
        )
    whole = "model.safetensors"
    others = sorted(file for file in present if not is_sidecar(file)) or sorted(present)
    named = [file for file in others if strict or file.startswith("model")]
    return [whole] if whole in present else named or others


def _check_index(
    index: Mapping[str, str],
    present: Collection[str],
    tensors: Mapping[str, SourceTensor],
    strict: bool,
) -> None:
    """Every tensor of the index must exist; if `strict`, in its file, and there are no others."""
    wrong = sorted(
        name
        for name, file in index.items()
        if name not in tensors or (strict and tensors[name].file.name != file)
    )
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensor(s) are not in the file that {INDEX_FILE} names",
            got=f"{some(wrong)}, not in {index[wrong[0]]}",
            expected="every tensor of the index in its file",
            hint="download or convert the folder again",
        )
    shards = {f for f in present if f.startswith("model") and not is_sidecar(f)}
    unlisted = sorted(tensors.keys() - index.keys()) or sorted(shards - set(index.values()))
    if unlisted and strict:
        raise CheckpointError(
            f"the folder holds weights that {INDEX_FILE} does not list",
            got=some(unlisted),
            expected="index and files that agree",
            hint="remove the files of another download, or the index if it is out of date",
        )


def some(names: Iterable[str]) -> str:
    """The first three names, and the number of the others."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _tensor(file: Path, name: str, entry: Any, data_start: int, by_mlx: bool) -> SourceTensor:
    # Control characters would reach the terminal; lone surrogates cannot be written to a file.
    if not name.isprintable():
        raise _damaged(file, "the name of a tensor", ascii(name), "printable characters")
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
        expected = f"{nbytes} bytes ({dtype} {shape})"
        raise _damaged(file, f"length of tensor {name}", f"{end - begin} bytes", expected)
    return SourceTensor(name, dtype, tuple(shape), file, data_start + begin, nbytes, by_mlx)


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
