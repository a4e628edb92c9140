"""The commands convert and plan."""

import os
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import Qwen35Error
from ..files import require_writable
from . import options
from .command import BITS, given_options

# Options that change the output.
SETTINGS = {
    *BITS,
    *"--group-size --dtype --method --prefer --context --kv-bits --experts-layout".split(),
    *("--calibration", "--calibrate"),
}


def convert(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SRC")],
    quantization: options.Quantization,
    out: Annotated[Path | None, typer.Argument(metavar="OUT")] = None,
    method: Literal["minmax", "search", "gptq", "distill"] | None = None,
    kv_bits: options.KvBits = "auto",
    experts_layout: Literal["stacked", "disk"] = "stacked",
    calibration: options.CalibrationFile = None,
    calibrate: bool = False,
    calibration_text: Annotated[Path | None, typer.Option(metavar="FILE")] = None,
    finish_tokens: Annotated[int, typer.Option(min=0)] = 0,
    activations_memory: Annotated[str | None, typer.Option(metavar="MEMORY")] = None,
    revision: options.Revision = None,
    keep_source: bool = False,
    verify: bool = False,
) -> None:
    """Convert a Hugging Face checkpoint to quantized MLX weights.

    A model on the hub is downloaded a file at a time; each is deleted after its conversion. If a
    conversion is interrupted, the same command continues it.

    Args:
        source: Folder of a Hugging Face checkpoint, or hub id such as Qwen/Qwen3.5-4B.
        out: Folder to create. Default: in the current folder, the name of SRC and the settings,
            such as NAME-4bit.
        method: How to choose scales. minmax: as MLX. search: least error, much slower. gptq:
            error feedback; needs a calibration made with --method gptq. distill: error feedback,
            then trained layer after layer, without a calibration; hours for a large model. Default:
            minmax with --bits alone, else search, or gptq if the calibration allows it.
        experts_layout: Order of the experts' weights in the files. stacked: one array per matrix
            for all experts, which mlx-lm reads too. disk: the matrices of each expert side by side,
            which --experts-memory reads faster.
        calibrate: First run a text through SRC, a layer at a time, to measure which errors matter.
            Writes the result to the file of --calibration, or to OUT.calibration.safetensors.
            Default: no calibration.
        calibration_text: Text for --calibrate and --method distill: plain, or .jsonl with lines of
            conversations as for training. Default: a text that comes with the program.
        finish_tokens: With --method distill: afterwards train all layers together on this many
            tokens of the text, with the whole model in memory. Default: no such training.
        activations_memory: With --method distill: memory for the activations between two layers,
            such as 8GB. If they need more, they are kept on disk. Default: a quarter of all memory.
        keep_source: Keep the downloaded files in OUT-source. Default: delete each after its
            conversion.
        verify: Read OUT again and compare checksums, after the conversion, or alone if OUT exists.
            Default: no check.
    """
    from ..convert import plan as make_plan
    from ..convert import verify as read_again
    from ..convert.distilled import distillation_lines, left_of
    from ..convert.hub import is_hub_id
    from ..convert.job import refuse_existing
    from ..quant.statistics import save
    from .progress import byte_progress, step_progress
    from .report import print_lines
    from .terminal import note

    if method != "distill" and (finish_tokens or activations_memory):
        name = "--finish-tokens" if finish_tokens else "--activations-memory"
        ctx.fail(f"{name} needs --method distill.")
    if calibration_text and not calibrate and method != "distill":
        ctx.fail("--calibration-text needs --calibrate or --method distill.")
    if keep_source and not is_hub_id(source):
        ctx.fail("--keep-source needs a hub id.")
    if out is None:
        out = default_out(source, ctx.params)
        note(f"OUT is {out}")
    if verify and out.exists():
        refuse_other_settings(ctx, source, out)
    else:
        # Before a calibration, because that may take hours.
        refuse_existing(out)
        if calibrate:
            make_plan(source, revision=revision, **quality_settings(ctx, source, None)[0])
        found = calibration_for(source, out, calibration, calibrate, calibration_text, method)
        distillation = distillation_for(
            source, calibration_text, finish_tokens, activations_memory, method
        )
        with step_progress("Distilling") as on_step:
            if distillation:
                distillation = replace(distillation, progress=on_step)
            given: Any = dict(distillation=distillation, keep_source=keep_source)
            folder = convert_as_asked(ctx, source, out, "Converting {}", calibration=found, **given)
        if distillation:
            print_lines(distillation_lines(folder))
            if found is not None:
                # A separate file: the other one belongs to this conversion.
                file = calibration_file(out.with_name(f"{out.name}.distilled"))
                save(replace(found, left=left_of(folder)), file)
                note(f"{file} has the errors after training; a later --fit can use it")
    if verify:
        with byte_progress(f"Verifying {out.name}") as progress:
            num_bytes = read_again(out, progress)
        print(f"{num_bytes / 1e6:,.1f} MB in {out} verified: all checksums match")


def convert_as_asked(
    ctx: typer.Context, source: str, out: Path, title: str, calibration: Any = None, **given: Any
) -> Path:
    """Convert by the options of a command, and print the result; `given` as in `convert`."""
    from ..convert import convert as run
    from ..convert import plan as make_plan
    from ..convert.report import conversion_lines
    from .progress import byte_progress
    from .report import print_converted, print_lines
    from .terminal import note

    settings, spent = quality_settings(ctx, source, calibration)
    print_lines(spent)
    given["revision"] = ctx.params["revision"]
    plan = make_plan(source, revision=given["revision"], **settings)
    for line in conversion_lines(plan, given.get("keep_source", False)):
        note(line)
    with byte_progress(title.format(plan.source.origin["source"])) as progress:
        folder = run(source, out, calibration=calibration, progress=progress, **given, **settings)
    print_converted(plan, folder)
    remember(folder)
    return folder


def default_out(source: str, given: Mapping[str, Any]) -> Path:
    """A name for the output: the source's, and the settings."""
    from ..convert.hub import is_hub_id
    from ..machine import GIB, parse_memory

    name = source if is_hub_id(source) else str(Path(os.path.expanduser(source)).resolve())
    parts = [Path(name).name]
    dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(given["dtype"])
    if given["recipe"]:
        parts.append(given["recipe"])
    elif given["fit"]:
        parts.append(f"{parse_memory(given['fit']) / GIB:g}GB")
    elif given["bits_per_weight"] is not None:
        parts.append(f"{given['bits_per_weight']:g}bpw")
    elif given["bits"] or not dtype:
        parts.append(f"{given['bits'] or 4}bit")
    if given["group_size"] != 64:
        parts.append(f"g{given['group_size']}")
    if given["prefer"] == "speed":
        parts.append(given["prefer"])
    if given.get("experts_layout") == "disk":
        parts.append("disk")
    return Path("-".join([*parts, *filter(None, (given["method"], dtype))]))


def refuse_other_settings(ctx: typer.Context, source: str, out: Path) -> None:
    """Raise if the folder `out` was made from another source or with other settings."""
    from ..config import read_config
    from ..convert import plan as make_plan
    from ..convert.hub import is_hub_id
    from ..convert.source import Source

    given = given_options(ctx)
    if unused := given & {"--calibrate", "--keep-source", "--revision"}:
        ctx.fail(f"{out} exists already: {', '.join(unused)} would do nothing.")
    facts = read_config(out).get("qwen35_mlx")
    if not isinstance(facts, dict):
        return
    folder = Path(os.path.expanduser(source))
    wanted: dict[str, Any] = {
        "source": source if is_hub_id(source) else Source(folder, {}, {}).origin["source"]
    }
    if given & SETTINGS:
        found = calibration_for(source, out, ctx.params["calibration"])
        settings, _ = quality_settings(ctx, source, found)
        wanted["settings"] = make_plan(source, **settings).settings
    for name, value in wanted.items():
        if facts.get(name) != value:
            raise Qwen35Error(
                f"{out} was converted from another source or with other settings",
                got=value,
                expected=facts.get(name),
            )


def plan(
    ctx: typer.Context,
    quantization: options.Quantization,
    source: Annotated[str | None, typer.Argument(metavar="SRC")] = None,
    kv_bits: options.KvBits = "auto",
    calibration: options.CalibrationFile = None,
    revision: options.Revision = None,
    mac: Annotated[str | None, typer.Option(metavar="MAC")] = None,
    together: Annotated[str, typer.Option("--macs", metavar="N")] = "1",
    png: Annotated[Path | None, typer.Option(metavar="FILE")] = None,
) -> None:
    """Show what convert would write, and which Macs run the result.

    Also shows the memory and disk that a conversion needs. Reads only the headers of the files.

    Args:
        source: Folder of a Hugging Face checkpoint, hub id, or a released model such as
            Qwen3.5-27B, which needs no network. Default: show which models of the family fit.
        mac: Show this Mac alone: 256GB, M3 Ultra, or M3 Ultra 256GB. Default: this machine without
            SRC, all Macs with SRC.
        together: Number of such Macs that run the model together, or their memory: 192GB,96GB.
        png: Also draw the result as a PNG. Default: text alone.
    """
    from ..convert import plan as make_plan
    from ..convert import report
    from ..convert.mac_models import MACS, find_macs, share, this_mac
    from .report import print_lines, print_plan
    from .terminal import note

    macs = find_macs(mac) if mac else [*filter(None, [this_mac()]), *MACS]
    num_macs = int(together) if together.isdecimal() else 0
    if together.isdecimal() and not num_macs:
        ctx.fail("--macs takes 1 or more.")
    # The slowest of the Macs with this memory.
    names = [] if num_macs else together.split(",")
    different = [min(find_macs(name), key=attrgetter("gbps")) for name in names]
    if different and (mac or source is None or len(different) < 2):
        ctx.fail("--macs takes a number, or with SRC and without --mac several Macs.")
    if source is None:
        print_lines(plan_of_family(ctx, macs))
        return
    found = calibration_for(source, None, calibration)
    opened = report.find_source(source, revision)
    if not isinstance(opened, str):
        note(f"{opened.folder}: sizes of the released model, nothing is downloaded")
    settings, spent = quality_settings(ctx, opened, found)
    planned = make_plan(opened, revision=revision, **settings)
    print_plan(planned)
    print_lines([*spent, ""] if spent else [])
    page = report.conversion_lines(planned)
    page += ["", *report.picture_lines(planned)]
    if different:
        page += ["", *report.unequal_lines(planned, different, quantization.context, kv_bits)]
    else:
        page += ["", *report.mac_lines(planned, macs, quantization.context, kv_bits, num_macs)]
    if num_macs == 1:
        page += report.disk_lines(report.with_kv(planned, kv_bits)[0], macs, quantization.context)
    print_lines(page)
    if png:
        limits = [m.gpu_limit_bytes for m in different] or [report.UNBOUNDED] * num_macs
        report.draw(share(planned, limits).parts[0], png)


def plan_of_family(ctx: typer.Context, macs: list[Any]) -> list[str]:
    """The output of `plan` without SRC: for --fit, --mac or this machine."""
    from ..convert.mac_models import this_mac
    from ..convert.report import family_lines, fitting_lines
    from ..machine import memory_bytes, parse_memory

    values = ctx.params
    if values["fit"]:
        memory = parse_memory(values["fit"])
        return fitting_lines(memory, "a Mac", values["context"], values["kv_bits"])
    own, memory = this_mac(), memory_bytes()
    where = f"a Mac with {own.chip}" if own else "this machine; limits as on a Mac of its memory"
    if values["mac"]:
        sizes = {mac.memory_bytes for mac in macs}
        if len(sizes) > 1:
            raise typer.BadParameter(f"--mac {values['mac']} comes in several sizes; add one.")
        (memory,) = sizes
        chips = " or ".join(mac.chip for mac in macs if mac.chip)
        where = f"a Mac with {chips}" if chips else "a Mac"
    ways = given_options(ctx) & {*BITS, "--group-size", "--dtype"}
    settings = (lambda source: quality_settings(ctx, source, None)[0]) if ways else None
    chosen = (values["kv_bits"], int(values["together"]))
    return family_lines(memory, where, values["context"], settings, *chosen)


def quality_settings(
    ctx: typer.Context, source: Any, found: Any
) -> tuple[dict[str, Any], list[str]]:
    """Settings of plan and convert, and lines about how a budget is used."""
    from ..convert.fit import quality_settings as decide

    given = ctx.params
    names = ("bits", "recipe", "bits_per_weight", "prefer", "context", "dtype", "revision")
    wanted = {name: given[name] for name in names}
    settings, spent = decide(
        source,
        **wanted,
        memory=given["fit"],
        method=given.get("method"),
        calibration=found,
        kv_bits=given.get("kv_bits", "auto"),
    )
    layout = given.get("experts_layout", "stacked")
    ours = dict(group_size=given["group_size"], dtype=given["dtype"], experts_layout=layout)
    return settings | ours, spent


def calibration_for(
    source: str,
    out: Path | None,
    file: Path | None,
    calibrate: bool = False,
    text: Path | None = None,
    method: str | None = None,
) -> Any:
    """The calibration of --calibration, or a new one with --calibrate; None without either."""
    from ..quant.statistics import load, save

    if not calibrate:
        return load(file) if file else None
    from ..convert.calibrate import calibrate as run
    from ..convert.calibration_text import TEXT_FILE, encode
    from .progress import step_progress
    from .terminal import note

    assert out is not None
    file = file or calibration_file(out)
    if file.exists():
        raise Qwen35Error(
            f"{file} exists already", hint="use it without --calibrate, or name another file"
        )
    if file.suffix != ".safetensors":
        # MLX adds it.
        raise Qwen35Error("no name for a calibration", got=file, expected="NAME.safetensors")
    ids = encode(Path(source), text or TEXT_FILE)
    require_writable(file)
    with step_progress(f"Calibrating on {ids.size:,} tokens") as progress:
        known: Any = dict(hessians=method in ("gptq", "distill"), keep_hessians=method == "gptq")
        found = run(source, ids, **known, progress=progress)
    save(found, file)
    note(f"calibration written to {file}")
    return found


def calibration_file(out: Path) -> Path:
    """The default file for the calibration of a conversion."""
    return out.with_name(f"{out.name}.calibration.safetensors")


def distillation_for(
    source: str, text: Path | None, finish_tokens: int, memory: str | None, method: str | None
) -> Any:
    """The settings of --method distill; None with another method."""
    if method != "distill":
        return None
    from ..convert.calibration_text import TEXT_FILE, encode
    from ..convert.distilled import Distillation
    from ..machine import memory_bytes, parse_memory

    budget = memory_bytes() // 4 if memory is None else parse_memory(memory)
    ids = encode(Path(source), text or TEXT_FILE)
    return Distillation(ids, finish_tokens, activations_bytes=budget)


def remember(folder: Path) -> None:
    """Record a conversion for `chat` without a model; a failure is only a note."""
    from .local_models import record_conversion
    from .terminal import note

    try:
        record_conversion(folder)
    except (Qwen35Error, OSError) as error:
        note(f"chat without a model will not find this folder: {error}")
