"""Trains quantized matrices: gradient descent on latent weights that are rounded step by step."""

# K groups a row, G weights a group.

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from .packing import WORD_BITS, Quantized, pack

# Learning rate of scales and biases, relative to that of weights; their unit is one scale.
SCALE_RATE = 0.2
BETAS = [0.9, 0.98]
# Share of the steps for the warm-up, and the final learning rate relative to the full one.
WARM_UP, LAST_RATE = 0.05, 0.1
# Share of the steps after which all codes are frozen, and the exponent of the curve up to there.
FROZEN, POWER = 0.85, 1.5
# Every SECOND_EVERY-th step uses the second loss.
SECOND_EVERY = 16
# Maximum number of weights of a matrix that a step sorts; of more weights, it sorts a sample.
SORTED = 2**20

Parameters = dict[str, mx.array]
Loss = Callable[[Mapping[str, mx.array], int], mx.array]


class Latent:
    """A quantized matrix, or a stack of matrices, with parameters that have gradients.

    Parameters: `codes [..., K, G]`, the weights as fractional codes; `scales` and `biases`
    `[..., K]`, changes in units of SCALE_RATE * scale. Codes start from `weight [..., inputs]`,
    the unquantized matrix; scales and biases start from `parts`.
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
        self.start = {"codes": self.clipped(steps), "scales": zeros, "biases": zeros}

    @property
    def codes(self) -> mx.array:
        """The codes of `parts`, as float32 `[..., K, G]`."""
        packed, scales, _ = self.parts
        ones, zeros = mx.ones_like(self.scales), mx.zeros_like(self.scales)
        group_size = self.shape[-1] // scales.shape[-1]
        codes = mx.dequantize(packed, ones, zeros, group_size=group_size, bits=self.bits)
        return codes.reshape(*scales.shape, group_size)

    def clipped(self, codes: mx.array) -> mx.array:
        """Fractional codes, limited to values that are rounded to a valid code."""
        return mx.clip(codes, -0.4, self.top + 0.4)

    def weight(self, at: Parameters) -> mx.array:
        """The dequantized matrix in float32; differentiable in the parameters `at`."""
        scale = self.scales * (1 + SCALE_RATE * at["scales"])
        bias = self.biases + self.scales * SCALE_RATE * at["biases"]
        return (scale[..., None] * at["codes"] + bias[..., None]).reshape(self.shape)

    def freeze(self, codes: mx.array, before: mx.array, frozen: mx.array, share: float) -> Any:
        """Round and freeze this share of all codes, those nearest to a valid code first.

        codes, before: values after and before a step; frozen codes keep the latter. Returns the
        new codes, and which of them are frozen.
        """
        codes = mx.where(frozen, before, self.clipped(codes))
        nearest = mx.round(codes)
        num = int(share * codes.size)
        if num:
            distance = mx.where(frozen, -1, mx.abs(codes - nearest))
            # A sample: mx.partition sorts all values on a GPU, which takes longer than the rest.
            sample = distance.flatten()[:: max(codes.size // SORTED, 1) | 1]
            last = -(-num * sample.size // codes.size) - 1
            limit = mx.partition(sample, last)[last] if num < codes.size else 1
            frozen = distance <= limit
            codes = mx.where(frozen, nearest, codes)
        return codes, frozen

    def quantized(self, at: Parameters) -> Quantized:
        """Packed weight, scales and biases of the parameters `at`, whose codes must be whole."""
        dtype = self.parts[1].dtype
        scales = self.scales * (1 + SCALE_RATE * at["scales"])
        stored = scales.astype(dtype)
        # The bias compensates the rounding of the scale, at the mean of the codes.
        rounding = (scales - stored.astype(mx.float32)) * at["codes"].mean(axis=-1)
        biases = self.biases + self.scales * SCALE_RATE * at["biases"] + rounding
        return pack(at["codes"].reshape(self.shape), self.bits), stored, biases.astype(dtype)


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a training; the unit of the rate is one code."""

    epochs: int
    rate: float
    # Whether codes are trained; scales and biases always are.
    codes: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """Trained matrices, and the loss on held-out batches before and after the training."""

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
    """Minimise the mean of `losses[0](weights by name, batch)` over batches, with Adam.

    Steps round and freeze more and more codes, those nearest to a valid code first; the others
    compensate the error. An optional second loss is used in every SECOND_EVERY-th step. An eighth
    of the batches is held out: if the training does not reduce their loss, the result is the
    quantization that it started from. Deterministic for a seed.
    """
    num_held = min(max(num_batches // 8, 1), num_batches)
    held = range(num_batches - num_held, num_batches)
    at: Any = {
        name: latent.start if schedule.codes else latent.start | {"codes": latent.codes}
        for name, latent in latents.items()
    }

    def objective(loss: Loss, at: dict[str, Parameters], batch: int) -> mx.array:
        return loss({name: latents[name].weight(at[name]) for name in latents}, batch)

    def held_out_loss(parts: Mapping[str, Quantized]) -> float:
        weights = {n: dequantized(p, latents[n].shape) for n, p in parts.items()}
        mx.eval(weights)
        return sum(float(losses[0](weights, batch)) for batch in held) / num_held

    order = list(_order(held.start or num_batches, schedule))
    optimizer = optim.Adam(_rates(schedule.rate, len(order)), betas=BETAS, bias_correction=True)
    optimizer.init(at)
    value_and_grads = [mx.value_and_grad(partial(objective, loss)) for loss in losses]
    frozen = {n: mx.full(at[n]["codes"].shape, not schedule.codes) for n in latents}
    for step, batch in enumerate(order, 1):
        value_and_grad = value_and_grads[-1 if step % SECOND_EVERY == 0 else 0]
        value, gradients = value_and_grad(at, batch)
        share = 1 - max(1 - step / (FROZEN * len(order)), 0) ** POWER
        for name in latents:
            gradients[name]["codes"] = mx.where(frozen[name], 0, gradients[name]["codes"])
        new = optimizer.apply_gradients(gradients, at)
        for name, latent in latents.items():
            new[name]["codes"], frozen[name] = latent.freeze(
                new[name]["codes"], at[name]["codes"], frozen[name], share
            )
        at = new
        mx.eval(at, frozen, optimizer.state, value)
        on_step(step, len(order), float(value))
    parts = {name: latent.quantized(at[name]) for name, latent in latents.items()}
    start = {name: latent.parts for name, latent in latents.items()}
    before, after = held_out_loss(start), held_out_loss(parts)
    # False for NaN.
    return Trained(parts, before, after) if after < before else Trained(start, before, before)


def dequantized(parts: Quantized, shape: tuple[int, ...]) -> mx.array:
    """The matrix of this shape in float32, from the stored scales and biases."""
    packed, scales, biases = parts
    bits, group_size = packed.shape[-1] * WORD_BITS // shape[-1], shape[-1] // scales.shape[-1]
    numbers = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(packed, *numbers, group_size=group_size, bits=bits)


def _order(num_batches: int, schedule: Schedule) -> Iterator[int]:
    """Every batch once per epoch, shuffled."""
    key = mx.random.key(schedule.seed)
    for _ in range(schedule.epochs):
        key, own = mx.random.split(key)
        yield from np.array(mx.random.permutation(num_batches, key=own)).tolist()


def _rates(rate: float, num_steps: int) -> Callable[[mx.array], mx.array]:
    """The learning rate at a step: linear warm-up, then cosine decay."""
    warm = max(int(WARM_UP * num_steps), 1)

    def at(step: mx.array) -> mx.array:
        done = mx.clip((step - warm) / max(num_steps - warm, 1), 0, 1)
        falling = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + mx.cos(math.pi * done))
        return rate * mx.minimum((step + 1) / warm, falling)

    return at
