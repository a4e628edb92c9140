"""Stores the measurements of the kernels on this machine.

A verdict is about one operation at one model's shapes, with one format of weights and one number of
tokens. It is valid for one chip, OS and version of MLX, and for the source of the kernels.
"""

import functools
import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..config import ModelConfig
from ..errors import Qwen35Error
from ..family import NOT_IN_CONFIG, Member
from ..files import cache_home, write_json
from ..machine import operating_system

# A smaller gain may be noise.
MIN_SPEEDUP = 1.02
FOLDER = Path(__file__).parent
# Text in the source of each module that launches kernels.
LAUNCHES = b"\nfrom .metal import "


class Format(NamedTuple):
    """The type of activations and the format of weights; `bits` are 0 if not quantized."""

    dtype: str
    bits: int
    group_size: int


class Verdict(NamedTuple):
    """The results for one operation at one size: a problem of the kernel, its time and MLX's."""

    op: str
    shape: str
    dtype: str
    bits: int
    group_size: int
    num_tokens: int
    error: float = 0.0
    problem: str | None = None
    metal_us: float = 0.0
    mlx_us: float = 0.0
    metal_gb_per_s: float = 0.0
    mlx_gb_per_s: float = 0.0

    @property
    def key(self) -> tuple[Any, ...]:
        """The fields that identify the verdict."""
        return self[:6]

    @property
    def speedup(self) -> float:
        """Speedup of the kernel over MLX; 0 if its result is wrong."""
        return self.mlx_us / self.metal_us if self.problem is None and self.metal_us else 0.0

    @property
    def is_faster(self) -> bool:
        """Whether the kernel should be used."""
        return self.speedup >= MIN_SPEEDUP


def shape_of(member: Member) -> str:
    """All sizes of a member that its kernels see."""
    unseen = "name", "num_hidden_layers", "tie_word_embeddings", "tower"
    return "-".join(str(size) for name, size in member._asdict().items() if name not in unseen)


def member_of(config: ModelConfig) -> Member:
    """The sizes of any model."""
    width = config.moe_intermediate_size if config.is_moe else config.intermediate_size
    shared = {key: getattr(config, key) for key in Member._fields if key not in NOT_IN_CONFIG}
    return Member("model", width=width, rotary_dim=config.rope.rotary_dim, **shared)


def machine_key() -> dict[str, str]:
    """The properties that verdicts depend on: chip, OS, MLX, and the kernels' source."""
    return {
        "chip": str(mx.device_info().get("device_name", "?")),
        "os": operating_system(),
        "mlx": version("mlx"),
        "kernels": _digest_of_sources(FOLDER),
    }


@functools.cache
def _digest_of_sources(folder: Path) -> str:
    """Digest of the `.metal` files and the modules that launch them; computed once a process."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".metal" or (file.suffix == ".py" and LAUNCHES in file.read_bytes()):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def path() -> Path:
    """The file for this machine's verdicts, which may not exist."""
    digest = hashlib.sha256(json.dumps(machine_key(), sort_keys=True).encode())
    return cache_home() / f"kernels-{digest.hexdigest()[:12]}.json"


def read() -> list[Verdict]:
    """This machine's verdicts; empty if the file is another machine's, or damaged."""
    try:
        stored = json.loads(path().read_text(encoding="utf-8"))
        if stored["machine"] != machine_key():
            return []
        found = [Verdict(**verdict) for verdict in stored["verdicts"]]
        # Raises if figures are no numbers.
        [v.mlx_us + v.metal_us + v.num_tokens for v in found]
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def write(found: Iterable[Verdict]) -> Path:
    """Store verdicts, atomically; the others in the file are kept."""
    merged = {v.key: v for v in (*read(), *found)}
    target = path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            target, {"machine": machine_key(), "verdicts": [v._asdict() for v in merged.values()]}
        )
    except OSError as error:
        raise Qwen35Error(
            "the measurements of the kernels cannot be stored",
            got=error,
            expected=f"a folder to write to at {target.parent}",
            hint="set QWEN35_MLX_CACHE to another folder",
        ) from None
    return target
