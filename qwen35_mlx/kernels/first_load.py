"""The check of a model when it is first loaded on a Mac: its own shapes, type and bits only."""

import sys
import time
from collections.abc import Iterator
from typing import Any

from ..config import ModelConfig
from ..errors import Qwen35Error
from . import checks, choice, measure, verdicts
from .checks import Check, Setting
from .tiers import Tiers
from .verdicts import Format, Verdict

# What is not measured by then is measured at the next load.
LIMIT_S = 5.0
ROUNDS = 2


def tiers_of(model: Any) -> Tiers:
    """The tiers that are right and fastest for the model here; measures what was never measured.

    Prefill is left to the doctor: on what MLX has until that found it slower.
    """
    formats = choice.formats_of(model)
    known = verdicts.read()
    missing = list(_missing(model.config, formats, known))
    if missing:
        start = time.monotonic()
        found = _measure(model.config, missing, start)
        known += found
        chosen = choice.measured(known, model.config, formats)
        _tell(found, chosen, time.monotonic() - start)
        return chosen
    return choice.measured(known, model.config, formats)


def _missing(
    config: ModelConfig, formats: dict[str, Format], known: list[Verdict]
) -> Iterator[tuple[Check, Setting]]:
    """Single tokens first: they are what most time goes to."""
    shape = verdicts.shape_of(verdicts.member_of(config))
    by_key = {v.key: v for v in known}
    for i, num_tokens in enumerate(choice.TOKENS):
        for check in checks.CHECKS:
            if check.is_prefill or (check.needs_experts and not config.is_moe):
                continue
            form = formats[check.op]
            # Slower for fewer tokens is enough to know.
            before = [by_key.get((check.op, shape, *form, n)) for n in choice.TOKENS[:i]]
            if any(v is not None and not v.is_faster for v in before):
                continue
            if (check.op, shape, *form, num_tokens) not in by_key:
                yield check, Setting.of(form, num_tokens)


def _measure(
    config: ModelConfig, missing: list[tuple[Check, Setting]], start: float
) -> list[Verdict]:
    """As many as the time allows, stored."""
    member = verdicts.member_of(config)
    found: list[Verdict] = []
    refused: set[str] = set()
    for check, setting in missing:
        if time.monotonic() - start > LIMIT_S:
            break
        if check.op not in refused:
            found.append(measure.judge(check, member, setting, ROUNDS))
            if not found[-1].is_faster:
                refused.add(check.op)
    try:
        verdicts.write(found)
    except Qwen35Error as error:
        sys.stderr.write(f"{error}\n")
    return found


def _tell(found: list[Verdict], chosen: Tiers, taken_s: float) -> None:
    """One line."""
    ops = dict.fromkeys(v.op for v in found)
    wrong = dict.fromkeys(v.op for v in found if v.problem)
    used = [op for op in ops if op in chosen.kernel_rows]
    line = f"Checked this model's Metal kernels in {taken_s:.1f} s: {len(used)} of {len(ops)} used"
    if wrong:
        line += f", not right here: {', '.join(wrong)}"
    sys.stderr.write(f"{line} (all figures: qwen35-mlx doctor)\n")
