"""When the live tests are imported, and how torch runs in them."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A run without them does not import torch."""
    return True if "not live" in config.getoption("markexpr") else None


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads of torch wait for each other by spinning: on a busy machine many times slower."""
    pytest.importorskip("torch").set_num_threads(1)
