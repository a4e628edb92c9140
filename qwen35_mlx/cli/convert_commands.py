"""The commands that make and judge conversions: convert, plan, fidelity."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import Qwen35Error
from . import options


def convert(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="Folder of a Hugging Face checkpoint, or hub id such as Qwen/NAME."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    bits: options.Bits = None,
    group_size: options.GroupSize = 64,
    dtype: options.Dtype = None,
    method: Annotated[
        str | None,
        typer.Option(
            callback=options.one_of("minmax", "search", "gptq"),
            help="How to choose scales: minmax as mlx does; search for the least error, about ten "
            "times slower; gptq, error feedback from a calibration made for it. "
            "minmax with --bits, else the best there is.",
        ),
    ] = None,
    recipe: options.RecipeName = None,
    fit: options.Fit = None,
    bits_per_weight: options.BitsPerWeight = None,
    prefer: options.Prefer = "quality",
    context: options.Context = None,
    calibration: options.CalibrationFile = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Run a text through the source first, a layer at a time, and weigh errors by what "
            "activations do; writes the file of --calibration, or OUT.calibration.safetensors.",
        ),
    ] = False,
    text: options.TextFile = None,
    revision: options.Revision = None,
    keep_source: Annotated[
        bool, typer.Option("--keep-source", help="Keep the shards from the hub, in OUT-source.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Read OUT again and compare checksums; converts first if need be."
        ),
    ] = False,
) -> None:
    """Convert a Hugging Face checkpoint to low-bit MLX weights.

    From the hub, shards are fetched one after the other and deleted when they are converted.
    Stopped in any way, the same command goes on where it stopped.
    """
    with options.user_errors():
        from ..convert import convert as run
        from ..convert import plan as make_plan
        from ..convert import verify as read_again
        from ..convert.job import refuse_existing
        from ..convert.report import conversion_lines
        from .terminal import byte_progress, note, print_converted, print_lines

        if not (verify and out.exists()):
            # Before a calibration, which may take hours.
            refuse_existing(out)
            found = calibration_for(source, out, calibration, calibrate, text, method)
            settings, spent = quality_settings(ctx, source, found)
            print_lines(spent)
            plan = make_plan(source, revision=revision, **settings)
            for line in conversion_lines(plan, keep_source):
                note(line)
            with byte_progress(f"Converting {plan.source.origin['source']}") as progress:
                folder = run(
                    source,
                    out,
                    revision=revision,
                    keep_source=keep_source,
                    progress=progress,
                    calibration=found,
                    **settings,
                )
            print_converted(plan, folder)
            remember(folder)
        if verify:
            with byte_progress(f"Verifying {out.name}") as progress:
                num_bytes = read_again(out, progress)
            print(f"{num_bytes / 1e6:,.1f} MB in {out} are as they were written")


def plan(
    ctx: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(metavar="SRC", help="Folder or hub id; without it, what fits this machine."),
    ] = None,
    bits: options.Bits = None,
    group_size: options.GroupSize = 64,
    dtype: options.Dtype = None,
    recipe: options.RecipeName = None,
    fit: options.Fit = None,
    bits_per_weight: options.BitsPerWeight = None,
    prefer: options.Prefer = "quality",
    context: options.Context = None,
    calibration: options.CalibrationFile = None,
    revision: options.Revision = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the page into this file.")
    ] = None,
) -> None:
    """Show what convert would write, and which Macs run it.

    Also the memory and disk that it takes. Reads headers alone.
    """
    with options.user_errors():
        from ..convert import plan as make_plan
        from ..convert import report as page
        from ..convert.macs import this_mac
        from ..machine import memory_bytes
        from .terminal import print_lines, print_plan

        mac = this_mac()
        if source is None:
            print_lines(page.family_lines(memory_bytes(), mac))
            return
        settings, spent = quality_settings(ctx, source, calibration_for(source, None, calibration))
        planned = make_plan(source, revision=revision, **settings)
        print_plan(planned)
        print_lines([*spent, ""] if spent else [])
        print_lines([*page.conversion_lines(planned), "", *page.mac_lines(planned, mac)])
        if png:
            page.draw(planned, png)


def quality_settings(ctx: typer.Context, source: str, found: Any) -> tuple[Any, list[str]]:
    """Settings of plan and convert, and lines on what a budget is spent on."""
    from ..convert.fit import quality_settings as decide

    given = ctx.params
    names = ("bits", "recipe", "bits_per_weight", "prefer", "context", "dtype", "revision")
    wanted = {name: given[name] for name in names}
    settings, spent = decide(
        source, **wanted, memory=given["fit"], method=given.get("method"), calibration=found
    )
    return settings | dict(group_size=given["group_size"], dtype=given["dtype"]), spent


def calibration_for(
    source: str,
    out: Path | None,
    file: Path | None,
    calibrate: bool = False,
    text: Path | None = None,
    method: str | None = None,
) -> Any:
    """What --calibration names, made first with --calibrate; None without either."""
    if text and not calibrate:
        raise typer.BadParameter("--text goes with --calibrate.")
    from ..quant.statistics import load, save

    if not calibrate:
        return load(file) if file else None
    from ..convert.calibrate import calibrate as run
    from ..convert.calibrate import encode, read_text
    from .terminal import note, quiet_libraries, step_progress

    quiet_libraries()
    assert out is not None
    file = file or out.with_name(f"{out.name}.calibration.safetensors")
    if file.exists():
        raise Qwen35Error(
            f"{file} exists already", hint="use it without --calibrate, or name another file"
        )
    ids = encode(Path(source), read_text(text))
    with step_progress(f"Calibrating on {ids.size:,} tokens") as progress:
        found = run(source, ids, hessians=method == "gptq", progress=progress)
    save(found, file)
    note(f"calibration written to {file}")
    return found


def remember(folder: Path) -> None:
    """Record a conversion for `chat` without a model; without a cache that is merely said."""
    from .local_models import record_conversion
    from .terminal import note

    try:
        record_conversion(folder)
    except (Qwen35Error, OSError) as error:
        note(f"chat without a model will not find this folder: {error}")


def fidelity(
    reference: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder of the original, or a converted one.")
    ],
    quantized: Annotated[Path, typer.Argument(metavar="OUT", help="Converted folder to judge.")],
    text: options.TextFile = None,
    tokens: Annotated[int, typer.Option(min=2, help="Most tokens of the text.")] = 8192,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the errors into this file.")
    ] = None,
) -> None:
    """Compare a quantized model with its original.

    Prints KL, top-1 agreement, perplexity and the error of each layer; the last line is JSON.
    Both are read a layer at a time: neither has to fit in memory.
    """
    with options.user_errors():
        from ..convert.calibrate import encode, read_text
        from ..convert.fidelity import fidelity as compare
        from ..convert.fidelity import plot, report_lines
        from .terminal import print_lines, quiet_libraries, step_progress

        quiet_libraries()
        ids = encode(reference, read_text(text), most=tokens)
        with step_progress(f"Comparing on {ids.size:,} tokens") as progress:
            report = compare(reference, quantized, ids, progress)
        print_lines(report_lines(report))
        if png:
            plot(report, png)
        print(json.dumps(report.as_dict()))
