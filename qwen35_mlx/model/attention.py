"""Gated full attention with partial rotary embedding (default and YaRN).

B batch, T tokens, S cached tokens, H/Hk query/key heads, D head dim, R rotated dims.
"""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import ModelConfig, RopeConfig
from ..kernels.attention_heads import output_gate, qk_norm, qk_norm_rope
from ..kernels.decode_attention import Heads, Packed, decode_attention, unpacked
from ..kernels.projection import project
from ..kernels.tiers import PORTABLE, Tiers
from ..memory import MAX_SCORES_BYTES, query_block


def rope_periods(rope: RopeConfig) -> tuple[np.ndarray, float]:
    """Positions per radian `[R / 2]` (inverse frequencies inverted) and the YaRN attention factor.

    Source: arXiv 2309.00071, section 3.2; in float32 steps as the reference does them.
    """
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / rope.rotary_dim
    # float64: numpy's float32 power is off in the last digit, 0.01 rad at the end of the context.
    periods = (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    trained_length = rope.original_max_position_embeddings
    if rope.factor is None or trained_length is None:
        return periods, 1.0

    def dim_of(num_rotations: float) -> float:
        length = trained_length / (num_rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    span = (high - low) or 0.001
    dims = np.arange(rope.rotary_dim // 2, dtype=np.float32)
    kept = 1 - np.clip((dims - low) / np.float32(span), 0, 1)
    # In the reference's order of operations: the last digits count at large positions.
    frequencies = 1 / (np.float32(rope.factor) * periods) * (1 - kept) + 1 / periods * kept
    return (1 / frequencies).astype(np.float32), rope.attention_factor or 1.0


class PartialRope:
    """Rotates the first R dims of each head, halves against each other."""

    def __init__(self, rope: RopeConfig):
        periods, self._factor = rope_periods(rope)
        # Underscored: derived from the config, so no parameter to load.
        self._periods = mx.array(periods)
        self._rotary_dim = rope.rotary_dim

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """`[B, H, T, D]` at positions offset, offset + 1, …; offset an int or one per row."""
        if self._factor != 1.0:
            rotated, kept = mx.split(x, [self._rotary_dim], axis=-1)
            x = mx.concatenate([rotated * self._factor, kept], axis=-1)
        # Periods are given, not theta: the GPU's fast exp2 loses digits at large positions.
        return mx.fast.rope(
            x,
            self._rotary_dim,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._periods,
        )

    def tables(self, positions: mx.array) -> tuple[mx.array, mx.array]:
        """Cosines and sines `[..., R / 2]` of positions `[...]`, scaled by YaRN, in fp32."""
        angles = positions[..., None].astype(mx.float32) * (1 / self._periods)
        return mx.cos(angles) * self._factor, mx.sin(angles) * self._factor


def attention_mask(num_tokens: int, cache: Any | None) -> Any:
    """What new tokens may see, as MLX's attention takes it: None, "causal" or an array."""
    if cache is None:
        return None if num_tokens == 1 else "causal"
    # All three by name: mlx-lm's own caches have no defaults for them.
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
    """Attention for so many queries at a time that their scores fit the bytes.

    The same numbers as at once: no sum runs over queries.
    """
    num_tokens, num_keys = q.shape[2], k.shape[2]
    block = query_block(q.shape[0] * q.shape[1], num_keys, max_scores_bytes, q.itemsize)
    if num_tokens <= block:
        return decode_attention(q, k, v, scale, mask, kernels)
    k, v = unpacked(k), unpacked(v)
    outputs = []
    for start in range(0, num_tokens, block):
        end = min(start + block, num_tokens)
        # "causal" takes the last query to see the last key.
        seen = num_keys - num_tokens + end if isinstance(mask, str) else num_keys
        rows = mask[..., start:end, :] if isinstance(mask, mx.array) else mask
        keys, values = k[:, :, :seen], v[:, :, :seen]
        outputs.append(
            mx.fast.scaled_dot_product_attention(
                q[:, :, start:end], keys, values, scale=scale, mask=rows
            )
        )
        # Or MLX makes the scores of all blocks at once.
        mx.eval(outputs[-1])
    return mx.concatenate(outputs, axis=2)


class Attention(nn.Module):
    """Grouped-query attention whose output is gated by a sigmoid from the query projection."""

    kernels: Tiers = PORTABLE
    max_scores_bytes: int = MAX_SCORES_BYTES

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._num_kv_heads = config.num_key_value_heads
        self._scale = config.head_dim**-0.5
        hidden, dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, 2 * config.num_attention_heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, self._num_kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, self._num_kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, hidden, bias=False)
        self.q_norm = nn.RMSNorm(dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(dim, eps=config.rms_norm_eps)
        self.rope = PartialRope(config.rope)

    def __call__(
        self,
        x: mx.array,
        norm: nn.RMSNorm,
        mask: Any,
        cache: Any | None,
        tables: tuple[mx.array, mx.array] | None = None,
    ) -> mx.array:
        """x `[B, T, hidden]`, to be normalised by `norm` -> x + attention.

        mask as MLX's attention takes it: None, "causal" or an array; tables, cosines and sines
        `[B or 1, T, R / 2]`, override the positions of the cache.
        """
        batch, num_tokens, _ = x.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        k: Any
        v: Any
        q_gate, k, v = project(x, projections, self.kernels, norm=norm)
        v = v.reshape(batch, num_tokens, self._num_kv_heads, -1).swapaxes(1, 2)
        weights = self.q_norm.weight, self.k_norm.weight
        if tables is None:
            q, k = qk_norm(q_gate, k, *weights, self.q_norm.eps)
            offset = 0 if cache is None else cache.offset
            q, k = self.rope(q, offset), self.rope(k, offset)
        else:
            q, k = qk_norm_rope(q_gate, k, *weights, *tables, self.q_norm.eps, self.kernels)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
            if hasattr(cache, "bits"):
                # mlx-lm's quantized cache, of its option kv_bits.
                k, v = (Packed(parts, cache.bits, cache.group_size) for parts in (k, v))
        out = attend(q, k, v, self._scale, mask, self.max_scores_bytes, self.kernels)
        out = output_gate(out, q_gate, self.kernels)
        return project(out, (self.o_proj,), self.kernels, residual=x)[0]
