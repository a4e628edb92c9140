"""Match the tensors of a checkpoint, from any program, to the parameters of the model."""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, zip_longest
from pathlib import Path
from typing import Any

from ..config import ModelConfig, VisionConfig
from ..errors import CheckpointError
from . import formats, tensor_table
from .formats import SCALE, Block
from .headers import FLOATS, FP8, SourceTensor, some
from .names import TOWER, TRUNK, bare, by_bare_name, fold, is_mtp, is_of_tower, natural, output_name
from .quantization import MODES, Claims, Quantization, infer
from .tensor_table import Role, Row, Transform, filled, output_shape

log = logging.getLogger(__name__)

MAX_PROBLEM_LINES = 20


@dataclass(frozen=True)
class Segment:
    """Rows `start_row` to `stop_row` of one source tensor; FP8 has a scale for each `block`."""

    tensor: SourceTensor
    start_row: int
    stop_row: int
    scale: SourceTensor | None = None
    block: Block | None = None

    @property
    def nbytes(self) -> int:
        return (self.stop_row - self.start_row) * self.tensor.row_bytes

    @property
    def files(self) -> frozenset[Path]:
        """The files of its bytes."""
        return frozenset(t.file for t in (self.tensor, self.scale) if t)


@dataclass(frozen=True)
class Part:
    """An output tensor: row segments of the source, concatenated."""

    name: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Match:
    """A parameter of the model; `shape` is that of the unquantized weight.

    It has one part, or weight, scales and biases if MLX quantized the source.
    """

    name: str
    row: Row
    transform: Transform
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    quantization: Quantization | None = None

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.parts[0].segments


@dataclass(frozen=True)
class Resolved:
    """All parameters of a checkpoint in layer order, and whether MLX wrote it."""

    config: ModelConfig
    matches: list[Match]
    # Heads that are stored although they are tied, each with the embedding that it must equal.
    copies: list[tuple[SourceTensor, SourceTensor]]
    is_mlx: bool

    @property
    def quantizations(self) -> dict[str, Quantization]:
        """Quantization of each module that is quantized in the source."""
        return {m.module: m.quantization for m in self.matches if m.quantization}

    @property
    def text_matches(self) -> list[Match]:
        """The parameters of the text model, without the MTP layer."""
        return [m for m in self.matches if m.row.role is not Role.CARRIED and not is_mtp(m.name)]

    @property
    def mtp_matches(self) -> list[Match]:
        """The parameters of the MTP layer, all of them or none."""
        return [m for m in self.matches if m.row.role is not Role.CARRIED and is_mtp(m.name)]

    @property
    def tower_matches(self) -> list[Match]:
        """The parameters of the vision tower, if it exists and config.json describes it."""
        has_tower = self.config.vision is not None
        return [match for match in self.matches if has_tower and match.name.startswith(TOWER)]

    @property
    def is_converted(self) -> bool:
        """Whether the model can run from these files without a conversion."""
        return self.is_mlx or any(match.quantization for match in self.text_matches)


def resolve(raw_config: Mapping[str, Any], tensors: Mapping[str, SourceTensor]) -> Resolved:
    """Match every tensor to the table.

    Missing, unknown and misshapen tensors are collected and raised as one CheckpointError.
    """
    config = ModelConfig.from_hf(raw_config)
    block, named = formats.fp8_block(raw_config, tensors), by_bare_name(tensors)
    if any(map(is_of_tower, named)):
        if raw_config.get("vision_config") is None:
            log.warning("no vision_config in config.json: the vision tower is kept, but cannot run")
        else:
            vision = VisionConfig.from_hf(raw_config, config.hidden_size)
            config = replace(config, vision=vision)
    return _Resolver(config, raw_config, named, block).run()


def refuse_other_head(head: SourceTensor, embedding: SourceTensor) -> CheckpointError:
    """The error for a tied head that differs from the embedding, so it cannot be left out."""
    return CheckpointError(
        f"tensor {head.name} is not the embedding, to which config.json ties it",
        got=f"a head of its own, {head.dtype} {list(head.shape)}",
        expected=f"no head, or a copy of {embedding.name}",
        hint="set tie_word_embeddings to false in config.json to keep both, as transformers does,"
        " or remove the tensor",
    )


def precision(tensor: SourceTensor) -> str:
    """The dtype that a tensor is read as; FP8 becomes bfloat16, which is exact."""
    return "BF16" if tensor.dtype == FP8 else tensor.dtype


@dataclass
class _Stored:
    """A matrix or vector of the source: tensors by the ends of their names, and quantization."""

    tensors: dict[str, SourceTensor]
    quantization: Quantization | None = None


@dataclass
class _Resolver:
    config: ModelConfig
    raw_config: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]
    block: Block | None
    used: set[str] = field(default_factory=set)
    # Name -> kind and detail. A tensor that is used for two outputs is reported once.
    problems: dict[str, tuple[str, str]] = field(default_factory=dict)
    copies: list[tuple[SourceTensor, SourceTensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sizes = tensor_table.model_sizes(self.config)
        self.is_mlx = formats.is_mlx_layout(self.config, self.tensors)
        self.claims = Claims(self.raw_config)

    def run(self) -> Resolved:
        ignored = [
            n
            for n in self.tensors
            if formats.ACTIVATION_SCALE.search(n) or formats.BUFFER.search(n)
        ]
        self.used |= set(ignored)
        mtp = self._mtp()
        matches = []
        for row, layer in tensor_table.walk(self.config):
            if is_mtp(row.source):
                matches += mtp
            matches += self._match(row, layer, self.is_mlx)
        self.problems |= {n: ("unknown", "") for n in self.tensors if n not in self.used}
        # The tower may be stored under torch's and under MLX's names.
        counts = Counter(match.name for match in matches)
        self.problems |= {name: ("twice", "") for name, count in counts.items() if count > 1}
        if self.problems:
            raise _problem_error(self._with_full_names())
        if ignored:
            log.warning(
                "unused tensors are left out: %s", some(self.tensors[n].name for n in ignored)
            )
        self.claims.warn()
        config = replace(self.config, num_mtp_layers=1) if mtp else self.config
        return Resolved(config, matches, self.copies, self.is_mlx)

    def _mtp(self) -> list[Match]:
        """The MTP layer; empty if there is none, or, with a warning, if it cannot be used."""
        stored = {n: t for n, t in self.tensors.items() if is_mtp(n)}
        if not stored:
            return []
        is_mlx = self.is_mlx and formats.mtp_norms_are_shifted(self.raw_config, stored.values())
        used, self.used = self.used, set(self.used)
        matches = [
            m for row in tensor_table.walk_mtp(self.config) for m in self._match(row, 0, is_mlx)
        ]
        self.problems |= {n: ("unknown", "") for n in stored if n not in self.used}
        if not self.problems:
            return matches
        log.warning(
            "the MTP layer cannot be used, everything else can: %d of its tensors are wrong%s",
            len(self.problems),
            "".join(_problem_lines(self.problems)),
        )
        self.used, self.problems = used, {}
        return []

    def _with_full_names(self) -> dict[str, tuple[str, str]]:
        """The problems by full names, with the prefixes of this checkpoint."""
        prefixes: dict[str, str] = {}
        for short, tensor in self.tensors.items():
            if tensor.name.endswith(short):
                root = short.partition(".")[0]
                prefixes.setdefault(root, tensor.name.removesuffix(short))
        usual = "language_model.model." if self.is_mlx else "model.language_model."
        trunk = next((prefixes[root] for root in TRUNK if root in prefixes), usual)
        prefixes = dict.fromkeys(TRUNK, trunk) | prefixes

        def full(name: str) -> str:
            tensor = self.tensors.get(name)
            return tensor.name if tensor else prefixes.get(name.partition(".")[0], "") + name

        return {full(name): problem for name, problem in self.problems.items()}

    def _complain(self, name: str, kind: str, got: object = "", expected: object = "") -> None:
        detail = f"{got}, expected {expected}" if expected else str(got)
        self.problems[name] = (kind, detail)

    def _match(self, row: Row, layer: int, is_mlx: bool) -> Iterator[Match]:
        if not row.shape:
            yield from self._carried(row)
            return
        source, name = filled(row.source, layer), filled(row.output or row.source, layer)
        transform = Transform.KEEP if is_mlx else row.transform
        shape = tensor_table.shape_of(row.shape, self.sizes)
        if row.transform is Transform.CHANNELS_LAST:
            transform = self._patch_transform(name, source, shape, transform)
        if transform is not row.transform:
            shape = output_shape(row.transform, shape)
        kept, ranges = shape, [(0, math.prod(shape[:-1]))]
        if row.split:
            ranges = self._ranges(*row.split, row.parts)
            num_rows = sum(stop - start for start, stop in ranges)
            kept = (*shape[:-2], num_rows // math.prod(shape[:-2]), shape[-1])
        each = [filled(row.each, layer, e) for e in range(shape[0])] if row.each else []
        # Three forms: MLX's, one tensor per expert, or that of the table.
        is_fused, is_apart = self._has(source), any(map(self._has, each))
        if name != source and (self._has(name) or (is_mlx and not is_fused and not is_apart)):
            found, ranges = [self._take(name, kept)], [(0, math.prod(kept[:-1]))]
        elif is_apart and not is_fused:
            found = [self._take(one, kept[1:]) for one in each]
            ranges = [(0, math.prod(kept[1:-1]))]
        else:
            found = [self._take(source, shape)]
        stored = [one for one in found if one]
        if len(stored) == len(found) and self._agree(stored):
            yield self._build(row, name, transform, kept, stored, ranges)

    def _patch_transform(
        self, name: str, source: str, shape: tuple[int, ...], usual: Transform
    ) -> Transform:
        """The tower may be from another program than the text model: its own shape decides."""
        tensor = self.tensors.get(name) or self.tensors.get(source)
        last = output_shape(Transform.CHANNELS_LAST, shape)
        if tensor is None or shape == last or tensor.shape not in (shape, last):
            return usual
        return Transform.CHANNELS_LAST if tensor.shape == shape else Transform.KEEP

    def _build(
        self,
        row: Row,
        name: str,
        transform: Transform,
        shape: tuple[int, ...],
        stored: Sequence[_Stored],
        ranges: list[tuple[int, int]],
    ) -> Match:
        output, quantization = output_name(name), stored[0].quantization
        module = output.removesuffix(".weight")
        parts = []
        for end, first in stored[0].tensors.items():
            segments = tuple(
                self._segment(one.tensors[end], start, stop)
                for one in stored
                for start, stop in ranges
            )
            if quantization is None:
                parts.append(Part(output, output_shape(transform, shape), segments))
            else:
                parts.append(Part(f"{module}.{end}", (*shape[:-1], first.shape[-1]), segments))
        if quantization:
            source = bare(stored[0].tensors["weight"].name).removesuffix(".weight")
            self.claims.compare((source, bare(module)), quantization)
        return Match(
            output, row, transform, output_shape(transform, shape), tuple(parts), quantization
        )

    def _ranges(self, groups: str, widths: str, parts: tuple[int, ...]) -> list[tuple[int, int]]:
        *starts, width = accumulate(tensor_table.shape_of(widths, self.sizes), initial=0)
        ends = [*starts[1:], width]
        return [
            (group * width + starts[part], group * width + ends[part])
            for part in parts
            for group in range(self.sizes[groups])
        ]

    def _agree(self, stored: Sequence[_Stored]) -> bool:
        """Whether experts that are stored one by one have the same type."""

        def kind(one: _Stored) -> str:
            dtypes = " ".join(map(precision, one.tensors.values()))
            return f"{dtypes} {one.quantization.as_config()}" if one.quantization else dtypes

        expected = kind(stored[0])
        others = [one for one in stored if kind(one) != expected]
        for one in others:
            name = bare(one.tensors["weight"].name)
            self._complain(name, "dtype", kind(one), f"{expected} as the first")
        return not others

    def _segment(self, tensor: SourceTensor, start: int, stop: int) -> Segment:
        if tensor.dtype != FP8:
            return Segment(tensor, start, stop)
        return Segment(tensor, start, stop, self.tensors[bare(tensor.name) + SCALE], self.block)

    def _carried(self, row: Row) -> Iterator[Match]:
        """Tensors whose names do not follow from the config: all that exist, each once."""
        stem = row.source.rstrip("*")
        names = [n for n in self.tensors if n == row.source or (n != stem and n.startswith(stem))]
        for name in sorted(set(names) - self.used, key=natural):
            if name in self.used:
                # It is the scale of the previous tensor.
                continue
            tensor = self.tensors[name]
            if row.role is Role.DROPPED:
                embedding = self.tensors.get(name.replace("lm_head", "embed_tokens"))
                if embedding:
                    self.used.add(name)
                    self.copies.append((tensor, embedding))
                continue
            transform = Transform.KEEP if self.is_mlx else row.transform
            if tensor.dtype in (*FLOATS, FP8) and not self._take(name):
                continue
            self.used.add(name)
            if transform is Transform.CHANNELS_LAST and len(tensor.shape) != 5:
                self._complain(name, "shape", list(tensor.shape), "5 dims")
                continue
            shape = output_shape(transform, tensor.shape)
            output = (row.output or row.source).rstrip("*") + name[len(stem) :]
            segments = (self._segment(tensor, 0, tensor.num_rows),)
            yield Match(output, row, transform, shape, (Part(output, shape, segments),))

    def _has(self, name: str) -> bool:
        return name in self.tensors or f"{name.removesuffix('.weight')}.weight" in self.tensors

    def _take(self, name: str, shape: tuple[int, ...] | None = None) -> _Stored | None:
        """The tensors of that name and shape; None, with a problem recorded, if they do not exist.

        Without a shape any shape is accepted.
        """
        if name not in self.tensors and self._has(name):
            name += ".weight"
        tensor = self.tensors.get(name)
        if tensor is None:
            self._complain(name, "missing")
            return None
        self.used.add(name)
        if shape and len(shape) > 1 and f"{name.removesuffix('.weight')}.scales" in self.tensors:
            return self._take_packed(name, shape)
        if shape is not None and tensor.shape != shape:
            self._complain(name, "shape", list(tensor.shape), list(shape))
        elif tensor.dtype == FP8 and self.block and tensor.shape[1:] and not name.endswith(SCALE):
            # One scale per block; blocks at the edges are partial.
            *leading, rows, columns = tensor.shape
            blocks = (*leading, -(-rows // self.block[0]), -(-columns // self.block[1]))
            return _Stored({"weight": tensor}) if self._take(name + SCALE, blocks) else None
        elif tensor.dtype not in FLOATS:
            self._complain(name, "dtype", tensor.dtype, ", ".join(FLOATS))
        else:
            return _Stored({"weight": tensor})
        return None

    def _take_packed(self, name: str, shape: tuple[int, ...]) -> _Stored | None:
        """Weight, scales and biases of a matrix that MLX quantized; bits follow from the shapes."""
        stem, weight = name.removesuffix(".weight"), self.tensors[name]
        found = {"weight": weight}
        for end in ("scales", "biases"):
            if tensor := self.tensors.get(f"{stem}.{end}"):
                self.used.add(f"{stem}.{end}")
                found[end] = tensor
        scales, biases = found["scales"], found.get("biases")
        num_groups = scales.shape[-1] if scales.shape else 0
        expected = {
            "weight": ("U32", (*shape[:-1], *weight.shape[-1:])),
            "scales": (scales.dtype, (*shape[:-1], num_groups)),
            "biases": (scales.dtype, (*shape[:-1], num_groups)),
        }
        for end, tensor in found.items():
            dtype, dims = expected[end]
            if tensor.dtype != dtype:
                self._complain(bare(tensor.name), "dtype", tensor.dtype, dtype)
                return None
            if tensor.shape != dims:
                self._complain(bare(tensor.name), "shape", list(tensor.shape), list(dims))
                return None
        quantization = infer(shape[-1], weight, scales, biases)
        if quantization is None:
            parts = ", ".join(f"{end} {t.dtype} {list(t.shape)}" for end, t in found.items())
            self._complain(name, "packing", parts, f"{shape[-1]} inputs in {', '.join(MODES)}")
            return None
        return _Stored(found, quantization)


def _problem_lines(problems: Mapping[str, tuple[str, str]]) -> list[str]:
    """One line per kind of problem, each with a line break before it."""
    folded: dict[tuple[str, str, str], list[str]] = {}
    for name, (kind, detail) in problems.items():
        folded.setdefault((kind, detail, fold(name)), []).append(name)
    kinds: dict[str, list[str]] = {}
    for (kind, detail, pattern), names in sorted(folded.items()):
        shown = names[0] if len(names) == 1 else f"{pattern} ({len(names)} tensors)"
        line = f"\n    {kind:8} {shown}{detail and ': '}{detail}"
        kinds.setdefault(kind, []).append(line)
    # Some of each kind, because unknown names often explain missing ones.
    mixed = [line for line in chain.from_iterable(zip_longest(*kinds.values())) if line]
    lines = sorted(mixed[:MAX_PROBLEM_LINES])
    if len(mixed) > MAX_PROBLEM_LINES:
        lines.append(f"\n    and {len(mixed) - MAX_PROBLEM_LINES} more kinds")
    return lines


def _problem_error(problems: Mapping[str, tuple[str, str]]) -> CheckpointError:
    return CheckpointError(
        f"the weights do not fit config.json: {len(problems)} tensors are wrong",
        got="".join(_problem_lines(problems)),
        expected="exactly the tensors that config.json calls for",
        hint="check that config.json and the weights are of the same checkpoint",
    )
