"""Changes one line of the product at a time and reports which changes no test notices.

Each mutant is applied in a copy of the tree, and the tests that import its module run there; see
mutators.py for what is changed. The last line is JSON. Exit code 1: fewer than 90 % were noticed.
"""

import argparse
import ast
import contextlib
import functools
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from count_lines import ROOT, code_lines, product_files
from mutators import Mutant, changes_code, find_mutants

MIN_KILL_RATE = 0.9
EVERYDAY, ALL = "not slow and not live", "not live"
# Start of pytest, and a machine that does something else meanwhile.
EXTRA_SECONDS, SLOWDOWN = 30, 5
# A mutant may ask for any amount of disk and memory.
MAX_FILE_BYTES = 4 * 10**9
MAX_MEMORY_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
LIMITED = (
    f"ulimit -f {MAX_FILE_BYTES // 512}; ulimit -v {MAX_MEMORY_BYTES // 1024} 2>/dev/null; "
    'exec "$@"'
)
NO_TESTS_RAN = 5
FOLDERS = ("qwen35_mlx", "convert", "quant", "tests", "tools", ".ci")
NO_BYTECODE = shutil.ignore_patterns("__pycache__")
# Modules that too many tests import, or whose tests do not import them.
OVERRIDES: dict[str, tuple[str, ...]] = {
    "qwen35_mlx/errors.py": ("tests/test_cli.py", "tests/test_config.py"),
    "qwen35_mlx/model/feed_forward.py": (
        "tests/test_moe.py",
        "tests/test_golden.py",
        "tests/test_model.py",
    ),
}

# Tests that reach these modules through fixtures and the command line, without an import.
ALSO: dict[str, tuple[str, ...]] = {
    "qwen35_mlx/cli/": (
        "tests/test_cli.py",
        "tests/test_cli_plan.py",
        "tests/test_chat_view.py",
        "tests/test_convert_commands.py",
        "tests/test_generate_command.py",
    ),
    "qwen35_mlx/checkpoint/": (
        "tests/test_formats.py",
        "tests/test_names.py",
        "tests/test_quantization.py",
        "tests/test_weights.py",
    ),
    "qwen35_mlx/chat/": ("tests/test_chat.py", "tests/test_sessions.py", "tests/test_turns.py"),
    "qwen35_mlx/engine/": ("tests/test_cache_consistency.py", "tests/test_chat.py"),
    "qwen35_mlx/model/": ("tests/test_golden.py", "tests/test_weights.py"),
    "qwen35_mlx/text/": ("tests/test_chat.py", "tests/test_control_tokens.py"),
    "convert/": ("tests/test_convert.py", "tests/test_job.py", "tests/test_formats.py"),
    "quant/": ("tests/test_quant_affine.py", "tests/test_statistics.py"),
}

Durations = dict[str, float]


@dataclass(frozen=True)
class Site:
    """A mutant and the file it belongs to, relative to the root; the line before and after."""

    file: str
    mutant: Mutant
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}:{self.mutant.line}"

    def describe(self) -> str:
        lines = f"    - {self.old.strip()}\n    + {self.new.strip()}"
        return f"{self} ({self.mutant.kind})\n{lines}"


@dataclass(frozen=True)
class Result:
    """`outcome` is killed, timeout, survived or not run."""

    site: Site
    outcome: str
    seconds: float
    reason: str = ""


# Choice of mutants


def choose(files: Sequence[Path], count: int, seed: int) -> list[Site]:
    """Random mutants; every line of code that can be changed is as likely as any other."""
    rng = random.Random(seed)
    sources = {file: file.read_text("utf-8") for file in files}
    by_line: dict[tuple[Path, int], list[Mutant]] = defaultdict(list)
    for file, source in sources.items():
        code = code_lines(source)
        for mutant in find_mutants(source):
            if mutant.line in code:
                by_line[file, mutant.line].append(mutant)
    lines = list(by_line)
    rng.shuffle(lines)
    sites = []
    for file, line in lines:
        if len(sites) == count:
            break
        source = sources[file]
        mutant = rng.choice(by_line[file, line])
        if changes_code(source, mutant.apply(source)):
            path = file.relative_to(ROOT).as_posix()
            sites.append(Site(path, mutant, *mutant.lines(source)))
    return sites


# Choice of tests


def module_name(file: str) -> str:
    """The name that a product file is imported under."""
    name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.startswith("qwen35_mlx") else f"qwen35_mlx.{name}"


@functools.cache
def imports(source: str, package: str = "") -> set[tuple[str, str]]:
    """Each `(module, name)` of a source's imports; relative ones start from the package."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            parts = [*parents, node.module or ""] if node.level else [node.module or ""]
            module = ".".join(filter(None, parts))
            found |= {(module, alias.name) for alias in node.names}
    return found


def tests_of_modules(root: Path) -> dict[str, set[str]]:
    """The test files that import each product file, by path; names that `__init__` passes on count
    for the module they come from."""
    files = {module_name(f.relative_to(root).as_posix()): f for f in product_files(root, ".py")}
    passed_on = {
        (package, name): module
        for package, file in files.items()
        if file.name == "__init__.py"
        for module, name in imports(file.read_text("utf-8"), package)
    }
    tests: dict[str, set[str]] = {f.relative_to(root).as_posix(): set() for f in files.values()}
    for test in sorted((root / "tests").rglob("test_*.py")):
        path = test.relative_to(root).as_posix()
        if path.startswith("tests/live/"):
            continue
        for module, name in imports(test.read_text("utf-8")):
            candidates = (f"{module}.{name}", passed_on.get((module, name), ""), module)
            found = next((c for c in candidates if c in files), None)
            if found:
                tests[files[found].relative_to(root).as_posix()].add(path)
    for file in [file for file, found in tests.items() if not found]:
        tests[file] = _tests_of_importers(file, tests, root)
    for file, found in tests.items():
        found.update(*(others for folder, others in ALSO.items() if file.startswith(folder)))
    tests.update({file: set(others) for file, others in OVERRIDES.items()})
    return tests


def _tests_of_importers(file: str, tests: dict[str, set[str]], root: Path) -> set[str]:
    """The tests of the modules that import one which no test imports itself."""
    parent, _, name = module_name(file).rpartition(".")
    wanted = {(module_name(file), ""), (parent, name)}
    found: set[str] = set()
    for importer, others in tests.items():
        text = (root / importer).read_text("utf-8")
        package = module_name(importer)
        if not importer.endswith("/__init__.py"):
            package = package.rpartition(".")[0]
        seen = imports(text, package)
        if wanted & seen or any(module == module_name(file) for module, _ in seen):
            found |= others
    return found


# Copies of the tree


class Workplace:
    """A copy of the tree, with a home folder of its own for what tests and mutants write."""

    def __init__(self, folder: Path, marker: str):
        self.root, self.home, self.marker = folder / "tree", folder / "home", marker
        self.root.mkdir(parents=True)
        for source in [ROOT / name for name in FOLDERS] + [
            f for f in ROOT.iterdir() if f.is_file()
        ]:
            target = self.root / source.name
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True, ignore=NO_BYTECODE)
            else:
                shutil.copy2(source, target)
        self.home.mkdir()
        self.environment = dict(os.environ) | {
            # The copy goes before the installed package.
            "PYTHONPATH": str(self.root),
            "HOME": str(self.home),
            "TMPDIR": str(self.home),
            "EMULATOR_CACHE": str(folder.parent / "emulator"),
            "PYTHONHASHSEED": "0",
            "OPENBLAS_NUM_THREADS": "1",
        }
        # Set-up of the compiler, which takes it 16 s.
        self.environment.setdefault("ZIG_GLOBAL_CACHE_DIR", str(Path.home() / ".cache" / "zig"))
        for name in (
            *("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "HF_HOME"),
            "PYTHONDONTWRITEBYTECODE",
        ):
            self.environment.pop(name, None)

    def check(self) -> None:
        """Fails if Python does not take both folders of the product from the copy."""
        code = "import qwen35_mlx.convert as c, qwen35_mlx as q; print(q.__file__, c.__file__)"
        process = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        for file in process.stdout.split():
            if not Path(file).is_relative_to(self.root):
                raise RuntimeError(f"the copy is not what runs: {file}")

    def pytest(self, arguments: Sequence[str], timeout: float | None = None) -> int | None:
        """The exit code of pytest, or None past the time limit."""
        scratch = self.home / "pytest"
        command = ["sh", "-c", LIMITED, "sh", sys.executable, "-m", "pytest"]
        command += ["-q", "-p", "no:cacheprovider"]
        command += [f"--basetemp={scratch}", "-m", self.marker, *arguments]
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Also what the tests have started and a mutant has left behind.
            _kill_group(process)
            shutil.rmtree(scratch, ignore_errors=True)

    def run(self, site: Site, tests: Sequence[str], timeout: float) -> int | None:
        file = self.root / site.file
        source = file.read_text("utf-8")
        try:
            self._write(file, site.mutant.apply(source))
            return self.pytest(["-x", *tests], timeout)
        finally:
            self._write(file, source)

    @staticmethod
    def _write(file: Path, source: str) -> None:
        file.write_text(source, "utf-8")
        # Python compares times in whole seconds, so old bytecode could be taken for the new.
        for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
            compiled.unlink()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# Runs


def measure(place: Workplace, tests: Sequence[str]) -> tuple[Durations, list[str], set[str]]:
    """Seconds of each test file without a mutant, the tests that fail even so, and the files that
    cannot be imported."""
    report = place.home / "report.xml"
    code = place.pytest(["--continue-on-collection-errors", f"--junitxml={report}", *tests])
    if code not in (0, 1) or not report.exists():
        raise RuntimeError(f"pytest ends with {code} where there is no mutant")
    return read_report(report.read_text("utf-8"), tests)


def read_report(xml: str, tests: Sequence[str]) -> tuple[Durations, list[str], set[str]]:
    """What `measure` returns, from pytest's report."""
    seconds: Durations = dict.fromkeys(tests, 0.0)
    failed, broken = set(), set()
    for case in ElementTree.fromstring(xml).iter("testcase"):
        module, name = case.get("classname", ""), case.get("name", "")
        file = (module or name).replace(".", "/") + ".py"
        if not module:
            broken.add(file)
            continue
        seconds[file] = seconds.get(file, 0.0) + float(case.get("time", "0"))
        if case.find("failure") is not None or case.find("error") is not None:
            # All parameters of it: the report may spell them in another way.
            failed.add(f"{file}::{name.partition('[')[0]}")
    return seconds, sorted(failed), broken


def run_all(
    sites: Sequence[Site],
    tests: dict[str, set[str]],
    seconds: Durations,
    failed: Sequence[str],
    places: Sequence[Workplace],
) -> list[Result]:
    """Run every mutant, one at a time in each copy."""
    waiting: queue.SimpleQueue[Site] = queue.SimpleQueue()
    for site in sites:
        waiting.put(site)
    results: list[Result] = []
    deselect = [f"--deselect={name}" for name in failed]

    def work(place: Workplace) -> None:
        while True:
            try:
                site = waiting.get_nowait()
            except queue.Empty:
                return
            chosen = sorted(tests[site.file], key=lambda f: (seconds.get(f, 0.0), f))
            limit = EXTRA_SECONDS + SLOWDOWN * sum(seconds.get(f, 0.0) for f in chosen)
            start = time.monotonic()
            if chosen:
                code = place.run(site, [*deselect, *chosen], limit)
                outcome = {None: "timeout", 0: "survived", NO_TESTS_RAN: "not run"}.get(
                    code, "killed"
                )
                reason = "no test ran" if code == NO_TESTS_RAN else ""
            else:
                outcome, reason = "not run", "no test of the module can be run"
            result = Result(site, outcome, time.monotonic() - start, reason)
            results.append(result)
            print(f"{len(results):4} {outcome:<9}{result.seconds:6.1f} s  {site}", flush=True)

    threads = [threading.Thread(target=work, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def report(results: Sequence[Result], seed: int, seconds: float) -> float:
    """Print what survived and the rate of mutants noticed, which is returned."""
    number = {
        outcome: sum(r.outcome == outcome for r in results)
        for outcome in ("killed", "timeout", "survived", "not run")
    }
    for result in results:
        if result.outcome in ("survived", "not run"):
            print(f"\n{result.outcome}: {result.site.describe()}")
            if result.reason:
                print(f"    {result.reason}")
    noticed = number["killed"] + number["timeout"]
    rate = noticed / max(noticed + number["survived"], 1)
    print(f"\n{noticed} of {noticed + number['survived']} noticed ({rate:.0%}),", end=" ")
    print(f"{number['not run']} could not be run")
    line = {
        "seed": seed,
        "count": len(results),
        "killed": number["killed"],
        "timeout": number["timeout"],
        "survived": number["survived"],
        "not_run": number["not run"],
        "kill_rate": round(rate, 4),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(line))
    return rate


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="number of mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="copies that run side by side")
    parser.add_argument("--only", nargs="+", default=[], help="files or folders of the product")
    parser.add_argument("--all", action="store_true", help="run the slow tests too")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    arguments = parser.parse_args()

    start = time.monotonic()
    files = product_files(ROOT, ".py")
    if arguments.only:
        wanted = [(ROOT / path).absolute() for path in arguments.only]
        files = [f for f in files if any(f.is_relative_to(path) for path in wanted)]
    sites = choose(files, arguments.count, arguments.seed)
    if not sites:
        parser.error("there is nothing to change")
    tests = tests_of_modules(ROOT)
    if arguments.list:
        for site in sites:
            print(site.describe())
        return
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        jobs = range(min(arguments.jobs, len(sites)))
        marker = ALL if arguments.all else EVERYDAY
        places = [Workplace(Path(scratch, str(job)), marker) for job in jobs]
        places[0].check()
        used = sorted(set().union(*(tests[site.file] for site in sites)))
        print(f"{len(used)} test files without a mutant first", flush=True)
        seconds, failed, broken = measure(places[0], used)
        for name in [*failed, *sorted(broken)]:
            print(f"left out, fails without a mutant: {name}")
        tests = {file: found - broken for file, found in tests.items()}
        results = run_all(sites, tests, seconds, failed, places)
    sys.exit(report(results, arguments.seed, time.monotonic() - start) < MIN_KILL_RATE)


if __name__ == "__main__":
    main()
