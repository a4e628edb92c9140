"""Find a model by path or hub id; unsupported models are refused before weights are downloaded."""

import re
from collections.abc import Iterable
from glob import escape
from pathlib import Path

from ..checkpoint.formats import is_named_by_mlx, refuse_foreign
from ..checkpoint.headers import INDEX_FILE, SIDECARS, is_sidecar, read_index, weight_files
from ..config import ModelConfig, read_config
from ..errors import CheckpointError, first_line

# Without *.py: no code of a checkpoint is ever run.
SMALL_FILES = ("*.json", "*.jinja", "*.txt")
# And parts of the model that the index does not list.
ALWAYS = (*SMALL_FILES, *SIDECARS)


def resolve(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder at a path, or of a hub id `owner/name`, downloaded or from the hub's cache."""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_hub_id)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name:
        raise CheckpointError(
            f"no model at {name}",
            got="a file" if folder.exists() else "no such folder",
            expected="a converted folder, or a hub id such as owner/name",
        )
    folder = _download(name, revision, SMALL_FILES)
    config = read_config(folder)
    ModelConfig.from_hf(config)
    if (folder / INDEX_FILE).exists():
        index = read_index(folder / INDEX_FILE)
        refuse_foreign(config, index)
        if not is_named_by_mlx(index) and not any(n.endswith(".scales") for n in index):
            raise not_converted(name)
        # Escaped, because the names are no patterns.
        return _download(name, revision, (*ALWAYS, *map(escape, sorted({*index.values()}))))
    folder = _download(name, revision, (*ALWAYS, "model*.safetensors"))
    if not all(map(is_sidecar, weight_files(folder))):
        return folder
    return _download(name, revision, (*SMALL_FILES, "*.safetensors"))


def not_converted(origin: str | Path) -> CheckpointError:
    """The error for a checkpoint that has to be converted first."""
    return CheckpointError(
        f"{origin} holds a checkpoint that is not converted",
        got="weights as Hugging Face has them",
        expected="a folder that qwen35-mlx or mlx-lm wrote",
        hint=f"run: qwen35-mlx convert {origin} OUT",
    )


def _download(name: str, revision: str | None, patterns: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    # Network and hub errors have many classes.
    except Exception as error:
        raise CheckpointError(
            f"cannot get {name} from the hub",
            got=f"{type(error).__name__}: {first_line(error)}",
            expected="a folder on this machine, or a hub id that it can reach",
        ) from error
