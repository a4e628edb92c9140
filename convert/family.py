"""The released models by their sizes alone: what they would take, before anything is fetched."""

import math
from pathlib import Path
from typing import Any

from qwen35_mlx.config import ModelConfig
from qwen35_mlx.headers import SourceTensor
from qwen35_mlx.tensor_table import expected_shapes

from .source import Source

# hidden size, layers, query heads, key/value heads, linear value heads, tied,
# and the width of the feed-forward layers or (experts, experts a token, width of each).
FAMILY: dict[str, tuple[int, int, int, int, int, bool, int | tuple[int, int, int]]] = {
    "Qwen3.5-0.8B": (1024, 24, 8, 2, 16, True, 3584),
    "Qwen3.5-2B": (2048, 24, 8, 2, 16, True, 6144),
    "Qwen3.5-4B": (2560, 32, 16, 4, 32, True, 9216),
    # The width is not published where we could read it; this one makes 9 B parameters.
    "Qwen3.5-9B": (4096, 32, 16, 4, 32, False, 12288),
    "Qwen3.5-27B": (5120, 64, 24, 4, 48, False, 17408),
    "Qwen3.5-35B-A3B": (2048, 40, 16, 2, 32, False, (256, 8, 512)),
    "Qwen3.5-122B-A10B": (3072, 48, 32, 2, 64, False, (256, 8, 1024)),
    "Qwen3.5-397B-A17B": (4096, 60, 32, 2, 64, False, (512, 10, 1024)),
}


def family_config(name: str) -> dict[str, Any]:
    """The part of config.json that sizes follow from."""
    hidden, layers, heads, kv_heads, value_heads, tied, width = FAMILY[name]
    text: dict[str, Any] = {
        "hidden_act": "silu",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "full_attention_interval": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "vocab_size": 248_320,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
        },
    }
    if isinstance(width, tuple):
        kind, keys = "qwen3_5_moe", ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
        text |= dict(zip(keys, width, strict=True)) | {"shared_expert_intermediate_size": width[2]}
    else:
        kind = "qwen3_5"
        text["intermediate_size"] = width
    return {"model_type": kind, "text_config": {"model_type": f"{kind}_text", **text}}


def family_source(name: str) -> Source:
    """A source that can be planned, not read: the text model in bfloat16."""
    config = family_config(name)
    file = Path(name) / "model.safetensors"
    tensors = {
        tensor: SourceTensor(tensor, "BF16", shape, file, 0, 2 * math.prod(shape))
        for tensor, shape in expected_shapes(ModelConfig.from_hf(config)).items()
    }
    return Source(file.parent, config, tensors)
