"""Gated full attention, with a bound on the memory of the scores.

B batch, T tokens, S cached tokens, H/Hk query/key heads, D head dim, R rotated dims.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import ModelConfig
from ..kernels.attention_heads import output_gate, qk_norm, qk_norm_rope, rotate
from ..kernels.decode_attention import (
    Heads,
    Packed,
    decode_attention,
    first_keys,
    portable_attention,
)
from ..kernels.projection import project
from ..kernels.tiers import PORTABLE, Tiers
from ..memory import MAX_SCORES_BYTES, query_block
from .layer_cache import RowsKVCache
from .rope import PartialRope, Places, RopeDelta, shifted
from .shard import joined


def attention_mask(num_tokens: int, cache: Any | None) -> Any:
    """The mask for new tokens, for MLX's attention: None, "causal" or an array."""
    if cache is None:
        return None if num_tokens == 1 else "causal"
    # All arguments are given: mlx-lm's own caches have no defaults.
    return cache.make_mask(num_tokens, return_array=False, window_size=None)


def attend(
    q: mx.array,
    k: Heads,
    v: Heads,
    scale: float,
    mask: Any,
    max_scores_bytes: int,
    kernels: Tiers = PORTABLE,
) -> mx.array:
    """Attention in blocks of queries, so that the scores fit into `max_scores_bytes`.

    The result is exact: no sum runs over queries.
    """
    num_tokens, num_keys = q.shape[2], k.shape[2]
    item_bytes = 4 if isinstance(k, Packed) else q.itemsize
    block = query_block(q.shape[0] * q.shape[1], num_keys, max_scores_bytes, item_bytes)
    if num_tokens <= block:
        return decode_attention(q, k, v, scale, mask, kernels)
    outputs = []
    for start in range(0, num_tokens, block):
        end = min(start + block, num_tokens)
        # "causal" assumes that the last query sees the last key.
        seen = num_keys - num_tokens + end if isinstance(mask, str) else num_keys
        rows = mask[..., start:end, :] if isinstance(mask, mx.array) else mask
        keys, values = first_keys(k, seen), first_keys(v, seen)
        outputs.append(portable_attention(q[:, :, start:end], keys, values, scale, rows))
        # Otherwise MLX computes the scores of all blocks at once.
        mx.eval(outputs[-1])
    return mx.concatenate(outputs, axis=2)


class Attention(nn.Module):
    """Grouped-query attention whose output is gated by a sigmoid from the query projection."""

    kernels: Tiers = PORTABLE
    max_scores_bytes: int = MAX_SCORES_BYTES
    # The processes that share the layer, each with some heads.
    group: mx.distributed.Group | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.set_heads(config)
        self._scale = config.head_dim**-0.5
        hidden, dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, 2 * config.num_attention_heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, self._num_kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, self._num_kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, hidden, bias=False)
        self.q_norm = nn.RMSNorm(dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(dim, eps=config.rms_norm_eps)
        self.rope = PartialRope(config.rope)

    def set_heads(self, config: ModelConfig) -> None:
        """Set what does not follow from the shapes of the weights."""
        self._num_kv_heads = config.num_key_value_heads

    def __call__(
        self, x: mx.array, norm: nn.RMSNorm, mask: Any, cache: Any | None, places: Places = None
    ) -> mx.array:
        """x `[B, T, hidden]`, to be normalised by `norm` -> x + attention.

        mask: as from `attention_mask`. places: as from `self.places`; tables are
        `[B or 1, T, R / 2]`.
        """
        batch, num_tokens, _ = x.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        k: Any
        v: Any
        q_gate, k, v = project(x, projections, self.kernels, norm=norm)
        v = v.reshape(batch, num_tokens, self._num_kv_heads, -1).swapaxes(1, 2)
        weights = self.q_norm.weight, self.k_norm.weight
        if isinstance(places, tuple):
            q, k = qk_norm_rope(q_gate, k, *weights, *places, self.q_norm.eps, self.kernels)
        else:
            q, k = qk_norm(q_gate, k, *weights, self.q_norm.eps)
            offset = shifted(0 if cache is None else cache.offset, places)
            q, k = self.rope(q, offset), self.rope(k, offset)
        if isinstance(cache, RowsKVCache):
            out = self._attend_rows(q, k, v, cache)
        else:
            if cache is not None:
                k, v = cache.update_and_fetch(k, v)
                if hasattr(cache, "group_size"):
                    # mlx-lm's quantized cache, from its option kv_bits.
                    k, v = (Packed(parts, cache.bits, cache.group_size) for parts in (k, v))
            out = attend(q, k, v, self._scale, mask, self.max_scores_bytes, self.kernels)
        out = output_gate(out, q_gate, self.kernels)
        residual = x if self.group is None else None
        (out,) = project(out, (self.o_proj,), self.kernels, residual=residual)
        return joined(out, x, self.group)

    def _attend_rows(self, q: mx.array, k: mx.array, v: mx.array, cache: RowsKVCache) -> mx.array:
        """One token per row over the row's own keys and values -> `[B, H, 1, D]`."""
        outputs = []
        for i, row in enumerate(cache.rows):
            at = slice(i, i + 1)
            keys, values = row.update_and_fetch(k[at], v[at])
            outputs.append(
                attend(q[at], keys, values, self._scale, None, self.max_scores_bytes, self.kernels)
            )
        return mx.concatenate(outputs)

    def read(self, x: mx.array, norm: nn.RMSNorm, cache: Any, places: Places) -> None:
        """Append the keys and values of x to the cache, without computing the attention."""
        k, v = project(x, (self.k_proj, self.v_proj), self.kernels, norm=norm)
        heads = (*x.shape[:2], self._num_kv_heads, -1)
        k = mx.fast.rms_norm(k.reshape(heads), self.k_norm.weight, self.k_norm.eps)
        k, v = k.swapaxes(1, 2), v.reshape(heads).swapaxes(1, 2)
        if isinstance(places, tuple):
            k = rotate(k, *places)
        else:
            k = self.rope(k, shifted(cache.offset, places))
        cache.update_and_fetch(k, v)

    def places(
        self, x: mx.array, cache: Any | None, positions: mx.array | None, rope_delta: RopeDelta
    ) -> Places:
        """Rotary positions of tokens x, for all layers.

        Tables if positions are explicit or a kernel needs them, else the offset to add.
        """
        batch, num_tokens, _ = x.shape
        if positions is None:
            if not self.kernels.runs("qk_norm_rope", batch * num_tokens):
                return rope_delta
            offset = shifted(0 if cache is None else cache.offset, rope_delta)
            positions = mx.array(offset).reshape(-1, 1) + mx.arange(num_tokens)
        return self.rope.tables(positions)
