"""Which lines mutants.py changes and how, and which it leaves alone."""

import random
from pathlib import Path

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


def test_a_seed_repeats_the_choice_and_no_line_comes_twice() -> None:
    files = [mutants.ROOT / "qwen35_mlx" / name for name in ("config.py", "checkpoint/headers.py")]
    first, again, other = (mutants.choose(files, 40, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len({(s.file, s.mutant.line) for s in first}) == 40
    assert {s.file for s in first} == {"qwen35_mlx/config.py", "qwen35_mlx/checkpoint/headers.py"}


def test_tests_are_found_by_what_they_import() -> None:
    tests = mutants.tests_of_modules(mutants.ROOT)
    assert "tests/test_journal.py" in tests["convert/journal.py"]
    assert "tests/test_gated_delta_rule.py" in tests["qwen35_mlx/kernels/gated_delta_rule.py"]
    # Through the names that `qwen35_mlx.convert` passes on.
    assert "tests/test_cache.py" in tests["convert/job.py"]
    # Through the module that imports it, as no test does.
    assert "tests/test_model.py" in tests["qwen35_mlx/model/gated_delta_net.py"]
    for file, found in tests.items():
        assert found or file.endswith("__init__.py"), f"no test is known for {file}"
    for file in {file for found in tests.values() for file in found} | set(mutants.OVERRIDES):
        assert (mutants.ROOT / file).exists(), file


def test_a_mutant_is_killed_survives_or_cannot_be_run(tmp_path: Path) -> None:
    """Without a copy of the tree: what pytest would return is given."""
    site = Site("qwen35_mlx/config.py", Mutant("constant", 1, 0, 1, "x"), "a", "b")

    class Place:
        def __init__(self, code: int | None):
            self.code = code

        def run(self, *_: object) -> int | None:
            return self.code

    outcomes = {1: "killed", 2: "killed", None: "timeout", 0: "survived", 5: "not run"}
    for code, outcome in outcomes.items():
        (result,) = mutants.run_all([site], {site.file: {"t"}}, {}, [], [Place(code)])  # type: ignore[list-item]
        assert result.outcome == outcome
    (result,) = mutants.run_all([site], {site.file: set()}, {}, [], [Place(1)])  # type: ignore[list-item]
    assert result.outcome == "not run"


def test_what_fails_without_a_mutant_is_left_out() -> None:
    xml = """<testsuites><testsuite>
      <testcase classname="" name="tests.test_c"><error message="collection failure"/></testcase>
      <testcase classname="tests.test_a" name="test_x[1]" time="1.5"/>
      <testcase classname="tests.test_a" name="test_y[a-b]" time="0.5"><failure/></testcase>
      <testcase classname="tests.metal.test_b" name="test_z" time="2"><error/></testcase>
    </testsuite></testsuites>"""
    files = ["tests/test_a.py", "tests/metal/test_b.py", "tests/test_c.py"]
    seconds, failed, broken = mutants.read_report(xml, files)
    assert seconds == {files[0]: 2.0, files[1]: 2.0, files[2]: 0.0}
    assert failed == ["tests/metal/test_b.py::test_z", "tests/test_a.py::test_y"]
    assert broken == {"tests/test_c.py"}


def test_the_rate_leaves_out_what_could_not_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    site = Site("qwen35_mlx/config.py", Mutant("constant", 1, 0, 1, "x"), "a", "b")
    outcomes = ["killed"] * 2 + ["timeout", "survived", "not run"]
    rate = mutants.report([Result(site, o, 1.0) for o in outcomes], seed=3, seconds=5.0)
    assert rate == 3 / 4
    out = capsys.readouterr().out
    assert "survived: qwen35_mlx/config.py:1 (constant)" in out
    assert '"seed": 3' in out.splitlines()[-1]


def test_a_copy_of_the_tree_is_what_runs_and_what_is_changed(tmp_path: Path) -> None:
    place = mutants.Workplace(tmp_path / "0", mutants.EVERYDAY)
    place.check()
    file = place.root / "qwen35_mlx" / "errors.py"
    before = file.read_text()
    seen: list[str] = []
    place.pytest = lambda *_: seen.append(file.read_text())  # type: ignore[method-assign, assignment]
    site = random.Random(0).choice(mutants.choose([mutants.ROOT / "qwen35_mlx/errors.py"], 3, 0))
    place.run(site, ["tests/test_config.py"], 1.0)
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
