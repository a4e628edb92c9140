"""Affine quantization in the layout of MLX, by three methods; checks of settings and weights."""

import mlx.core as mx
import numpy as np

from qwen35_mlx.checkpoint.quantization import BITS, GROUP_SIZES
from qwen35_mlx.errors import Qwen35Error

from .gptq import DAMPING, gptq
from .packing import Quantized
from .search import search

METHODS = ("minmax", "search", "gptq")
FLOATS = (mx.float32, mx.float16, mx.bfloat16)


def check_settings(bits: int, group_size: int, method: str = METHODS[0], where: str = "") -> None:
    """Raise Qwen35Error for an unknown method, or for bits or a group size that MLX cannot run."""
    for key, got, allowed in (
        ("bits", bits, BITS),
        ("group_size", group_size, GROUP_SIZES),
        ("method", method, METHODS),
    ):
        # repr: 4.0 == 4, but 4.0 is refused.
        if repr(got) not in map(repr, allowed):
            raise Qwen35Error(
                f"{key}={got!r} is not supported{where and f' (for {where})'}",
                got=repr(got),
                expected=", ".join(map(str, allowed)),
            )


def quantized_shapes(
    shape: tuple[int, ...], bits: int, group_size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the packed uint32 weight and of its scales; biases have those of scales."""
    *leading, inputs = shape
    return (*leading, inputs * bits // 32), (*leading, inputs // group_size)


def quantize(
    w: mx.array,
    bits: int = 4,
    group_size: int = 64,
    method: str = "minmax",
    importance: mx.array | None = None,
    hessian: mx.array | None = None,
    damping: float = DAMPING,
) -> Quantized:
    """Quantize `w [..., inputs]` to (packed uint32, scales, biases) in the layout of mx.quantize.

    method: "minmax" is mx.quantize. "search" minimizes the squared error of the weights, with the
    optional `importance [inputs]` as the weight of each column. "gptq" minimizes the error of
    `w @ x` for inputs x with `hessian [inputs, inputs]`; stacked experts `[E, rows, inputs]` may
    have one each, `[E, inputs, inputs]`. Scales and biases have the dtype of `w`. With "minmax"
    and "search", the result of a row does not depend on the other rows. Raises Qwen35Error for
    weights, settings or statistics that cannot be used.
    """
    check_settings(bits, group_size, method)
    _check_weight(w, group_size)
    for name, value, owner in (("importance", importance, "search"), ("hessian", hessian, "gptq")):
        if value is not None and method != owner:
            raise Qwen35Error(f"method={method!r} does not use {name}", expected=f"no {name}")
    if w.ndim == 1:
        parts = quantize(w[None], bits, group_size, method, importance, hessian, damping)
        wq, scales, biases = (part[0] for part in parts)
        return wq, scales, biases
    if method == "search":
        _check_importance(importance, w.shape[-1])
        return search(w, bits, group_size, importance)
    if method == "gptq":
        if hessian is None:
            raise Qwen35Error("method='gptq' needs a hessian", expected="hessian [inputs, inputs]")
        return gptq(w, bits, group_size, hessian, damping)
    wq, scales, biases = mx.quantize(w, group_size=group_size, bits=bits)
    return wq, scales, biases


def _check_weight(w: mx.array, group_size: int) -> None:
    if w.dtype not in FLOATS:
        raise Qwen35Error(
            "only floating point weights can be quantized",
            got=w.dtype,
            expected="float32, float16 or bfloat16",
        )
    if w.ndim == 0 or w.shape[-1] % group_size:
        raise Qwen35Error(
            f"group_size={group_size} does not divide the number of inputs",
            got=list(w.shape),
            expected=f"a last dim that is a multiple of {group_size}",
        )
    if not w.size:
        raise Qwen35Error("the weight is empty", got=list(w.shape))
    # Fast path: below this limit, the range of every group fits into the dtype.
    if largest_magnitude(w) < 0.4 * mx.finfo(w.dtype).max:
        return
    if not mx.all(mx.isfinite(w)).item():
        raise Qwen35Error(
            "the weight has values that are not finite", got="nan or inf", expected="finite values"
        )
    groups = w.reshape(-1, group_size)
    ranges = groups.max(axis=-1).astype(mx.float32) - groups.min(axis=-1).astype(mx.float32)
    # 0.9: the range of the codes may be a little larger than that of the weights.
    limit = 0.9 * mx.finfo(w.dtype).max
    if not mx.all(ranges <= limit).item():
        raise Qwen35Error(
            f"the range of a group of weights is too large for {w.dtype}",
            got=f"largest weight - smallest weight = {mx.max(ranges).item():.3g}",
            expected=f"at most {limit:.3g}",
        )


def largest_magnitude(w: mx.array) -> float:
    """The largest absolute value; nan or inf if `w` contains one."""
    kind, mask = (mx.uint32, 0x7FFFFFFF) if w.itemsize == 4 else (mx.uint16, 0x7FFF)
    top = largest_bits(np.asarray(mx.view(w, kind)).reshape(-1, w.shape[-1]), mask)
    return float(np.array(mx.view(mx.array([top], dtype=kind), w.dtype).astype(mx.float32))[0])


def largest_bits(rows: np.ndarray, mask: int) -> int:
    """The maximum of `rows & mask` for unsigned integers `[rows, columns]`; 0 if there are none.

    The bits of floats have the order of their magnitudes. This takes a tenth of the time of MLX.
    """
    # A few rows at a time, so that the masked copy stays in the cache of the CPU.
    step = max(2**16 // max(rows.shape[-1], 1), 1)
    parts = (rows[i : i + step] & rows.dtype.type(mask) for i in range(0, len(rows), step))
    return max((int(part.max()) for part in parts), default=0) if rows.size else 0


def _check_importance(importance: mx.array | None, inputs: int) -> None:
    if importance is None:
        return
    if importance.shape != (inputs,):
        raise Qwen35Error(
            "importance has the wrong shape",
            got=list(importance.shape),
            expected=[inputs],
        )
    if not mx.all((importance >= 0) & mx.isfinite(importance)).item():
        raise Qwen35Error("importance must be finite and not negative")


def dequantize(
    wq: mx.array, scales: mx.array, biases: mx.array, bits: int = 4, group_size: int = 64
) -> mx.array:
    """The weights that `quantize` stored, `[..., inputs]` in the dtype of `scales`."""
    check_settings(bits, group_size)
    if wq.ndim == 1:
        return dequantize(wq[None], scales[None], biases[None], bits, group_size)[0]
    return mx.dequantize(wq, scales, biases, group_size=group_size, bits=bits)
