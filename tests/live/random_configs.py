"""Random small Qwen3.5 configurations, inside what ModelConfig accepts, for the live comparison."""

from dataclasses import dataclass
from typing import Any

import numpy as np

LINEAR, FULL = "linear_attention", "full_attention"
# In turn, so that every run has each of them several times.
MODEL_TYPES = ("qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")


@dataclass(frozen=True)
class RandomConfig:
    """A model to build with the reference, and how it is written to disk."""

    model_type: str
    text_config: dict[str, Any]
    source_dtype: str
    fused_experts: bool
    max_shard_size: str

    def __str__(self) -> str:
        """One line for the table and for a failure."""
        text = self.text_config
        rope = text["rope_parameters"]
        parts = [
            self.model_type.removeprefix("qwen3_5").strip("_") or "dense",
            "tied" if text["tie_word_embeddings"] else "untied",
            "".join("F" if kind == FULL else "L" for kind in text["layer_types"]),
            f"h{text['hidden_size']}",
            f"attn {text['num_attention_heads']}/{text['num_key_value_heads']}x{text['head_dim']}",
            f"Hk{text['linear_num_key_heads']} Hv{text['linear_num_value_heads']}"
            f" Dk{text['linear_key_head_dim']} Dv{text['linear_value_head_dim']}",
            f"conv{text['linear_conv_kernel_dim']}",
            f"{rope['rope_type']} {rope['partial_rotary_factor']} {rope['rope_theta']:.0e}",
            f"eps{text['rms_norm_eps']:.0e}",
            f"{self.source_dtype}, {self.max_shard_size} shards",
        ]
        if "num_experts" in text:
            experts = f"E{text['num_experts']} top{text['num_experts_per_tok']}"
            parts.insert(5, f"{experts} {'fused' if self.fused_experts else 'apart'}")
        return " | ".join(parts)


def draw_config(rng: np.random.Generator, index: int) -> RandomConfig:
    """Config number `index` of a run; differs with the generator, its model type does not."""

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    model_type = MODEL_TYPES[index % len(MODEL_TYPES)]
    hidden_size = pick(24, 32, 40, 48, 64)
    num_kv_heads, num_key_heads = pick(1, 1, 2, 3), pick(1, 1, 2, 3)
    # Two thirds of them unequal: equal dims hide a transposed state.
    dk = pick(8, 16, 32, 64)
    dv = pick(8, 16, 32, dk)
    text = dict(
        vocab_size=int(rng.integers(40, 150)) * 2 + 1,
        hidden_size=hidden_size,
        num_attention_heads=num_kv_heads * pick(1, 2, 3, 4),
        num_key_value_heads=num_kv_heads,
        head_dim=pick(16, 24, 32, 48, 64),
        linear_num_key_heads=num_key_heads,
        linear_num_value_heads=num_key_heads * pick(1, 2, 2, 3, 4),
        linear_key_head_dim=dk,
        linear_value_head_dim=dv,
        linear_conv_kernel_dim=pick(4, 4, 4, 4, 3, 2),
        rms_norm_eps=pick(1e-6, 1e-6, 1e-5, 1e-3),
        max_position_embeddings=4096,
        tie_word_embeddings=pick(True, False),
        rope_parameters=_draw_rope(pick),
        layer_types=_draw_layer_types(rng, pick),
    )
    text["num_hidden_layers"] = len(text["layer_types"])
    if "moe" in model_type or model_type == "qwen3_next":
        num_experts = pick(2, 4, 5, 8, 16)
        text |= dict(
            num_experts=num_experts,
            num_experts_per_tok=min(num_experts, pick(1, 2, 3, num_experts)),
            moe_intermediate_size=pick(8, 16, 20, 32),
            shared_expert_intermediate_size=pick(8, 16, 40),
        )
    else:
        text["intermediate_size"] = pick(32, 56, 96)
    return RandomConfig(
        model_type,
        text,
        source_dtype=pick("float32", "float32", "float32", "bfloat16"),
        fused_experts=pick(True, False),
        max_shard_size=pick("1GB", "100KB", "20KB"),
    )


def _draw_layer_types(rng: np.random.Generator, pick: Any) -> list[str]:
    """At least one layer of each kind, in the family's pattern or in any order."""
    if pick(True, False, False):
        interval = pick(2, 3, 4)
        return [FULL if (i + 1) % interval == 0 else LINEAR for i in range(4)]
    kinds = [LINEAR, FULL] + [pick(LINEAR, LINEAR, FULL) for _ in range(rng.integers(0, 4))]
    return [kinds[i] for i in rng.permutation(len(kinds))]


def _draw_rope(pick: Any) -> dict[str, Any]:
    rope = dict(
        rope_type="default",
        rope_theta=pick(5e2, 1e4, 1e6, 1e7),
        partial_rotary_factor=pick(0.25, 0.5, 1.0),
    )
    if pick(True, False):
        rope |= dict(mrope_interleaved=True, mrope_section=[11, 11, 10])
    if pick(True, False, False):
        rope |= dict(
            rope_type="yarn",
            factor=pick(2.0, 4.0, 16.0),
            original_max_position_embeddings=pick(32, 64, 1024),
        )
        rope |= pick({}, {}, {"attention_factor": 0.8}, {"beta_fast": 8, "beta_slow": 2})
        rope |= pick({}, {}, {"mscale": 0.7, "mscale_all_dim": 1.3}, {"truncate": False})
    return rope
