"""Chooses bits for each tensor within a budget, from a source's headers and its calibration."""

import hashlib
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35_mlx.checkpoint.headers import ITEM_BYTES
from qwen35_mlx.checkpoint.names import is_mtp
from qwen35_mlx.checkpoint.tensor_table import Role
from qwen35_mlx.config import ModelConfig
from qwen35_mlx.errors import MemoryRefused, Qwen35Error
from qwen35_mlx.machine import (
    GIB,
    default_limit_bytes,
    parse_memory,
    raised_limit_bytes,
    wired_limit_mb,
)
from qwen35_mlx.memory import (
    AUTO,
    DEFAULT_CONTEXT,
    MemoryCount,
    check_context,
    count,
    kv_choices,
    read_share,
)
from qwen35_mlx.quant.affine import quantized_shapes
from qwen35_mlx.quant.allocate import Allocation, Option, allocate
from qwen35_mlx.quant.recipes import KL_AT_4_BITS, SENSITIVITIES, kind_of
from qwen35_mlx.quant.recipes import recipe as named_recipe
from qwen35_mlx.quant.statistics import Calibration, Setting, typical_errors, unit_of

from .hub import open_any
from .mac_models import BANDWIDTH_LIMIT, MACS, activation_bytes, bytes_per_token, tokens_per_second
from .plan import DEFAULT_METHOD, DISTILL, Entry, Plan, Recipe, plan
from .shards import text_header_bytes
from .source import Source

PREFERENCES = ("quality", "speed")


@dataclass(frozen=True)
class FitResult:
    """An allocation as a plan, with its predicted KL in nats per token."""

    plan: Plan
    recipe: Recipe
    predicted_kl: float
    # Bytes of text model and MTP layer in files, with headers.
    file_bytes: int
    allocation: Allocation
    # Whether the prediction is based on measured KLs of a calibration.
    measured: bool


@dataclass(frozen=True)
class MacBudget:
    """The memory of a Mac, and how much of it is available for weights."""

    memory_bytes: int
    limit_bytes: int
    # Everything except the weights of text model and MTP layer.
    needed: MemoryCount

    @property
    def weight_bytes(self) -> int:
        return self.limit_bytes - self.needed.total


def fit(
    source: str | Path | Source,
    budget_bytes: int | None = None,
    *,
    bits_per_weight: float | None = None,
    calibration: Calibration | None = None,
    prefer: str = "quality",
    dtype: str | None = None,
    method: str = "search",
) -> FitResult:
    """Choose bits and group sizes with the lowest predicted KL within a budget.

    The budget is either `budget_bytes`, for text model and MTP layer with headers, or
    `bits_per_weight` as in `Plan.bits_per_weight`. prefer: "speed" accepts one percent more KL for
    one percent fewer bytes read per token. Raises MemoryRefused if the budget is too small.
    """
    if prefer not in PREFERENCES:
        raise Qwen35Error(f"prefer={prefer!r} is unknown", expected=", ".join(PREFERENCES))
    source = open_any(source)
    base = plan(source, recipe=_narrow, dtype=dtype, method=method)
    base.refuse_other(calibration)
    text = base.text_entries
    container = text_header_bytes(base)
    if bits_per_weight is not None:
        budget_bytes = int(bits_per_weight * sum(e.num_parameters for e in text) / 8)
        budget_bytes += base.mtp_bytes
        container = 0
    assert budget_bytes is not None
    units: dict[str, list[Entry]] = {}
    for entry in text:
        if entry.role is Role.QUANTIZED:
            units.setdefault(unit_of(entry.module), []).append(entry)
    unquantized = sum(e.output_bytes for e in text if e.role is not Role.QUANTIZED)
    fixed = base.mtp_bytes + unquantized + container
    losses = predicted(units, calibration)
    if calibration and method == DISTILL:
        # More bits for units whose loss was reduced less by an earlier distillation.
        for unit, members in units.items():
            left = sum(calibration.left.get(e.module, 1.0) for e in members) / len(members)
            losses[unit] = {setting: kl * left for setting, kl in losses[unit].items()}
    tables = {
        unit: [
            Option(*setting, sum(_nbytes(e, setting) for e in members), error)
            for setting, error in losses[unit].items()
        ]
        for unit, members in units.items()
    }
    room = budget_bytes - fixed
    smallest = sum(min(o.nbytes for o in options) for options in tables.values())
    if room < smallest:
        raise MemoryRefused(
            "the budget is smaller than the smallest plan",
            got=f"{budget_bytes / 1e9:,.3f} GB for weights",
            expected=f"at least {(smallest + fixed) / 1e9:,.3f} GB",
            hint="use a larger Mac, a shorter --context, or a smaller model"
            if bits_per_weight is None
            else "use more --bits-per-weight",
        )
    allocation = allocate(tables, room)
    if prefer == "speed":
        allocation = allocate(_priced(base.config, units, tables, allocation), room)
    settings = {unit: (o.bits, o.group_size) for unit, o in allocation.options.items()}
    named = _recipe(settings)
    chosen = plan(source, recipe=named, dtype=dtype, method=method)
    kl = math.fsum(losses[unit][setting] for unit, setting in settings.items())
    file_bytes = chosen.text_bytes + chosen.mtp_bytes
    file_bytes += text_header_bytes(chosen) if container else 0
    measured = bool(calibration and calibration.kls)
    return FitResult(chosen, named, kl, file_bytes, allocation, measured)


def fit_mac(
    source: str | Path | Source,
    memory: int,
    *,
    context: int | None = None,
    kv_bits: str = AUTO,
    **settings: Any,
) -> tuple[MacBudget, dict[str, FitResult]]:
    """The memory for weights on a Mac with `memory` bytes, and the result of `fit` by preference.

    The GPU limit is raised as far as is reasonable. context: tokens that must also fit, by default
    32,768 or the model's maximum. settings: as in `fit`. Raises MemoryRefused if nothing fits.
    """
    opened = open_any(source)
    base = plan(opened, dtype=settings.get("dtype"))
    if context is None:
        context = min(DEFAULT_CONTEXT, base.config.context_length)
    check_context(base.config, context)
    limit = raised_limit_bytes(memory)

    def fitted(config: ModelConfig) -> tuple[MacBudget, dict[str, FitResult]]:
        needed = count(config, base.tower_bytes, context, limit, activation_bytes(base))
        budget = MacBudget(memory, limit, needed)
        choices = {
            prefer: fit(opened, budget.weight_bytes, prefer=prefer, **settings)
            for prefer in PREFERENCES
        }
        return budget, choices

    *firsts, last = kv_choices(base.config, kv_bits)
    for config in firsts:
        with suppress(MemoryRefused):
            return fitted(config)
    return fitted(last)


def quality_settings(
    source: str | Path | Source,
    *,
    bits: int | None = None,
    recipe: str | None = None,
    memory: str | None = None,
    bits_per_weight: float | None = None,
    prefer: str | None = None,
    context: int | None = None,
    calibration: Calibration | None = None,
    dtype: str | None = None,
    method: str | None = None,
    revision: str | None = None,
    kv_bits: str = AUTO,
) -> tuple[dict[str, Any], list[str]]:
    """Settings for `plan` and `convert` from one of bits, recipe, memory and bits per weight.

    Also lines that show how a budget is used; empty without a budget. Raises Qwen35Error for
    several of these arguments, and MemoryRefused for a budget that is too small.
    """
    ways = dict(bits=bits, recipe=recipe, fit=memory, bits_per_weight=bits_per_weight)
    if len(given := [name for name, value in ways.items() if value is not None]) > 1:
        raise Qwen35Error("more than one argument sets the bits", got=" and ".join(given))
    if method is None:
        method = "search" if given not in ([], ["bits"]) or calibration else DEFAULT_METHOD
        if calibration and calibration.hessians:
            method = "gptq"
    settings: dict[str, Any] = dict(bits=bits, method=method)
    if recipe is not None:
        return settings | dict(recipe=named_recipe(recipe)), []
    if memory is None and bits_per_weight is None:
        return settings, []
    prefer = prefer or PREFERENCES[0]
    opened = open_any(source, revision)
    known: Any = dict(calibration=calibration, dtype=dtype, method=method)
    if memory is not None:
        known |= dict(context=context, kv_bits=kv_bits)
        budget, choices = fit_mac(opened, parse_memory(memory), **known)
        choice, lines = choices[prefer], budget_lines(budget, prefer, choices)
    else:
        choice = fit(opened, bits_per_weight=bits_per_weight, prefer=prefer, **known)
        lines = [f"predicted KL: {choice.predicted_kl:.5f} nats per token"]
    return settings | dict(recipe=choice.recipe), lines


def budget_lines(budget: MacBudget, prefer: str, choices: Mapping[str, FitResult]) -> list[str]:
    """The output of `--fit`: the use of the memory, and a comparison of the preferences."""
    left, choice, tower = budget.weight_bytes, choices[prefer], budget.needed.weights
    rows = {
        "GPU limit, raised as far as is reasonable": budget.limit_bytes,
        **({"weights of the vision tower": tower} if tower else {}),
        **budget.needed.overhead_lines(),
        "available for weights": left,
        "weights, with headers": choice.file_bytes,
        "unused": left - choice.file_bytes,
    }
    lines = [f"a Mac with {budget.memory_bytes / GIB:g} GB"]
    lines += [f"  {name:44} {nbytes / 1e9:9.3f} GB" for name, nbytes in rows.items()]
    lines.append(f"  weights take {choice.file_bytes / left:.3%} of the available memory")
    if budget.limit_bytes > (default := default_limit_bytes(budget.memory_bytes)):
        mb = wired_limit_mb(budget.limit_bytes)
        lines.append(
            f"  the default GPU limit of macOS is {default / 1e9:.1f} GB; raise it with:"
            f" sudo sysctl iogpu.wired_limit_mb={mb}"
        )
    macs = [mac for mac in MACS if mac.memory_bytes == budget.memory_bytes]
    titles = [f"{BANDWIDTH_LIMIT} ({mac.chip})" for mac in macs]
    lines += ["", "  ".join(["prefer   bits/weight  predicted KL  GB/token", *titles])]
    for name, each in choices.items():
        read = bytes_per_token(each.plan) / 1e9
        bounds = [tokens_per_second(each.plan, mac.gbps) for mac in macs]
        columns = "".join(f"  {b:{len(t)}.1f}" for b, t in zip(bounds, titles, strict=True))
        lines.append(
            f"{name:8} {each.plan.bits_per_weight:11.3f}  {each.predicted_kl:12.5f}  {read:8.2f}"
            + columns
            + ("  <- this plan" if name == prefer else "")
        )
    basis = "measured on the calibration text" if choice.measured else "estimated by kind of tensor"
    lines.append(f"Predicted KL: nats per token to the unquantized model, {basis}.")
    if macs:
        lines.append(
            f"{BANDWIDTH_LIMIT}: an upper bound with an empty context; no program reaches it."
        )
    return lines


def _narrow(module: str) -> tuple[int, int]:
    """The smallest group size, which divides all widths; the MTP layer as in `_recipe`."""
    return (4, 64) if is_mtp(module) else (4, 32)


def _recipe(settings: Mapping[str, Setting]) -> Recipe:
    def chosen(module: str) -> Setting | None:
        # Modules that are not allocated, such as routers; `plan` sets their bits.
        return settings.get(unit_of(module), (8, 64))

    digest = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()
    # The name identifies the allocation when a job is resumed.
    chosen.__name__ = f"allocated-{digest[:12]}"
    return chosen


def _nbytes(entry: Entry, setting: Setting) -> int:
    packed, scales = quantized_shapes(entry.shape, *setting)
    return 4 * math.prod(packed) + 2 * math.prod(scales) * ITEM_BYTES[entry.dtype]


def _priced(
    config: ModelConfig,
    units: Mapping[str, list[Entry]],
    tables: Mapping[str, list[Option]],
    best: Allocation,
) -> dict[str, list[Option]]:
    """Options with a new error: its share of the best total, plus that of its bytes read."""
    shares = {unit: read_share(config, members[0].module) for unit, members in units.items()}
    read = sum(option.nbytes * shares[unit] for unit, option in best.options.items())
    return {
        unit: [
            o._replace(error=o.error / max(best.error, 1e-12) + o.nbytes * shares[unit] / read)
            for o in options
        ]
        for unit, options in tables.items()
    }


def predicted(
    units: Mapping[str, list[Entry]], calibration: Calibration | None
) -> dict[str, dict[Setting, float]]:
    """The KL in nats that each setting of each unit adds; small contributions are additive.

    Measured KLs are extrapolated to other settings by the errors of the outputs. Other units have
    the sensitivity of their kind, scaled so that the model at 4 bits has a published KL.
    """
    errors = {unit: _errors(members, calibration) for unit, members in units.items()}
    weights = {unit: SENSITIVITIES[kind_of(unit)] for unit in units}
    at_4_bits = typical_errors()[4, 64] * sum(weights.values())
    result = {}
    for unit, row in errors.items():
        measured = calibration.kls.get(unit) if calibration else None
        if measured:
            result[unit] = {s: _extrapolated(error, row, measured) for s, error in row.items()}
        else:
            result[unit] = {
                s: error * weights[unit] / at_4_bits * KL_AT_4_BITS for s, error in row.items()
            }
    return result


def _errors(members: list[Entry], calibration: Calibration | None) -> dict[Setting, float]:
    """The mean error over the modules of a unit, for each setting that fits their widths."""
    known = [
        (calibration.errors.get(e.module) if calibration else None) or typical_errors()
        for e in members
    ]
    return {
        setting: sum(row[setting] for row in known) / len(known)
        for setting in typical_errors()
        if all(setting in row for row in known)
        and all(e.shape[-1] % setting[1] == 0 for e in members)
    }


def _extrapolated(
    error: float, row: Mapping[Setting, float], measured: Mapping[Setting, float]
) -> float:
    """The KL at `error`, on the line through the measured points in logarithmic scales."""
    floor = 1e-12
    points = sorted((max(row[s], floor), max(kl, floor)) for s, kl in measured.items() if s in row)
    (low, low_kl), (high, high_kl) = points[0], points[-1]
    slope = 1.0
    if high > low * 1.01:
        # Limited to half to double of proportional: a small measured KL is imprecise.
        slope = min(max(math.log(high_kl / low_kl) / math.log(high / low), 0.5), 2.0)
    start, start_kl = (low, low_kl) if error < math.sqrt(low * high) else (high, high_kl)
    return start_kl * (max(error, floor) / start) ** slope
