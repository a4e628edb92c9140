"""A quantized checkpoint held against its reference, both run layer by layer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.progress import StepProgress
from qwen35_mlx.quant.divergence import Divergence

from .layerwise import Checkpoint, Layerwise, open_checkpoint, run_layer
from .plots import picture


@dataclass(frozen=True)
class LayerError:
    """Relative to what the reference's layer adds: of this layer alone, and of all up to it."""

    index: int
    kind: str
    own: float
    accumulated: float


@dataclass(frozen=True)
class Report:
    """Divergence of `quantized` to `reference` on a text."""

    reference: Checkpoint
    quantized: Checkpoint
    layers: tuple[LayerError, ...]
    tokens: Divergence

    def as_dict(self) -> dict[str, Any]:
        """All figures under names that carry their units."""
        ours, theirs = self.quantized, self.reference
        reference_ppl, quantized_ppl = self.tokens.perplexities
        return {
            "num_tokens": self.tokens.num_tokens,
            "mean_kl_nats": self.tokens.mean_kl,
            "p99_kl_nats": self.tokens.p99_kl,
            "top1_agreement": self.tokens.top1_agreement,
            "reference_perplexity": reference_ppl,
            "quantized_perplexity": quantized_ppl,
            "reference_bits_per_weight": theirs.bits_per_weight,
            "quantized_bits_per_weight": ours.bits_per_weight,
            "reference_gb": theirs.nbytes / 1e9,
            "quantized_gb": ours.nbytes / 1e9,
            "layer_errors": [layer.own for layer in self.layers],
            "accumulated_errors": [layer.accumulated for layer in self.layers],
        }


def report_lines(report: Report) -> list[str]:
    """The report as a table."""
    f, ours, theirs = report.tokens, report.quantized, report.reference
    lines = ["layer  kind                this layer   all so far   (error / what the layer adds)"]
    lines += [
        f"{layer.index:5}  {layer.kind:17}  {layer.own:11.5f}  {layer.accumulated:11.5f}"
        for layer in report.layers
    ]
    before, after = f.perplexities
    lines += [
        "",
        f"{f.num_tokens:,} tokens           reference    quantized",
        f"bits per weight       {theirs.bits_per_weight:10.3f}   {ours.bits_per_weight:10.3f}",
        f"GB                    {theirs.nbytes / 1e9:10.3f}   {ours.nbytes / 1e9:10.3f}",
        f"perplexity            {before:10.4f}   {after:10.4f}",
        f"KL(reference || quantized): mean {f.mean_kl:.5f}, 99 % of tokens below"
        f" {f.p99_kl:.5f} nats",
        f"same most likely token: {f.top1_agreement:.2%}",
    ]
    return lines


def fidelity(
    reference: str | Path | Checkpoint,
    quantized: str | Path | Checkpoint,
    ids: mx.array,
    progress: StepProgress | None = None,
) -> Report:
    """Run ids `[B, T]` through two folders, Hugging Face's or converted, and compare.

    Holds one layer of each, embedding and head of each, and 2 * B * T hidden states.
    """
    pair = [c if isinstance(c, Checkpoint) else open_checkpoint(c) for c in (reference, quantized)]
    theirs, ours = pair
    facts = ((key, a, getattr(ours.config, key)) for key, a in vars(theirs.config).items())
    if differences := [f"{key} {a} and {b}" for key, a, b in facts if a != b]:
        raise Qwen35Error(
            "these are not the same model",
            got=", ".join(differences),
            expected="two folders of one model",
        )
    runs = [Layerwise(checkpoint) for checkpoint in pair]
    states = [run.embed(ids) for run in runs]
    layers = []
    kinds = theirs.config.layer_types
    for index, kind in enumerate(kinds):
        if progress:
            progress(index, len(kinds), f"layer {index}")
        before = states[0]
        after = run_layer(runs[0].layer(index), before)
        layer = runs[1].layer(index)
        own, states[1] = run_layer(layer, before), run_layer(layer, states[1])
        change = _energy(after, before)
        states[0] = after
        errors = [(_energy(x, after) / change) ** 0.5 for x in (own, states[1])]
        layers.append(LayerError(index, kind, *errors))
        del layer
        mx.clear_cache()
    result = Divergence()
    following = mx.concatenate([ids[:, 1:], mx.full((len(ids), 1), -1)], axis=1)
    logits = [run.logits(hidden) for run, hidden in zip(runs, states, strict=True)]
    for (i, start, p), (_, _, q) in zip(*logits, strict=True):
        result.add(p, q, following[i, start : start + len(p)])
        mx.clear_cache()
    return Report(theirs, ours, tuple(layers), result)


def _energy(a: list[mx.array], b: list[mx.array]) -> float:
    """Sum of squares of the differences, a text at a time."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += float(mx.square(x.astype(mx.float32) - y.astype(mx.float32)).sum())
    return max(total, 1e-30)


def plot(report: Report, path: Path) -> None:
    """Errors by layer and the distribution of KL by token, as a PNG."""
    with picture(path, (11, 4)) as (_, left, right):
        indices = [layer.index for layer in report.layers]
        left.plot(indices, [layer.own for layer in report.layers], "o-", label="this layer alone")
        accumulated = [layer.accumulated for layer in report.layers]
        left.plot(indices, accumulated, "s--", label="all layers up to it")
        left.set(xlabel="layer", ylabel="error / what the layer adds", yscale="log")
        left.legend()
        kls = np.sort(np.concatenate(report.tokens.kls))
        right.plot(np.maximum(kls, 1e-9), np.linspace(0, 1, len(kls)))
        right.axvline(
            report.tokens.mean_kl, linestyle=":", label=f"mean {report.tokens.mean_kl:.4g}"
        )
        right.axvline(
            report.tokens.p99_kl, linestyle="--", label=f"99 % {report.tokens.p99_kl:.4g}"
        )
        right.set(xlabel="KL(reference || quantized), nats", ylabel="share of tokens", xscale="log")
        right.legend()
