"""Muon for the matrices of the trunk, AdamW for everything else."""

import torch
from torch import Tensor

# Keller Jordan's quintic, https://kellerjordan.github.io/posts/muon/
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonal(m: Tensor, num_steps: int = 5) -> Tensor:
    """`m` `[N, rows, cols]` with singular values near 1, by Newton-Schulz in bfloat16."""
    tall = m.shape[1] > m.shape[2]
    x = (m.mT if tall else m).bfloat16()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(num_steps):
        gram = x @ x.mT
        x = A * x + (B * gram + C * (gram @ gram)) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Orthogonalised momentum on matrices, grouped by shape; each expert is a matrix."""

    def __init__(self, parameters: list[Tensor], momentum: float = 0.95, decay: float = 0.02):
        self.momentum, self.decay = momentum, decay
        self.groups: dict[tuple[int, ...], list[Tensor]] = {}
        for p in parameters:
            self.groups.setdefault(tuple(p.shape[-2:]), []).append(p)
        self.buffers = [torch.zeros_like(p) for group in self.groups.values() for p in group]

    def state_dict(self) -> list[Tensor]:
        """The momentum, in the order of the parameters."""
        return self.buffers

    def load_state_dict(self, state: list[Tensor]) -> None:
        """Restore the momentum."""
        for buffer, saved in zip(self.buffers, state, strict=True):
            buffer.copy_(saved)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update from `.grad`; decoupled weight decay relative to `lr`."""
        buffers = iter(self.buffers)
        for (rows, cols), group in self.groups.items():
            moved, updates = [], []
            for p in group:
                buffer = next(buffers)
                # The MTP layer has no gradient in most steps.
                if p.grad is not None:
                    buffer.lerp_(p.grad, 1 - self.momentum)
                    moved.append(p)
                    updates.append(p.grad.lerp(buffer, self.momentum).reshape(-1, rows, cols))
            if not updates:
                continue
            update = orthogonal(torch.cat(updates)) * max(1, rows / cols) ** 0.5
            for p, u in zip(moved, update.split([len(u) for u in updates]), strict=True):
                p.mul_(1 - lr * self.decay).add_(u.reshape(p.shape), alpha=-lr)
