"""Long contexts: bytes a decoded token, appends, the peak of a prefill, and what 8 bits cost.

Slices have one DeltaNet and one full-attention layer of Qwen3.5-397B-A17B, without its experts.
A decoded token is measured with MLX's counters in bfloat16 and compared with `memory.py`; what
the Metal kernel reads is counted as in bench_kernels.py. The last step of a prefill of 32,768
tokens is run in float32 at a sixteenth of heads and width, ours and mlx-lm's in turn: all that it
holds is proportional to both, so the figure for the whole in bfloat16 is eight times that.
Divergence is that of the demo, in float32, which was shown 4,096 tokens at most.
Ends with one JSON line.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from bench_kernels import attention_bytes
from label import label
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_5
from mlx_lm.models.cache import ArraysCache as TheirArrays
from mlx_lm.models.cache import KVCache as TheirKVCache

import qwen35_mlx
from qwen35_mlx import memory
from qwen35_mlx.cli.local_models import SOURCE
from qwen35_mlx.config import FULL, LINEAR, ModelConfig
from qwen35_mlx.convert import convert
from qwen35_mlx.engine.prefix_store import snapshot_marks
from qwen35_mlx.family import family_config
from qwen35_mlx.model import attention
from qwen35_mlx.model.attention import Attention
from qwen35_mlx.model.cache import ArraysCache, KVCache
from qwen35_mlx.model.gated_delta_net import GatedDeltaNet
from qwen35_mlx.model.language import Model
from qwen35_mlx.quant.divergence import kl_divergence

sys.path.insert(0, str(Path(__file__).parent / "demo"))
from data import conversations

LENGTHS = (1024, 8192, 32_768, 131_072, 262_144)
NUM_APPENDS = 4096
PREFILL, STEP, SCALE = 32_768, 2048, 16
NUM_TEXTS, TEXT_TOKENS = 3, 4000
EDIT_TOKENS = 5000
RAW = family_config("Qwen3.5-397B-A17B")
FLAGSHIP = ModelConfig.from_hf(RAW)


class Peak:
    """Bytes held at most, over those held before; set at the end of `measured`."""

    nbytes = 0


@contextmanager
def measured() -> Iterator[Peak]:
    """Measure what a block holds at most."""
    peak = Peak()
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    yield peak
    mx.synchronize()
    peak.nbytes = mx.get_peak_memory() - before


def slice_of_397b() -> Model:
    """A layer of each kind in bfloat16."""
    # Experts are no part of it, and MLX has none in bfloat16 on the CPU.
    config = replace(
        FLAGSHIP, num_hidden_layers=2, layer_types=(LINEAR, FULL), vocab_size=512, num_experts=0,
        num_experts_per_tok=0, intermediate_size=64, num_mtp_layers=0, vision=None,
    )  # fmt: skip
    model = Model(config)
    model.set_dtype(mx.bfloat16)
    model.eval()
    mx.eval(model.parameters())
    return model


def filled(model: Model, num_tokens: int, dtype: mx.Dtype) -> list[Any]:
    """A cache that has read so many tokens, of zeros."""
    config, cache = model.config, model.make_cache()
    model.trunk(mx.array([[1]]), cache)
    for entry in cache:
        if isinstance(entry, KVCache):
            entry.trim(1)
            shape = (1, config.num_key_value_heads, num_tokens, config.head_dim)
            entry.keys = entry.values = None
            entry.update_and_fetch(mx.zeros(shape, dtype), mx.zeros(shape, dtype))
    mx.eval([entry.state for entry in cache])
    return cache


def a_token(model: Model, kv_bits: str, num_tokens: int) -> dict[str, float]:
    """What a decoded token behind so many holds and touches, measured over counted."""
    model.config = memory.kv_choices(model.config, kv_bits)[0]
    config = model.config
    parameters: Any = tree_flatten(model.parameters())
    weights = sum(a.nbytes for _, a in parameters)
    item_bytes = model.language_model.model.norm.weight.dtype.size
    dtype = model.language_model.model.norm.weight.dtype
    read: list[int] = []

    def counting(q: mx.array, k: Any, v: Any, *others: Any) -> mx.array:
        read.append(k.nbytes + v.nbytes)
        return real(q, k, v, *others)

    real = attention.decode_attention
    cache = filled(model, num_tokens - 1, dtype)
    held = sum(entry.nbytes for entry in cache)
    with patch.object(attention, "decode_attention", counting), measured() as peak:
        mx.eval(model.trunk(mx.array([[1]]), cache), [entry.state for entry in cache])
    states = sum(entry.nbytes for entry in cache if isinstance(entry, ArraysCache))
    state = memory.state_bytes(config, item_bytes)
    kv = memory.kv_bytes(config, num_tokens, item_bytes)
    room = memory.kv_bytes(config, memory.kv_capacity(num_tokens - 1), item_bytes)
    scores = memory.scores_bytes(config, 1, num_tokens, item_bytes)
    least = weights + kv + 2 * state
    moved = kv
    if config.head_dim == FLAGSHIP.head_dim:
        kernel = attention_bytes(num_tokens, kv_bits == "8")
        moved = kernel["read"] + kernel["sums"]
    return {
        "peak_bytes": weights + held + peak.nbytes,
        # The scores and what the softmax makes of them.
        "peak_over_counted": (weights + held + peak.nbytes)
        / (weights + room + 2 * state + 2 * scores),
        "touched_bytes": weights + sum(read) + 2 * states,
        "touched_over_counted": (weights + sum(read) + 2 * states) / least,
        "kernel_over_least": (moved + least - kv) / least,
    }


def appended_tokens(kv_bits: str) -> float:
    """Tokens written or copied for each that is appended behind 262,144."""
    cache = KVCache(memory.KV_BITS[kv_bits])
    shape = (1, FLAGSHIP.num_key_value_heads, LENGTHS[-1], FLAGSHIP.head_dim)
    cache.update_and_fetch(*[mx.zeros(shape, mx.bfloat16)] * 2)
    token = mx.ones((*shape[:2], 1, shape[3]), mx.bfloat16)
    mx.eval(cache.state, token)
    one = sum(a.nbytes for a in cache.rows(0, 1).values())
    copied = 0
    for _ in range(NUM_APPENDS):
        with measured() as peak:
            cache.update_and_fetch(token, token)
            mx.eval(cache.state)
        copied += one + max(peak.nbytes, 0)
    return copied / one / NUM_APPENDS


def peak_of_a_step(layer: Any, *arguments: Any) -> int:
    """In bytes of the whole layer in bfloat16."""
    mx.eval(layer.parameters())
    with measured() as peak:
        mx.eval(layer(*arguments))
    return peak.nbytes * SCALE // 2


def full_cache(entry: Any, keys: mx.array) -> Any:
    """A cache that has read the step's past, with room: keys and values are no part of a peak."""
    entry.update_and_fetch(*[mx.concatenate([keys, keys[:, :, : 2 * STEP]], axis=2)] * 2)
    entry.trim(2 * STEP)
    mx.eval(entry.state)
    return entry


def prefill_peaks() -> dict[str, dict[str, int]]:
    """The last step of a prefill: ours in 16 and 8 bits, and mlx-lm's, by kind of layer."""
    text = dict(RAW["text_config"])
    for key in ("num_attention_heads", "hidden_size", "linear_num_key_heads",
                "linear_num_value_heads"):  # fmt: skip
        text[key] //= SCALE
    config = ModelConfig.from_hf(RAW | {"text_config": text})
    theirs = qwen3_5.TextModelArgs.from_dict(text)
    x, norm = mx.random.normal((1, STEP, text["hidden_size"])), nn.RMSNorm(text["hidden_size"])
    keys = mx.random.normal((1, text["num_key_value_heads"], PREFILL - STEP, text["head_dim"]))
    mx.eval(x, keys, norm.parameters())
    full, linear = dict[str, int](), dict[str, int]()
    for name, bits in (("16", None), ("8", (8, 8))):
        layer = Attention(config)
        layer.max_scores_bytes = memory.MAX_SCORES_BYTES // SCALE * 2
        full[name] = peak_of_a_step(layer, x, norm, "causal", full_cache(KVCache(bits), keys))
    cache = full_cache(TheirKVCache(), keys)
    full["mlx-lm"] = peak_of_a_step(qwen3_5.Attention(theirs), x, "causal", cache)
    linear["16"] = peak_of_a_step(GatedDeltaNet(config), x, norm, None, ArraysCache(2))
    linear["mlx-lm"] = peak_of_a_step(qwen3_5.GatedDeltaNet(theirs), x, None, TheirArrays(2))
    return {FULL: full, LINEAR: linear}


def divergence(model: Model, tokenizer: Any) -> dict[str, tuple[float, float]]:
    """KL to the demo with a cache of floats, and how often the likeliest token is the same."""
    texts = mx.array(conversations(tokenizer._tokenizer, NUM_TEXTS, TEXT_TOKENS))
    plain, found = [model(text[None], model.make_cache())[0] for text in texts], {}
    mx.eval(plain)
    for kv_bits in ("8", "k8v4"):
        model.config = memory.kv_choices(model.config, kv_bits)[0]
        kl, same = [], []
        for text, expected in zip(texts, plain, strict=True):
            logits = model(text[None], model.make_cache())[0]
            kl.append(kl_divergence(expected, logits).mean())
            same.append((expected.argmax(axis=-1) == logits.argmax(axis=-1)).mean())
            mx.eval(kl, same)
        found[kv_bits] = mx.stack(kl).mean().item(), mx.stack(same).mean().item()
    return found


def main() -> None:
    """Measure, print, and end with JSON."""
    with tempfile.TemporaryDirectory() as folder:
        out = convert(SOURCE, Path(folder) / "demo", dtype="float32")
        demo, tokenizer = qwen35_mlx.load(out)
        right = {kv_bits: questions_right(out, kv_bits) for kv_bits in ("16", "8", "k8v4")}
    print(f"questions of the exam answered right, by bits of keys and values: {right}")
    kl = divergence(demo, tokenizer)
    for kv_bits, (nats, share) in kl.items():
        print(f"keys and values in {kv_bits} bits: KL {nats:.6f}, same token {share:.4f}")
    peaks = prefill_peaks()
    for kind, figures in peaks.items():
        print(f"step of {STEP:,} tokens that ends at {PREFILL:,}, {kind}, bytes: {figures}")
    rows = {}
    for name, model in (("397B slice", slice_of_397b()), ("demo", demo)):
        for kv_bits in ("16", "8"):
            for length in LENGTHS:
                row = rows[name, kv_bits, length] = a_token(model, kv_bits, length)
                print(f"{name}, {kv_bits} bits, {length:,} tokens: {shown(row)}")
    copied = {kv_bits: appended_tokens(kv_bits) for kv_bits in ("16", "8")}
    print(f"tokens written or copied for one behind {LENGTHS[-1]:,}: {copied}")
    edit = LENGTHS[-1] - EDIT_TOKENS
    again = edit - max(n for n in snapshot_marks(0, LENGTHS[-1]) if n <= edit)
    print(f"an edit {EDIT_TOKENS:,} tokens before the end reads {again:,} tokens again")
    result = {
        **label(),
        "bytes_over_least_max": round(max(r["kernel_over_least"] for r in rows.values()), 4),
        "touched_over_counted_max": round(max(r["touched_over_counted"] for r in rows.values()), 4),
        "peak_over_counted_max": round(max(r["peak_over_counted"] for r in rows.values()), 4),
        "append_copied_tokens": round(max(copied.values()), 4),
        "edit_reads_again": again,
        "kv8_kl": round(kl["8"][0], 6),
        "kv8_top1": round(kl["8"][1], 4),
        "k8v4_kl": round(kl["k8v4"][0], 6),
        "k8v4_top1": round(kl["k8v4"][1], 4),
        "exam_right": right,
        "prefill_peak_bytes": max(peaks[FULL]["16"], peaks[FULL]["8"], peaks[LINEAR]["16"]),
        "prefill_peak_vs_mlx_lm": round(peaks[FULL]["16"] / peaks[FULL]["mlx-lm"], 4),
    }
    if (Path(__file__).parent / "bench_context_disk.py").exists():
        import bench_context_disk

        result |= bench_context_disk.measure()
    print(json.dumps(result))


def questions_right(folder: Path, kv_bits: str) -> str:
    """Of the demo's exam, every second question without a picture."""
    sys.path.insert(0, str(Path(__file__).parent / "demo"))
    from evaluate import exam, judge

    questions = [sample for sample in exam(12) if sample.picture is None][::2]
    right, asked, _ = judge(*qwen35_mlx.load(folder, kv_bits=kv_bits), questions)
    return f"{right.total()} of {asked.total()}"


def shown(row: dict[str, float]) -> str:
    """One line."""
    return ", ".join(f"{k} {v:,.0f}" if v > 100 else f"{k} {v:.4f}" for k, v in row.items())


if __name__ == "__main__":
    main()
