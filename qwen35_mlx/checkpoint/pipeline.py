"""Pipeline split: whole layers for each process of one model, and when to prefer it.

A split of every layer is faster, because all processes compute a token together. A split by whole
layers needs no equal parts: each process has as many layers as fit its memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from ..config import ModelConfig
from ..errors import Qwen35Error
from ..machine import parse_memory
from ..memory import DEFAULT_CONTEXT, MIN_SNAPSHOTS, count, kv_bytes, kv_capacity, state_bytes
from .sharding import LAYERS, NORM, Cut, Sharding


@dataclass(frozen=True)
class Pipeline:
    """Whole layers for process `rank`; rank 0 also has everything that is not in a layer."""

    config: ModelConfig
    rank: int
    # The end of each process's layers.
    ends: tuple[int, ...]

    @property
    def layers(self) -> tuple[int, int]:
        """The first layer of this process, and the end of its layers."""
        return (0, *self.ends)[self.rank], self.ends[self.rank]

    @property
    def local(self) -> ModelConfig:
        """The config of this part."""
        first, end = self.layers
        kinds = self.config.layer_types[first:end]
        return replace(self.config, layer_types=kinds, num_hidden_layers=end - first)

    @property
    def note(self) -> str:
        """The split in words, for the user."""
        counts = (str(end - first) for first, end in pairwise((0, *self.ends)))
        return "the Macs have whole layers, one after the other: " + " + ".join(counts)

    def cut(self, name: str) -> Cut | None:
        """None: parameters are whole; see `Sharding`."""
        return None

    def holds(self, name: str) -> bool:
        """Whether this rank has the parameter."""
        if (number := number_of_layer(name)) is None:
            return self.rank == 0 or name.startswith(NORM)
        first, end = self.layers
        return first <= number < end

    def name_here(self, name: str) -> str:
        """A parameter's name in the model of this rank, whose layers count from 0."""
        if (number := number_of_layer(name)) is None:
            return name
        rest = name.removeprefix(LAYERS).partition(".")[2]
        return f"{LAYERS}{number - self.layers[0]}.{rest}"


def number_of_layer(name: str) -> int | None:
    """The layer of a parameter, by its name on disk; None if it is in no layer."""
    return int(name.removeprefix(LAYERS).partition(".")[0]) if name.startswith(LAYERS) else None


def divide(
    config: ModelConfig,
    rank: int,
    limits: Sequence[int],
    nbytes: Mapping[str, int],
    group_sizes: Mapping[str, int],
    by_layers: bool = False,
) -> Sharding | Pipeline:
    """The part of process `rank`; every process comes to the same decision.

    `limits`: bytes that each process may use, or its share of the layers with `by_layers`.
    `nbytes`: bytes of all parameters by name. Every layer is split, unless that is impossible, or
    it does not fit some process and whole layers need less.
    """
    size = len(limits)
    rooms = list(limits) if by_layers else [_room(config, r, n) for r, n in enumerate(limits)]
    try:
        fewest, ends = _ends(config, rooms, nbytes)
        pipeline = Pipeline(config, rank, ends)
    except Qwen35Error:
        if by_layers:
            raise
        return Sharding(config, rank, size, group_sizes)
    if by_layers:
        return pipeline
    try:
        shardings = [Sharding(config, r, size, group_sizes) for r in range(size)]
    except Qwen35Error:
        return pipeline
    pairs = list(zip(shardings, rooms, strict=True))
    needed = max(_part_bytes(sharding, nbytes) / room for sharding, room in pairs)
    return shardings[rank] if needed <= max(1, fewest) else pipeline


def _room(config: ModelConfig, rank: int, limit_bytes: int) -> int:
    """Bytes for the weights, keys, values and states of one process."""
    context = min(config.context_length, DEFAULT_CONTEXT)
    c = count(config, 0, context, limit_bytes)
    pictures = c.pictures + c.features if rank == 0 else 0
    return max(limit_bytes - c.scores - c.activations - c.program - pictures, 1)


def _sequence_bytes(config: ModelConfig) -> int:
    """Bytes of the keys, values and states of a context."""
    context = kv_capacity(min(config.context_length, DEFAULT_CONTEXT))
    return kv_bytes(config, context) + (2 + MIN_SNAPSHOTS) * state_bytes(config)


def _part_bytes(part: Sharding, nbytes: Mapping[str, int]) -> float:
    """Bytes of one process's part of the weights and of a sequence."""
    total = float(_sequence_bytes(part.local))
    for name, number in nbytes.items():
        if part.holds(name):
            cut = part.cut(name)
            total += number * sum(b - a for a, b in cut.ranges) / cut.total if cut else number
    return total


def _ends(
    config: ModelConfig, rooms: Sequence[int], nbytes: Mapping[str, int]
) -> tuple[float, tuple[int, ...]]:
    """The share of the fullest memory, at its minimum, and the ends of each process's layers."""
    size, num_layers = len(rooms), config.num_hidden_layers
    if size > num_layers:
        raise Qwen35Error(
            "there are more Macs than layers", got=size, expected=f"at most {num_layers}"
        )
    layers = [
        _sequence_bytes(replace(config, layer_types=(kind,), num_hidden_layers=1))
        for kind in config.layer_types
    ]
    others = 0
    for name, number in nbytes.items():
        if (layer := number_of_layer(name)) is None:
            others += number
        else:
            layers[layer] += number
    sums = [0, *accumulate(layers)]
    # Dynamic programming: end of a process's layers -> share of the fullest so far, and all ends.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for rank, room in enumerate(rooms):
        held = others if rank == 0 else 0
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        for end in range(rank + 1, num_layers - size + rank + 2):
            found[end] = min(
                (max(full, (held + sums[end] - sums[start]) / room), (*ends, end))
                for start, (full, ends) in best.items()
                if start < end
            )
        best = found
    return best[num_layers]


def read_split(text: str, size: int) -> list[int]:
    """Parse shares of the layers, such as `192GB,96GB`, one for each of `size` processes."""
    shares = [parse_memory(each) for each in text.split(",")]
    if len(shares) != size:
        raise Qwen35Error(
            "the split does not fit the Macs",
            got=f"{len(shares)} parts for {size} Macs",
            expected="the memory of each, such as 192GB,96GB",
        )
    return shares
