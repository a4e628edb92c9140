"""How many dispatches a decoded token takes at the shapes of the largest model."""

import bench_kernels as bench
import pytest
from dispatches import count, mlx_lm_model, of_a_step, our_model, per_kind

from qwen35_mlx.config import FULL, LINEAR

pytestmark = pytest.mark.usefixtures("compiled")


def test_a_layer_takes_few_dispatches_and_a_token_a_fifth_of_mlx_lms():
    ours, theirs = per_kind(our_model, bench.TEXT), per_kind(mlx_lm_model, bench.TEXT)
    assert ours[LINEAR].total() <= 7
    assert ours[FULL].total() <= 12
    assert of_a_step(ours, bench.TEXT) <= 0.2 * of_a_step(theirs, bench.TEXT)


def test_the_grouped_matmul_multiplies_little_that_is_not_wanted():
    prefill = bench.prefill_over_least()
    assert 1 <= prefill["prefill_macs_over_useful"] <= 1.1
    assert 1 <= prefill["prefill_weight_reads"] <= 1.25


def test_what_is_counted_of_mlx_lm_is_its_path_on_a_gpu():
    counts = count(mlx_lm_model, bench.TEXT, [LINEAR, FULL])
    assert counts["gated_delta_step_packed_btree"] == 1
    assert counts["SDPA"] == 2
    assert any(name.startswith("Compiled") for name in counts)
