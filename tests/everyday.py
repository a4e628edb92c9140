"""Which parameters of a test run in `make test`; all of them run in `make test-all`."""

from collections.abc import Iterable
from typing import Any

import pytest


def everyday(values: Iterable[Any], *kept: int) -> list[Any]:
    """The values as parameters; only those at the places `kept` are not slow."""
    parameters = []
    for place, value in enumerate(values):
        marks = () if place in kept else pytest.mark.slow
        parameters.append(
            pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks)
        )
    missing = [place for place in kept if place >= len(parameters)]
    assert not missing, f"there are only {len(parameters)} values: {missing}"
    return parameters
