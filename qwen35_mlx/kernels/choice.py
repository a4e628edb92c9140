"""Which kernels a model runs: all, none, or those that this machine's doctor found faster."""

import hashlib
import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import __version__
from ..config import ModelConfig
from ..errors import Qwen35Error
from ..files import cache_home, write_json
from ..machine import operating_system
from .metal import NONE, OPS, KernelSet

KERNELS = ("auto", "ops", "metal")
# A gain that small may be noise.
MIN_SPEEDUP = 1.02


def require(kernels: str) -> None:
    """Raise Qwen35Error for what is none of auto, ops and metal, or cannot be had here."""
    if kernels not in KERNELS:
        raise Qwen35Error(
            "no such choice of kernels",
            got=repr(kernels),
            expected=", ".join(map(repr, KERNELS)),
        )
    if kernels == "metal" and (problem := unavailable()):
        raise Qwen35Error(
            "Metal kernels cannot run here",
            got=problem,
            expected="a Mac with Apple silicon, on its GPU",
            hint="kernels='auto' runs everywhere",
        )


def choose(kernels: str, config: ModelConfig) -> KernelSet:
    """The operations that run as kernels for `kernels`, one of auto, ops and metal."""
    require(kernels)
    if kernels == "metal":
        return frozenset(OPS)
    return NONE if kernels == "ops" or unavailable() else faster(read(), config)


def unavailable() -> str | None:
    """Why kernels cannot run; None if they can."""
    if not mx.metal.is_available():
        return "no Metal on this machine"
    if sys.platform == "darwin" and mx.default_device() == mx.Device(mx.cpu):
        return "the CPU as default device"
    return None


def faster(found: Mapping[str, Any], config: ModelConfig) -> KernelSet:
    """Operations whose kernel matched, and was faster at this model's shapes.

    Where the model is none of the measured ones: faster at every shape measured.
    """
    own = shape_key(config)
    chosen = set()
    for op in OPS:
        result = found.get(op) or {}
        speedups = {shape: float(s) for shape, s in (result.get("speedup") or {}).items()}
        relevant = [speedups[own]] if own in speedups else list(speedups.values())
        if result.get("matched") is True and relevant and min(relevant) >= MIN_SPEEDUP:
            chosen.add(op)
    return frozenset(chosen)


def shape_key(config: Any) -> str:
    """What tells the shapes of family members apart, of a ModelConfig or of a checks.Member."""
    return f"{config.hidden_size}-{config.linear_num_value_heads}-{config.num_experts}"


def machine_key() -> dict[str, str]:
    """What a result depends on: chip, OS, MLX, and the kernels themselves."""
    digest = hashlib.sha256(__version__.encode())
    for file in sorted(files(__package__).iterdir(), key=lambda f: f.name):
        if file.name.endswith((".metal", ".py")):
            digest.update(file.name.encode() + file.read_bytes())
    return {
        "chip": str(mx.device_info().get("device_name", "?")),
        "os": operating_system(),
        "mlx": version("mlx"),
        "kernels": digest.hexdigest()[:16],
    }


def result_path() -> Path:
    """Where this machine's result lies, whether there is one or not."""
    digest = hashlib.sha256(json.dumps(machine_key(), sort_keys=True).encode())
    return cache_home() / f"kernels-{digest.hexdigest()[:12]}.json"


def read() -> dict[str, Any]:
    """Results of the doctor by operation; empty where there is no readable one of this machine."""
    try:
        stored = json.loads(result_path().read_text(encoding="utf-8"))
        if stored["machine"] != machine_key():
            return {}
        found = stored["kernels"]
        # Raises on anything that `faster` could not use.
        for result in found.values():
            [float(s) for s in (result.get("speedup") or {}).values()]
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write(found: Mapping[str, Any]) -> Path:
    """Store results by operation, whole or not at all."""
    path = result_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"machine": machine_key(), "kernels": dict(found)})
    except OSError as error:
        raise Qwen35Error(
            "the doctor's result cannot be stored",
            got=error,
            expected=f"a folder to write to at {path.parent}",
            hint="set QWEN35_MLX_CACHE to another folder",
        ) from None
    return path
