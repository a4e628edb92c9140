"""Modules with stacks of expert matrices, named as on disk.

N tokens, K experts per token, E experts, H hidden, I expert width.
"""

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# From this number of (token, expert) pairs on, rows are sorted by expert.
SORT_FROM = 64


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up` in one dispatch."""
    return nn.silu(gate) * up


class SwitchLinear(nn.Module):
    """A matrix for each expert, `[E, out, in]`."""

    def __init__(self, in_dims: int, out_dims: int, num_experts: int):
        super().__init__()
        scale = in_dims**-0.5
        self.weight = mx.random.uniform(-scale, scale, (num_experts, out_dims, in_dims))

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """`[..., 1, in]` by the experts `[...]` -> `[..., 1, out]`."""
        return mx.gather_mm(
            x, self["weight"].swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices
        )

    def to_quantized(
        self, group_size: int = 64, bits: int = 4, mode: str = "affine", **unused: Any
    ) -> "QuantizedSwitchLinear":
        """The same matrices, quantized by MLX."""
        num_experts, out_dims, in_dims = self.weight.shape
        quantized = QuantizedSwitchLinear(in_dims, out_dims, num_experts, group_size, bits, mode)
        quantized.quantize(self.weight)
        return quantized


class QuantizedSwitchLinear(nn.Module):
    """The same, quantized."""

    def __init__(
        self,
        in_dims: int,
        out_dims: int,
        num_experts: int,
        group_size: int = 64,
        bits: int = 4,
        mode: str = "affine",
    ):
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        # This is lazy, so nothing is computed if other weights replace it.
        self.quantize(mx.zeros((num_experts, out_dims, in_dims)))

    def quantize(self, weight: mx.array) -> None:
        """Quantize and keep `[E, out, in]`."""
        self.weight, self.scales, *biases = mx.quantize(
            weight, self.group_size, self.bits, mode=self.mode
        )
        # Only the affine mode has biases.
        self.biases = biases[0] if biases else None
        self.freeze()

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """As in SwitchLinear."""
        return mx.gather_qmm(
            x,
            self["weight"],
            self["scales"],
            self.get("biases"),
            rhs_indices=indices,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=sorted_indices,
        )


class SwitchGLU(nn.Module):
    """SwiGLU experts: `down(silu(gate(x)) * up(x))` of each chosen one."""

    def __init__(self, hidden_size: int, expert_size: int, num_experts: int):
        super().__init__()
        self.gate_proj = SwitchLinear(hidden_size, expert_size, num_experts)
        self.up_proj = SwitchLinear(hidden_size, expert_size, num_experts)
        self.down_proj = SwitchLinear(expert_size, hidden_size, num_experts)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """`[N, H]` by the experts `[N, K]` -> `[N, K, H]`."""
        num_tokens, per_token = indices.shape
        if indices.size < SORT_FROM:
            return self._experts(x[:, None, None], indices, False).squeeze(-2)
        flat = indices.flatten()
        order = mx.argsort(flat)
        out = self._experts(x[order // per_token, None], flat[order], True)
        return out[mx.argsort(order)].reshape(num_tokens, per_token, -1)

    def _experts(self, x: mx.array, indices: mx.array, is_sorted: bool) -> mx.array:
        up = self.up_proj(x, indices, is_sorted)
        gate = self.gate_proj(x, indices, is_sorted)
        return self.down_proj(swiglu(gate, up), indices, is_sorted)
