"""Whole models that decode through the emulated kernels give the logits of plain MLX."""

import functools

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday
from metal.emulator import Log, emulated

from qwen35_mlx.config import FULL, LINEAR
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.kernels import metal, tiers
from qwen35_mlx.kernels.tiers import DECODE_OPERATIONS, PORTABLE, with_kernels
from qwen35_mlx.model.loading import load_model

MAX_DIFFERENCE = 1e-4


@pytest.fixture(scope="module")
def model_of(converted_demo, converted_golden):
    """A model by the name of its checkpoint, loaded once."""

    @functools.cache
    def load(name):
        return load_model(converted_demo if name == "demo" else converted_golden(name))[0]

    return load


def logits_with(model, kernels, prompt, pieces, left_padding=None):
    """Logits of the pieces that follow a prompt; the prompt is always read by plain MLX."""
    cache = model.make_cache(left_padding) if left_padding else model.make_cache()
    tiers.use(model, PORTABLE)
    mx.eval(model(prompt, cache))
    tiers.use(model, with_kernels(kernels))
    result = [model(piece, cache) for piece in pieces]
    mx.eval(result)
    tiers.use(model, PORTABLE)
    return result


def compare(model, pieces, left_padding=None) -> Log:
    rows = len(left_padding) if left_padding else 1
    rng = np.random.default_rng(0)
    # A prompt longer than what the kernels take, of odd length.
    prompt = mx.array(rng.integers(0, model.config.vocab_size, (rows, 11)))
    inputs = [mx.array(rng.integers(0, model.config.vocab_size, (rows, n))) for n in pieces]
    with emulated() as log:
        metal.clear()
        got = logits_with(model, DECODE_OPERATIONS, prompt, inputs, left_padding)
    metal.clear()
    want = logits_with(model, (), prompt, inputs, left_padding)
    for a, b in zip(got, want, strict=True):
        assert b.std().item() > 0.3
        scale = max(1.0, mx.abs(b).max().item())
        assert mx.abs(a - b).max().item() <= MAX_DIFFERENCE * scale
    return log


def launches(log: Log, model) -> dict[str, int]:
    """Of every chosen kernel, how many a step."""
    names = [x.kernel for x in log.launches]
    return {op: sum(op in name for name in names) for op in DECODE_OPERATIONS}


@pytest.mark.parametrize(
    ("name", "pieces", "left_padding"),
    everyday(
        [
            ("dense", (1, 3), None),
            ("dense", (1,), [0, 5, 11]),
            ("moe", (1, 8), None),
            ("moe", (3,), [2, 0]),
            ("yarn", (2, 1), None),
            ("demo", (1, 1), None),
            ("demo", (1,), [4, 0]),
        ],
        3,
    ),
)
def test_logits_equal_those_of_plain_mlx(model_of, name, pieces, left_padding):
    model = model_of(name)
    log = compare(model, pieces, left_padding)
    count = launches(log, model)
    types = model.config.layer_types
    assert count["delta_step"] == types.count(LINEAR) * len(pieces)
    assert count["qk_norm_rope"] == count["output_gate"] == types.count(FULL) * len(pieces)
    # Two passes, for heads of 32 dims and more, and rows without padding.
    passes = 2 if name == "demo" and left_padding is None else 0
    assert count["decode_attention"] == passes * types.count(FULL) * len(pieces)
    # The odd widths of yarn are left to plain MLX.
    experts = 0 if name == "yarn" else len(types) * len(pieces)
    assert count["expert_gate_up"] == count["expert_down"] == experts
    assert (count["projection"] > 0) == (name != "yarn")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_short_first_piece_and_no_cache_equal_plain_mlx(model_of, name):
    model, ids = model_of(name), mx.array([[5, 3, 8, 1]])
    want = model(ids)
    with emulated():
        metal.clear()
        tiers.use(model, with_kernels(DECODE_OPERATIONS))
        got = model(ids), model(ids, model.make_cache())
        mx.eval(got)
    tiers.use(model, PORTABLE)
    metal.clear()
    for logits in got:
        assert mx.abs(logits - want).max().item() <= MAX_DIFFERENCE


@pytest.mark.slow
# No cache of ours is packed yet; a layer with one is in test_decode_attention.py.
@pytest.mark.parametrize("op", [op for op in DECODE_OPERATIONS if op != "packed_attention"])
def test_each_kernel_alone_equals_plain_mlx(model_of, op):
    # The heads of the others are too narrow for the kernel of attention.
    model = model_of("demo" if op == "decode_attention" else "moe")
    prompt, token = mx.arange(10)[None], mx.array([[3]])
    with emulated() as log:
        metal.clear()
        (got,) = logits_with(model, (op,), prompt, [token])
    metal.clear()
    (want,) = logits_with(model, (), prompt, [token])
    assert mx.abs(got - want).max().item() <= MAX_DIFFERENCE
    assert {x.kernel.startswith(op) for x in log.launches} == {True}


def test_a_long_piece_runs_no_decode_kernel(model_of):
    model = model_of("moe")
    with emulated() as log:
        metal.clear()
        tiers.use(model, with_kernels(DECODE_OPERATIONS))
        mx.eval(model(mx.arange(9)[None], model.make_cache()))
    tiers.use(model, PORTABLE)
    metal.clear()
    # The router alone has no limit.
    assert {x.kernel.split("_")[0] for x in log.launches} == {"router"}


def test_an_unknown_kernel_is_refused(model_of):
    with pytest.raises(Qwen35Error, match="no such kernel: warp_drive"):
        tiers.use(model_of("dense"), with_kernels(["warp_drive"]))
