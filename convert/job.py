"""One conversion: planned, journaled, resumed after any stop; the output appears whole."""

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

from .distilled import REPORT_FILE, Distillation, Distilled, finish_bytes
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
# Headers, index and config.json: small, but not nothing.
SPARE_BYTES = 64 * 2**20
# What mlx-lm and tokenizers look for outside text_config.
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
    """Convert `source`, a folder or a hub id, into the new folder `out`; `settings` as in `plan`,
    and what `calibrate` found out about the same source. An adapter is added to the weights before
    they are quantized. Method "distill" needs a calibration with Hessians and a distillation.

    Needs memory for a few slices of tensors, disk for the output and, from the hub, for two or
    three shards of the source; `keep_source` keeps them all, beside `out`. Whatever stops it, `out`
    does not exist and the same call goes on where this one stopped.
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
            # Here: it imports the model, which no other conversion needs.
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
        # Last: a folder without config.json is nothing to any program.
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
        # After the new name: killed in between, the folder is complete and has two files too many.
        for name in (JOB_FILE, JOURNAL_FILE):
            (out / name).unlink()
    sync_folder(out.parent)
    return out


def verify(folder: str | Path, progress: ByteProgress | None = None) -> int:
    """Read every file of a converted folder again; returns the number of bytes compared.

    Raises CheckpointError for each file that is not as it was written.
    """
    folder = Path(folder)
    ours = read_config(folder).get("qwen35_mlx")
    checksums = ours.get("sha256") if isinstance(ours, dict) else None
    if not isinstance(checksums, dict) or not checksums:
        raise CheckpointError(
            f"{folder} has no checksums", expected="a folder that qwen35-mlx converted"
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
            f"{folder} is not as it was written",
            got="; ".join(wrong[:5]),
            expected=f"{len(checksums)} files with the checksums in config.json",
            hint="convert or copy it again",
        )
    return total


def work_folder(out: Path) -> Path:
    """The hidden folder beside `out` where a conversion grows."""
    return out.with_name(f".{out.name}.converting")


def source_disk_bytes(source: HubSource, tasks: list[Task], keep_source: bool) -> int:
    """Disk for shards from the hub: all of them if they are kept, else the most at any time."""
    sizes = {name: file.nbytes for name, file in source.listing.items()}
    if keep_source:
        return sum(sizes[file.name] for file in source.files)
    return fetched_bytes(tasks, sizes)


def _kept_folder(out: Path) -> Path:
    kept = out.with_name(f"{out.name}-source")
    return kept if not kept.exists() else out.with_name(f"{out.name}-source-{os.getpid()}")


def _started_revision(work: Path, source: str | Path, revision: str | None) -> str | None:
    """The commit of a started job, so that a branch that moved on does not end it."""
    started = read_job(work).get("settings", {})
    same = (str(source), revision) == (started.get("source"), started.get("revision"))
    return started["source_revision"] if same and is_hub_id(source) else revision


def _check_calibration(planned: Plan, calibration: Calibration | None) -> None:
    """It must be of this model; and error feedback cannot do without."""
    planned.refuse_other(calibration)
    # A distillation collects its own.
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
    """It goes with its method, and trains the weights that the source has."""
    is_asked = planned.settings["method"] == DISTILL
    if is_asked and distillation is None:
        raise Qwen35Error(
            f"method={DISTILL!r} needs texts to train on", hint="give convert a distillation"
        )
    if distillation is not None and not is_asked:
        raise Qwen35Error("a distillation is given", expected=f"method={DISTILL!r} with it")
    if is_asked and adapter is not None:
        raise Qwen35Error(
            "an adapter together with distillation",
            hint=f"leave one of them out, or use another method than {DISTILL}",
        )
    if distillation and distillation.finish_tokens:
        needed = finish_bytes(sum(entry.num_parameters for entry in planned.text_entries))
        if needed > (limit := memory_bytes()):
            raise MemoryRefused(
                "training the whole model at once does not fit in memory",
                got=f"{needed / 1e9:,.1f} GB",
                expected=f"at most {limit / 1e9:,.1f} GB",
                hint="without --finish-tokens each layer is trained alone",
            )
    if is_asked and isinstance(planned.source, HubSource):
        raise Qwen35Error(
            "distillation reads each layer of the source several times",
            got=planned.source.origin["source"],
            expected="a folder on this machine",
        )


def _check_adapter(planned: Plan, adapter: Adapter | None) -> None:
    """It must be of this model, whose weights must be in full precision."""
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
                "the source is quantized: most of an adapter would be rounded away",
                got=f"{name} of {entry.bits} bits",
                expected="the checkpoint that the model was converted from",
            )
    if problems:
        raise CheckpointError(
            "the adapter does not fit the source",
            got="; ".join(problems[:4]),
            expected="the model that it was trained on",
        )


def _check_copies(planned: Plan) -> None:
    """A head may be left out only if it is the embedding."""
    for head, embedding in planned.copies:
        if not _same(planned.source, head, embedding):
            raise refuse_other_head(head, embedding)


def _same(source: Source, a: SourceTensor, b: SourceTensor) -> bool:
    """Whether two tensors hold the same; of the hub's, only their first bytes are compared."""
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
    """All that decides the bytes of the output, in words that fit into JSON."""
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
    """The config.json of the output: nested, complete for mlx-lm, with our own facts."""
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
    # mlx-lm knows no outer type of text-only models.
    config["model_type"] = kind
    text = config["text_config"]
    for level in (config, text):
        # Where the checkpoint lay on the machine that saved it.
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
        # fidelity leaves out an adapter that is in the weights.
        **({"adapter": known.adapter.digest} if known.adapter else {}),
        # fidelity tells a text that one of them has read.
        **({"calibration": known.calibration.facts} if known.calibration else {}),
        **({"distillation": known.distilled.facts} if known.distilled else {}),
        "norms_shifted": True,
        "mtp_norms_shifted": True,
        "sha256": checksums,
    }
    return config


def _carried_settings(planned: Plan) -> dict[str, Any]:
    """What a quantized source says of carried modules; the plan knows better of its own."""
    said = quantization_block(planned.source.config).items()
    block = {output_name(bare(key)): value for key, value in said}
    known = {entry.module for entry in planned.entries if entry.bits is not None}
    roots = ("mtp.", "vision_tower.")
    return {
        key: value for key, value in block.items() if key.startswith(roots) and key not in known
    }


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
    if (yarn := model.rope).factor is None:
        return
    assert yarn.attention_factor is not None
    # mlx-lm computes attention_factor from mscale, and knows no null and no 0 for a default.
    rope |= {
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "attention_factor": yarn.attention_factor,
        "mscale": (yarn.attention_factor - 1) / (0.1 * math.log(yarn.factor) or 1),
        "mscale_all_dim": 0,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    if not yarn.truncate:
        log.warning("YaRN without truncation: this project runs the output, mlx-lm truncates")


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
    """Tokenizer, template and licence files of the source."""
    found = source.companions()
    names = {path.name for path in found}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        log.warning(
            "%s has no tokenizer.json: the output will not load without one",
            source.origin["source"],
        )
    return found


def refuse_existing(out: Path) -> None:
    """Raise if a file or folder would be written over."""
    if os.path.lexists(out):
        raise Qwen35Error(
            f"{out} exists already",
            expected="a folder that does not exist yet",
            hint="choose another name, or remove it first",
        )


def _check_space(work: Path, needed_bytes: int) -> None:
    # What an earlier run wrote counts: blocks, as files may have holes.
    used_bytes = sum(path.stat().st_blocks * 512 for path in work.rglob("*") if path.is_file())
    require_space(work, needed_bytes - used_bytes, "an output on another disk, or fewer bits")


@contextmanager
def _locked(work: Path, out: Path, needed_bytes: int) -> Iterator[None]:
    """The folder `work`, made if need be and locked; kept after an error if work is in it."""
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
        raise Qwen35Error(f"cannot write beside {out}", got=error) from error
    try:
        with write_errors(out, "make room and repeat the command: it goes on where it stopped"):
            yield
    except BaseException:
        journal = work / JOURNAL_FILE
        begun = any((work / name).exists() for name in (FETCHED, DISTILLED))
        if not (journal.exists() and journal.stat().st_size) and not begun:
            shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        lock.close()
