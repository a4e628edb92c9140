"""The check of kernels when a model is first loaded on a Mac: only its shapes, type and bits."""

import sys
import time
from itertools import product
from typing import Any

from ..errors import Qwen35Error
from . import checks, choice, measure, verdicts
from .checks import Setting
from .tiers import Tiers
from .verdicts import Verdict

# Time limit; the next load measures the rest.
LIMIT_S = 5.0
ROUNDS = 2


def tiers_of(model: Any) -> Tiers:
    """The fastest correct tiers for the model on this machine; measures what is not known yet.

    Prefill runs on MLX's own operations until the command doctor has measured its kernels.
    """
    formats, config = choice.formats_of(model), model.config
    member = verdicts.member_of(config)
    known = {v.key: v for v in verdicts.read()}
    found: list[Verdict] = []
    start = time.monotonic()
    # Single tokens first, because they take most of the time in use.
    for num_tokens, check in product(choice.TOKENS, checks.CHECKS):
        if check.is_prefill or (check.needs_experts and not config.is_moe):
            continue
        about = check.op, verdicts.shape_of(member), *formats[check.op]
        # If the kernel is slower for fewer tokens, more tokens are not measured.
        fewer = [known[*about, n] for n in choice.TOKENS if (*about, n) in known and n < num_tokens]
        if (*about, num_tokens) in known or not all(v.is_faster for v in fewer):
            continue
        if time.monotonic() - start > LIMIT_S:
            break
        setting = Setting.of(formats[check.op], num_tokens)
        found.append(measure.judge(check, member, setting, ROUNDS))
        known[*about, num_tokens] = found[-1]
    chosen = choice.measured(known.values(), config, formats)
    if found:
        try:
            verdicts.write(found)
        except Qwen35Error as error:
            sys.stderr.write(f"{error}\n")
        _tell(found, chosen, time.monotonic() - start)
    return chosen


def _tell(found: list[Verdict], chosen: Tiers, taken_s: float) -> None:
    """Log one line about the measurements."""
    ops = dict.fromkeys(v.op for v in found)
    wrong = dict.fromkeys(v.op for v in found if v.problem)
    used = [op for op in ops if op in chosen.kernel_rows]
    line = f"Checked this model's Metal kernels in {taken_s:.1f} s: {len(used)} of {len(ops)} used"
    if wrong:
        line += f", not right here: {', '.join(wrong)}"
    sys.stderr.write(f"{line} (all figures: qwen35-mlx doctor)\n")
