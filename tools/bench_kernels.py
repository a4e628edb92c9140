"""What the Metal kernels save, counted without a GPU: dispatches, and bytes, of a decoded token.

Shapes are those of Qwen3.5-397B-A17B at 4 bits, group 64, bf16, 4,096 tokens in the cache. Ends
with one JSON line.

The rule for dispatches, the same for ours and for mlx-lm's own model code: build the graph of a
layer and count its nodes, without evaluating it. A custom kernel, `mx.fast` operation or compiled
function is one, attention over a cache two (its two passes), a concatenation one for each part;
views count nothing, and neither does a reshape, though mlx-lm's copy at times. The number of
experts changes no count, so the stacks are views of zeros.

The rule for bytes: the kernels run in the emulator at real dims, with a few experts more than are
chosen. What a kernel reads of weights, scales, biases and state, each read of each lane counted, is
held against each chosen or resident array once and each state read and written once. A scale that
neighbouring lanes of a simdgroup read in one instruction is one read. Reads of activations and of
norm weights, vectors of a few kB that all threadgroups read and a cache serves, are reported apart.

The rule for issue slots is that of kernel_slots.py. `row_invariant` compares rows of calls of all
decode kernels with calls with that row alone, bit by bit.
"""

import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.gated_delta as gated_delta
import numpy as np
from kernel_slots import print_slots, slots_per_weight
from label import label
from mlx.utils import tree_map
from mlx_lm.models import qwen3_5
from mlx_lm.models.cache import ArraysCache, KVCache

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from metal.emulator import Launch, emulated
from metal.row_invariance import compare

from qwen35_mlx.config import FULL, LINEAR, ModelConfig
from qwen35_mlx.family import family_config
from qwen35_mlx.kernels import metal
from qwen35_mlx.kernels.decode_attention import decode_attention_kernel, key_blocks, row_class
from qwen35_mlx.kernels.grouped_expert_matmul import num_matrix_macs
from qwen35_mlx.memory import MAX_SCORES_BYTES
from qwen35_mlx.model.attention import Attention
from qwen35_mlx.model.language import Model
from qwen35_mlx.model.layer_cache import KVCache as OurKVCache

TEXT: dict[str, Any] = family_config("Qwen3.5-397B-A17B")["text_config"]
NUM_LAYERS = {LINEAR: 45, FULL: 15}
CONTEXT = 4096
VIEWS = frozenset(
    """AsStrided Broadcast BroadcastAxes Depends ExpandDims Flatten Reshape Slice Split
    Squeeze StopGradient Transpose Unflatten""".split()
)


def leaf(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Evaluated zeros of any shape in the memory of one."""
    array = mx.broadcast_to(mx.zeros((1,) * len(shape), dtype), shape)
    mx.eval(array)
    return array


def with_leaves(model: nn.Module, quantized: Callable[..., Any]) -> nn.Module:
    """The model at 4 bits, bf16, its weights leaves of the graph."""
    nn.quantize(model, group_size=64, bits=4, class_predicate=quantized)

    def replace(p: mx.array) -> mx.array:
        return leaf(p.shape, mx.bfloat16 if mx.issubdtype(p.dtype, mx.floating) else p.dtype)

    model.update(tree_map(replace, model.parameters()))
    model.eval()
    return model


class Graph:
    """Stands for what the CPU has no primitive of, and counts the primitives between them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.roots: list[mx.array] = []

    def stand_in(self, name: str, dispatches: int = 1) -> Callable[..., mx.array]:
        def call(x: mx.array, *others: Any, **options: Any) -> mx.array:
            self.roots += [a for a in (x, *others) if isinstance(a, mx.array)]
            self.counts[name] += dispatches
            return leaf(x.shape, x.dtype)

        return call

    def dequantize(self, w: mx.array, scales: mx.array, *_: Any, **options: Any) -> mx.array:
        self.roots += [w, scales]
        self.counts["Dequantize"] += 1
        return leaf((*w.shape[:-1], w.shape[-1] * 32 // options["bits"]), scales.dtype)

    def custom_kernel(self, name: str, **_: Any) -> Callable[..., list[mx.array]]:
        def call(inputs: list[Any], output_shapes: Any, output_dtypes: Any, **_: Any) -> Any:
            self.roots += [a for a in inputs if isinstance(a, mx.array)]
            self.counts[name] += 1
            return [leaf(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return call

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, what is built is recorded, and Python believes in a GPU."""
        fast, kernels = mx.fast, {}
        with (
            patch.object(fast, "rms_norm", self.stand_in("RMSNorm")),
            patch.object(fast, "rope", self.stand_in("RoPE")),
            patch.object(fast, "scaled_dot_product_attention", self.stand_in("SDPA", 2)),
            patch.object(fast, "metal_kernel", self.custom_kernel),
            patch.object(mx, "dequantize", self.dequantize),
            patch.object(mx.metal, "is_available", lambda: True),
            patch.object(mx, "default_device", lambda: mx.gpu),
        ):
            kernels["_gated_delta_kernel"] = gated_delta._make_gated_delta_kernel()
            kernels["_gated_delta_kernel_packed"] = gated_delta._make_gated_delta_packed_kernel()
            metal.clear()
            with patch.multiple(gated_delta, **kernels):
                yield
        metal.clear()

    def finish(self, *outputs: mx.array) -> Counter[str]:
        """Dispatches by name, once what is asked for is known."""
        text = io.StringIO()
        mx.export_to_dot(text, *self.roots, *outputs)
        edges = Counter(re.findall(r'"\w+" -> (\d+)\n', text.getvalue()))
        for node, name in re.findall(r'\{ (\d+) \[label ="(\w+)"', text.getvalue()):
            if name not in VIEWS:
                self.counts[name] += edges[node] if name == "Concatenate" else 1
        return self.counts


def kv_cache() -> KVCache:
    """With room for the next token, as it mostly has."""
    entry = KVCache()
    shape = (1, TEXT["num_key_value_heads"], CONTEXT + 128, TEXT["head_dim"])
    entry.keys, entry.values = leaf(shape, mx.bfloat16), leaf(shape, mx.bfloat16)
    entry.offset = CONTEXT
    return entry


def linear_cache() -> ArraysCache:
    """Both states of a layer."""
    heads, dim = TEXT["linear_num_value_heads"], TEXT["linear_key_head_dim"]
    channels = (2 * TEXT["linear_num_key_heads"] + heads) * dim
    entry = ArraysCache(size=2)
    entry[0] = leaf((1, 3, channels), mx.bfloat16)
    entry[1] = leaf((1, heads, dim, dim), mx.float32)
    return entry


def caches(layer_types: list[str]) -> list[Any]:
    """One entry a layer."""
    return [linear_cache() if t == LINEAR else kv_cache() for t in layer_types]


def our_model(layer_types: list[str], **changes: int) -> Model:
    """Ours, of these layers, with all kernels."""
    text = TEXT | {"layer_types": layer_types, "num_hidden_layers": len(layer_types)} | changes
    model = Model(ModelConfig.from_hf(text))
    with_leaves(model, model.quant_predicate)
    metal.use(model, metal.OPS)
    return model


def mlx_lm_model(layer_types: list[str]) -> nn.Module:
    """mlx-lm's, of these layers."""
    args = qwen3_5.TextModelArgs.from_dict(TEXT | {"num_hidden_layers": 4})
    model = qwen3_5.TextModel(args)
    # The fourth of its layers is the attention layer.
    linear, full = model.model.layers[0], model.model.layers[3]
    model.model.layers = [linear if t == LINEAR else full for t in layer_types]
    model.model.ssm_idx = layer_types.index(LINEAR) if LINEAR in layer_types else None
    model.model.fa_idx = layer_types.index(FULL) if FULL in layer_types else None
    return with_leaves(model, lambda path, module: hasattr(module, "to_quantized"))


def count(make: Callable[[list[str]], nn.Module], layer_types: list[str]) -> Counter[str]:
    """Dispatches of a whole step of a model with these layers, and of what it caches."""
    model, cache, graph = make(layer_types), caches(layer_types), Graph()
    with graph.recording():
        logits = model(leaf((1, 1), mx.int32), cache)
        entries = [(c.keys, c.values) if isinstance(c, KVCache) else c.cache for c in cache]
        return graph.finish(logits, *(a for entry in entries for a in entry))


def per_kind(make: Callable[[list[str]], nn.Module]) -> dict[str, Counter[str]]:
    """Dispatches of a layer of each kind, and of what is around the layers."""
    # The second of its kind, so that what layers share is not counted to one of them.
    both = count(make, [LINEAR, FULL])
    kinds = {kind: count(make, [LINEAR, FULL, kind]) - both for kind in (LINEAR, FULL)}
    return kinds | {"around": both - kinds[LINEAR] - kinds[FULL]}


def a_token(kinds: dict[str, Counter[str]]) -> int:
    """Dispatches of all layers and what is around them."""
    around = kinds["around"].total()
    return around + sum(n * kinds[kind].total() for kind, n in NUM_LAYERS.items())


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
        model, cache = our_model([kind], num_experts=num_experts, vocab_size=64), caches([kind])
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


def prefill_macs_over_useful(num_tokens: int = 2048, seeds: int = 5) -> float:
    """Multiply-adds of the grouped expert matmul over useful ones, the mean over seeds.

    Experts as popular as in real texts: log-normal, so that the most wanted get eight times the
    rows of the average. By the arithmetic that its tests hold against the emulator's count.
    """
    hidden, width, k = (
        TEXT[n] for n in ("hidden_size", "moe_intermediate_size", "num_experts_per_tok")
    )
    ratios = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        popularity = 0.8 * rng.standard_normal(TEXT["num_experts"])
        logits = popularity + rng.gumbel(size=(num_tokens, TEXT["num_experts"]))
        chosen = np.argpartition(logits, -k, axis=1)[:, -k:]
        counts = np.bincount(chosen.flatten(), minlength=TEXT["num_experts"]).tolist()
        issued = num_matrix_macs(counts, hidden, 2 * width) + num_matrix_macs(counts, width, hidden)
        ratios.append(issued / (num_tokens * k * 3 * hidden * width))
    return round(sum(ratios) / seeds, 4)


def row_invariant(num_specialisations: int = 8) -> dict[str, int]:
    """Rows compared, and rows that differ."""
    with emulated():
        metal.clear()
        result = compare(range(num_specialisations))
    metal.clear()
    return result


def attention_bytes(length: int) -> dict[str, int]:
    """Bytes of a decode step's attention in a layer: of keys and values, read and at least; of
    sums between its two passes, written and read."""
    heads, kv_heads, dim = (
        TEXT[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    group = heads // kv_heads
    passes = -(-group // row_class(group))
    blocks = key_blocks(length)
    key_bytes = 2 * kv_heads * dim * 2
    return {
        "read": passes * key_bytes * sum(end - start for start, end in blocks),
        "least": key_bytes * length,
        "sums": 2 * len(blocks) * heads * (dim + 2) * 4,
    }


def emulated_attention_bytes(length: int) -> dict[str, int]:
    """The same, counted by the emulator."""
    heads, kv_heads, dim = (
        TEXT[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    q = leaf((1, heads, 1, dim), mx.bfloat16)
    k, v = (mx.zeros((1, kv_heads, length + 512, dim), mx.bfloat16)[:, :, :length] for _ in "kv")
    with emulated() as log:
        metal.clear()
        decode_attention_kernel(q, k, v, dim**-0.5)
    metal.clear()
    first, second = (launch.traffic for launch in log.launches)
    moved = [first[n].written_bytes + second[n].unique_read_bytes for n in ("sums", "extremes")]
    return {
        "read": first["k"].read_bytes + first["v"].read_bytes,
        "least": k.nbytes + v.nbytes,
        "sums": sum(moved),
    }


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
    ours, theirs = per_kind(our_model), per_kind(mlx_lm_model)
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
    attention = {n: attention_bytes(n) for n in (CONTEXT, 262_144)}
    assert attention[CONTEXT] == emulated_attention_bytes(CONTEXT)
    long = attention[262_144]
    prefill_peak = prefill_peak_bytes()
    print(f"attention of a decode step, bytes a layer: {attention}")
    print(f"prefill step of 2,048 at 32,768 tokens, bytes a layer over its cache: {prefill_peak}")
    worst = max(row["moved"] / row["least"] for row in rows.values() if row["least"])
    result = {
        **label(),
        "model": "Qwen3.5-397B-A17B shapes, 4 bits, group 64, bf16",
        "context": CONTEXT,
        "dispatches": a_token(ours),
        "dispatches_mlx_lm": a_token(theirs),
        "dispatches_vs_mlx_lm": round(a_token(ours) / a_token(theirs), 4),
        "dispatches_per_linear_layer": ours[LINEAR].total(),
        "dispatches_per_full_layer": ours[FULL].total(),
        "decode_bytes_over_minimum": round(worst, 4),
        "prefill_macs_over_useful": prefill_macs_over_useful(),
        "slots_per_weight": slots,
        "slots_per_weight_with_norm": slots_per_weight(norm=True),
        "row_invariant": row_invariant(),
        "kv_bytes_read_over_least": round(long["read"] / long["least"], 4),
        "prefill_peak_bytes": prefill_peak["bf16"],
        "prefill_peak_bytes_measured": prefill_peak["measured"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
