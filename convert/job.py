"""One conversion: planned, recorded in a journal, resumable; the output appears when complete."""

import copy
import hashlib
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from qwen35_mlx import __version__
from qwen35_mlx.checkpoint.adapter import Adapter
from qwen35_mlx.checkpoint.headers import INDEX_FILE, SourceTensor
from qwen35_mlx.checkpoint.names import bare, output_name
from qwen35_mlx.checkpoint.quantization import quantization_block
from qwen35_mlx.checkpoint.resolver import refuse_other_head
from qwen35_mlx.checkpoint.tensor_table import Role
from qwen35_mlx.config import FULL, NEXT_TYPE, ModelConfig, next_as_moe, read_config
from qwen35_mlx.errors import CheckpointError, MemoryRefused, Qwen35Error
from qwen35_mlx.files import (
    locked,
    require_space,
    sync_folder,
    write_errors,
    write_file,
    write_json,
)
from qwen35_mlx.machine import memory_bytes
from qwen35_mlx.progress import ByteProgress
from qwen35_mlx.quant.statistics import Calibration

from .distilled import FINISH_BYTES, REPORT_FILE, Distillation, Distilled
from .hub import FIRST_BYTES, Fetcher, HubSource, fetch_range, is_hub_id, open_any
from .journal import JOB_FILE, JOURNAL_FILE, Journal, open_job, read_job
from .plan import DISTILL, Plan, plan
from .shards import sha256
from .source import Source, companion_name, read_rows
from .tasks import SLICE_BYTES, Task, cut, fetched_bytes
from .transform import NOTHING, Known
from .worker import Worker

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
FETCHED, DISTILLED = "source", "distilled"
# Disk space for headers, index and config.json.
SPARE_BYTES = 64 * 2**20
# Keys that mlx-lm and tokenizers read outside of text_config.
TOP_LEVEL_KEYS = (
    "architectures bos_token_id dtype eos_token_id pad_token_id torch_dtype transformers_version"
).split()


def convert(
    source: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    calibration: Calibration | None = None,
    distillation: Distillation | None = None,
    adapter: Adapter | None = None,
    keep_source: bool = False,
    progress: ByteProgress | None = None,
    **settings: Any,
) -> Path:
    """Convert `source`, a folder or a hub id, into the new folder `out`; `settings` as in `plan`.

    calibration: statistics of the same source. distillation: texts and settings for the method
    "distill". adapter: added to the weights before they are quantized. keep_source: keep downloaded
    shards in a folder beside `out`.
    Needs memory for a few slices of tensors, disk for the output, and for a hub id, for two or
    three shards. After an interruption, `out` does not exist, and the same call continues.
    Raises Qwen35Error for a source, settings or a disk that cannot be used.
    """
    out = Path(out).expanduser().absolute()
    refuse_existing(out)
    work = work_folder(out)
    opened = open_any(source, _started_revision(work, source, revision), work / FETCHED)
    planned = plan(opened, **settings)
    _check_calibration(planned, calibration)
    _check_distillation(planned, distillation, adapter)
    _check_adapter(planned, adapter)
    _check_copies(planned)
    tasks = cut(planned)
    companions = _companions(opened)
    known = Known(calibration, adapter)
    decided = _settings(planned, tasks, revision, known)
    decided |= {"distillation": distillation.settings} if distillation else {}
    needed = planned.output_bytes + sum(path.stat().st_size for path in companions) + SPARE_BYTES
    fetcher = None
    if isinstance(opened, HubSource):
        fetcher = Fetcher(opened, keep_source)
        needed += source_disk_bytes(opened, tasks, keep_source)
    with _locked(work, out, needed):
        open_job(work, out, decided, opened.fingerprints())
        reports = []
        if distillation:
            # Imported here, because only this method needs the model.
            from .distill import distill

            reports = distill(planned, distillation, work / DISTILLED)
            distilled = Distilled(work / DISTILLED, distillation.facts)
            known = known._replace(distilled=distilled)
        journal = Journal(work / JOURNAL_FILE)
        try:
            worker = Worker(planned, tasks, work, journal, fetcher, progress, known)
            checksums = worker.run()
        finally:
            journal.close()
        write_json(work / INDEX_FILE, _index(planned))
        for path in companions:
            target = work / companion_name(path)
            target.parent.mkdir(exist_ok=True)
            write_file(target, path.read_bytes())
            sync_folder(target.parent)
        small = [INDEX_FILE, *map(companion_name, companions)]
        if reports:
            write_json(work / REPORT_FILE, [asdict(report) for report in reports])
            small.append(REPORT_FILE)
        checksums = dict(sorted(checksums.items())) | {n: sha256(work / n) for n in small}
        # Last, because no program reads a folder without config.json.
        write_json(work / "config.json", output_config(planned, checksums, known))
        refuse_existing(out)
        if (work / FETCHED).exists():
            if keep_source:
                (work / FETCHED).rename(_kept_folder(out))
            else:
                shutil.rmtree(work / FETCHED)
        shutil.rmtree(work / DISTILLED, ignore_errors=True)
        sync_folder(work)
        work.rename(out)
        # After the renaming: if the process is killed here, the folder is complete.
        for name in (JOB_FILE, JOURNAL_FILE):
            (out / name).unlink()
    sync_folder(out.parent)
    return out


def verify(folder: str | Path, progress: ByteProgress | None = None) -> int:
    """Compare the files of a converted folder with their checksums; returns their bytes.

    Raises CheckpointError if files are missing or differ.
    """
    folder = Path(folder)
    ours = read_config(folder).get("qwen35_mlx")
    checksums = ours.get("sha256") if isinstance(ours, dict) else None
    if not isinstance(checksums, dict) or not checksums:
        raise CheckpointError(
            f"{folder} has no checksums", expected="a folder of qwen35-mlx convert"
        )
    paths = {name: folder / companion_name(Path(name)) for name in checksums}
    total = sum(path.stat().st_size for path in paths.values() if path.exists())
    done, wrong = 0, []
    for name, path in paths.items():
        if progress:
            progress(done, total, "", name)
        if not path.exists():
            wrong.append(f"{name} is missing")
        elif sha256(path) != checksums[name]:
            wrong.append(f"{name} has another checksum")
        done += path.stat().st_size if path.exists() else 0
    if progress:
        progress(done, total, "", "")
    if wrong:
        raise CheckpointError(
            f"{folder} differs from what was converted",
            got="; ".join(wrong[:5]),
            expected=f"{len(checksums)} files with the checksums in config.json",
            hint="convert or copy it again",
        )
    return total


def work_folder(out: Path) -> Path:
    """The hidden folder beside `out` that contains an unfinished conversion."""
    return out.with_name(f".{out.name}.converting")


def source_disk_bytes(source: HubSource, tasks: list[Task], keep_source: bool) -> int:
    """Disk space for downloaded shards: all of them if they are kept, otherwise the peak."""
    sizes = {name: file.nbytes for name, file in source.listing.items()}
    if keep_source:
        return sum(sizes[file.name] for file in source.files)
    return fetched_bytes(tasks, sizes)


def _kept_folder(out: Path) -> Path:
    kept = out.with_name(f"{out.name}-source")
    return kept if not kept.exists() else out.with_name(f"{out.name}-source-{os.getpid()}")


def _started_revision(work: Path, source: str | Path, revision: str | None) -> str | None:
    """The commit of a started job, so that it continues if the branch has moved."""
    started = read_job(work).get("settings", {})
    same = (str(source), revision) == (started.get("source"), started.get("revision"))
    return started["source_revision"] if same and is_hub_id(source) else revision


def _check_calibration(planned: Plan, calibration: Calibration | None) -> None:
    """Raise Qwen35Error if the calibration is of another model, or lacks Hessians for GPTQ."""
    planned.refuse_other(calibration)
    # A distillation collects its own Hessians.
    wants = planned.settings["method"] != DISTILL and any(
        entry.method == "gptq" for entry in planned.entries
    )
    if wants and not (calibration and calibration.hessians):
        raise Qwen35Error(
            "method='gptq' needs a calibration with Hessians",
            hint="calibrate with --method gptq, or use --method search",
        )


def _check_distillation(
    planned: Plan, distillation: Distillation | None, adapter: Adapter | None
) -> None:
    """Raise Qwen35Error if a distillation is not possible; MemoryRefused if it does not fit."""
    is_asked = planned.settings["method"] == DISTILL
    if is_asked != (distillation is not None):
        raise Qwen35Error(f"method={DISTILL!r} and the argument distillation need each other")
    if is_asked and adapter is not None:
        raise Qwen35Error(
            f"an adapter cannot be combined with method={DISTILL!r}",
            hint="use another method, or convert without the adapter",
        )
    if distillation and distillation.finish_tokens:
        needed = FINISH_BYTES * sum(entry.num_parameters for entry in planned.text_entries)
        if needed > (limit := memory_bytes()):
            raise MemoryRefused(
                "the training of the whole model does not fit in memory",
                got=f"{needed / 1e9:,.1f} GB",
                expected=f"at most {limit / 1e9:,.1f} GB",
                hint="omit --finish-tokens: then only single layers are trained",
            )
    if is_asked and isinstance(planned.source, HubSource):
        raise Qwen35Error(
            "distillation reads each layer of the source several times",
            got=planned.source.origin["source"],
            expected="a folder on this machine",
        )


def _check_adapter(planned: Plan, adapter: Adapter | None) -> None:
    """Raise Qwen35Error if the adapter is of another model, or the source is quantized."""
    if adapter is None:
        return
    entries = {entry.module: entry for entry in planned.entries if entry.role is not Role.CARRIED}
    problems = []
    for name, change in adapter.changes.items():
        entry = entries.get(name)
        if entry is None or entry.shape != change.shape:
            problems.append(f"{name} {list(entry.shape) if entry else 'is missing'}")
        elif entry.bits is not None and entry.method is None:
            raise Qwen35Error(
                "the source is quantized: rounding would remove most of the adapter",
                got=f"{name} with {entry.bits} bits",
                expected="the original checkpoint of the model",
            )
    if problems:
        raise CheckpointError(
            "the adapter does not fit the source",
            got="; ".join(problems[:4]),
            expected="the model that the adapter was trained for",
        )


def _check_copies(planned: Plan) -> None:
    """Raise CheckpointError if a head that would be dropped differs from the embedding."""
    for head, embedding in planned.copies:
        if not _same(planned.source, head, embedding):
            raise refuse_other_head(head, embedding)


def _same(source: Source, a: SourceTensor, b: SourceTensor) -> bool:
    """Whether two tensors are equal; on the hub, only their first bytes are compared."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if isinstance(source, HubSource):
        nbytes = min(a.nbytes, FIRST_BYTES)
        first, second = (
            fetch_range(source.repo, source.commit, t.file.name, t.offset, t.offset + nbytes)
            for t in (a, b)
        )
        return first == second
    step = max(SLICE_BYTES // a.row_bytes, 1)
    parts = ((i, min(i + step, a.num_rows)) for i in range(0, a.num_rows, step))
    return all(np.array_equal(read_rows(a, *part), read_rows(b, *part)) for part in parts)


def _settings(
    planned: Plan, tasks: list[Task], revision: str | None, known: Known
) -> dict[str, Any]:
    """Everything that determines the bytes of the output, for JSON."""
    rows = [(t.name, t.dtype, t.shape) for shard in planned.shards for t in shard.tensors]
    modules = [(e.module, e.bits, e.group_size, e.method) for e in planned.entries]
    layout = repr((rows, modules, len(tasks), SLICE_BYTES)).encode()
    return {
        **planned.source.origin,
        **({"revision": revision} if revision else {}),
        **planned.settings,
        **({"calibration": known.calibration.digest} if known.calibration else {}),
        **({"adapter": known.adapter.digest} if known.adapter else {}),
        "plan": hashlib.sha256(layout).hexdigest()[:16],
        "version": __version__,
        "mlx": version("mlx"),
        "device": str(mx.default_device()),
    }


def output_config(
    planned: Plan, checksums: dict[str, str], known: Known = NOTHING
) -> dict[str, Any]:
    """The config.json of the output: nested, complete for mlx-lm, with our block `qwen35_mlx`."""
    config, model = copy.deepcopy(planned.source.config), planned.config
    for level in (config, config.get("text_config") or {}):
        for key in ("quantization", "quantization_config"):
            level.pop(key, None)
    if config.get("model_type") == NEXT_TYPE:
        config = next_as_moe(config) | {"architectures": ["Qwen3_5MoeForCausalLM"]}
    kind = "qwen3_5_moe" if model.is_moe else "qwen3_5"
    if not config.get("text_config"):
        outer = {key: config[key] for key in TOP_LEVEL_KEYS if key in config}
        config = {**outer, "text_config": {**config, "model_type": f"{kind}_text"}}
    # mlx-lm has no outer type for text-only models.
    config["model_type"] = kind
    text = config["text_config"]
    for level in (config, text):
        # The path on the machine that saved the checkpoint.
        level.pop("_name_or_path", None)
        level["tie_word_embeddings"] = model.tie_word_embeddings
    _complete_text_config(text, model)
    if planned.quantization:
        block = planned.quantization | _carried_settings(planned)
        config["quantization"] = config["quantization_config"] = block
    config["qwen35_mlx"] = {
        "format_version": FORMAT_VERSION,
        "version": __version__,
        **planned.source.origin,
        "settings": planned.settings,
        # For `fidelity`: an adapter that is in the weights is not attached again.
        **({"adapter": known.adapter.digest} if known.adapter else {}),
        # For `fidelity`: the overlap of its text with these.
        **({"calibration": known.calibration.facts} if known.calibration else {}),
        **({"distillation": known.distilled.facts} if known.distilled else {}),
        "norms_shifted": True,
        "mtp_norms_shifted": True,
        "sha256": checksums,
    }
    return config


def _carried_settings(planned: Plan) -> dict[str, Any]:
    """The entries of a quantized source's config.json for carried modules without a plan entry."""
    said = quantization_block(planned.source.config).items()
    block = {output_name(bare(key)): value for key, value in said}
    known = {entry.module for entry in planned.entries if entry.bits is not None}
    roots = ("mtp.", "vision_tower.")
    return {
        key: value for key, value in block.items() if key.startswith(roots) and key not in known
    }


def _complete_text_config(text: dict[str, Any], model: ModelConfig) -> None:
    """Add what mlx-lm would otherwise guess."""
    # mlx-lm does not read layer_types, only an interval, by default 4.
    text.pop("full_attention_interval", None)
    kinds = [kind == FULL for kind in model.layer_types]
    for interval in range(1, len(kinds) + 2):
        if kinds == [(i + 1) % interval == 0 for i in range(len(kinds))]:
            text["full_attention_interval"] = interval
            break
    else:
        log.warning(
            "layer_types have no fixed interval: qwen35-mlx can run the output, mlx-lm cannot"
        )
    rope = text["rope_parameters"]
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("partial_rotary_factor", text.get("partial_rotary_factor"))
    if (yarn := model.rope).factor is None:
        return
    assert yarn.attention_factor is not None
    # mlx-lm computes attention_factor from mscale; it does not accept null, or 0 as a default.
    rope |= {
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "attention_factor": yarn.attention_factor,
        "mscale": (yarn.attention_factor - 1) / (0.1 * math.log(yarn.factor) or 1),
        "mscale_all_dim": 0,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    if not yarn.truncate:
        log.warning("YaRN without truncation: qwen35-mlx runs it as it is, mlx-lm truncates")


def _index(planned: Plan) -> dict[str, Any]:
    weight_map = {n: s.file for s in planned.shards for t in s.tensors for n in t.names}
    return {
        "metadata": {
            "total_size": planned.output_bytes,
            "total_parameters": planned.num_parameters,
        },
        "weight_map": dict(sorted(weight_map.items())),
    }


def _companions(source: Source) -> list[Path]:
    """The tokenizer, template and licence files of the source. Warns if there is no tokenizer."""
    found = source.companions()
    names = {path.name for path in found}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        log.warning(
            "%s has no tokenizer.json: the output cannot be loaded without one",
            source.origin["source"],
        )
    return found


def refuse_existing(out: Path) -> None:
    """Raise Qwen35Error if `out` exists."""
    if os.path.lexists(out):
        raise Qwen35Error(
            f"{out} exists already",
            expected="a folder that does not exist",
            hint="choose another name, or remove it first",
        )


def _check_space(work: Path, needed_bytes: int) -> None:
    # Space of an earlier run can be used. Blocks, because files may have holes.
    used_bytes = sum(path.stat().st_blocks * 512 for path in work.rglob("*") if path.is_file())
    require_space(work, needed_bytes - used_bytes, "write to another disk, or use fewer bits")


@contextmanager
def _locked(work: Path, out: Path, needed_bytes: int) -> Iterator[None]:
    """Within the block, hold a lock on the folder `work`, which is created if necessary.

    After an error, the folder is kept if it contains finished work. Raises Qwen35Error.
    """
    try:
        _check_space(work, needed_bytes)
        work.mkdir(parents=True, exist_ok=True)
        lock = ExitStack()
        lock.enter_context(locked(work, wait=False))
    except BlockingIOError:
        raise Qwen35Error(
            f"another conversion to {out} is running", hint="wait for it, or stop it"
        ) from None
    except OSError as error:
        raise Qwen35Error(f"cannot write to the folder of {out}", got=error) from error
    try:
        with write_errors(
            out, "free disk space and repeat the command: it continues where it stopped"
        ):
            yield
    except BaseException:
        journal = work / JOURNAL_FILE
        begun = any((work / name).exists() for name in (FETCHED, DISTILLED))
        if not (journal.exists() and journal.stat().st_size) and not begun:
            shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        lock.close()
