"""An adapter in mlx-lm's files: low-rank changes of matrices.

E experts, r rank. A change is `scale * b @ a`; `Change` has the layouts.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, ConfigError, first_line
from ..files import read_object, save_arrays, write_json
from .names import bare, output_name

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapters.safetensors"
LORA, DORA = "lora", "dora"
PARTS = ("lora_a", "lora_b", "m")


@dataclass(frozen=True)
class Change:
    """The change of one matrix `[out, in]`, or of a stack `[E, out, in]`.

    lora_a `[in, r]`, lora_b `[r, out]`; for a stack `[E, r, in]` and `[E, out, r]`. magnitudes
    `[out]`: the norms of the rows of the changed matrix, for DoRA.
    """

    lora_a: mx.array
    lora_b: mx.array
    scale: float
    magnitudes: mx.array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the changed weight."""
        a, b = self.lora_a.shape, self.lora_b.shape
        return (b[1], a[0]) if len(a) == 2 else (*b[:2], a[2])

    def of_rows(self, rows: mx.array, start: int) -> mx.array:
        """The changed rows in fp32; `rows` `[N, in]` are rows of the matrix from `start` on.

        A stack counts the rows of all its experts, one after the other.
        """
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        stop = start + rows.shape[0]
        if a.ndim == 2:
            delta = b.T[start:stop] @ a.T
        else:
            per_expert = b.shape[1]
            experts = range(start // per_expert, -(-stop // per_expert))
            firsts = [max(start - e * per_expert, 0) for e in experts]
            lasts = [min(stop - e * per_expert, per_expert) for e in experts]
            delta = mx.concatenate(
                [b[e, i:j] @ a[e] for e, i, j in zip(experts, firsts, lasts, strict=True)]
            )
        changed = rows.astype(mx.float32) + self.scale * delta
        if self.magnitudes is not None:
            norms = mx.linalg.norm(changed, axis=1, keepdims=True)
            changed *= self.magnitudes[start:stop, None].astype(mx.float32) / norms
        return changed


@dataclass(frozen=True)
class Adapter:
    """Changes by module, under the names of converted folders."""

    changes: Mapping[str, Change]
    # adapter_config.json, with the keys of other programs.
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def arrays(self) -> dict[str, mx.array]:
        """All arrays by their names in the file."""
        found: dict[str, mx.array] = {}
        for module, change in self.changes.items():
            found |= {f"{module}.lora_a": change.lora_a, f"{module}.lora_b": change.lora_b}
            if change.magnitudes is not None:
                found[f"{module}.m"] = change.magnitudes
        return found

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that changes what the adapter computes."""
        digest = hashlib.sha256(repr(sorted({c.scale for c in self.changes.values()})).encode())
        for name, array in sorted(self.arrays.items()):
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            # As bytes, because numpy has no bfloat16.
            digest.update(np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).data)
        return digest.hexdigest()

    def part(self, prefix: str) -> "Adapter":
        """Changes of the modules whose names begin with `prefix`, which is removed."""
        found = {
            name.removeprefix(prefix): change
            for name, change in self.changes.items()
            if name.startswith(prefix)
        }
        return Adapter(found, self.settings)


def read_adapter(folder: str | Path) -> Adapter:
    """The adapter in `folder`; raises ConfigError or CheckpointError."""
    folder = Path(folder).expanduser()
    if missing := [n for n in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / n).is_file()]:
        raise CheckpointError(
            f"{folder} has no adapter",
            got=f"no {' and no '.join(missing)}",
            expected=f"{CONFIG_FILE} and {WEIGHTS_FILE}, as `qwen35-mlx train` or mlx-lm writes",
        )
    settings = read_object(folder / CONFIG_FILE)
    kind = settings.get("fine_tune_type", LORA)
    if kind not in (LORA, DORA):
        raise ConfigError(
            f"an adapter with fine_tune_type={kind!r}",
            got=repr(kind),
            expected=f"{LORA} or {DORA}; full fine-tuning gives no adapter",
        )
    parameters = settings.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise ConfigError(
            f"{folder / CONFIG_FILE} has no scale",
            got=f"lora_parameters={parameters!r}"[:80],
            expected='"lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}',
        )
    try:
        arrays = cast(dict[str, mx.array], mx.load(str(folder / WEIGHTS_FILE)))
        mx.eval(arrays)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} cannot be read", got=first_line(error)
        ) from None
    return Adapter(_changes(arrays, float(scale), kind), settings)


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write both files, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    save_arrays(folder / WEIGHTS_FILE, adapter.arrays, {"format": "mlx"})
    write_json(folder / CONFIG_FILE, dict(adapter.settings))


def _changes(arrays: Mapping[str, mx.array], scale: float, kind: str) -> dict[str, Change]:
    """The changes in the arrays of a file; every array must belong to one."""
    modules: dict[str, dict[str, mx.array]] = {}
    wanted = PARTS if kind == DORA else PARTS[:2]
    unknown = []
    for name, array in arrays.items():
        path, _, part = name.rpartition(".")
        module = output_name(bare(path))
        is_of_text = module.startswith("language_model.")
        if part in wanted and is_of_text and mx.issubdtype(array.dtype, mx.floating):
            modules.setdefault(module, {})[part] = array
        else:
            unknown.append(f"{name} {array.dtype} {array.shape}")
    incomplete = [name for name, parts in modules.items() if len(parts) != len(wanted)]
    if unknown or incomplete or not modules:
        raise CheckpointError(
            f"these are not the tensors of a {kind} adapter",
            got="; ".join([*unknown, *incomplete][:4]) or "no tensors",
            expected=f"{', '.join(wanted)} in floating point for each matrix of the text model",
        )
    changes = {}
    for name, parts in modules.items():
        a, b, m = parts["lora_a"], parts["lora_b"], parts.get("m")
        # Stacks have the dims experts, rank, inputs.
        fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0]
        fits |= a.ndim == b.ndim == 3 and (a.shape[0], a.shape[1]) == (b.shape[0], b.shape[2])
        if not fits or (m is not None and (a.ndim != 2 or m.shape != (b.shape[1],))):
            shapes = ", ".join(f"{part} {array.shape}" for part, array in parts.items())
            raise CheckpointError(
                f"the shapes of the adapter's {name} do not fit together", got=shapes
            )
        changes[name] = Change(a, b, scale, m)
    return changes
