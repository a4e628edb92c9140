"""Feed-forward layers: the dense SwiGLU, and router + routed experts + shared expert.

B batch, T tokens, N = B * T, K experts per token, E experts, H hidden, I expert width.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from .config import ModelConfig
from .kernels.expert_gather import expert_mlp
from .kernels.metal import NONE, Choice


class DenseMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """`[..., H]` -> the same."""
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class RoutedExperts(nn.Module):
    """The stacked matrices of all experts, `[E, out, in]` each."""

    kernels: Choice = NONE

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, width, num = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.gate_proj = SwitchLinear(hidden, width, num, bias=False)
        self.up_proj = SwitchLinear(hidden, width, num, bias=False)
        self.down_proj = SwitchLinear(width, hidden, num, bias=False)

    def __call__(self, x: mx.array, indices: mx.array, scores: mx.array) -> mx.array:
        """x `[N, H]`, indices and scores `[N, K]` -> `[N, H]`."""
        projections = self.gate_proj, self.up_proj, self.down_proj
        return expert_mlp(x, indices, scores, *projections, self.kernels)


class SparseMoE(nn.Module):
    """Top-k of E experts by router probability, and a shared expert that always runs."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._num_experts_per_tok = config.num_experts_per_tok
        # On disk the router is called gate, as the format of mlx-lm has it.
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.switch_mlp = RoutedExperts(config)
        self.shared_expert = DenseMLP(config.hidden_size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """`[B, T, H]` -> the same."""
        rows = x.reshape(-1, x.shape[-1])
        indices, scores = route(self.gate(rows), self._num_experts_per_tok)
        routed = self.switch_mlp(rows, indices, scores)
        shared = mx.sigmoid(self.shared_expert_gate(rows)) * self.shared_expert(rows)
        return (routed + shared).reshape(x.shape)


def route(router_logits: mx.array, num_experts_per_tok: int) -> tuple[mx.array, mx.array]:
    """Chosen experts and their weights, `[N, K]` each, from logits `[N, E]`.

    Softmax over all experts in fp32, the K largest, renormalised to sum to one.
    """
    probabilities = mx.softmax(router_logits.astype(mx.float32), axis=-1)
    k = num_experts_per_tok
    indices = mx.argpartition(probabilities, kth=-k, axis=-1)[..., -k:]
    scores = mx.take_along_axis(probabilities, indices, axis=-1)
    return indices, scores / scores.sum(axis=-1, keepdims=True)
