"""Trains quantized matrices: weights move down the gradient of a loss while codes are settled."""

# K groups a row, G weights a group.

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from .packing import WORD_BITS, Quantized, pack

# How far scales and biases move a step, in parts of a scale, relative to weights.
SCALE_RATE = 0.2
BETAS = [0.9, 0.98]
# Share of the steps before the full learning rate, and what is left of it in the end.
WARM_UP, LAST_RATE = 0.05, 0.1
# Share of the steps after which all codes are settled; the rest is for scales and biases.
SETTLED, POWER = 0.85, 1.5
# Every so many steps take the second loss.
SECOND_EVERY = 16
# Weights that are sorted, of each matrix at each step.
SORTED = 2**20

Parameters = dict[str, mx.array]
Loss = Callable[[Mapping[str, mx.array], int], mx.array]


class Latent:
    """A quantized matrix, or stack of matrices, as numbers that have gradients.

    Its parameters are weights in steps of their codes, `[..., K, G]`, and how far scales and biases
    have moved, `[..., K]` in parts of SCALE_RATE scales. Weights begin at those of the matrix
    `weight [..., inputs]`, scales and biases at those of `parts`.
    """

    def __init__(self, parts: Quantized, weight: mx.array):
        packed, scales, biases = self.parts = parts
        self.shape, inputs = weight.shape, weight.shape[-1]
        self.bits = packed.shape[-1] * WORD_BITS // inputs
        self.scales, self.biases = scales.astype(mx.float32), biases.astype(mx.float32)
        self.top = 2**self.bits - 1
        steps = weight.astype(mx.float32).reshape(*scales.shape, -1) - self.biases[..., None]
        steps = steps / mx.where(self.scales == 0, 1, self.scales)[..., None]
        zeros = mx.zeros_like(self.scales)
        self.start = {"codes": self.within(steps), "scales": zeros, "biases": zeros}

    @property
    def codes(self) -> mx.array:
        """Those of `parts`, as numbers of the shape that `start` has."""
        packed, scales, _ = self.parts
        ones, zeros = mx.ones_like(self.scales), mx.zeros_like(self.scales)
        group_size = self.shape[-1] // scales.shape[-1]
        codes = mx.dequantize(packed, ones, zeros, group_size=group_size, bits=self.bits)
        return codes.reshape(*scales.shape, group_size)

    def within(self, codes: mx.array) -> mx.array:
        """Nowhere so far beyond the codes that rounding would leave them."""
        return mx.clip(codes, -0.4, self.top + 0.4)

    def weight(self, at: Parameters) -> mx.array:
        """In float32; differentiable in `at`."""
        scale = self.scales * (1 + SCALE_RATE * at["scales"])
        bias = self.biases + self.scales * SCALE_RATE * at["biases"]
        return (scale[..., None] * at["codes"] + bias[..., None]).reshape(self.shape)

    def settle(self, codes: mx.array, before: mx.array, settled: mx.array, share: float) -> Any:
        """Weights after a step, and which are codes for good: this share, the nearest ones first.

        What was settled stays as it was `before`.
        """
        codes = mx.where(settled, before, self.within(codes))
        nearest = mx.round(codes)
        num = int(share * codes.size)
        if num:
            away = mx.where(settled, -1, mx.abs(codes - nearest))
            # Of some, where they are many: a GPU sorts them all, in more time than the rest takes.
            some = away.flatten()[:: max(codes.size // SORTED, 1) | 1]
            last = -(-num * some.size // codes.size) - 1
            limit = mx.partition(some, last)[last] if num < codes.size else 1
            settled = away <= limit
            codes = mx.where(settled, nearest, codes)
        return codes, settled

    def quantized(self, at: Parameters) -> Quantized:
        """As it is stored; all weights must be codes."""
        dtype = self.parts[1].dtype
        scales = self.scales * (1 + SCALE_RATE * at["scales"])
        stored = scales.astype(dtype)
        # The bias makes up for the rounding of the scale, at the mean of the codes.
        rounding = (scales - stored.astype(mx.float32)) * at["codes"].mean(axis=-1)
        biases = self.biases + self.scales * SCALE_RATE * at["biases"] + rounding
        return pack(at["codes"].reshape(self.shape), self.bits), stored, biases.astype(dtype)


@dataclass(frozen=True)
class Schedule:
    """How long a training lasts, and how far weights move in a step, in steps of their codes."""

    epochs: int
    rate: float
    # Without: scales and biases alone are trained, and codes stay those of the parts.
    codes: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """Matrices as they are stored, and the loss on held-out batches before and after."""

    parts: dict[str, Quantized]
    before: float
    after: float


def train(
    latents: Mapping[str, Latent],
    losses: Sequence[Loss],
    num_batches: int,
    schedule: Schedule,
    on_step: Callable[[int, int, float], None] = lambda step, total, loss: None,
) -> Trained:
    """Minimise the mean of `losses[0](weights by name, batch)` over batches, on codes in the end.

    More and more weights are rounded, those near a code first, and the others make up for it: as
    error feedback does within a matrix, but by the loss. Adam. An eighth of the batches is held
    out; where training made their loss no smaller than that of the latents' parts, these stay.
    If there is a second loss, every SECOND_EVERY-th step goes down its gradient instead.
    Deterministic for a seed.
    """
    num_held = min(max(num_batches // 8, 1), num_batches)
    held = range(num_batches - num_held, num_batches)
    at: Any = {
        name: latent.start if schedule.codes else latent.start | {"codes": latent.codes}
        for name, latent in latents.items()
    }

    def gradient_of(loss: Loss) -> Callable[..., Any]:
        def of_batch(at: dict[str, Parameters], batch: int) -> mx.array:
            return loss({name: latents[name].weight(at[name]) for name in latents}, batch)

        return mx.value_and_grad(of_batch)

    def judged(parts: Mapping[str, Quantized]) -> float:
        weights = {n: dequantized(p, latents[n].shape) for n, p in parts.items()}
        mx.eval(weights)
        return sum(float(losses[0](weights, batch)) for batch in held) / num_held

    order = list(_order(held.start or num_batches, schedule))
    optimizer = optim.Adam(_rates(schedule.rate, len(order)), betas=BETAS, bias_correction=True)
    optimizer.init(at)
    gradients = [gradient_of(loss) for loss in losses]
    settled = {n: mx.full(at[n]["codes"].shape, not schedule.codes) for n in latents}
    for step, batch in enumerate(order, 1):
        gradient = gradients[-1 if step % SECOND_EVERY == 0 else 0]
        value, found = gradient(at, batch)
        share = 1 - max(1 - step / (SETTLED * len(order)), 0) ** POWER
        for name in latents:
            found[name]["codes"] = mx.where(settled[name], 0, found[name]["codes"])
        moved = optimizer.apply_gradients(found, at)
        for name, latent in latents.items():
            moved[name]["codes"], settled[name] = latent.settle(
                moved[name]["codes"], at[name]["codes"], settled[name], share
            )
        at = moved
        mx.eval(at, settled, optimizer.state, value)
        on_step(step, len(order), float(value))
    parts = {name: latent.quantized(at[name]) for name, latent in latents.items()}
    start = {name: latent.parts for name, latent in latents.items()}
    before, after = judged(start), judged(parts)
    # NaN is no improvement either.
    return Trained(parts, before, after) if after < before else Trained(start, before, before)


def dequantized(parts: Quantized, shape: tuple[int, ...]) -> mx.array:
    """In float32, as the scales and biases are stored."""
    packed, scales, biases = parts
    bits, group_size = packed.shape[-1] * WORD_BITS // shape[-1], shape[-1] // scales.shape[-1]
    numbers = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(packed, *numbers, group_size=group_size, bits=bits)


def _order(num_batches: int, schedule: Schedule) -> Iterator[int]:
    key = mx.random.key(schedule.seed)
    for _ in range(schedule.epochs):
        key, own = mx.random.split(key)
        yield from np.array(mx.random.permutation(num_batches, key=own)).tolist()


def _rates(rate: float, num_steps: int) -> Callable[[mx.array], mx.array]:
    """Rises over the first steps, and falls as a cosine."""
    warm = max(int(WARM_UP * num_steps), 1)

    def at(step: mx.array) -> mx.array:
        done = mx.clip((step - warm) / max(num_steps - warm, 1), 0, 1)
        falling = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + mx.cos(math.pi * done))
        return rate * mx.minimum((step + 1) / warm, falling)

    return at
