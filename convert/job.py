"""One conversion from folder to folder: the output appears whole, or not at all."""

import copy
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qwen35_mlx import __version__
from qwen35_mlx.config import FULL, ModelConfig
from qwen35_mlx.errors import Qwen35Error

from .plan import DEFAULT_METHOD, Plan, Recipe, plan
from .source import INDEX_FILE
from .stream import Progress, stream

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
# Headers, index and config.json: small, but not nothing.
SPARE_BYTES = 64 * 2**20
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
# What mlx-lm and tokenizers look for outside text_config.
TOP_LEVEL_KEYS = (
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    bits: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    method: str = DEFAULT_METHOD,
    progress: Progress | None = None,
) -> Path:
    """Convert the checkpoint folder `source` into the new folder `out`; settings as in `plan`.

    Needs memory for one slice of a tensor and disk for the output. Whatever stops it, Ctrl-C
    included, `out` does not exist afterwards.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser().absolute()
    _refuse_existing(out)
    planned = plan(
        source, recipe=recipe, bits=bits, group_size=group_size, dtype=dtype, method=method
    )
    companions = _companions(source)
    copied_bytes = sum(path.stat().st_size for path in companions)
    _check_space(out, planned.output_bytes + copied_bytes + SPARE_BYTES)
    with _work_folder(out) as work:
        checksums = stream(planned, work, progress)
        _write_json(work / INDEX_FILE, _index(planned))
        for path in companions:
            _write(work / path.name, path.read_bytes())
        # Last: a folder without config.json is nothing to any program.
        _write_json(work / "config.json", output_config(planned, checksums))
        _sync_folder(work)
        _refuse_existing(out)
        work.rename(out)
    _sync_folder(out.parent)
    return out


def output_config(planned: Plan, checksums: dict[str, str]) -> dict[str, Any]:
    """The config.json of the output: nested, complete for mlx-lm, with our own facts."""
    config, model = copy.deepcopy(planned.source.config), planned.config
    if not config.get("text_config"):
        kind = "qwen3_5_moe" if model.is_moe else "qwen3_5"
        outer = {key: config[key] for key in TOP_LEVEL_KEYS if key in config}
        config = {
            **outer,
            "model_type": kind,
            "text_config": {**config, "model_type": f"{kind}_text"},
        }
    text = config["text_config"]
    for level in (config, text):
        # Where the checkpoint lay on the machine that saved it.
        level.pop("_name_or_path", None)
        level["tie_word_embeddings"] = model.tie_word_embeddings
    _complete_text_config(text, model)
    if planned.quantization:
        config["quantization"] = config["quantization_config"] = planned.quantization
    config["qwen35_mlx"] = {
        "format_version": FORMAT_VERSION,
        "version": __version__,
        **_origin(planned.source.folder),
        "settings": {
            "bits": planned.bits,
            "group_size": planned.group_size,
            "dtype": planned.dtype,
            "recipe": planned.recipe_name,
            "method": planned.method,
        },
        "norms_shifted": True,
        "sha256": checksums,
    }
    return config


def _complete_text_config(text: dict[str, Any], model: ModelConfig) -> None:
    """Say what mlx-lm would otherwise guess."""
    # mlx-lm knows no layer_types, only a period; it guesses 4 without one.
    text.pop("full_attention_interval", None)
    kinds = [kind == FULL for kind in model.layer_types]
    for interval in range(1, len(kinds) + 2):
        if kinds == [(i + 1) % interval == 0 for i in range(len(kinds))]:
            text["full_attention_interval"] = interval
            break
    else:
        log.warning("layer_types have no period: this project runs the output, mlx-lm does not")
    rope = text["rope_parameters"]
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("partial_rotary_factor", text.get("partial_rotary_factor"))


def _origin(folder: Path) -> dict[str, str]:
    """Name of the source: that of its folder, or repository and revision in a hub cache."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        name = repository.removeprefix("models--").replace("--", "/")
        return {"source": name, "source_revision": folder.name}
    return {"source": folder.name}


def _index(planned: Plan) -> dict[str, Any]:
    weight_map = {t.name: shard.file for shard in planned.shards for t in shard.tensors}
    return {
        "metadata": {
            "total_size": planned.output_bytes,
            "total_parameters": planned.num_parameters,
        },
        "weight_map": dict(sorted(weight_map.items())),
    }


def _companions(source: Path) -> list[Path]:
    """Tokenizer, template and licence files of the source."""
    found = [path for name in COMPANIONS for path in sorted(source.glob(name)) if path.is_file()]
    if not any(path.name == "tokenizer.json" for path in found):
        log.warning("%s has no tokenizer.json: the output will not load without one", source)
    return found


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise Qwen35Error(
            f"{out} exists already",
            expected="a folder that does not exist yet",
            hint="choose another name, or remove it first",
        )


def _check_space(out: Path, needed_bytes: int) -> None:
    existing = next(parent for parent in out.parents if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise Qwen35Error(
            f"not enough disk space in {existing}",
            got=f"{free_bytes / 1e9:.2f} GB free",
            expected=f"{needed_bytes / 1e9:.2f} GB",
        )


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, locked while in use, and gone if the block fails."""
    work = out.with_name(f".{out.name}.converting")
    try:
        if work.is_dir():
            # An earlier job was killed, unless one still holds the lock.
            os.close(_lock(work, out))
            shutil.rmtree(work)
        work.mkdir(parents=True)
        lock = _lock(work, out)
    except OSError as error:
        raise Qwen35Error(f"cannot write beside {out}", got=error) from error
    try:
        yield work
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            raise Qwen35Error(f"cannot write {out}", got=error) from error
        raise
    finally:
        os.close(lock)


def _lock(work: Path, out: Path) -> int:
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Qwen35Error(
            f"another conversion to {out} is running", hint="wait for it, or stop it"
        ) from None
    except OSError:
        # Some network drives know no locks; two jobs at once are rarer than such drives.
        pass
    return descriptor


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    # Not every file system can; the files themselves are safe already.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
