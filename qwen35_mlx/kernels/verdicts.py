"""What was measured of the kernels on this machine, kept from one start to the next.

A verdict is about one operation at one model's shapes, one format of weights and one number of
tokens. It holds for a chip, an OS, an MLX and the text of the kernels.
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

# A gain that small may be noise.
MIN_SPEEDUP = 1.02
FOLDER = Path(__file__).parent
# In the text of each module that launches kernels.
LAUNCHES = b"\nfrom .metal import "


class Format(NamedTuple):
    """Of activations, and of weights; `bits` are 0 where they are not quantized."""

    dtype: str
    bits: int
    group_size: int


class Verdict(NamedTuple):
    """One operation at one size: whether its kernel is right, and how fast it and MLX are."""

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
        """What it is about."""
        return self[:6]

    @property
    def speedup(self) -> float:
        """Of the kernel over MLX; 0 if it is not right."""
        return self.mlx_us / self.metal_us if self.problem is None and self.metal_us else 0.0

    @property
    def is_faster(self) -> bool:
        """Whether the kernel is to be used."""
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
    """What verdicts depend on: chip, OS, MLX, and the kernels themselves."""
    return {
        "chip": str(mx.device_info().get("device_name", "?")),
        "os": operating_system(),
        "mlx": version("mlx"),
        "kernels": _digest_of_sources(FOLDER),
    }


@functools.cache
def _digest_of_sources(folder: Path) -> str:
    """Of the `.metal` files and the modules that launch them; a process has one text of them."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".metal" or (file.suffix == ".py" and LAUNCHES in file.read_bytes()):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def path() -> Path:
    """Where this machine's verdicts lie, whether there are any or not."""
    digest = hashlib.sha256(json.dumps(machine_key(), sort_keys=True).encode())
    return cache_home() / f"kernels-{digest.hexdigest()[:12]}.json"


def read() -> list[Verdict]:
    """This machine's verdicts; none where what is stored is of another, or damaged."""
    try:
        stored = json.loads(path().read_text(encoding="utf-8"))
        if stored["machine"] != machine_key():
            return []
        found = [Verdict(**verdict) for verdict in stored["verdicts"]]
        # Raises on figures that are no numbers.
        [v.mlx_us + v.metal_us + v.num_tokens for v in found]
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def write(found: Iterable[Verdict]) -> Path:
    """Store verdicts beside those that they do not replace, whole or not at all."""
    merged = {v.key: v for v in (*read(), *found)}
    target = path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            target, {"machine": machine_key(), "verdicts": [v._asdict() for v in merged.values()]}
        )
    except OSError as error:
        raise Qwen35Error(
            "what was measured of the kernels cannot be stored",
            got=error,
            expected=f"a folder to write to at {target.parent}",
            hint="set QWEN35_MLX_CACHE to another folder",
        ) from None
    return target
