"""Dispatches of a model, counted without a GPU.

The rule, the same for ours and for mlx-lm's own model code: build the graph of a layer and count
its nodes, without evaluating it. A custom kernel or an `mx.fast` operation is one, attention over
a cache two (its two passes), `gated_delta_update` two (MLX fills its output first), a
concatenation one for each part. Of a compiled function each fused chain is one, and so is each
node that MLX does not fuse. Views count nothing, and neither does a reshape, though mlx-lm's copy
at times. The number of experts changes no count, so the stacks are views of zeros.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.gated_delta as gated_delta
from mlx.utils import tree_map
from mlx_lm.models import qwen3_5
from mlx_lm.models.cache import ArraysCache, KVCache

from qwen35_mlx.config import FULL, LINEAR, ModelConfig
from qwen35_mlx.family import family_config
from qwen35_mlx.kernels import metal, tiers
from qwen35_mlx.model.language import Model

CONTEXT = 4096
Text = dict[str, Any]
Make = Callable[[Text, list[str]], nn.Module]
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

    def delta_update(self, q: mx.array, k: mx.array, v: mx.array, *others: Any) -> list[mx.array]:
        state = others[2]
        self.roots += [q, k, v, *others]
        self.counts["GatedDeltaUpdate"] += 2
        return [leaf(v.shape, q.dtype), leaf(state.shape, state.dtype)]

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
            patch.object(fast, "gated_delta_update", self.delta_update),
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


def kv_cache(text: Text, num_tokens: int) -> KVCache:
    """With room for the next tokens, as it mostly has."""
    entry = KVCache()
    shape = (1, text["num_key_value_heads"], CONTEXT + num_tokens, text["head_dim"])
    entry.keys, entry.values = leaf(shape, mx.bfloat16), leaf(shape, mx.bfloat16)
    entry.offset = CONTEXT
    return entry


def linear_cache(text: Text) -> ArraysCache:
    """Both states of a layer."""
    heads, dim = text["linear_num_value_heads"], text["linear_key_head_dim"]
    channels = (2 * text["linear_num_key_heads"] + heads) * dim
    entry = ArraysCache(size=2)
    entry[0] = leaf((1, 3, channels), mx.bfloat16)
    entry[1] = leaf((1, heads, dim, dim), mx.float32)
    return entry


def caches(text: Text, layer_types: list[str], num_tokens: int = 1) -> list[Any]:
    """One entry a layer."""
    return [linear_cache(text) if t == LINEAR else kv_cache(text, num_tokens) for t in layer_types]


def our_model(text: Text, layer_types: list[str], chosen: tiers.Tiers | None = None) -> Model:
    """Ours, of these layers, with all kernels or those of `chosen`."""
    text = text | {"layer_types": layer_types, "num_hidden_layers": len(layer_types)}
    model = Model(ModelConfig.from_hf(text))
    with_leaves(model, model.quant_predicate)
    tiers.use(model, tiers.with_kernels() if chosen is None else chosen)
    return model


def default_model(text: Text, layer_types: list[str]) -> Model:
    """Ours as it is on a Mac where nothing was checked yet."""
    return our_model(text, layer_types, tiers.Tiers(tiers.MLX))


def mlx_lm_model(text: Text, layer_types: list[str]) -> nn.Module:
    """mlx-lm's, of these layers."""
    args = qwen3_5.TextModelArgs.from_dict(text | {"num_hidden_layers": 4})
    model = qwen3_5.TextModel(args)
    # The fourth of its layers is the attention layer.
    linear, full = model.model.layers[0], model.model.layers[3]
    model.model.layers = [linear if t == LINEAR else full for t in layer_types]
    model.model.ssm_idx = layer_types.index(LINEAR) if LINEAR in layer_types else None
    model.model.fa_idx = layer_types.index(FULL) if FULL in layer_types else None
    return with_leaves(model, lambda path, module: hasattr(module, "to_quantized"))


def count(make: Make, text: Text, layer_types: list[str], num_tokens: int = 1) -> Counter[str]:
    """Dispatches of a whole step of a model with these layers, and of what it caches."""
    model, graph = make(text, layer_types), Graph()
    cache = caches(text, layer_types, num_tokens)
    with graph.recording():
        logits = model(leaf((1, num_tokens), mx.int32), cache)
        entries = [(c.keys, c.values) if isinstance(c, KVCache) else c.cache for c in cache]
        return graph.finish(logits, *(a for entry in entries for a in entry))


def per_kind(make: Make, text: Text, num_tokens: int = 1) -> dict[str, Counter[str]]:
    """Dispatches of a layer of each kind, and of what is around the layers."""
    # The second of its kind, so that what layers share is not counted to one of them.
    both = count(make, text, [LINEAR, FULL], num_tokens)
    kinds = {
        kind: count(make, text, [LINEAR, FULL, kind], num_tokens) - both for kind in (LINEAR, FULL)
    }
    return kinds | {"around": both - kinds[LINEAR] - kinds[FULL]}


def of_a_step(kinds: dict[str, Counter[str]], text: Text) -> int:
    """Dispatches of all layers and what is around them."""
    num_full = text["num_hidden_layers"] // text["full_attention_interval"]
    num_layers = {LINEAR: text["num_hidden_layers"] - num_full, FULL: num_full}
    return kinds["around"].total() + sum(n * kinds[kind].total() for kind, n in num_layers.items())


def family_text(name: str) -> Text:
    """The text part of a member's config.json."""
    text: Text = family_config(f"Qwen3.5-{name}")["text_config"]
    return text
