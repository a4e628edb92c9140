"""The table of all tensors: Hugging Face names to MLX names, both without prefixes."""

# H hidden, F feed-forward width; Hq/Hkv heads of attention, of dim D; Hk/Hv key/value heads of
# linear attention, of dims Dk/Dv, R of the latter to one of the former, C channels of the
# convolution; E experts of width I, S width of the shared one. Of the vision tower: Vh hidden, Vf
# feed-forward width, Vm width of what is merged, Vp positions, Vc channels, Vt frames, Vs side of a
# patch.

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import chain, groupby

from ..config import FULL, LINEAR, ModelConfig
from .names import TRUNK


class Role(Enum):
    """What happens to a tensor: cast, quantized, copied or dropped."""

    PLAIN = auto()  # cast to the chosen dtype
    DECAY = auto()  # as PLAIN, but float32 stays float32: exp(A_log) needs it
    QUANTIZED = auto()
    ROUTER = auto()  # quantized at 8 bits: fewer would change the choice of experts
    CARRIED = auto()  # copied, not part of the text model
    DROPPED = auto()


class Transform(Enum):
    """The change of values or layout between source and output."""

    KEEP = auto()
    ADD_ONE = auto()  # HF multiplies by 1 + w, MLX by w
    TAPS_FIRST = auto()  # conv1d [C, 1, K] -> [C, K, 1]
    CHANNELS_LAST = auto()  # patch embedding [O, C, T, H, W] -> [O, T, H, W, C]


@dataclass(frozen=True)
class Row:
    """A source tensor, its role and shape, the models that have it, and its output.

    Names are bare; `{layer}`, `{block}` (of the tower) and `{expert}` are filled in, and a final
    `*` matches any rest, of any shape. `shape` is in terms of `model_sizes`, `when` of `_facts`.
    `output`: the name there, if it differs from `source`. `each`: the name of one expert's tensor,
    if experts may be stored one by one. `split` = (groups, widths): the rows are groups of parts
    with these widths, and the output consists of the parts with the indices `parts`.
    """

    source: str
    role: Role
    shape: str = ""
    when: str = ""
    transform: Transform = Transform.KEEP
    output: str = ""
    each: str = ""
    split: tuple[str, str] | None = None
    parts: tuple[int, ...] = ()


def model_sizes(c: ModelConfig) -> dict[str, int]:
    """The sizes that the shapes of the table refer to."""
    sizes = {
        "vocab": c.vocab_size, "H": c.hidden_size, "F": c.intermediate_size,
        "Hq": c.num_attention_heads, "Hkv": c.num_key_value_heads, "D": c.head_dim,
        "Hk": c.linear_num_key_heads, "Hv": c.linear_num_value_heads,
        "Dk": c.linear_key_head_dim, "Dv": c.linear_value_head_dim,
        "R": c.linear_num_value_heads // c.linear_num_key_heads,
        "C": c.conv_dim, "taps": c.linear_conv_kernel_dim,
        "E": c.num_experts, "I": c.moe_intermediate_size, "S": c.shared_expert_intermediate_size,
    }  # fmt: skip
    if v := c.vision:
        sizes |= {
            "Vh": v.hidden_size, "Vf": v.intermediate_size, "Vp": v.num_position_embeddings,
            "Vm": v.hidden_size * v.spatial_merge_size**2,
            "Vc": v.in_channels, "Vt": v.temporal_patch_size, "Vs": v.patch_size,
        }  # fmt: skip
    return sizes


def _facts(config: ModelConfig, layer_type: str) -> set[str]:
    """The conditions that `when` of a row may name."""
    return {
        "linear" if layer_type == LINEAR else "full",
        "vision" if config.vision else "blind",
        "fused" if config.fuses_linear_projections else "apart",
        "moe" if config.is_moe else "dense",
        "tied" if config.tie_word_embeddings else "untied",
    }


def _tower(name: str, shape: str, transform: Transform = Transform.KEEP) -> Row:
    return Row(
        f"visual.{name}", Role.CARRIED, shape, "vision", transform, output=f"vision_tower.{name}"
    )


def _affine(
    name: str, weight: str, bias: str, transform: Transform = Transform.KEEP
) -> tuple[Row, Row]:
    """Weight and bias of a module of the tower, by their shapes."""
    return _tower(f"{name}.weight", weight, transform), _tower(f"{name}.bias", bias)


PLAIN, DECAY, QUANTIZED, ROUTER = Role.PLAIN, Role.DECAY, Role.QUANTIZED, Role.ROUTER
ADD_ONE = Transform.ADD_ONE
# Qwen3-Next has one fused projection, with the rows of each key head together.
QKVZ, BA = ("Hk", "Dk Dk R*Dv R*Dv"), ("Hk", "R R")
# [E, 2I, H] with the gate first.
GATE_UP = ("E", "I I")

TABLE: tuple[Row, ...] = (
    Row("embed_tokens.weight", QUANTIZED, "vocab H"),
    Row("{layer}input_layernorm.weight", PLAIN, "H", transform=ADD_ONE),
    Row("{layer}linear_attn.A_log", DECAY, "Hv", "linear"),
    Row("{layer}linear_attn.dt_bias", PLAIN, "Hv", "linear"),
    Row("{layer}linear_attn.conv1d.weight", PLAIN, "C 1 taps", "linear", Transform.TAPS_FIRST),
    Row("{layer}linear_attn.in_proj_qkv.weight", QUANTIZED, "C H", "linear apart"),
    Row("{layer}linear_attn.in_proj_z.weight", QUANTIZED, "Hv*Dv H", "linear apart"),
    Row("{layer}linear_attn.in_proj_a.weight", PLAIN, "Hv H", "linear apart"),
    Row("{layer}linear_attn.in_proj_b.weight", PLAIN, "Hv H", "linear apart"),
    Row("{layer}linear_attn.in_proj_qkvz.weight", QUANTIZED, "C+Hv*Dv H", "linear fused",
        output="{layer}linear_attn.in_proj_qkv.weight", split=QKVZ, parts=(0, 1, 2)),
    Row("{layer}linear_attn.in_proj_qkvz.weight", QUANTIZED, "C+Hv*Dv H", "linear fused",
        output="{layer}linear_attn.in_proj_z.weight", split=QKVZ, parts=(3,)),
    Row("{layer}linear_attn.in_proj_ba.weight", PLAIN, "2*Hv H", "linear fused",
        output="{layer}linear_attn.in_proj_a.weight", split=BA, parts=(1,)),
    Row("{layer}linear_attn.in_proj_ba.weight", PLAIN, "2*Hv H", "linear fused",
        output="{layer}linear_attn.in_proj_b.weight", split=BA, parts=(0,)),
    # Not zero-centred, unlike every other norm of the trunk.
    Row("{layer}linear_attn.norm.weight", PLAIN, "Dv", "linear"),
    Row("{layer}linear_attn.out_proj.weight", QUANTIZED, "H Hv*Dv", "linear"),
    # Twice the rows: query and output gate of each head.
    Row("{layer}self_attn.q_proj.weight", QUANTIZED, "2*Hq*D H", "full"),
    Row("{layer}self_attn.k_proj.weight", QUANTIZED, "Hkv*D H", "full"),
    Row("{layer}self_attn.v_proj.weight", QUANTIZED, "Hkv*D H", "full"),
    Row("{layer}self_attn.o_proj.weight", QUANTIZED, "H Hq*D", "full"),
    Row("{layer}self_attn.q_norm.weight", PLAIN, "D", "full", ADD_ONE),
    Row("{layer}self_attn.k_norm.weight", PLAIN, "D", "full", ADD_ONE),
    Row("{layer}post_attention_layernorm.weight", PLAIN, "H", transform=ADD_ONE),
    Row("{layer}mlp.gate_proj.weight", QUANTIZED, "F H", "dense"),
    Row("{layer}mlp.up_proj.weight", QUANTIZED, "F H", "dense"),
    Row("{layer}mlp.down_proj.weight", QUANTIZED, "H F", "dense"),
    Row("{layer}mlp.gate.weight", ROUTER, "E H", "moe"),
    Row("{layer}mlp.experts.gate_up_proj", QUANTIZED, "E 2*I H", "moe",
        output="{layer}mlp.switch_mlp.gate_proj.weight", split=GATE_UP, parts=(0,),
        each="{layer}mlp.experts.{expert}.gate_proj.weight"),
    Row("{layer}mlp.experts.gate_up_proj", QUANTIZED, "E 2*I H", "moe",
        output="{layer}mlp.switch_mlp.up_proj.weight", split=GATE_UP, parts=(1,),
        each="{layer}mlp.experts.{expert}.up_proj.weight"),
    Row("{layer}mlp.experts.down_proj", QUANTIZED, "E H I", "moe",
        output="{layer}mlp.switch_mlp.down_proj.weight",
        each="{layer}mlp.experts.{expert}.down_proj.weight"),
    Row("{layer}mlp.shared_expert.gate_proj.weight", QUANTIZED, "S H", "moe"),
    Row("{layer}mlp.shared_expert.up_proj.weight", QUANTIZED, "S H", "moe"),
    Row("{layer}mlp.shared_expert.down_proj.weight", QUANTIZED, "H S", "moe"),
    Row("{layer}mlp.shared_expert_gate.weight", ROUTER, "1 H", "moe"),
    Row("norm.weight", PLAIN, "H", transform=ADD_ONE),
    Row("lm_head.weight", QUANTIZED, "vocab H", "untied"),
    Row("lm_head.*", Role.DROPPED, when="tied"),
    # Tensors of an MTP layer that does not match MTP_TABLE.
    Row("mtp.*", Role.CARRIED),
    *_affine("patch_embed.proj", "Vh Vc Vt Vs Vs", "Vh", Transform.CHANNELS_LAST),
    _tower("pos_embed.weight", "Vp Vh"),
    *_affine("blocks.{block}.norm1", "Vh", "Vh"),
    *_affine("blocks.{block}.attn.qkv", "3*Vh Vh", "3*Vh"),
    *_affine("blocks.{block}.attn.proj", "Vh Vh", "Vh"),
    *_affine("blocks.{block}.norm2", "Vh", "Vh"),
    *_affine("blocks.{block}.mlp.linear_fc1", "Vf Vh", "Vf"),
    *_affine("blocks.{block}.mlp.linear_fc2", "Vh Vf", "Vh"),
    *_affine("merger.norm", "Vh", "Vh"),
    *_affine("merger.linear_fc1", "Vm Vm", "Vm"),
    *_affine("merger.linear_fc2", "H Vm", "H"),
    # A tower that config.json does not describe cannot run; its tensors are kept as they are.
    Row("visual.patch_embed.proj.weight", Role.CARRIED, "", "blind",
        Transform.CHANNELS_LAST, output="vision_tower.patch_embed.proj.weight"),
    Row("visual.*", Role.CARRIED, "", "blind", output="vision_tower.*"),
    Row("vision_tower.*", Role.CARRIED, "", "blind"),
)  # fmt: skip


def _in_mtp(row: Row) -> Row:
    """The same tensor of the MTP layer."""
    source, output, each = (n and f"mtp.{n}" for n in (row.source, row.output, row.each))
    return replace(row, source=source, output=output, each=each)


# Multi-token prediction: one full-attention layer between its own norms.
MTP_TABLE: tuple[Row, ...] = (
    Row("mtp.pre_fc_norm_embedding.weight", PLAIN, "H", transform=ADD_ONE),
    Row("mtp.pre_fc_norm_hidden.weight", PLAIN, "H", transform=ADD_ONE),
    # 8 bits, as the router: it is small, and every token goes through it.
    Row("mtp.fc.weight", ROUTER, "H 2*H"),
    *(
        _in_mtp(row)
        for row in TABLE
        if row.source.startswith("{layer}") and "linear" not in row.when.split()
    ),
    Row("mtp.norm.weight", PLAIN, "H", transform=ADD_ONE),
)


def walk_mtp(config: ModelConfig) -> Iterator[Row]:
    """The rows of a model's MTP layer; its layer number is 0."""
    facts = _facts(config, FULL)
    yield from (row for row in MTP_TABLE if set(row.when.split()) <= facts)


def walk(config: ModelConfig) -> Iterator[tuple[Row, int]]:
    """The rows of a model, each with the number of its layer or block, in output order."""
    depth = config.vision.depth if config.vision else 0
    for (per_layer, per_block), group in groupby(
        TABLE, lambda row: ("{layer}" in row.source, "{block}" in row.source)
    ):
        rows = [(row, set(row.when.split())) for row in group]
        numbers = range(config.num_hidden_layers) if per_layer else range(depth)
        for number in numbers if per_layer or per_block else (-1,):
            facts = _facts(config, config.layer_types[number] if per_layer else FULL)
            yield from ((row, number) for row, when in rows if when <= facts)


def filled(name: str, number: int, expert: int = 0) -> str:
    """A name of the table for one layer, block or expert."""
    return name.format(layer=f"layers.{number}.", block=number, expert=expert)


def shape_of(text: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Evaluate a shape such as `E 2*I H`: each dim is a sum of products of sizes and numbers."""

    def product(term: str) -> int:
        return math.prod(int(f) if f.isdigit() else sizes[f] for f in term.split("*"))

    return tuple(sum(map(product, dim.split("+"))) for dim in text.split())


def output_shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape after the transform."""
    if transform in (Transform.TAPS_FIRST, Transform.CHANNELS_LAST):
        return shape[0], *shape[2:], shape[1]
    return shape


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes of all tensors, of MTP layer and tower too; experts fused."""
    sizes = model_sizes(config)
    found = {}
    for row, layer in chain(walk(config), ((row, 0) for row in walk_mtp(config))):
        if row.shape:
            name = filled(row.source, layer)
            root = name.partition(".")[0]
            prefix = "model.language_model." if root in TRUNK else ""
            prefix = "model." if root == "visual" else prefix
            found[prefix + name] = shape_of(row.shape, sizes)
    return found
