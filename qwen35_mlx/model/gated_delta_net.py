"""Linear attention: the projections; `kernels/delta_step.py` has the part between them.

B batch, T tokens.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import ModelConfig
from ..kernels.delta_step import DeltaInputs, DeltaParameters, Tape, delta_step, kept_delta_step
from ..kernels.projection import project
from ..kernels.tiers import PORTABLE, Tiers
from .shard import joined


class GatedDeltaNet(nn.Module):
    """One linear attention layer (arXiv 2412.06464) with a fixed-size state."""

    kernels: Tiers = PORTABLE
    # The processes that share the layer, each with some heads.
    group: mx.distributed.Group | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.set_heads(config)
        hidden, channels = config.hidden_size, config.conv_dim
        num_value_heads = config.linear_num_value_heads
        self.in_proj_qkv = nn.Linear(hidden, channels, bias=False)
        self.in_proj_z = nn.Linear(hidden, config.value_dim, bias=False)
        self.in_proj_b = nn.Linear(hidden, num_value_heads, bias=False)
        self.in_proj_a = nn.Linear(hidden, num_value_heads, bias=False)
        self.conv1d = nn.Conv1d(
            channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False
        )
        self.A_log = mx.zeros(num_value_heads)
        self.dt_bias = mx.ones(num_value_heads)
        # Not called: delta_step ends in `rms_norm(x) * weight * silu(z)` over each value head.
        self.norm = nn.RMSNorm(config.linear_value_head_dim, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(config.value_dim, hidden, bias=False)

    def set_heads(self, config: ModelConfig) -> None:
        """Set the shapes of an empty state."""
        self._conv_state_shape = (config.linear_conv_kernel_dim - 1, config.conv_dim)
        self._state_shape = (
            config.linear_num_value_heads,
            config.linear_value_head_dim,
            config.linear_key_head_dim,
        )

    def __call__(
        self,
        x: mx.array,
        norm: nn.RMSNorm,
        mask: mx.array | None,
        cache: Any | None,
        keep_states: bool = False,
    ) -> mx.array:
        """x `[B, T, hidden]`, to be normalised by `norm` -> x + the layer's output.

        mask `[B, T]` is False at padding, which does not change the state. With `keep_states`,
        `model.cache.accept` can drop the last tokens of this pass.
        """
        batch, num_tokens, _ = x.shape
        projections = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        qkv, z, b, a = project(x, projections, self.kernels, norm=norm)
        pending = getattr(cache, "pending", None)
        # Only the kernel can replay a tape before its own tokens; otherwise the cache does it here.
        runs_kernel = mask is None and self.kernels.runs("delta_step", num_tokens)
        tape = pending if isinstance(pending, Tape) and runs_kernel else None
        states: list[Any] = (
            [None, None] if cache is None else list(tape[:2] if tape else cache.cache)
        )
        conv_state, recurrent_state = states
        if conv_state is None:
            conv_state = mx.zeros((batch, *self._conv_state_shape), x.dtype)
        if recurrent_state is None:
            recurrent_state = mx.zeros((batch, *self._state_shape))
        parameters = DeltaParameters(
            self.conv1d.weight, self.A_log, self.dt_bias, self.norm.weight, self.norm.eps
        )
        inputs = DeltaInputs(qkv, z, b, a, conv_state, recurrent_state, parameters, mask)
        if keep_states:
            assert cache is not None
            out, pending = kept_delta_step(inputs, self.kernels, tape)
            cache.keep(pending)
            (out,) = mx.depends([out], pending.arrays)
        else:
            lengths = getattr(cache, "lengths", None)
            out, *states = delta_step(inputs, lengths, self.kernels, tape)
            if cache is not None:
                cache.cache = states
                cache.advance(num_tokens)
                # Otherwise states and inputs of all layers stay in memory until the step ends.
                (out,) = mx.depends([out], states)
        residual = x if self.group is None else None
        (out,) = project(out, (self.out_proj,), self.kernels, residual=residual)
        return joined(out, x, self.group)
