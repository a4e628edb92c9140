"""The settings of a distillation, its report, and reading the matrices that it wrote."""

# B texts, T tokens.

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen35_mlx.checkpoint.headers import SourceTensor, read_headers
from qwen35_mlx.progress import StepProgress
from qwen35_mlx.quant.latent import Schedule

from .calibration_text import digest, sketch
from .source import read_rows

# An expert with fewer tokens keeps its GPTQ quantization.
MIN_EXPERT_TOKENS = 128
# If more than this share of the experts has fewer tokens, the report recommends a longer text.
FEW_SHARE = 0.05
# Epochs and learning rate for each part of a layer.
EPOCHS, RATE = 16, 0.04
REPORT_FILE = "distillation.json"
# Bytes per weight to train the whole model: float32 weight, code, gradients, and Adam's moments.
FINISH_BYTES = 24
KINDS = ("weight", "scales", "biases")


@dataclass
class PartReport:
    """Report on the training of a layer, of the head, or of the whole model."""

    name: str
    # By part: the loss on held-out batches before and after the training.
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    # Tokens of each expert, and the share of the source's experts that the router does not choose.
    expert_tokens: list[int] = field(default_factory=list)
    flips: float | None = None
    # By module: the loss of its part after the training, relative to before.
    left: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Distillation:
    """Settings of a distillation: token ids `[B, T]` to train on, and how long."""

    ids: mx.array
    # Tokens of the final training of the whole model, which has to fit in memory; 0: none.
    finish_tokens: int = 0
    schedule: Schedule = field(default_factory=lambda: Schedule(EPOCHS, RATE))
    # Memory for activations between layers; if they need more, they are stored on disk.
    activations_bytes: int = 2**62
    progress: StepProgress = field(default=lambda done, total, step: None, repr=False)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the result, for JSON."""
        settings = asdict(self.schedule) | {"finish_tokens": self.finish_tokens}
        return settings | {"text": digest(self.ids), "length": self.ids.shape[1]}

    @property
    def facts(self) -> dict[str, Any]:
        """What config.json of a converted folder says about the text."""
        return {"text": digest(self.ids), "num_tokens": self.ids.size, "ngrams": sketch(self.ids)}


class Distilled:
    """The result of `distill`: quantized matrices, read on demand, and the facts of the text."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        self.facts = facts
        finished = folder / "finished"
        self.tensors: dict[str, SourceTensor] = read_headers(
            finished if finished.exists() else folder / "layers"
        )

    def rows(self, module: str, start: int, stop: int) -> list[mx.array] | None:
        """Packed weight, scales and biases of rows of a module; None if it was not trained."""
        if f"{module}.scales" not in self.tensors:
            return None
        tensors = [self.tensors[f"{module}.{kind}"] for kind in KINDS]
        return [mx.array(read_rows(tensor, start, stop)) for tensor in tensors]


def distillation_lines(folder: Path) -> list[str]:
    """Lines about the training in `folder`: losses, the router, and tokens of experts."""
    counts: list[int] = []
    lines = ["held-out loss before and after training, by layer"]
    for row in json.loads((folder / REPORT_FILE).read_text("utf-8")):
        report = PartReport(**row)
        parts = [f"{part} {a:.2g} -> {b:.2g}" for part, (a, b) in report.losses.items() if a]
        if report.expert_tokens:
            parts.append(f"router misses {report.flips:.1%} of the source's experts")
            parts.append(f"experts by number of tokens: {histogram(report.expert_tokens)}")
        lines += [f"{report.name}: {'; '.join(parts)}"] if parts else []
        counts += report.expert_tokens
    if counts and (share := sum(n < MIN_EXPERT_TOKENS for n in counts) / len(counts)) > FEW_SHARE:
        # All experts except FEW_SHARE have at least this number of tokens.
        least = max(sorted(counts)[int(FEW_SHARE * len(counts))], 1)
        lines.append(
            f"{share:.0%} of the experts were not trained: they have fewer than "
            f"{MIN_EXPERT_TOKENS} tokens. A text {MIN_EXPERT_TOKENS / least:.0f} times as long "
            "would train most of them"
        )
    return lines


def left_of(folder: Path) -> dict[str, float]:
    """The loss after a distillation relative to before, by module."""
    rows = json.loads((folder / REPORT_FILE).read_text("utf-8"))
    return {module: share for row in rows for module, share in row["left"].items()}


def histogram(counts: Iterable[int]) -> str:
    """How many of the counts are below MIN_EXPERT_TOKENS, and between its multiples by 2**i."""
    counts = sorted(counts)
    limits = [MIN_EXPERT_TOKENS * 2**i for i in range(20) if MIN_EXPERT_TOKENS * 2**i <= counts[-1]]
    edges = [0, *limits, counts[-1] + 1]
    bins = [sum(a <= n < b for n in counts) for a, b in pairwise(edges)]
    names = [f"below {MIN_EXPERT_TOKENS}", *(f"from {limit}" for limit in limits)]
    return ", ".join(f"{n} {name}" for n, name in zip(bins, names, strict=True) if n)
