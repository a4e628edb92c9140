"""The released models by their sizes: one table for plan, doctor and benches."""

from typing import Any, NamedTuple

OWNER = "Qwen"
# Fields of a Member that are no keys of config.json.
NOT_IN_CONFIG = ("name", "width", "tower", "rotary_dim")


class Tower(NamedTuple):
    """The shapes of a vision tower."""

    hidden_size: int
    depth: int
    num_heads: int
    intermediate_size: int


SMALL, MIDDLE, LARGE = (
    Tower(768, 12, 12, 3072),
    Tower(1024, 24, 16, 4096),
    Tower(1152, 27, 16, 4304),
)


class Member(NamedTuple):
    """The shapes of one model; most fields have the name of their key in config.json.

    `width`: of one expert, or of a dense feed-forward layer.
    """

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    width: int
    linear_num_value_heads: int
    tower: Tower = LARGE
    tie_word_embeddings: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    head_dim: int = 256
    linear_num_key_heads: int = 16
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    rotary_dim: int = 64

    @property
    def full_name(self) -> str:
        """Its name on the hub, without the owner."""
        return f"Qwen3.5-{self.name}"


FAMILY = (
    Member("0.8B", 1024, 24, 8, 2, 3584, 16, SMALL, tie_word_embeddings=True),
    Member("2B", 2048, 24, 8, 2, 6144, 16, MIDDLE, tie_word_embeddings=True),
    Member("4B", 2560, 32, 16, 4, 9216, 32, MIDDLE, tie_word_embeddings=True),
    # We found no published width; this one gives 9 billion parameters.
    Member("9B", 4096, 32, 16, 4, 12288, 32),
    Member("27B", 5120, 64, 24, 4, 17408, 48),
    Member("35B-A3B", 2048, 40, 16, 2, 512, 32, num_experts=256, num_experts_per_tok=8),
    Member("122B-A10B", 3072, 48, 32, 2, 1024, 64, num_experts=256, num_experts_per_tok=8),
    Member("397B-A17B", 4096, 60, 32, 2, 1024, 64, num_experts=512, num_experts_per_tok=10),
)


def find_member(name: str) -> Member | None:
    """The member of this name, such as Qwen3.5-27B or qwen/qwen3.5-27b."""
    wanted = name.lower().removeprefix(f"{OWNER.lower()}/")
    return next((m for m in FAMILY if m.full_name.lower() == wanted), None)


def family_config(name: str) -> dict[str, Any]:
    """The keys of a member's config.json that determine all sizes."""
    member = find_member(name)
    assert member is not None, name
    text: dict[str, Any] = {
        "hidden_act": "silu",
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "vocab_size": 248_320,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": member.rotary_dim / member.head_dim,
        },
    }
    text |= {key: value for key, value in member._asdict().items() if key not in NOT_IN_CONFIG}
    kind, widths = "qwen3_5", ["intermediate_size"]
    if member.num_experts:
        kind, widths = "qwen3_5_moe", ["moe_intermediate_size", "shared_expert_intermediate_size"]
    text |= dict.fromkeys(widths, member.width)
    vision = {
        **member.tower._asdict(),
        "out_hidden_size": member.hidden_size,
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
    }
    return {
        "model_type": kind,
        "text_config": {"model_type": f"{kind}_text", **text},
        "vision_config": vision,
    }
