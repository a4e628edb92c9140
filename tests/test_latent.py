"""Quantized matrices as numbers that have gradients."""

import mlx.core as mx
import numpy as np
import pytest

from qwen35_mlx.quant import quantize
from qwen35_mlx.quant.affine import dequantize
from qwen35_mlx.quant.latent import CODE_RATE, Latent, Schedule, train
from qwen35_mlx.quant.packing import pack


def random(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def equal(a, b):
    return all(mx.array_equal(x, y).item() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("shape", [(5, 96), (3, 4, 64)])
def test_what_has_not_moved_is_stored_as_it_was(bits, shape):
    parts = quantize(random(*shape), bits, 32, "search")
    latent = Latent(parts, shape[-1])
    start = latent.parameters()
    assert equal(latent.quantized(start), parts)
    assert mx.allclose(latent.weight(start), dequantize(*parts, bits, 32), atol=1e-6).item()


def test_scales_keep_their_dtype():
    parts = quantize(random(4, 64).astype(mx.bfloat16), 4, 64)
    latent = Latent(parts, 64)
    assert equal(latent.quantized(latent.parameters()), parts)
    assert latent.quantized(latent.parameters())[1].dtype == mx.bfloat16


def test_a_code_moves_when_half_a_step_is_passed_and_stays_within_the_codes():
    codes = mx.array([[0, 3, 1, 2] * 8])
    latent = Latent((pack(codes, 2), mx.ones((1, 1)), mx.zeros((1, 1))), 32)
    for step, expected in ((0.4, [0, 3, 1, 2]), (0.6, [1, 3, 2, 3]), (-2.6, [0, 0, 0, 0])):
        moved = latent.parameters() | {"codes": mx.full((1, 1, 32), step / CODE_RATE)}
        assert latent.weight(moved)[0].tolist() == expected * 8
        assert equal(latent.quantized(moved)[:1], (pack(mx.array([expected * 8]), 2),))


def test_gradients_of_scales_and_biases_are_those_of_numbers():
    parts = quantize(random(3, 64), 3, 32)
    latent = Latent(parts, 64)
    goal = random(3, 64, seed=1)

    def loss(moved):
        return mx.square(latent.weight(moved) - goal).sum()

    start = latent.parameters()
    found = mx.grad(loss)(start)
    for kind in ("scales", "biases"):
        shift = mx.zeros((3, 2))
        shift[1, 1] = 1e-2
        up, down = ({**start, kind: sign * shift} for sign in (1, -1))
        numeric = (loss(up) - loss(down)).item() / 2e-2
        assert found[kind][1, 1].item() == pytest.approx(numeric, rel=1e-3)


def test_the_gradient_of_a_code_is_that_of_its_weight_except_beyond_the_codes():
    codes = mx.array([[0, 3, 1, 2] * 8])
    latent = Latent((pack(codes, 2), mx.full((1, 1), 0.5), mx.zeros((1, 1))), 32)
    shift = mx.array([[[-1.0, 1.0, 0, 0] * 8]]) / CODE_RATE
    moved = latent.parameters() | {"codes": shift}
    found = mx.grad(lambda moved: latent.weight(moved).sum())(moved)
    assert mx.allclose(found["codes"][0, 0, :4], mx.array([0, 0, 1, 1]) * 0.5 * CODE_RATE).item()


def problem(rows=256, seed=0):
    """A matrix at 3 bits, and the squared error of its products on batches of inputs."""
    w = random(16, 64, seed=seed)
    inputs = random(8, rows, 64, seed=seed + 1) @ random(64, 64, seed=seed + 2)
    latent = Latent(quantize(w, 3, 32), 64)

    def loss(weights, batch):
        wanted = inputs[batch] @ w.T
        return mx.square(inputs[batch] @ weights["w"].T - wanted).mean() / mx.square(wanted).mean()

    return latent, loss


@pytest.mark.parametrize("seed", [0, 1])
def test_training_reduces_a_held_out_loss(seed):
    latent, loss = problem(seed=seed)
    found = train({"w": latent}, loss, 8, Schedule(epochs=20))
    assert found.after < 0.7 * found.before
    parts = latent.quantized(found.moved["w"])
    assert float(loss({"w": dequantize(*parts, 3, 32)}, 7)) == pytest.approx(found.after, rel=0.2)


def test_training_twice_gives_the_same_bits():
    latent, loss = problem(rows=16)
    first, second = (train({"w": latent}, loss, 8, Schedule(epochs=2)).moved["w"] for _ in range(2))
    assert equal(latent.quantized(first), latent.quantized(second))


def test_what_does_not_help_on_other_batches_is_not_kept():
    latent, _ = problem(rows=4)
    away = random(16, 64, seed=9)

    def loss(weights, batch):
        # The last batch is held out, and wants the opposite.
        sign = -1 if batch == 7 else 1
        return mx.square(sign * away - (weights["w"] - latent.weight(latent.parameters()))).mean()

    found = train({"w": latent}, loss, 8, Schedule(epochs=4, rate=0.05))
    assert found.after == found.before
    assert equal(latent.quantized(found.moved["w"]), latent.quantized(latent.parameters()))
