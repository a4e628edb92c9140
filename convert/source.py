"""A checkpoint in a folder: config, index and headers checked, rows read on demand."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from qwen35_mlx.config import read_config
from qwen35_mlx.errors import CheckpointError

from .headers import PREFIX_BYTES, SourceTensor, read_header, unique_keys

INDEX_FILE = "model.safetensors.index.json"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)
# What a weight may be stored as; numpy has no bfloat16 and no float8, so their bits travel.
NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
FP8 = "F8_E4M3"


@dataclass(frozen=True)
class Segment:
    """Rows `start_row` to `stop_row` of one source tensor; FP8 has scales, one for each `block`."""

    tensor: SourceTensor
    start_row: int
    stop_row: int
    scale: SourceTensor | None = None
    block: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        return (self.stop_row - self.start_row) * self.tensor.row_bytes

    @property
    def files(self) -> frozenset[Path]:
        """Where its bytes lie."""
        return frozenset(t.file for t in (self.tensor, self.scale) if t)


@dataclass(frozen=True)
class Source:
    """A checkpoint: parsed config.json, every tensor by name, and where it comes from."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, SourceTensor]

    @property
    def origin(self) -> dict[str, str]:
        """Name of its folder, or repository and revision in a hub cache."""
        folder = self.folder.resolve()
        repository = folder.parent.parent.name
        if folder.parent.name == "snapshots" and repository.startswith("models--"):
            name = repository.removeprefix("models--").replace("--", "/")
            return {"source": name, "source_revision": folder.name}
        return {"source": folder.name}

    @property
    def files(self) -> list[Path]:
        """The weight files, by name."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    def fingerprints(self) -> dict[str, str]:
        """What tells each weight file from another version of it, by name."""
        return {file.name: _fingerprint(file) for file in self.files}

    def companions(self) -> list[Path]:
        """Tokenizer, template and licence files."""
        found = [path for name in COMPANIONS for path in sorted(self.folder.glob(name))]
        return [path for path in found if path.is_file()]


def open_source(folder: Path) -> Source:
    """Read config.json, the index and all headers of `folder`; no weight is read."""
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint at {folder}",
            got="a file" if folder.exists() else "no such folder",
            expected="a folder with config.json and *.safetensors",
            hint="a hub id is written OWNER/NAME",
        )
    config = read_config(folder)
    path = folder / INDEX_FILE
    index = read_index(path) if path.exists() else None
    if index is None:
        files = _weight_files(folder)
    else:
        files = sorted(set(index.values()))
        check_present(files, [file for file in files if (folder / file).is_file()])
    tensors = gather(files, lambda file: read_header(folder / file))
    if index is not None:
        check_index(index, tensors, {path.name for path in folder.glob("model*.safetensors")})
    return Source(folder, config, tensors)


def gather(
    files: Iterable[str], read: Callable[[str], list[SourceTensor]]
) -> dict[str, SourceTensor]:
    """The tensors of all files by name; none may be in two of them."""
    tensors: dict[str, SourceTensor] = {}
    for file in files:
        for tensor in read(file):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"tensor {tensor.name} is stored twice",
                    got=f"{tensors[tensor.name].file.name} and {file}",
                    expected="one file",
                )
            tensors[tensor.name] = tensor
    return tensors


def read_rows(tensor: SourceTensor, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop` as stored, `[rows, last dim]`; reads only their bytes."""
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
    return buffer.view(NUMPY_DTYPES.get(tensor.dtype, "<u1")).reshape(stop - start, -1)


def as_mlx(rows: np.ndarray, dtype: str) -> mx.array:
    """Rows of a float tensor stored as `dtype`, for MLX."""
    array = mx.array(rows)
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def _fingerprint(file: Path) -> str:
    """Length, time of change and header: all but the weights themselves."""
    stat = file.stat()
    with file.open("rb") as stream:
        prefix = stream.read(PREFIX_BYTES)
        header = prefix + stream.read(int.from_bytes(prefix, "little"))
    digest = hashlib.sha256(header).hexdigest()[:16]
    return f"{stat.st_size} bytes, changed at {stat.st_mtime_ns}, header {digest}"


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


def read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name; no file outside of the folder."""
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


def check_present(wanted: Iterable[str], present: Iterable[str]) -> None:
    """Every file of the index must be there."""
    wanted = set(wanted)
    if missing := sorted(wanted - set(present)):
        raise CheckpointError(
            f"{_some(missing)} named in {INDEX_FILE} is not in the folder",
            got=f"{len(missing)} missing of {len(wanted)} files",
            expected="every file of the index",
            hint="the download may not be complete",
        )


def check_index(index: dict[str, str], tensors: dict[str, SourceTensor], present: set[str]) -> None:
    """Index and headers must agree; `present` are the model*.safetensors files there are."""
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
    stale = sorted(present - set(index.values()))
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
