"""Router and routed experts against the naive truth, quantized or not, sorted or not."""

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.switch_layers as switch_layers
import numpy as np
import pytest
from mlx.utils import tree_flatten

from qwen35_mlx.kernels import router
from qwen35_mlx.kernels.grouped_expert_matmul import SORT_FROM, expert_mlp
from qwen35_mlx.kernels.naive import naive_expert_mlp
from qwen35_mlx.kernels.router import route
from qwen35_mlx.kernels.switch import SwitchGLU, SwitchLinear
from qwen35_mlx.kernels.tiers import OPS, with_kernels


def routed(logits, per_token):
    return route(logits, mx.zeros((len(logits), 1)), per_token)[:2]


def stack(layers):
    experts = SwitchGLU(1, 1, 1)
    experts.gate_proj, experts.up_proj, experts.down_proj = layers
    return experts


def projections(num_experts, hidden, width, seed):
    keys = mx.random.split(mx.random.key(seed), 3)
    layers = []
    for key, (rows, columns) in zip(
        keys, [(width, hidden), (width, hidden), (hidden, width)], strict=True
    ):
        layer = SwitchLinear(columns, rows, num_experts)
        layer.weight = mx.random.normal((num_experts, rows, columns), key=key) * columns**-0.5
        layers.append(layer)
    return layers


# One row, a batch below the sorting threshold, and one above it that leaves experts unused.
@pytest.mark.parametrize("num_tokens", [1, 3, SORT_FROM + 7])
@pytest.mark.parametrize(("num_experts", "per_token"), [(8, 3), (5, 5), (4, 1)])
def test_gathered_experts_equal_the_naive_ones(num_tokens, num_experts, per_token):
    layers = projections(num_experts, 32, 24, seed=num_tokens)
    x = mx.random.normal((num_tokens, 32), key=mx.random.key(1))
    logits = mx.random.normal((num_tokens, num_experts), key=mx.random.key(2))
    indices, scores = routed(logits, per_token)
    ours = expert_mlp(x, indices, scores, stack(layers))
    truth = naive_expert_mlp(x, indices, scores, *(layer.weight for layer in layers))
    np.testing.assert_allclose(np.array(ours), np.array(truth), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("num_tokens", [2, SORT_FROM])
def test_quantized_experts_equal_the_naive_ones_of_the_dequantized_weights(bits, num_tokens):
    layers = projections(6, 64, 32, seed=bits)
    quantized = [layer.to_quantized(group_size=32, bits=bits) for layer in layers]
    dense = [
        mx.dequantize(q.weight, q.scales, q.biases, group_size=32, bits=bits) for q in quantized
    ]
    x = mx.random.normal((num_tokens, 64), key=mx.random.key(3))
    indices, scores = routed(mx.random.normal((num_tokens, 6), key=mx.random.key(4)), 2)
    ours = expert_mlp(x, indices, scores, stack(quantized))
    truth = naive_expert_mlp(x, indices, scores, *dense)
    np.testing.assert_allclose(np.array(ours), np.array(truth), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_token", [1, 3, 7])
def test_the_router_takes_the_largest_and_renormalises(per_token):
    logits = np.random.default_rng(0).standard_normal((11, 7)).astype(np.float32) * 3
    indices, scores = (np.array(x) for x in routed(mx.array(logits), per_token))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for row in range(11):
        best = np.argsort(-probabilities[row])[:per_token]
        assert set(indices[row]) == set(best)
        expected = probabilities[row][indices[row]]
        np.testing.assert_allclose(scores[row], expected / expected.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("num_experts", "per_token", "fits"),
    [(1024, 32, True), (1025, 2, False), (64, 33, False)],
)
def test_more_experts_than_the_kernel_holds_are_routed_by_ops(
    monkeypatch, num_experts, per_token, fits
):
    monkeypatch.setattr(router, "route_kernel", lambda *arguments: "kernel")
    logits, shared = mx.random.normal((3, num_experts), key=mx.random.key(5)), mx.zeros((3, 1))
    found = route(logits, shared, per_token, with_kernels(["router"], OPS))
    assert (found == "kernel") == fits
    if not fits:
        plain = route(logits, shared, per_token)
        assert all(mx.array_equal(a, b) for a, b in zip(found, plain, strict=True))


def test_the_router_works_in_fp32_whatever_the_logits_are():
    logits = mx.array([[300.0, 299.0, -300.0]], dtype=mx.float16)
    _, scores = routed(logits, 2)
    assert scores.dtype == mx.float32
    np.testing.assert_allclose(sorted(scores[0].tolist()), [0.26894143, 0.73105857], rtol=1e-4)


def test_experts_keep_the_type_of_the_activations():
    layers = projections(4, 32, 24, seed=0)
    for layer in layers:
        layer.set_dtype(mx.float16)
    assert all(isinstance(layer, nn.Module) for layer in layers)
    x = mx.ones((2, 32), dtype=mx.float16)
    indices, scores = routed(mx.zeros((2, 4)), 2)
    assert expert_mlp(x, indices, scores, stack(layers)).dtype == mx.float16


@pytest.mark.parametrize("num_tokens", [2, SORT_FROM])
@pytest.mark.parametrize(
    "settings",
    [None, dict(bits=4, group_size=32), dict(bits=4, group_size=32, mode="mxfp4"),
     dict(bits=4, group_size=16, mode="nvfp4"), dict(bits=8, group_size=32, mode="mxfp8")],
)  # fmt: skip
def test_a_stack_of_experts_is_that_of_mlx_lm(settings, num_tokens):
    """Same names and arrays on disk, same numbers, quantized by either."""
    ours, theirs = SwitchGLU(64, 32, 5), switch_layers.SwitchGLU(64, 32, 5)
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = getattr(theirs, name)
        own = SwitchLinear(*layer.weight.shape[:0:-1], 5)
        own.update(layer.parameters())
        if settings:
            layer, own = layer.to_quantized(**settings), own.to_quantized(**settings)
        setattr(theirs, name, layer)
        setattr(ours, name, own)
    names = [dict(tree_flatten(m.parameters())) for m in (ours, theirs)]
    assert names[0].keys() == names[1].keys()
    for name, array in names[0].items():
        np.testing.assert_array_equal(np.array(array), np.array(names[1][name]))
    x = mx.random.normal((num_tokens, 64))
    indices = mx.random.randint(0, 5, (num_tokens, 2))
    np.testing.assert_array_equal(np.array(ours(x, indices)), np.array(theirs(x, indices)))


@pytest.mark.parametrize(("num_experts", "per_token"), [(64, 33), (1025, 4)])
def test_routers_larger_than_the_kernel_run_on_ops(num_experts, per_token):
    logits = mx.random.normal((2, num_experts), key=mx.random.key(0))
    arguments = (logits, mx.zeros((2, 1)), per_token)
    for found, expected in zip(
        route(*arguments, with_kernels(["router"], base="ops")), route(*arguments), strict=True
    ):
        assert mx.array_equal(found, expected)
