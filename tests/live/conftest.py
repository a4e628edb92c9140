"""When the live tests are imported, and how torch runs in them."""

from contextlib import suppress
from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A run without them does not import torch; a run with them takes torchvision first."""
    if "not live" in config.getoption("markexpr"):
        return True
    # Before any test imports transformers; without torch each live test says so itself.
    with suppress(pytest.skip.Exception):
        from live import reference_processor  # noqa: F401
    return None


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads of torch wait for each other by spinning: on a busy machine many times slower."""
    pytest.importorskip("torch").set_num_threads(1)
