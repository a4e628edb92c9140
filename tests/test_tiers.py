"""The mlx tier computes what ops compute, and a model's choice reaches every layer."""

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday

from qwen35_mlx.config import ModelConfig
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.family import family_config
from qwen35_mlx.kernels import tiers
from qwen35_mlx.kernels.delta_step import DeltaInputs, DeltaParameters, delta_step
from qwen35_mlx.kernels.gated_delta_rule import is_fused
from qwen35_mlx.kernels.naive import naive_gated_delta_rule
from qwen35_mlx.kernels.tiers import METAL, MLX, OPS, PORTABLE, Tiers, with_kernels
from qwen35_mlx.model.language import Model

ON_MLX = Tiers(MLX)


def small_model(num_value_heads=32, num_experts=0, seed=0):
    """Two layers with the family's head dims, so that MLX's own kernel is eligible."""
    name = "Qwen3.5-35B-A3B" if num_experts else "Qwen3.5-0.8B"
    text = family_config(name)["text_config"] | {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "vocab_size": 96,
        "linear_num_value_heads": num_value_heads,
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    if num_experts:
        text |= {
            "num_experts": num_experts,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        }
    else:
        text["intermediate_size"] = 96
    mx.random.seed(seed)
    model = Model(ModelConfig.from_hf(text))
    mx.eval(model.parameters())
    return model


def logits(model, chosen, pieces, left_padding=None):
    """Of pieces one after the other over one cache."""
    tiers.use(model, chosen)
    cache = model.make_cache(left_padding) if left_padding else model.make_cache()
    result = [model(piece, cache) for piece in pieces]
    mx.eval(result)
    tiers.use(model, PORTABLE)
    return result


@pytest.mark.parametrize("num_experts", everyday([0, 8], 1))
@pytest.mark.parametrize("left_padding", everyday([None, [0, 3]], 1))
def test_the_mlx_tier_gives_the_logits_of_ops(num_experts, left_padding):
    model = small_model(num_experts=num_experts)
    rows = len(left_padding) if left_padding else 1
    rng = np.random.default_rng(0)
    # 22 tokens of 3 experts are sorted by expert, 5 are not.
    pieces = [mx.array(rng.integers(0, 96, (rows, n))) for n in (22, 1, 5, 1)]
    want = logits(model, PORTABLE, pieces, left_padding)
    got = logits(model, ON_MLX, pieces, left_padding)
    for a, b in zip(got, want, strict=True):
        if left_padding:
            # What is at padding is nobody's.
            a, b = a[:, -1], b[:, -1]
        assert b.std().item() > 0.1
        assert mx.abs(a - b).max().item() < 2e-5


def test_heads_that_mlx_has_no_kernel_for_run_as_ops(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a graph of ten thousand operations")

    monkeypatch.setattr(mx.fast, "gated_delta_update", refuse)
    model = small_model(num_value_heads=8 * 16)
    ids = mx.array([[1, 2, 3]])
    (got,), (want,) = logits(model, ON_MLX, [ids]), logits(model, PORTABLE, [ids])
    assert mx.abs(got - want).max().item() < 2e-5


def test_a_mask_never_reaches_the_operation_that_would_become_a_graph(monkeypatch):
    real, calls = mx.fast.gated_delta_update, []

    def watched(*arguments, **options):
        calls.append((len(arguments), options))
        return real(*arguments, **options)

    monkeypatch.setattr(mx.fast, "gated_delta_update", watched)
    logits(small_model(), ON_MLX, [mx.array([[0, 1, 2], [3, 4, 5]])], [1, 0])
    assert calls == [(6, {})]


def test_a_slow_decay_in_bfloat16_is_not_rounded_to_one():
    """MLX's operation takes the decay in the type of q; 0.999 has no bfloat16."""
    mx.random.seed(2)
    tokens, heads, dim = 100, 16, 128
    channels = 3 * heads * dim
    qkv, z = mx.random.normal((1, tokens, channels)), mx.random.normal((1, tokens, heads * dim))
    a, b = mx.random.normal((1, tokens, heads)), mx.random.normal((1, tokens, heads))
    parameters = DeltaParameters(
        0.5 * mx.random.normal((channels, 4, 1)),
        mx.full((heads,), -7.0),
        mx.zeros(heads),
        mx.ones(dim),
        1e-6,
    )
    state = mx.random.normal((1, heads, dim, dim))
    inputs = [x.astype(mx.bfloat16) for x in (qkv, z, b, a, mx.zeros((1, 3, channels)))]
    exact = [x.astype(mx.float32) for x in inputs]
    _, _, want = delta_step(DeltaInputs(*exact, state, parameters))
    small = DeltaParameters(*(x.astype(mx.bfloat16) for x in parameters[:4]), parameters.eps)
    _, _, got = delta_step(DeltaInputs(*inputs, state, small), kernels=ON_MLX)
    error = mx.sqrt(mx.square(got - want).sum() / mx.square(want).sum()).item()
    assert error < 5e-3


@pytest.mark.parametrize("num_tokens", everyday([1, 5, 70], 0, 1))
def test_mlxs_delta_rule_has_our_state_and_our_numbers(num_tokens):
    mx.random.seed(1)
    q, k = (mx.random.normal((1, num_tokens, 16, 128)) for _ in range(2))
    q, k = (x * mx.rsqrt((x * x).sum(axis=-1, keepdims=True)) for x in (q, k))
    v = mx.random.normal((1, num_tokens, 32, 128))
    g = -mx.abs(mx.random.normal((1, num_tokens, 32)))
    beta = mx.random.uniform(shape=(1, num_tokens, 32))
    state = mx.random.normal((1, 32, 128, 128))
    want, want_state = naive_gated_delta_rule(q, k, v, g, beta, state)
    got, got_state = mx.fast.gated_delta_update(q, k, v, mx.exp(g), beta, state)
    # Relative to the largest: values are up to 4.
    assert mx.abs(got - want).max().item() <= 1e-6 * mx.abs(want).max().item()
    assert mx.abs(got_state - want_state).max().item() <= 1e-6 * mx.abs(want_state).max().item()


def test_every_model_of_the_family_has_heads_that_mlx_has_a_kernel_for():
    assert all(is_fused(16, n, 128, 128) for n in (16, 32, 48, 64))
    assert not is_fused(16, 32, 64, 128)
    assert not is_fused(2, 4, 128, 128)


def test_a_kernel_runs_for_as_many_rows_as_it_was_found_faster_for():
    chosen = Tiers(MLX, {"projection": 2})
    assert [chosen.of("projection", n) for n in (1, 2, 3)] == [METAL, METAL, MLX]
    assert chosen.of("router") == MLX
    assert PORTABLE.of("router") == OPS
    assert with_kernels(["router"], OPS).of("projection") == OPS


def test_an_unknown_operation_is_refused():
    with pytest.raises(Qwen35Error, match="no such kernel: warp_drive"):
        with_kernels(["warp_drive"])
