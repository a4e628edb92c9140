"""Whole models on the emulator: prefill and decode as kernels give the logits of plain MLX."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday
from metal.emulator import Log, emulated

import qwen35_mlx
from qwen35_mlx.kernels import metal, tiers
from qwen35_mlx.model.language import Model
from qwen35_mlx.model.loading import load_model

MAX_DIFFERENCE = 3e-4


@pytest.fixture(scope="module")
def log() -> Iterator[Log]:
    metal.clear()
    with emulated(metal_available=True) as log:
        yield log
    metal.clear()


@pytest.fixture(scope="module", params=everyday(["dense", "moe", "yarn"], 1))
def models(
    request: pytest.FixtureRequest, converted_golden: Callable[[str], Path], log: Log
) -> tuple[Model, Model]:
    """The same golden checkpoint on kernels and on ops."""
    out = converted_golden(request.param)
    on_kernels, on_ops = (load_model(out)[0] for _ in range(2))
    tiers.use(on_kernels, tiers.with_kernels())
    return on_kernels, on_ops


def tokens(model: Model, *shape: int) -> mx.array:
    rng = np.random.default_rng(sum(shape))
    return mx.array(rng.integers(0, model.config.vocab_size, shape))


def difference(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a - b).max())


def kernels_of(log: Log, since: int) -> set[str]:
    return {launch.kernel for launch in log.launches[since:]}


@pytest.mark.parametrize("num_tokens", everyday([1, 2, 8, 9, 31, 64, 65, 70], 3))
def test_logits_of_any_length(models: tuple[Model, Model], num_tokens: int) -> None:
    on_kernels, on_ops = models
    ids = tokens(on_ops, 1, num_tokens)
    assert difference(on_kernels(ids), on_ops(ids)) <= MAX_DIFFERENCE


@pytest.mark.slow
def test_a_padded_batch_and_its_cache_carried_into_decode(
    models: tuple[Model, Model], log: Log
) -> None:
    padding = [0, 3, 20]
    ids = tokens(models[0], len(padding), 37 + 3)
    logits: list[list[mx.array]] = []
    since = log.num_dispatches
    for model in models:
        cache = model.make_cache(padding)
        steps = [model(ids[:, :37], cache)]
        steps += [model(ids[:, t : t + 1], cache) for t in range(37, 40)]
        logits.append(steps)
    ran = kernels_of(log, since)
    assert {"chunk_delta_prepare", "chunk_delta_scan", "delta_step"} <= ran
    for row, pads in enumerate(padding):
        assert difference(logits[0][0][row, pads:], logits[1][0][row, pads:]) <= MAX_DIFFERENCE
    for ours, theirs in zip(logits[0][1:], logits[1][1:], strict=True):
        assert difference(ours, theirs) <= MAX_DIFFERENCE


@pytest.mark.slow
def test_one_cache_through_pieces_of_every_kind(models: tuple[Model, Model]) -> None:
    """Chunks, a few tokens at once, and single steps read and write the same state."""
    ids = tokens(models[0], 1, 82)
    caches = [model.make_cache() for model in models]
    start = 0
    for length in (1, 65, 8, 1, 2, 5):
        piece = ids[:, start : start + length]
        ours, theirs = (m(piece, c) for m, c in zip(models, caches, strict=True))
        assert difference(ours, theirs) <= MAX_DIFFERENCE
        start += length


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_the_demo_at_4_bits(converted_demo: Path, log: Log, dtype: mx.Dtype) -> None:
    """A trained model, where bfloat16 can be judged: the same tokens are the likeliest."""
    on_ops, _ = qwen35_mlx.load(converted_demo, kernels="ops")
    on_kernels, tokenizer = qwen35_mlx.load(converted_demo, kernels="metal")
    ids: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? " * 5}],
        add_generation_prompt=True,
        enable_thinking=False,
    )
    ids = mx.array(ids)[None]
    truth = on_ops(ids)
    for model in (on_kernels, on_ops):
        model.set_dtype(dtype)
    since = log.num_dispatches
    cache = on_kernels.make_cache()
    ours = mx.concatenate([on_kernels(ids[:, :-1], cache), on_kernels(ids[:, -1:], cache)], axis=1)
    prefill, decode = {"chunk_delta_scan", "grouped_expert_matmul"}, {"delta_step", "router"}
    assert prefill | decode <= kernels_of(log, since)
    if dtype == mx.float32:
        assert difference(ours, truth) <= MAX_DIFFERENCE
        return
    plain = on_ops(ids)
    noise = float(mx.sqrt(mx.mean(mx.square(plain - truth))))
    error = float(mx.sqrt(mx.mean(mx.square(ours - truth))))
    # Not farther from float32 than plain MLX in bfloat16 is, but for luck.
    assert error <= 1.5 * noise
    assert mx.array_equal(ours.argmax(-1)[:, -1], truth.argmax(-1)[:, -1])
