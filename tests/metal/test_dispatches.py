"""How many dispatches a decoded token takes at the shapes of the largest model."""

import bench_kernels as bench

from qwen35_mlx.config import FULL, LINEAR


def test_a_layer_takes_few_dispatches_and_a_token_a_fifth_of_mlx_lms():
    ours, theirs = bench.per_kind(bench.our_model), bench.per_kind(bench.mlx_lm_model)
    assert ours[LINEAR].total() <= 7
    assert ours[FULL].total() <= 12
    assert bench.a_token(ours) <= 0.2 * bench.a_token(theirs)


def test_the_grouped_matmul_multiplies_little_that_is_not_wanted():
    assert 1 <= bench.prefill_macs_over_useful() <= 1.35


def test_what_is_counted_of_mlx_lm_is_its_path_on_a_gpu():
    counts = bench.count(bench.mlx_lm_model, [LINEAR, FULL])
    assert counts["gated_delta_step_packed_btree"] == 1
    assert counts["SDPA"] == 2
    assert any(name.startswith("Compiled") for name in counts)
