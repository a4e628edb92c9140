"""Changes one line of the product at a time and reports the changes that no test notices.

First all tests run once and the lines that each runs are recorded. Each mutant is then applied in a
copy of the tree, and tests run on it in this order: those that run its statement, the others that
run or import its module, the slow tests of its module. mutators.py says what is changed. The last
line is JSON. Exit code 1: fewer than 90 % were noticed.
"""

import argparse
import ast
import contextlib
import functools
import hashlib
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
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from count_lines import ROOT, code_lines, product_files
from mutators import Mutant, changes_code, find_mutants

MIN_KILL_RATE = 0.9
EVERYDAY, SLOW, ALL = "not slow and not live", "slow and not live", "not live"
# Limits of time: the start of pytest, and a factor for a busy machine.
EXTRA_SECONDS, SLOWDOWN = 30, 5
# For the slow tests of a module, which are not recorded; a longer run counts as not noticed.
SLOW_SECONDS = 900
# These tests check every module without importing it by name.
TESTS_OF_ALL = "tests/test_numbers.py"
# Limits, because a mutant may ask for any amount of disk and memory.
MAX_FILE_BYTES = 4 * 10**9
MAX_MEMORY_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
LIMITED = (
    f"ulimit -f {MAX_FILE_BYTES // 512}; ulimit -v {MAX_MEMORY_BYTES // 1024} 2>/dev/null; "
    'exec "$@"'
)
NO_TESTS_RAN = 5
FOLDERS = ("qwen35_mlx", "convert", "quant", "tests", "tools", ".ci")
NO_BYTECODE = shutil.ignore_patterns("__pycache__")


@dataclass(frozen=True)
class Site:
    """A mutant, its file relative to the root, and the line before and after."""

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
    """`outcome` is killed, slow (killed by a slow test), timeout, survived or not run."""

    site: Site
    outcome: str
    seconds: float


# Choice of mutants


def choose(files: Sequence[Path], count: int, seed: int) -> list[Site]:
    """Random mutants; all lines of code that can be changed are equally likely."""
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


def test_files_of_modules(root: Path) -> dict[str, set[str]]:
    """The test files that import each product file, by path.

    A name that `__init__` exports counts for the module that defines it.
    """
    files = {module_name(f.relative_to(root).as_posix()): f for f in product_files(root, ".py")}
    passed_on = {
        (package, name): module
        for package, file in files.items()
        if file.name == "__init__.py"
        for module, name in imports(file.read_text("utf-8"), package)
    }
    tests: dict[str, set[str]] = {f.relative_to(root).as_posix(): set() for f in files.values()}
    for test in sorted((root / "tests").rglob("test_*.py")):
        for module, name in imports(test.read_text("utf-8")):
            candidates = (f"{module}.{name}", passed_on.get((module, name), ""), module)
            found = next((c for c in candidates if c in files), None)
            if found:
                path = files[found].relative_to(root).as_posix()
                tests[path].add(test.relative_to(root).as_posix())
    return tests


def lines_in_function(source: str, line: int) -> range | None:
    """The lines of the statement at `line`, or of the function whose default value it is.

    None for statements that run at an import.
    """
    found, in_function = None, False
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.stmt) or not node.lineno <= line <= (node.end_lineno or 0):
            continue
        body = getattr(node, "body", None)
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if body and line >= body[0].lineno:
            in_function = in_function or is_function
        elif is_function:
            in_function, found = True, range(body[0].lineno, (node.end_lineno or 0) + 1)
        else:
            found = range(node.lineno, body[0].lineno if body else (node.end_lineno or 0) + 1)
    return found if in_function else None


class Reach:
    """The tests that run each line, from the record of mutant_tests.py."""

    def __init__(self, record: dict[str, Any], root: Path = ROOT):
        self.root = root
        self.seconds = {name: test["seconds"] for name, test in record["tests"].items()}
        self.imported_by = test_files_of_modules(root)
        self.by_line: dict[tuple[str, int], set[str]] = defaultdict(set)
        self.by_file: dict[str, set[str]] = defaultdict(set)
        for name, test in record["tests"].items():
            for file, lines in test["lines"].items():
                self.by_file[file].add(name)
                for line in lines:
                    self.by_line[file, line].add(name)
        # These tests start the program as a process, whose lines are not recorded.
        starters = {
            file.relative_to(root).as_posix()
            for file in (root / "tests").rglob("test_*.py")
            if "sys.executable" in file.read_text("utf-8")
        }
        self.starting = {name for name in self.seconds if _file_of(name) in starters}

    def tests_of(self, site: Site) -> list[set[str]]:
        """The tests that run the statement, and then the others of its module.

        For statements that run at an import, mostly constants, and for default values, the tests
        that check all modules come first.
        """
        source = (self.root / site.file).read_text("utf-8")
        lines = lines_in_function(source, site.mutant.line)
        first = set().union(*(self.by_line[site.file, line] for line in lines or ()))
        if lines is None or site.mutant.kind == "default value":
            first |= {name for name in self.seconds if _file_of(name) == TESTS_OF_ALL}
        importers = self.imported_by[site.file]
        others = {name for name in self.seconds if _file_of(name) in importers}
        return [first, (self.by_file[site.file] | others | self.starting) - first]


def _file_of(test: str) -> str:
    return test.partition("::")[0]


# Copies of the tree


class Workplace:
    """A copy of the tree, with its own home folder for files of tests and mutants."""

    def __init__(self, folder: Path, marker: str):
        self.root, self.home, self.marker = folder / "tree", folder / "home", marker
        # Exit codes of slow tests without a mutant, by their files.
        self.slow_codes: dict[tuple[str, ...], int | None] = {}
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
            "PYTHONPATH": f"{self.root}{os.pathsep}{self.root / 'tools'}",
            "HOME": str(self.home),
            "TMPDIR": str(self.home),
            "EMULATOR_CACHE": str(folder.parent / "emulator"),
            "PYTHONHASHSEED": "0",
            "OPENBLAS_NUM_THREADS": "1",
            # Else a compiler would run for each fused operation, and again for a mutant of it.
            "MLX_DISABLE_COMPILE": "1",
        }
        # Keep the compiler's own cache, which takes 16 s to build.
        self.environment.setdefault("ZIG_GLOBAL_CACHE_DIR", str(Path.home() / ".cache" / "zig"))
        for name in (
            *("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "HF_HOME"),
            "PYTHONDONTWRITEBYTECODE",
        ):
            self.environment.pop(name, None)

    def check(self) -> None:
        """Raise if Python does not import both folders of the product from the copy."""
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

    def pytest(
        self, arguments: Sequence[str], timeout: float | None = None, marker: str = ""
    ) -> int | None:
        """Run pytest; returns its exit code, or None after the time limit."""
        scratch = self.home / "pytest"
        command = ["sh", "-c", LIMITED, "sh", sys.executable, "-m", "pytest"]
        command += ["-q", "-p", "no:cacheprovider", "-p", "mutant_tests"]
        command += [f"--basetemp={scratch}", "-m", marker or self.marker, *arguments]
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
            # Also ends processes that tests started and a mutant left behind.
            _kill_group(process)
            shutil.rmtree(scratch, ignore_errors=True)

    def record(self, files: Sequence[str]) -> dict[str, Any]:
        """The lines and seconds of each test in the files, and the names of those that fail."""
        file = self.home / "record.json"
        code = self.pytest(["--continue-on-collection-errors", f"--record={file}", *files])
        if code not in (0, 1, NO_TESTS_RAN):
            raise RuntimeError(f"pytest ends with {code} where there is no mutant")
        return json.loads(file.read_text("utf-8"))  # type: ignore[no-any-return]

    def run(self, site: Site, tests: Sequence[set[str]], seconds: dict[str, float]) -> int | None:
        """The exit code of the first set of tests that notices the mutant."""
        chosen = self.home / "chosen.json"
        code: int | None = NO_TESTS_RAN
        with self._changed(site):
            for names in filter(None, tests):
                chosen.write_text(json.dumps(sorted(names)), "utf-8")
                of_file: dict[str, float] = defaultdict(float)
                for name in names:
                    of_file[_file_of(name)] += seconds[name]
                limit = EXTRA_SECONDS + SLOWDOWN * sum(of_file.values())
                quick_first = sorted(of_file, key=lambda f: (of_file[f], f))
                code = self.pytest(["-x", f"--chosen={chosen}", *quick_first], limit)
                if code != 0:
                    break
        return code

    def slow_tests_notice(self, site: Site, files: Iterable[str]) -> bool:
        """Whether the slow tests in these files fail with the mutant and pass without it."""
        chosen = tuple(sorted(files))
        arguments = ("-x", *chosen)
        if not chosen:
            return False
        with self._changed(site):
            code = self.pytest(arguments, SLOW_SECONDS, SLOW)
        if code in (None, 0, NO_TESTS_RAN):
            return False
        if chosen not in self.slow_codes:
            self.slow_codes[chosen] = self.pytest(arguments, SLOW_SECONDS, SLOW)
        return self.slow_codes[chosen] == 0

    @contextlib.contextmanager
    def _changed(self, site: Site) -> Iterator[None]:
        """Apply the mutant to the copy inside the `with` block."""
        file = self.root / site.file
        source = file.read_text("utf-8")
        try:
            self._write(file, site.mutant.apply(source))
            yield
        finally:
            self._write(file, source)

    @staticmethod
    def _write(file: Path, source: str) -> None:
        file.write_text(source, "utf-8")
        # Python compares times in whole seconds, so it could use old bytecode for the new source.
        for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
            compiled.unlink()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# Runs


def record(places: Sequence[Workplace]) -> dict[str, Any]:
    """Record the tests without a mutant; every copy runs its share of the files."""
    paths = (f.relative_to(ROOT).as_posix() for f in (ROOT / "tests").rglob("test_*.py"))
    files = sorted(path for path in paths if not path.startswith("tests/live/"))
    shares = [files[i :: len(places)] for i in range(len(places))]
    with ThreadPoolExecutor(len(places)) as pool:
        parts = list(pool.map(Workplace.record, places, shares))
    tests = {name: test for part in parts for name, test in part["tests"].items()}
    failed = sorted(name for part in parts for name in part["failed"])
    return {"tree": tree_digest(), "tests": tests, "failed": failed}


def known_record(file: Path | None) -> dict[str, Any] | None:
    """The record in the file, if it was made with these sources."""
    if file is None or not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found if found["tree"] == tree_digest() else None


def tree_digest() -> str:
    """Digest of the product and the tests."""
    digest = hashlib.sha256()
    for file in [*product_files(ROOT, ""), *sorted((ROOT / "tests").rglob("*.*"))]:
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def run_all(sites: Sequence[Site], reach: Reach, places: Sequence[Workplace]) -> list[Result]:
    """Run every mutant, one at a time in each copy."""
    waiting: queue.SimpleQueue[Site] = queue.SimpleQueue()
    for site in sites:
        waiting.put(site)
    results: list[Result] = []

    def work(place: Workplace) -> None:
        while True:
            try:
                site = waiting.get_nowait()
            except queue.Empty:
                return
            start = time.monotonic()
            code = place.run(site, reach.tests_of(site), reach.seconds)
            outcomes = {None: "timeout", 0: "survived", NO_TESTS_RAN: "not run"}
            outcome = outcomes.get(code, "killed")
            if outcome == "survived" and place.marker == EVERYDAY:
                noticed = place.slow_tests_notice(site, reach.imported_by[site.file])
                outcome = "slow" if noticed else outcome
            result = Result(site, outcome, time.monotonic() - start)
            results.append(result)
            print(
                f"{len(results):4} {result.outcome:<9}{result.seconds:6.1f} s  {site}", flush=True
            )

    threads = [threading.Thread(target=work, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def report(results: Sequence[Result], seed: int, seconds: float) -> float:
    """Print the mutants that survived and the share noticed, which is returned."""
    number = {
        outcome: sum(r.outcome == outcome for r in results)
        for outcome in ("killed", "slow", "timeout", "survived", "not run")
    }
    for result in results:
        if result.outcome in ("survived", "not run"):
            print(f"\n{result.outcome}: {result.site.describe()}")
    noticed = number["killed"] + number["slow"] + number["timeout"]
    rate = noticed / max(noticed + number["survived"], 1)
    print(f"\n{noticed} of {noticed + number['survived']} noticed ({rate:.0%}),", end=" ")
    print(f"{number['not run']} could not be run")
    line = {
        "seed": seed,
        "count": len(results),
        "killed": number["killed"],
        "killed_by_slow_tests": number["slow"],
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
    parser.add_argument("--all", action="store_true", help="record the slow tests too: takes long")
    parser.add_argument("--record", type=Path, help="keep what the tests run in a file")
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
    if arguments.list:
        for site in sites:
            print(site.describe())
        return
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        jobs = range(min(arguments.jobs, len(sites)))
        marker = ALL if arguments.all else EVERYDAY
        places = [Workplace(Path(scratch, str(job)), marker) for job in jobs]
        places[0].check()
        recorded = known_record(arguments.record)
        if recorded is None:
            print("the tests without a mutant first", flush=True)
            recorded = record(places)
            if arguments.record:
                arguments.record.write_text(json.dumps(recorded), "utf-8")
        for name in recorded["failed"]:
            print(f"left out, fails without a mutant: {name}")
        results = run_all(sites, Reach(recorded), places)
    sys.exit(report(results, arguments.seed, time.monotonic() - start) < MIN_KILL_RATE)


if __name__ == "__main__":
    main()
