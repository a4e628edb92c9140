"""Numbers and tables that were measured, decided or read from a format change on purpose only.

A wrong entry of a table is silent: nothing fails, the result is a little worse. They are compared
with a file; `REWRITE_PAGES=1 pytest tests/test_numbers.py` makes it again.
"""

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

import mlx.core as mx
from test_imports import MODULES
from test_pages import check

# Decided by the MLX that is installed.
OF_MLX = {"qwen35_mlx.kernels.metal.OPTIONS"}
SIMPLE = (bool, int, float, complex, str, bytes, type(None), range, Enum, mx.Dtype)


def spelled(value: Any) -> str | None:
    """The value as text, the same on every machine; None if it is no plain data."""
    if isinstance(value, re.Pattern):
        return f"re.compile({value.pattern!r}, {value.flags})"
    if isinstance(value, dict):
        pairs = [(spelled(k), spelled(v)) for k, v in value.items()]
        parts = [None if None in pair else ": ".join(map(str, pair)) for pair in pairs]
    elif isinstance(value, (tuple, list, set, frozenset)):
        parts = [spelled(v) for v in value]
        if isinstance(value, (set, frozenset)):
            parts = sorted(map(str, parts))
    elif isinstance(value, type):
        return value.__qualname__
    elif isinstance(value, SIMPLE):
        return str(value) if isinstance(value, Enum) else repr(value)
    else:
        return None
    if None in parts:
        return None
    return f"{type(value).__name__}({', '.join(map(str, parts))})"


def assigned(module: str) -> Iterator[str]:
    """The constants that the module itself gives a value to."""
    for node in ast.parse(MODULES[module].read_text("utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            for name in getattr(target, "elts", [target]):
                if isinstance(name, ast.Name) and name.id.isupper():
                    yield name.id


def defaults(function: Any) -> dict[str, Any]:
    """What a parameter is if it is not given."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def fields(cls: type) -> dict[str, Any]:
    """What a field of a dataclass or named tuple is if it is not given."""
    if dataclasses.is_dataclass(cls):
        return {
            field.name: field.default
            for field in dataclasses.fields(cls)
            if field.default is not dataclasses.MISSING
        }
    return getattr(cls, "_field_defaults", {})


def found(name: str) -> Iterator[tuple[str, Any]]:
    module = importlib.import_module(name)
    for constant in assigned(name):
        yield constant, getattr(module, constant)
    for key, value in vars(module).items():
        if getattr(value, "__module__", None) != name or key.startswith("_"):
            continue
        if inspect.isclass(value):
            yield from ((f"{key}.{field}", default) for field, default in fields(value).items())
            for method, function in vars(value).items():
                if inspect.isfunction(function) and method.strip("_") == method:
                    for parameter, default in defaults(function).items():
                        yield f"{key}.{method}({parameter})", default
        elif inspect.isfunction(value) and not name.startswith("qwen35_mlx.cli"):
            yield from ((f"{key}({p})", default) for p, default in defaults(value).items())


def test_numbers_tables_and_defaults_change_on_purpose() -> None:
    lines = []
    for module in MODULES:
        for name, value in found(module):
            if f"{module}.{name}" not in OF_MLX and (text := spelled(value)) is not None:
                lines.append(f"{module}.{name} = {text}")
    check("numbers", "\n".join(lines) + "\n")
