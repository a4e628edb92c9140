"""What the Metal kernels save, counted without a GPU: dispatches, and bytes, of a decoded token.

Shapes are those of Qwen3.5-397B-A17B at 4 bits, group 64, bf16, 4,096 tokens in the cache. Ends
with one JSON line.

The rule for dispatches is that of tests/dispatches.py. `dispatches_default_...` is the model as it
is on a Mac where nothing was checked, in a decode step, a step of 5 tokens and a prefill of 2,048.

The rule for bytes: the kernels run in the emulator at real dims, with a few experts more than are
chosen. What a kernel reads of weights, scales, biases and state, each read of each lane counted, is
held against each chosen or resident array once and each state read and written once. A scale that
neighbouring lanes of a simdgroup read in one instruction is one read. Reads of activations and of
norm weights, vectors of a few kB that all threadgroups read and a cache serves, are reported apart.

The rule for issue slots is that of kernel_slots.py. `row_invariant` compares rows of calls of all
decode kernels with calls with that row alone, bit by bit.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from kernel_slots import print_slots, slots_per_weight
from label import label

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from dispatches import (
    CONTEXT,
    caches,
    default_model,
    family_text,
    leaf,
    mlx_lm_model,
    of_a_step,
    our_model,
    per_kind,
)
from metal.emulator import Launch, emulated
from metal.row_invariance import compare

from qwen35_mlx.config import FULL, LINEAR, ModelConfig
from qwen35_mlx.kernels import metal
from qwen35_mlx.kernels.decode_attention import (
    Packed,
    decode_attention_kernel,
    key_blocks,
    row_class,
)
from qwen35_mlx.kernels.grouped_expert_matmul import TILE_ROWS, num_matrix_macs
from qwen35_mlx.memory import MAX_SCORES_BYTES
from qwen35_mlx.model.attention import Attention
from qwen35_mlx.model.layer_cache import KVCache as OurKVCache

TEXT = family_text("397B-A17B")
NUM_LAYERS = {LINEAR: 45, FULL: 15}
STATE = ("state", "new_state", "conv_state", "new_conv_state")


def traffic(launch: Launch, chosen: float) -> Counter[str]:
    """Bytes that a launch moves, and would at least, and of small vectors that it reads.

    Of stacked experts, the part `chosen` is needed.
    """
    result: Counter[str] = Counter()
    for name, t in launch.traffic.items():
        # A dense matrix also stands where its scales and biases would.
        if not t.read_bytes and not t.written_bytes:
            continue
        stacked = name.startswith(("gate_", "up_", "down_"))
        if name in ("k", "v") and launch.kernel == "decode_attention":
            # A view: between its heads is room that is no part of it.
            result["moved"] += t.read_bytes
            result["least"] += t.unique_read_bytes
            continue
        if name.endswith("_w") or name in ("conv_weight", "A_log", "dt_bias"):
            result["moved"] += t.read_bytes
        elif name.endswith(("_scales", "_biases")):
            # Two lanes share a group of 64, side by side and in the same instruction.
            result["moved"] += t.read_bytes // 2
        elif name in STATE:
            result["moved"] += t.read_bytes + t.written_bytes
        else:
            result["vectors"] += 0 if name.endswith("_shape") else t.read_bytes
            continue
        result["least"] += int(t.buffer_bytes * (chosen if stacked else 1))
    return result


def decode_bytes() -> dict[str, Counter[str]]:
    """Traffic of each kernel in one layer of each kind, from the emulator."""
    num_experts = TEXT["num_experts_per_tok"] + 2
    result: dict[str, Counter[str]] = {}
    for kind, num_layers in NUM_LAYERS.items():
        few = TEXT | {"num_experts": num_experts, "vocab_size": 64}
        model, cache = our_model(few, [kind]), caches(few, [kind])
        with emulated() as log:
            metal.clear()
            mx.eval(model.trunk(None, cache, embeddings=leaf((1, 1, 4096), mx.bfloat16)))
        metal.clear()
        for launch in log.launches:
            name = re.sub(r"_\d$", "", launch.kernel)
            row = traffic(launch, TEXT["num_experts_per_tok"] / num_experts)
            total = result.setdefault(name, Counter())
            total.update({key: num_layers * value for key, value in row.items()})
    return result


def prefill_over_least(num_tokens: int = 2048, seeds: int = 5) -> dict[str, float]:
    """Of the grouped expert matmul: multiply-adds over useful ones, and how often the weights of
    an expert in use are read and unpacked; means over seeds.

    Experts as popular as in real texts: log-normal, so that the most wanted get eight times the
    rows of the average. By the arithmetic that its tests hold against the emulator's count.
    """
    hidden, width, k = (
        TEXT[n] for n in ("hidden_size", "moe_intermediate_size", "num_experts_per_tok")
    )
    ratios, reads = [], []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        popularity = 0.8 * rng.standard_normal(TEXT["num_experts"])
        logits = popularity + rng.gumbel(size=(num_tokens, TEXT["num_experts"]))
        chosen = np.argpartition(logits, -k, axis=1)[:, -k:]
        counts = np.bincount(chosen.flatten(), minlength=TEXT["num_experts"]).tolist()
        issued = num_matrix_macs(counts, hidden, 2 * width) + num_matrix_macs(counts, width, hidden)
        ratios.append(issued / (num_tokens * k * 3 * hidden * width))
        used = [-(-n // TILE_ROWS) for n in counts if n]
        reads.append(sum(used) / len(used))
    return {
        "prefill_macs_over_useful": round(sum(ratios) / seeds, 4),
        "prefill_weight_reads": round(sum(reads) / seeds, 4),
    }


def row_invariant(num_specialisations: int = 8) -> dict[str, int]:
    """Rows compared, and rows that differ."""
    with emulated():
        metal.clear()
        result = compare(range(num_specialisations))
    metal.clear()
    return result


def default_dispatches() -> dict[str, Any]:
    """Of the default over mlx-lm's, by step: the worst of three models, and each."""
    steps = {"": 1, "_step5": 5, "_prefill": 2048}
    worst: dict[str, Any] = {}
    by_model: dict[str, dict[str, list[int]]] = {}
    for step, num_tokens in steps.items():
        counts = by_model[f"{num_tokens} tokens"] = {}
        for name in ("397B-A17B", "35B-A3B", "0.8B"):
            text = family_text(name)
            counts[name] = [
                of_a_step(per_kind(make, text, num_tokens), text)
                for make in (default_model, mlx_lm_model)
            ]
            print(
                f"{name}, {num_tokens} tokens: default {counts[name][0]}, mlx-lm {counts[name][1]}"
            )
        worst[f"dispatches_default{step}_vs_mlx_lm"] = round(
            max(mine / other for mine, other in counts.values()), 4
        )
    return worst | {"dispatches_default_and_mlx_lm": by_model}


def a_token(kinds: dict[str, Counter[str]]) -> int:
    """Dispatches of all layers and what is around them."""
    return of_a_step(kinds, TEXT)


def attention_heads() -> tuple[int, int, int]:
    """Query heads, key heads and their width."""
    names = "num_attention_heads", "num_key_value_heads", "head_dim"
    return tuple(TEXT[name] for name in names)  # type: ignore[return-value]


def attention_bytes(length: int, packed: bool) -> dict[str, int]:
    """Bytes of a decode step's attention in a layer: of keys and values, read and at least; of
    sums between its two passes, written and read."""
    heads, kv_heads, dim = attention_heads()
    group = heads // kv_heads
    passes = -(-group // row_class(group))
    blocks = key_blocks(length)
    # In bytes, with a scale and a bias of each 64.
    key_bytes = 2 * kv_heads * (dim + dim // 64 * 4 if packed else 2 * dim)
    return {
        "read": passes * key_bytes * sum(end - start for start, end in blocks),
        "least": key_bytes * length,
        "sums": 2 * len(blocks) * heads * (dim + 2) * 4,
    }


def emulated_attention_bytes(length: int, packed: bool) -> dict[str, int]:
    """The same, counted by the emulator."""
    heads, kv_heads, dim = attention_heads()
    q = leaf((1, heads, 1, dim), mx.bfloat16)
    room = mx.zeros((1, kv_heads, length + 512, dim), mx.bfloat16)
    parts = mx.quantize(room, 64, 8) if packed else [room]
    parts = [part[:, :, :length] for part in parts]
    held = Packed(parts, 8, 64) if packed else parts[0]
    with emulated() as log:
        metal.clear()
        decode_attention_kernel(q, held, held, dim**-0.5)
    metal.clear()
    first, second = (launch.traffic for launch in log.launches)
    moved = [first[n].written_bytes + second[n].unique_read_bytes for n in ("sums", "extremes")]
    read = sum(first[n].read_bytes for n in ("k", "v", "v_scales", "v_biases"))
    # Four lanes side by side read a key's scale in the same instruction.
    read += sum(first[n].read_bytes // 4 for n in ("k_scales", "k_biases"))
    return {"read": read, "least": 2 * sum(part.nbytes for part in parts), "sums": sum(moved)}


def prefill_peak_bytes(context: int = 32_768, step: int = 2048, scale: int = 8) -> dict[str, int]:
    """What a full-attention layer holds at most over its keys and values, in a step that ends at
    `context`: as measured in float32 at 1 / scale of the width, and for the whole in bf16.

    All that is measured is proportional to the number of query heads, and the number of queries
    at a time is that of the whole layer in bf16.
    """
    heads = TEXT["num_attention_heads"] // scale
    text = TEXT | {"num_attention_heads": heads, "hidden_size": TEXT["hidden_size"] // scale}
    layer, norm = Attention(ModelConfig.from_hf(text)), nn.RMSNorm(text["hidden_size"])
    layer.max_scores_bytes = MAX_SCORES_BYTES // scale * 2
    entry = OurKVCache()
    shape = (1, text["num_key_value_heads"], context, text["head_dim"])
    entry.keys, entry.values = mx.random.normal(shape), mx.random.normal(shape)
    entry.offset = context - step
    x = mx.random.normal((1, step, text["hidden_size"]))
    mx.eval(layer.parameters(), norm.parameters(), entry.keys, entry.values, x)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(layer(x, norm, entry.make_mask(step), entry), entry.state)
    measured = mx.get_peak_memory() - before
    return {"measured": measured, "bf16": measured * scale // 2}


def main() -> None:
    """Count, print, and end with JSON."""
    defaults = default_dispatches()
    ours, theirs = per_kind(our_model, TEXT), per_kind(mlx_lm_model, TEXT)
    for name, kinds in (("ours", ours), ("mlx-lm", theirs)):
        print(f"{name}: {a_token(kinds)} dispatches a token")
        for kind, counts in kinds.items():
            print(f"  {kind}: {counts.total()}")
            print("    " + ", ".join(f"{k} {n}" for k, n in sorted(counts.items())))
    rows = decode_bytes()
    print(f"{'bytes a token':16}{'moved':>15}{'least':>15}{'ratio':>8}{'small vectors':>16}")
    for name, row in rows.items():
        ratio = f"{row['moved'] / row['least']:.4f}" if row["least"] else "-"
        print(f"{name:16}{row['moved']:15,}{row['least']:15,}{ratio:>8}{row['vectors']:16,}")
    slots = slots_per_weight()
    print_slots(slots)
    ratios = {}
    for name, packed in (("bf16", False), ("8 bits", True)):
        assert attention_bytes(CONTEXT, packed) == emulated_attention_bytes(CONTEXT, packed)
        long = attention_bytes(262_144, packed)
        ratios[name] = round(long["read"] / long["least"], 4)
        print(f"attention of a decode step at 262,144 tokens, {name}, bytes a layer: {long}")
    prefill_peak = prefill_peak_bytes()
    print(f"prefill step of 2,048 at 32,768 tokens, bytes a layer over its cache: {prefill_peak}")
    worst = max(row["moved"] / row["least"] for row in rows.values() if row["least"])
    result = {
        **label(),
        "model": "Qwen3.5-397B-A17B shapes, 4 bits, group 64, bf16",
        "context": CONTEXT,
        "dispatches": a_token(ours),
        "dispatches_mlx_lm": a_token(theirs),
        "dispatches_vs_mlx_lm": round(a_token(ours) / a_token(theirs), 4),
        **defaults,
        "dispatches_per_linear_layer": ours[LINEAR].total(),
        "dispatches_per_full_layer": ours[FULL].total(),
        "decode_bytes_over_minimum": round(worst, 4),
        **prefill_over_least(),
        "slots_per_weight": slots,
        "slots_per_weight_with_norm": slots_per_weight(norm=True),
        "row_invariant": row_invariant(),
        "kv_bytes_read_over_least": ratios["bf16"],
        "kv_bytes_read_over_least_8_bits": ratios["8 bits"],
        "prefill_peak_bytes": prefill_peak["bf16"],
        "prefill_peak_bytes_measured": prefill_peak["measured"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
