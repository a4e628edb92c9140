"""ModelConfig: what a Qwen3.5 config.json must say, and a refusal of anything else."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .config_keys import Reader, refuse_unsupported, report_unknown, unsupported
from .errors import ConfigError
from .files import read_object

DENSE_TYPES = ("qwen3_5", "qwen3_5_text")
MOE_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
# Qwen3-Next and Qwen3-Coder-Next: the same mathematics, fused linear-attention projections.
NEXT_TYPE = "qwen3_next"
LINEAR, FULL = "linear_attention", "full_attention"
# The head sizes that ops and kernels tile evenly; the released models use 128.
LINEAR_HEAD_DIMS = (8, 16, 32, 64, 128, 256)
MAX_HEAD_DIM = 256
MAX_LAYERS = 1024
# The released models have it; the default where config.json has none.
MROPE_SECTION = (11, 11, 10)
TRAINED_LENGTH = "original_max_position_embeddings"
# The largest factor of YaRN that the released models were tried with.
MAX_STRETCH = 4

# Keys with whole numbers above zero: of every model, of dense models, of MoE models.
SIZES = tuple(
    """vocab_size hidden_size num_attention_heads num_key_value_heads head_dim linear_num_key_heads
    linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim
    max_position_embeddings""".split()
)
DENSE_SIZES = ("intermediate_size",)
MOE_SIZES = tuple(
    """num_experts num_experts_per_tok moe_intermediate_size
    shared_expert_intermediate_size""".split()
)
# Keys that would change the computation, and the values under which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "output_gate_type": (None, "silu", "swish"),
    "attn_output_gate": (True,),
    "attention_bias": (False, None),
    "mlp_only_layers": ([], None),
    "norm_topk_prob": (True, None),
    "decoder_sparse_step": (1, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "mamba_ssm_dtype": ("float32", None),
    "rope_scaling": (None,),
}
# The same for the vision tower: features of other models with the same keys.
VISION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "deepstack_visual_indexes": ([], None),
    "fullatt_block_indexes": ([], None),
    "window_size": (None,),
}
VISION_INERT = frozenset(
    """attention_dropout dtype id2label initializer_range label2id model_type output_attentions
    output_hidden_states problem_type return_dict rope_parameters tokens_per_second torch_dtype
    transformers_version _name_or_path _attn_implementation architectures
    chunk_size_feed_forward is_encoder_decoder""".split()
)
VISION_THETA = 1e4
# Keys that say nothing about the forward pass of the text model.
INERT = frozenset(
    """architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward dtype
    eos_token_id full_attention_interval id2label image_token_id initializer_range
    generation_config is_encoder_decoder label2id language_model_only mtp_num_hidden_layers
    mtp_layer_types mtp_use_dedicated_embeddings num_mtp_layers output_attentions
    output_hidden_states output_router_logits pad_token_id partial_rotary_factor problem_type
    quantization quantization_config qwen35_mlx return_dict router_aux_loss_coef text_config
    torch_dtype transformers_version use_cache video_token_id vision_config vision_end_token_id
    vision_start_token_id _name_or_path _attn_implementation intermediate_size rope_theta""".split()
)


@dataclass(frozen=True)
class RopeConfig:
    """Partial rotary embedding; the YaRN fields are None for the default type."""

    theta: float
    rotary_dim: int
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    # Frequencies for time, row and column, interleaved; they differ only at picture tokens.
    mrope_section: tuple[int, int, int] = MROPE_SECTION


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower of a checkpoint."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_position_embeddings: int
    out_hidden_size: int
    rope_theta: float = VISION_THETA

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], hidden_size: int) -> "VisionConfig":
        """Check `vision_config` of a config.json; `hidden_size` is that of the text model."""
        vision = config.get("vision_config")
        if not isinstance(vision, Mapping):
            raise ConfigError(
                "vision_config is not an object", got=repr(vision)[:80], expected="an object"
            )
        refuse_unsupported(vision, VISION_NEUTRAL, "vision_config.")
        text_rope = (config.get("text_config") or config).get("rope_parameters") or {}
        refuse_unsupported(text_rope, {"mrope_interleaved": (True,)}, "rope_parameters.")
        get, rope = Reader(vision, "vision_config."), vision.get("rope_parameters") or {}
        kind = rope.get("rope_type", "axial") if isinstance(rope, Mapping) else rope
        if kind != "axial":
            raise unsupported("vision_config.rope_parameters.rope_type", kind, "'axial'")
        theta = Reader(rope, "vision_config.rope_parameters.").number("rope_theta", VISION_THETA)
        keys = {field.name for field in fields(cls)} - {"rope_theta"}
        sizes: dict[str, Any] = {key: get.positive(key) for key in sorted(keys)}
        result = cls(**sizes, rope_theta=theta)
        report_unknown(vision, keys | VISION_NEUTRAL.keys() | VISION_INERT, "vision_config.")
        if result.hidden_size % (4 * result.num_heads):
            raise ConfigError(
                "vision_config.num_heads does not fit hidden_size",
                got=f"{result.num_heads} heads in {result.hidden_size}",
                expected="heads of a multiple of 4",
            )
        if result.grid_size**2 != result.num_position_embeddings:
            raise unsupported(
                "vision_config.num_position_embeddings",
                result.num_position_embeddings,
                "a square, as 2304 = 48 * 48",
            )
        if result.out_hidden_size != hidden_size:
            raise ConfigError(
                "vision_config.out_hidden_size is not the hidden size of the text model",
                got=result.out_hidden_size,
                expected=hidden_size,
            )
        return result

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def grid_size(self) -> int:
        """Position embeddings on a side of their square."""
        return math.isqrt(self.num_position_embeddings)


@dataclass(frozen=True)
class ModelConfig:
    """The text model of a Qwen3.5 checkpoint; `num_experts` is 0 for the dense models."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: RopeConfig
    intermediate_size: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    fuses_linear_projections: bool = False
    # Set where the checkpoint holds the weights of a tower.
    vision: VisionConfig | None = None
    # Layers that predict further tokens; 0 where the checkpoint has none or none is loaded.
    num_mtp_layers: int = 0
    # A limit on the context: by this machine's memory, or by the caller of `load`.
    context_limit: int | None = None
    # Bits of keys and of values in the cache; None: the type of the activations.
    kv_bits: tuple[int, int] | None = None

    @property
    def value_dim(self) -> int:
        """Channels of all linear-attention values."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the depthwise convolution: q, k and v."""
        return 2 * self.linear_num_key_heads * self.linear_key_head_dim + self.value_dim

    @property
    def context_length(self) -> int:
        """Most tokens a prompt and its answer may have; YaRN stretches the trained length."""
        longest = self.max_position_embeddings
        if self.rope.factor is not None and self.rope.original_max_position_embeddings is not None:
            stretched = int(self.rope.factor * self.rope.original_max_position_embeddings)
            longest = max(longest, stretched)
        return min(longest, self.context_limit or longest)

    @property
    def stretched_length(self) -> int:
        """The longest context that may be asked for: with YaRN, if the checkpoint has none."""
        if self.rope.factor is not None:
            return self.context_length
        return MAX_STRETCH * self.max_position_embeddings

    def stretched_to(self, context: int | None) -> "ModelConfig":
        """Add YaRN if `context` is longer than the trained length; otherwise return self.

        The factor is the same for texts of any length, rounded up to hundredths.
        """
        trained = self.max_position_embeddings
        if self.rope.factor is not None or context is None:
            return self
        if not trained < context <= self.stretched_length:
            return self
        factor = math.ceil(100 * context / trained) / 100
        rope = replace(
            self.rope,
            factor=factor,
            original_max_position_embeddings=trained,
            attention_factor=_yarn_attention_factor(factor, 0, 0),
        )
        return replace(self, rope=rope)

    @property
    def cache_key(self) -> str:
        """What changes the numbers in a cache besides the weights; empty by default."""
        parts = [f"kv_bits={self.kv_bits}"] if self.kv_bits else []
        return " ".join(parts + ([repr(self.rope)] if self.rope.factor else []))

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward layers are routed experts."""
        return self.num_experts > 0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Check a parsed config.json, nested or flat, and keep what the text model needs."""
        model_type = config.get("model_type")
        if model_type not in (*DENSE_TYPES, *MOE_TYPES, NEXT_TYPE):
            raise ConfigError(
                f"model_type={model_type!r} is not a Qwen3.5 model",
                got=repr(model_type),
                expected=", ".join((*DENSE_TYPES, *MOE_TYPES, NEXT_TYPE)),
            )
        fuses = model_type == NEXT_TYPE
        if fuses:
            config, model_type = next_as_moe(config), MOE_TYPES[1]
        text = config.get("text_config") or config
        if not isinstance(text, Mapping):
            raise ConfigError(
                "text_config is not an object", got=repr(text)[:80], expected="an object"
            )
        is_moe = model_type in MOE_TYPES
        inner_type = text.get("model_type", model_type)
        if inner_type not in (MOE_TYPES if is_moe else DENSE_TYPES):
            raise ConfigError(
                "text_config.model_type does not match model_type",
                got=f"{inner_type!r} inside {model_type!r}",
                expected="both dense or both mixture-of-experts",
            )
        if "hidden_act" not in text:
            raise ConfigError(
                "config key hidden_act is missing", got="no such key", expected="'silu'"
            )
        refuse_unsupported(text, NEUTRAL)
        get = Reader(text)
        layer_types = _layer_types(text, get.positive("num_hidden_layers", MAX_LAYERS))
        # As in transformers: the outer key takes precedence over text_config.
        tying = Reader(config if "tie_word_embeddings" in config else text)
        keys = SIZES + (MOE_SIZES if is_moe else DENSE_SIZES)
        sizes: dict[str, Any] = {key: get.positive(key) for key in keys}
        result = cls(
            model_type=model_type,
            num_hidden_layers=len(layer_types),
            layer_types=layer_types,
            rms_norm_eps=get.number("rms_norm_eps"),
            tie_word_embeddings=tying.flag("tie_word_embeddings", default=False),
            rope=_rope(text, get.positive("head_dim")),
            fuses_linear_projections=fuses,
            **sizes,
        )
        known = {f.name for f in fields(cls)} | {"rope_parameters", TRAINED_LENGTH}
        report_unknown(text, known | INERT | NEUTRAL.keys())
        result._check()
        return result

    def _check(self) -> None:
        for key in ("linear_key_head_dim", "linear_value_head_dim"):
            if getattr(self, key) not in LINEAR_HEAD_DIMS:
                one = f"one of {', '.join(map(str, LINEAR_HEAD_DIMS))}"
                raise unsupported(key, getattr(self, key), one)
        if self.head_dim % 8 or self.head_dim > MAX_HEAD_DIM:
            raise unsupported("head_dim", self.head_dim, f"a multiple of 8 up to {MAX_HEAD_DIM}")
        for few, many in (
            ("num_key_value_heads", "num_attention_heads"),
            ("linear_num_key_heads", "linear_num_value_heads"),
        ):
            if getattr(self, many) % getattr(self, few):
                raise ConfigError(
                    f"{many} is not a multiple of {few}",
                    got=f"{getattr(self, many)} and {getattr(self, few)}",
                    expected="a whole number of heads in each group",
                )
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                "num_experts_per_tok is larger than num_experts",
                got=self.num_experts_per_tok,
                expected=f"at most {self.num_experts}",
            )


def read_config(folder: Path) -> dict[str, Any]:
    """Parse `folder/config.json`; a missing or damaged file is a ConfigError."""
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"no config.json in {folder}",
            got="no such file" if folder.is_dir() else "no such folder",
            expected="a model folder with config.json, tokenizer.json and *.safetensors",
        )
    return read_object(folder / "config.json")


def next_as_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Qwen3-Next config with the keys of `qwen3_5_moe_text`; any other one unchanged."""
    text = dict(config)
    if text.get("model_type") != NEXT_TYPE:
        return text
    text["model_type"] = MOE_TYPES[1]
    scaling = text.pop("rope_scaling", None)
    if "rope_parameters" not in text:
        if scaling is not None and not isinstance(scaling, Mapping):
            raise ConfigError("rope_scaling is not an object", got=repr(scaling))
        keys = ("rope_theta", "partial_rotary_factor")
        rope = {key: text[key] for key in keys if key in text} | dict(scaling or {})
        text["rope_parameters"] = {"rope_type": rope.get("type", "default")} | rope
    return text


def _layer_types(text: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    types = text.get("layer_types")
    if types is None:
        interval = Reader(text).positive("full_attention_interval")
        return tuple(FULL if (i + 1) % interval == 0 else LINEAR for i in range(num_layers))
    if not isinstance(types, list) or len(types) != num_layers:
        raise ConfigError(
            "layer_types does not fit num_hidden_layers",
            got=f"{len(types)} entries" if isinstance(types, list) else repr(types),
            expected=f"a list of {num_layers} entries",
        )
    wrong = sorted({str(t) for t in types} - {LINEAR, FULL})
    if wrong:
        raise ConfigError(
            "layer_types has a kind of layer that is not supported",
            got=", ".join(wrong),
            expected=f"{LINEAR} or {FULL}",
        )
    return tuple(types)


def _rope(text: Mapping[str, Any], head_dim: int) -> RopeConfig:
    rope = text.get("rope_parameters")
    if not isinstance(rope, dict):
        raise ConfigError(
            "config key rope_parameters is missing",
            got=repr(rope),
            expected="an object with rope_theta, partial_rotary_factor and rope_type",
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise unsupported("rope_type", kind, "'default' or 'yarn'")
    # As in the reference: outside of rope_parameters the first key is a fallback, the second wins.
    less = {"partial_rotary_factor": text.get("partial_rotary_factor")}
    more = {key: text[key] for key in (TRAINED_LENGTH,) if key in text}
    get = Reader(less | rope | more, "rope_parameters.")
    partial = get.number("partial_rotary_factor")
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise ConfigError(
            f"partial_rotary_factor={partial} does not fit head_dim={head_dim}",
            got=f"{rotary_dim} rotated dims",
            expected=f"an even number from 2 to {head_dim}",
        )
    theta, section = get.number("rope_theta"), _mrope_section(rope)
    if kind == "default":
        return RopeConfig(theta, rotary_dim, mrope_section=section)
    factor = get.number("factor")
    if rope.get("attention_factor") is not None:
        attention_factor = get.number("attention_factor")
    else:
        attention_factor = _yarn_attention_factor(
            factor, get.number("mscale", 0), get.number("mscale_all_dim", 0)
        )
    return RopeConfig(
        theta,
        rotary_dim,
        factor=factor,
        original_max_position_embeddings=get.positive(TRAINED_LENGTH),
        attention_factor=attention_factor,
        beta_fast=get.number("beta_fast", 32),
        beta_slow=get.number("beta_slow", 1),
        truncate=get.flag("truncate", default=True),
        mrope_section=section,
    )


def _mrope_section(rope: Mapping[str, Any]) -> tuple[int, int, int]:
    section = rope.get("mrope_section")
    if section is None:
        return MROPE_SECTION
    if (
        not isinstance(section, list)
        or len(section) != 3
        or not all(type(n) is int and n >= 0 for n in section)
    ):
        raise unsupported(
            "rope_parameters.mrope_section", section, "three numbers, as [11, 11, 10]"
        )
    time, row, column = section
    return time, row, column


def _yarn_attention_factor(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """YaRN (arXiv 2309.00071), section 3.4: scale of the rotated queries and keys."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)
