"""A row has the same bits whatever rows are computed beside it; drafts and batches rely on it."""

import mlx.core as mx
import pytest
from metal.emulator import emulated
from metal.row_invariance import cases, compare, different_rows

from qwen35_mlx.kernels import metal
from qwen35_mlx.kernels.tiers import DECODE_OPERATIONS


@pytest.fixture(autouse=True)
def emulator():
    with emulated():
        metal.clear()
        yield
    metal.clear()


def test_every_decode_kernel_has_a_case():
    assert {name for name, _, _ in cases(0)} == set(DECODE_OPERATIONS)


def test_a_projected_row_is_the_same_alone():
    (name, run, inputs) = next(cases(3))
    assert name == "projection"
    assert different_rows(run, inputs) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", range(21))
def test_rows_are_the_same_alone(number):
    result = compare([number])
    assert result["different"] == 0
    assert result["compared"] >= 16


def test_a_kernel_that_mixes_rows_is_found():
    kernel = mx.fast.metal_kernel(
        name="mixing",
        input_names=["x"],
        output_names=["y"],
        source="uint i = thread_position_in_grid.x; y[i] = x[i] + x_shape[0] * 1e-7f;",
    )

    def run(x: mx.array) -> list[mx.array]:
        return kernel(
            inputs=[x],
            grid=(x.size, 1, 1),
            threadgroup=(x.size, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
        )

    assert different_rows(run, [mx.ones((3, 16))]) == 3
