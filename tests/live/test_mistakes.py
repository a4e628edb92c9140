"""The live and golden comparisons can fail: mistakes made on purpose differ by far more than noise.

Needs the extra `live`: pytest -m live.
"""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra `live` is not installed")

from golden import make_golden as golden  # noqa: E402
from test_golden import MAX_DIFFERENCE, MAX_KL, distances  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("default")]


def _permute_value_heads(model: Any, order: list[int]) -> None:
    """Value head h takes everything from order[h], but keeps the key head it reads."""
    for layer in model.modules():
        if not type(layer).__name__.endswith("GatedDeltaNet"):
            continue
        rows = np.arange(layer.value_dim).reshape(-1, layer.head_v_dim)[order].ravel()
        channels = np.append(np.arange(2 * layer.key_dim), 2 * layer.key_dim + rows)
        layer.in_proj_qkv.weight.data = layer.in_proj_qkv.weight.data[channels]
        layer.conv1d.weight.data = layer.conv1d.weight.data[channels]
        layer.in_proj_z.weight.data = layer.in_proj_z.weight.data[rows]
        layer.out_proj.weight.data = layer.out_proj.weight.data[:, rows]
        for parameter in (layer.in_proj_a.weight, layer.in_proj_b.weight, layer.A_log):
            parameter.data = parameter.data[order]
        layer.dt_bias.data = layer.dt_bias.data[order]


def _edit(suffix: str, edit: Any) -> Any:
    """A change to every parameter whose name ends in `suffix`."""

    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith(suffix):
                parameter.data = edit(parameter.data)

    return change


def _one_expert_less(model: Any) -> None:
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.top_k -= 1


def _rotary(edit: Any) -> Any:
    def change(model: Any) -> None:
        for module in model.modules():
            if type(module).__name__.endswith("TextRotaryEmbedding"):
                edit(module)

    return change


def _without_yarn(rotary: Any) -> None:
    rotary.inv_freq, rotary.attention_scaling = rotary.compute_default_rope_parameters(
        rotary.config
    )


def _plain_scaling(rotary: Any) -> None:
    rotary.attention_scaling = 1.0


# What an implementation can get wrong, done to the reference: golden case, name, change.
MISTAKES = {
    "experts_shuffled": ("moe", _edit("experts.down_proj", lambda w: w.roll(1, 0))),
    "expert_gate_and_up_swapped": (
        "moe",
        _edit("experts.gate_up_proj", lambda w: w.roll(w.shape[1] // 2, 1)),
    ),
    "shared_expert_dropped": ("moe", _edit("shared_expert.down_proj.weight", torch.zeros_like)),
    "shared_expert_not_gated": ("moe", _edit("shared_expert_gate.weight", torch.zeros_like)),
    "router_reversed": ("moe", _edit("mlp.gate.weight", lambda w: w.flip(0))),
    "one_expert_less": ("moe", _one_expert_less),
    "input_norm_not_shifted": ("dense", _edit("input_layernorm.weight", lambda w: w - 1)),
    "final_norm_not_shifted": ("dense", _edit("language_model.norm.weight", lambda w: w - 1)),
    "q_norm_not_shifted": ("dense", _edit("q_norm.weight", lambda w: w - 1)),
    "k_norm_shifted_twice": ("dense", _edit("k_norm.weight", lambda w: w + 1)),
    "gated_norm_shifted": ("dense", _edit("linear_attn.norm.weight", lambda w: w + 1)),
    "conv_reversed": ("dense", _edit("conv1d.weight", lambda w: w.flip(2))),
    "dt_bias_dropped": ("dense", _edit("dt_bias", torch.zeros_like)),
    "decay_dropped": ("dense", _edit("A_log", lambda w: w - 100)),
    "value_head_reads_key_head_h_modulo_Hk": (
        "dense",
        lambda model: _permute_value_heads(model, [0, 2, 1, 3]),
    ),
    "gate_split_before_heads": (
        "dense",
        # Rows are [head, query | gate, D]; a late reshape would take [query | gate, head, D].
        _edit(
            "q_proj.weight",
            lambda w: w.reshape(4, 2, 16, -1).transpose(0, 1).reshape(w.shape).contiguous(),
        ),
    ),
    "rope_theta_1e5": (
        "moe",
        _rotary(lambda r: setattr(r, "inv_freq", 1e5 ** -(torch.arange(4) / 4))),
    ),
    "yarn_ignored": ("yarn", _rotary(_without_yarn)),
    "yarn_attention_factor_ignored": ("yarn", _rotary(_plain_scaling)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_be_seen(mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The random weights make each part matter: a wrong model differs by far more than we allow."""
    case, change = MISTAKES[mistake]
    model_type, text_config, _ = golden.CASES[case]
    model = golden.build(model_type, text_config, np.random.default_rng(0))
    ids = np.random.default_rng(1).integers(text_config["vocab_size"], size=(1, 71))
    right = golden.Reference(model)(ids)[0]
    with torch.no_grad():
        change(model)
    wrong = golden.Reference(model)(ids)[0]
    max_difference, kl = distances(mx.array(wrong), right)
    with capsys.disabled():
        print(f"\n{mistake}: differs by {max_difference:.1e}, KL {kl:.1e}", end="")
    assert max_difference > 30 * MAX_DIFFERENCE
    assert kl > 1e3 * MAX_KL
