"""The grouped expert matmul, run by the emulator, against the naive experts in fp32."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday
from metal import errors
from metal.emulator import Log, emulated

from qwen35_mlx.kernels import metal
from qwen35_mlx.kernels.grouped_expert_matmul import (
    SORT_FROM,
    eligible,
    expert_mlp,
    grouped_expert_mlp,
    num_matrix_macs,
    tiles,
)
from qwen35_mlx.kernels.naive import naive_expert_mlp
from qwen35_mlx.kernels.router import route
from qwen35_mlx.kernels.switch import SwitchGLU, SwitchLinear
from qwen35_mlx.kernels.tiers import with_kernels

CASES_EACH = 10
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-2, mx.bfloat16: 2e-2}
KERNEL = with_kernels(["grouped_expert_matmul"])
# Every width in every type; group sizes take turns. 0 bits: plain weights.
SPECIALISATIONS = [
    (bits, (32, 64, 128)[i % 3], dtype)
    for i, (bits, dtype) in enumerate(itertools.product((0, 2, 3, 4, 5, 6, 8), TOLERANCE))
]


@pytest.fixture(scope="module")
def log():
    metal.clear()
    with emulated(metal_available=True) as log:
        yield log
    metal.clear()


def experts(num, hidden, width, bits, group_size, dtype, seed=0):
    """gate, up and down, and the dense weights they stand for."""
    layers, dense = [], []
    shapes = ((hidden, width), (hidden, width), (width, hidden))
    for (in_dims, out_dims), key in zip(
        shapes, mx.random.split(mx.random.key(seed), 3), strict=True
    ):
        layer = SwitchLinear(in_dims, out_dims, num)
        weight = mx.random.normal((num, out_dims, in_dims), key=key) * in_dims**-0.5
        layer.weight = weight.astype(dtype)
        if bits:
            q = layer.to_quantized(group_size=group_size, bits=bits)
            layer, parts = q, (q.weight, q.scales.astype(mx.float32), q.biases.astype(mx.float32))
            dense.append(mx.dequantize(*parts, group_size=group_size, bits=bits))
        else:
            dense.append(layer.weight)
        layers.append(layer)
    return layers, dense


def stack(layers):
    experts = SwitchGLU(1, 1, 1)
    experts.gate_proj, experts.up_proj, experts.down_proj = layers
    return experts


def routed(logits, per_token):
    return route(logits, mx.zeros((logits.shape[0], 1)), per_token)[:2]


def relative_error(got: mx.array, want: mx.array) -> float:
    got, want = np.array(got.astype(mx.float32)), np.array(want.astype(mx.float32))
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


@pytest.mark.parametrize(("bits", "group_size", "dtype"), everyday(SPECIALISATIONS, 11), ids=str)
def test_random_cases(log: Log, bits: int, group_size: int, dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(bits * 1000 + group_size)
    for case in range(CASES_EACH):
        num_experts, per_token = int(rng.integers(2, 9)), (1, 2)[case % 2]
        # A few with tiles of 64 rows and a second one.
        num_tokens = int(rng.integers(1, 90 if case % 5 == 0 else 16))
        step = group_size if bits else 32
        hidden, width = (step * int(n) for n in rng.integers(1, 2 + (step < 128), 2))
        layers, dense = experts(num_experts, hidden, width, bits, group_size, dtype, seed=case)
        x = mx.array(rng.standard_normal((num_tokens, hidden), np.float32)).astype(dtype)
        # Skewed: some experts get most rows, some none.
        logits = 2 * rng.standard_normal((num_tokens, num_experts)) + np.arange(num_experts)
        indices, scores = routed(mx.array(logits.astype(np.float32)), per_token)
        found = eligible(x, layers)
        assert found is not None
        ours = grouped_expert_mlp(x, indices, scores, *found)
        assert ours.dtype == dtype
        truth = naive_expert_mlp(x, indices, scores, *dense)
        assert relative_error(ours, truth) <= TOLERANCE[dtype]
        for launch, dims in zip(
            log.launches[-2:], ((hidden, 2 * width), (width, hidden)), strict=True
        ):
            counts = np.bincount(np.array(indices).flatten(), minlength=num_experts)
            assert launch.num_matrix_macs == num_matrix_macs(counts, *dims)
            assert launch.threadgroup_bytes <= 28 * 1024


def test_there_are_at_least_200_cases() -> None:
    assert len(SPECIALISATIONS) * CASES_EACH >= 200


@pytest.mark.parametrize("dtype", everyday(TOLERANCE, 0), ids=str)
def test_widths_that_are_no_multiple_of_the_tile(log: Log, dtype: mx.Dtype) -> None:
    layers, dense = experts(3, 160, 96, 4, 32, dtype)
    x = mx.random.normal((40, 160), key=mx.random.key(1)).astype(dtype)
    indices, scores = routed(mx.random.normal((40, 3), key=mx.random.key(2)), 2)
    before = log.num_dispatches
    ours = expert_mlp(x, indices, scores, stack(layers), KERNEL)
    assert log.num_dispatches == before + 2
    assert relative_error(ours, naive_expert_mlp(x, indices, scores, *dense)) <= TOLERANCE[dtype]


def test_one_expert_that_gets_every_token(log: Log) -> None:
    layers, dense = experts(5, 64, 32, 4, 32, mx.float32)
    x = mx.random.normal((70, 64), key=mx.random.key(3))
    indices, scores = mx.full((70, 1), 3, mx.uint32), mx.full((70, 1), 0.5)
    ours = expert_mlp(x, indices, scores, stack(layers), KERNEL)
    assert relative_error(ours, naive_expert_mlp(x, indices, scores, *dense)) <= 1e-5


def test_the_tiles_are_those_of_the_rows_each_expert_got() -> None:
    row_ends, tile_ends = tiles(mx.array([4] * 70 + [0] * 8 + [2] * 65), 6)
    assert row_ends.tolist() == [8, 8, 73, 73, 143, 143]
    assert tile_ends.tolist() == [1, 1, 3, 3, 5, 5]


@pytest.mark.parametrize("reason", ["few rows", "mxfp4", "bits differ", "not chosen"])
def test_what_the_kernel_does_not_run_goes_to_ops(log: Log, reason: str) -> None:
    layers, _ = experts(4, 64, 64, 4, 32, mx.float32)
    kernels = KERNEL
    num_tokens = SORT_FROM
    if reason == "few rows":
        num_tokens = SORT_FROM // 2 - 1
    elif reason == "mxfp4":
        plain = experts(4, 64, 64, 0, 32, mx.float32)[0]
        layers = [layer.to_quantized(group_size=32, bits=4, mode="mxfp4") for layer in plain]
    elif reason == "bits differ":
        layers[1] = experts(4, 64, 64, 8, 32, mx.float32)[0][1]
    else:
        kernels = with_kernels(["chunk_delta_rule"])
    x = mx.random.normal((num_tokens, 64), key=mx.random.key(4))
    indices, scores = routed(mx.random.normal((num_tokens, 4), key=mx.random.key(5)), 2)
    before = log.num_dispatches
    ours = expert_mlp(x, indices, scores, stack(layers), kernels)
    assert log.num_dispatches == before
    assert mx.array_equal(ours, expert_mlp(x, indices, scores, stack(layers)))


@pytest.mark.slow
@pytest.mark.parametrize("barrier", [0, 1])
def test_each_barrier_is_missed_when_it_is_gone(
    log: Log, monkeypatch: pytest.MonkeyPatch, barrier: int
) -> None:
    name, call = "grouped_expert_matmul", "threadgroup_barrier(mem_flags::mem_threadgroup);"
    read = metal._read
    functions, body = read(name)
    parts = body.split(call)
    assert len(parts) == 3
    kept = [call, call]
    kept[barrier] = ";"
    body = parts[0] + kept[0] + parts[1] + kept[1] + parts[2]
    monkeypatch.setattr(metal, "_read", lambda n: (functions, body) if n == name else read(n))
    metal.clear()
    layers, _ = experts(3, 64, 64, 4, 32, mx.float32)
    indices, scores = routed(mx.random.normal((20, 3), key=mx.random.key(7)), 2)
    with pytest.raises((errors.RaceError, errors.UninitializedError)):
        grouped_expert_mlp(mx.ones((20, 64)), indices, scores, *eligible(mx.ones((1,)), layers))
    metal.clear()


def test_weights_are_read_once_a_tile(log: Log) -> None:
    """Three tiles, of 64, 8 and 3 rows; nothing is read for experts without rows."""
    layers, _ = experts(6, 64, 64, 4, 64, mx.bfloat16)
    x = mx.random.normal((75, 64), key=mx.random.key(6)).astype(mx.bfloat16)
    indices = mx.array([[4]] * 72 + [[1]] * 3)
    grouped_expert_mlp(x, indices, mx.ones((75, 1)), *eligible(x, layers))
    gate_up, down = log.launches[-2:]
    one_expert = layers[0].weight.nbytes // 6
    for traffic in (gate_up.traffic["w"], gate_up.traffic["up"], down.traffic["w"]):
        assert traffic.read_bytes == 3 * one_expert
        assert traffic.unique_read_bytes == 2 * one_expert
    assert down.traffic["out"].written_bytes == 75 * 64 * 2
