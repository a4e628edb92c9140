"""Memory of a running model, counted before it is allocated; MLX's limits, set at load.

Formulas are upper bounds of what MLX's allocator shows; tests compare them with real steps. Units:
T tokens of a prefill step, S tokens of context, Hq/Hkv query/key-value heads of width D, Hk/Hv key
and value heads of a linear layer of widths Dk/Dv.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .config import FULL, LINEAR, ModelConfig
from .errors import MemoryRefused, Qwen35Error
from .machine import GIB, Machine, describe, raise_limit_command

log = logging.getLogger(__name__)

# The context length that has to fit unless another one is asked for.
DEFAULT_CONTEXT = 32_768
# Prompt tokens in one prefill step.
PREFILL_STEP_SIZE = 2048
QUERY_MULTIPLE = 32
# Upper bounds of the attention scores in memory: absolute, and as a share of the GPU's memory.
# It is enough for 64 queries of the 397B at 262,144 tokens: one tile of MLX's matmul.
MAX_SCORES_BYTES, SCORES_SHARE = 1_250_000_000, 1 / 8
# Bound of the vision tower's widest activations: scores of a query block, rows of a feed-forward.
VISION_CHUNK_BYTES = 32_000_000
# Patches of 4096 x 4096 pixels, the largest picture after the released models' preprocessing.
MAX_PATCHES = 65_536
# Features of recent pictures: 35 of 1,764 tokens in the largest model.
MAX_FEATURES_BYTES, FEATURES_SHARE = 512_000_000, 1 / 32
# Ends of the system prompt, the last question and the last answer, and one in the making.
MIN_SNAPSHOTS = 4
# A snapshot of the 397B takes 0.19 GB; more than 4 GB of snapshots are rarely of use.
MAX_SNAPSHOT_BYTES, SNAPSHOT_SHARE = 4 * 10**9, 1 / 16
# Logits, sampling and the program, an estimate; and MLX's pool of freed buffers.
PROGRAM_BYTES, POOL_BYTES = GIB, GIB // 2
# Decoded tokens after which the pool is emptied: no later buffer fits into the outgrown ones.
POOL_TOKENS = 1024
# Values of `--kv-bits`: bits of keys and of values. auto: 16, or 8 where 16 do not fit.
AUTO = "auto"
KV_BITS: dict[str, tuple[int, int] | None] = {"16": None, "8": (8, 8), "k8v4": (8, 4)}
# Group size of quantized keys and values, along a head.
KV_GROUP_SIZE = 64
# Buffers of keys and values grow by a multiple of so many tokens.
KV_STEP = 256
# Tokens that go through a layer together where its experts are read from disk: their output in the
# 397B takes 2.7 GB.
SWEEP_TOKENS = 32_768
# Factor for what MLX allocates ahead, measured in models of many layers.
AHEAD = 1.15
CHUNK_SIZE = 64  # of `chunk_gated_delta_rule`


class MemoryCount(NamedTuple):
    """Bytes in use with `context` tokens in the cache, by purpose."""

    context: int
    query_block: int
    weights: int
    kv_cache: int
    states: int
    snapshots: int
    # The attention scores of the largest prefill step, and its other activations.
    scores: int
    activations: int
    program: int
    # What the vision tower needs beyond a prefill step, for the largest picture; they take turns.
    pictures: int
    features: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.overhead

    @property
    def overhead(self) -> int:
        """All bytes except the weights."""
        return sum(self[3:])

    def overhead_lines(self) -> dict[str, int]:
        """The overhead by purpose, for people."""
        lines = {
            f"KV cache of {self.context:,} tokens": self.kv_cache,
            "recurrent states": self.states,
            f"snapshots, {MIN_SNAPSHOTS} at least": self.snapshots,
            f"attention scores, {self.query_block:,} queries at a time": self.scores,
            "other activations of a prefill step": self.activations,
            "logits, buffers, program (estimate)": self.program,
        }
        if self.features:
            lines["the largest picture in the vision tower"] = self.pictures
            lines["features of recent pictures"] = self.features
        return lines


def count(
    config: ModelConfig,
    weight_bytes: int,
    context: int,
    limit_bytes: int | None = None,
    item_bytes: int = 2,
) -> MemoryCount:
    """Count the bytes of a running model whose GPU may use `limit_bytes`.

    `item_bytes`: bytes of one activation, key or value; 2 in bfloat16.
    """
    state, budget = state_bytes(config, item_bytes), scores_budget(limit_bytes)
    capacity = kv_capacity(context)
    mtp_cache = config.num_mtp_layers * _layer_kv_bytes(config, capacity, item_bytes)
    scores = _most_scores_bytes(config, context, budget, item_bytes)
    peak = _prefill_bytes(config, context, scores, item_bytes)
    return MemoryCount(
        context=context,
        query_block=query_block(config.num_attention_heads, context, budget, item_bytes),
        weights=weight_bytes,
        kv_cache=kv_bytes(config, capacity, item_bytes) + mtp_cache,
        # The next states are computed while the previous ones are still in memory.
        states=2 * state,
        snapshots=MIN_SNAPSHOTS * state,
        scores=scores,
        activations=peak - scores,
        program=PROGRAM_BYTES,
        pictures=max(tower_bytes(config, context, item_bytes) - peak, 0),
        features=features_budget(config, limit_bytes),
    )


def tower_bytes(config: ModelConfig, context: int, item_bytes: int = 2) -> int:
    """The peak of the vision tower on the largest picture that fits the context; 0 without one."""
    if (tower := config.vision) is None:
        return 0
    num_patches = min(MAX_PATCHES, context * tower.spatial_merge_size**2)
    pixels = tower.in_channels * tower.patch_size**2
    # Patches in float32, in numpy and in MLX; then the activations of a block.
    per_patch = 8 * pixels + 12 * item_bytes * tower.hidden_size
    widest = 3 * min(
        VISION_CHUNK_BYTES,
        num_patches * item_bytes * max(tower.num_heads * num_patches, tower.intermediate_size),
    )
    return num_patches * per_patch + widest


def features_budget(config: ModelConfig, limit_bytes: int | None) -> int:
    """Bytes for the features of recent pictures if the GPU may use `limit_bytes`."""
    if config.vision is None:
        return 0
    if limit_bytes is None:
        return MAX_FEATURES_BYTES
    return min(MAX_FEATURES_BYTES, int(limit_bytes * FEATURES_SHARE))


def kv_capacity(num_tokens: int) -> int:
    """Capacity of a buffer of keys and values, in tokens: an eighth more than it holds.

    Geometric growth keeps the number of buffers logarithmic: no freed buffer fits a later one.
    """
    return -(-(num_tokens + num_tokens // 8) // KV_STEP) * KV_STEP


def kv_bytes(config: ModelConfig, context: int, item_bytes: int = 2) -> int:
    """Bytes of the keys and values of `context` tokens in all full-attention layers."""
    layers = config.layer_types.count(FULL)
    return layers * _layer_kv_bytes(config, context, item_bytes)


def _layer_kv_bytes(config: ModelConfig, context: int, item_bytes: int) -> int:
    """Of one layer. Each quantized group has a scale and a bias of the activations' type."""
    width = config.num_key_value_heads * config.head_dim
    if config.kv_bits is None:
        return 2 * width * context * item_bytes
    codes = sum(width * bits // 8 for bits in config.kv_bits)
    return (codes + 2 * width // KV_GROUP_SIZE * 2 * item_bytes) * context


def state_bytes(config: ModelConfig, item_bytes: int = 2) -> int:
    """Recurrent states (float32) and convolution states of one sequence; also of a snapshot."""
    layers = config.layer_types.count(LINEAR)
    convolution = (config.linear_conv_kernel_dim - 1) * config.conv_dim * item_bytes
    return layers * (_layer_state_bytes(config) + convolution)


def _layer_state_bytes(config: ModelConfig) -> int:
    return config.value_dim * config.linear_key_head_dim * 4


def read_share(config: ModelConfig, module: str) -> float:
    """The share of a module's bytes that decoding one token reads, without drafts."""
    if module.startswith(("vision_tower.", "mtp.")):
        return 0.0
    if ".switch_mlp." in module:
        return config.num_experts_per_tok / config.num_experts
    is_looked_up = module.endswith("embed_tokens") and not config.tie_word_embeddings
    return 1 / config.vocab_size if is_looked_up else 1.0


def decode_bytes(
    config: ModelConfig, sizes: Iterable[tuple[str, float]], context: int, item_bytes: int = 2
) -> int:
    """Bytes that decoding one token after `context` others reads: weights, caches and states.

    `sizes`: bytes by module.
    """
    weights = sum(int(nbytes * read_share(config, module)) for module, nbytes in sizes)
    return weights + kv_bytes(config, context, item_bytes) + 2 * state_bytes(config, item_bytes)


def scores_bytes(config: ModelConfig, step_size: int, context: int, item_bytes: int = 2) -> int:
    """Attention scores of one layer, `[Hq, T, S]`.

    MLX makes them for heads of 256 and more than 8 queries on every Mac before M5.
    """
    if FULL not in config.layer_types:
        return 0
    return config.num_attention_heads * min(step_size, context) * context * item_bytes


def scores_budget(limit_bytes: int | None) -> int:
    """Bytes for attention scores if the GPU may use `limit_bytes`."""
    if limit_bytes is None:
        return MAX_SCORES_BYTES
    return min(MAX_SCORES_BYTES, int(limit_bytes * SCORES_SHARE))


def query_block(num_heads: int, num_keys: int, budget_bytes: int, item_bytes: int = 2) -> int:
    """Queries to attend at once, a multiple of 32 up to 2,048, with scores within the budget."""
    num_rows = budget_bytes // (num_heads * max(num_keys, 1) * item_bytes)
    return min(PREFILL_STEP_SIZE, max(num_rows // QUERY_MULTIPLE, 1) * QUERY_MULTIPLE)


def _most_scores_bytes(
    config: ModelConfig, context: int, budget_bytes: int, item_bytes: int
) -> int:
    """Attention scores of the largest prefill step on the way to `context` tokens."""
    whole = scores_bytes(config, PREFILL_STEP_SIZE, context, item_bytes)
    fewest = scores_bytes(config, QUERY_MULTIPLE, context, item_bytes)
    return max(min(whole, budget_bytes), fewest)


def _prefill_bytes(config: ModelConfig, context: int, scores: int, item_bytes: int) -> int:
    """The peak of any prefill step on the way to `context` tokens."""
    step = min(PREFILL_STEP_SIZE, context)
    attention = {
        LINEAR: _linear_layer_bytes(config, step, item_bytes),
        FULL: _full_layer_bytes(config, step, context, scores, item_bytes),
    }
    # MLX allocates ahead of what it computes: the halves of a layer overlap.
    peak = max(attention[kind] for kind in config.layer_types) + _feed_forward_bytes(
        config, step, item_bytes
    )
    # It does not allocate ahead of query blocks, which are evaluated one by one.
    is_whole = scores == scores_bytes(config, step, context, item_bytes)
    return int(AHEAD * peak) if is_whole else peak


def layer_bytes(
    config: ModelConfig, kind: str, num_rows: int, num_tokens: int, item_bytes: int = 2
) -> int:
    """Activations of a layer at the peak of a forward pass over rows of so many tokens."""
    step = num_rows * num_tokens
    if kind == LINEAR:
        attention = _linear_layer_bytes(config, step, item_bytes)
    else:
        scores = num_rows * scores_bytes(config, num_tokens, num_tokens, item_bytes)
        attention = _full_layer_bytes(config, step, num_tokens, scores, item_bytes)
    return attention + _feed_forward_bytes(config, step, item_bytes)


# The factors below were measured: numbers per token that are in memory at the peak.


def _full_layer_bytes(
    config: ModelConfig, step: int, context: int, scores: int, item_bytes: int
) -> int:
    """Scores, their causal mask, a second copy of keys and values while they grow, and heads."""
    heads = 8 * config.num_attention_heads + 6 * config.num_key_value_heads
    per_token = heads * config.head_dim + 3 * config.hidden_size
    return (
        scores
        # A byte for each score of a head.
        + scores // (config.num_attention_heads * item_bytes)
        + _layer_kv_bytes(config, kv_capacity(context), item_bytes)
        + step * per_token * item_bytes
    )


def chunk_rule_bytes(config: ModelConfig, step: int) -> int:
    """Bytes of the chunked delta rule in fp32 on plain ops; its kernels take no more."""
    heads = config.linear_num_value_heads
    per_token = (
        9 * heads * CHUNK_SIZE
        + 3 * heads * config.linear_key_head_dim
        + 3.5 * config.value_dim
        + 2 * config.linear_num_key_heads * config.linear_key_head_dim
    )
    padded = -(-step // CHUNK_SIZE) * CHUNK_SIZE
    return int(padded * per_token * 4) + 16 * _layer_state_bytes(config)


def _linear_layer_bytes(config: ModelConfig, step: int, item_bytes: int) -> int:
    """The delta rule, its q, k and v in fp32, z, and the input of the convolution."""
    per_token = config.conv_dim + config.value_dim + 3 * config.hidden_size
    return chunk_rule_bytes(config, step) + step * (
        config.conv_dim * 4 + 8 * config.linear_num_value_heads + per_token * item_bytes
    )


def _feed_forward_bytes(config: ModelConfig, step: int, item_bytes: int) -> int:
    """A dense layer, or a copy of each token for each of its experts."""
    hidden = config.hidden_size
    if config.is_moe:
        per_token = (
            config.num_experts_per_tok * (3 * hidden + 2 * config.moe_intermediate_size)
            + 3 * config.shared_expert_intermediate_size
            + 2 * config.num_experts
        )
    else:
        per_token = 4 * config.intermediate_size
    return step * (per_token + 6 * hidden) * item_bytes


def sweep_bytes(config: ModelConfig, context: int | None = None, item_bytes: int = 2) -> int:
    """Bytes of a layer-by-layer prefill: the layer's input and the output of its experts."""
    context = context or min(config.context_length, DEFAULT_CONTEXT)
    per_token = (config.num_experts_per_tok + 6) * config.hidden_size * item_bytes
    return min(SWEEP_TOKENS, context) * per_token


def room_for_experts(
    config: ModelConfig,
    resident_bytes: int,
    context: int | None = None,
    item_bytes: int = 2,
    limit_bytes: int | None = None,
) -> int:
    """Bytes left for experts after all other weights, a context and the activations of a prompt.

    The limit is that of this machine, or `limit_bytes`.
    """
    limit = limit_bytes or describe().limit_bytes
    context = context or min(config.context_length, DEFAULT_CONTEXT)
    needed = count(config, resident_bytes, context, limit, item_bytes)
    return limit - needed.total - sweep_bytes(config, context, item_bytes)


def check_context(config: ModelConfig, context: int) -> None:
    """Refuse a context that is longer than the model supports."""
    if not 1 <= context <= config.stretched_length:
        longest = config.context_length
        by_yarn = f", or with YaRN {n:,}" if (n := config.stretched_length) > longest else ""
        raise Qwen35Error(
            "the context does not fit the model",
            got=f"{context:,} tokens",
            expected=f"1 to {longest:,}{by_yarn}",
        )


def kv_choices(config: ModelConfig, kv_bits: str | int = AUTO) -> list[ModelConfig]:
    """The config once for each choice of bits of keys and values, the preferred one first."""
    names = ["16", "8"] if kv_bits == AUTO else [str(kv_bits)]
    if not set(names) <= set(KV_BITS):
        expected = ", ".join((AUTO, *KV_BITS))
        raise Qwen35Error("unknown bits of keys and values", got=kv_bits, expected=expected)
    if config.head_dim % KV_GROUP_SIZE:
        names = names[:1]
        if names != ["16"]:
            raise Qwen35Error(
                "keys and values of this model cannot be quantized",
                got=f"heads of {config.head_dim} numbers",
                expected=f"a multiple of {KV_GROUP_SIZE}",
            )
    return [replace(config, kv_bits=KV_BITS[name]) for name in names]


def longest_context(
    config: ModelConfig, weight_bytes: int, limit_bytes: int, item_bytes: int = 2
) -> int:
    """The longest context that fits, in steps of 1,024 tokens; 0 if none does."""
    top = config.context_length
    for context in [top, *range((top - 1) // 1024 * 1024, 0, -1024), 256]:
        counted = count(config, weight_bytes, min(context, top), limit_bytes, item_bytes)
        if counted.total <= limit_bytes:
            return counted.context
    return 0


@dataclass(frozen=True)
class Allowance:
    """Limits for a model on this machine; the defaults are for one that `load` did not make."""

    # Tokens of a prompt and its answer; None: the model's context length.
    context: int | None = None
    snapshot_bytes: int = MAX_SNAPSHOT_BYTES
    # MLX's pool of freed buffers.
    pool_bytes: int = POOL_BYTES
    scores_bytes: int = MAX_SCORES_BYTES
    # Features of recent pictures.
    features_bytes: int = MAX_FEATURES_BYTES


def allow(
    config: ModelConfig,
    weight_bytes: int,
    *,
    context: int | None = None,
    force: bool = False,
    item_bytes: int = 2,
) -> Allowance:
    """Limits for a model on this machine; raises MemoryRefused if it does not fit, unless forced.

    It has to fit with `context`, or with up to 32,768 tokens. Without Metal there is no GPU limit:
    the machine's memory has to hold the weights, and `context` if it is given.
    """
    if context is not None:
        check_context(config, context)
    machine = describe()
    has_gpu = machine.gpu_limit_bytes is not None
    limit = machine.limit_bytes
    wanted = context or (min(config.context_length, DEFAULT_CONTEXT) if has_gpu else 0)
    needed = count(config, weight_bytes, wanted, limit, item_bytes)
    if (needed.total if wanted else weight_bytes) > limit and not force:
        raise _refused(config, needed, machine, limit, item_bytes)
    longest = context
    if has_gpu and not force:
        fitting = longest_context(config, weight_bytes, limit, item_bytes)
        longest = context or (fitting if fitting < config.context_length else None)
    most = min(MAX_SNAPSHOT_BYTES, int(machine.memory_bytes * SNAPSHOT_SHARE))
    spare = max(limit - needed.total, 0)
    snapshots = max(min(most, needed.snapshots + spare), needed.snapshots)
    left = max(spare - (snapshots - needed.snapshots), 0)
    # A prefill step reuses the buffers that the previous step freed; a larger pool is of no use.
    pool = POOL_BYTES + min(left, needed.scores + needed.activations)
    features = features_budget(config, limit)
    return Allowance(longest, snapshots, pool, scores_budget(limit), features)


def allow_with_kv(
    choices: Sequence[ModelConfig], weight_bytes: int, **settings: Any
) -> tuple[ModelConfig, Allowance]:
    """The first of `kv_choices` that fits, with its limits; raises as `allow` does."""
    first, *others = choices
    try:
        return first, allow(first, weight_bytes, **settings)
    except MemoryRefused:
        if not others:
            raise
    allowance = allow(others[0], weight_bytes, **settings)
    log.warning("keys and values use 8 bits, because 16 bits do not fit in memory")
    return others[0], allowance


def _refused(
    config: ModelConfig, needed: MemoryCount, machine: Machine, limit: int, item_bytes: int
) -> MemoryRefused:
    lines = {"weights": needed.weights}
    if needed.context:
        lines |= needed.overhead_lines()
    total = sum(lines.values())
    hints = []
    if command := raise_limit_command(machine, total):
        hints.append(f"{command} gives the GPU enough until the next start")
    fitting = longest_context(config, needed.weights, limit, item_bytes)
    if fitting and needed.context:
        hints.append(f"--context {fitting} is the longest that fits")
    hints = hints or ["fewer bits: qwen35-mlx plan SRC --fit MEMORY shows what fits"]
    hints.append("--force loads it all the same")
    return MemoryRefused(
        "the model does not fit this machine",
        got=f"{total / 1e9:,.3f} GB"
        + "".join(f"\n    {name:42} {n / 1e9:9.3f} GB" for name, n in lines.items()),
        expected=f"at most {limit / 1e9:,.3f} GB, the "
        + ("memory of this machine" if machine.gpu_limit_bytes is None else "limit of its GPU"),
        hint="\n    ".join(hints),
    )


_wired = False


def wire(allowance: Allowance) -> None:
    """Have MLX keep the weights in the GPU's memory and bound its pool of freed buffers.

    Only with Metal. The wired limit is set once per process: a change walks over every buffer.
    """
    import mlx.core as mx

    global _wired
    if not mx.metal.is_available():
        return
    mx.set_cache_limit(allowance.pool_bytes)
    if not _wired:
        mx.set_wired_limit(int(mx.device_info().get("max_recommended_working_set_size", 0)))
        _wired = True
