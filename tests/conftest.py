"""The bundled demo, converted once a run; a model that says what it is told; consoles."""

import os

# Threads of numpy's BLAS spin while they wait, longer than the small matrices of tests take.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import functools
import gc
import io
import pwd
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

import qwen35_mlx
from qwen35_mlx.cli import terminal
from qwen35_mlx.cli.main import app
from qwen35_mlx.convert import convert
from qwen35_mlx.engine import sampler
from qwen35_mlx.model import loading
from qwen35_mlx.model.expert_pool import stack_bytes
from qwen35_mlx.sampling import SamplingParams

DEMO = Path(qwen35_mlx.__file__).parent / "demo"


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_stops_children() -> None:
    """A run in the background ignores Ctrl-C; programs that the tests start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Conversions made by tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN35_MLX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def commands_are_built_once() -> Iterator[None]:
    """Typer's runner would build all commands anew for each call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.testing._get_command", functools.cache(get_command))
        yield


@pytest.fixture
def compiled() -> Iterator[None]:
    """Fused operations, which `make test` switches off for all other tests."""
    mx.enable_compile()
    yield
    if "MLX_DISABLE_COMPILE" in os.environ:
        mx.disable_compile()


@pytest.fixture(autouse=True)
def consoles_begin_empty() -> Iterator[None]:
    """What a console could not write to one test's stream is not written to the next one's."""
    yield
    for console in (terminal.out, terminal.err):
        console._buffer.clear()


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable and no account says where the home folder is."""
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "QWEN35_MLX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("QWEN35_MLX_SESSIONS", raising=False)

    def unknown(user: int) -> Any:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.fixture
def full_disk() -> Callable[[], AbstractContextManager[None]]:
    """Makes writes behind the first 100 bytes of each file fail in the block."""

    @contextmanager
    def limited() -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="session")
def converted_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DEMO, tmp_path_factory.mktemp("demo") / "demo-4bit", bits=4)


@pytest.fixture(scope="session")
def demo(converted_demo: Path) -> tuple[Any, Any]:
    """Model and tokenizer; tests leave both as they are."""
    return qwen35_mlx.load(converted_demo)


@pytest.fixture(scope="session")
def disk_layout(converted_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted demo with each expert's matrices side by side."""
    return convert(converted_demo, tmp_path_factory.mktemp("disk") / "demo", experts_layout="disk")


@pytest.fixture(scope="session")
def resident(converted_demo: Path) -> Any:
    """The demo with all experts in memory and no MTP layer."""
    return loading.load_model(converted_demo, mtp=False)[0]


@pytest.fixture(scope="session")
def pooled(resident: Any) -> Callable[[Path, int], Any]:
    """Loads a folder of the demo with memory for so many of the 8 experts of each layer."""
    each = stack_bytes(resident) // 8
    return lambda folder, slots: loading.load_model(folder, experts_memory=slots * each)[0]


@pytest.fixture(scope="session")
def converted_golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a golden checkpoint, converted in float32 when it is first asked for."""

    @functools.cache
    def folder(name: str) -> Path:
        out = tmp_path_factory.mktemp("golden") / name
        return convert(Path(__file__).parent / "golden" / name, out, dtype="float32")

    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Figures that tests have measured."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The same random numbers in every run; a sampler without a seed would ask the system."""
    mx.random.seed(0)
    vars(sampler)["secrets"] = SimpleNamespace(randbits=random.Random(0).getrandbits)


def pytest_collection_finish() -> None:
    """What is imported stays: without it a full collection of garbage takes a tenth of a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is typed into a terminal needs a process and a model of its own."""
    for item in items:
        if "screen" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


class ScriptedModel:
    """Says the given tokens whatever it reads, and counts what it is asked for."""

    def __init__(self, tokens: list[int], vocab_size: int = 2560, context_length: int = 4096):
        self.config = SimpleNamespace(vocab_size=vocab_size, context_length=context_length)
        self.sampling_defaults = SamplingParams()
        self.tokens = tokens
        self.num_read = self.num_steps = 0

    def make_cache(self) -> list[Any]:
        return []

    def trunk(self, ids: mx.array, cache: list[Any], **options: Any) -> mx.array:
        self.num_read += ids.shape[1]
        return mx.zeros((1, ids.shape[1], 1))

    def head(self, hidden: mx.array) -> mx.array:
        token = self.tokens[min(self.num_steps, len(self.tokens) - 1)]
        self.num_steps += 1
        return mx.where(mx.arange(self.config.vocab_size) == token, 9.0, 0.0)[None, None]


@pytest.fixture
def scripted() -> Callable[..., ScriptedModel]:
    return ScriptedModel


@pytest.fixture
def consoles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[io.StringIO, io.StringIO]]:
    """Replace both consoles by ones that write to memory."""
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    def replace(**options: Any) -> tuple[io.StringIO, io.StringIO]:
        files = io.StringIO(), io.StringIO()
        for name, file in zip(("out", "err"), files, strict=True):
            own: Console = getattr(terminal, name)
            console = Console(
                file=file, highlight=False, soft_wrap=True, emoji=own._emoji, **options
            )
            monkeypatch.setattr(terminal, name, console)
        return files

    return replace


@pytest.fixture
def run_cli(
    monkeypatch: pytest.MonkeyPatch, demo: tuple[Any, Any], converted_demo: Path
) -> Callable[..., Any]:
    """A command of the program in this process; the demo is loaded once for all tests."""
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    load = loading.load

    def load_once(name: str, kernels: str = "auto", **options: Any) -> Any:
        is_demo = name == str(converted_demo) and kernels == "auto" and not any(options.values())
        return demo if is_demo else load(name, kernels=kernels, **options)

    monkeypatch.setattr(loading, "load", load_once)

    def run(*arguments: object, stdin: str | bytes | None = None) -> Any:
        result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit), result
        return result

    return run


@pytest.fixture
def answer(demo: tuple[Any, Any]) -> Callable[..., str]:
    """What the demo says to messages, greedily; a thought ends in </think>."""
    return lambda *messages, **options: qwen35_mlx.generate(
        *demo, messages, temperature=0.0, **options
    )
