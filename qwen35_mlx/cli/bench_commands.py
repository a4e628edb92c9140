"""The commands bench and doctor: the speed of a model, and of the kernels, on this machine."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import completion, options


def bench(
    model: options.Model,
    max_context: Annotated[int | None, typer.Option(min=1)] = None,
    runs: Annotated[int, typer.Option(min=1)] = 3,
    vs_mlx_lm: bool = False,
    recall: Annotated[str | None, typer.Option(metavar="LENGTHS")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    kernels: options.Kernels = "auto",
    experts_memory: options.ExpertsMemory = None,
) -> None:
    """Measure the speed of a model on this machine.

    At each length of the prompt: reading it (cold), reading a short message after it (warm), time
    to the first token, decoding, and memory; with an MTP layer, decoding with drafts. The last
    line is JSON to share and to compare.

    Args:
        max_context: Longest prompt in tokens; shorter ones of 512, 4096, 32768, … are measured too.
            Default: 32768, or what the model can read if that is less.
        runs: Number of runs at each length; the result is their median.
        vs_mlx_lm: Also run mlx-lm on the same weights, in turns. Default: this program alone.
        recall: Measure recall in place of speed: put facts into texts of these lengths in tokens,
            such as 4K,32K, ask for each, and print right answers by depth. Default: speed.
        png: Also draw the speeds as a PNG. Default: text alone.
        as_json: Print the JSON line alone. Default: a table before it.
    """
    from ..evaluation import bench as measuring
    from ..evaluation import recall as recalling
    from ..model import loading
    from ..model.hub import resolve
    from .progress import spinner, step_progress
    from .report import draw_bench, print_bench, print_recall

    lengths = recalling.lengths_of(recall) if recall else []
    needed = None if max_context is None else max_context + measuring.ROOM
    folder = resolve(model)
    with spinner(f"Loading {model}"):
        loaded, tokenizer = loading.load(
            folder,
            kernels=kernels,
            context=max(lengths) if lengths else needed,
            experts_memory=experts_memory,
        )
        programs = {measuring.OURS: lambda: measuring.our_conversation(loaded)}
        if vs_mlx_lm:
            programs[measuring.MLX_LM] = measuring.mlx_lm_program(folder, loaded)
    result = measuring.label(folder, model)
    if lengths:
        with step_progress("Asking") as progress:
            found = recalling.measure(loaded, tokenizer, lengths, progress)
        result |= {"recall": [row._asdict() for row in found]}
        if not as_json:
            print_recall(found)
    else:
        sizes = measuring.contexts(loaded.config, max_context)
        with step_progress("Measuring") as progress:
            rows = measuring.bench(loaded, programs, sizes, runs, progress)
        with spinner("Measuring drafts"):
            drafts = measuring.drafting(loaded, tokenizer, runs)
        experts = loaded.experts and loaded.experts.figures()
        result |= {"kernels": kernels, "median_of": runs, "contexts": rows}
        result |= {"drafts": drafts, "experts": experts}
        if not as_json:
            print_bench(result)
    print(json.dumps(result), flush=True)
    # Last: where no file can be written, the result is printed all the same.
    if png:
        draw_bench(result, png)


def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", autocompletion=completion.models)
    ] = None,
    bits: Literal[2, 3, 4, 5, 6, 8] = 4,
    group_size: Literal[32, 64, 128] = 64,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Check and time the Metal kernels on this machine.

    Stores which kernels are correct and faster than MLX's own, for each size and number of tokens;
    --kernels auto uses those. Prints the machine and the results; the last line is a JSON report
    for a bug report.

    Args:
        model: Converted folder, or hub id, whose sizes and bits are measured too. Default: the
            released models alone.
        bits: Bits of each weight to measure.
        group_size: Number of weights that share a scale.
        as_json: Print the JSON report alone. Default: a page before it.
    """
    from ..kernels.doctor import DEFAULT_FORMAT, run, store
    from .progress import step_progress
    from .report import print_doctor

    own = None
    if model is not None:
        from ..model.hub import resolve
        from ..model.loading import open_model

        own = open_model(resolve(model))[0]
    formats = [DEFAULT_FORMAT._replace(bits=bits, group_size=group_size)]
    with step_progress("Checking kernels") as progress:
        report = run(progress, formats, own)
    if not as_json:
        print_doctor(report)
    print(json.dumps(report), flush=True)
    # Last, so that the report is printed even if it cannot be stored.
    store(report)
