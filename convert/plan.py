"""What a conversion will do, tensor by tensor: a pure function of headers, config and settings."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen35_mlx.config import ModelConfig
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.headers import ITEM_BYTES, SourceTensor
from qwen35_mlx.names import fold
from qwen35_mlx.quant.affine import GROUP_SIZES, check_method, check_settings, quantized_shapes
from qwen35_mlx.quantization import Quantization, common_quantization
from qwen35_mlx.resolver import Match, Resolved, Segment, precision, resolve
from qwen35_mlx.tensor_table import Role, Transform

from .hub import open_any
from .source import Source

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
DEFAULT_BITS, ROUTER_BITS = 4, 8
DEFAULT_METHOD = "minmax"
MAX_SHARD_BYTES = 5 * 10**9

# Module name to (bits, group_size) or (bits, group_size, method); None leaves it unquantized.
Choice = tuple[int, int] | tuple[int, int, str]
Recipe = Callable[[str], Choice | None]


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output; `dtype` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Entry:
    """One step: row segments in, one tensor out, or three (weight, scales, biases) if quantized.

    `dtype` is that of the weight, or of its scales and biases when `bits` is set. Weights that the
    source holds quantized have no `method`: their rows are copied, those of scales and biases by
    entries of their own.
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
        """Rows of the source, all segments together."""
        return sum(segment.stop_row - segment.start_row for segment in self.segments)

    @property
    def belongs_to_weight(self) -> bool:
        """Whether it is copied scales or biases, and goes with the entry before."""
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
    """One output file; the three tensors of a quantized module never part."""

    file: str
    entries: tuple[Entry, ...]

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """Tensors as they lie in the file: wide items first keeps every tensor aligned."""
        tensors = [tensor for entry in self.entries for tensor in entry.tensors]
        return tuple(sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype]))


@dataclass(frozen=True)
class PlanRow:
    """One line of the printed plan: like modules of all layers together.

    Carried tensors are summed up in one line, without shape. What is dropped has that for a dtype.
    """

    name: str
    shape: tuple[int, ...]
    source_dtype: str
    dtype: str
    bits: int | None = None
    group_size: int | None = None
    count: int = 1
    num_parameters: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class Plan:
    """The whole conversion. Bytes and parameters include carried tensors, but not dropped ones."""

    source: Source
    config: ModelConfig
    # What the conversion was asked for: bits, group_size, dtype, recipe, method.
    settings: dict[str, Any]
    shards: tuple[Shard, ...]
    # Heads that are not written, each with the part of the embedding that it must equal.
    copies: tuple[tuple[SourceTensor, SourceTensor], ...]

    @property
    def entries(self) -> Iterator[Entry]:
        return (entry for shard in self.shards for entry in shard.entries)

    @property
    def text_entries(self) -> list[Entry]:
        """What is loaded to run: all but what is carried along."""
        return [entry for entry in self.entries if entry.role is not Role.CARRIED]

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
    def num_parameters(self) -> int:
        return sum(entry.num_parameters for entry in self.entries)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the text model per parameter, scales and biases counted."""
        return 8 * self.text_bytes / sum(e.num_parameters for e in self.text_entries)

    @property
    def layout(self) -> str:
        """Digest of names and shapes of the text model: the same for its fine-tuned copies."""
        text = sorted((entry.module, entry.shape) for entry in self.text_entries)
        return hashlib.sha256(repr(text).encode()).hexdigest()[:16]

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The `quantization` block of config.json; None when nothing is quantized."""
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
        """The plan with layers folded to `*`, in the order of the work; dropped tensors last."""
        folded: dict[PlanRow, list[Entry]] = {}
        row = PlanRow("", (), "", "")
        for entry in self.entries:
            if not entry.belongs_to_weight:
                name, shape = fold(entry.module), entry.shape
                if entry.role is Role.CARRIED:
                    name, shape = name.partition(".")[0] + ".*", ()
                stored = entry.segments[0].tensor.dtype
                row = PlanRow(name, shape, stored, entry.dtype, entry.bits, entry.group_size)
            folded.setdefault(row, []).append(entry)
        rows = [
            replace(
                row,
                count=sum(not entry.belongs_to_weight for entry in group),
                num_parameters=sum(entry.num_parameters for entry in group),
                nbytes=sum(entry.output_bytes for entry in group),
            )
            for row, group in folded.items()
        ]
        rows += [PlanRow(t.name, t.shape, t.dtype, "dropped") for t, _ in self.copies]
        return tuple(rows)


def plan(
    source: str | Path | Source,
    *,
    revision: str | None = None,
    recipe: Recipe | None = None,
    bits: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    method: str = DEFAULT_METHOD,
) -> Plan:
    """Plan the conversion of `source`, a folder or a hub id; reads config and headers only.

    Without `bits` and `dtype`: 4 bits; what MLX quantized is kept as it is. `dtype` alone:
    unquantized. Both: quantized, with scales and all else in `dtype`. `recipe` decides module by
    module; routers stay at 8 bits or whole. `method` is one of `quantize`'s; "gptq" and weighed
    "search" want a calibration in `convert`.
    """
    asked = [bits, dtype, recipe]
    if bits is None and (recipe is not None or dtype is None):
        bits = DEFAULT_BITS
    check_settings(DEFAULT_BITS if bits is None else bits, group_size)
    check_method(method)
    if dtype is not None and dtype not in DTYPES:
        raise Qwen35Error(
            f"dtype={dtype!r} is not supported", got=repr(dtype), expected=", ".join(DTYPES)
        )
    opened = open_any(source, revision)
    found = resolve(opened.config, opened.tensors)
    if found.quantizations:
        return _copy(opened, found, *asked)

    def chosen(module: str) -> tuple[int, int, str] | None:
        if recipe is None:
            return None if bits is None else (bits, group_size, method)
        answer = recipe(module)
        if answer is None:
            return None
        check_settings(answer[0], answer[1], where=module)
        own = answer[2] if len(answer) > 2 else method
        check_method(own)
        return answer[0], answer[1], own

    entries = [_entry(match, chosen, dtype) for match in found.matches]
    _check_groups(entries)
    settings = {
        "bits": bits,
        "group_size": group_size,
        "dtype": dtype,
        "recipe": None if recipe is None else getattr(recipe, "__name__", type(recipe).__name__),
        "method": None if bits is None else method,
    }
    return Plan(opened, found.config, settings, _shards(entries), tuple(found.copies))


def _copy(source: Source, found: Resolved, bits: object, dtype: object, recipe: object) -> Plan:
    """The plan for a source that MLX quantized: other names and rows, the same numbers."""
    common = common_quantization(found.quantizations.values(), source.config)
    if bits not in (None, common.bits) or dtype is not None or recipe is not None:
        raise Qwen35Error(
            "the source is quantized already: its weights cannot be quantized again",
            got=f"bits={bits}, dtype={dtype}, recipe={'given' if recipe else None}"
            f" for weights of {common.bits} bits",
            expected="neither bits nor dtype nor recipe: then its own are kept",
            hint="for other bits convert from the bf16 checkpoint of the same model; this one runs"
            " as it is",
        )
    entries = [entry for match in found.matches for entry in _copied(match)]
    settings = {**common._asdict(), "dtype": None, "recipe": None, "method": None}
    return Plan(source, found.config, settings, _shards(entries), tuple(found.copies))


def _copied(match: Match) -> list[Entry]:
    """An entry for each tensor of a parameter, as stored."""
    kind = match.quantization
    if kind is None:
        return [_entry(match, lambda module: None, None)]
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


def _entry(
    match: Match, chosen: Callable[[str], tuple[int, int, str] | None], dtype: str | None
) -> Entry:
    role, name, stored = match.row.role, match.name, precision(match.segments[0].tensor)
    module = name.removesuffix(".weight")
    keeps = role is Role.CARRIED or (role is Role.DECAY and stored == "F32")
    code = stored if dtype is None or keeps else DTYPES[dtype]
    settings = chosen(module) if role in (Role.QUANTIZED, Role.ROUTER) else None
    if settings is None:
        bits = group_size = method = None
        tensors = [OutputTensor(name, code, match.shape)]
    else:
        bits, group_size, method = settings
        bits = ROUTER_BITS if role is Role.ROUTER else bits
        packed, scales = quantized_shapes(match.shape, bits, group_size)
        tensors = [
            OutputTensor(name, "U32", packed),
            OutputTensor(f"{module}.scales", code, scales),
            OutputTensor(f"{module}.biases", code, scales),
        ]
    return Entry(
        module,
        role,
        match.transform,
        match.segments,
        match.shape,
        code,
        bits,
        group_size,
        method,
        tuple(tensors),
    )


def _check_groups(entries: list[Entry]) -> None:
    """Every quantized row must be a whole number of groups."""
    wrong: dict[str, Entry] = {}
    for entry in entries:
        if entry.group_size is not None and entry.shape[-1] % entry.group_size:
            wrong.setdefault(fold(entry.module), entry)
    if not wrong:
        return
    fitting = [g for g in GROUP_SIZES if not any(e.shape[-1] % g for e in entries if e.group_size)]
    lines = [f"\n    {name}: {entry.shape[-1]} inputs" for name, entry in wrong.items()]
    raise Qwen35Error(
        f"group_size={next(iter(wrong.values())).group_size} does not divide the inputs of"
        f" {len(wrong)} kinds of weights",
        got="".join(lines),
        expected=f"group_size {' or '.join(map(str, fitting))}" if fitting else "multiples of 32",
        hint="" if fitting else "no group size divides them all: convert with dtype alone",
    )


def _shards(entries: list[Entry]) -> tuple[Shard, ...]:
    """Fill files in order; an entry larger than the limit has a file of its own."""
    groups: list[list[Entry]] = []
    filled = MAX_SHARD_BYTES
    for entry in entries:
        if filled + entry.output_bytes > MAX_SHARD_BYTES and not entry.belongs_to_weight:
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
