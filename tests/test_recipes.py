"""Every quantized module has its kind, and every recipe the bits of its kinds."""

import pytest

from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.quant.affine import BITS
from qwen35_mlx.quant.recipes import RECIPES, SENSITIVITIES, kind_of, recipe

LAYER = "language_model.model.layers.12."
KINDS = {
    f"{LAYER}linear_attn.out_proj": "out_proj",
    f"{LAYER}linear_attn.in_proj_qkv": "attention",
    f"{LAYER}linear_attn.in_proj_z": "attention",
    f"{LAYER}self_attn.q_proj": "attention",
    f"{LAYER}self_attn.o_proj": "attention",
    f"{LAYER}mlp.shared_expert.down_proj": "shared",
    f"{LAYER}mlp.shared_expert.up_proj": "shared",
    f"{LAYER}mlp.down_proj": "down",
    f"{LAYER}mlp.switch_mlp.down_proj": "down",
    f"{LAYER}mlp.gate_proj": "gate_up",
    f"{LAYER}mlp.switch_mlp.up_proj": "gate_up",
    "language_model.lm_head": "lm_head",
    "language_model.model.embed_tokens": "embedding",
}


@pytest.mark.parametrize(("module", "kind"), KINDS.items())
def test_the_kind_of_a_module(module, kind):
    assert kind_of(module) == kind
    assert SENSITIVITIES[kind] > 0


def test_a_recipe_gives_each_kind_its_bits():
    expected = dict(
        out_proj=8, attention=6, shared=6, down=4, gate_up=4, lm_head=6, embedding=4
    )  # fmt: skip
    for module, kind in KINDS.items():
        assert recipe("q4")(module) == (expected[kind], 64)
    assert recipe("q4").__name__ == "q4"
    assert recipe("q2")(f"{LAYER}mlp.gate_proj") == (2, 64)


def test_recipes_give_more_bits_to_kinds_that_lose_more_accuracy():
    for name, bits in RECIPES.items():
        assert bits["out_proj"] >= bits["attention"] >= bits["shared"] >= bits["down"]
        assert bits["down"] >= bits["gate_up"]
        assert bits["gate_up"] == int(name[1:])
        assert set(bits.values()) <= set(BITS)
    for larger, smaller in zip(RECIPES.values(), list(RECIPES.values())[1:], strict=False):
        assert all(larger[kind] >= smaller[kind] for kind in larger)


def test_an_unknown_recipe_is_refused_with_the_names():
    with pytest.raises(Qwen35Error, match=r"(?s)no recipe 'q7'.*q8, q6, q5, q4, q3, q2"):
        recipe("q7")
