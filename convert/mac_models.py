"""Macs by name, and the bound that their bandwidth sets on decoding a plan."""

import platform
import re

from qwen35_mlx.config import ModelConfig
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.headers import ITEM_BYTES
from qwen35_mlx.machine import GIB, MACS, Mac, bandwidth_gbps, parse_memory, sysctl
from qwen35_mlx.memory import MemoryCount, count, kv_bytes, state_bytes

from .plan import Plan

# A column's title: it says that it is no speed.
BANDWIDTH_LIMIT = "bandwidth limit, tok/s"


def this_mac() -> Mac | None:
    """This machine, with bandwidth 0 for a chip not in the table; None where it is no Mac."""
    if platform.system() != "Darwin" or platform.machine() != "arm64":
        return None
    brand, memory = (sysctl(key) for key in ("machdep.cpu.brand_string", "hw.memsize"))
    if not memory.isdigit():
        return None
    chip, memory_gib = brand.removeprefix("Apple "), int(memory) // GIB
    return Mac(chip, memory_gib, bandwidth_gbps(chip, memory_gib))


def find_macs(text: str) -> list[Mac]:
    """Macs by memory, by chip, or by both: `256GB`, `M3 Ultra`, `M3 Ultra 256GB`."""
    match = re.fullmatch(r"(m\d+(?: (?:pro|max|ultra))?)?\s*(\d.*)?", text.strip().lower())
    if match and any(match.groups()):
        chip = (match[1] or "").title()
        memory = parse_memory(match[2]) / GIB if match[2] else None
        found = [m for m in MACS if chip in ("", m.chip) and memory in (None, m.memory_gib)]
        if not found and memory is not None:
            found = [Mac(chip, memory, bandwidth_gbps(chip, memory))]
        if found:
            return found
    raise Qwen35Error(
        "not a Mac that is known here",
        got=repr(text),
        expected="a memory, a chip or both, such as 256GB or M3 Ultra 256GB",
        hint="chips that need no memory: " + ", ".join(sorted({mac.chip for mac in MACS})),
    )


def running(plan: Plan, context: int, limit_bytes: int | None = None) -> MemoryCount:
    """Memory in use when the plan's text model runs; see `qwen35_mlx.memory`."""
    return count(plan.config, plan.text_bytes, context, limit_bytes, activation_bytes(plan))


def activation_bytes(plan: Plan) -> int:
    """Of activations, keys and values: they have the type of the embedding."""
    embedding = next(e for e in plan.text_entries if e.module.endswith("embed_tokens"))
    return ITEM_BYTES[embedding.dtype]


def bytes_per_token(plan: Plan, context: int = 0) -> int:
    """Bytes read for one decoded token: resident weights, chosen experts, keys, values, states."""
    read = (int(e.output_bytes * read_share(plan.config, e.module)) for e in plan.text_entries)
    item_bytes = activation_bytes(plan)
    states = 2 * state_bytes(plan.config, item_bytes)
    return kv_bytes(plan.config, context, item_bytes) + states + sum(read)


def read_share(config: ModelConfig, module: str) -> float:
    """The part of a module's bytes that one decoded token reads."""
    if ".switch_mlp." in module:
        return config.num_experts_per_tok / config.num_experts
    if module.endswith("embed_tokens") and not config.tie_word_embeddings:
        return 1 / config.vocab_size
    return 1.0


def tokens_per_second(plan: Plan, gbps: float, context: int = 0) -> float:
    """The bound that memory bandwidth sets on decoding; no program reaches it."""
    return gbps * 1e9 / bytes_per_token(plan, context)
