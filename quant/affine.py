"""Affine quantization of a weight, a group of consecutive inputs at a time."""

import mlx.core as mx

from qwen35_mlx.errors import Qwen35Error

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
METHODS = ("minmax",)
FLOATS = (mx.float32, mx.float16, mx.bfloat16)


def check_settings(bits: int, group_size: int, where: str = "") -> None:
    """Refuse a width or a group size that mlx has no matrix kernels for."""
    for key, got, allowed in (("bits", bits, BITS), ("group_size", group_size, GROUP_SIZES)):
        if not isinstance(got, int) or got not in allowed:
            raise Qwen35Error(
                f"{key}={got!r} is not supported{where and f' (for {where})'}",
                got=repr(got),
                expected=", ".join(map(str, allowed)),
            )


def quantized_shapes(
    shape: tuple[int, ...], bits: int, group_size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the packed uint32 weight and of its scales (biases are alike)."""
    *leading, inputs = shape
    return (*leading, inputs * bits // 32), (*leading, inputs // group_size)


def quantize(
    w: mx.array,
    bits: int = 4,
    group_size: int = 64,
    method: str = "minmax",
    importance: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Quantize `w [..., inputs]` to (packed uint32, scales, biases), laid out as mx.quantize does.

    Scales and biases have the dtype of `w`. Groups never cross a row, so any split into rows
    gives the same bits as the whole.
    """
    check_settings(bits, group_size)
    if method not in METHODS:
        raise Qwen35Error(
            f"method={method!r} is not a way to quantize",
            got=repr(method),
            expected=", ".join(METHODS),
        )
    if importance is not None:
        raise Qwen35Error("method='minmax' does not weigh its inputs", got="importance")
    if w.dtype not in FLOATS:
        raise Qwen35Error(
            "only floating point weights can be quantized",
            got=w.dtype,
            expected="float32, float16 or bfloat16",
        )
    if w.ndim == 0 or w.shape[-1] % group_size:
        raise Qwen35Error(
            f"group_size={group_size} does not divide the inputs of the weight",
            got=list(w.shape),
            expected=f"a last dim that is a multiple of {group_size}",
        )
    if w.ndim == 1:
        wq, scales, biases = mx.quantize(w[None], group_size=group_size, bits=bits)
        return wq[0], scales[0], biases[0]
    wq, scales, biases = mx.quantize(w, group_size=group_size, bits=bits)
    return wq, scales, biases


def dequantize(
    wq: mx.array, scales: mx.array, biases: mx.array, bits: int = 4, group_size: int = 64
) -> mx.array:
    """The inverse of `quantize`, up to rounding, in the dtype of `scales`."""
    check_settings(bits, group_size)
    if wq.ndim == 1:
        return dequantize(wq[None], scales[None], biases[None], bits, group_size)[0]
    return mx.dequantize(wq, scales, biases, group_size=group_size, bits=bits)
