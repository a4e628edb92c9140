"""Chooses bits and group size of each tensor: the lowest total error within a byte budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qwen35_mlx.errors import Qwen35Error

# Maximum number of budgets in the table of dynamic programming; a larger one has coarser units.
MAX_UNITS = 2**16


class Option(NamedTuple):
    """One way to store a tensor."""

    bits: int
    group_size: int
    nbytes: int
    error: float


@dataclass(frozen=True)
class Allocation:
    """The option of each tensor, and the sums of their bytes and errors."""

    options: dict[str, Option]
    nbytes: int
    error: float


def allocate(tables: Mapping[str, Sequence[Option]], budget_bytes: int) -> Allocation:
    """Choose one option for each tensor, with the lowest sum of errors within `budget_bytes`.

    A knapsack problem, solved by dynamic programming. The spendable bytes are those above the
    smallest choice. The result is optimal if the greatest common divisor of the sizes is at least
    1/65536 of them, as in small models. Otherwise sizes are rounded up to units of 1/65536, and a
    greedy search spends the bytes that remain.
    Raises Qwen35Error if the budget is below the smallest choice.
    """
    names = list(tables)
    hulls = [_undominated(tables[name]) for name in names]
    base = sum(options[0].nbytes for options in hulls)
    if base > budget_bytes:
        raise Qwen35Error(
            "the budget is smaller than the smallest plan",
            got=f"{budget_bytes:,} bytes for the quantized tensors",
            expected=f"at least {base:,} bytes",
        )
    spare = min(budget_bytes - base, sum(o[-1].nbytes - o[0].nbytes for o in hulls))
    extra_bytes = [option.nbytes - o[0].nbytes for o in hulls for option in o[1:]]
    unit = max(math.gcd(*extra_bytes), -(-spare // MAX_UNITS), 1)
    chosen = _table(hulls, spare // unit, unit)
    _spend(hulls, chosen, budget_bytes - _nbytes(hulls, chosen))
    picked = {name: o[k] for name, o, k in zip(names, hulls, chosen, strict=True)}
    error = math.fsum(option.error for option in picked.values())
    return Allocation(picked, _nbytes(hulls, chosen), error)


def _undominated(options: Sequence[Option]) -> list[Option]:
    """The options with a lower error than every smaller option, ordered by size."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.error)):
        if not math.isfinite(option.error) or option.error < 0:
            raise Qwen35Error("an error is not valid", got=option.error, expected="0 or more")
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def _nbytes(hulls: list[list[Option]], chosen: list[int]) -> int:
    return sum(o[k].nbytes for o, k in zip(hulls, chosen, strict=True))


def _table(hulls: list[list[Option]], units: int, unit: int) -> list[int]:
    """The index of each tensor's option, by dynamic programming.

    `best[u]` is the lowest error with u units more than the smallest choice.
    """
    best = np.zeros(units + 1)
    decisions = np.zeros((len(hulls), units + 1), dtype=np.uint8)
    for i, options in enumerate(hulls):
        total = best + options[0].error
        for k, option in enumerate(options[1:], 1):
            step = -(-(option.nbytes - options[0].nbytes) // unit)
            if step > units:
                break
            tried = best[: units + 1 - step] + option.error
            better = tried < total[step:]
            total[step:][better] = tried[better]
            decisions[i, step:][better] = k
        best = total
    chosen, left = [0] * len(hulls), units
    for i in range(len(hulls) - 1, -1, -1):
        k = int(decisions[i, left])
        chosen[i] = k
        left -= -(-(hulls[i][k].nbytes - hulls[i][0].nbytes) // unit)
    return chosen


def _spend(hulls: list[list[Option]], chosen: list[int], spare: int) -> None:
    """Greedily replace options by larger ones: each time the one that reduces the error most."""
    while True:
        gains = [
            (options[k].error - options[j].error, i, j)
            for i, (options, k) in enumerate(zip(hulls, chosen, strict=True))
            for j in range(k + 1, len(options))
            if options[j].nbytes - options[k].nbytes <= spare
        ]
        if not gains:
            return
        _, i, j = max(gains)
        spare -= hulls[i][j].nbytes - hulls[i][chosen[i]].nbytes
        chosen[i] = j
