"""Builds Metal kernels from the `.metal` files of this package, and knows which are chosen.

The choice is a set of names out of `OPS` and belongs to a model: `use` writes it as the attribute
`kernels` into each of its modules that declares one, whose operations look into it and run plain
MLX for what is not there. Nothing is global, so two models may differ.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from importlib.resources import files
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import Qwen35Error

# Every operation with a kernel, by the name under which it is chosen and its result is stored.
DECODE_OPS = (
    "residual_norm",
    "projection",
    "delta_step",
    "qk_norm_rope",
    "output_gate",
    "router",
    "expert_gate_up",
    "expert_down",
)
PREFILL_OPS = ("chunk_delta_rule", "grouped_expert_matmul")
OPS = DECODE_OPS + PREFILL_OPS
# Those of them that run as kernels.
KernelSet = frozenset[str]
NONE: KernelSet = frozenset()
Template = list[tuple[str, Any]]
# A line of this text ends a file's functions and begins the body of the kernel.
BODY = "// body\n"


def use(model: nn.Module, ops: Collection[str]) -> None:
    """Let the model's modules run the kernels of these operations, and no others."""
    if unknown := sorted(set(ops) - set(OPS)):
        raise Qwen35Error(
            f"no such kernel: {', '.join(unknown)}", got=unknown, expected=", ".join(OPS)
        )
    for module in model.modules():
        if hasattr(type(module), "kernels"):
            module.kernels = frozenset(ops)


@functools.cache
def kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    *,
    label: str | None = None,
    generated: str = "",
) -> Callable[..., list[mx.array]]:
    """The kernel of `<name>.metal`; names as tuples, call it as `mx.fast.metal_kernel` says.

    `common.metal` stands before the functions of the file, `generated` is the end of its body. A
    `label` is the kernel's own name, and must tell apart what differs in these.
    """
    functions, body = _read(name)
    # Typed as object by MLX.
    make: Any = mx.fast.metal_kernel
    return make(
        name=label or name,
        input_names=list(input_names),
        output_names=list(output_names),
        header=_read("common")[0] + functions,
        source=body + generated,
    )


def clear() -> None:
    """Forget built kernels, for tests that put something else under `mx.fast.metal_kernel`."""
    kernel.cache_clear()


def num_uses() -> int:
    """How often a kernel was asked for, to tell whether an operation ran one."""
    info = kernel.cache_info()
    return info.hits + info.misses


@functools.cache
def _read(name: str) -> tuple[str, str]:
    """Functions and body of a file."""
    text = files(__package__).joinpath(f"{name}.metal").read_text(encoding="utf-8")
    functions, _, body = text.partition(BODY)
    return functions, body
