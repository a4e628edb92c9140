"""Statistics of a calibration: second moments of inputs, Hessians, the error of each setting."""

# N rows, I inputs, E experts.

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from qwen35_mlx.checkpoint.quantization import BITS, GROUP_SIZES
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.files import save_arrays, write_errors

from .affine import dequantize, quantize

FORMAT = "qwen35-mlx calibration 1"
# Weight of the layer's mean in the mean of each expert, in tokens.
FLOOR_TOKENS = 16
# Number of weights in the sample of `option_errors`.
SAMPLE_WEIGHTS = 2**16
MAX_HESSIAN_BYTES = 3 * 10**9
Setting = tuple[int, int]  # bits, group_size
SETTINGS: tuple[Setting, ...] = tuple((b, g) for b in BITS for g in GROUP_SIZES)

# Matrices that read the same input share its statistics.
_READ_INPUT = (
    "in_proj_qkv in_proj_z q_proj k_proj v_proj gate shared_expert_gate gate_proj up_proj lm_head"
).split()
_READ_HIDDEN = ("out_proj", "o_proj", "down_proj")


def unit_of(module: str) -> str:
    """The module whose settings this one shares: a fused kernel reads gate and up as one matrix."""
    stem, _, last = module.rpartition(".")
    return f"{stem}.gate_proj" if last == "up_proj" else module


def input_name(module: str) -> str | None:
    """The name of a module's input, `….mlp.up_proj` -> `….mlp.input`; None: no statistics."""
    parent, _, last = module.rpartition(".")
    if last in _READ_HIDDEN:
        return f"{parent}.hidden"
    # Router, shared expert and its gate all read the output of the layer's norm.
    return f"{parent.removesuffix('.shared_expert')}.input" if last in _READ_INPUT else None


class Moments:
    """Sums over tokens of x^2, and with `hessian` of x x^T, for one input; one sum per expert."""

    def __init__(self, inputs: int, num_experts: int = 0, hessian: bool = False):
        self.counts = np.zeros(max(num_experts, 1), dtype=np.int64)
        self.sums = mx.zeros((max(num_experts, 1), inputs))
        # If one Hessian per expert takes too much memory, all experts share one.
        fits = 4 * num_experts * inputs * inputs <= MAX_HESSIAN_BYTES
        num_hessians = len(self.counts) if fits else 1
        self.outer = mx.zeros((num_hessians, inputs, inputs)) if hessian else None

    def add(self, x: mx.array, experts: mx.array | None = None) -> None:
        """Add rows `[N, I]`; `experts [N]`: the expert that reads each row."""
        x = x.astype(mx.float32)
        owners = np.zeros(x.shape[0], np.int64) if experts is None else np.array(experts)
        self.counts += np.bincount(owners, minlength=len(self.counts))
        self.sums = self.sums.at[mx.array(owners)].add(mx.square(x))
        if self.outer is not None:
            owners = owners if len(self.outer) == len(self.counts) else np.zeros_like(owners)
            for owner in np.unique(owners):
                rows = x[mx.array(np.flatnonzero(owners == owner))]
                self.outer = self.outer.at[int(owner)].add(rows.T @ rows)
        mx.eval(self.sums, self.outer if self.outer is not None else [])

    def means(self) -> mx.array:
        """The mean of x^2, `[I]` or `[E, I]`; with few tokens, shrunk to that of all experts."""
        return self._means(self.sums, FLOOR_TOKENS)

    def hessians(self) -> mx.array | None:
        """The mean of x x^T, `[I, I]` or `[E, I, I]`; shrunk more than `means`."""
        if self.outer is None:
            return None
        # With fewer tokens than inputs, GPTQ would allow any error in directions without data.
        return self._means(self.outer, max(FLOOR_TOKENS, self.outer.shape[-1] // 2))

    def _means(self, sums: mx.array, floor: int) -> mx.array:
        mean = sums.sum(axis=0) / max(int(self.counts.sum()), 1)
        if len(sums) == 1:
            return mean
        counts = mx.array((self.counts + floor).astype(np.float32))
        return (sums + floor * mean) / counts.reshape(-1, *[1] * (sums.ndim - 1))


@dataclass
class Calibration:
    """All statistics of a source: arrays by name of input, errors by name of module."""

    # Name of the source, digest of its modules' names and shapes, digest of the token ids.
    source: str
    layout: str
    text: str
    num_tokens: int
    # A sample of the text's n-grams in base64; empty in files of earlier versions.
    ngrams: str = ""
    moments: dict[str, mx.array] = field(default_factory=dict)
    hessians: dict[str, mx.array] = field(default_factory=dict)
    # Squared error of the output relative to its energy, and KL in nats if it was measured, for
    # each setting; with Hessians, those of GPTQ.
    errors: dict[str, dict[Setting, float]] = field(default_factory=dict)
    kls: dict[str, dict[Setting, float]] = field(default_factory=dict)
    # Loss after an earlier distillation relative to before, by module.
    left: dict[str, float] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A digest of everything except the arrays."""
        return hashlib.sha256(repr(sorted(_metadata(self).items())).encode()).hexdigest()[:16]

    @property
    def facts(self) -> dict[str, Any]:
        """What config.json of a converted folder says about the text."""
        return {"text": self.text, "num_tokens": self.num_tokens, "ngrams": self.ngrams}

    def add(self, moments: Mapping[str, Moments]) -> None:
        """Add the means of `moments`, which are by name of input."""
        for name, moment in moments.items():
            self.moments[name] = moment.means()
            if (hessian := moment.hessians()) is not None:
                self.hessians[name] = hessian
        mx.eval(self.moments, self.hessians)

    def of(self, module: str, expert: int | None = None) -> tuple[mx.array | None, mx.array | None]:
        """Second moments and Hessian of a module's input; `expert`: those of one expert."""
        name = input_name(module) or ""
        moments, hessian = self.moments.get(name), self.hessians.get(name)
        if expert is not None:
            moments = moments[expert] if moments is not None and moments.ndim == 2 else moments
            hessian = hessian[expert] if hessian is not None and hessian.ndim == 3 else hessian
        return moments, hessian


def save(calibration: Calibration, path: Path) -> None:
    """Write a calibration atomically as safetensors. Raises Qwen35Error if it cannot be written."""
    arrays = {f"{name}.moments": a for name, a in calibration.moments.items()}
    arrays |= {f"{name}.hessian": a for name, a in calibration.hessians.items()}
    with write_errors(path):
        save_arrays(path, arrays, _metadata(calibration))


def load(path: Path) -> Calibration:
    """Read a file of `save`. Raises Qwen35Error if it is missing or not a calibration."""
    hint = "create one with: qwen35-mlx convert SRC OUT --calibrate"
    try:
        read: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = read
        # Evaluated here, because other threads will use the arrays.
        mx.eval(arrays)
        if (found := metadata.get("format")) != FORMAT:
            raise ValueError(f"format {found}, expected {FORMAT}")
        calibration = Calibration(
            metadata["source"],
            metadata["layout"],
            metadata["text"],
            int(metadata["num_tokens"]),
            metadata.get("ngrams", ""),
            left=json.loads(metadata.get("left", "{}")),
            errors=_parse(metadata["errors"]),
            kls=_parse(metadata["kls"]),
        )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Qwen35Error(f"{path} cannot be read as a calibration", got=error, hint=hint) from None
    for name, array in arrays.items():
        stem, _, kind = name.rpartition(".")
        (calibration.moments if kind == "moments" else calibration.hessians)[stem] = array
    return calibration


def _metadata(calibration: Calibration) -> dict[str, str]:
    return {
        "format": FORMAT,
        "source": calibration.source,
        "layout": calibration.layout,
        "text": calibration.text,
        "num_tokens": str(calibration.num_tokens),
        **({"ngrams": calibration.ngrams} if calibration.ngrams else {}),
        **({"left": json.dumps(calibration.left)} if calibration.left else {}),
        "hessians": str(bool(calibration.hessians)),
        "errors": _dump(calibration.errors),
        "kls": _dump(calibration.kls),
    }


def _dump(table: dict[str, dict[Setting, float]]) -> str:
    return json.dumps(
        {name: {f"{b},{g}": v for (b, g), v in row.items()} for name, row in table.items()}
    )


def _parse(text: str) -> dict[str, dict[Setting, float]]:
    table: dict[str, dict[Setting, float]] = {}
    for name, row in json.loads(text).items():
        keys = (key.split(",") for key in row)
        settings = [(int(bits), int(group_size)) for bits, group_size in keys]
        table[name] = dict(zip(settings, map(float, row.values()), strict=True))
    return table


def option_errors(w: mx.array, moments: mx.array | None) -> dict[Setting, float]:
    """The error of `search` for each setting that fits `w [..., I]`, relative to the energy.

    Error and energy are those of the output, for uncorrelated inputs with `moments [I]` or
    `[E, I]`. An estimate, 50 times faster than the search: the error of mx.quantize on a sample of
    rows, times `search_gain`.
    """
    rows = w.reshape(-1, w.shape[-1])
    weight = mx.ones((1, w.shape[-1])) if moments is None else moments.reshape(-1, w.shape[-1])
    step = max(rows.size // SAMPLE_WEIGHTS, 1)
    picked = mx.arange(step // 2, rows.shape[0], step)
    # All rows of an expert have the moments of that expert.
    weight = weight[picked * weight.shape[0] // rows.shape[0]]
    sample = rows[picked].astype(mx.float32)
    lost = _minmax_errors(sample, weight, [s for s in SETTINGS if w.shape[-1] % s[1] == 0])
    return {setting: error * search_gain(*setting) for setting, error in lost.items()}


def _minmax_errors(
    rows: mx.array, weight: mx.array, settings: Iterable[Setting]
) -> dict[Setting, float]:
    energy = float((mx.square(rows) * weight).sum())
    errors = {}
    for setting in settings:
        lost = float((mx.square(rounded(rows, setting) - rows) * weight).sum())
        errors[setting] = lost / energy if energy > 0 else 0.0
    return errors


def rounded(w: mx.array, setting: Setting) -> mx.array:
    """The weight after mx.quantize and mx.dequantize."""
    bits, group_size = setting
    parts = mx.quantize(w, group_size=group_size, bits=bits)
    back = mx.dequantize(*parts, group_size=group_size, bits=bits)
    mx.eval(back)
    return back


@cache
def typical_errors() -> dict[Setting, float]:
    """The error of `search` for each setting on Gaussian weights, relative to their energy."""
    w = _gaussian()
    errors = {}
    for setting in SETTINGS:
        back = dequantize(*quantize(w, *setting, "search"), *setting)
        errors[setting] = float(mx.square(back - w).sum() / mx.square(w).sum())
    return errors


@cache
def search_gain(bits: int, group_size: int) -> float:
    """The error of `search` relative to that of mx.quantize, on Gaussian weights."""
    setting = bits, group_size
    plain = _minmax_errors(_gaussian(), mx.ones((1, 1)), [setting])
    return typical_errors()[setting] / plain[setting]


def _gaussian() -> mx.array:
    return mx.random.normal((64, 512), key=mx.random.key(0))
