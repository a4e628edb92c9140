"""What a distillation is asked for, what it did, and the rows of the matrices that it wrote."""

# B texts, T tokens.

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from qwen35_mlx.checkpoint.headers import SourceTensor, read_headers
from qwen35_mlx.progress import StepProgress
from qwen35_mlx.quant.latent import Schedule

from .calibration_text import sketch
from .source import read_rows

# An expert that sees fewer tokens keeps what error feedback gave it.
MIN_EXPERT_TOKENS = 128
# Share of experts that may see fewer before a longer text is advised.
FEW_SHARE = 0.05
# Passes over the text for each part of a layer, and how far weights move in a step.
EPOCHS, RATE = 16, 0.04
REPORT_FILE = "distillation.json"
# Of each weight: dequantized, its code, the gradients of both, and whether it is settled.
FINISH_BYTES = 24
KINDS = ("weight", "scales", "biases")


@dataclass
class PartReport:
    """What the training of a layer, the head or the whole model did."""

    name: str
    # By part: the loss on held-out batches before and after.
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    # Tokens of each expert, and the share of the source's choices that the router misses.
    expert_tokens: list[int] = field(default_factory=list)
    flips: float | None = None
    # By module: share of the loss of its part that training left.
    left: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Distillation:
    """What to train on, ids `[B, T]`, and for how long."""

    ids: mx.array
    # Of the pass over the whole model, which has to fit in memory; 0 is no such pass.
    finish_tokens: int = 0
    schedule: Schedule = field(default_factory=lambda: Schedule(EPOCHS, RATE))
    # Memory for activations between layers; if they need more, they are on disk.
    activations_bytes: int = 2**62
    progress: StepProgress = field(default=lambda done, total, step: None, repr=False)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the result, in words that fit into JSON."""
        settings = asdict(self.schedule) | {"finish_tokens": self.finish_tokens}
        return settings | {"text": self._digest, "length": self.ids.shape[1]}

    @property
    def facts(self) -> dict[str, Any]:
        """What a converted folder says of the text."""
        return {"text": self._digest, "num_tokens": self.ids.size, "ngrams": sketch(self.ids)}

    @property
    def _digest(self) -> str:
        return hashlib.sha256(np.array(self.ids.astype(mx.int32)).tobytes()).hexdigest()[:32]


class Distilled:
    """What `distill` wrote: rows of quantized matrices, read on demand; facts of its text."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        self.facts = facts
        finished = folder / "finished"
        self.tensors: dict[str, SourceTensor] = read_headers(
            finished if finished.exists() else folder / "layers"
        )

    def rows(self, module: str, start: int, stop: int) -> list[mx.array] | None:
        """Words, scales and biases of these rows as stored; None if the module has none here."""
        if f"{module}.scales" not in self.tensors:
            return None
        tensors = [self.tensors[f"{module}.{kind}"] for kind in KINDS]
        return [mx.array(read_rows(tensor, start, stop)) for tensor in tensors]


def finish_bytes(num_parameters: int) -> int:
    """Memory of the pass over the whole model: weights, moments and gradients in float32."""
    return FINISH_BYTES * num_parameters


def distillation_lines(folder: Path) -> list[str]:
    """What was trained, for people: losses before and after, the router, tokens of experts."""
    counts: list[int] = []
    lines = ["held-out loss before and after training, by layer"]
    for row in json.loads((folder / REPORT_FILE).read_text("utf-8")):
        report = PartReport(**row)
        parts = [f"{part} {a:.2g} -> {b:.2g}" for part, (a, b) in report.losses.items() if a]
        if report.expert_tokens:
            parts.append(f"router misses {report.flips:.1%} of the choices")
            parts.append(f"tokens an expert: {histogram(report.expert_tokens)}")
        lines += [f"{report.name}: {'; '.join(parts)}"] if parts else []
        counts += report.expert_tokens
    if counts and (share := sum(n < MIN_EXPERT_TOKENS for n in counts) / len(counts)) > FEW_SHARE:
        # The tokens that all but so many experts have, or 1.
        typical = max(sorted(counts)[int(FEW_SHARE * len(counts))], 1)
        lines.append(
            f"{share:.0%} of the experts saw fewer than {MIN_EXPERT_TOKENS} tokens and were not "
            f"trained; a text {MIN_EXPERT_TOKENS / typical:.0f} times as long would reach most"
        )
    return lines


def left_of(folder: Path) -> dict[str, float]:
    """Share of its loss that a distillation left of each module of its layers."""
    rows = json.loads((folder / REPORT_FILE).read_text("utf-8"))
    return {module: share for row in rows for module, share in row["left"].items()}


def histogram(counts: Iterable[int]) -> str:
    """How many counts lie below each power of two from MIN_EXPERT_TOKENS on."""
    counts = sorted(counts)
    limits = [MIN_EXPERT_TOKENS * 2**i for i in range(20) if MIN_EXPERT_TOKENS * 2**i <= counts[-1]]
    edges = [0, *limits, counts[-1] + 1]
    bins = [sum(a <= n < b for n in counts) for a, b in pairwise(edges)]
    names = [f"below {MIN_EXPERT_TOKENS}", *(f"from {limit}" for limit in limits)]
    return ", ".join(f"{n} {name}" for n, name in zip(bins, names, strict=True) if n)
