"""The counter of issue slots on kernels that can be counted by hand."""

import kernel_slots
import mlx.core as mx
import pytest

LOOP = """
uint lane = thread_position_in_grid.x;
float sum = 0.0f;
for (int i = 0; i < n; i += 1) {
  uint v = w[i];
  sum STEP;
}
y[lane] = sum;
"""


def slots(step: str) -> float:
    """Of a step of the loop, by the same difference of two lengths as in the tables."""

    def run(length: int) -> None:
        kernel = mx.fast.metal_kernel(
            name="toy",
            input_names=["w", "x", "n"],
            output_names=["y"],
            source=LOOP.replace("STEP", step),
        )
        kernel(
            inputs=[mx.ones(64, mx.uint32), mx.ones(64), length],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(32,)],
            output_dtypes=[mx.float32],
        )

    return kernel_slots.per_weight(run, 32, 32)


# Load, its address, index (64 bits), comparison, branch; then load and address of x.
STEP, X, CONVERT, SHIFT, FMA, LOGIC = 1 + 1 + 2 + 1 + 1, 2, 4, 4, 1, 1


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("+= float(v)", STEP + CONVERT + FMA),
        ("= metal::fma(float(v), x[i], sum)", STEP + X + CONVERT + FMA),
        # A product and a sum are one instruction where they stand apart, too.
        ("+= float(v) * x[i]", STEP + X + CONVERT + FMA),
        ("+= float(v & 15u) * x[i]", STEP + X + LOGIC + CONVERT + FMA),
        ("+= float(v >> 3) * x[i]", STEP + X + SHIFT + CONVERT + FMA),
        ("+= as_type<float>((v & 15u) | 0x4b000000u) * x[i]", STEP + X + 2 * LOGIC + FMA),
        # A product with two users is an instruction of its own.
        ("+= float(v) * x[i] + float(v) * x[i] * x[i]", STEP + X + CONVERT + 1 + FMA + 1),
    ],
)
def test_each_instruction_of_a_loop_costs_what_the_table_says(step, expected):
    assert slots(step) == expected


def test_an_instruction_without_a_price_is_refused():
    with pytest.raises(KeyError, match="cmpxchg"):
        kernel_slots.cost("cmpxchg", " ptr %p, i32 %a, i32 %b")
