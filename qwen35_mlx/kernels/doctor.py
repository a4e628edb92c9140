"""Describes this machine, and compares every kernel with MLX's own at the family's sizes."""

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from ..family import FAMILY, Member
from ..machine import Machine, describe, summary
from ..progress import StepProgress
from . import checks, choice, measure, verdicts
from .checks import Check, Setting
from .measure import Mismatch
from .verdicts import Format, Verdict

REPORT_VERSION = 2
DEFAULT_FORMAT = Format("bfloat16", 4, 64)
# Share of the GPU's memory limit that a case may use; other programs need the rest.
MEMORY_SHARE = 0.7


def run(
    progress: StepProgress = lambda done, total, what: None,
    formats: Sequence[Format] = (DEFAULT_FORMAT,),
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """The report on the family's sizes in these formats; without Metal its `kernels` is None.

    The sizes and formats of `model` are measured too.
    """
    machine = describe()
    kernels = None
    if choice.unavailable() is None:
        kernels = []
        own = None if model is None else choice.formats_of(model)
        for i, check in enumerate(checks.CHECKS):
            progress(i, len(checks.CHECKS), check.op)
            sizes = [(member, form) for member in FAMILY for form in formats]
            if model is not None and own is not None:
                sizes.append((verdicts.member_of(model.config), own[check.op]))
            kernels += examine(check, machine, sizes)
    return {"doctor": REPORT_VERSION, "machine": summary(machine), "kernels": kernels}


def store(report: dict[str, Any]) -> None:
    """Store the verdicts for `load(kernels="auto")`."""
    if report["kernels"] is not None:
        fields = Verdict._fields
        verdicts.write(Verdict(**{f: row[f] for f in fields}) for row in report["kernels"])


def examine(
    check: Check, machine: Machine, sizes: Sequence[tuple[Member, Format]]
) -> list[dict[str, Any]]:
    """Rows of the report: verdicts on one operation, with the member's name and the speedup.

    A kernel that is wrong in any small case counts as wrong for every size.
    """
    problem = parity_problem(check)
    rows = []
    for member, form in sizes:
        if check.needs_experts and not member.num_experts:
            continue
        for num_tokens in choice.tokens_of(check.op):
            needed = checks.num_bytes_needed(check, member, num_tokens)
            if needed > MEMORY_SHARE * machine.limit_bytes:
                continue
            setting = Setting.of(form, num_tokens)
            if problem is None:
                verdict = measure.judge(check, member, setting)
            else:
                verdict = measure.about(check, member, setting)._replace(problem=problem)
            share = verdict.metal_gb_per_s / machine.gbps if machine.gbps else None
            rows.append(
                {
                    "member": member.name,
                    **verdict._asdict(),
                    "speedup": round(verdict.speedup, 3),
                    "used": verdict.is_faster,
                    "bandwidth_share": share and round(share, 3),
                }
            )
    return rows


def parity_problem(check: Check) -> str | None:
    """The problem of an operation's kernel in small cases of all widths and types, or None."""
    try:
        for setting in checks.parity_settings(check):
            measure.compare(check, checks.SMALL, setting)
    except Mismatch as mismatch:
        return str(mismatch)
    # Compilers and GPUs may raise any exception.
    except Exception as error:
        return f"{type(error).__name__}: {measure.impersonal(error)}"
    return None
