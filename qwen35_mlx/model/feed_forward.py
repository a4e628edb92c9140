"""Feed-forward layers: the dense SwiGLU, and router + routed experts + shared expert.

B batch, T tokens, N = B * T, K experts per token, E experts, H hidden, I expert width.
"""

import mlx.core as mx
import mlx.nn as nn

from ..config import ModelConfig
from ..kernels.expert_step import add_experts, expert_down, expert_gate_up
from ..kernels.grouped_expert_matmul import expert_mlp
from ..kernels.projection import project
from ..kernels.router import route
from ..kernels.switch import SwitchGLU
from ..kernels.tiers import PORTABLE, Tiers
from .shard import OwnExperts, joined


class DenseMLP(nn.Module):
    """`x + down(silu(gate(norm(x))) * up(norm(x)))`."""

    kernels: Tiers = PORTABLE
    # Of the processes that have the rest of the width.
    group: mx.distributed.Group | None = None

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array, norm: nn.RMSNorm) -> mx.array:
        """`[..., H]` -> the same."""
        rows = x.reshape(-1, x.shape[-1])
        hidden = expert_gate_up(rows, self, norm=norm, kernels=self.kernels)
        residual = rows if self.group is None else mx.zeros_like(rows)
        out = expert_down(hidden, residual, self, kernels=self.kernels)
        return joined(out, rows, self.group).reshape(x.shape)


class SparseMoE(nn.Module):
    """Top-k of E experts by router probability, and a shared expert that always runs."""

    kernels: Tiers = PORTABLE
    # Of the processes that have other experts, or the rest of their width.
    group: mx.distributed.Group | None = None
    own_experts: OwnExperts | None = None

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
        before = residual = rows = x.reshape(-1, x.shape[-1])
        if self.group is not None:
            residual = mx.zeros_like(rows)
        steps = [self.kernels.runs(op, rows.shape[0]) for op in ("expert_gate_up", "expert_down")]
        # Two kernels do the norm as they read x; else it is done once for all that follows.
        fused = norm if steps[0] and self.kernels.runs("projection", rows.shape[0]) else None
        rows = norm(rows) if fused is None else rows
        logits, shared_logits = project(
            rows, (self.gate, self.shared_expert_gate), self.kernels, norm=fused, dtype=mx.float32
        )
        routing = route(logits, shared_logits, self._num_experts_per_tok, self.kernels)
        if self.own_experts is not None:
            routing = self.own_experts(routing)
        routed, shared = self.switch_mlp, self.shared_expert
        if any(steps):
            hidden = expert_gate_up(rows, shared, routing, routed, fused, self.kernels)
            out = expert_down(hidden, residual, shared, routing, routed, self.kernels)
        else:
            # Many rows are brought together by expert, which the two steps do not do.
            hidden = expert_gate_up(rows, shared, kernels=self.kernels)
            shared_out = shared.down_proj(hidden[0])
            out = expert_mlp(rows, routing.indices, routing.scores, routed, self.kernels)
            out = add_experts(residual, out, shared_out, routing.shared_scores, self.kernels)
        return joined(out, before, self.group).reshape(x.shape)
