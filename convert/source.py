"""A checkpoint in a folder: config, index and headers checked, rows read on demand."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from qwen35_mlx.checkpoint.headers import SourceTensor, raw_header, read_headers
from qwen35_mlx.checkpoint.resolver import Resolved, resolve
from qwen35_mlx.config import read_config
from qwen35_mlx.errors import CheckpointError

COMPANIONS = """
tokenizer.json tokenizer_config.json vocab.json merges.txt special_tokens_map.json added_tokens.json
chat_template.jinja chat_template.json additional_chat_templates/*.jinja generation_config.json
preprocessor_config.json video_preprocessor_config.json processor_config.json LICENSE*
""".split()
TEMPLATE_FOLDER = "additional_chat_templates"
# numpy has no bfloat16 and no float8: their bits are read as integers.
NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def companion_name(path: Path) -> str:
    """The name of a companion file in the output; the only possible folder is that of templates."""
    folder = path.parent.name
    return f"{folder}/{path.name}" if folder == TEMPLATE_FOLDER else path.name


@dataclass(frozen=True)
class Source:
    """A checkpoint: its folder, the parsed config.json, and all tensors by name."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, SourceTensor]

    @cached_property
    def resolved(self) -> Resolved:
        """The parameters of the model, matched to the tensors."""
        return resolve(self.config, self.tensors)

    @property
    def origin(self) -> dict[str, str]:
        """The name of the folder; in a hub cache, repository and revision."""
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
        """A value for each weight file, by name, that changes with the file."""
        return {file.name: _fingerprint(file) for file in self.files}

    def companions(self) -> list[Path]:
        """Tokenizer, template and licence files."""
        found = [path for name in COMPANIONS for path in sorted(self.folder.glob(name))]
        return [path for path in found if path.is_file()]


def open_source(folder: Path) -> Source:
    """Read config.json, the index and all headers of `folder`, but no weights.

    Raises ConfigError or CheckpointError.
    """
    check_folder(folder, "a hub id is written OWNER/NAME")
    return Source(folder, read_config(folder), read_headers(folder, strict=True))


def check_folder(folder: Path, hint: str = "") -> None:
    """Raise CheckpointError if `folder` is not a folder."""
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint at {folder}",
            got="a file" if folder.exists() else "no such folder",
            expected="a folder with config.json and *.safetensors",
            hint=hint,
        )


def read_rows(tensor: SourceTensor, start: int, stop: int) -> np.ndarray:
    """Read rows `start` to `stop` as stored, `[rows, last dim]`. Raises CheckpointError."""
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
            hint="the file changed during the conversion: start again",
        )
    return buffer.view(NUMPY_DTYPES.get(tensor.dtype, "<u1")).reshape(stop - start, -1)


def as_mlx(rows: np.ndarray, dtype: str) -> mx.array:
    """Rows from `read_rows` of a float tensor as an MLX array; `dtype`: the stored one."""
    array = mx.array(rows)
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def _fingerprint(file: Path) -> str:
    """The size of a file, its time of modification, and a digest of its header."""
    stat, digest = file.stat(), hashlib.sha256(raw_header(file)).hexdigest()[:16]
    return f"{stat.st_size} bytes, changed at {stat.st_mtime_ns}, header {digest}"
