"""Linear attention: projections, causal convolution, gates, the delta rule, gated norm.

B batch, T tokens, Hk/Hv key/value heads, Dk/Dv head dims, K convolution taps.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .config import ModelConfig
from .kernels.gated_delta_rule import gated_delta_rule
from .kernels.metal import NONE, Choice

L2_EPS = 1e-6


class GatedRMSNorm(nn.Module):
    """`rms_norm(x) * weight * silu(z)` over each value head; the weight is not zero-centred."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = mx.ones(dim)
        self._eps = eps

    def __call__(self, x: mx.array, z: mx.array) -> mx.array:
        """x fp32 and z of any float type, both `[..., Dv]`; returns z's type."""
        normed = mx.fast.rms_norm(x, self.weight.astype(mx.float32), self._eps)
        return (normed * nn.silu(z.astype(mx.float32))).astype(z.dtype)


class GatedDeltaNet(nn.Module):
    """One linear attention layer (arXiv 2412.06464) with a fixed-size state."""

    kernels: Choice = NONE

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._num_key_heads = config.linear_num_key_heads
        self._num_value_heads = config.linear_num_value_heads
        self._key_head_dim = config.linear_key_head_dim
        self._value_head_dim = config.linear_value_head_dim
        self._key_dim = config.key_dim
        self._taps = config.linear_conv_kernel_dim
        hidden, channels = config.hidden_size, config.conv_dim
        self.in_proj_qkv = nn.Linear(hidden, channels, bias=False)
        self.in_proj_z = nn.Linear(hidden, config.value_dim, bias=False)
        self.in_proj_b = nn.Linear(hidden, self._num_value_heads, bias=False)
        self.in_proj_a = nn.Linear(hidden, self._num_value_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, self._taps, groups=channels, bias=False)
        self.A_log = mx.zeros(self._num_value_heads)
        self.dt_bias = mx.ones(self._num_value_heads)
        self.norm = GatedRMSNorm(self._value_head_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(config.value_dim, hidden, bias=False)

    def __call__(self, x: mx.array, mask: mx.array | None, cache: Any | None) -> mx.array:
        """`[B, T, hidden]` -> the same; mask `[B, T]`, False at padding, leaves no trace there."""
        batch, num_tokens, _ = x.shape
        conv_state, recurrent_state = (cache[0], cache[1]) if cache is not None else (None, None)

        qkv = self.in_proj_qkv(x)
        if mask is not None:
            qkv = mx.where(mask[..., None], qkv, 0)
        qkv, conv_state = self._convolve(qkv, conv_state, cache)
        q, k, v = mx.split(qkv, [self._key_dim, 2 * self._key_dim], axis=-1)
        q = q.reshape(batch, num_tokens, self._num_key_heads, self._key_head_dim)
        k = k.reshape(batch, num_tokens, self._num_key_heads, self._key_head_dim)
        v = v.reshape(batch, num_tokens, self._num_value_heads, self._value_head_dim)

        g, beta = self._gates(x, mask)
        q = l2_norm(q) * self._key_head_dim**-0.5
        out, recurrent_state = gated_delta_rule(
            q, l2_norm(k), v, g, beta, recurrent_state, self.kernels
        )
        if cache is not None:
            cache[0], cache[1] = conv_state, recurrent_state
            cache.advance(num_tokens)

        z = self.in_proj_z(x).reshape(out.shape)
        return self.out_proj(self.norm(out, z).reshape(batch, num_tokens, -1))

    def _convolve(
        self, qkv: mx.array, state: mx.array | None, cache: Any | None
    ) -> tuple[mx.array, mx.array]:
        """SiLU of the causal convolution, and the last K - 1 inputs as the new conv_state."""
        batch, num_tokens, channels = qkv.shape
        keep = self._taps - 1
        if state is None:
            state = mx.zeros((batch, keep, channels), qkv.dtype)
        window = mx.concatenate([state, qkv], axis=1)
        lengths = getattr(cache, "lengths", None)
        if lengths is None:
            # A copy: a view would keep the whole window of a long prefill alive.
            state = mx.contiguous(window[:, num_tokens:])
        else:
            # Right-padded rows: the state ends where the row ends.
            ends = mx.clip(lengths, 0, num_tokens)
            rows = (ends[:, None] + mx.arange(keep))[..., None]
            state = mx.take_along_axis(window, rows, axis=1)
        if num_tokens == 1:
            mixed = (window * self.conv1d.weight[..., 0].T).sum(axis=1, keepdims=True)
        else:
            mixed = self.conv1d(window)
        return nn.silu(mixed), state

    def _gates(self, x: mx.array, mask: mx.array | None) -> tuple[mx.array, mx.array]:
        """Log decay g and update strength beta, `[B, T, Hv]` each, fp32."""
        a = self.in_proj_a(x).astype(mx.float32)
        beta = mx.sigmoid(self.in_proj_b(x).astype(mx.float32))
        # fp32: exp(A_log) overflows fp16, and small decays vanish in bf16.
        g = -mx.exp(self.A_log.astype(mx.float32)) * nn.softplus(
            a + self.dt_bias.astype(mx.float32)
        )
        if mask is not None:
            # No decay and no update: the state passes a pad untouched.
            g, beta = mx.where(mask[..., None], g, 0), mx.where(mask[..., None], beta, 0)
        return g, beta


def l2_norm(x: mx.array) -> mx.array:
    """Unit length over the last axis, in fp32; eps is added to the sum of squares."""
    x = x.astype(mx.float32)
    return x * mx.rsqrt((x * x).sum(axis=-1, keepdims=True) + L2_EPS)
