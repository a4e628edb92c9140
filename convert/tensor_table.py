"""One table from Hugging Face tensor names to MLX names; a checkpoint must fit it."""

# H hidden, F feed-forward width; Hq/Hkv heads of attention, of dim D; Hk/Hv key/value heads of
# linear attention, of dims Dk/Dv, R of the latter to one of the former, C channels of the
# convolution; E experts of width I, S width of the shared one.

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from itertools import accumulate, groupby
from typing import Any

from qwen35_mlx.config import LINEAR, ModelConfig
from qwen35_mlx.errors import CheckpointError
from qwen35_mlx.headers import SourceTensor

from .source import FP8, NUMPY_DTYPES, Block, Segment

Tensors = Mapping[str, SourceTensor]

# The whole model and its text-only export name the same tensors differently.
TRUNKS = ("model.language_model.", "model.")
OUTPUT_TRUNK = "language_model.model."
SCALE = "_scale_inv"  # ends the name of the scales of an FP8 tensor
MAX_PROBLEM_LINES = 20


class Role(Enum):
    """What may become of a tensor: who is cast, who is quantized."""

    PLAIN = auto()  # cast to the chosen dtype
    DECAY = auto()  # as PLAIN, but float32 stays float32: exp(A_log) is taken
    QUANTIZED = auto()
    ROUTER = auto()  # quantized at 8 bits: fewer flip the choice of experts
    CARRIED = auto()  # not part of the text model: bytes and precision of the source
    DROPPED = auto()


class Transform(Enum):
    """The one change of values or layout between source and output."""

    KEEP = auto()
    ADD_ONE = auto()  # HF multiplies by 1 + w, MLX by w
    TAPS_FIRST = auto()  # conv1d [C, 1, K] -> [C, K, 1]
    CHANNELS_LAST = auto()  # patch embedding [O, C, T, H, W] -> [O, T, H, W, C]


@dataclass(frozen=True)
class Row:
    """A tensor of the source, what happens to it, its shape there, who has it, where it goes.

    `{trunk}`, `{layer}`, `{expert}` are filled in, for the source and for the output; a final `*`
    stands for any rest, of any shape. `shape` is in terms of `_sizes`, `when` of `_facts`. `output`
    is named if it is another than `source`, `each` if every expert may be stored by itself.
    `split` = (groups, widths): the rows are groups of parts, and the output is some `parts` of all.
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


def _sizes(c: ModelConfig) -> dict[str, int]:
    return {
        "vocab": c.vocab_size,
        "H": c.hidden_size,
        "F": c.intermediate_size,
        "Hq": c.num_attention_heads,
        "Hkv": c.num_key_value_heads,
        "D": c.head_dim,
        "Hk": c.linear_num_key_heads,
        "Hv": c.linear_num_value_heads,
        "Dk": c.linear_key_head_dim,
        "Dv": c.linear_value_head_dim,
        "R": c.linear_num_value_heads // c.linear_num_key_heads,
        "C": c.conv_dim,
        "taps": c.linear_conv_kernel_dim,
        "E": c.num_experts,
        "I": c.moe_intermediate_size,
        "S": c.shared_expert_intermediate_size,
    }


def _facts(config: ModelConfig, layer: int) -> set[str]:
    return {
        "linear" if config.layer_types[layer] == LINEAR else "full",
        "fused" if config.fuses_linear_projections else "apart",
        "moe" if config.is_moe else "dense",
        "tied" if config.tie_word_embeddings else "untied",
    }


PLAIN, DECAY, QUANTIZED, ROUTER = Role.PLAIN, Role.DECAY, Role.QUANTIZED, Role.ROUTER
ADD_ONE = Transform.ADD_ONE
# Qwen3-Next: one projection for all, the rows of each key head together.
QKVZ, BA = ("Hk", "Dk Dk R*Dv R*Dv"), ("Hk", "R R")
# [E, 2I, H] with the gate first.
GATE_UP = ("E", "I I")

TABLE: tuple[Row, ...] = (
    Row("{trunk}embed_tokens.weight", QUANTIZED, "vocab H"),
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
    Row("{trunk}norm.weight", PLAIN, "H", transform=ADD_ONE),
    Row("lm_head.weight", QUANTIZED, "vocab H", "untied", output="language_model.lm_head.weight"),
    Row("lm_head.weight", Role.DROPPED, when="tied"),
    # The norms of the MTP layers keep their zero-centred weights.
    Row("mtp.*", Role.CARRIED),
    Row("model.visual.patch_embed.proj.weight", Role.CARRIED, transform=Transform.CHANNELS_LAST,
        output="vision_tower.patch_embed.proj.weight"),
    Row("model.visual.*", Role.CARRIED, output="vision_tower.*"),
)  # fmt: skip


@dataclass(frozen=True)
class Match:
    """An output tensor before quantization: row segments of the source, one after the other."""

    name: str
    row: Row
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]


def resolve(config: ModelConfig, tensors: Tensors, block: Block | None = None) -> list[Match]:
    """Match every tensor to the table, in layer order; `block` is that of FP8 scales.

    Missing, unknown and misshapen tensors are collected and raised as one CheckpointError.
    A dropped tensor has a match with an empty name.
    """
    return _Resolver(config, tensors, block).run()


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the text model as the source names it, experts fused, with its shape."""
    sizes = _sizes(config)
    return {
        _filled(row.source, TRUNKS[0], layer): _shape(row.shape, sizes)
        for row, layer in _walk(config)
        if row.shape
    }


def _walk(config: ModelConfig) -> Iterator[tuple[Row, int]]:
    """The rows that a model has, with the number of the layer, in the order of the output."""
    for per_layer, group in groupby(TABLE, lambda row: "{layer}" in row.source):
        rows = [(row, set(row.when.split())) for row in group]
        for layer in range(config.num_hidden_layers) if per_layer else (-1,):
            facts = _facts(config, layer)
            yield from ((row, layer) for row, when in rows if when <= facts)


def _filled(name: str, trunk: str, layer: int, expert: int = 0) -> str:
    return name.format(trunk=trunk, layer=f"{trunk}layers.{layer}.", expert=expert)


def _shape(text: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """`E 2*I H`: each a sum of products of sizes and numbers."""

    def product(term: str) -> int:
        return math.prod(int(f) if f.isdigit() else sizes[f] for f in term.split("*"))

    return tuple(sum(map(product, dim.split("+"))) for dim in text.split())


def precision(tensor: SourceTensor) -> str:
    """The dtype a tensor is read as: FP8 becomes bfloat16, which holds each of its numbers."""
    return "BF16" if tensor.dtype == FP8 else tensor.dtype


def fold(name: str) -> str:
    """The name with layer and expert numbers replaced by `*`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def fp8_block(config: Mapping[str, Any], names: Iterable[str]) -> Block | None:
    """Rows and columns that share a scale in an FP8 checkpoint; None if it is not FP8.

    Refuses what is converted already, and what is quantized in a format this does not read.
    """
    names = list(names)
    text = config.get("text_config")
    converted = next((n for n in names if n.startswith(("language_model.", "vision_tower."))), "")
    if "quantization" in config or "qwen35_mlx" in config or converted:
        raise CheckpointError(
            "the source is in MLX format already",
            got=f"tensor {converted}" if converted else "an MLX block in config.json",
            expected="a Hugging Face checkpoint",
            hint="run it as it is, or convert from the original bf16 checkpoint",
        )
    settings = config.get("quantization_config")
    if isinstance(text, Mapping):
        settings = settings or text.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    foreign = ("_scale", ".qweight") if method == "fp8" else ("_scale_inv", "_scale", ".qweight")
    scaled = next((n for n in names if n.endswith(foreign)), "")
    if scaled or (settings and method != "fp8"):
        raise CheckpointError(
            "the source is quantized",
            got=f"tensor {scaled}" if scaled else f"quantization_config of {method}",
            expected="bf16, fp16, fp32 or block-wise FP8 weights",
            hint="convert from the bf16 checkpoint of the same model",
        )
    if not settings:
        return None
    block = settings.get("weight_block_size")
    whole = isinstance(block, list) and all(type(n) is int and n > 0 for n in block)
    if not whole or len(block) != 2:
        raise CheckpointError(
            "FP8 weights without a size of blocks",
            got=f"weight_block_size={block!r}",
            expected="two numbers, as [128, 128]",
            hint="convert from the bf16 checkpoint of the same model",
        )
    return block[0], block[1]


class _Resolver:
    def __init__(self, config: ModelConfig, tensors: Tensors, block: Block | None):
        self.config, self.tensors, self.block = config, tensors, block
        self.sizes = _sizes(config)
        self.trunk = next((t for t in TRUNKS if f"{t}embed_tokens.weight" in tensors), TRUNKS[0])
        self.used: set[str] = set()
        # Tensor name to complaint: one tensor may feed two outputs, but is reported once.
        self.problems: dict[str, str] = {}

    def run(self) -> list[Match]:
        matches = [match for row, layer in _walk(self.config) for match in self._match(row, layer)]
        self.problems |= {n: "unknown" for n in self.tensors if n not in self.used}
        if self.problems:
            raise _problem_error(self.problems)
        return matches

    def _match(self, row: Row, layer: int) -> Iterator[Match]:
        if not row.shape:
            yield from self._carried(row)
            return
        source = _filled(row.source, self.trunk, layer)
        name = _filled(row.output or row.source, OUTPUT_TRUNK, layer)
        shape = kept = _shape(row.shape, self.sizes)
        ranges = [(0, math.prod(shape[:-1]))]
        if row.split:
            ranges = self._ranges(*row.split, row.parts)
            num_rows = sum(stop - start for start, stop in ranges)
            kept = (*shape[:-2], num_rows // math.prod(shape[:-2]), shape[-1])
        if row.each and source not in self.tensors:
            each = [_filled(row.each, self.trunk, layer, e) for e in range(shape[0])]
            if any(name in self.tensors for name in each):
                yield from self._stacked(row, name, kept, each)
                return
        if tensor := self._take(source, shape):
            segments = tuple(self._segment(tensor, start, stop) for start, stop in ranges)
            yield Match(name, row, output_shape(row.transform, kept), segments)

    def _ranges(self, groups: str, widths: str, parts: tuple[int, ...]) -> list[tuple[int, int]]:
        *starts, width = accumulate(_shape(widths, self.sizes), initial=0)
        ends = [*starts[1:], width]
        return [
            (group * width + starts[part], group * width + ends[part])
            for part in parts
            for group in range(self.sizes[groups])
        ]

    def _stacked(
        self, row: Row, name: str, shape: tuple[int, ...], each: list[str]
    ) -> Iterator[Match]:
        found = [self._take(one, shape[1:]) for one in each]
        segments = tuple(self._segment(t, 0, t.num_rows) for t in found if t)
        for tensor in (segment.tensor for segment in segments):
            first = segments[0].tensor
            if precision(tensor) != precision(first):
                dtypes = f"{tensor.dtype}, expected {first.dtype} as the first"
                self.problems[tensor.name] = f"dtype    {dtypes}"
        if len(segments) == len(each):
            yield Match(name, row, shape, segments)

    def _segment(self, tensor: SourceTensor, start: int, stop: int) -> Segment:
        scale = self.tensors[tensor.name + SCALE] if tensor.dtype == FP8 else None
        return Segment(tensor, start, stop, scale, self.block)

    def _carried(self, row: Row) -> Iterator[Match]:
        """Tensors whose names the config does not fix: whatever is there, each only once."""
        stem = row.source.rstrip("*")
        names = [n for n in self.tensors if n == row.source or (n != stem and n.startswith(stem))]
        for name in sorted(set(names) - self.used, key=_natural):
            if name in self.used:
                # The scale of the tensor before.
                continue
            if row.role is Role.DROPPED:
                self.used.add(name)
                dropped = self.tensors[name]
                yield Match("", row, dropped.shape, (Segment(dropped, 0, dropped.num_rows),))
            elif tensor := self._take(name):
                if row.transform is Transform.CHANNELS_LAST and len(tensor.shape) != 5:
                    self.problems[name] = f"shape    {list(tensor.shape)}, expected 5 dims"
                    continue
                shape = output_shape(row.transform, tensor.shape)
                output = (row.output or row.source).rstrip("*") + name[len(stem) :]
                yield Match(output, row, shape, (self._segment(tensor, 0, tensor.num_rows),))

    def _take(self, name: str, shape: tuple[int, ...] | None = None) -> SourceTensor | None:
        """The tensor of that name if it is there, float and of that shape; else a problem."""
        tensor = self.tensors.get(name)
        if tensor is None:
            self.problems[name] = "missing"
            return None
        self.used.add(name)
        if shape is not None and tensor.shape != shape:
            self.problems[name] = f"shape    {list(tensor.shape)}, expected {list(shape)}"
        elif tensor.dtype == FP8 and self.block and tensor.shape[1:] and not name.endswith(SCALE):
            # One scale for each block, those at the edges partial.
            *leading, rows, columns = tensor.shape
            blocks = (*leading, -(-rows // self.block[0]), -(-columns // self.block[1]))
            return tensor if self._take(tensor.name + SCALE, blocks) else None
        elif tensor.dtype not in NUMPY_DTYPES:
            self.problems[name] = f"dtype    {tensor.dtype}, expected {', '.join(NUMPY_DTYPES)}"
        else:
            return tensor
        return None


def output_shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape after the transform."""
    if transform in (Transform.TAPS_FIRST, Transform.CHANNELS_LAST):
        return shape[0], *shape[2:], shape[1]
    return shape


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]


def _problem_error(problems: Mapping[str, str]) -> CheckpointError:
    folded: dict[tuple[str, str], list[str]] = {}
    for name, problem in problems.items():
        folded.setdefault((problem, fold(name)), []).append(name)
    lines = []
    for (problem, pattern), names in sorted(folded.items()):
        kind, _, detail = problem.partition("    ")
        shown = names[0] if len(names) == 1 else f"{pattern} ({len(names)} tensors)"
        lines.append(f"\n    {kind:8} {shown}{detail and ': '}{detail}")
    if len(lines) > MAX_PROBLEM_LINES:
        lines[MAX_PROBLEM_LINES:] = [f"\n    and {len(lines) - MAX_PROBLEM_LINES} more kinds"]
    return CheckpointError(
        f"the weights do not fit config.json: {len(problems)} tensors are wrong",
        got="".join(lines),
        expected="exactly the tensors that config.json calls for",
        hint="config.json and weights of one and the same checkpoint?",
    )
