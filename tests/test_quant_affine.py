import mlx.core as mx
import pytest
from everyday import everyday

from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.quant import dequantize, quantize
from qwen35_mlx.quant.affine import BITS, GROUP_SIZES, METHODS, quantized_shapes

DTYPES = (mx.float32, mx.float16, mx.bfloat16)


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(mx.array_equal(a, b))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_bits_are_those_of_mlx_and_scales_keep_the_dtype(bits, group_size):
    for dtype in DTYPES:
        w = mx.random.normal((6, 256), key=mx.random.key(bits)).astype(dtype)
        ours = quantize(w, bits, group_size)
        theirs = mx.quantize(w, group_size=group_size, bits=bits)
        assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
        assert ours[1].dtype == dtype
        assert [a.shape for a in ours[:2]] == list(quantized_shapes((6, 256), bits, group_size))


@pytest.mark.parametrize("bits", BITS)
def test_rows_quantized_apart_equal_the_whole(bits):
    w = mx.random.normal((5, 3, 128), key=mx.random.key(1))
    whole = quantize(w, bits, 64)
    for row, vector in ((2, 1), (4, 2)):
        apart = quantize(w[row, vector], bits, 64)
        assert all(same(a, b[row, vector]) for a, b in zip(apart, whole, strict=True))


@pytest.mark.parametrize("shape", [(128,), (4, 128), (2, 3, 4, 128)])
def test_dequantized_weights_are_within_a_step(shape):
    w = mx.random.normal(shape, key=mx.random.key(2))
    for bits in BITS:
        wq, scales, biases = quantize(w, bits, 64)
        error = mx.abs(dequantize(wq, scales, biases, bits, 64) - w)
        # mlx moves the scale so that zero is exact: up to one step at the ends of a group.
        steps = mx.repeat(mx.abs(scales), 64, axis=-1)
        assert mx.all(error <= steps * 1.001).item()
        assert mx.mean(error <= steps * 0.501).item() > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(bits=7), "bits=7 is not supported"),
        (dict(bits=4.0), r"bits=4.0 is not supported"),
        (dict(bits=4, group_size=16), "group_size=16 is not supported"),
        (dict(bits=4, method="best"), "method='best' is not supported"),
        (dict(bits=4, importance=mx.ones(128)), "method='minmax' does not use importance"),
        (dict(method="search", hessian=mx.eye(128)), "method='search' does not use hessian"),
        (dict(method="gptq"), "needs a hessian"),
        (dict(method="search", importance=mx.ones(64)), r"(?s)wrong shape.*\[64\].*\[128\]"),
        (dict(method="search", importance=-mx.ones(128)), "finite and not negative"),
        (dict(method="search", importance=mx.full(128, mx.nan)), "finite and not negative"),
        (dict(bits=4, w=mx.ones((2, 96))), "group_size=64 does not divide"),
        (dict(bits=4, w=mx.ones((0, 128))), "weight is empty"),
        (dict(bits=4, w=mx.ones((2, 128), dtype=mx.int32)), "only floating point weights"),
    ],
)
def test_unusable_arguments_are_refused(arguments, message):
    with pytest.raises(Qwen35Error, match=message):
        quantize(**{"w": mx.ones((2, 128)), **arguments})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite_are_refused(method, dtype, value):
    w = mx.ones((2, 128), dtype=dtype)
    w[1, 70] = float(value)
    hessian = mx.eye(128) if method == "gptq" else None
    with pytest.raises(Qwen35Error, match="not finite"):
        quantize(w, method=method, hessian=hessian)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", everyday(DTYPES, 0, 1))
def test_groups_whose_range_overflows_are_refused_and_half_of_it_is_quantized(method, dtype):
    hessian = mx.eye(128) if method == "gptq" else None
    ends = mx.array([-1.0, 1.0] * 64) * (0.9 * mx.finfo(dtype).max)
    for size in (1.0, 0.52):
        with pytest.raises(Qwen35Error, match="range of a group of weights is too large"):
            quantize((ends * size).astype(dtype), method=method, hessian=hessian)
    w = (ends * 0.4).astype(dtype)
    wq, scales, biases = quantize(w, method=method, hessian=hessian)
    back = dequantize(wq, scales.astype(mx.float32), biases.astype(mx.float32))
    # mlx gives a step away for an exact zero.
    step = mx.abs(scales).max().astype(mx.float32)
    assert mx.all(mx.abs(back - w.astype(mx.float32)) <= 1.01 * step).item()
