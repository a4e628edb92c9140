"""What `plan` prints below its table: disk and memory, and on which Macs the model runs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from qwen35_mlx.checkpoint.headers import SourceTensor
from qwen35_mlx.checkpoint.tensor_table import expected_shapes
from qwen35_mlx.config import ModelConfig, VisionConfig
from qwen35_mlx.errors import ConfigError, Qwen35Error, first_line
from qwen35_mlx.family import FAMILY, family_config, find_member
from qwen35_mlx.machine import (
    GIB,
    default_limit_bytes,
    disk_gbps,
    raised_limit_bytes,
    wired_limit_mb,
)
from qwen35_mlx.media.patches import picture_size
from qwen35_mlx.media.settings import VisionSettings, read_settings
from qwen35_mlx.memory import AUTO, DEFAULT_CONTEXT, check_context, kv_choices
from qwen35_mlx.quant.recipes import RECIPES, recipe

from .hub import HubSource
from .job import SPARE_BYTES, source_disk_bytes
from .mac_models import (
    BANDWIDTH_LIMIT,
    EFFICIENCY,
    MACS,
    MISS_RATES,
    ROUTER_S,
    SSD_GBPS,
    Mac,
    activation_bytes,
    from_disk,
    from_disk_tps,
    running,
    share,
    this_mac,
)
from .plan import Plan, plan
from .plots import picture
from .source import Source
from .tasks import SLICE_BYTES, WORKERS, cut, peak_bytes

# GPU limit of Macs without a known memory size.
UNBOUNDED = 2**60
CONTEXTS = (8_192, 32_768, 131_072, 262_144)
FAMILY_BITS = (3, 4, 6, 8)
# Width and height of typical pictures.
PICTURES = {
    "a photo of 12 MP": (4032, 3024),
    "a screenshot of 1920x1080": (1920, 1080),
    "a picture of 512x512": (512, 512),
}
# Minimum and maximum area of pictures in the released models, for a source without settings.
FAMILY_PIXELS = (65_536, 16_777_216)
NO_MTP = " no MTP"
WAYS = "kv8: with --kv-bits 8; no MTP: without the MTP layer"
NOTE = (
    "fits: within macOS's default GPU limit; N=...: after sudo sysctl iogpu.wired_limit_mb=N;\n"
    f"{WAYS};\n"
    "{bandwidth}: an upper bound at {context}, which no program reaches.\n"
    "Computed from sizes, not measured on these Macs."
)

SHARED_NOTE = (
    "This is the first of {macs} such Macs that run the model together. The limit ignores the link:"
    " a token\ntakes {messages} messages, which at 30 us each allow {bound:,.0f} tok/s."
)
EQUAL_PARTS = "each Mac has an equal part of every layer"


@cache
def family_source(name: str) -> Source:
    """A released model in bfloat16 with its tower, for `plan` only: its weights cannot be read."""
    raw = family_config(name)
    text = ModelConfig.from_hf(raw)
    config = replace(text, vision=VisionConfig.from_hf(raw, text.hidden_size))
    file = Path(name) / "model.safetensors"
    tensors = {
        tensor: SourceTensor(tensor, "BF16", shape, file, 0, 2 * math.prod(shape))
        for tensor, shape in expected_shapes(config).items()
    }
    return Source(file.parent, raw, tensors)


def find_source(name: str, revision: str | None = None) -> str | Source:
    """The source of a released model's name, from the family table; folders and hub ids as is.

    Raises Qwen35Error for any other name.
    """
    if Path(name).expanduser().exists() or revision:
        return name
    if member := find_member(name):
        return family_source(member.full_name)
    if "/" not in name:
        raise Qwen35Error(
            f"{name} is not a folder or a released model",
            got=repr(name),
            expected="a folder, a hub id, or one of " + ", ".join(m.full_name for m in FAMILY),
        )
    return name


def conversion_lines(planned: Plan, keep_source: bool = False) -> list[str]:
    """The memory and disk space that a conversion needs."""
    tasks = cut(planned)
    peak = peak_bytes(planned, tasks)
    lines = [
        f"conversion: peak memory {peak / 1e6:,.0f} MB ({WORKERS} slices of the source of at most"
        f" {SLICE_BYTES / 2**20:.0f} MiB, with their output)"
    ]
    disk = planned.output_bytes + SPARE_BYTES
    if isinstance(planned.source, HubSource):
        fetched = source_disk_bytes(planned.source, tasks, keep_source)
        lines.append(
            f"disk: {(disk + fetched) / 1e9:,.1f} GB, of which {planned.output_bytes / 1e9:,.1f} GB"
            f" for the output and {fetched / 1e9:,.1f} GB for downloaded shards"
        )
    else:
        lines.append(f"disk: {disk / 1e9:,.1f} GB for the output, in addition to the source")
    return lines


def picture_lines(planned: Plan) -> list[str]:
    """The number of tokens of typical pictures, and the memory of their features."""
    vision = planned.config.vision
    if vision is None:
        return ["no vision tower: the model reads text only"]
    # Mean and standard deviation are empty: they do not affect the number of tokens.
    patches = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size, (), ())
    try:
        settings = read_settings(planned.source.folder) or VisionSettings(*patches, *FAMILY_PIXELS)
    except ConfigError as error:
        return [f"pictures cannot be read: {first_line(error)}"]
    rows = [("pictures: tokens in the context, memory of the features", "", "")]
    for name, (width, height) in PICTURES.items():
        tokens = math.prod(picture_size(height, width, settings)) // settings.factor**2
        feature_bytes = tokens * vision.out_hidden_size * activation_bytes(planned)
        rows.append((f"  {name}", f"{tokens:,} tokens", f"{feature_bytes / 1e6:,.1f} MB"))
    return aligned(rows)


def mac_lines(
    planned: Plan,
    macs: Sequence[Mac],
    context: int | None = None,
    kv_bits: str = AUTO,
    num_macs: int = 1,
) -> list[str]:
    """A table of whether the model fits, for each Mac and context, and the bandwidth limit.

    num_macs: equal Macs that run the model together; the table is for the first of them.
    """
    shared = share(with_kv(planned, kv_bits)[0], [UNBOUNDED] * num_macs)
    planned = first = shared.parts[0]
    longest = planned.config.context_length
    contexts = [c for c in CONTEXTS if c <= longest] or [longest]
    if context is not None:
        check_context(planned.config, context)
        contexts = [context]
    needed = [running(first, c) for c in contexts]
    rows = [
        ["Mac", "memory", "GPU limit", *(f"at {_tokens(c)}" for c in contexts), BANDWIDTH_LIMIT],
        ["memory when running", "", "", *(_gb(n.total) for n in needed), ""],
        ["  of which attention scores", "", "", *(_gb(n.scores) for n in needed), ""],
        ["  queries per block of scores", "", "", *(f"{n.query_block:,}" for n in needed), ""],
    ]
    for mac in macs:
        fits = [_fits(mac, planned, c, kv_bits) for c in contexts]
        gbps = [mac.gbps] * num_macs
        speed = shared.tokens_per_second(gbps, contexts[0]) if mac.gbps else 0
        bound = f"{speed:,.0f}" if speed and fits[0] != "no" else "-"
        limit = f"{default_limit_bytes(mac.memory_bytes) / 1e9:,.0f} GB"
        rows.append([mac.chip or "any", f"{mac.memory_gib:g} GB", limit, *fits, bound])
    note = NOTE.format(bandwidth=BANDWIDTH_LIMIT, context=_tokens(contexts[0]))
    lines = [*aligned(rows), *note.splitlines()]
    if shared.split:
        messages = shared.num_messages
        lines += [shared.split.note] if shared.split.note else []
        lines += SHARED_NOTE.format(
            macs=num_macs, messages=messages, bound=1e6 / (30 * messages)
        ).splitlines()
    return lines


def unequal_lines(
    planned: Plan, macs: Sequence[Mac], context: int | None = None, kv_bits: str = AUTO
) -> list[str]:
    """A table of different Macs that run the model together, with the part of each."""
    context = context or min(CONTEXTS[1], planned.config.context_length)
    check_context(planned.config, context)
    shared = share(with_kv(planned, kv_bits)[0], [mac.gpu_limit_bytes for mac in macs])
    rows = [["Mac", "memory", "GPU limit", "weights", f"running {_tokens(context)}", "fits"]]
    for mac, part in zip(macs, shared.parts, strict=True):
        numbers = (mac.gpu_limit_bytes, part.loaded_bytes, running(part, context).total)
        fits = _fits(mac, part, context, kv_bits)
        rows.append([mac.chip or "any", f"{mac.memory_gib:g} GB", *map(_gb, numbers), fits])
    gbps = [mac.gbps for mac in macs]
    bound = f"{shared.tokens_per_second(gbps, context):,.0f}" if all(gbps) else "-"
    assert shared.split
    return [
        *aligned(rows),
        shared.split.note or EQUAL_PARTS,
        f"{BANDWIDTH_LIMIT} at {_tokens(context)}: {bound}; each token needs {shared.num_messages}"
        " messages",
    ]


def disk_lines(planned: Plan, macs: Sequence[Mac], context: int | None = None) -> list[str]:
    """A table of Macs that hold only some of the experts in memory, with estimated speeds."""
    context = context or min(CONTEXTS[0], planned.config.context_length)
    known = [mac for mac in macs if mac.gbps]
    found = [(mac, held) for mac in known if (held := from_disk(planned, mac, context))]
    if not found:
        return []
    file, is_own = planned.source.files[0], this_mac() in macs
    ssd = (disk_gbps(file), "measured") if is_own and file.exists() else (SSD_GBPS, "assumed")
    rows = [["Mac", "memory", "experts in memory", *(f"{miss:.0%} misses" for miss in MISS_RATES)]]
    for mac, held in found:
        share = held.num_slots / planned.config.num_experts
        cells = [f"{held.num_slots}, {share:.0%}: {_gb(held.pool_bytes)}"]
        for miss in MISS_RATES:
            speed = from_disk_tps(planned, mac, held, miss, ssd[0], context)
            cells.append(f"{speed:,.1f} tok/s")
        rows.append([mac.chip, f"{mac.memory_gib:g} GB", *cells])
    return [
        "",
        f"experts from disk (--experts-memory), at {_tokens(context)}:",
        *aligned(rows),
        f"for an SSD with {ssd[0]:.1f} GB/s ({ssd[1]}), {EFFICIENCY:.0%} of the memory bandwidth,"
        f" and {1000 * ROUTER_S:.2f} ms per layer for the router;",
        f"published miss rates: {MISS_RATES[0]:.0%} for one topic, {MISS_RATES[-1]:.0%} after a"
        " change of topic",
    ]


def family_lines(
    memory_bytes: int,
    where: str,
    context: int | None = None,
    settings: Callable[[Source], dict[str, Any]] | None = None,
    kv_bits: str = AUTO,
    num_macs: int = 1,
) -> list[str]:
    """A table of the released models on a machine: sizes and contexts that fit, for several bits.

    settings: gives the settings of `plan` for a source, instead of several bits.
    """
    rows = [["model", *([f"{bits}-bit" for bits in FAMILY_BITS] if not settings else ["as asked"])]]
    for member in FAMILY:
        source = family_source(member.full_name)
        ways = [settings(source)] if settings else [dict(bits=bits) for bits in FAMILY_BITS]
        parts = [share(plan(source, **way), [UNBOUNDED] * num_macs).parts[0] for way in ways]
        cells = [_longest(part, memory_bytes, context, kv_bits) for part in parts]
        rows.append([member.full_name, *cells])
    asked = f"whether {context:,} tokens fit" if context else "the longest context that fits"
    each = f", each of {num_macs} that run a model together" if num_macs > 1 else ""
    return [
        f"{memory_bytes / GIB:.0f} GB of memory: {where}{each}",
        *aligned(rows),
        f"size, and {asked}",
        _raised_note(memory_bytes),
        "For details of a model: plan NAME",
    ]


def fitting_lines(
    memory_bytes: int, where: str, context: int | None, kv_bits: str = AUTO
) -> list[str]:
    """A table of the released models, with the recipe of the most bits that fits the memory."""
    ways: dict[str, dict[str, Any]] = {"unquantized": dict(dtype="bfloat16")}
    ways |= {f"--recipe {name}": dict(recipe=recipe(name)) for name in RECIPES}
    context = context or DEFAULT_CONTEXT
    rows = [["model", "fits with", "bits per weight", "size", "memory when running"]]
    for member in FAMILY:
        source = family_source(member.full_name)
        row = [member.full_name, "no recipe", "", "", ""]
        smallest, *others = reversed(ways)
        # The smallest first: if it does not fit, nothing does.
        if _need(plan(source, **ways[smallest]), memory_bytes, context, kv_bits):
            for name in [*reversed(others), smallest]:
                planned = plan(source, **ways[name])
                need = _need(planned, memory_bytes, context, kv_bits)
                # The MTP layer is worth more than a few bits.
                if need and (name == smallest or not need[1].endswith(NO_MTP)):
                    bits = f"{planned.bits_per_weight:.2f}"
                    row[1:] = [name + need[1], bits, _gb(planned.output_bytes), _gb(need[0])]
                    break
        rows.append(row)
    return [
        f"{memory_bytes / GIB:.0f} GB of memory: {where}, with a context of {context:,} tokens",
        *aligned(rows),
        _raised_note(memory_bytes),
        "convert SRC OUT --fit MEMORY uses the remaining memory for the most sensitive tensors",
    ]


def _raised_note(memory_bytes: int) -> str:
    mb = wired_limit_mb(raised_limit_bytes(memory_bytes))
    return f"*: with iogpu.wired_limit_mb raised to {mb}; {WAYS}"


def with_kv(planned: Plan, kv_bits: str) -> list[Plan]:
    """The plan with the possible bits of keys and values; the first one that fits is used."""
    return [replace(planned, config=config) for config in kv_choices(planned.config, kv_bits)]


def _need(planned: Plan, memory_bytes: int, context: int, kv_bits: str) -> tuple[int, str] | None:
    """The bytes in use, and what is necessary to make the model fit; None if it does not fit.

    "*": raise the GPU limit. Then what `load` does, in its order: " kv8", " no MTP".
    """
    check_context(planned.config, context)
    ways = [(planned, "")]
    if planned.mtp_bytes:
        config = replace(planned.config, num_mtp_layers=0)
        ways.append((replace(planned, config=config), NO_MTP))
    for way, without in ways:
        for number, one in enumerate(with_kv(way, kv_bits)):
            for limit, mark in ((default_limit_bytes, ""), (raised_limit_bytes, "*")):
                needed = running(one, context, limit(memory_bytes)).total
                if needed <= limit(memory_bytes):
                    return needed, mark + (" kv8" if number else "") + without
    return None


def _longest(planned: Plan, memory_bytes: int, context: int | None, kv_bits: str) -> str:
    """The size, and the longest context that fits; those without a raised limit come first."""
    contexts = [context] if context else CONTEXTS
    needs = {c: _need(planned, memory_bytes, c, kv_bits) for c in contexts}
    fitting = [(not need[1], c, need[1]) for c, need in needs.items() if need]
    if not fitting:
        return f"{_gb(planned.output_bytes)}, no"
    _, longest, mark = max(fitting)
    return f"{_gb(planned.output_bytes)}, {_tokens(longest)}{mark}"


def _fits(mac: Mac, planned: Plan, context: int, kv_bits: str) -> str:
    need = _need(planned, mac.memory_bytes, context, kv_bits)
    if need is None:
        return "no"
    fits = f"N={wired_limit_mb(need[0])}" if need[1].startswith("*") else "fits"
    return fits + need[1].removeprefix("*")


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"


def _tokens(context: int) -> str:
    return f"{context // 1024}k" if context % 1024 == 0 else f"{context:,}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def draw(planned: Plan, file: Path) -> None:
    """Draw a PNG: the largest modules, and the memory compared with the limits of Macs."""
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
    names = [mac.name for mac in MACS]
    whole = [mac.memory_bytes / 1e9 for mac in MACS]
    raised = [raised_limit_bytes(mac.memory_bytes) / 1e9 for mac in MACS]
    limit = [default_limit_bytes(mac.memory_bytes) / 1e9 for mac in MACS]
    for values, colour, label in (
        (whole, "#dddddd", "memory"),
        (raised, "#bbccee", "with iogpu.wired_limit_mb raised"),
        (limit, "#4477aa", "GPU limit of macOS"),
    ):
        axes.barh(names, values, color=colour, label=label)
    for context, style in zip(CONTEXTS, (":", "-.", "--", "-"), strict=True):
        needed = running(planned, context).total / 1e9
        axes.axvline(
            needed, color="#cc3311", linestyle=style, label=f"needed at {_tokens(context)}"
        )
    axes.set_xlabel("GB")
    axes.tick_params(axis="y", labelsize=8)
    axes.legend(fontsize=8)
