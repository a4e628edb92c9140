"""Compares quantized checkpoints with their reference; all are run layer by layer."""

# B texts, T tokens.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qwen35_mlx.checkpoint.adapter import Adapter
from qwen35_mlx.config import read_config
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.machine import default_limit_bytes
from qwen35_mlx.memory import DEFAULT_CONTEXT as CONTEXT
from qwen35_mlx.memory import count
from qwen35_mlx.progress import StepProgress
from qwen35_mlx.quant.divergence import Divergence

from .layerwise import Checkpoint, Layerwise, open_checkpoint, run_layer
from .mac_models import BANDWIDTH_LIMIT, Mac
from .plots import picture
from .report import aligned

# Figures of answers that are shares, with their titles in a table.
TASKS = {
    "same_tokens": "same",
    "identical_answers": "identical",
    "valid_tool_calls": "tool calls",
    "valid_json": "JSON",
}


@dataclass(frozen=True)
class LayerError:
    """The error of a layer alone, and of all layers up to it, relative to the reference's update.

    The update is what the layer adds to the hidden states.
    """

    index: int
    kind: str
    alone: float
    accumulated: float
    # Share of the reference's experts that the quantized model's router does not choose.
    flips: float | None = None


@dataclass(frozen=True)
class Report:
    """The fidelity of `quantized` to `reference` on a text."""

    reference: Checkpoint
    quantized: Checkpoint
    layers: tuple[LayerError, ...]
    tokens: Divergence

    def as_dict(self) -> dict[str, Any]:
        """All figures, with units in the names."""
        reference_ppl, quantized_ppl = self.tokens.perplexities
        return {
            "num_tokens": self.tokens.num_tokens,
            "mean_kl_nats": self.tokens.mean_kl,
            "p99_kl_nats": self.tokens.p99_kl,
            "top1_agreement": self.tokens.top1_agreement,
            "reference_perplexity": reference_ppl,
            "quantized_perplexity": quantized_ppl,
            "reference_bits_per_weight": self.reference.bits_per_weight,
            "quantized_bits_per_weight": self.quantized.bits_per_weight,
            "reference_gb": self.reference.nbytes / 1e9,
            "quantized_gb": self.quantized.nbytes / 1e9,
            "layer_errors": [layer.alone for layer in self.layers],
            "accumulated_errors": [layer.accumulated for layer in self.layers],
            "router_flips": [layer.flips for layer in self.layers if layer.flips is not None],
        }


def report_lines(report: Report) -> list[str]:
    """The report as lines of text."""
    f, tokens = report.as_dict(), report.tokens

    def row(label: str, key: str, digits: int = 3) -> str:
        reference, quantized = f[f"reference_{key}"], f[f"quantized_{key}"]
        return f"{label:20}  {reference:10.{digits}f}   {quantized:10.{digits}f}"

    return [
        "layer  kind                this layer   up to here   (error / what the layer adds)",
        *(
            f"{layer.index:5}  {layer.kind:17}  {layer.alone:11.5f}  {layer.accumulated:11.5f}"
            + ("" if layer.flips is None else f"   router misses {layer.flips:.2%}")
            for layer in report.layers
        ),
        "",
        f"{tokens.num_tokens:,} tokens           reference    quantized",
        row("bits per weight", "bits_per_weight"),
        row("GB", "gb"),
        row("perplexity", "perplexity", digits=4),
        f"KL(reference || quantized): mean {tokens.mean_kl:.5f}, 99 % of tokens below"
        f" {tokens.p99_kl:.5f} nats",
        f"same most likely token: {tokens.top1_agreement:.2%}",
    ]


def open_with(folder: str | Path, adapter: Adapter) -> Checkpoint:
    """Open a folder with the adapter attached, unless it was fused into the weights."""
    checkpoint = open_checkpoint(folder)
    checkpoint.adapter = None if fused_with(folder, adapter) else adapter
    return checkpoint


def fused_with(folder: str | Path, adapter: Adapter) -> bool:
    """Whether the adapter was fused into a folder's weights."""
    facts = read_config(Path(folder).expanduser()).get("qwen35_mlx")
    return isinstance(facts, dict) and facts.get("adapter") == adapter.digest


def fidelity(
    reference: str | Path | Checkpoint,
    quantized: str | Path | Checkpoint,
    ids: mx.array,
    progress: StepProgress = lambda done, total, step: None,
) -> Report:
    """Compare two folders, from Hugging Face or converted, on token ids `[B, T]`; see `compare`."""
    return compare(reference, [quantized], ids, progress)[0]


def compare(
    reference: str | Path | Checkpoint,
    outputs: Sequence[str | Path | Checkpoint],
    ids: mx.array,
    progress: StepProgress = lambda done, total, step: None,
) -> list[Report]:
    """Compare several folders with a reference on token ids `[B, T]`; the reference is run once.

    Holds one layer of the reference and one of another folder, embedding and head of each folder,
    and the hidden states of B * T tokens for each folder. Raises Qwen35Error for other models.
    """
    given = (reference, *outputs)
    opened = [c if isinstance(c, Checkpoint) else open_checkpoint(c) for c in given]
    config = vars(opened[0].config)
    for other in (vars(checkpoint.config) for checkpoint in opened[1:]):
        if differences := [
            f"{key} {a} and {other[key]}" for key, a in config.items() if a != other[key]
        ]:
            raise Qwen35Error(
                "the folders contain different models",
                got=", ".join(differences),
                expected="folders of one model",
            )
    runs = [Layerwise(checkpoint) for checkpoint in opened]
    states = [run.embed(ids) for run in runs]
    layers: list[list[LayerError]] = [[] for _ in outputs]
    kinds = config["layer_types"]
    for index, kind in enumerate(kinds):
        progress(index, len(kinds), f"layer {index}")
        before = states[0]
        states[0], wanted = _run(runs[0].layer(index), before)
        after = states[0]
        added = _squared_distance(after, before)
        for number, run in enumerate(runs[1:], 1):
            layer = run.layer(index)
            alone = run_layer(layer, before)
            states[number], chosen = _run(layer, states[number])
            error, so_far = (
                (_squared_distance(x, after) / added) ** 0.5 for x in (alone, states[number])
            )
            flips = _missed(wanted, chosen, config["num_experts_per_tok"])
            layers[number - 1].append(LayerError(index, kind, error, so_far, flips))
            del layer
            mx.clear_cache()
    tokens = [Divergence() for _ in outputs]
    following = mx.concatenate([ids[:, 1:], mx.full((len(ids), 1), -1)], axis=1)
    logits = [run.logits(hidden) for run, hidden in zip(runs, states, strict=True)]
    for (i, start, p), *others in zip(*logits, strict=True):
        for found, (_, _, q) in zip(tokens, others, strict=True):
            found.add(p, q, following[i, start : start + len(p)])
        mx.clear_cache()
    return [
        Report(opened[0], checkpoint, tuple(errors), found)
        for checkpoint, errors, found in zip(opened[1:], layers, tokens, strict=True)
    ]


def _run(layer: Any, hidden: list[mx.array]) -> tuple[list[mx.array], list[mx.array]]:
    """The hidden states after a layer, and the logits of its router; empty without a router."""
    if "gate" not in layer.mlp:
        return run_layer(layer, hidden), []
    recorder = layer.mlp.gate = _Recorder(layer.mlp.gate)
    hidden = run_layer(layer, hidden)
    layer.mlp.gate = recorder.module
    return hidden, recorder.outputs


class _Recorder(nn.Module):
    """Calls a module and keeps its outputs."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.outputs: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        self.outputs.append(self.module(x))
        mx.eval(self.outputs[-1])
        return self.outputs[-1]


def _missed(wanted: list[mx.array], chosen: list[mx.array], per_token: int) -> float | None:
    """The share of the experts with the largest `wanted` logits that `chosen` does not select."""
    if not wanted:
        return None
    right, own = (
        mx.argpartition(mx.concatenate(logits), -per_token, axis=-1)[..., -per_token:]
        for logits in (wanted, chosen)
    )
    return float((right[..., None] != own[..., None, :]).all(axis=-1).mean())


@dataclass(frozen=True)
class Comparison:
    """Reports on several outputs of one model, and the Mac that they are computed for."""

    names: Sequence[str]
    reports: Sequence[Report]
    mac: Mac
    # For each output, the share of the text that is in its calibration text.
    overlaps: Sequence[float | None] = ()
    # Figures of answers: of the reference, then of each output.
    tasks: Sequence[Mapping[str, Any]] = ()

    def rows(self) -> list[dict[str, Any]]:
        """The figures of each output, sorted by size."""
        rows = []
        overlaps = self.overlaps or [None] * len(self.names)
        tasks = self.tasks[1:] or [{}] * len(self.names)
        columns = (self.names, self.reports, overlaps, tasks)
        for name, report, share, answers in zip(*columns, strict=True):
            read = report.quantized.decode_bytes(CONTEXT)
            limit = self.mac.gbps * 1e9 / read if self.mac.gbps else None
            figures = {k: v for k, v in report.as_dict().items() if not k.endswith("_errors")}
            figures |= {"bandwidth_limit_tps": limit, "calibration_overlap": share}
            rows.append({"name": name, **figures, **answers})
        return sorted(rows, key=lambda row: row["quantized_gb"])

    @property
    def room_gb(self) -> float:
        """The largest model, in GB of weights, that the Mac can run with `CONTEXT` tokens."""
        limit = default_limit_bytes(self.mac.memory_bytes)
        config = self.reports[0].quantized.config
        return (limit - count(config, 0, min(CONTEXT, config.context_length), limit).total) / 1e9

    def lines(self) -> list[str]:
        """The comparison as a table."""
        rows = self.rows()
        table = [("", "GB", "bits", "KL, nats", "99 % below", "same token", "perplexity", "tok/s")]
        for row in rows:
            tps = row["bandwidth_limit_tps"]
            table.append(
                (
                    row["name"],
                    f"{row['quantized_gb']:.3f}",
                    f"{row['quantized_bits_per_weight']:.2f}",
                    f"{row['mean_kl_nats']:.5f}",
                    f"{row['p99_kl_nats']:.5f}",
                    f"{row['top1_agreement']:.2%}",
                    f"{row['quantized_perplexity']:.4f}",
                    f"{tps:,.0f}" if tps else "-",
                )
            )
        return [
            *aligned(table),
            f"KL(reference || quantized); the reference has perplexity "
            f"{rows[0]['reference_perplexity']:.4f} and {rows[0]['reference_gb']:.3f} GB.",
            f"tok/s: the bandwidth limit of {self.mac.name} with {CONTEXT:,} tokens, which no"
            " program reaches.",
            f"{self.mac.name} can run at most {self.room_gb:,.1f} GB of weights with {CONTEXT:,}"
            " tokens.",
        ]

    def task_lines(self) -> list[str]:
        """The figures of the answers as a table."""
        table = [("", *TASKS.values(), "thought", "of SRC's")]
        for row in [{"name": "SRC", **self.tasks[0]}, *self.rows()]:
            ratio = row["thought_ratio"]
            shares = [f"{row[key]:.1%}" for key in TASKS]
            thought = f"{row['thought_tokens']:,.0f}", "-" if ratio is None else f"{ratio:.2f}"
            table.append((row["name"], *shares, *thought))
        lines = [
            *aligned(table),
            "same: tokens before the first difference from SRC's answer; thought: mean tokens.",
        ]
        if any(cut := [row["cut_thoughts"] for row in self.tasks]):
            lines.append(f"Up to {max(cut):.0%} of the thoughts were cut at the token limit.")
        return lines

    def plot(self, path: Path) -> None:
        """Draw a PNG: KL over size, with the Mac's limit; and answers, or KL over tokens/s."""
        rows = self.rows()
        kls = [max(row["mean_kl_nats"], 1e-9) for row in rows]
        with picture(path, (11, 4)) as (_, left, right):
            sides = [(left, "quantized_gb", "GB of the text model")]
            if self.tasks:
                outputs = [*rows, {"name": "SRC", **self.tasks[0]}]
                for key, label in TASKS.items():
                    shares = [100 * row[key] for row in outputs]
                    right.plot([row["name"] for row in outputs], shares, "o-", label=label)
                right.set(ylabel="% of answers", ylim=(-3, 103))
                right.tick_params(axis="x", rotation=15)
                right.legend()
            elif self.mac.gbps:
                title = f"{BANDWIDTH_LIMIT}, {self.mac.name}"
                sides.append((right, "bandwidth_limit_tps", title))
            for axes, key, label in sides:
                values = [row[key] for row in rows]
                axes.plot(values, kls, "o-")
                for row, x, y in zip(rows, values, kls, strict=True):
                    axes.annotate(row["name"], (x, y), xytext=(4, 4), textcoords="offset points")
                axes.set(xlabel=label, ylabel="KL(reference || quantized), nats", yscale="log")
            left.axvline(self.room_gb, linestyle="--", label=f"maximum of {self.mac.name}")
            left.set(xscale="log")
            left.legend()


def _squared_distance(a: list[mx.array], b: list[mx.array]) -> float:
    """The squared distance of the hidden states, summed one text at a time; at least 1e-30."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += float(mx.square(x.astype(mx.float32) - y.astype(mx.float32)).sum())
    return max(total, 1e-30)


def plot(report: Report, path: Path) -> None:
    """Draw a PNG: the errors of the layers, and the distribution of KL over tokens."""
    with picture(path, (11, 4)) as (_, left, right):
        indices = [layer.index for layer in report.layers]
        left.plot(indices, [layer.alone for layer in report.layers], "o-", label="this layer alone")
        accumulated = [layer.accumulated for layer in report.layers]
        left.plot(indices, accumulated, "s--", label="all layers up to it")
        left.set(xlabel="layer", ylabel="error / what the layer adds", yscale="log")
        left.legend()
        kls, mean, p99 = report.tokens.kls, report.tokens.mean_kl, report.tokens.p99_kl
        sorted_kls = np.maximum(np.sort(np.concatenate(kls)), 1e-9)
        right.plot(sorted_kls, np.linspace(0, 1, len(sorted_kls)))
        right.axvline(mean, linestyle=":", label=f"mean {mean:.4g}")
        right.axvline(p99, linestyle="--", label=f"99 % {p99:.4g}")
        right.set(xlabel="KL(reference || quantized), nats", ylabel="share of tokens", xscale="log")
        right.legend()
