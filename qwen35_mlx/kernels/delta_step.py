"""A linear attention layer between its projections: convolution, gates, delta rule, gated norm.

B batch, T tokens, Hk/Hv key/value heads, Dk/Dv head dims, K convolution taps, C channels of q|k|v.
"""

import functools
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .gated_delta_rule import (
    gated_delta_rule,
    is_fused,
    recurrent_gated_delta_rule,
    runs_chunk_kernel,
)
from .matrix import FLOATS, MAX_ROWS, token_class
from .metal import kernel
from .tiers import PORTABLE, Tiers

L2_EPS = 1e-6
# Wider heads need too many registers or too much threadgroup memory.
HEAD_DIMS = (8, 16, 32, 64, 128)
ROWS_PER_SIMDGROUP = 8


class DeltaParameters(NamedTuple):
    """The layer's weights other than projections."""

    conv_weight: mx.array  # [C, K, 1]
    A_log: mx.array  # [Hv]
    dt_bias: mx.array  # [Hv]
    norm_weight: mx.array  # [Dv], not zero-centred
    eps: float


class DeltaInputs(NamedTuple):
    """The layer's inputs; mask `[B, T]` is False at padding, which does not change the state."""

    qkv: mx.array  # [B, T, C], a projection as the next three
    z: mx.array  # [B, T, Hv * Dv]
    b: mx.array  # [B, T, Hv]
    a: mx.array
    conv_state: mx.array  # [B, K - 1, C]
    recurrent_state: mx.array  # [B, Hv, Dv, Dk], fp32
    parameters: DeltaParameters
    mask: mx.array | None = None


class KeptStates(NamedTuple):
    """The states after every token of a pass whose last tokens may be taken back."""

    window: mx.array  # [B, K - 1 + T, C], inputs of the convolution
    recurrent_states: list[mx.array]  # T + 1 of [B, Hv, Dv, Dk]
    num_accepted: int

    def states(self) -> tuple[mx.array, mx.array]:
        """conv_state and recurrent_state after the accepted tokens."""
        keep = self.window.shape[1] - len(self.recurrent_states) + 1
        # A copy, because a view would keep the whole window alive.
        conv_state = mx.contiguous(self.window[:, self.num_accepted : self.num_accepted + keep])
        return conv_state, self.recurrent_states[self.num_accepted]

    @property
    def arrays(self) -> list[mx.array]:
        """All that has to be evaluated."""
        return [self.window, *self.recurrent_states]


class Tape(NamedTuple):
    """States, and the projections of the tokens after them, which may be taken back.

    The kernel replays the accepted tokens before its next ones. So each pass reads and writes the
    states only once.
    """

    conv_state: mx.array
    recurrent_state: mx.array
    qkv: mx.array  # [B, T, C]
    b: mx.array  # [B, T, Hv]
    a: mx.array
    parameters: DeltaParameters
    num_accepted: int

    def states(self) -> tuple[mx.array, mx.array]:
        """conv_state and recurrent_state after the accepted tokens."""
        if self.num_accepted == 0:
            return self.conv_state, self.recurrent_state
        qkv, b, a = (x[:, : self.num_accepted] for x in (self.qkv, self.b, self.a))
        num_value_heads, value_head_dim = self.recurrent_state.shape[1:3]
        # The output is not needed again.
        z = mx.zeros((*b.shape[:2], num_value_heads * value_head_dim), self.conv_state.dtype)
        inputs = DeltaInputs(qkv, z, b, a, *self[:2], self.parameters)
        _, *states = delta_step_kernel(inputs)
        return states[0], states[1]

    @property
    def arrays(self) -> list[mx.array]:
        """All that has to be evaluated."""
        return [self.conv_state, self.recurrent_state]


def delta_step(
    inputs: DeltaInputs,
    lengths: mx.array | None = None,
    kernels: Tiers = PORTABLE,
    tape: Tape | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Output `[B, T, Hv * Dv]` in z's type, new conv_state and recurrent_state.

    `lengths` `[B]` are those of right-padded rows. For many tokens, only the delta rule may run as
    a kernel. `tape`, for the kernel alone, has tokens that precede these.
    """
    if _runs_kernel(inputs, lengths, kernels):
        return delta_step_kernel(inputs, tape)
    out, window, (recurrent_state,) = _delta_ops(inputs, kernels)
    num_tokens, keep = inputs.qkv.shape[1], inputs.conv_state.shape[1]
    if lengths is None:
        # A copy, because a view would keep the whole window of a long prefill alive.
        return out, mx.contiguous(window[:, num_tokens:]), recurrent_state
    # Right-padded rows: the state ends where the row ends.
    ends = mx.clip(lengths, 0, num_tokens)
    rows = (ends[:, None] + mx.arange(keep))[..., None]
    return out, mx.take_along_axis(window, rows, axis=1), recurrent_state


def kept_delta_step(
    inputs: DeltaInputs, kernels: Tiers = PORTABLE, tape: Tape | None = None
) -> tuple[mx.array, KeptStates | Tape]:
    """Output and states for up to 8 tokens, the last of which may be taken back."""
    qkv, _, b, a, _, recurrent_state, parameters, _ = inputs
    num_tokens = qkv.shape[1]
    if _runs_kernel(inputs, None, kernels):
        out, *states = delta_step_kernel(inputs, tape, keep=True)
        return out, Tape(states[0], states[1], qkv, b, a, parameters, num_tokens)
    out, window, after = _delta_ops(inputs, kernels, keep=True)
    return out, KeptStates(window, [recurrent_state, *after], num_tokens)


def _runs_kernel(inputs: DeltaInputs, lengths: mx.array | None, kernels: Tiers) -> bool:
    return (
        kernels.runs("delta_step", inputs.qkv.shape[1])
        and lengths is None
        # Dv and Dk.
        and all(dim in HEAD_DIMS for dim in inputs.recurrent_state.shape[2:])
        and inputs.qkv.dtype in FLOATS
    )


def _delta_ops(
    inputs: DeltaInputs, kernels: Tiers, keep: bool = False
) -> tuple[mx.array, mx.array, list[mx.array]]:
    """Output, the convolution's window, and the last recurrent state or, with `keep`, all."""
    qkv, z, b, a, conv_state, recurrent_state, parameters, mask = inputs
    batch, num_tokens, channels = qkv.shape
    num_value_heads, value_head_dim, key_head_dim = recurrent_state.shape[1:]
    if mask is not None:
        qkv = mx.where(mask[..., None], qkv, 0)
    window = mx.concatenate([conv_state, qkv], axis=1)
    qkv = _convolve(window, num_tokens, parameters.conv_weight, kernels)
    qk, v = mx.split(qkv, [channels - num_value_heads * value_head_dim], axis=-1)
    qk = qk.reshape(batch, num_tokens, -1, key_head_dim)
    v = v.reshape(batch, num_tokens, num_value_heads, value_head_dim)
    if kernels.on_mlx:
        out, states = _delta_mlx(qk, v, inputs, kernels, keep)
        return out, window, states
    q, k = mx.split(l2_norm(qk), 2, axis=2)
    g, beta = _gates(a, b, parameters, mask)
    rule = (q * key_head_dim**-0.5, k, v, g, beta, recurrent_state)
    if keep:
        out, states = recurrent_gated_delta_rule(*rule)
    else:
        out, *states = gated_delta_rule(*rule, kernels)
    weight = parameters.norm_weight.astype(mx.float32)
    out = mx.fast.rms_norm(out, weight, parameters.eps)
    out = out.reshape(z.shape) * nn.silu(z.astype(mx.float32))
    return out.astype(z.dtype), window, states


def _delta_mlx(
    qk: mx.array, v: mx.array, inputs: DeltaInputs, kernels: Tiers, keep: bool
) -> tuple[mx.array, list[mx.array]]:
    """Output and recurrent states as `_delta_ops` from the convolved heads, in few dispatches.

    All is fp32, because MLX rounds the decay to the type of q, and bf16 rounds a slow decay to 1.
    """
    _, z, b, a, _, state, parameters, mask = inputs
    num_tokens, num_value_heads, value_head_dim = v.shape[1:]
    key_head_dim = qk.shape[-1]
    # Unit length, as in l2_norm, but eps is added to the mean of squares, not to their sum.
    qk = mx.fast.rms_norm(qk, _unit(key_head_dim), L2_EPS / key_head_dim)
    q, k = mx.split(qk, 2, axis=2)
    runs_chunks = not keep and runs_chunk_kernel(q, k, v, kernels)
    if not runs_chunks and is_fused(q.shape[2], num_value_heads, key_head_dim, value_head_dim):
        decay, beta = _decay_and_beta(a, b, parameters.A_log, parameters.dt_bias)
        if mask is not None:
            # With the operation's own mask, MLX would run a graph in place of its kernel.
            decay, beta = mx.where(mask[..., None], decay, 1), mx.where(mask[..., None], beta, 0)
        size = 1 if keep else num_tokens
        outputs, states = [], []
        for t in range(0, num_tokens, size):
            at = slice(t, t + size)
            out, state = mx.fast.gated_delta_update(
                q[:, at], k[:, at], v[:, at], decay[:, at], beta[:, at], state
            )
            outputs.append(out)
            states.append(state)
        out = mx.concatenate(outputs, axis=1)
    else:
        g, beta = _gates(a, b, parameters, mask)
        if keep:
            out, states = recurrent_gated_delta_rule(q, k, v, g, beta, state)
        else:
            out, *states = gated_delta_rule(q, k, v, g, beta, state, kernels)
    # q and the output are too long by sqrt(Dk). The norm removes the factor, if eps is scaled.
    out = mx.fast.rms_norm(out, None, parameters.eps * key_head_dim)
    out = _weighted_and_gated(out, parameters.norm_weight, z.reshape(out.shape))
    return out.reshape(z.shape), states


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
    """As `_gates`, with the decay in place of its logarithm."""
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
    """SiLU in fp32, the type that MLX's delta rule needs here."""
    return nn.silu(x.astype(mx.float32))


def _convolve(window: mx.array, num_tokens: int, weight: mx.array, kernels: Tiers) -> mx.array:
    """SiLU of the causal convolution of the last tokens of a window."""
    taps, channels = weight.shape[1], window.shape[2]
    if kernels.on_mlx:
        return _silu_fp32(mx.conv1d(window, weight, groups=channels))
    if num_tokens > MAX_ROWS:
        return nn.silu(mx.conv1d(window, weight, groups=channels))
    # The order of sums is the same for any number of tokens.
    rows = weight.squeeze(-1).T.astype(mx.float32)
    if num_tokens == 1:
        return nn.silu((window * rows).sum(axis=1, keepdims=True))
    products = [window[:, j : j + num_tokens] * rows[j] for j in range(taps)]
    return nn.silu(sum(products[1:], products[0]))


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
        # No decay and no update, so that padding does not change the state.
        g, beta = mx.where(mask[..., None], g, 0), mx.where(mask[..., None], beta, 0)
    return g, beta


def l2_norm(x: mx.array) -> mx.array:
    """Unit length over the last axis, in fp32; eps is added to the sum of squares."""
    x = x.astype(mx.float32)
    return x * mx.rsqrt((x * x).sum(axis=-1, keepdims=True) + L2_EPS)


def delta_step_kernel(
    inputs: DeltaInputs, tape: Tape | None = None, keep: bool = False
) -> tuple[mx.array, mx.array, mx.array]:
    """`delta_step` for T up to 8, in one dispatch that reads and writes the state once.

    The given states are those of `tape`, whose accepted tokens are replayed before the new ones.
    With `keep`, the returned states are those before the new tokens.
    """
    qkv, z, b, a, conv_state, recurrent_state, parameters, mask = inputs
    batch, num_tokens, channels = qkv.shape
    num_value_heads, value_head_dim, key_head_dim = recurrent_state.shape[1:]
    names = "qkv z b a conv_state state conv_weight A_log dt_bias norm_weight eps mask"
    names += " tape_qkv tape_b tape_a num_accepted"
    conv_weight, *others, eps = parameters
    out, conv_state, recurrent_state = kernel(
        "delta_step", tuple(names.split()), ("out", "new_conv_state", "new_state")
    )(
        # Without a mask or a tape, another array takes its place.
        inputs=[
            *(qkv, z, b, a, conv_state, recurrent_state, conv_weight, *others, eps),
            b if mask is None else mask,
            *((qkv, b, a, 0) if tape is None else (tape.qkv, tape.b, tape.a, tape.num_accepted)),
        ],
        template=[
            ("T", z.dtype),
            ("TOKENS", token_class(num_tokens)),
            ("TAPE", 0 if tape is None else MAX_ROWS),
            ("TAPS", conv_weight.shape[1]),
            ("HK", (channels - z.shape[-1]) // (2 * key_head_dim)),
            ("HV", num_value_heads),
            ("DK", key_head_dim),
            ("DV", value_head_dim),
            ("MASKED", mask is not None),
            ("KEEP", keep),
        ],
        grid=(32 * (value_head_dim // ROWS_PER_SIMDGROUP), num_value_heads, batch),
        threadgroup=(32 * (value_head_dim // ROWS_PER_SIMDGROUP), 1, 1),
        output_shapes=[z.shape, conv_state.shape, recurrent_state.shape],
        output_dtypes=[z.dtype, z.dtype, mx.float32],
    )
    return out, conv_state, recurrent_state
