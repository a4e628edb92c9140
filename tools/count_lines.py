"""Prints the lines of code of the product, by package and in total.

Blank lines, comments and docstrings do not count, nor do the demo's files, which are data.
"""

import ast
import io
import os
import re
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def product_files(root: Path, suffix: str) -> list[Path]:
    """Files of the three product folders; the links inside the package are not followed."""
    files = []
    for top in ("qwen35_mlx", "convert", "quant"):
        for folder, subfolders, names in os.walk(root / top):
            subfolders[:] = [s for s in subfolders if s not in ("demo", "__pycache__")]
            files += [Path(folder, name) for name in names if name.endswith(suffix)]
    return sorted(files)


def docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines that docstrings take."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            lines.update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return lines


def code_lines(source: str) -> set[int]:
    """Numbers of the lines of a Python source that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docstring_lines(ast.parse(source))


def metal_lines(source: str) -> int:
    """The number of lines of a Metal source that hold code."""
    without_comments = re.sub(r"/\*.*?\*/|//[^\n]*", "", source, flags=re.DOTALL)
    return sum(1 for line in without_comments.splitlines() if line.strip())


def count(root: Path = ROOT) -> dict[str, int]:
    """Lines of code by package, Metal apart."""
    lines: Counter[str] = Counter()
    for file in product_files(root, ".py"):
        lines[file.parent.relative_to(root).as_posix()] += len(code_lines(file.read_text("utf-8")))
    result = dict(sorted(lines.items()))
    result["Python"] = sum(lines.values())
    metal = product_files(root, ".metal")
    result["Metal"] = sum(metal_lines(file.read_text("utf-8")) for file in metal)
    return result


def main() -> None:
    """The command line."""
    for name, lines in count().items():
        print(f"{name:<24}{lines:>7,}")


if __name__ == "__main__":
    main()
