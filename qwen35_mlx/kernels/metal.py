"""Builds Metal kernels from the `.metal` files of this package."""

import functools
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import mlx.core as mx

from ..errors import Qwen35Error

Template = list[tuple[str, Any]]
# Metal's limit for one kernel.
MAX_BUFFERS = 31
# Sums and exact subtractions must not be rearranged, whatever MLX's default is. Older versions of
# MLX lack the option and always compile this way.
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
    """The kernel of `<name>.metal`; names are tuples, and it is called as MLX's kernels are.

    `common.metal` precedes the functions of the file; `generated` is appended to its body. `label`
    is the kernel's name and must differ if any of these do. Views are copied to contiguous arrays,
    except with `any_strides`, for a source that handles strides.
    """
    functions, body = _read(name)
    source = body + generated
    # MLX passes the shape of an input as another buffer if the source uses it.
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
    """Forget built kernels, for tests that replace `mx.fast.metal_kernel`."""
    kernel.cache_clear()


def num_uses() -> int:
    """Number of kernels requested so far, to tell whether an operation ran one."""
    info = kernel.cache_info()
    return info.hits + info.misses


@functools.cache
def _read(name: str) -> tuple[str, str]:
    """The functions and the body of a file."""
    text = files(__package__).joinpath(f"{name}.metal").read_text(encoding="utf-8")
    functions, _, body = text.partition(BODY)
    return functions, body
