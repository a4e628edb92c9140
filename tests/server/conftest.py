"""Servers on free ports before an engine that says what it is told."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from server.fake_engine import FakeEngine
from server.running import Running

import qwen35_mlx
from qwen35_mlx.text.tokenizer import read_tokenizer

DEMO = Path(qwen35_mlx.__file__).parent / "demo"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return read_tokenizer(DEMO, json.loads((DEMO / "config.json").read_text()), (2549, 2547))


@pytest.fixture(scope="module")
def running(tokenizer: Any) -> Iterator[Running]:
    server = Running(FakeEngine(tokenizer), tokenizer)
    yield server
    server.stop()


@pytest.fixture
def server(running: Running, tokenizer: Any) -> Running:
    """The server with an engine as new."""
    engine: FakeEngine = running.engine
    engine.__init__(tokenizer)  # type: ignore[misc]
    return running


@pytest.fixture
def start(tokenizer: Any) -> Iterator[Callable[..., Running]]:
    """Another server with other settings."""
    started: list[Running] = []

    def run(engine: Any = None, **settings: Any) -> Running:
        started.append(Running(engine or FakeEngine(tokenizer), tokenizer, **settings))
        return started[-1]

    yield run
    for one in started:
        one.stop()


@pytest.fixture(scope="module")
def live_server(demo: tuple[Any, Any], converted_demo: Path) -> Iterator[Running]:
    """A server before the demo."""
    from qwen35_mlx.engine.scheduler import Engine
    from qwen35_mlx.server.service import Settings

    model, tokenizer = demo
    engine = Engine(model, tokenizer)
    engine.start()
    settings = Settings.of(model, tokenizer, converted_demo, model_id="demo")
    server = Running(engine, tokenizer, **vars(settings))
    yield server
    server.stop()
    engine.stop()
