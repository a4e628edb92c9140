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
    """`x + down(silu(gate(norm(x))) * up(norm(x)))`."""

    kernels: KernelSet = NONE

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array, norm: nn.RMSNorm) -> mx.array:
        """`[..., H]` -> the same."""
        rows = x.reshape(-1, x.shape[-1])
        hidden = expert_gate_up(rows, self, norm=norm, kernels=self.kernels)
        return expert_down(hidden, rows, self, kernels=self.kernels).reshape(x.shape)


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

    def __call__(self, x: mx.array, norm: nn.RMSNorm) -> mx.array:
        """x + experts of norm(x), `[B, T, H]` -> the same."""
        residual = rows = x.reshape(-1, x.shape[-1])
        few = rows.shape[0] <= MAX_ROWS
        # Two kernels do the norm as they read x; else it is done once for all that follows.
        fused = norm if few and {"projection", "expert_gate_up"} <= self.kernels else None
        rows = norm(rows) if fused is None else rows
        logits, shared_logits = project(
            rows, (self.gate, self.shared_expert_gate), self.kernels, norm=fused, dtype=mx.float32
        )
        routing = route(logits, shared_logits, self._num_experts_per_tok, self.kernels)
        routed, shared = self.switch_mlp, self.shared_expert
        if few and self.kernels & {"expert_gate_up", "expert_down"}:
            hidden = expert_gate_up(rows, shared, routing, routed, fused, self.kernels)
            out = expert_down(hidden, residual, shared, routing, routed, self.kernels)
        else:
            # Many rows are brought together by expert, which the two steps do not do.
            hidden = expert_gate_up(rows, shared)
            weighted = routing.shared_scores.astype(x.dtype) * shared.down_proj(hidden[0])
            out = expert_mlp(rows, routing.indices, routing.scores, routed, self.kernels)
            out = residual + (out + weighted)
        return out.reshape(x.shape)
