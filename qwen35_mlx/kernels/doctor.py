"""Looks at this machine, and whether its kernels are right and faster than plain MLX."""

import re
import time
from typing import Any

import mlx.core as mx

from ..family import FAMILY, Member
from ..machine import Machine, describe, summary
from ..progress import StepProgress
from . import checks, choice, metal
from .checks import Case, Check, Setting
from .metal import NONE

REPORT_VERSION = 1
# Rounds take turns, and the best counts; runs of a round overlap as far as the GPU lets them.
ROUNDS, DECODE_RUNS = 4, 16
# Of what the GPU may use: the rest is for others, and for a second copy.
MEMORY_SHARE = 0.7


def run(progress: StepProgress = lambda done, total, what: None) -> dict[str, Any]:
    """The report; without Metal its `kernels` is None."""
    machine = describe()
    kernels = None
    if choice.unavailable() is None:
        kernels = {}
        for i, check in enumerate(checks.CHECKS):
            progress(i, len(checks.CHECKS), check.op)
            kernels[check.op] = examine(check, machine)
    return {"doctor": REPORT_VERSION, "machine": summary(machine), "kernels": kernels}


def store(report: dict[str, Any]) -> None:
    """Keep what was found of the kernels for `load(kernels="auto")`."""
    if report["kernels"] is not None:
        choice.write(report["kernels"])


def examine(check: Check, machine: Machine) -> dict[str, Any]:
    """Whether one operation's kernel matches, and its time at each member's shapes.

    Nothing a kernel does, crash at compiling included, ends the examination of the others.
    """
    result: dict[str, Any] = dict(matched=False, error=0.0, problem=None, speedup={}, members={})
    try:
        for setting in checks.parity_settings(check):
            _compare(check, checks.SMALL, setting, result)
        for member in FAMILY:
            if check.needs_experts and not member.num_experts:
                continue
            if checks.num_bytes_needed(check, member) > MEMORY_SHARE * (
                machine.gpu_limit_bytes or machine.memory_bytes
            ):
                result["members"][member.name] = "not enough memory"
                continue
            num_tokens = checks.PREFILL_TOKENS if check.is_prefill else 1
            case = _compare(check, member, Setting(num_tokens=num_tokens), result)
            _time(check, member, case, result)
            del case
            mx.clear_cache()
        result["matched"] = True
    except _Mismatch as mismatch:
        result["problem"] = str(mismatch)
    # Compilers and GPUs raise what they like.
    except Exception as error:
        result["problem"] = f"{type(error).__name__}: {_impersonal(error)}"
    return result


class _Mismatch(Exception):
    """The kernel computes something else than ops."""


def _compare(check: Check, member: Member, setting: Setting, result: dict[str, Any]) -> Case:
    mx.random.seed(setting.seed)
    case = check.build(member, setting)
    wanted = case.run(NONE)
    mx.eval(wanted)
    before = metal.num_uses()
    got = case.run(frozenset({check.op}))
    mx.eval(got)
    dtype = str(setting.dtype).removeprefix("mlx.core.")
    where = f"{member.name}, {dtype}, {setting.bits} bits, {setting.num_tokens} tokens"
    if metal.num_uses() == before:
        raise _Mismatch(f"the kernel did not run: {where}")
    error = checks.relative_error(got, wanted)
    result["error"] = max(result["error"], float(f"{error:.2g}"))
    tolerance = checks.TOLERANCE[setting.dtype]
    if not error <= tolerance:
        raise _Mismatch(f"relative error {error:.2g}, at most {tolerance:.2g}: {where}")
    return case


def _time(check: Check, member: Member, case: Case, result: dict[str, Any]) -> None:
    """Best time of a run each way; overlap favours ops, which have more to overlap."""
    runs = 1 if check.is_prefill else DECODE_RUNS
    best = {"kernel": float("inf"), "ops": float("inf")}
    for _ in range(ROUNDS):
        for name, kernels in (("kernel", frozenset({check.op})), ("ops", NONE)):
            best[name] = min(best[name], seconds(case, kernels, runs))
    speedup = best["ops"] / best["kernel"]
    result["speedup"][choice.shape_key(member)] = round(speedup, 3)
    result["members"][member.name] = {
        "speedup": round(speedup, 2),
        **{f"{name}_us": round(1e6 * t, 1) for name, t in best.items()},
        **{f"{name}_gb_per_s": round(case.num_bytes / t / 1e9, 1) for name, t in best.items()},
    }


def seconds(case: Case, kernels: metal.KernelSet, runs: int) -> float:
    """Time of one of several runs, without that of building their graphs."""
    outputs = [case.run(kernels) for _ in range(runs)]
    start = time.perf_counter()
    mx.eval(outputs)
    return (time.perf_counter() - start) / runs


def _impersonal(error: Exception) -> str:
    """The first line of a message, without paths, which may name a user."""
    line = (str(error).strip().splitlines() or ["no message"])[0]
    return re.sub(r"[~\w.:\\-]*[/\\]\S*", "<path>", line)[:200]
