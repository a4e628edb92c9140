"""How torch runs in the live tests; torchvision goes before transformers."""

from contextlib import suppress

import pytest

# Before any test imports transformers; without torch each live test says so itself.
with suppress(pytest.skip.Exception):
    from live import reference_processor  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads of torch wait for each other by spinning: on a busy machine many times slower."""
    pytest.importorskip("torch").set_num_threads(1)
