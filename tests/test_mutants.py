"""Which lines mutants.py changes and how, and which it leaves alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mutants
import pytest
from count_lines import code_lines, count, metal_lines
from mutants import Result, Site
from mutators import Mutant, changes_code, find_mutants


def changed(source: str) -> dict[str, list[str]]:
    """The changed lines by kind of change."""
    found: dict[str, list[str]] = {}
    for mutant in find_mutants(source):
        found.setdefault(mutant.kind, []).append(mutant.lines(source)[1].strip())
    return found


@pytest.mark.parametrize(
    ("line", "kind", "expected"),
    [
        ("y = a < b", "comparison", ["y = a <= b", "y = a >= b"]),
        ("y = a == b", "comparison", ["y = a != b"]),
        ("y = a not  in b", "comparison", ["y = a in b"]),
        ("y = a is not b", "comparison", ["y = a is b"]),
        ("y = (a) < (b) <= c", "comparison", [
            "y = (a) <= (b) <= c", "y = (a) >= (b) <= c", "y = (a) < (b) < c", "y = (a) < (b) > c",
        ]),
        ("y = a - b // c", "operator", ["y = a + b // c", "y = a - b * c"]),
        ("y = android and b or c", "operator", [
            "y = android or b or c", "y = android and b and c",
        ]),
        ("y += a", "operator", ["y -= a"]),
        ("y = 3", "constant", ["y = 2", "y = 4"]),
        ("y = 0", "constant", ["y = 1"]),
        ("y = 0.5", "constant", ["y = 1.0"]),
        ("y = True", "constant", ["y = False"]),
        ('y = "bits"', "constant", ['y = "bitsx"']),
        ("f(a, b + 1, *c)", "arguments swapped", ["f(b + 1, a, *c)"]),
        ("y = x[a:b + 1]", "slice bound", ["y = x[a + 1:b + 1]", "y = x[a:(b + 1) - 1]"]),
        ("y = x[:, 2]", "slice bound", ["y = x[1:, 2]", "y = x[:-1, 2]"]),
        ("y = not a", "not removed", ["y = (a)"]),
        ("y = a if b else c", "not added", ["y = a if not (b) else c"]),
        ("y = [a for a in b if a.c]", "not added", ["y = [a for a in b if not (a.c)]"]),
        ('é("ü", a < b)', "comparison", ['é("ü", a <= b)', 'é("ü", a >= b)']),
    ],
)  # fmt: skip
def test_one_line_is_changed(line: str, kind: str, expected: list[str]) -> None:
    assert changed(line)[kind] == expected
    for mutant in find_mutants(line):
        assert changes_code(line, mutant.apply(line))


def test_whole_statements_conditions_and_defaults_of_a_function() -> None:
    source = "def f(a, b=1, *, c=True):\n    if a:\n        g()\n    for i in a:\n        break\n"
    assert changed(source) == {
        "default value": ["def f(a, b=2, *, c=True):", "def f(a, b=1, *, c=False):"],
        "not added": ["if not (a):"],
        "statement removed": ["pass"],
        "break or continue": ["continue"],
    }


def test_an_operator_on_the_next_line_is_changed_there() -> None:
    source = "y = (\n    a  # or b\n    or c\n)\n"
    assert [(m.line, m.lines(source)[1]) for m in find_mutants(source) if m.kind == "operator"] == [
        (3, "    and c")
    ]


def test_the_other_lines_and_their_ends_stay() -> None:
    source = "a = 1\r\nb = 2\r\nc = 3"
    (mutant,) = [m for m in find_mutants(source) if m.replacement == "4"]
    assert mutant.apply(source) == "a = 1\r\nb = 2\r\nc = 4"


@pytest.mark.parametrize(
    "source",
    [
        '"""Text."""',
        'def f(a: "int") -> Literal[3]:\n    """Text."""',
        "x: dict[str, 3]",
        "if TYPE_CHECKING:\n    y = 3",
        'if __name__ == "__main__":\n    main()',
        '__all__ = ["f"]',
        "Pair = tuple[3, 4]",
        "Number = int | float",
        "import a",
        "assert a == 3",
        "@cache(maxsize=3)\ndef f(): ...",
        "class A:\n    a = b",
        "def f():\n    return None",
        'y = f"{3}"',
    ],
)
def test_what_no_test_has_to_notice_is_left_alone(source: str) -> None:
    kinds = changed(source)
    kinds.pop("statement removed", None)
    assert kinds == {}


def test_texts_for_people_are_left_alone() -> None:
    assert changed('raise Error("a is 3", got=4)') == {"statement removed": ["pass"]}
    assert "constant" not in changed('f("some words", help="word", strict=True)')


def test_swaps_that_cannot_matter_are_left_alone() -> None:
    assert "arguments swapped" not in changed("y = max(a, b) + f(a, a) + mx.maximum(a, b)")
    assert changed("y = cast(a, b, c)")["arguments swapped"] == ["y = cast(a, c, b)"]


def test_a_change_without_effect_is_no_mutant() -> None:
    assert not changes_code("y = 1\n", "y = (1)  # one\n")
    assert not changes_code("y = 1\n", "y = = 1\n")
    assert changes_code("y = 1\n", "y = True\n")
    assert changes_code("def f():\n    return 1\n", "def f():\n    return 2\n")


@pytest.mark.slow
def test_a_seed_repeats_the_choice_and_no_line_comes_twice() -> None:
    files = [mutants.ROOT / "qwen35_mlx" / name for name in ("config.py", "checkpoint/headers.py")]
    first, again, other = (mutants.choose(files, 40, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len({(s.file, s.mutant.line) for s in first}) == 40
    assert {s.file for s in first} == {"qwen35_mlx/config.py", "qwen35_mlx/checkpoint/headers.py"}


FUNCTION = (
    "Y = 1\n\n\ndef f(a=2):\n    if a:\n        return (\n            3\n        )\n    g()\n"
)


@pytest.mark.parametrize(
    ("line", "expected"),
    [(1, None), (4, range(5, 10)), (5, range(5, 6)), (7, range(6, 9)), (9, range(9, 10))],
)
def test_the_lines_of_a_statement_in_a_function(line: int, expected: range | None) -> None:
    assert mutants.lines_in_function(FUNCTION, line) == expected


def test_tests_that_run_a_statement_come_before_those_of_its_module(tmp_path: Path) -> None:
    (tmp_path / "qwen35_mlx").mkdir()
    (tmp_path / "qwen35_mlx" / "a.py").write_text(FUNCTION)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("from qwen35_mlx import a\n")
    (tmp_path / "tests" / "test_b.py").write_text("import sys; print(sys.executable)\n")
    (tmp_path / "tests" / "test_c.py").write_text("")
    lines = {"runs": [5, 6], "other": [9], "none": []}
    tests = {
        f"tests/test_{file}.py::{name}": {
            "seconds": 1.0, "lines": {"qwen35_mlx/a.py": lines[name]} if lines[name] else {}
        }
        for file in "abc"
        for name in lines
    }  # fmt: skip
    reach = mutants.Reach({"tests": tests, "failed": []}, tmp_path)
    names = [
        ["".join(sorted(t[len("tests/test_") :].replace(".py::", " ") + "; " for t in found))]
        for found in reach.tests_of(
            Site("qwen35_mlx/a.py", Mutant("constant", 7, 0, 1, "x"), "", "")
        )
    ]
    assert names == [
        ["a runs; b runs; c runs; "],
        ["a none; a other; b none; b other; c other; "],
    ]
    first, others = reach.tests_of(
        Site("qwen35_mlx/a.py", Mutant("constant", 1, 0, 1, "x"), "", "")
    )
    assert first == set() and len(others) == 8
    whole = {"seconds": 1.0, "lines": {}}
    reach = mutants.Reach({"tests": tests | {f"{mutants.TESTS_OF_ALL}::x": whole}}, tmp_path)
    constant = Site("qwen35_mlx/a.py", Mutant("constant", 1, 0, 1, "x"), "", "")
    assert reach.tests_of(constant)[0] == {f"{mutants.TESTS_OF_ALL}::x"}
    default = Site("qwen35_mlx/a.py", Mutant("default value", 4, 0, 1, "x"), "", "")
    assert reach.tests_of(default)[0] > {f"{mutants.TESTS_OF_ALL}::x"}
    assert (mutants.ROOT / mutants.TESTS_OF_ALL).exists()


@pytest.mark.slow
def test_a_test_that_starts_with_an_import_is_found_by_it() -> None:
    tests = mutants.test_files_of_modules(mutants.ROOT)
    assert "tests/test_journal.py" in tests["convert/journal.py"]
    assert "tests/test_gated_delta_rule.py" in tests["qwen35_mlx/kernels/gated_delta_rule.py"]
    # Through the names that `qwen35_mlx.convert` passes on.
    assert "tests/test_cache.py" in tests["convert/job.py"]


RECORDED = """
import threading
import pytest
from product import f, g

@pytest.fixture(scope="module")
def made():
    return f()

def test_first(made): pass
def test_second(made): pass
def test_thread():
    thread = threading.Thread(target=g)
    thread.start()
    thread.join()
def test_wrong(): assert not g
"""


@pytest.mark.slow
def test_lines_are_recorded_of_fixtures_and_threads_and_chosen_tests_run_alone(
    tmp_path: Path,
) -> None:
    (tmp_path / "quant").mkdir()
    product = "def f():\n    return 1\n\n\ndef g():\n    return 2\n"
    (tmp_path / "quant" / "product.py").write_text(product)
    (tmp_path / "test_it.py").write_text(RECORDED)
    environment = dict(os.environ, PYTHONPATH=f"{mutants.ROOT / 'tools'}:{tmp_path / 'quant'}")

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "mutant_tests", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        ).stdout

    run("--record=record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    lines = {name.partition("::")[2]: test["lines"] for name, test in record["tests"].items()}
    of_f, of_g = ({"quant/product.py": [line]} for line in (2, 6))
    assert lines == {"test_first": of_f, "test_second": of_f, "test_thread": of_g}
    assert record["failed"] == ["test_it.py::test_wrong"]
    (tmp_path / "chosen.json").write_text('["test_it.py::test_second"]')
    assert run("--chosen=chosen.json").splitlines()[-1].startswith("1 passed")


def test_a_record_of_other_sources_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "quant").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("")
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    file = tmp_path / "record.json"
    assert mutants.known_record(None) is None and mutants.known_record(file) is None
    file.write_text(json.dumps({"tree": mutants.tree_digest(), "tests": {}}))
    assert mutants.known_record(file) is not None
    (tmp_path / "quant" / "a.py").write_text("x = 1\n")
    assert mutants.known_record(file) is None


@pytest.mark.parametrize(
    ("code", "outcome"),
    [(1, "killed"), (2, "killed"), (None, "timeout"), (0, "survived"), (5, "not run")],
)
def test_a_mutant_is_killed_survives_or_cannot_be_run(
    tmp_path: Path, code: int | None, outcome: str
) -> None:
    """Without a copy of the tree: what pytest would return is given."""
    site = Site("qwen35_mlx/config.py", Mutant("constant", 1, 0, 1, "x"), "a", "b")
    place: Any = SimpleNamespace(run=lambda *_: code, marker=mutants.ALL)
    reach: Any = SimpleNamespace(tests_of=lambda site: [], seconds={})
    (result,) = mutants.run_all([site], reach, [place])
    assert result.outcome == outcome


@pytest.mark.parametrize(
    ("with_mutant", "without", "outcome"),
    [(1, 0, "slow"), (1, 1, "survived"), (None, 0, "survived"), (0, 0, "survived")],
)
def test_a_slow_test_has_to_pass_without_the_mutant_it_notices(
    tmp_path: Path, with_mutant: int | None, without: int, outcome: str
) -> None:
    place = mutants.Workplace.__new__(mutants.Workplace)
    place.root, place.marker, place.slow_codes = tmp_path, mutants.EVERYDAY, {}
    file = tmp_path / "a.py"
    file.write_text("x = 1\n")
    place.run = lambda *_: 0  # type: ignore[method-assign]

    def pytest_ends_with(arguments: tuple[str, ...], limit: float, marker: str) -> int | None:
        assert arguments == ("-x", "tests/test_a.py") and marker == mutants.SLOW
        return without if file.read_text() == "x = 1\n" else with_mutant

    place.pytest = pytest_ends_with  # type: ignore[method-assign, assignment]
    reach: Any = SimpleNamespace(
        tests_of=lambda site: [], seconds={}, imported_by={"a.py": {"tests/test_a.py"}}
    )
    (mutant, *_) = mutants.find_mutants("x = 1\n")
    (result,) = mutants.run_all([Site("a.py", mutant, "", "")], reach, [place])
    assert result.outcome == outcome and file.read_text() == "x = 1\n"


def test_the_rate_leaves_out_what_could_not_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    site = Site("qwen35_mlx/config.py", Mutant("constant", 1, 0, 1, "x"), "a", "b")
    outcomes = ["killed"] * 2 + ["slow", "timeout", "survived", "not run"]
    rate = mutants.report([Result(site, o, 1.0) for o in outcomes], seed=3, seconds=5.0)
    assert rate == 4 / 5
    out = capsys.readouterr().out
    assert "survived: qwen35_mlx/config.py:1 (constant)" in out
    assert '"seed": 3' in out.splitlines()[-1]


@pytest.mark.slow
def test_a_copy_of_the_tree_is_what_runs_and_what_is_changed(tmp_path: Path) -> None:
    place = mutants.Workplace(tmp_path / "0", mutants.EVERYDAY)
    place.check()
    file = place.root / "qwen35_mlx" / "errors.py"
    before = file.read_text()
    seen: list[str] = []
    codes, runs = iter([0, 1, 0]), []

    def pytest_ends_with(arguments: list[str], limit: float) -> int:
        seen.append(file.read_text())
        runs.append(json.loads((place.home / "chosen.json").read_text()))
        assert arguments[-1] == "t.py" and limit > 5
        return next(codes)

    place.pytest = pytest_ends_with  # type: ignore[method-assign, assignment]
    (site, *_) = mutants.choose([mutants.ROOT / "qwen35_mlx/errors.py"], 3, 0)
    names = [set(), {"t.py::a"}, {"t.py::b"}, {"t.py::c"}]
    assert place.run(site, names, {f"t.py::{name}": 1.0 for name in "abc"}) == 1
    assert runs == [["t.py::a"], ["t.py::b"]]
    assert seen[0] != before == file.read_text()
    assert (mutants.ROOT / "qwen35_mlx" / "errors.py").read_text() == before


def test_only_lines_of_code_are_counted(tmp_path: Path) -> None:
    source = '"""Text\nof two lines."""\n\n# reason\nx = [\n    1,\n\n]  # one\n\n'
    source += 'def f():\n    "doc"\n    return """a\nb"""\n'
    assert code_lines(source) == {5, 6, 8, 10, 12, 13}
    assert metal_lines("// a\nint a; // b\n\n/* c\nd */\nint e;\n") == 2
    for name in ("qwen35_mlx/demo/a.py", "convert/b.py", "quant/c.metal"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x\n")
    assert count(tmp_path) == {"convert": 1, "Python": 1, "Metal": 1}
