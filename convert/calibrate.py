"""Runs a text through a source checkpoint and collects statistics for quantization."""

# B texts, T tokens, H hidden size, I inputs of a matrix, E experts.

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwen35_mlx.model.language import DecoderLayer
from qwen35_mlx.progress import StepProgress
from qwen35_mlx.quant.divergence import kl_divergence
from qwen35_mlx.quant.gptq import feedback_gain
from qwen35_mlx.quant.statistics import (
    Calibration,
    Moments,
    input_name,
    option_errors,
    rounded,
    search_gain,
    unit_of,
)

from .calibration_text import digest, sketch
from .layerwise import LAYER, Layerwise, SourceCheckpoint, matrices, run_layer, watched

# In models up to this size, the KL of each unit is measured, quantized alone with these settings.
MEASURED_PARAMETERS = 3 * 10**9
MEASURED_BITS = (3, 5)
MEASURED_GROUP_SIZES = (64, 32)
MEASURED_TOKENS = 1024


def calibrate(
    source: str | Path,
    ids: mx.array,
    *,
    hessians: bool = False,
    keep_hessians: bool = True,
    measure: bool | None = None,
    progress: StepProgress = lambda done, total, step: None,
) -> Calibration:
    """Statistics of the inputs of every matrix for ids `[B, T]`, and the error of each setting.

    hessians: also collect I * I float32 for each input, or for each expert if that is less than
    3 GB. keep_hessians: keep them in the result; otherwise only the errors use them, one layer at
    a time. measure: also measure the KL of each unit quantized alone, with the whole model in
    memory; by default up to 3 B parameters. Otherwise holds one layer of the source (12.9 GB of
    the 397B in bf16, and 4.3 GB more while its largest stack is assembled), its moments, and
    B * T * H activations.
    """
    checkpoint = SourceCheckpoint(Path(source).expanduser())
    if measure is None:
        measure = checkpoint.num_parameters <= MEASURED_PARAMETERS
    calibrator = _Calibrator(checkpoint, ids, hessians, keep_hessians, progress)
    calibrator.collect_all(keep=measure)
    if measure:
        calibrator.measure_all()
    return calibrator.result


@contextmanager
def collecting(
    root: nn.Module, prefix: str, num_experts: int, hessians: bool
) -> Iterator[dict[str, Moments]]:
    """Within the block, collect the moments of all inputs in `root`, by name of input."""
    moments: dict[str, Moments] = {}
    first: dict[str, str] = {}

    def record(module: str, x: mx.array, args: tuple[Any, ...]) -> None:
        name = input_name(prefix + module)
        # Modules with the same input are called with the same rows: only the first is counted.
        if name is None or first.setdefault(name, module) != module:
            return
        experts = None
        if args:
            # For few tokens, the experts of a token are called with one row.
            x, experts = mx.broadcast_to(x, (*args[0].shape, *x.shape[-2:])), args[0].flatten()
        if name not in moments:
            owners = 0 if experts is None else num_experts
            moments[name] = Moments(x.shape[-1], owners, hessians)
        moments[name].add(x.reshape(-1, x.shape[-1]), experts)

    with watched(root, record):
        yield moments


@dataclass
class _Calibrator:
    checkpoint: SourceCheckpoint
    ids: mx.array
    hessians: bool
    keep_hessians: bool
    progress: StepProgress

    def __post_init__(self) -> None:
        self.model = Layerwise(self.checkpoint)
        planned, ids = self.checkpoint.plan, self.ids
        self.result = Calibration(
            planned.source.origin["source"], planned.layout, digest(ids), ids.size, sketch(ids)
        )
        # By module: the error of GPTQ relative to plain rounding.
        self.gains: dict[str, float] = {}
        # To measure KL: the layers, and for some texts the inputs of each layer and of the head.
        self.num_measured = max(MEASURED_TOKENS // ids.shape[1], 1)
        self.layers: list[DecoderLayer] = []
        self.inputs: list[list[mx.array]] = []

    def collect_all(self, keep: bool) -> None:
        """Collect statistics layer by layer; `keep`: keep layers and inputs for `measure_all`."""
        hidden = self.model.embed(self.ids)
        num_layers = self.checkpoint.config.num_hidden_layers
        for index in range(num_layers):
            self.progress(index, num_layers, f"layer {index}")
            layer = self.model.layer(index)
            if keep:
                self.layers.append(layer)
                self.inputs.append(hidden[: self.num_measured])
            with self._collecting(layer, LAYER.format(index)):
                hidden = run_layer(layer, hidden)
        self.inputs.append(hidden[: self.num_measured])
        with self._collecting(self.model.ends, ""):
            for _, _, logits in self.model.logits(hidden):
                mx.eval(logits)

    @contextmanager
    def _collecting(self, root: nn.Module, prefix: str) -> Iterator[None]:
        """Within the block, collect moments of the inputs in `root`; then compute the errors."""
        num_experts, result = self.checkpoint.config.num_experts, self.result
        with collecting(root, prefix, num_experts, self.hessians) as moments:
            yield
        result.add(moments)
        for path, matrix in matrices(root).items():
            if (module := prefix + path) in self.checkpoint.quantizable:
                second, hessian = result.of(module)
                gain = self.gains[module] = 1.0 if hessian is None else feedback_gain(hessian)
                errors = option_errors(matrix.weight, second)
                result.errors[module] = {setting: gain * error for setting, error in errors.items()}
        if not self.keep_hessians:
            result.hessians.clear()

    def measure_all(self) -> None:
        """Measure the KL of each unit: round its weights, run the later layers, compare logits."""
        reference = [logits for _, _, logits in self.model.logits(self.inputs[-1])]
        mx.eval(reference)
        # The modules of each unit, and the first layer that has to run again.
        units: dict[str, dict[str, nn.Module]] = {}
        starts: dict[str, int] = {}
        layers = [(layer, LAYER.format(i), i) for i, layer in enumerate(self.layers)]
        for root, prefix, index in [(self.model.ends, "", -1), *layers]:
            for path, module in matrices(root).items():
                if (name := prefix + path) in self.result.errors:
                    units.setdefault(unit_of(name), {})[name] = module
                    is_head = name.endswith("lm_head")
                    starts[unit_of(name)] = len(self.layers) if is_head else index
        for done, (unit, members) in enumerate(units.items()):
            modules = list(members.values())
            gain = sum(self.gains[name] for name in members) / len(members)
            inputs = math.gcd(*(module.weight.shape[-1] for module in modules))
            group_size = next(g for g in MEASURED_GROUP_SIZES if inputs % g == 0)
            for bits in MEASURED_BITS:
                self.progress(done, len(units), f"{unit} at {bits} bits")
                kl = self._kl(modules, (bits, group_size), starts[unit], reference)
                # Measured with mx.quantize; search and GPTQ have a lower error.
                kl *= gain * search_gain(bits, group_size)
                self.result.kls.setdefault(unit, {})[bits, group_size] = kl

    def _kl(
        self,
        modules: Sequence[nn.Module],
        setting: tuple[int, int],
        start: int,
        reference: Sequence[mx.array],
    ) -> float:
        """Mean KL with these modules rounded; runs layers from `start` on, -1: the embedding."""
        weights = [module.weight for module in modules]
        for module in modules:
            module.weight = rounded(module.weight, setting)
        hidden = (
            self.inputs[start] if start >= 0 else self.model.embed(self.ids[: self.num_measured])
        )
        for layer in self.layers[max(start, 0) :]:
            hidden = run_layer(layer, hidden)
        logits = (logits for _, _, logits in self.model.logits(hidden))
        kls = [kl_divergence(*pair) for pair in zip(reference, logits, strict=True)]
        mean = float(mx.concatenate(kls).mean())
        for module, weight in zip(modules, weights, strict=True):
            module.weight = weight
        return mean
