"""What a Mac holds and how fast it reads: memory limits, bytes in use, tokens per second."""

import platform
from dataclasses import dataclass

from qwen35_mlx.config import FULL, ModelConfig
from qwen35_mlx.machine import GIB, highest_limit_bytes, sysctl

from .plan import Plan

# Of the decoded token's logits, of MLX's buffer cache and of the program itself; an estimate.
FIXED_BYTES = GIB
PREFILL_TOKENS = 2048


@dataclass(frozen=True)
class Mac:
    """One size of one chip; `gbps` is the bandwidth of its memory, 10^9 bytes a second."""

    chip: str
    memory_gib: int
    gbps: float

    @property
    def memory_bytes(self) -> int:
        return self.memory_gib * GIB


MACS = (
    Mac("M2 Max", 96, 400),
    Mac("M3 Max", 96, 300),
    Mac("M3 Ultra", 96, 819),
    Mac("M1 Ultra", 128, 800),
    Mac("M2 Ultra", 128, 800),
    Mac("M3 Max", 128, 400),
    Mac("M4 Max", 128, 546),
    Mac("M5 Max", 128, 614),
    Mac("M2 Ultra", 192, 800),
    Mac("M3 Ultra", 256, 819),
    Mac("M3 Ultra", 512, 819),
)
# Chips for which memory alone does not tell; of two variants the slower one.
CHIP_GBPS = {"M1 Max": 400, "M3 Max": 300, "M4 Pro": 273, "M4 Max": 410}


def this_mac() -> Mac | None:
    """This machine, with bandwidth 0 for a chip not in the table; None where it is no Mac."""
    if platform.system() != "Darwin" or platform.machine() != "arm64":
        return None
    brand, memory = (sysctl(key) for key in ("machdep.cpu.brand_string", "hw.memsize"))
    if not memory.isdigit():
        return None
    chip, memory_gib = brand.removeprefix("Apple "), int(memory) // GIB
    exact = [mac for mac in MACS if (mac.chip, mac.memory_gib) == (chip, memory_gib)]
    alike = [mac.gbps for mac in MACS if mac.chip == chip]
    gbps = exact[0].gbps if exact else CHIP_GBPS.get(chip, min(alike, default=0))
    return Mac(chip, memory_gib, gbps)


def gpu_limit_bytes(memory_bytes: int) -> int:
    """What the GPU may wire by default: about three quarters, two thirds of 36 GB and less."""
    return memory_bytes * 2 // 3 if memory_bytes <= 36 * GIB else memory_bytes * 3 // 4


def raised_limit_bytes(memory_bytes: int) -> int:
    """What `iogpu.wired_limit_mb` may be raised to with enough left for the system."""
    return max(highest_limit_bytes(memory_bytes), gpu_limit_bytes(memory_bytes))


def wired_limit_mb(needed_bytes: int) -> int:
    """The value of `iogpu.wired_limit_mb` for `needed_bytes`, in whole GiB."""
    return -(-needed_bytes // GIB) * 1024


def kv_bytes(config: ModelConfig, context: int) -> int:
    """Keys and values of `context` tokens in bfloat16."""
    layers = sum(kind == FULL for kind in config.layer_types)
    return layers * 2 * config.num_key_value_heads * config.head_dim * 2 * context


def state_bytes(config: ModelConfig) -> int:
    """Recurrent state in float32 and convolution state in bfloat16 of one sequence."""
    layers = sum(kind != FULL for kind in config.layer_types)
    heads = config.linear_num_value_heads
    recurrent = heads * config.linear_key_head_dim * config.linear_value_head_dim * 4
    return layers * (recurrent + (config.linear_conv_kernel_dim - 1) * config.conv_dim * 2)


def prefill_bytes(config: ModelConfig) -> int:
    """The widest activations of a step of 2,048 prompt tokens in bfloat16; an estimate."""
    hidden = config.hidden_size
    if config.is_moe:
        width = config.num_experts_per_tok * (2 * hidden + 3 * config.moe_intermediate_size)
    else:
        width = 2 * hidden + 3 * config.intermediate_size
    attention = 4 * config.num_attention_heads * config.head_dim
    linear = 4 * (config.conv_dim + 2 * config.value_dim)
    return PREFILL_TOKENS * 2 * max(width, attention, linear)


def overheads(config: ModelConfig, context: int) -> dict[str, int]:
    """Bytes of all that running takes beside weights, by what they are for."""
    return {
        f"KV cache of {context:,} tokens": kv_bytes(config, context),
        "recurrent states, one of them a snapshot": 2 * state_bytes(config),
        "activations of a prefill step (estimate)": prefill_bytes(config),
        "logits, buffers, program (estimate)": FIXED_BYTES,
    }


def running_bytes(plan: Plan, context: int) -> int:
    """Memory in use with `context` tokens read; the activations in it are an estimate."""
    return plan.text_bytes + sum(overheads(plan.config, context).values())


def bytes_per_token(plan: Plan, context: int = 0) -> int:
    """Bytes read for one decoded token: resident weights, chosen experts, keys, values, states."""
    read = (int(e.output_bytes * read_share(plan.config, e.module)) for e in plan.text_entries)
    return kv_bytes(plan.config, context) + 2 * state_bytes(plan.config) + sum(read)


def read_share(config: ModelConfig, module: str) -> float:
    """The part of a module's bytes that one decoded token reads."""
    if ".switch_mlp." in module:
        return config.num_experts_per_tok / config.num_experts
    if module.endswith("embed_tokens") and not config.tie_word_embeddings:
        return 1 / config.vocab_size
    return 1.0


def tokens_per_second(plan: Plan, gbps: float, context: int = 0) -> float:
    """The bound that memory bandwidth sets on decoding; real programs reach a part of it."""
    return gbps * 1e9 / bytes_per_token(plan, context)
