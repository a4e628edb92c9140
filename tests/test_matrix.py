"""Which weights the kernels read, and that the others are left to plain MLX."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from qwen35_mlx.kernels.matrix import lanes_per_row, matrix
from qwen35_mlx.kernels.projection import project
from qwen35_mlx.kernels.switch import SwitchLinear
from qwen35_mlx.kernels.tiers import with_kernels


def linear(out: int, width: int, **quantization) -> nn.Module:
    layer = nn.Linear(width, out, bias=False)
    return layer.to_quantized(**quantization) if quantization else layer


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (5, 128), (8, 64)])
def test_affine_weights_give_their_width_and_rows(bits, group_size):
    found = matrix(linear(24, 256, bits=bits, group_size=group_size))
    assert (found.bits, found.group_size, found.in_dims, found.out_dims) == (
        bits, group_size, 256, 24,
    )  # fmt: skip
    stacked = SwitchLinear(256, 24, 5).to_quantized(group_size, bits)
    assert matrix(stacked)[1:] == found[1:]
    assert matrix(stacked).out_dims == 24


def test_a_dense_weight_stands_for_its_scales_too():
    found = matrix(linear(24, 64))
    assert found.bits == 0
    assert all(a is found.arrays[0] for a in found.arrays)


@pytest.mark.parametrize(
    ("width", "layer"),
    [
        (64, linear(24, 64, bits=4, group_size=32, mode="mxfp4")),
        (48, linear(24, 48)),
        (64, nn.Linear(64, 24, bias=True)),
        # MLX passes arrays of fewer than 8 numbers as constants.
        (256, linear(1, 256, bits=4, group_size=64)),
    ],
    ids=["mxfp4", "no whole chunks", "bias", "too few scales"],
)
def test_what_no_kernel_reads_is_computed_by_plain_mlx(width, layer):
    assert matrix(layer) is None
    x = mx.random.normal((2, width))
    # No GPU here: an attempt to run the kernel would raise.
    (got,) = project(x, (layer,), with_kernels(["projection"], base="ops"))
    assert mx.array_equal(got, layer(x))


def test_a_norm_in_float32_is_not_rounded_to_what_comes_in():
    # An mxfp4 embedding gives bf16 whatever the rest of the folder is.
    x, norm, layer = mx.random.normal((2, 64)).astype(mx.bfloat16), nn.RMSNorm(64), linear(8, 64)
    norm.weight = mx.random.normal((64,))
    (got,) = project(x, (layer,), norm=norm)
    assert got.dtype == mx.float32
    assert mx.array_equal(got, layer(norm(x)))


@pytest.mark.parametrize(
    ("in_dims", "lanes"), [(32, 1), (64, 2), (96, 4), (512, 16), (544, 32), (4096, 32)]
)
def test_no_lane_of_a_narrow_matrix_idles(in_dims, lanes):
    assert lanes_per_row(in_dims) == lanes
