"""The search against brute force, and what it promises about rounding, slices and importance."""

from itertools import combinations_with_replacement, product

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday

from qwen35_mlx.quant import quantize
from qwen35_mlx.quant.affine import BITS, GROUP_SIZES
from qwen35_mlx.quant.search import STARTS

# Not the attribute of the package, which is a function.
SEARCH_MODULE = "qwen35_mlx.quant.search"
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
Parts = tuple[mx.array, mx.array, mx.array]


def weights(shape: tuple[int, ...], kind: str = "normal", seed: int = 0) -> mx.array:
    generator = np.random.default_rng(seed)
    values = {
        "normal": generator.standard_normal,
        "laplace": lambda size: generator.laplace(size=size),
        "student": lambda size: generator.standard_t(4, size=size),
    }[kind](size=shape)
    return mx.array(values.astype(np.float32))


def importances(inputs: int, seed: int = 0) -> mx.array:
    return mx.array(np.exp(np.random.default_rng(seed).standard_normal(inputs)).astype(np.float32))


def errors(w: mx.array, parts: Parts, bits: int, group_size: int, importance=None) -> np.ndarray:
    """Squared error of each group, in float32 arithmetic on the stored scales and biases."""
    wq, scales, biases = parts
    stored = scales.astype(mx.float32), biases.astype(mx.float32)
    back = mx.dequantize(wq, *stored, group_size=group_size, bits=bits)
    squares = np.array(back - w.astype(mx.float32)).astype(np.float64) ** 2
    if importance is not None:
        squares *= np.array(importance)
    return squares.reshape(*scales.shape, group_size).sum(-1)


def same(a: Parts, b: Parts) -> bool:
    return all(
        x.dtype == y.dtype and mx.array_equal(x, y).item() for x, y in zip(a, b, strict=True)
    )


def optimum_of_two_bits(group: np.ndarray, importance: np.ndarray) -> float:
    """The least error of 2-bit codes: over every way to cut the sorted weights into four runs."""
    order = np.argsort(group)
    x, p = group[order].astype(np.float64), importance[order].astype(np.float64)
    cuts = np.array(list(combinations_with_replacement(range(len(x) + 1), 3))).T
    mass, moment = (np.append(0, np.cumsum(v)) for v in (p, p * x))
    above, moment_above = mass[-1] - mass[cuts], moment[-1] - moment[cuts]
    c, cx = above.sum(0), moment_above.sum(0)
    # Sums of codes 0 1 2 3 and of their squares 0 1 4 9, counted by how many cuts lie below.
    cc = above[0] + 3 * above[1] + 5 * above[2]
    determinant = mass[-1] * cc - c * c
    gain = (mass[-1] * cx - c * moment[-1]) ** 2 / np.where(determinant > 1e-9, determinant, np.inf)
    return (p * x * x).sum() - moment[-1] ** 2 / mass[-1] - gain.max() / mass[-1]


def optimum_of_many_starts(group: np.ndarray, importance: np.ndarray, bits: int) -> float:
    """Least squares from 900 ranges, one group at a time."""
    x, p, levels = group.astype(np.float64), importance.astype(np.float64), 2**bits - 1
    best = np.inf
    step = (x.max() - x.min()) / levels
    for low, high in product(np.linspace(-1, 2, 30), repeat=2):
        bias = x.min() + low * step
        scale = (x.max() - high * step - bias) / levels
        for _ in range(6):
            codes = np.clip(np.round((x - bias) / scale), 0, levels)
            best = min(best, (p * (x - bias - scale * codes) ** 2).sum())
            if np.ptp(codes) == 0:
                break
            scale, bias = np.polyfit(codes, x, 1, w=np.sqrt(p))
    return best


@pytest.mark.parametrize("bits", everyday(BITS, 1))
def test_never_worse_than_minmax(bits):
    kinds = ("normal", "student", "laplace")
    for dtype, group_size, kind in zip(DTYPES, GROUP_SIZES, kinds, strict=True):
        w = weights((64, 384), kind).astype(dtype)
        w[3] *= 1e-3
        w[4] += 100
        for importance in (None, importances(384)):
            found = quantize(w, bits, group_size, "search", importance)
            theirs = mx.quantize(w, group_size=group_size, bits=bits)
            ours, minmax = (
                errors(w, parts, bits, group_size, importance) for parts in (found, theirs)
            )
            assert found[1].dtype == dtype
            assert (ours <= minmax * (1 + 1e-5)).all()
            assert ours.sum() < 0.95 * minmax.sum()


@pytest.mark.parametrize("weighed", [False, True])
def test_two_bits_come_close_to_the_optimum(weighed):
    w = weights((12, 64), "laplace")
    importance = importances(64) if weighed else None
    ours = errors(w, quantize(w, 2, 32, "search", importance), 2, 32, importance)
    p = np.ones(64) if importance is None else np.array(importance)
    best = np.array(
        [
            [optimum_of_two_bits(row[k : k + 32], p[k : k + 32]) for k in (0, 32)]
            for row in np.array(w)
        ]
    )
    assert (ours >= best * (1 - 1e-4)).all()
    assert ours.sum() <= best.sum() * (1.03 if weighed else 1.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "weighed"), everyday([(3, False), (3, True), (4, False), (6, False)], 1)
)
def test_more_bits_come_close_to_brute_force(bits, weighed):
    w = weights((3, 64))
    importance = importances(64) if weighed else None
    ours = errors(w, quantize(w, bits, 64, "search", importance), bits, 64, importance)
    p = np.ones(64) if importance is None else np.array(importance)
    best = sum(optimum_of_many_starts(row, p, bits) for row in np.array(w))
    assert ours.sum() <= best * 1.06


@pytest.mark.parametrize("kind", ["normal", "student"])
@pytest.mark.parametrize(
    ("bits", "ratio"),
    everyday([(2, 0.68), (3, 0.77), (4, 0.84), (5, 0.86), (6, 0.88)], 1, 2, 4),
)
def test_error_relative_to_minmax(bits, ratio, kind):
    w = weights((256, 256), kind)
    ours = errors(w, quantize(w, bits, 64, "search"), bits, 64).sum()
    minmax = errors(w, mx.quantize(w, group_size=64, bits=bits), bits, 64).sum()
    assert ours <= ratio * minmax


def test_rounding_of_scales_and_biases_is_inside_the_search():
    """At 8 bits half a unit of bfloat16 in the scale moves the last code by half a step."""
    w = weights((64, 256)).astype(mx.bfloat16)
    ours = errors(w, quantize(w, 8, 64, "search"), 8, 64).sum()
    exact = quantize(w.astype(mx.float32), 8, 64, "search")
    rounded = tuple(part.astype(mx.bfloat16) for part in exact[1:])
    assert ours < 0.6 * errors(w, (exact[0], *rounded), 8, 64).sum()
    assert ours < 1.1 * errors(w, exact, 8, 64).sum()


@pytest.mark.parametrize("bits", everyday(BITS))
def test_rows_searched_apart_equal_the_whole(bits, monkeypatch):
    w = weights((5, 3, 128)).astype(mx.bfloat16)
    importance = importances(128)
    for weighing in (None, importance):
        whole = quantize(w, bits, 64, "search", weighing)
        one = quantize(w[4, 2], bits, 64, "search", weighing)
        few = quantize(w[1:4], bits, 64, "search", weighing)
        assert same(one, tuple(part[4, 2] for part in whole))
        assert same(few, tuple(part[1:4] for part in whole))
        monkeypatch.setattr(f"{SEARCH_MODULE}.CHUNK_WEIGHTS", 4 * 128)
        assert same(whole, quantize(w, bits, 64, "search", weighing))
        monkeypatch.undo()


@pytest.mark.parametrize("bits", everyday(BITS, 1, 4))
def test_equal_importance_is_none(bits):
    w = weights((16, 128))
    none = quantize(w, bits, 64, "search")
    for value in (0, 1, 0.3):
        assert same(none, quantize(w, bits, 64, "search", mx.full(128, value)))


@pytest.mark.parametrize("bits", everyday(BITS, 1, 4))
def test_columns_of_no_importance_change_nothing(bits):
    w, importance = weights((16, 128)), importances(128)
    ignored = mx.arange(128) % 5 == 0
    importance = mx.where(ignored, 0, importance)
    found = quantize(w, bits, 64, "search", importance)
    other = quantize(mx.where(ignored, 1e4, w), bits, 64, "search", importance)
    assert mx.array_equal(found[1], other[1]).item()
    assert mx.array_equal(found[2], other[2]).item()


@pytest.mark.parametrize("bits", everyday(BITS, 1))
def test_a_group_without_any_importance_is_searched_all_the_same(bits):
    w, importance = weights((64, 128)), importances(128)
    importance = mx.where(mx.arange(128) < 64, 0, importance)
    found, plain = (
        errors(w, quantize(w, bits, 64, "search", p), bits, 64)[:, 0].sum()
        for p in (importance, None)
    )
    assert found < 1.01 * plain


@pytest.mark.parametrize("bits", everyday(BITS, 1))
def test_importance_lowers_the_error_it_weighs(bits):
    w, importance = weights((64, 256)), importances(256)
    plain, weighed = (
        errors(w, quantize(w, bits, 64, "search", p), bits, 64, importance).sum()
        for p in (None, importance)
    )
    assert weighed < 0.97 * plain


@pytest.mark.parametrize("bits", everyday((3, 4, 6), 0))
def test_an_outlier_of_hardly_any_importance_does_not_stretch_the_range(bits):
    w = weights((64, 64))
    w[:, 7] = 12
    slight, none = (mx.where(mx.arange(64) == 7, p, importances(64)) for p in (1e-7, 0))
    stretched, free = (
        errors(w, quantize(w, bits, 64, "search", p), bits, 64, none).sum() for p in (slight, none)
    )
    assert stretched < 2 * free


@pytest.mark.slow
@pytest.mark.parametrize("dtype", everyday(DTYPES, 2))
def test_constant_groups_are_exact(dtype):
    for value in (0.0, 1e-9, -1e-9, 3.3, -1234.5, 60000.0):
        w = mx.full((2, 128), value, dtype=dtype)
        w[1, 64:] = weights((64,)).astype(dtype)
        for bits in BITS:
            parts = quantize(w, bits, 64, "search")
            back = mx.dequantize(*parts, group_size=64, bits=bits)
            assert mx.array_equal(back[0], w[0]).item()
            assert mx.array_equal(back[1, :64], w[1, :64]).item()


def test_tiny_and_huge_weights_are_searched_like_others():
    w = weights((16, 128))
    ratio = errors(w, quantize(w, 3, 64, "search"), 3, 64)
    for exponent in (-60, 60, 110):
        scaled = w * 2.0**exponent
        parts = quantize(scaled, 3, 64, "search")
        unscaled = (parts[0], parts[1] * 2.0**-exponent, parts[2] * 2.0**-exponent)
        assert np.allclose(errors(w, unscaled, 3, 64).sum(), ratio.sum(), rtol=0.01)


@pytest.mark.slow
def test_memory_is_that_of_a_chunk_and_the_result(monkeypatch):
    monkeypatch.setattr(f"{SEARCH_MODULE}.CHUNK_WEIGHTS", 2**16)
    w = weights((1024, 512)).astype(mx.bfloat16)
    mx.eval(w)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(quantize(w, 3, 64, "search"))
    # Checking for nan needs a few bytes a weight; a chunk a dozen float32 copies.
    assert mx.get_peak_memory() - before < 4 * w.nbytes + 16 * 4 * 2**16


def test_every_width_has_its_starts():
    assert tuple(STARTS) == BITS
