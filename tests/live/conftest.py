"""How torch runs in the live tests."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads of torch wait for each other by spinning: on a busy machine many times slower."""
    pytest.importorskip("torch").set_num_threads(1)
