"""The page that `plan` prints under its table: disk and memory, and what every Mac makes of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .family import FAMILY, family_source
from .hub import HubSource
from .job import SPARE_BYTES, source_disk_bytes
from .macs import (
    GIB,
    MACS,
    Mac,
    gpu_limit_bytes,
    raised_limit_bytes,
    running_bytes,
    tokens_per_second,
    wired_limit_mb,
)
from .plan import Plan, plan
from .plots import picture
from .tasks import SLICE_BYTES, WORKERS, cut, peak_bytes

CONTEXTS = (8_192, 32_768, 131_072, 262_144)
FAMILY_BITS = (3, 4, 6, 8)
NOTE = (
    "fits: within the limit that macOS gives the GPU; sudo sysctl iogpu.wired_limit_mb=N: fits with"
    " that\nlimit raised; tok/s: what memory bandwidth allows one sequence at {context}, never"
    " reached in full.\nComputed from sizes, not measured on these Macs."
)


def conversion_lines(planned: Plan, keep_source: bool = False) -> list[str]:
    """Memory and disk while converting."""
    tasks = cut(planned)
    peak = peak_bytes(planned, tasks)
    lines = [
        f"while converting: {peak / 1e6:,.0f} MB of memory at the peak ({WORKERS} slices of at most"
        f" {SLICE_BYTES / 2**20:.0f} MiB of the source and what is made of them)"
    ]
    disk = planned.output_bytes + SPARE_BYTES
    if isinstance(planned.source, HubSource):
        fetched = source_disk_bytes(planned.source, tasks, keep_source)
        lines.append(
            f"disk: {(disk + fetched) / 1e9:,.1f} GB, {planned.output_bytes / 1e9:,.1f} of them the"
            f" output and {fetched / 1e9:,.1f} shards of the source on their way"
        )
    else:
        lines.append(f"disk: {disk / 1e9:,.1f} GB for the output, beside the source")
    return lines


def mac_lines(planned: Plan, own: Mac | None = None) -> list[str]:
    """For every Mac and context: fits, fits with a raised limit, or not."""
    longest = planned.config.context_length
    contexts = [c for c in CONTEXTS if c <= longest] or [longest]
    needed = [running_bytes(planned, context) for context in contexts]
    total = ["memory when running", "", "", *(f"{n / 1e9:,.1f} GB" for n in needed), ""]
    rows = [["Mac", "memory", "GPU limit", *(_tokens(c) for c in contexts), "tok/s"], total]
    macs = [own, *MACS] if own else list(MACS)
    for mac in macs:
        fits = [_fits(mac, n) for n in needed]
        speed = tokens_per_second(planned, mac.gbps, contexts[0]) if mac.gbps else 0
        shown = f"{speed:,.0f}" if speed and fits[0] != "no" else "-"
        limit = f"{gpu_limit_bytes(mac.memory_bytes) / 1e9:,.0f} GB"
        name = f"this {mac.chip}" if mac is own else mac.chip
        rows.append([name, f"{mac.memory_gib} GB", limit, *fits, shown])
    return [*aligned(rows), *NOTE.format(context=_tokens(contexts[0])).splitlines()]


def family_lines(memory_bytes: int, own: Mac | None) -> list[str]:
    """The released models at several widths on this machine: size, and the longest context."""
    where = f"a Mac with {own.chip}" if own else "this machine; limits as on a Mac of its memory"
    rows = [["model", *(f"{bits}-bit" for bits in FAMILY_BITS)]]
    for name in FAMILY:
        plans = (plan(family_source(name), bits=bits) for bits in FAMILY_BITS)
        rows.append([name, *(_longest(planned, memory_bytes) for planned in plans)])
    return [
        f"{memory_bytes / GIB:.0f} GB of memory: {where}",
        *aligned(rows),
        "size, and the longest context that fits; *: with iogpu.wired_limit_mb raised to"
        f" {wired_limit_mb(raised_limit_bytes(memory_bytes))}",
        "then plan SRC for one of them: sizes are those of the text model, group 64",
    ]


def _longest(planned: Plan, memory_bytes: int) -> str:
    size = f"{planned.output_bytes / 1e9:,.1f} GB"
    limits = (gpu_limit_bytes(memory_bytes), ""), (raised_limit_bytes(memory_bytes), "*")
    for limit, mark in limits:
        fitting = [c for c in CONTEXTS if running_bytes(planned, c) <= limit]
        if fitting:
            return f"{size}, {_tokens(fitting[-1])}{mark}"
    return f"{size}, no"


def _fits(mac: Mac, needed_bytes: int) -> str:
    if needed_bytes <= gpu_limit_bytes(mac.memory_bytes):
        return "fits"
    if needed_bytes <= raised_limit_bytes(mac.memory_bytes):
        return f"N={wired_limit_mb(needed_bytes)}"
    return "no"


def _tokens(context: int) -> str:
    return f"{context // 1024}k" if context >= 1024 else str(context)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def draw(planned: Plan, file: Path) -> None:
    """The page as a picture: where the bytes are, and memory against the limits of Macs."""
    with picture(file, (12, 6.5)) as (figure, left, right):
        _draw_bytes(left, planned)
        _draw_macs(right, planned)
        figure.suptitle(
            f"{planned.source.origin['source']}: {planned.output_bytes / 1e9:,.1f} GB, "
            f"{planned.bits_per_weight:.2f} bits per weight"
        )


def _draw_bytes(axes: Any, planned: Plan) -> None:
    rows = sorted(planned.table(), key=lambda row: row.nbytes)[-14:]
    names = [row.name.removeprefix("language_model.").removeprefix("model.") for row in rows]
    bars = axes.barh(names, [row.nbytes / 1e9 for row in rows], color="#4477aa")
    axes.bar_label(bars, [f"{row.bits}-bit" if row.bits else row.dtype for row in rows], padding=3)
    axes.set_xlabel("GB on disk")
    axes.margins(x=0.15)
    axes.tick_params(axis="y", labelsize=8)


def _draw_macs(axes: Any, planned: Plan) -> None:
    names = [f"{mac.chip} {mac.memory_gib} GB" for mac in MACS]
    whole = [mac.memory_bytes / 1e9 for mac in MACS]
    raised = [raised_limit_bytes(mac.memory_bytes) / 1e9 for mac in MACS]
    limit = [gpu_limit_bytes(mac.memory_bytes) / 1e9 for mac in MACS]
    for values, colour, label in (
        (whole, "#dddddd", "memory"),
        (raised, "#bbccee", "with iogpu.wired_limit_mb raised"),
        (limit, "#4477aa", "GPU limit of macOS"),
    ):
        axes.barh(names, values, color=colour, label=label)
    for context, style in zip(CONTEXTS, (":", "-.", "--", "-"), strict=True):
        needed = running_bytes(planned, context) / 1e9
        axes.axvline(
            needed, color="#cc3311", linestyle=style, label=f"needed at {_tokens(context)}"
        )
    axes.set_xlabel("GB")
    axes.tick_params(axis="y", labelsize=8)
    axes.legend(fontsize=8)
