"""Feed-forward layers: the dense SwiGLU, and router + routed experts + shared expert.

B batch, T tokens, N = B * T, K experts per token, E experts, H hidden, I expert width.
"""

import mlx.core as mx
import mlx.nn as nn

from ..config import ModelConfig
from ..kernels.expert_step import expert_down, expert_gate_up
from ..kernels.grouped_expert_matmul import expert_mlp
from ..kernels.matrix import MAX_ROWS
from ..kernels.metal import NONE, KernelSet
from ..kernels.projection import project
from ..kernels.router import route
from ..kernels.switch import SwitchGLU


class DenseMLP(nn.Module):
    """`residual + down(silu(gate(x)) * up(x))`."""

    kernels: KernelSet = NONE

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        """`[..., H]` both -> the same."""
        rows = x.reshape(-1, x.shape[-1])
        hidden = expert_gate_up(rows, self, kernels=self.kernels)
        residual = residual.reshape(rows.shape)
        return expert_down(hidden, residual, self, kernels=self.kernels).reshape(x.shape)


class SparseMoE(nn.Module):
    """Top-k of E experts by router probability, and a shared expert that always runs."""

    kernels: KernelSet = NONE

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._num_experts_per_tok = config.num_experts_per_tok
        # On disk the router is called gate, as the format of mlx-lm has it.
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.switch_mlp = SwitchGLU(
            config.hidden_size, config.moe_intermediate_size, config.num_experts
        )
        self.shared_expert = DenseMLP(config.hidden_size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        """residual + experts of x, `[B, T, H]` both -> the same."""
        rows = x.reshape(-1, x.shape[-1])
        residual = residual.reshape(rows.shape)
        logits, shared_logits = project(
            rows, (self.gate, self.shared_expert_gate), self.kernels, dtype=mx.float32
        )
        routing = route(logits, shared_logits, self._num_experts_per_tok, self.kernels)
        routed, shared = self.switch_mlp, self.shared_expert
        if rows.shape[0] <= MAX_ROWS and self.kernels & {"expert_gate_up", "expert_down"}:
            hidden = expert_gate_up(rows, shared, routing, routed, self.kernels)
            out = expert_down(hidden, residual, shared, routing, routed, self.kernels)
        else:
            # Many rows are brought together by expert, which the two steps do not do.
            hidden = expert_gate_up(rows, shared)
            weighted = routing.shared_scores.astype(x.dtype) * shared.down_proj(hidden[0])
            out = expert_mlp(rows, routing.indices, routing.scores, routed, self.kernels)
            out = residual + (out + weighted)
        return out.reshape(x.shape)
