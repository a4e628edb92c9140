"""Experts from disk: each layer keeps some in memory, and reads others when a token needs them.

N tokens, K experts per token, S slots of a layer, E experts, H hidden.
"""

import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.headers import ITEM_BYTES
from ..checkpoint.names import OF_EXPERTS
from ..checkpoint.resolver import Match, Part
from ..config import ModelConfig
from ..errors import MemoryRefused, Qwen35Error
from ..kernels.grouped_expert_matmul import expert_mlp
from ..kernels.matrix import MAX_ROWS, arrays_of
from ..kernels.switch import SORT_FROM, SwitchGLU
from ..kernels.tiers import Tiers
from ..machine import describe
from ..memory import PREFILL_STEP_SIZE, SWEEP_TOKENS
from .expert_files import ExpertFile, ExpertReader, Slots
from .feed_forward import SparseMoE

# Experts per layer whose bytes go into the model's digest.
DIGESTED_EXPERTS = 8


@dataclass
class ReadStats:
    """Counters of all layers; a call counts each of its experts once."""

    hits: int = 0
    misses: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """The share of requested experts that were in memory."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def gbps(self) -> float:
        """Read speed in 10^9 bytes per second."""
        return self.num_bytes / 1e9 / self.seconds if self.seconds else 0.0


class ExpertPool:
    """The experts of one layer: S of them in slots, with LRU replacement."""

    def __init__(self, reader: ExpertReader, num_slots: int, stats: ReadStats):
        self._reader, self._stats = reader, stats
        self._num_slots = num_slots
        # Experts in memory, the least recently used first; and empty slots.
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._empty = list(range(num_slots))
        # An array that may still have to be computed from the current slots.
        self._uses: mx.array | None = None

    def place(self, indices: mx.array) -> mx.array | None:
        """Read the experts `[N, K]`; returns their slots `[N, K]`, None if there are too few."""
        chosen = np.array(indices)
        needed = np.unique(chosen).tolist()
        if len(needed) > self._num_slots:
            return None
        missing = self._touch(needed)
        self._read(missing, self._victims({self._slots[e] for e in needed if e in self._slots}))
        return self._slots_of(chosen)

    def mlp(
        self, x: mx.array, indices: mx.array, scores: mx.array, experts: SwitchGLU, kernels: Tiers
    ) -> mx.array:
        """As `expert_mlp`; computes the experts in memory while it reads others.

        Each expert is read at most once, for any N.
        """
        num_tokens, per_token = indices.shape
        chosen = np.array(indices).ravel()
        here = by_last_use(chosen)
        todo = self._touch(here)
        here = [expert for expert in here if expert in self._slots]
        flat_scores = scores.reshape(-1, 1)
        parts: list[mx.array] = []
        places: list[np.ndarray] = []
        busy: set[int] = set()
        while here or todo:
            if len(parts) > 1:
                mx.eval(parts[-2])
            batch, here = here, []
            if not batch:
                free = self._victims(busy)
                half = (self._num_slots + 1) // 2
                if len(free) < min(len(todo), half):
                    # The slots that are in use are needed too: wait for them.
                    mx.eval(parts[-1])
                    free = self._victims(set())
                if len(todo) > len(free):
                    free = free[:half]
                batch, todo = todo[: len(free)], todo[len(free) :]
                self._read(batch, free)
            pairs = np.flatnonzero(np.isin(chosen, batch))
            # Enough rows to take the same of the two matmul paths as the whole call.
            rows = np.resize(pairs, max(len(pairs), min(len(chosen), SORT_FROM)))
            at, slots = mx.array(rows), self._slots_of(chosen[rows][:, None])
            part = expert_mlp(x[at // per_token], slots, flat_scores[at], experts, kernels)
            parts.append(part[: len(pairs)])
            mx.async_eval(parts[-1])
            places.append(pairs)
            busy = {self._slots[expert] for expert in batch}
        summed = []
        for start in range(0, num_tokens, PREFILL_STEP_SIZE):
            # Pairs are sorted within a part, so these tokens' pairs are contiguous.
            ends = [start * per_token, (start + PREFILL_STEP_SIZE) * per_token]
            cuts = [np.searchsorted(pairs, ends).tolist() for pairs in places]
            out = mx.concatenate([part[a:b] for part, (a, b) in zip(parts, cuts, strict=True)])
            order = [pairs[a:b] for pairs, (a, b) in zip(places, cuts, strict=True)]
            if len(order) > 1:
                out = out[mx.array(np.argsort(np.concatenate(order)))]
            summed.append(out.reshape(-1, per_token, out.shape[-1]).sum(axis=1))
            if num_tokens > PREFILL_STEP_SIZE:
                mx.eval(summed[-1])
        return mx.concatenate(summed)

    def is_used_by(self, out: mx.array) -> None:
        """Do not change the slots until `out`, which is computed from them, is evaluated."""
        self._settle()
        # Start it here: another thread that waits for it could not start it.
        mx.async_eval(out)
        self._uses = out
        if out.shape[0] > MAX_ROWS:
            # Too large to keep a reference.
            self._settle()

    def _settle(self) -> None:
        if self._uses is not None:
            mx.eval(self._uses)
            self._uses = None

    def _touch(self, experts: Sequence[int]) -> list[int]:
        """Mark experts as used, in their order; return the missing ones."""
        missing = []
        for expert in experts:
            if expert in self._slots:
                self._slots.move_to_end(expert)
            else:
                missing.append(expert)
        self._stats.hits += len(experts) - len(missing)
        return missing

    def _victims(self, busy: set[int]) -> list[int]:
        """Slots that may be filled: empty ones, then the least recently used."""
        return [*self._empty, *(slot for slot in self._slots.values() if slot not in busy)]

    def _read(self, experts: Sequence[int], slots: Sequence[int]) -> None:
        """Read the experts into the first of the slots."""
        if not experts:
            return
        self._settle()
        slots = slots[: len(experts)]
        lost = set(slots)
        self._slots = OrderedDict((e, s) for e, s in self._slots.items() if s not in lost)
        # Empty until all are read: an error or interrupt must not leave a partial expert.
        self._empty = [*lost, *(slot for slot in self._empty if slot not in lost)]
        started = time.perf_counter()
        pairs = list(zip(experts, slots, strict=True))
        self._reader.read(pairs)
        self._stats.seconds += time.perf_counter() - started
        self._slots.update(pairs)
        self._empty = self._empty[len(lost) :]
        self._stats.misses += len(experts)
        self._stats.num_bytes += len(experts) * self._reader.expert_bytes

    def _slots_of(self, experts: np.ndarray) -> mx.array:
        # Vectorised, because a prompt has hundreds of thousands of pairs.
        table = np.zeros(max(self._slots) + 1, np.uint32)
        table[[*self._slots]] = [*self._slots.values()]
        return mx.array(table[experts])


class Experts:
    """The pools of all layers of a model."""

    def __init__(self, config: ModelConfig, matches: Iterable[Match], memory_bytes: int):
        """`matches`: the stacks of experts; `memory_bytes`: for experts in memory."""
        if not config.is_moe:
            raise Qwen35Error(
                "experts_memory is given for a model without experts",
                got=f"{memory_bytes / 1e9:.3g} GB",
                expected="a model with experts, or no experts_memory",
            )
        self._matches = list(matches)
        self._on_cpu = mx.default_device() == mx.Device(mx.cpu)
        each = slot_bytes(self._matches, self._on_cpu)
        self.num_experts = config.num_experts
        self.num_slots = min(memory_bytes // each, config.num_experts)
        if self.num_slots < config.num_experts_per_tok:
            raise MemoryRefused(
                "too little memory for the experts of one token",
                got=f"{memory_bytes / 1e9:.3g} GB: {self.num_slots} experts of each layer",
                expected=f"at least {config.num_experts_per_tok * each / 1e9:.3g} GB for "
                f"{config.num_experts_per_tok} of {config.num_experts}",
                hint="a shorter --context, or fewer bits: qwen35-mlx plan SRC shows what fits",
            )
        self.nbytes = self.num_slots * each
        self.sweep_tokens = SWEEP_TOKENS
        self.stats = ReadStats()
        self._readers: list[ExpertReader] = []

    def __str__(self) -> str:
        text = f"{self.num_slots} of {self.num_experts} of each layer in {self.nbytes / 1e9:.3g} GB"
        if self.stats.misses:
            text += f" · {self.stats.hit_rate:.1%} hits · {self.stats.gbps:.2f} GB/s read"
        return text

    @cached_property
    def digest(self) -> str:
        """SHA-256 of a few bytes of some experts of each layer, from the files."""
        experts = range(0, self.num_experts, -(-self.num_experts // DIGESTED_EXPERTS))
        samples = (reader.sample(expert) for reader in self._readers for expert in experts)
        return hashlib.sha256(b"".join(samples)).hexdigest()

    def figures(self) -> dict[str, float]:
        """Counters for benches and the server's metrics."""
        stats = self.stats
        return {
            "experts": self.num_experts,
            "expert_slots": self.num_slots,
            "expert_hits_total": stats.hits,
            "expert_misses_total": stats.misses,
            "expert_read_bytes_total": stats.num_bytes,
            "expert_read_seconds": stats.seconds,
            "expert_hit_rate": stats.hit_rate,
            "expert_gb_per_s": stats.gbps,
        }

    @property
    def holds_all(self) -> bool:
        """Whether every expert has a slot."""
        return self.num_slots == self.num_experts

    def attach(self, model: Any) -> dict[str, mx.array]:
        """Give each layer its pool; returns the arrays of the slots by parameter name."""
        files: dict[Path, ExpertFile] = {}
        arrays: dict[str, mx.array] = {}
        for i, layer in enumerate(model.layers):
            assert isinstance(layer.mlp, SparseMoE)
            slots = []
            prefix = f"layers.{i}.mlp{OF_EXPERTS}"
            for match in self._matches:
                if prefix not in match.name:
                    continue
                for part in match.parts:
                    slots.append(Slots(part, self.num_slots, self._on_cpu))
                    arrays[part.name] = slots[-1].array
                    for segment in part.segments:
                        file = segment.tensor.file
                        files[file] = files.get(file) or ExpertFile(file)
            reader = ExpertReader(slots, files)
            self._readers.append(reader)
            layer.mlp.pool = ExpertPool(reader, self.num_slots, self.stats)
        if self.nbytes > describe().memory_bytes / 2:
            # The page cache could hold little else than the pool does.
            for opened in files.values():
                opened.bypass_cache()
        return arrays


def stack_bytes(model: nn.Module) -> int:
    """Bytes of all routed experts of a model."""
    stacks = [layer.mlp.switch_mlp.parameters() for layer in model.layers]
    return sum(array.nbytes for array in arrays_of(stacks).values())


def slot_bytes(matches: Iterable[Match], on_cpu: bool) -> int:
    """Memory of one expert in every layer."""
    parts = [part for match in matches for part in match.parts]
    return sum(part_bytes(part, on_cpu) // part.shape[0] for part in parts)


def part_bytes(part: Part, on_cpu: bool = False) -> int:
    """Memory of a tensor; on the CPU floats are float32."""
    stored = part.segments[0].tensor.dtype
    widened = 2 if on_cpu and stored in ("BF16", "F16") else 1
    return widened * math.prod(part.shape) * ITEM_BYTES[stored]


def by_last_use(chosen: np.ndarray) -> list[int]:
    """The distinct experts in order of their last use: late ones are likely to be used next."""
    experts, last = np.unique(chosen[::-1], return_index=True)
    return experts[np.argsort(-last)].tolist()
