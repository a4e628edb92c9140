"""Checks a kernel and measures its time against MLX's own on this machine.

The runs are a chain: each takes the output of the one before, as the layers of a model do, and the
next of several copies of the weights, which together are larger than any cache.
"""

import re
import time

import mlx.core as mx

from ..family import Member
from . import checks, metal
from .checks import Case, Check, Setting
from .choice import dtype_name
from .tiers import MLX, PORTABLE, Tiers, with_kernels
from .verdicts import Verdict, shape_of

# Larger than the caches of any chip.
COLD_BYTES = 256 * 10**6
MAX_COPIES = 64
# Rounds of both tiers alternate, and the fastest counts.
ROUNDS, DECODE_RUNS, PREFILL_RUNS = 4, 16, 2
ON_MLX = Tiers(MLX)


class Mismatch(Exception):
    """The kernel's result differs from the reference, or the kernel did not run."""


def judge(check: Check, member: Member, setting: Setting, rounds: int = ROUNDS) -> Verdict:
    """The verdict on one operation at one size; errors of a kernel are part of it.

    A compiler's message is a problem of the kernel like any other.
    """
    verdict = about(check, member, setting)
    problem = None
    try:
        error, case = compare(check, member, setting)
        copies = [case, *_copies(check, member, setting, case)]
        runs = max(len(copies), PREFILL_RUNS if check.is_prefill else DECODE_RUNS)
        kernel = with_kernels([check.op])
        sides = {"metal": kernel, "mlx": ON_MLX}
        best = dict.fromkeys(sides, float("inf"))
        for _ in range(rounds):
            for side, tiers in sides.items():
                best[side] = min(best[side], seconds(copies, tiers, runs))
        # The time of linking one run to the next is subtracted.
        nothing = case._replace(run=lambda tiers, x: [x])
        link = min(seconds([nothing], ON_MLX, runs) for _ in range(rounds))
        metal_s, mlx_s = (max(best[side] - link, best[side] / 100) for side in sides)
        verdict = verdict._replace(
            error=error,
            metal_us=round(1e6 * metal_s, 2),
            mlx_us=round(1e6 * mlx_s, 2),
            metal_gb_per_s=round(case.num_bytes / metal_s / 1e9, 1),
            mlx_gb_per_s=round(case.num_bytes / mlx_s / 1e9, 1),
        )
    except Mismatch as mismatch:
        problem = str(mismatch)
    # Compilers and GPUs may raise any exception.
    except Exception as error:
        problem = f"{type(error).__name__}: {impersonal(error)}"
    mx.clear_cache()
    return verdict._replace(problem=problem)


def about(check: Check, member: Member, setting: Setting) -> Verdict:
    """A verdict without results yet."""
    form = (dtype_name(setting.dtype), setting.bits, setting.group_size)
    return Verdict(check.op, shape_of(member), *form, setting.num_tokens)


def compare(check: Check, member: Member, setting: Setting) -> tuple[float, Case]:
    """The kernel's error against the portable operations in float32; raises Mismatch."""
    exact = _build(check, member, setting.exact)
    wanted = exact.run(PORTABLE, exact.x)
    mx.eval(wanted)
    case = _build(check, member, setting)
    before = metal.num_uses()
    got = case.run(with_kernels([check.op]), case.x)
    mx.eval(got)
    dtype = dtype_name(setting.dtype)
    where = f"{member.name}, {dtype}, {setting.bits} bits, {setting.num_tokens} tokens"
    if metal.num_uses() == before:
        raise Mismatch(f"the kernel did not run: {where}")
    error = float(f"{checks.relative_error(got, wanted):.2g}")
    tolerance = checks.TOLERANCE[setting.dtype]
    if not error <= tolerance:
        raise Mismatch(f"relative error {error:.2g}, at most {tolerance:.2g}: {where}")
    return error, case


def _build(check: Check, member: Member, setting: Setting) -> Case:
    mx.random.seed(setting.seed)
    return check.build(member, setting)


def _copies(check: Check, member: Member, setting: Setting, case: Case) -> list[Case]:
    """More cases of the same sizes."""
    count = min(MAX_COPIES, COLD_BYTES // case.num_bytes)
    return [
        _build(check, member, setting._replace(seed=setting.seed + 1 + i)) for i in range(count)
    ]


def seconds(cases: list[Case], tiers: Tiers, runs: int) -> float:
    """Time per run of several in a chain, without the time of building their graph."""
    x = cases[0].x
    for i in range(runs):
        outputs = cases[i % len(cases)].run(tiers, x)
        x = _linked(x, *(y.reshape(-1)[0] for y in outputs))
    start = time.perf_counter()
    mx.eval(x)
    return (time.perf_counter() - start) / runs


@mx.compile
def _linked(x: mx.array, *outputs: mx.array) -> mx.array:
    """x, available after the outputs."""
    return x + sum((0 * y.astype(x.dtype) for y in outputs), mx.array(0, x.dtype))


def impersonal(error: Exception) -> str:
    """The first line of a message, without paths, which may name a user."""
    line = (str(error).strip().splitlines() or ["no message"])[0]
    return re.sub(r"[~\w.:\\-]*[/\\]\S*", "<path>", line)[:200]
