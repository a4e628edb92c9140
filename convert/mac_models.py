"""Macs by name, and for a plan: the bandwidth limit of decoding, several Macs, experts on disk."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from qwen35_mlx.checkpoint.headers import ITEM_BYTES
from qwen35_mlx.checkpoint.names import OF_EXPERTS, TOWER, is_mtp
from qwen35_mlx.checkpoint.pipeline import Pipeline, divide
from qwen35_mlx.checkpoint.sharding import Sharding
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.machine import GIB, bandwidth_gbps, default_limit_bytes, describe, parse_memory
from qwen35_mlx.memory import MemoryCount, count, decode_bytes, room_for_experts

from .plan import Entry, Plan


@dataclass(frozen=True)
class Mac:
    """A chip with a memory size; `gbps` is the memory bandwidth in 10^9 bytes/s, 0 if unknown."""

    chip: str
    memory_gib: float
    gbps: float

    @property
    def name(self) -> str:
        return f"{self.chip} {self.memory_gib:g} GB".strip()

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)

    @property
    def gpu_limit_bytes(self) -> int:
        """The default limit of macOS."""
        return default_limit_bytes(self.memory_bytes)


def _mac(chip: str, memory_gib: float) -> Mac:
    return Mac(chip, memory_gib, bandwidth_gbps(chip, memory_gib) or 0)


# Chips of the Macs with a memory size in GiB.
CHIPS = {
    96: ("M2 Max", "M3 Max", "M3 Ultra"),
    128: ("M1 Ultra", "M2 Ultra", "M3 Max", "M4 Max", "M5 Max"),
    192: ("M2 Ultra",),
    256: ("M3 Ultra",),
    512: ("M3 Ultra",),
}
MACS = tuple(_mac(chip, memory) for memory, chips in CHIPS.items() for chip in chips)
# Assumptions for experts on disk: 10^9 bytes/s of the SSD in such a Mac, the share of the memory
# bandwidth that decoding reaches, and the seconds that a layer waits for its router.
SSD_GBPS, EFFICIENCY, ROUTER_S = 7.4, 0.46, 0.000_25
# Shares of experts that are not in memory: for one topic, in between, and after a change of topic.
MISS_RATES = (0.07, 0.20, 0.35)
# Title of a column: the limit is not a measured speed.
BANDWIDTH_LIMIT = "bandwidth limit, tok/s"


def this_mac() -> Mac | None:
    """This machine; None if it is not a Mac."""
    machine = describe()
    if machine.gpu_limit_bytes is None:
        return None
    return _mac(machine.chip.removeprefix("Apple "), machine.memory_bytes // GIB)


def find_macs(text: str) -> list[Mac]:
    """Macs by memory, by chip, or by both: `256GB`, `M3 Ultra`, `M3 Ultra 256GB`.

    Raises Qwen35Error for a chip without a memory size that is not in the table.
    """
    match = re.fullmatch(r"(m\d+(?: (?:pro|max|ultra))?)?\s*(\d.*)?", text.strip().lower())
    if match and any(match.groups()):
        chip = (match[1] or "").title()
        memory = parse_memory(match[2]) / GIB if match[2] else None
        found = [m for m in MACS if chip in ("", m.chip) and memory in (None, m.memory_gib)]
        if memory is not None:
            found = found or [_mac(chip, memory)]
        if found:
            return found
    raise Qwen35Error(
        "unknown Mac",
        got=repr(text),
        expected="a memory size, a chip or both, such as 256GB or M3 Ultra 256GB",
        hint="chips without a memory size: " + ", ".join(sorted({mac.chip for mac in MACS})),
    )


class Shared(NamedTuple):
    """The parts of a plan's model on several Macs, and how it is split; None for one Mac."""

    parts: list[Plan]
    split: Sharding | Pipeline | None

    @property
    def num_messages(self) -> int:
        """Messages between the Macs for each token."""
        if isinstance(self.split, Pipeline):
            return len(self.parts)
        return 2 * self.parts[0].config.num_hidden_layers + 1

    def tokens_per_second(self, gbps: Sequence[float], context: int = 0) -> float:
        """The bandwidth limit of decoding; Macs with whole layers work one after the other."""
        pairs = zip(self.parts, gbps, strict=True)
        seconds = [1 / tokens_per_second(part, each, context) for part, each in pairs]
        return 1 / (sum(seconds) if isinstance(self.split, Pipeline) else max(seconds))


def share(plan: Plan, limits: Sequence[int]) -> Shared:
    """Split the model as `qwen35-mlx cluster` does, for Macs with these GPU limits in bytes."""
    if len(limits) == 1:
        return Shared([plan], None)
    runs = [e for e in plan.entries if not e.module.startswith(TOWER) or plan.config.vision]
    runs = [e for e in runs if not is_mtp(e.module) or plan.config.num_mtp_layers]
    nbytes = {t.name: t.nbytes for e in runs for t in e.tensors}
    sizes = {e.module: e.group_size for e in plan.text_entries if e.group_size}
    splits = [divide(plan.config, rank, limits, nbytes, sizes) for rank in range(len(limits))]
    return Shared([_part(plan, split) for split in splits], splits[0])


def _part(plan: Plan, split: Sharding | Pipeline) -> Plan:
    """The part of the plan on one Mac."""

    def part(entry: Entry) -> Entry:
        held = [tensor for tensor in entry.tensors if split.holds(tensor.name)]
        cuts = [(tensor, split.cut(tensor.name)) for tensor in held]
        tensors = [replace(t, shape=cut.shape(t.shape)) if cut else t for t, cut in cuts]
        return replace(entry, tensors=tuple(tensors))

    entries = [tuple(e for e in map(part, shard.entries) if e.tensors) for shard in plan.shards]
    shards = [replace(s, entries=own) for s, own in zip(plan.shards, entries, strict=True)]
    config = split.local
    if split.rank:
        config = replace(config, vision=None, num_mtp_layers=0)
    return replace(plan, config=config, shards=tuple(shards))


def running(plan: Plan, context: int, limit_bytes: int | None = None) -> MemoryCount:
    """The memory in use when the plan's model runs; see `memory.count`."""
    return count(plan.config, plan.loaded_bytes, context, limit_bytes, activation_bytes(plan))


def activation_bytes(plan: Plan) -> int:
    """Bytes per activation, key and value: they have the dtype of the last norm."""
    return next(ITEM_BYTES[e.dtype] for e in plan.text_entries if e.module.endswith("model.norm"))


def bytes_per_token(plan: Plan, context: int = 0) -> int:
    """Bytes read to decode a token: resident weights, chosen experts, keys, values, states."""
    sizes = ((entry.module, entry.output_bytes) for entry in plan.text_entries)
    return decode_bytes(plan.config, sizes, context, activation_bytes(plan))


def tokens_per_second(plan: Plan, gbps: float, context: int = 0) -> float:
    """The bandwidth limit of decoding: an upper bound that no program reaches."""
    return gbps * 1e9 / bytes_per_token(plan, context)


class FromDisk(NamedTuple):
    """A model with some of its experts in memory: their number per layer, and their bytes."""

    num_slots: int
    pool_bytes: int
    # Bytes of one expert of one layer.
    expert_bytes: int


def from_disk(plan: Plan, mac: Mac, context: int) -> FromDisk | None:
    """The experts that fit in a Mac's memory; None if all fit, or fewer than a token needs."""
    config = plan.config
    experts = sum(e.output_bytes for e in plan.text_entries if OF_EXPERTS in e.module)
    if not experts:
        return None
    # Without the MTP layer: with experts on disk, drafts make decoding slower.
    resident, limit = plan.loaded_bytes - experts - plan.mtp_bytes, mac.gpu_limit_bytes
    room = room_for_experts(config, resident, context, activation_bytes(plan), limit)
    slot_bytes = experts // config.num_experts
    num_slots = room // slot_bytes
    if not config.num_experts_per_tok <= num_slots < config.num_experts:
        return None
    return FromDisk(num_slots, num_slots * slot_bytes, slot_bytes // config.num_hidden_layers)


def from_disk_tps(
    plan: Plan, mac: Mac, found: FromDisk, miss_rate: float, ssd_gbps: float, context: int
) -> float:
    """Estimated tokens/s, if computing, waiting for routers and reading do not overlap."""
    config = plan.config
    experts = config.num_hidden_layers * config.num_experts_per_tok
    compute_s = bytes_per_token(plan, context) / (EFFICIENCY * mac.gbps * 1e9)
    read_s = miss_rate * experts * found.expert_bytes / (ssd_gbps * 1e9)
    return 1 / (compute_s + config.num_hidden_layers * ROUTER_S + read_s)
