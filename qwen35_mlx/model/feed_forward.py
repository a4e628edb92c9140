"""Feed-forward layers: dense SwiGLU, and mixture of experts with a shared expert.

B batch, T tokens, N = B * T, K experts per token, E experts, H hidden, I expert width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..config import ModelConfig
from ..kernels.expert_step import add_experts, expert_down, expert_gate_up
from ..kernels.grouped_expert_matmul import expert_mlp
from ..kernels.projection import project
from ..kernels.router import Routing, route
from ..kernels.switch import SwitchGLU
from ..kernels.tiers import PORTABLE, Tiers
from .shard import OwnExperts, joined

if TYPE_CHECKING:
    from .expert_pool import ExpertPool


class DenseMLP(nn.Module):
    """`x + down(silu(gate(norm(x))) * up(norm(x)))`."""

    kernels: Tiers = PORTABLE
    # The processes that share the layer, each with a part of the width.
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


class Routed(NamedTuple):
    """Rows `[N, H]` with their residual and routing, and a norm that is still to be applied."""

    residual: mx.array
    rows: mx.array
    fused: nn.RMSNorm | None
    routing: Routing


class SparseMoE(nn.Module):
    """Top-k of E experts by router probability, and a shared expert that always runs."""

    kernels: Tiers = PORTABLE
    # Set if `switch_mlp` holds only some experts and the others are read from disk.
    pool: "ExpertPool | None" = None
    # The processes that share the layer, each with some experts or a part of their width.
    group: mx.distributed.Group | None = None
    own_experts: OwnExperts | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._num_experts_per_tok = config.num_experts_per_tok
        # The router's name on disk is gate, as in mlx-lm's format.
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.switch_mlp = SwitchGLU(
            config.hidden_size, config.moe_intermediate_size, config.num_experts
        )
        self.shared_expert = DenseMLP(config.hidden_size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def __call__(self, x: mx.array, norm: nn.RMSNorm) -> mx.array:
        """x + experts of norm(x), `[B, T, H]` -> the same."""
        if not self._in_steps(x):
            return self.read([x], norm)[0]
        found = self._route(x, norm)
        routing, shared, routed = found.routing, self.shared_expert, self.switch_mlp
        if self.pool:
            slots = self.pool.place(routing.indices)
            if slots is None:
                # One row at a time needs fewer slots, and gives the same bits.
                rows = [self(row, norm) for row in found.residual[:, None, None]]
                return mx.concatenate(rows).reshape(x.shape)
            routing = routing._replace(indices=slots)
        hidden = expert_gate_up(found.rows, shared, routing, routed, found.fused, self.kernels)
        out = expert_down(hidden, found.residual, shared, routing, routed, self.kernels)
        if self.pool:
            self.pool.is_used_by(out)
        return joined(out, x.reshape(out.shape), self.group).reshape(x.shape)

    def read(self, pieces: Sequence[mx.array], norm: nn.RMSNorm) -> list[mx.array]:
        """`__call__` for consecutive pieces of a prompt, which reads each expert from disk once.

        Rows are grouped by expert, which the two steps for few rows do not do.
        """
        long = [piece for piece in pieces if not self._in_steps(piece)]
        if not long:
            return [self(piece, norm) for piece in pieces]
        founds, shared_outs = [self._route(piece, norm) for piece in long], []
        for found in founds:
            hidden = expert_gate_up(found.rows, self.shared_expert, kernels=self.kernels)
            shared_outs.append(self.shared_expert.down_proj(hidden[0]))
        together = [(f.rows, f.routing.indices, f.routing.scores) for f in founds]
        rows, indices, scores = map(mx.concatenate, map(list, zip(*together, strict=True)))
        mlp = self.pool.mlp if self.pool else expert_mlp
        summed = mlp(rows, indices, scores, self.switch_mlp, self.kernels)
        outs, end = [], 0
        for piece, found, shared in zip(long, founds, shared_outs, strict=True):
            start, end = end, end + len(found.rows)
            routed = summed if len(long) == 1 else summed[start:end]
            scores = found.routing.shared_scores
            out = add_experts(found.residual, routed, shared, scores, self.kernels)
            if self.pool:
                self.pool.is_used_by(out)
            out = joined(out, piece.reshape(out.shape), self.group)
            outs.append(out.reshape(piece.shape))
        done = iter(outs)
        return [self(p, norm) if self._in_steps(p) else next(done) for p in pieces]

    def _in_steps(self, x: mx.array) -> bool:
        """Whether the rows are few enough for the two steps of `expert_step`."""
        num_rows = x.size // x.shape[-1]
        return any(self.kernels.runs(op, num_rows) for op in ("expert_gate_up", "expert_down"))

    def _route(self, x: mx.array, norm: nn.RMSNorm) -> Routed:
        rows = x.reshape(-1, x.shape[-1])
        # With several processes, the residual is added after the sum over them.
        residual = rows if self.group is None else mx.zeros_like(rows)
        # Two kernels include the norm; otherwise it is computed once for both.
        in_kernels = all(
            self.kernels.runs(op, len(rows)) for op in ("expert_gate_up", "projection")
        )
        fused = norm if in_kernels else None
        rows = norm(rows) if fused is None else rows
        logits, shared_logits = project(
            rows, (self.gate, self.shared_expert_gate), self.kernels, norm=fused, dtype=mx.float32
        )
        routing = route(logits, shared_logits, self._num_experts_per_tok, self.kernels)
        if self.own_experts is not None:
            routing = self.own_experts(routing)
        return Routed(residual, rows, fused, routing)
