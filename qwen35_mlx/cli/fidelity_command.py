"""The command fidelity: compares quantized models with their original, on a text and in answers."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from ..errors import MemoryRefused
from . import options

# Context length of a question and its answer.
TASKS_CONTEXT = 4096
# Unrelated texts with tool calls share 4 %, because of the chat template's text.
MOST_OVERLAP = 0.1


def fidelity(
    reference: Annotated[Path, typer.Argument(metavar="SRC")],
    quantized: Annotated[list[Path], typer.Argument(metavar="OUT")],
    text: options.TextFile = None,
    tokens: Annotated[int, typer.Option(min=2)] = 8192,
    mac: Annotated[str | None, typer.Option(metavar="MAC")] = None,
    tasks: bool = False,
    save: bool = False,
    png: Annotated[Path | None, typer.Option(metavar="FILE")] = None,
    adapter_path: options.AdapterPath = None,
) -> None:
    """Compare quantized models with their original on a text.

    Prints KL divergence, top-1 agreement, perplexity and, for a single OUT, the error of each
    layer; the last line is JSON. Holds one layer of each model in memory. A FILE of --text that
    ends in .jsonl holds conversations. Warns if a model was calibrated with the text. An adapter
    is applied to all models except those into which it was fused.

    Args:
        reference: Folder of the original, or a converted one.
        quantized: Converted folder to compare with SRC; or several.
        tokens: Maximum number of tokens to run.
        mac: Mac whose memory and bandwidth the table is computed for, such as M3 Ultra 256GB.
            Default: this machine, else M3 Ultra 256GB.
        tasks: Also let all models answer questions, which loads the whole SRC too: compares the
            answers, the length of thoughts, and whether tool calls and JSON are valid.
        save: Write the figures to fidelity.json in each OUT, for its model card. Default: print
            them alone.
        png: Also draw a PNG: the error of each layer; for several OUT, KL over bytes and tokens/s,
            or the tasks. Default: text alone.
    """
    from dataclasses import replace

    from ..checkpoint.adapter import read_adapter
    from ..convert.calibration_text import HELD_OUT_FILE, encode, overlap
    from ..convert.card import FIDELITY_FILE
    from ..convert.fidelity import Comparison, compare, open_with, plot, report_lines
    from ..convert.mac_models import find_macs, this_mac
    from ..files import write_json
    from .progress import step_progress
    from .report import print_lines
    from .terminal import warn

    folders: list[Any] = [reference, *quantized]
    if adapter_path is not None:
        adapter = read_adapter(adapter_path)
        folders = [open_with(folder, adapter) for folder in folders]
    names = [folder.resolve().name for folder in quantized]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in quantized]
    own = None if mac else this_mac()
    target = own or find_macs(mac or "M3 Ultra 256GB")[0]
    file = text or HELD_OUT_FILE
    ids = encode(reference, file, most=tokens)
    if tasks:
        # Before the comparison, because that may take hours.
        check_memory(reference)
    with step_progress(f"Comparing on {ids.size:,} tokens") as progress:
        reports = compare(folders[0], folders[1:], ids, progress)
    overlaps = [overlap(folder, ids) for folder in quantized]
    for name, share in zip(names, overlaps, strict=True):
        if share is not None and share > MOST_OVERLAP:
            warn(
                f"{name} was calibrated with {share:.0%} of this text: on it, its error is smaller "
                "than on others. Compare with another --text"
            )
    comparison = Comparison(names, reports, target, overlaps)
    if len(reports) == 1:
        print_lines([*report_lines(reports[0]), ""])
    print_lines(comparison.lines())
    facts: dict[str, Any] = {"reference": reference.resolve().name, "text": file.name}
    if tasks:
        comparison = replace(comparison, tasks=answer_tasks([reference, *quantized], adapter_path))
        print_lines(["", *comparison.task_lines()])
        facts["reference_answers"] = comparison.tasks[0]
    rows = comparison.rows()
    if save:
        for folder, name in zip(quantized, names, strict=True):
            (row,) = (row for row in rows if row["name"] == name)
            write_json(folder / FIDELITY_FILE, facts | row | {"mac": target.name})
    result = {"outputs": rows} if len(reports) > 1 else rows[0] | reports[0].as_dict()
    print(json.dumps(facts | {"mac": target.name} | result), flush=True)
    # Last, so that the report is printed even if the file cannot be written.
    if png:
        comparison.plot(png) if tasks or len(reports) > 1 else plot(reports[0], png)


def check_memory(reference: Path) -> None:
    """Raise MemoryRefused if the whole original does not fit in memory."""
    from ..convert.layerwise import open_checkpoint
    from ..machine import describe
    from ..memory import allow

    checkpoint = open_checkpoint(reference)
    context = min(TASKS_CONTEXT, checkpoint.config.context_length)
    try:
        allow(checkpoint.config, checkpoint.nbytes, context=context)
    except MemoryRefused:
        limit = describe().limit_bytes
        raise MemoryRefused(
            "with --tasks the original writes answers, and it does not fit in memory",
            got=f"{checkpoint.nbytes / 1e9:,.3f} GB of weights in {reference}",
            expected=f"at most {limit / 1e9:,.3f} GB with a context of {context:,} tokens",
            hint="leave --tasks out, or take a conversion with more bits for SRC",
        ) from None


@contextmanager
def runnable(folder: Path) -> Iterator[Path]:
    """The folder, or for a Hugging Face checkpoint, a temporary conversion to bfloat16."""
    from ..convert import convert
    from ..convert.layerwise import SourceCheckpoint, open_checkpoint
    from ..files import cache_home, locked

    if not isinstance(open_checkpoint(folder), SourceCheckpoint):
        yield folder
        return
    home = cache_home()
    home.mkdir(parents=True, exist_ok=True)
    # Remove leftovers of killed processes.
    for left in home.glob("reference-*"):
        with suppress(OSError), locked(left, wait=False):
            shutil.rmtree(left)
    with TemporaryDirectory(prefix="reference-", dir=home) as parent, locked(Path(parent)):
        yield convert(folder, Path(parent) / "model", dtype="bfloat16")


def answer_tasks(folders: list[Path], adapter_path: Path | None) -> list[dict[str, Any]]:
    """The figures of the answers of each model, also of the first one compared with itself."""
    from ..checkpoint.adapter import read_adapter
    from ..convert.fidelity import fused_with
    from ..evaluation import behaviour
    from ..model.loading import load
    from .progress import step_progress

    asked = behaviour.questions()
    answers: list[Any] = []
    for folder in folders:
        is_fused = adapter_path and fused_with(folder, read_adapter(adapter_path))
        with runnable(folder) as converted:
            # One model at a time.
            model, tokenizer = load(
                converted, mtp=False, adapter=None if is_fused else adapter_path
            )
            with step_progress(f"Answers of {folder.name}") as progress:
                answers.append(behaviour.answers(model, tokenizer, asked, progress))
            del model
    return [behaviour.figures(asked, answers[0], own) for own in answers]
