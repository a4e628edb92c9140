"""One table from Hugging Face tensor names to MLX names; a checkpoint must fit it."""

# E experts, H hidden, I expert width

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from itertools import groupby
from typing import Any

from qwen35_mlx.config import FULL, LINEAR, ModelConfig
from qwen35_mlx.errors import CheckpointError
from qwen35_mlx.headers import SourceTensor

from .source import FP8, NUMPY_DTYPES, Segment

# The whole model and its text-only export name the same tensors differently.
TRUNKS = ("model.language_model.", "model.")
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


Shape = Callable[[ModelConfig], tuple[int, ...]]
Ranges = Callable[[ModelConfig], list[tuple[int, int]]]
Condition = Callable[[ModelConfig, int], bool]


def _every(config: ModelConfig, layer: int) -> bool:
    return True


@dataclass(frozen=True)
class Row:
    """A tensor of the source: its name, where it goes, what happens to it, its shape there.

    `{trunk}`, `{layer}`, `{expert}` are filled in; a final `*` stands for any rest. `each` is
    the name when every expert is stored by itself, `part` = (k, n) the k-th n-th of each expert;
    `ranges` are the rows that make the output, if not all of them do.
    """

    source: str
    output: str
    role: Role
    shape: Shape | None = None
    transform: Transform = Transform.KEEP
    when: Condition = _every
    each: str = ""
    part: tuple[int, int] = (0, 1)
    ranges: Ranges | None = None


def _layer(name: str, role: Role, shape: Shape, when: Condition, **more: Any) -> Row:
    output = more.pop("output", name)
    if each := more.pop("each", ""):
        more["each"] = "{trunk}layers.{layer}." + each
    prefix = "language_model.model.layers.{layer}."
    return Row("{trunk}layers.{layer}." + name, prefix + output, role, shape, when=when, **more)


def _linear(config: ModelConfig, layer: int) -> bool:
    return config.layer_types[layer] == LINEAR


def _apart(config: ModelConfig, layer: int) -> bool:
    return _linear(config, layer) and not config.fuses_linear_projections


def _fused(config: ModelConfig, layer: int) -> bool:
    return _linear(config, layer) and config.fuses_linear_projections


def _full(config: ModelConfig, layer: int) -> bool:
    return config.layer_types[layer] == FULL


def _dense(config: ModelConfig, layer: int) -> bool:
    return not config.is_moe


def _moe(config: ModelConfig, layer: int) -> bool:
    return config.is_moe


def _tied(config: ModelConfig, layer: int) -> bool:
    return config.tie_word_embeddings


def _untied(config: ModelConfig, layer: int) -> bool:
    return not config.tie_word_embeddings


def _qkvz(c: ModelConfig) -> tuple[int, ...]:
    return (c.conv_dim + c.value_dim, c.hidden_size)


def _ba(c: ModelConfig) -> tuple[int, ...]:
    return (2 * c.linear_num_value_heads, c.hidden_size)


def _by_head_group(*parts: int) -> Ranges:
    """Of [q | k | v | z] of one key head, then of the next: the rows of these parts, in turn."""

    def ranges(c: ModelConfig) -> list[tuple[int, int]]:
        values = c.value_dim // c.linear_num_key_heads
        widths = (c.linear_key_head_dim, c.linear_key_head_dim, values, values)
        return _pick(c.linear_num_key_heads, widths, parts)

    return ranges


def _by_value_head(part: int) -> Ranges:
    """Of [b | a] of the value heads of one key head, then of the next."""

    def ranges(c: ModelConfig) -> list[tuple[int, int]]:
        heads = c.linear_num_value_heads // c.linear_num_key_heads
        return _pick(c.linear_num_key_heads, (heads, heads), (part,))

    return ranges


def _pick(groups: int, widths: tuple[int, ...], parts: tuple[int, ...]) -> list[tuple[int, int]]:
    starts = [sum(widths[:part]) for part in parts]
    return [
        (group * sum(widths) + start, group * sum(widths) + start + widths[part])
        for part, start in zip(parts, starts, strict=True)
        for group in range(groups)
    ]


_PLAIN, _DECAY, _QUANTIZED, _ROUTER = Role.PLAIN, Role.DECAY, Role.QUANTIZED, Role.ROUTER
_ADD_ONE = Transform.ADD_ONE
_SHARED = "mlp.shared_expert."
_GATE_UP = "mlp.experts.gate_up_proj"

# fmt: off
TABLE: tuple[Row, ...] = (
    Row("{trunk}embed_tokens.weight", "language_model.model.embed_tokens.weight", _QUANTIZED,
        lambda c: (c.vocab_size, c.hidden_size)),
    _layer("input_layernorm.weight", _PLAIN, lambda c: (c.hidden_size,), _every,
           transform=_ADD_ONE),
    _layer("linear_attn.A_log", _DECAY, lambda c: (c.linear_num_value_heads,), _linear),
    _layer("linear_attn.dt_bias", _PLAIN, lambda c: (c.linear_num_value_heads,), _linear),
    _layer("linear_attn.conv1d.weight", _PLAIN,
           lambda c: (c.conv_dim, 1, c.linear_conv_kernel_dim), _linear,
           transform=Transform.TAPS_FIRST),
    _layer("linear_attn.in_proj_qkv.weight", _QUANTIZED,
           lambda c: (c.conv_dim, c.hidden_size), _apart),
    _layer("linear_attn.in_proj_z.weight", _QUANTIZED,
           lambda c: (c.value_dim, c.hidden_size), _apart),
    _layer("linear_attn.in_proj_a.weight", _PLAIN,
           lambda c: (c.linear_num_value_heads, c.hidden_size), _apart),
    _layer("linear_attn.in_proj_b.weight", _PLAIN,
           lambda c: (c.linear_num_value_heads, c.hidden_size), _apart),
    # Qwen3-Next: one projection for all, the rows of each key head together.
    _layer("linear_attn.in_proj_qkvz.weight", _QUANTIZED, _qkvz, _fused,
           output="linear_attn.in_proj_qkv.weight", ranges=_by_head_group(0, 1, 2)),
    _layer("linear_attn.in_proj_qkvz.weight", _QUANTIZED, _qkvz, _fused,
           output="linear_attn.in_proj_z.weight", ranges=_by_head_group(3)),
    _layer("linear_attn.in_proj_ba.weight", _PLAIN, _ba, _fused,
           output="linear_attn.in_proj_a.weight", ranges=_by_value_head(1)),
    _layer("linear_attn.in_proj_ba.weight", _PLAIN, _ba, _fused,
           output="linear_attn.in_proj_b.weight", ranges=_by_value_head(0)),
    # Not zero-centred, unlike every other norm of the trunk.
    _layer("linear_attn.norm.weight", _PLAIN, lambda c: (c.linear_value_head_dim,), _linear),
    _layer("linear_attn.out_proj.weight", _QUANTIZED,
           lambda c: (c.hidden_size, c.value_dim), _linear),
    # Twice the rows: query and output gate of each head.
    _layer("self_attn.q_proj.weight", _QUANTIZED,
           lambda c: (2 * c.num_attention_heads * c.head_dim, c.hidden_size), _full),
    _layer("self_attn.k_proj.weight", _QUANTIZED,
           lambda c: (c.num_key_value_heads * c.head_dim, c.hidden_size), _full),
    _layer("self_attn.v_proj.weight", _QUANTIZED,
           lambda c: (c.num_key_value_heads * c.head_dim, c.hidden_size), _full),
    _layer("self_attn.o_proj.weight", _QUANTIZED,
           lambda c: (c.hidden_size, c.num_attention_heads * c.head_dim), _full),
    _layer("self_attn.q_norm.weight", _PLAIN, lambda c: (c.head_dim,), _full,
           transform=_ADD_ONE),
    _layer("self_attn.k_norm.weight", _PLAIN, lambda c: (c.head_dim,), _full,
           transform=_ADD_ONE),
    _layer("post_attention_layernorm.weight", _PLAIN, lambda c: (c.hidden_size,), _every,
           transform=_ADD_ONE),
    _layer("mlp.gate_proj.weight", _QUANTIZED,
           lambda c: (c.intermediate_size, c.hidden_size), _dense),
    _layer("mlp.up_proj.weight", _QUANTIZED,
           lambda c: (c.intermediate_size, c.hidden_size), _dense),
    _layer("mlp.down_proj.weight", _QUANTIZED,
           lambda c: (c.hidden_size, c.intermediate_size), _dense),
    _layer("mlp.gate.weight", _ROUTER, lambda c: (c.num_experts, c.hidden_size), _moe),
    # Fused [E, 2I, H] with the gate first; for each output the source shape is of the fused form.
    _layer(_GATE_UP, _QUANTIZED,
           lambda c: (c.num_experts, 2 * c.moe_intermediate_size, c.hidden_size), _moe,
           output="mlp.switch_mlp.gate_proj.weight",
           each="mlp.experts.{expert}.gate_proj.weight", part=(0, 2)),
    _layer(_GATE_UP, _QUANTIZED,
           lambda c: (c.num_experts, 2 * c.moe_intermediate_size, c.hidden_size), _moe,
           output="mlp.switch_mlp.up_proj.weight",
           each="mlp.experts.{expert}.up_proj.weight", part=(1, 2)),
    _layer("mlp.experts.down_proj", _QUANTIZED,
           lambda c: (c.num_experts, c.hidden_size, c.moe_intermediate_size), _moe,
           output="mlp.switch_mlp.down_proj.weight",
           each="mlp.experts.{expert}.down_proj.weight"),
    _layer(_SHARED + "gate_proj.weight", _QUANTIZED,
           lambda c: (c.shared_expert_intermediate_size, c.hidden_size), _moe),
    _layer(_SHARED + "up_proj.weight", _QUANTIZED,
           lambda c: (c.shared_expert_intermediate_size, c.hidden_size), _moe),
    _layer(_SHARED + "down_proj.weight", _QUANTIZED,
           lambda c: (c.hidden_size, c.shared_expert_intermediate_size), _moe),
    _layer("mlp.shared_expert_gate.weight", _ROUTER, lambda c: (1, c.hidden_size), _moe),
    Row("{trunk}norm.weight", "language_model.model.norm.weight", _PLAIN,
        lambda c: (c.hidden_size,), _ADD_ONE),
    Row("lm_head.weight", "language_model.lm_head.weight", _QUANTIZED,
        lambda c: (c.vocab_size, c.hidden_size), when=_untied),
    Row("lm_head.weight", "", Role.DROPPED, when=_tied),
    # The norms of the MTP layers keep their zero-centred weights.
    Row("mtp.*", "mtp.*", Role.CARRIED),
    Row("model.visual.patch_embed.proj.weight", "vision_tower.patch_embed.proj.weight",
        Role.CARRIED, transform=Transform.CHANNELS_LAST),
    Row("model.visual.*", "vision_tower.*", Role.CARRIED),
)
# fmt: on


@dataclass(frozen=True)
class Match:
    """An output tensor before quantization: row segments of the source, one after the other."""

    name: str
    row: Row
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]


def resolve(
    config: ModelConfig,
    tensors: Mapping[str, SourceTensor],
    block: tuple[int, int] | None = None,
) -> list[Match]:
    """Match every tensor to the table, in layer order; `block` is that of FP8 scales.

    Missing, unknown and misshapen tensors are collected and raised as one CheckpointError.
    A dropped tensor has a match with an empty name.
    """
    return _Resolver(config, tensors, block).run()


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the text model as the source names it, experts fused, with its shape."""
    return {
        row.source.format(trunk=TRUNKS[0], layer=layer): row.shape(config)
        for row, layer in _walk(config)
        if row.shape
    }


def _walk(config: ModelConfig) -> Iterator[tuple[Row, int]]:
    """The rows that a model has, with the number of the layer, in the order of the output."""
    for per_layer, group in groupby(TABLE, lambda row: "{layer}" in row.source):
        rows = list(group)
        for layer in range(config.num_hidden_layers) if per_layer else (-1,):
            yield from ((row, layer) for row in rows if row.when(config, layer))


def precision(tensor: SourceTensor) -> str:
    """The dtype a tensor is read as: FP8 becomes bfloat16, which holds each of its numbers."""
    return "BF16" if tensor.dtype == FP8 else tensor.dtype


def fold(name: str) -> str:
    """The name with layer and expert numbers replaced by `*`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def fp8_block(config: Mapping[str, Any], names: Iterable[str]) -> tuple[int, int] | None:
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
    if not (isinstance(block, list) and len(block) == 2 and all(_positive(n) for n in block)):
        raise CheckpointError(
            "FP8 weights without a size of blocks",
            got=f"weight_block_size={block!r}",
            expected="two numbers, as [128, 128]",
            hint="convert from the bf16 checkpoint of the same model",
        )
    return block[0], block[1]


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class _Resolver:
    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, SourceTensor],
        block: tuple[int, int] | None,
    ):
        self.config, self.tensors, self.block = config, tensors, block
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
        if row.shape is None:
            yield from self._carried(row)
            return
        fill = {"trunk": self.trunk, "layer": layer}
        source, output = row.source.format(**fill), row.output.format(**fill)
        shape = row.shape(self.config)
        if row.each and source not in self.tensors:
            each = [row.each.format(**fill, expert=e) for e in range(shape[0])]
            if any(name in self.tensors for name in each):
                yield from self._stacked(row, output, shape, each)
                return
        if not (tensor := self._take(source, shape)):
            return
        k, n = row.part
        if row.ranges:
            ranges = row.ranges(self.config)
            shape = (sum(stop - start for start, stop in ranges), *shape[1:])
        elif n > 1:
            rows = shape[1] // n
            ranges = [((e * n + k) * rows, (e * n + k + 1) * rows) for e in range(shape[0])]
            shape = (shape[0], rows, *shape[2:])
        else:
            ranges = [(0, tensor.num_rows)]
        segments = tuple(self._segment(tensor, start, stop) for start, stop in ranges)
        yield Match(output, row, output_shape(row.transform, shape), segments)

    def _stacked(
        self, row: Row, output: str, shape: tuple[int, ...], each: list[str]
    ) -> Iterator[Match]:
        one = (shape[1] // row.part[1], *shape[2:])
        found = [self._take(name, one) for name in each]
        segments = tuple(self._segment(t, 0, t.num_rows) for t in found if t)
        for tensor in (segment.tensor for segment in segments):
            first = segments[0].tensor
            if precision(tensor) != precision(first):
                dtypes = f"{tensor.dtype}, expected {first.dtype} as the first"
                self.problems[tensor.name] = f"dtype    {dtypes}"
        if len(segments) == len(each):
            yield Match(output, row, (len(each), *one), segments)

    def _segment(self, tensor: SourceTensor, start: int, stop: int) -> Segment:
        scale = self.tensors[scale_name(tensor)] if tensor.dtype == FP8 else None
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
                output = row.output.rstrip("*") + name[len(stem) :]
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
        elif tensor.dtype == FP8 and self.block and _has_scales(tensor):
            return tensor if self._take_scale(tensor, self.block) else None
        elif tensor.dtype not in NUMPY_DTYPES:
            self.problems[name] = f"dtype    {tensor.dtype}, expected {', '.join(NUMPY_DTYPES)}"
        else:
            return tensor
        return None

    def _take_scale(self, tensor: SourceTensor, block: tuple[int, int]) -> SourceTensor | None:
        """The scales of an FP8 tensor: one for each block, those at the edges partial."""
        *leading, rows, columns = tensor.shape
        blocks = (*leading, -(-rows // block[0]), -(-columns // block[1]))
        return self._take(scale_name(tensor), blocks)


def _has_scales(tensor: SourceTensor) -> bool:
    return len(tensor.shape) > 1 and not tensor.name.endswith("_scale_inv")


def scale_name(tensor: SourceTensor) -> str:
    """Where the scales of an FP8 tensor are."""
    return f"{tensor.name}_scale_inv"


def output_shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape after the transform."""
    if transform is Transform.TAPS_FIRST:
        return shape[0], shape[2], shape[1]
    if transform is Transform.CHANNELS_LAST:
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
