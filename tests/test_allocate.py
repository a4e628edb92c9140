"""The choice of bits against a search through everything."""

from itertools import product

import numpy as np
import pytest

from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.quant import allocate as module
from qwen35_mlx.quant.allocate import Option, allocate


def random_tables(seed: int, num: int, step: int) -> dict[str, list[Option]]:
    """Sizes in whole steps, errors that fall with size on the whole; some options are no good."""
    rng = np.random.default_rng(seed)
    tables = {}
    for i in range(num):
        sizes = step * np.sort(rng.integers(1, 200, size=rng.integers(1, 7)))
        errors = rng.lognormal(0, 2) * np.exp(-rng.uniform(0.01, 0.05) * sizes / step)
        errors *= rng.lognormal(0, 0.5, size=len(sizes))
        tables[f"t{i}"] = [
            Option(2 + k, 64, int(s), float(e))
            for k, (s, e) in enumerate(zip(sizes, errors, strict=True))
        ]
    return tables


def best_error(tables: dict[str, list[Option]], budget: int) -> float:
    return min(
        sum(o.error for o in chosen)
        for chosen in product(*tables.values())
        if sum(o.nbytes for o in chosen) <= budget
    )


def lower_bound(tables: dict[str, list[Option]], budget: int) -> float:
    """The error that no choice is below: at any price of a byte, the cheapest choice, less budget.

    The bound is concave in the price; a search by thirds finds its maximum.
    """

    def at(exponent: float) -> float:
        price = 10**exponent
        cheapest = (min(o.error + price * o.nbytes for o in options) for options in tables.values())
        return sum(cheapest) - price * budget

    low, high = -10.0, 1.0
    for _ in range(30):
        third = (high - low) / 3
        better_right = at(low + third) < at(high - third)
        low, high = (low + third, high) if better_right else (low, high - third)
    return at(low)


def sizes(tables: dict[str, list[Option]]) -> tuple[int, int]:
    smallest = sum(min(o.nbytes for o in options) for options in tables.values())
    return smallest, sum(max(o.nbytes for o in options) for options in tables.values())


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_within_the_budget_has_less_error(seed):
    tables = random_tables(seed, num=5, step=1024)
    low, high = sizes(tables)
    for budget in (low, low + 1, (2 * low + high) // 3, (low + high) // 2, high, 2 * high):
        found = allocate(tables, budget)
        assert found.nbytes == sum(o.nbytes for o in found.options.values()) <= budget
        assert found.error == pytest.approx(sum(o.error for o in found.options.values()))
        assert found.error == pytest.approx(best_error(tables, budget), rel=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_sizes_without_a_common_unit_lose_at_most_a_percent(seed):
    rng = np.random.default_rng(seed)
    tables = {
        name: [o._replace(nbytes=o.nbytes * 10**6 + int(rng.integers(10**6))) for o in options]
        for name, options in random_tables(seed, num=6, step=1).items()
    }
    low, high = sizes(tables)
    for budget in (low, (2 * low + high) // 3, (low + high) // 2):
        found = allocate(tables, budget)
        best = best_error(tables, budget)
        assert found.nbytes <= budget
        assert lower_bound(tables, budget) <= best * (1 + 1e-9)
        assert found.error <= best * 1.01


def options(*pairs: tuple[int, float]) -> list[Option]:
    return [Option(2, 64, nbytes, error) for nbytes, error in pairs]


def test_one_option_may_take_the_whole_budget():
    tables = {"a": options((10, 5), (20, 1)), "b": options((10, 3), (15, 2), (20, 1.9))}
    assert allocate(tables, 30).error == pytest.approx(1 + 3)


def test_sizes_are_counted_in_their_common_unit(monkeypatch):
    """In fifths of 2000 each thousand would count as three of five: no room for two."""
    monkeypatch.setattr(module, "MAX_UNITS", 5)
    thousands = options((1000, 1.0), (2000, 0.2))
    tables = {"a": thousands, "b": thousands, "c": options((1000, 1.5), (3000, 0.0))}
    assert allocate(tables, 5000).error == pytest.approx(0.2 + 0.2 + 1.5)


def test_bytes_that_rounding_left_over_go_where_they_help_most(monkeypatch):
    monkeypatch.setattr(module, "MAX_UNITS", 2)
    tables = {
        "a": options((10, 9), (17, 1)),
        "b": options((10, 2), (13, 1.9)),
        "c": options((10, 2), (13, 1)),
    }
    found = allocate(tables, 40)
    assert {name: option.nbytes for name, option in found.options.items()} == dict(a=17, b=10, c=13)
    assert found.nbytes == 40


def test_many_tensors_fill_the_budget_and_come_close_to_the_bound():
    tables = random_tables(3, num=700, step=2**20)
    low, high = sizes(tables)
    for share in (0.05, 0.3, 0.8):
        budget = int(low + share * (high - low)) + 12345
        found = allocate(tables, budget)
        assert found.nbytes <= budget
        assert found.error <= lower_bound(tables, budget) * 1.002
        if share < 0.5:
            assert found.nbytes >= 0.999 * budget


def test_options_that_cost_more_and_lose_more_are_never_taken():
    tables = {"a": [Option(2, 64, 10, 1.0), Option(3, 64, 20, 2.0), Option(4, 64, 30, 0.5)]}
    assert allocate(tables, 25).options["a"].bits == 2
    assert allocate(tables, 30).options["a"].bits == 4


def test_a_budget_below_the_smallest_plan_says_what_would_do():
    tables = random_tables(0, num=4, step=1000)
    low, _ = sizes(tables)
    with pytest.raises(Qwen35Error, match="smaller than the smallest plan") as error:
        allocate(tables, low - 1)
    assert f"at least {low:,} bytes" in str(error.value)
    assert allocate(tables, low).nbytes == low


@pytest.mark.parametrize("error", [float("nan"), float("inf"), -1.0])
def test_errors_that_are_no_numbers_are_refused(error):
    with pytest.raises(Qwen35Error, match="an error is not valid"):
        allocate({"a": [Option(2, 64, 10, error)]}, 100)
