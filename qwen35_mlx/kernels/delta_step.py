"""A linear attention layer between its projections: convolution, gates, delta rule, gated norm.

B batch, T tokens, Hk/Hv key/value heads, Dk/Dv head dims, K convolution taps, C channels of q|k|v.
"""

import functools
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .gated_delta_rule import gated_delta_rule, is_fused, runs_chunk_kernel
from .matrix import FLOATS, token_class
from .metal import kernel
from .tiers import PORTABLE, Tiers

L2_EPS = 1e-6
# Wider heads would need more registers or threadgroup memory than there are.
HEAD_DIMS = (8, 16, 32, 64, 128)
ROWS_PER_SIMDGROUP = 8


class DeltaParameters(NamedTuple):
    """Weights of the layer that are no projections."""

    conv_weight: mx.array  # [C, K, 1]
    A_log: mx.array  # [Hv]
    dt_bias: mx.array  # [Hv]
    norm_weight: mx.array  # [Dv], not zero-centred
    eps: float


def delta_step(
    qkv: mx.array,
    z: mx.array,
    b: mx.array,
    a: mx.array,
    conv_state: mx.array,
    recurrent_state: mx.array,
    parameters: DeltaParameters,
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
    kernels: Tiers = PORTABLE,
) -> tuple[mx.array, mx.array, mx.array]:
    """Output `[B, T, Hv * Dv]` in z's type, new conv_state and recurrent_state.

    qkv `[B, T, C]`, z `[B, T, Hv * Dv]`, b and a `[B, T, Hv]` are the projections; conv_state
    `[B, K - 1, C]`, recurrent_state `[B, Hv, Dv, Dk]` fp32. mask `[B, T]` is False at padding,
    which leaves no trace; lengths `[B]` are those of right-padded rows. Of many tokens, the delta
    rule alone may run as a kernel.
    """
    batch, num_tokens, channels = qkv.shape
    num_value_heads, value_head_dim, key_head_dim = recurrent_state.shape[1:]
    if (
        kernels.runs("delta_step", num_tokens)
        and lengths is None
        and key_head_dim in HEAD_DIMS
        and value_head_dim in HEAD_DIMS
        and qkv.dtype in FLOATS
    ):
        return delta_step_kernel(qkv, z, b, a, conv_state, recurrent_state, parameters, mask)
    key_dim = (channels - num_value_heads * value_head_dim) // 2
    if mask is not None:
        qkv = mx.where(mask[..., None], qkv, 0)
    qkv, conv_state = _convolve(qkv, conv_state, parameters.conv_weight, lengths, kernels)
    if kernels.on_mlx:
        out, recurrent_state = _delta_mlx(qkv, z, b, a, recurrent_state, parameters, mask, kernels)
        return out, conv_state, recurrent_state
    q, k, v = mx.split(qkv, [key_dim, 2 * key_dim], axis=-1)
    q = q.reshape(batch, num_tokens, -1, key_head_dim)
    k = k.reshape(batch, num_tokens, -1, key_head_dim)
    v = v.reshape(batch, num_tokens, num_value_heads, value_head_dim)
    g, beta = _gates(a, b, parameters, mask)
    q = l2_norm(q) * key_head_dim**-0.5
    out, recurrent_state = gated_delta_rule(q, l2_norm(k), v, g, beta, recurrent_state, kernels)
    weight = parameters.norm_weight.astype(mx.float32)
    out = mx.fast.rms_norm(out, weight, parameters.eps)
    out = out.reshape(z.shape) * nn.silu(z.astype(mx.float32))
    return out.astype(z.dtype), conv_state, recurrent_state


def _delta_mlx(
    qkv: mx.array,
    z: mx.array,
    b: mx.array,
    a: mx.array,
    state: mx.array,
    parameters: DeltaParameters,
    mask: mx.array | None,
    kernels: Tiers,
) -> tuple[mx.array, mx.array]:
    """Output and new recurrent_state from the convolved qkv, in few dispatches.

    qkv is fp32: MLX rounds the decay to the type of q, and in bf16 a slow one becomes one.
    """
    batch, num_tokens, channels = qkv.shape
    num_value_heads, value_head_dim, key_head_dim = state.shape[1:]
    qk, v = mx.split(qkv, [channels - num_value_heads * value_head_dim], axis=-1)
    qk = qk.reshape(batch, num_tokens, -1, key_head_dim)
    # Unit length, as l2_norm: eps is added to the mean of squares here, to their sum there.
    qk = mx.fast.rms_norm(qk, _unit(key_head_dim), L2_EPS / key_head_dim)
    q, k = mx.split(qk, 2, axis=2)
    v = v.reshape(batch, num_tokens, num_value_heads, value_head_dim)
    if is_fused(q.shape[2], num_value_heads, key_head_dim, value_head_dim) and not (
        runs_chunk_kernel(q, k, v, kernels)
    ):
        decay, beta = _decay_and_beta(a, b, parameters.A_log, parameters.dt_bias)
        if mask is not None:
            # Not as the mask of the operation: that would make it a graph.
            decay, beta = mx.where(mask[..., None], decay, 1), mx.where(mask[..., None], beta, 0)
        out, state = mx.fast.gated_delta_update(q, k, v, decay, beta, state)
    else:
        g, beta = _gates(a, b, parameters, mask)
        out, state = gated_delta_rule(q, k, v, g, beta, state, kernels)
    # q is sqrt(Dk) too long, and so is the output; the norm takes that out, but for its eps.
    out = mx.fast.rms_norm(out, None, parameters.eps * key_head_dim)
    out = _weighted_and_gated(out, parameters.norm_weight, z.reshape(out.shape))
    return out.reshape(z.shape), state


@functools.cache
def _unit(dim: int) -> mx.array:
    """The weight of an RMS norm that gives unit length."""
    weight = mx.full((dim,), dim**-0.5)
    mx.eval(weight)
    return weight


@functools.partial(mx.compile, shapeless=True)
def _decay_and_beta(
    a: mx.array, b: mx.array, A_log: mx.array, dt_bias: mx.array
) -> tuple[mx.array, mx.array]:
    """As `_gates`, but the decay itself."""
    g = -mx.exp(A_log.astype(mx.float32)) * nn.softplus(
        a.astype(mx.float32) + dt_bias.astype(mx.float32)
    )
    return mx.exp(g), mx.sigmoid(b.astype(mx.float32))


@functools.partial(mx.compile, shapeless=True)
def _weighted_and_gated(x: mx.array, weight: mx.array, z: mx.array) -> mx.array:
    """x * weight * silu(z) in z's type, computed in fp32."""
    return (x * weight.astype(mx.float32) * nn.silu(z.astype(mx.float32))).astype(z.dtype)


@functools.partial(mx.compile, shapeless=True)
def _silu_fp32(x: mx.array) -> mx.array:
    """SiLU in fp32, as which MLX's delta rule takes its inputs."""
    return nn.silu(x.astype(mx.float32))


def _convolve(
    qkv: mx.array,
    state: mx.array,
    weight: mx.array,
    lengths: mx.array | None,
    kernels: Tiers,
) -> tuple[mx.array, mx.array]:
    """SiLU of the causal convolution, and the last K - 1 inputs as the new conv_state."""
    num_tokens, channels = qkv.shape[1:]
    keep = state.shape[1]
    window = mx.concatenate([state, qkv], axis=1)
    if lengths is None:
        # A copy: a view would keep the whole window of a long prefill alive.
        state = mx.contiguous(window[:, num_tokens:])
    else:
        # Right-padded rows: the state ends where the row ends.
        ends = mx.clip(lengths, 0, num_tokens)
        rows = (ends[:, None] + mx.arange(keep))[..., None]
        state = mx.take_along_axis(window, rows, axis=1)
    if num_tokens == 1 and not kernels.on_mlx:
        mixed = (window * weight[..., 0].T).sum(axis=1, keepdims=True)
    else:
        mixed = mx.conv1d(window, weight, groups=channels)
    return (_silu_fp32(mixed) if kernels.on_mlx else nn.silu(mixed)), state


def _gates(
    a: mx.array, b: mx.array, parameters: DeltaParameters, mask: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Log decay g and update strength beta, `[B, T, Hv]` each, fp32."""
    beta = mx.sigmoid(b.astype(mx.float32))
    # fp32: exp(A_log) overflows fp16, and small decays vanish in bf16.
    g = -mx.exp(parameters.A_log.astype(mx.float32)) * nn.softplus(
        a.astype(mx.float32) + parameters.dt_bias.astype(mx.float32)
    )
    if mask is not None:
        # No decay and no update: the state passes a pad untouched.
        g, beta = mx.where(mask[..., None], g, 0), mx.where(mask[..., None], beta, 0)
    return g, beta


def l2_norm(x: mx.array) -> mx.array:
    """Unit length over the last axis, in fp32; eps is added to the sum of squares."""
    x = x.astype(mx.float32)
    return x * mx.rsqrt((x * x).sum(axis=-1, keepdims=True) + L2_EPS)


def delta_step_kernel(
    qkv: mx.array,
    z: mx.array,
    b: mx.array,
    a: mx.array,
    conv_state: mx.array,
    recurrent_state: mx.array,
    parameters: DeltaParameters,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """The same for T up to 8, in one dispatch that reads and writes the state once."""
    batch, num_tokens, channels = qkv.shape
    num_value_heads, value_head_dim, key_head_dim = recurrent_state.shape[1:]
    names = "qkv z b a conv_state state conv_weight A_log dt_bias norm_weight eps mask".split()
    conv_weight, *others, eps = parameters
    out, conv_state, recurrent_state = kernel(
        "delta_step", tuple(names), ("out", "new_conv_state", "new_state")
    )(
        # Without a mask anything fills its place.
        inputs=[
            *(qkv, z, b, a, conv_state, recurrent_state, conv_weight, *others, eps),
            b if mask is None else mask,
        ],
        template=[
            ("T", z.dtype),
            ("TOKENS", token_class(num_tokens)),
            ("TAPS", conv_weight.shape[1]),
            ("HK", (channels - z.shape[-1]) // (2 * key_head_dim)),
            ("HV", num_value_heads),
            ("DK", key_head_dim),
            ("DV", value_head_dim),
            ("MASKED", mask is not None),
        ],
        grid=(32 * (value_head_dim // ROWS_PER_SIMDGROUP), num_value_heads, batch),
        threadgroup=(32 * (value_head_dim // ROWS_PER_SIMDGROUP), 1, 1),
        output_shapes=[z.shape, conv_state.shape, recurrent_state.shape],
        output_dtypes=[z.dtype, z.dtype, mx.float32],
    )
    return out, conv_state, recurrent_state
