"""Builds Metal kernels from the `.metal` files of this package."""

import functools
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import mlx.core as mx

from ..errors import Qwen35Error

Template = list[tuple[str, Any]]
# Of one kernel; Metal has no more.
MAX_BUFFERS = 31
# Sums and exact subtractions must not be rearranged, whatever MLX's default is. Older versions of
# MLX have no such option and compile in this mode.
OPTIONS: dict[str, Any] = (
    {"compile_options": {"math_mode": "safe"}}
    if "compile_options" in (mx.fast.metal_kernel.__doc__ or "")
    else {}
)
# A line of this text ends a file's functions and begins the body of the kernel.
BODY = "// body\n"


@functools.cache
def kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    *,
    label: str | None = None,
    generated: str = "",
    any_strides: bool = False,
) -> Callable[..., list[mx.array]]:
    """The kernel of `<name>.metal`; names as tuples, call it as `mx.fast.metal_kernel` says.

    `common.metal` stands before the functions of the file, `generated` is the end of its body. A
    `label` is the kernel's own name, and must tell apart what differs in these. Views are copied
    to rows without gaps, unless the source minds `any_strides`.
    """
    functions, body = _read(name)
    source = body + generated
    # MLX passes the shape of an input as a buffer of its own where the source names it.
    shapes = [f"{n}_{part}" for n in input_names for part in ("shape", "strides", "ndim")]
    num_buffers = len(input_names) + len(output_names) + sum(s in source for s in shapes)
    if num_buffers > MAX_BUFFERS:
        raise Qwen35Error(
            f"kernel {label or name} takes too many arrays at once",
            got=f"{num_buffers} buffers",
            expected=f"at most {MAX_BUFFERS}",
        )
    # Typed as object by MLX.
    make: Any = mx.fast.metal_kernel
    return make(
        name=label or name,
        input_names=list(input_names),
        output_names=list(output_names),
        header=_read("common")[0] + functions,
        source=source,
        ensure_row_contiguous=not any_strides,
        **OPTIONS,
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
