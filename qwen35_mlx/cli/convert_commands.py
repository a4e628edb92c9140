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
    prefer: options.Prefer = None,
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
        typer.Argument(
            metavar="SRC",
            help="Folder, hub id, or a released model such as Qwen3.5-27B, which is planned "
            "offline from its sizes; without it, what of the family fits.",
        ),
    ] = None,
    bits: options.Bits = None,
    group_size: options.GroupSize = 64,
    dtype: options.Dtype = None,
    recipe: options.RecipeName = None,
    fit: options.Fit = None,
    bits_per_weight: options.BitsPerWeight = None,
    prefer: options.Prefer = None,
    context: options.Context = None,
    calibration: options.CalibrationFile = None,
    revision: options.Revision = None,
    mac: Annotated[
        str | None,
        typer.Option(
            metavar="MAC", help="Show this Mac alone: 256GB, M3 Ultra, or M3 Ultra 256GB."
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the page into this file.")
    ] = None,
) -> None:
    """Show what convert would write, and which Macs run it.

    Also the memory and disk that it takes. Reads headers alone.
    """
    with options.user_errors():
        from ..convert import plan as make_plan
        from ..convert import report
        from ..convert.mac_models import MACS, find_macs, this_mac
        from .terminal import note, print_lines, print_plan

        macs = find_macs(mac) if mac else [*filter(None, [this_mac()]), *MACS]
        if source is None:
            print_lines(plan_of_family(ctx, macs))
            return
        found = calibration_for(source, None, calibration)
        opened = report.find_source(source, revision)
        if not isinstance(opened, str):
            note(f"{opened.folder}: sizes of the text model, nothing is fetched")
        settings, spent = quality_settings(ctx, opened, found)
        planned = make_plan(opened, revision=revision, **settings)
        print_plan(planned)
        print_lines([*spent, ""] if spent else [])
        page = report.conversion_lines(planned)
        print_lines([*page, "", *report.mac_lines(planned, macs, context)])
        if png:
            report.draw(planned, png)


def plan_of_family(ctx: typer.Context, macs: list[Any]) -> list[str]:
    """The page of `plan` without SRC: for --fit, --mac or this machine."""
    from ..convert.mac_models import this_mac
    from ..convert.report import family_lines, fitting_lines
    from ..machine import memory_bytes, parse_memory

    given, values = typed(ctx), ctx.params
    for name in ("calibration", "revision", "png", "prefer"):
        if name in given:
            raise typer.BadParameter(f"--{name} needs SRC.")
    ways = given & {"bits", "group_size", "dtype", "recipe", "bits_per_weight"}
    if "fit" in given and (others := ways | (given & {"mac"})):
        names = " or ".join(f"--{name.replace('_', '-')}" for name in sorted(others))
        raise typer.BadParameter(f"without SRC, --fit names memory and finds bits: no {names}.")
    if "fit" in given:
        return fitting_lines(parse_memory(values["fit"]), "a Mac", values["context"])
    own, memory = this_mac(), memory_bytes()
    where = f"a Mac with {own.chip}" if own else "this machine; limits as on a Mac of its memory"
    if "mac" in given:
        sizes = {mac.memory_bytes for mac in macs}
        if len(sizes) > 1:
            raise typer.BadParameter(f"--mac {values['mac']} comes in several sizes; add one.")
        (memory,) = sizes
        chips = " or ".join(mac.chip for mac in macs if mac.chip)
        where = f"a Mac with {chips}" if chips else "a Mac"
    settings = (lambda source: quality_settings(ctx, source, None)[0]) if ways else None
    return family_lines(memory, where, values["context"], settings)


def typed(ctx: typer.Context) -> set[str]:
    """The parameters that were given."""
    return {
        name
        for name in ctx.params
        if (origin := ctx.get_parameter_source(name)) and origin.name == "COMMANDLINE"
    }


def refuse_idle_options(ctx: typer.Context) -> None:
    """Refuse options that nothing would come of beside the others."""
    given = typed(ctx)
    budget = given & {"fit", "bits_per_weight"}
    if "prefer" in given and not budget:
        raise typer.BadParameter("--prefer goes with --fit or --bits-per-weight.")
    if "group_size" in given and (budget or "recipe" in given):
        raise typer.BadParameter("--group-size goes with --bits: a recipe has its own.")
    if "group_size" in given and "dtype" in given and "bits" not in given:
        raise typer.BadParameter("--group-size goes with --bits: --dtype alone quantizes nothing.")
    if "context" in given and ctx.info_name == "convert" and "fit" not in given:
        raise typer.BadParameter("--context goes with --fit.")


def quality_settings(
    ctx: typer.Context, source: Any, found: Any
) -> tuple[dict[str, Any], list[str]]:
    """Settings of plan and convert, and lines on what a budget is spent on."""
    from ..convert.fit import quality_settings as decide

    refuse_idle_options(ctx)
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
