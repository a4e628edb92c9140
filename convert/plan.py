"""Plans a conversion: the output of each tensor, from headers, config and settings alone."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen35_mlx.checkpoint.headers import ITEM_BYTES, SourceTensor
from qwen35_mlx.checkpoint.names import OF_EXPERTS, TOWER, fold, is_mtp
from qwen35_mlx.checkpoint.quantization import Quantization, common_quantization
from qwen35_mlx.checkpoint.resolver import Match, Resolved, Segment, precision
from qwen35_mlx.checkpoint.tensor_table import Role, Transform
from qwen35_mlx.config import ModelConfig
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.quant.affine import GROUP_SIZES, check_settings, quantized_shapes
from qwen35_mlx.quant.statistics import Calibration, Setting

from .hub import open_any
from .source import Source

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
DEFAULT_BITS, ROUTER_BITS = 4, 8
# Bits of the MTP layer at all bits of the trunk: 8 give no better drafts, 3 give worse ones.
MTP_BITS = 4
DEFAULT_METHOD = "minmax"
# Training that starts from "gptq", which is also used for matrices that are not trained.
DISTILL = "distill"
MAX_SHARD_BYTES = 5 * 10**9

# Bits, group size and method of one module.
MethodSetting = tuple[int, int, str]
# Module name to (bits, group_size), or to these and a method; None leaves the module unquantized.
Recipe = Callable[[str], Setting | MethodSetting | None]

# Order of the experts' matrices on disk: in stacks, or all matrices of an expert side by side.
STACKED, DISK = "stacked", "disk"
LAYOUTS = (STACKED, DISK)


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output, with the dtype in the spelling of safetensors.

    is_apart: a stack of experts is written as one tensor per expert.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_apart: bool = False

    @property
    def names(self) -> list[str]:
        """The names in the file."""
        if not self.is_apart:
            return [self.name]
        before, after = self.name.split(OF_EXPERTS)
        return [f"{before}.experts.{expert}.{after}" for expert in range(self.shape[0])]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Entry:
    """The weight of a module: its rows in the source, and its output tensors.

    A quantized weight has three output tensors: weight, scales and biases. `dtype` is that of the
    weight, or with `bits`, of scales and biases. Without a `method`, the rows are copied: a weight
    that is quantized in the source has separate entries for its scales and biases.
    """

    module: str
    role: Role
    transform: Transform
    segments: tuple[Segment, ...]
    shape: tuple[int, ...]
    dtype: str
    bits: int | None
    group_size: int | None
    method: str | None
    tensors: tuple[OutputTensor, ...]
    mode: str = "affine"

    @cached_property
    def num_rows(self) -> int:
        """The number of source rows in all segments."""
        return sum(segment.stop_row - segment.start_row for segment in self.segments)

    @property
    def belongs_to_weight(self) -> bool:
        """Whether these are copied scales or biases; they belong to the entry before."""
        ends = (".scales", ".biases")
        return self.role is not Role.CARRIED and self.module.endswith(ends)

    @property
    def num_parameters(self) -> int:
        return 0 if self.belongs_to_weight else math.prod(self.shape)

    @property
    def source_bytes(self) -> int:
        return sum(segment.nbytes for segment in self.segments)

    @property
    def output_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Shard:
    """One output file. The three tensors of a quantized module stay together."""

    file: str
    entries: tuple[Entry, ...]

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """Tensors in file order: separate experts, then by item size, so that all are aligned."""
        tensors = [tensor for entry in self.entries for tensor in entry.tensors]
        # The sort is stable: experts keep the order of their layers, and of gate, up and down.
        rank = {
            t: 0 if t.is_apart else ITEM_BYTES["U64"] + 1 - ITEM_BYTES[t.dtype] for t in tensors
        }
        return tuple(sorted(tensors, key=rank.__getitem__))


@dataclass(frozen=True)
class PlanRow:
    """One line of the printed plan: the same module of all layers, with their sums.

    The tensors of the vision tower share one line without a shape. So do those of the MTP layer,
    with the dtype and bits of the largest one. The dtype of a dropped tensor is "dropped".
    """

    name: str
    shape: tuple[int, ...]
    source_dtype: str
    dtype: str
    bits: int | None = None
    group_size: int | None = None
    count: int = 0
    num_parameters: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class Plan:
    """A planned conversion. Bytes and parameters include carried tensors, but not dropped ones."""

    source: Source
    config: ModelConfig
    # As requested: bits, group_size, dtype, recipe, method.
    settings: dict[str, Any]
    shards: tuple[Shard, ...]
    # Heads that are dropped, each with the embedding that it must equal.
    copies: tuple[tuple[SourceTensor, SourceTensor], ...]

    @property
    def entries(self) -> Iterator[Entry]:
        return (entry for shard in self.shards for entry in shard.entries)

    @property
    def text_entries(self) -> list[Entry]:
        """The entries of the text model, without the MTP layer and carried tensors."""
        return [e for e in self.entries if e.role is not Role.CARRIED and not is_mtp(e.module)]

    @property
    def source_bytes(self) -> int:
        return sum(entry.source_bytes for entry in self.entries)

    @property
    def output_bytes(self) -> int:
        return sum(entry.output_bytes for entry in self.entries)

    @property
    def text_bytes(self) -> int:
        return sum(entry.output_bytes for entry in self.text_entries)

    @property
    def tower_bytes(self) -> int:
        """Bytes of the vision tower if it can run, otherwise 0."""
        tower = [e.output_bytes for e in self.entries if e.module.startswith(TOWER)]
        return sum(tower) if self.config.vision else 0

    @property
    def mtp_bytes(self) -> int:
        """Bytes of the MTP layer if it can run, otherwise 0."""
        layer = [e.output_bytes for e in self.entries if is_mtp(e.module)]
        return sum(layer) if self.config.num_mtp_layers else 0

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the weights in memory when the model runs."""
        return self.text_bytes + self.mtp_bytes + self.tower_bytes

    @property
    def num_parameters(self) -> int:
        return sum(entry.num_parameters for entry in self.entries)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the text model, with scales and biases."""
        return 8 * self.text_bytes / sum(e.num_parameters for e in self.text_entries)

    @property
    def layout(self) -> str:
        """A digest of the text model's names and shapes; equal for all fine-tuned copies."""
        text = sorted((entry.module, entry.shape) for entry in self.text_entries)
        return hashlib.sha256(repr(text).encode()).hexdigest()[:16]

    def refuse_other(self, calibration: Calibration | None) -> None:
        """Raise Qwen35Error if the calibration is of another model."""
        if calibration is not None and calibration.layout != self.layout:
            raise Qwen35Error(
                "the calibration is of another model",
                got=calibration.source,
                expected=self.source.origin["source"],
                hint="omit it, or calibrate this model",
            )

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The `quantization` block of config.json; None if nothing is quantized."""
        bits, group_size = self.settings["bits"], self.settings["group_size"]
        if bits is None:
            return None
        default = Quantization(bits, group_size, self.settings.get("mode", "affine"))
        block: dict[str, Any] = default.as_config() | {"mode": default.mode}
        for entry in self.entries:
            if entry.bits is not None and entry.group_size is not None:
                own = Quantization(entry.bits, entry.group_size, entry.mode)
                if own != default:
                    block[entry.module] = own.as_config()
        return block

    def table(self) -> tuple[PlanRow, ...]:
        """The plan with layer numbers replaced by `*`, in output order; dropped tensors last."""
        rows: dict[PlanRow, PlanRow] = {}
        mtp = [entry for entry in self.entries if is_mtp(entry.module)]
        largest = max(mtp, key=lambda entry: entry.num_parameters, default=None)
        for entry in self.entries:
            if not entry.belongs_to_weight:
                name, shape, one = fold(entry.module), entry.shape, entry
                if largest and is_mtp(name):
                    one = largest
                if entry.role is Role.CARRIED or is_mtp(name):
                    name, shape = name.partition(".")[0] + ".*", ()
                stored = one.segments[0].tensor.dtype
                kind = PlanRow(name, shape, stored, one.dtype, one.bits, one.group_size)
            row = rows.get(kind, kind)
            rows[kind] = replace(
                row,
                count=row.count + (not entry.belongs_to_weight),
                num_parameters=row.num_parameters + entry.num_parameters,
                nbytes=row.nbytes + entry.output_bytes,
            )
        dropped = [PlanRow(t.name, t.shape, t.dtype, "dropped", count=1) for t, _ in self.copies]
        return (*rows.values(), *dropped)


def plan(
    source: str | Path | Source,
    *,
    revision: str | None = None,
    recipe: Recipe | None = None,
    bits: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    method: str = DEFAULT_METHOD,
    experts_layout: str = STACKED,
) -> Plan:
    """Plan the conversion of `source`, a folder or a hub id; reads only config and headers.

    bits, dtype: without both, 4 bits, and a source that MLX quantized is copied. With `dtype`
    alone, unquantized. With both, quantized, with scales and all other tensors in `dtype`.
    recipe: the setting of each module. It may leave routers and the MTP layer unquantized, but not
    change their bits, 8 and 4. method: one of `quantize`, or "distill"; "gptq", and importance for
    "search", need a calibration in `convert`. experts_layout: "disk" stores the matrices of each
    expert side by side, to read them at once; mlx-lm does not load it.
    Raises Qwen35Error for a source or settings that cannot be used.
    """
    asked = [bits, dtype, recipe]
    if bits is None and (recipe is not None or dtype is None):
        bits = DEFAULT_BITS
    quantizer = "gptq" if method == DISTILL else method
    check_settings(DEFAULT_BITS if bits is None else bits, group_size, quantizer)
    if dtype is not None and dtype not in DTYPES:
        raise Qwen35Error(
            f"dtype={dtype!r} is not supported", got=repr(dtype), expected=", ".join(DTYPES)
        )
    opened = open_any(source, revision)
    found = opened.resolved
    if any(match.quantization for match in found.text_matches):
        return _laid_out(_copy(opened, found, *asked), experts_layout)

    def setting_of(match: Match) -> MethodSetting | None:
        module, role = match.module, match.row.role
        # The tower and the MTP layer may be quantized even if the text model is not.
        if role not in (Role.QUANTIZED, Role.ROUTER) or bits is None or match.quantization:
            return None
        setting = (bits, group_size) if recipe is None else recipe(module)
        if setting is None:
            return None
        # Without a method in the recipe, that of the conversion.
        module_bits, module_group_size, module_method = (*setting, quantizer)[:3]
        check_settings(module_bits, module_group_size, module_method, where=module)
        if is_mtp(module):
            module_bits = MTP_BITS
            if match.shape[-1] % module_group_size:
                module_group_size = GROUP_SIZES[0]
        return ROUTER_BITS if role is Role.ROUTER else module_bits, module_group_size, module_method

    entries = [e for match in found.matches for e in _entries(match, setting_of(match), dtype)]
    _check_groups(entries)
    settings = {
        "bits": bits,
        "group_size": group_size,
        "dtype": dtype,
        "recipe": None if recipe is None else getattr(recipe, "__name__", type(recipe).__name__),
        "method": None if bits is None else method,
    }
    planned = Plan(opened, found.config, settings, _shards(entries), tuple(found.copies))
    return _laid_out(planned, experts_layout)


def _laid_out(planned: Plan, layout: str) -> Plan:
    """The plan with the experts in this layout; those of the MTP layer stay in stacks."""
    if layout not in LAYOUTS or (layout == DISK and not planned.config.is_moe):
        raise Qwen35Error(
            f"experts_layout={layout!r} is not possible",
            got="a model without experts" if layout in LAYOUTS else repr(layout),
            expected="a model with experts" if layout in LAYOUTS else ", ".join(LAYOUTS),
        )
    if layout == STACKED:
        return planned
    entries = [
        replace(entry, tensors=tuple(replace(t, is_apart=True) for t in entry.tensors))
        if OF_EXPERTS in entry.module and not is_mtp(entry.module)
        else entry
        for entry in planned.entries
    ]
    settings = {**planned.settings, "experts_layout": layout}
    return replace(planned, settings=settings, shards=_shards(entries))


def _copy(source: Source, found: Resolved, bits: object, dtype: object, recipe: object) -> Plan:
    """The plan for a source that MLX quantized: changes names and order, but no values."""
    common = common_quantization(found.quantizations.values(), source.config)
    if bits not in (None, common.bits) or dtype is not None or recipe is not None:
        raise Qwen35Error(
            "the source is already quantized: its weights cannot be quantized again",
            got=f"bits={bits}, dtype={dtype}, recipe={'given' if recipe else None}"
            f" for weights with {common.bits} bits",
            expected="no bits, dtype or recipe, which keeps the quantization",
            hint="for other bits, convert the bf16 checkpoint of the model; this one runs without"
            " a conversion",
        )
    entries = [entry for match in found.matches for entry in _entries(match)]
    settings = {**common._asdict(), "dtype": None, "recipe": None, "method": None}
    return Plan(source, found.config, settings, _shards(entries), tuple(found.copies))


def _entries(
    match: Match, setting: MethodSetting | None = None, dtype: str | None = None
) -> list[Entry]:
    """One entry for a parameter; if it is quantized in the source, a copy of each tensor."""
    kind = match.quantization
    if kind is None:
        return [_entry(match, setting, dtype)]
    entries = []
    for part in match.parts:
        dtype, is_weight = part.segments[0].tensor.dtype, part.name == match.name
        entries.append(
            Entry(
                match.module if is_weight else part.name,
                match.row.role,
                match.transform,
                part.segments,
                match.shape if is_weight else part.shape,
                dtype,
                kind.bits if is_weight else None,
                kind.group_size if is_weight else None,
                None,
                (OutputTensor(part.name, dtype, part.shape),),
                kind.mode,
            )
        )
    return entries


def _entry(match: Match, setting: MethodSetting | None, dtype: str | None) -> Entry:
    """The entry of a parameter that is not quantized in the source."""
    role, shape, segments = match.row.role, match.shape, match.segments
    module, stored = match.module, precision(segments[0].tensor)
    keeps = role is Role.CARRIED or (role is Role.DECAY and stored == "F32")
    code = stored if dtype is None or keeps else DTYPES[dtype]
    bits, group_size, method = setting or (None, None, None)
    tensors = [OutputTensor(match.name, code, shape)]
    if bits and group_size:
        packed, scales = quantized_shapes(shape, bits, group_size)
        tensors = [OutputTensor(match.name, "U32", packed)]
        tensors += [OutputTensor(f"{module}.{part}", code, scales) for part in ("scales", "biases")]
    return Entry(
        module, role, match.transform, segments, shape, code, bits, group_size, method,
        tuple(tensors),
    )  # fmt: skip


def _check_groups(entries: list[Entry]) -> None:
    """Raise Qwen35Error if a quantized row is not a whole number of groups."""
    quantized = [(fold(e.module), e.shape[-1], e.group_size) for e in entries if e.group_size]
    wrong = {name: (inputs, g) for name, inputs, g in quantized if inputs % g}
    if not wrong:
        return
    fitting = [g for g in GROUP_SIZES if not any(inputs % g for _, inputs, _ in quantized)]
    _, group_size = next(iter(wrong.values()))
    raise Qwen35Error(
        f"group_size={group_size} does not divide the inputs of {len(wrong)} kinds of weights",
        got="".join(f"\n    {name}: {inputs} inputs" for name, (inputs, _) in wrong.items()),
        expected=f"group_size {' or '.join(map(str, fitting))}" if fitting else "multiples of 32",
        hint="" if fitting else "no group size divides all of them: convert with dtype alone",
    )


def _shards(entries: list[Entry]) -> tuple[Shard, ...]:
    """Split entries into files of up to MAX_SHARD_BYTES, or of one larger entry, in order."""
    groups: list[list[Entry]] = []
    filled = MAX_SHARD_BYTES
    experts = ""
    for entry in entries:
        # Matrices that lie side by side must be in one file.
        before, experts = experts, entry.module.partition(OF_EXPERTS)[0]
        stays = entry.belongs_to_weight or (entry.tensors[0].is_apart and experts == before)
        if filled + entry.output_bytes > MAX_SHARD_BYTES and not stays:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.output_bytes
    if len(groups) == 1:
        return (Shard("model.safetensors", tuple(groups[0])),)
    return tuple(
        Shard(f"model-{i:05}-of-{len(groups):05}.safetensors", tuple(group))
        for i, group in enumerate(groups, 1)
    )
