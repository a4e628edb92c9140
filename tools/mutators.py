"""Finds the places where one line of a Python source can be changed so that a test should notice.

A mutation replaces a part of one line. Docstrings, annotations, decorators, assertions, texts of
errors and help, f-strings and `if TYPE_CHECKING` are not changed, because no test has to notice it.
"""

import ast
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType

COMPARISONS: dict[type[ast.cmpop], tuple[str, ...]] = {
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Lt: ("<", "<=", ">="),
    ast.LtE: ("<=", "<", ">"),
    ast.Gt: (">", ">=", "<="),
    ast.GtE: (">=", ">", "<"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitOr: ("|", "&"),
    ast.BitAnd: ("&", "|"),
    ast.BitXor: ("^", "|"),
}
# Functions whose result is the same with swapped arguments.
SYMMETRIC = {"max", "min", "maximum", "minimum", "gcd", "lcm", "logaddexp", "add", "multiply"}
# Arguments that are texts for people, and `strict` of zip, which is an assertion.
IGNORED_KEYWORDS = {"help", "hint", "metavar", "rich_help_panel", "epilog", "title", "strict"}
ATOMS = (ast.Name, ast.Constant, ast.Attribute, ast.Call, ast.Subscript)


@dataclass(frozen=True)
class Mutant:
    """One changed line; `start` and `end` are byte offsets in the line, as in ast."""

    kind: str
    line: int
    start: int
    end: int
    replacement: str

    def lines(self, source: str) -> tuple[str, str]:
        """The line before and after."""
        old = source.splitlines()[self.line - 1].encode()
        new = old[: self.start] + self.replacement.encode() + old[self.end :]
        return old.decode(), new.decode()

    def apply(self, source: str) -> str:
        lines = source.splitlines(keepends=True)
        old, new = self.lines(source)
        lines[self.line - 1] = new + lines[self.line - 1][len(old) :]
        return "".join(lines)


def changes_code(old: str, new: str) -> bool:
    """Whether the new source compiles to other code."""
    try:
        changed = compile(new, "mutant", "exec")
    except SyntaxError:
        return False
    return _instructions(changed) != _compiled(old)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> tuple[object, ...]:
    return _instructions(compile(source, "mutant", "exec"))


def _instructions(code: CodeType) -> tuple[object, ...]:
    """All parts of a code object but its line numbers; 1 and True differ."""
    constants = tuple(
        _instructions(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts
    )
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_exceptiontable


def find_mutants(source: str) -> list[Mutant]:
    """All mutants of a source, in the order of lines."""
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    return sorted(finder.found, key=lambda m: (m.line, m.start, m.end, m.kind, m.replacement))


class _Finder(ast.NodeVisitor):
    def __init__(self, source: str):
        self.rows = [line.encode() for line in source.splitlines()]
        self.found: set[Mutant] = set()
        self.in_class_body = False

    # Places

    def text(self, node: ast.expr) -> str:
        return self.rows[node.lineno - 1][node.col_offset : node.end_col_offset].decode()

    def add(self, kind: str, line: int, start: int, end: int, replacement: str) -> None:
        if self.rows[line - 1][start:end] != replacement.encode():
            self.found.add(Mutant(kind, line, start, end, replacement))

    def replace(self, kind: str, node: ast.expr | ast.stmt, replacement: str) -> None:
        if _on_one_line(node) and node.end_col_offset is not None:
            self.add(kind, node.lineno, node.col_offset, node.end_col_offset, replacement)

    def replace_operator(
        self, kind: str, left: ast.expr, right: ast.expr, old: str, new: str
    ) -> None:
        """Replace the operator that stands between two expressions."""
        word = r"\b" if old[0].isalpha() else ""
        pattern = word + re.escape(old).replace(r"\ ", r"\s+") + word
        assert left.end_lineno is not None and left.end_col_offset is not None
        for line in range(left.end_lineno, right.lineno + 1):
            start = left.end_col_offset if line == left.end_lineno else 0
            row = self.rows[line - 1]
            end = right.col_offset if line == right.lineno else len(row)
            between = row[start:end].split(b"#")[0].decode()
            if match := re.search(pattern, between):
                self.add(kind, line, start + match.start(), start + match.end(), new)
                return

    # What is left alone

    def visit_Module(self, node: ast.Module) -> None:
        self.visit_body(node.body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        saved, self.in_class_body = self.in_class_body, True
        self.visit_body(node.body)
        self.in_class_body = saved

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        saved, self.in_class_body = self.in_class_body, False
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if isinstance(default, ast.Constant):
                self.constant("default value", default)
            elif default is not None:
                self.visit(default)
        last = node.body[-1]
        if isinstance(last, ast.Return) and _is_none(last.value):
            self.visit_body(node.body[:-1])
        else:
            self.visit_body(node.body)
        self.in_class_body = saved

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_body(self, body: Iterable[ast.stmt]) -> None:
        for statement in body:
            self.visit(statement)

    def visit_Import(self, node: ast.Import) -> None:
        pass

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        pass

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        # Python 3.11 gives wrong columns for the nodes inside.
        pass

    def visit_Raise(self, node: ast.Raise) -> None:
        self.remove(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in IGNORED_KEYWORDS:
            self.visit(node.value)

    # Statements

    def remove(self, node: ast.stmt) -> None:
        row = self.rows[node.lineno - 1]
        rest = row[node.end_col_offset :].strip()
        alone = not row[: node.col_offset].strip() and (not rest or rest.startswith(b"#"))
        if alone:
            self.replace("statement removed", node, "pass")

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return
        self.remove(node)
        self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = [t.id for t in node.targets if isinstance(t, ast.Name)]
        if "__all__" in names or _is_type_alias(names, node.value):
            return
        self.statement(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is None:
            return
        if not self.in_class_body:
            self.remove(node)
        if isinstance(node.value, ast.Constant):
            self.constant("default value" if self.in_class_body else "constant", node.value)
        else:
            self.visit(node.value)

    def statement(self, node: ast.stmt) -> None:
        if not self.in_class_body:
            self.remove(node)
        self.generic_visit(node)

    visit_Return = visit_Delete = statement

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.remove(node)
        old, new = ARITHMETIC.get(type(node.op), ("", ""))
        if old:
            self.replace_operator("operator", node.target, node.value, f"{old}=", f"{new}=")
        self.visit(node.value)

    def visit_Break(self, node: ast.Break) -> None:
        self.replace("break or continue", node, "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self.replace("break or continue", node, "break")

    def visit_If(self, node: ast.If) -> None:
        if _is_skipped_condition(node.test):
            self.visit_body(node.orelse)
            return
        self.condition(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self.condition(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.condition(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.condition(test)
        self.generic_visit(node)

    def condition(self, test: ast.expr) -> None:
        if _on_one_line(test) and not isinstance(test, ast.UnaryOp):
            self.replace("not added", test, f"not ({self.text(test)})")

    # Expressions

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not) and _on_one_line(node):
            self.replace("not removed", node, f"({self.text(node.operand)})")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
            old, *others = COMPARISONS[type(op)]
            for new in others:
                self.replace_operator("comparison", left, right, old, new)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in itertools.pairwise(node.values):
            self.replace_operator("operator", left, right, old, new)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        old, new = ARITHMETIC.get(type(node.op), ("", ""))
        if old:
            self.replace_operator("operator", node.left, node.right, old, new)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        arguments = node.args[1:] if name == "cast" else node.args
        for first, second in itertools.pairwise(arguments):
            if name not in SYMMETRIC:
                self.swap(first, second)
        self.visit(node.func)
        for child in [*arguments, *node.keywords]:
            self.visit(child)

    def swap(self, first: ast.expr, second: ast.expr) -> None:
        starred = isinstance(first, ast.Starred) or isinstance(second, ast.Starred)
        if starred or first.lineno != second.end_lineno or second.end_col_offset is None:
            return
        row = self.rows[first.lineno - 1]
        between = row[first.end_col_offset : second.col_offset].decode()
        swapped = self.text(second) + between + self.text(first)
        self.add(
            "arguments swapped", first.lineno, first.col_offset, second.end_col_offset, swapped
        )

    def visit_Slice(self, node: ast.Slice) -> None:
        start, end = node.col_offset, node.end_col_offset
        if node.lineno != node.end_lineno or end is None:
            return
        if node.lower is None:
            self.add("slice bound", node.lineno, start, start, "1")
        elif not isinstance(node.lower, ast.Constant):
            self.replace("slice bound", node.lower, f"{self.operand(node.lower)} + 1")
        if node.upper is None and node.step is None and self.rows[node.lineno - 1][end - 1] == 58:
            self.add("slice bound", node.lineno, end, end, "-1")
        elif node.upper is not None and not isinstance(node.upper, ast.Constant):
            self.replace("slice bound", node.upper, f"{self.operand(node.upper)} - 1")
        self.generic_visit(node)

    def operand(self, node: ast.expr) -> str:
        return self.text(node) if isinstance(node, ATOMS) else f"({self.text(node)})"

    def visit_Constant(self, node: ast.Constant) -> None:
        self.constant("constant", node)

    def constant(self, kind: str, node: ast.Constant) -> None:
        for value in _other_values(node.value):
            text = json.dumps(value) if isinstance(value, str) else repr(value)
            self.replace(kind, node, text)


def _other_values(value: object) -> Iterator[object]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
        if value > 1:
            yield value - 1
    elif isinstance(value, float):
        yield value * 2 if value else 1.0
    elif isinstance(value, str) and re.fullmatch(r"\S+", value):
        # Texts of several words are for people.
        yield f"{value}x"


def _on_one_line(node: ast.expr | ast.stmt) -> bool:
    return node.lineno == node.end_lineno


def _is_none(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def _is_type_alias(names: list[str], value: ast.expr) -> bool:
    is_camel_case = any(re.fullmatch(r"_?[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*", n) for n in names)
    is_type = isinstance(value, ast.Subscript) or (
        isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr)
    )
    return is_camel_case and is_type


def _is_skipped_condition(test: ast.expr) -> bool:
    names = {n.id for n in ast.walk(test) if isinstance(n, ast.Name)}
    return bool(names & {"TYPE_CHECKING", "__name__"})
