"""Trains quantized matrices: moves codes, scales and biases down the gradient of a loss."""

# R rows, K groups a row, G weights a group.

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from .packing import WORD_BITS, Quantized, pack

# Steps of a scale's size that a weight may move for each relative step of its scale.
CODE_RATE = 20.0
BETAS = [0.9, 0.97]
# Share of the steps before the full learning rate, and what is left of it in the end.
WARM_UP, LAST_RATE = 0.05, 0.01

Parameters = dict[str, mx.array]


@mx.custom_function
def _dequantized(
    shift: mx.array, scale: mx.array, bias: mx.array, codes: mx.array, top: mx.array
) -> mx.array:
    return scale[..., None] * mx.clip(mx.round(codes + shift), 0, top) + bias[..., None]


@_dequantized.vjp
def _dequantized_vjp(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
    # Rounding passes gradients as they are, but not to where no code is.
    shift, scale, _bias, codes, top = primals
    moved = codes + shift
    inside = (moved > -0.5) & (moved < top + 0.5)
    nearest = mx.clip(mx.round(moved), 0, top)
    return (
        mx.where(inside, cotangent * scale[..., None], 0),
        (cotangent * nearest).sum(axis=-1),
        cotangent.sum(axis=-1),
        mx.zeros_like(codes),
        mx.zeros_like(top),
    )


class Latent:
    """A quantized matrix, or stack of matrices, as numbers that have gradients.

    Its parameters are how far the codes have moved, `[..., K, G]` in 1 / CODE_RATE codes; and how
    far scales and biases have, `[..., K]` in parts of the scale. All begin at 0.
    """

    def __init__(self, parts: Quantized, inputs: int):
        packed, scales, biases = parts
        group_size = inputs // scales.shape[-1]
        self.bits, self.dtype = packed.shape[-1] * WORD_BITS // inputs, scales.dtype
        self.scales, self.biases = scales.astype(mx.float32), biases.astype(mx.float32)
        ones, zeros = mx.ones_like(self.scales), mx.zeros_like(self.scales)
        codes = mx.dequantize(packed, ones, zeros, group_size=group_size, bits=self.bits)
        self.shape = codes.shape
        self.codes = codes.reshape(*scales.shape, group_size)
        self.top = mx.array(2.0**self.bits - 1)

    def parameters(self) -> Parameters:
        """At their start."""
        zeros = mx.zeros_like(self.scales)
        return {"codes": mx.zeros_like(self.codes), "scales": zeros, "biases": zeros}

    def weight(self, moved: Parameters) -> mx.array:
        """Dequantized, float32; differentiable in `moved`."""
        scale = self.scales * (1 + moved["scales"])
        bias = self.biases + self.scales * moved["biases"]
        shift = CODE_RATE * moved["codes"]
        weight: Any = _dequantized(shift, scale, bias, self.codes, self.top)
        return weight.reshape(self.shape)

    def quantized(self, moved: Parameters) -> Quantized:
        """As it is stored."""
        codes = mx.clip(mx.round(self.codes + CODE_RATE * moved["codes"]), 0, self.top)
        scales = self.scales * (1 + moved["scales"])
        biases = self.biases + self.scales * moved["biases"]
        packed = pack(codes.reshape(self.shape), self.bits)
        return packed, scales.astype(self.dtype), biases.astype(self.dtype)


@dataclass(frozen=True)
class Schedule:
    """How long a training lasts, and how far its steps go."""

    epochs: int = 2
    rate: float = 3e-3
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """How far each latent has moved, and the loss on the held-out batches before and after."""

    moved: dict[str, Parameters]
    before: float
    after: float


def train(
    latents: Mapping[str, Latent],
    loss: Callable[[dict[str, mx.array], int], mx.array],
    num_batches: int,
    schedule: Schedule,
    on_step: Callable[[int, int, float], None] = lambda step, total, loss: None,
) -> Trained:
    """Minimise the mean of `loss(weights by name, batch)` over batches by Adam.

    An eighth of the batches is held out; where training made their loss no smaller, nothing moves.
    One batch alone is its own judge. Deterministic for a seed.
    """
    start = {name: latent.parameters() for name, latent in latents.items()}
    held = range(num_batches - num_batches // 8 - (num_batches > 1), num_batches)
    if num_batches == 1:
        held = range(1)

    def of_batch(moved: dict[str, Parameters], batch: int) -> mx.array:
        return loss({name: latents[name].weight(moved[name]) for name in latents}, batch)

    def judged(moved: dict[str, Parameters]) -> float:
        return sum(float(of_batch(moved, batch)) for batch in held) / len(held)

    before = judged(start)
    order = list(_order(held.start or 1, schedule))
    optimizer = optim.Adam(_rates(schedule.rate, len(order)), betas=BETAS, bias_correction=True)
    moved: Any = start
    optimizer.init(moved)
    gradient = mx.value_and_grad(of_batch)
    for step, batch in enumerate(order, 1):
        value, found = gradient(moved, batch)
        moved = optimizer.apply_gradients(found, moved)
        mx.eval(moved, optimizer.state, value)
        on_step(step, len(order), float(value))
    after = judged(moved)
    # NaN is no improvement either.
    return Trained(moved, before, after) if after < before else Trained(start, before, before)


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
