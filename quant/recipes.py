"""Recipes of mixed bits that need no calibration, and the assumed sensitivities of tensors."""

import re
from collections.abc import Callable

from qwen35_mlx.errors import Qwen35Error

from .statistics import Setting

GROUP_SIZE = 64

# Patterns of module names; the first match counts. The last one matches every name.
_KINDS = (
    ("out_proj", r"linear_attn\.out_proj$"),
    ("attention", r"(linear_attn|self_attn)\."),
    ("shared", r"shared_expert\."),
    ("down", r"\.down_proj$"),
    ("gate_up", r"\.(gate|up)_proj$"),
    ("lm_head", r"lm_head$"),
    ("embedding", r""),
)

# Bits of each kind. Public measurements of 35B-A3B to 397B-A17B agree: linear_attn.out_proj loses
# the most accuracy, then the other projections of attention, then down, then gate and up. Experts
# take nearly all bytes.
RECIPES: dict[str, dict[str, int]] = {
    name: dict(zip((kind for kind, _ in _KINDS), bits, strict=True))
    for name, bits in {
        #     out attention shared down gate_up head embedding
        "q8": (8, 8, 8, 8, 8, 8, 8),
        "q6": (8, 8, 8, 6, 6, 8, 6),
        "q5": (8, 8, 8, 6, 5, 6, 6),
        "q4": (8, 6, 6, 4, 4, 6, 4),
        "q3": (8, 6, 6, 4, 3, 6, 4),
        "q2": (6, 5, 5, 3, 2, 5, 4),
    }.items()
}

# KL caused by the complete loss of a unit's output, relative to the experts' down_proj of a layer.
# Chosen so that experts cause two thirds of the KL at uniform bits: then more bits for the others
# reduce it by the 30 % that exl3 publishes for the 397B. The others have the order above.
SENSITIVITIES = dict(
    out_proj=0.45, attention=0.15, shared=0.1, down=1.0, gate_up=1.2, lm_head=0.5, embedding=0.5
)
# Mean KL in nats that exl3 publishes for the 397B at 4.0 bits per weight.
KL_AT_4_BITS = 0.02


def kind_of(module: str) -> str:
    """The kind of a quantized module."""
    return next(kind for kind, pattern in _KINDS if re.search(pattern, module))


def recipe(name: str) -> Callable[[str], Setting | None]:
    """The recipe of a name, `q8` to `q2`: a function from module name to (bits, group_size).

    Raises Qwen35Error for an unknown name.
    """
    if name not in RECIPES:
        raise Qwen35Error(
            f"there is no recipe {name!r}", got=repr(name), expected=", ".join(RECIPES)
        )
    bits = RECIPES[name]

    def chosen(module: str) -> Setting | None:
        return bits[kind_of(module)], GROUP_SIZE

    chosen.__name__ = name
    return chosen
