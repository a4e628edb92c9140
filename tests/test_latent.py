"""Quantized matrices as numbers that have gradients."""

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday

from qwen35_mlx.quant import latent as module
from qwen35_mlx.quant import quantize
from qwen35_mlx.quant.affine import dequantize
from qwen35_mlx.quant.latent import Latent, Schedule, dequantized, train


def random(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def equal(a, b):
    return all(mx.array_equal(x, y).item() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("shape", [(5, 96), (3, 4, 64)])
def test_codes_that_stay_are_stored_as_they_were(bits, shape):
    parts = quantize(random(*shape), bits, 32, "search")
    latent = Latent(parts, random(*shape))
    at = latent.start | {"codes": latent.codes}
    assert equal(latent.quantized(at), parts)
    assert mx.allclose(latent.weight(at), dequantize(*parts, bits, 32), atol=1e-6).item()
    assert mx.array_equal(dequantized(parts, shape), dequantize(*parts, bits, 32)).item()


def test_training_begins_at_the_weights_themselves():
    w = random(4, 64)
    latent = Latent(quantize(w, 8, 32), w)
    assert mx.allclose(latent.weight(latent.start), w, atol=0.03).item()
    # What no code reaches is cut off.
    far = Latent(quantize(w, 8, 32), 2 * w)
    steps = far.start["codes"]
    assert steps.min().item() >= -0.5 and steps.max().item() <= 255.5


def test_scales_keep_their_dtype():
    w = random(4, 64).astype(mx.bfloat16)
    latent = Latent(quantize(w, 4, 64), w)
    found = latent.quantized(latent.start | {"codes": latent.codes})
    assert equal(found, latent.parts) and found[1].dtype == mx.bfloat16


def test_a_bias_makes_up_for_the_rounding_of_its_scale():
    w = random(32, 64)
    parts = tuple(
        part.astype(mx.bfloat16) if part.dtype == mx.float32 else part
        for part in quantize(w, 6, 64)
    )
    latent = Latent(parts, w)
    at = latent.start | {"codes": latent.codes, "scales": mx.full((32, 1), 0.013)}
    wanted, found = latent.weight(at), dequantized(latent.quantized(at), w.shape)
    # What is left of the mean is the rounding of the bias itself.
    left = mx.abs((found - wanted).mean(axis=-1, keepdims=True))
    assert (left <= mx.abs(latent.biases) * 2**-8).all().item()


def test_gradients_are_those_of_numbers():
    w, goal = random(3, 64), random(3, 64, seed=1)
    latent = Latent(quantize(w, 3, 32), w)

    def loss(at):
        return mx.square(latent.weight(at) - goal).sum()

    found = mx.grad(loss)(latent.start)
    for kind in ("scales", "biases", "codes"):
        shift = mx.zeros_like(latent.start[kind])
        shift[1, 1] = 1e-2
        up, down = ({**latent.start, kind: latent.start[kind] + sign * shift} for sign in (1, -1))
        numeric = (loss(up) - loss(down)).item() / 2e-2
        assert found[kind][1, 1].sum().item() == pytest.approx(numeric, rel=3e-2)


def test_the_nearest_freeze_first_and_stay():
    w = random(4, 64)
    latent = Latent(quantize(w, 3, 32), w)
    steps, nobody = latent.start["codes"], mx.zeros((4, 2, 32), mx.bool_)
    codes, half = latent.freeze(steps, steps, nobody, 0.5)
    away = mx.abs(steps - mx.round(steps))
    assert half.sum().item() == 128
    assert mx.where(half, away, 0).max().item() <= mx.where(half, 1, away).min().item()
    assert mx.array_equal(mx.where(half, codes, 0), mx.where(half, mx.round(steps), 0)).item()
    later, frozen = latent.freeze(codes + 0.7, codes, half, 1.0)
    assert frozen.all().item() and mx.array_equal(later, mx.round(later)).item()
    assert mx.array_equal(mx.where(half, later, 0), mx.where(half, codes, 0)).item()
    assert later.min().item() >= 0 and later.max().item() <= 7


def test_where_weights_are_many_a_sample_tells_which_freeze(monkeypatch):
    monkeypatch.setattr(module, "SORTED", 512)
    w = random(64, 128)
    latent = Latent(quantize(w, 3, 32), w)
    steps, nobody = latent.start["codes"], mx.zeros((64, 4, 32), mx.bool_)
    codes, half = latent.freeze(steps, steps, nobody, 0.5)
    assert half.mean().item() == pytest.approx(0.5, abs=0.05)
    assert half.sum().item() != w.size // 2
    _, frozen = latent.freeze(codes, codes, half, 1.0)
    assert frozen.all().item()


def problem(seed=0):
    """A matrix at 3 bits by error feedback, and the squared error of its products on batches."""
    w = random(16, 64, seed=seed)
    inputs = random(8, 128, 64, seed=seed + 1) @ random(64, 64, seed=seed + 2)
    rows = inputs[:7].reshape(-1, 64)
    latent = Latent(quantize(w, 3, 32, "gptq", hessian=rows.T @ rows), w)

    def loss(weights, batch):
        wanted = inputs[batch] @ w.T
        return mx.square(inputs[batch] @ weights["w"].T - wanted).mean() / mx.square(wanted).mean()

    return latent, loss


@pytest.mark.parametrize("seed", everyday([0, 5], 1))
def test_training_reduces_a_held_out_loss_below_that_of_error_feedback(seed):
    latent, loss = problem(seed)
    found = train({"w": latent}, [loss], 8, Schedule(epochs=40, rate=0.04))
    assert found.after < 0.92 * found.before
    weight = dequantize(*found.parts["w"], 3, 32)
    assert float(loss({"w": weight}, 7)) == pytest.approx(found.after, rel=1e-4)


def test_scales_and_biases_alone_leave_codes_as_they_are():
    latent, loss = problem()
    found = train({"w": latent}, [loss], 8, Schedule(epochs=10, rate=0.02, codes=False))
    assert found.after < 0.99 * found.before
    assert mx.array_equal(found.parts["w"][0], latent.parts[0]).item()


@pytest.mark.slow
def test_training_twice_gives_the_same_bits():
    latent, loss = problem()
    schedule = Schedule(epochs=8, rate=0.04)
    first, second = (train({"w": latent}, [loss], 8, schedule) for _ in range(2))
    assert equal(first.parts["w"], second.parts["w"]) and first.after == second.after


def test_what_does_not_help_on_other_batches_is_not_kept():
    latent, _ = problem()
    start, away = dequantize(*latent.parts, 3, 32), random(16, 64, seed=9)

    def loss(weights, batch):
        # The last batch is held out, and wants the opposite.
        sign = -1 if batch == 7 else 1
        return mx.square(sign * away - (weights["w"] - start)).mean()

    found = train({"w": latent}, [loss], 8, Schedule(epochs=4, rate=0.1))
    assert found.after == found.before
    assert equal(found.parts["w"], latent.parts)


def test_every_sixteenth_step_takes_the_second_loss_and_the_first_one_judges():
    latent, loss = problem()
    order = []

    def noted(name, batch, weights):
        order.append((name, batch))
        return loss(weights, batch)

    losses = [lambda weights, batch, name=name: noted(name, batch, weights) for name in "ab"]
    train({"w": latent}, losses, 8, Schedule(epochs=5, rate=0.04))
    # The last batch is held out; it is judged before and after.
    assert [name for name, _ in order[:35]] == (["a"] * 15 + ["b"]) * 2 + ["a"] * 3
    assert all(batch < 7 for _, batch in order[:35])
    assert order[35:] == [("a", 7)] * 2


def test_each_step_is_told_with_how_many_there_are():
    w, told = random(4, 64), []
    latent = Latent(quantize(w, bits=3, group_size=32), w)
    train(
        {"w": latent},
        [lambda weights, batch: mx.square(weights["w"] - w).mean()],
        4,
        Schedule(epochs=2, rate=0.02),
        lambda step, total, loss: told.append((step, total)),
    )
    # A batch of the four is held out.
    assert told == [(step, 6) for step in range(1, 7)]
