"""The pytest plugin of mutants.py: records the lines that tests run, and runs chosen tests."""

import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path.cwd()
# Folders that modules of the product are imported from; two of them are links.
FOLDERS = tuple(f"{ROOT}/{name}/" for name in ("qwen35_mlx", "convert", "quant"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options --record and --chosen."""
    parser.addoption("--record", help="write what each test runs and takes into this file")
    parser.addoption("--chosen", help="run the tests that this file names, and no others")


def pytest_configure(config: pytest.Config) -> None:
    """Start recording with --record."""
    if file := config.getoption("record"):
        config.pluginmanager.register(Recorder(Path(file)), "mutant recorder")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep only the tests of --chosen."""
    if file := config.getoption("chosen"):
        chosen = set(json.loads(Path(file).read_text("utf-8")))
        items[:] = [item for item in items if item.nodeid in chosen]


class Recorder:
    """Records the product lines that each test runs; a fixture's lines count for all its users."""

    def __init__(self, file: Path):
        self.file = file
        self.current: set[tuple[str, int]] = set()
        self.of_fixture: dict[Any, set[tuple[str, int]]] = defaultdict(set)
        self.tests: dict[str, dict[str, Any]] = {}
        self.paths: dict[str, str] = {}
        self.failed: set[str] = set()

    def pytest_collection_finish(self) -> None:
        threading.settrace(self.trace)

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        """The function for sys.settrace, called at each call of a function."""
        name = frame.f_code.co_filename
        if name not in self.paths:
            real = os.path.realpath(name) if name.startswith(FOLDERS) else ""
            self.paths[name] = os.path.relpath(real, ROOT) if real else ""
        return self.trace_line if self.paths[name] else None

    def trace_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.current.add((self.paths[frame.f_code.co_filename], frame.f_lineno))
        return self.trace_line

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        outside, self.current = self.current, set()
        try:
            return (yield)
        finally:
            self.of_fixture[fixturedef] |= self.current
            self.current |= outside

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.current, start = set(), time.monotonic()
        sys.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            fixtures = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
            sets = [self.of_fixture[d] for several in fixtures.values() for d in several]
            lines: dict[str, list[int]] = defaultdict(list)
            for path, line in self.current.union(*sets):
                lines[path].append(line)
            if item.nodeid not in self.failed:
                self.tests[item.nodeid] = {"seconds": time.monotonic() - start, "lines": lines}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(
            json.dumps({"tests": self.tests, "failed": sorted(self.failed)}), "utf-8"
        )
