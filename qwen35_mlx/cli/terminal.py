"""The two consoles: results go to stdout, errors and remarks to stderr."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.theme import Theme

from ..errors import Qwen35Error

if os.environ.get("COLUMNS") == "0":
    # rich would print nothing at all.
    del os.environ["COLUMNS"]
# rich's style for code has a black background, also on light terminals.
THEME = Theme({"markdown.code": "cyan", "markdown.code_block": "cyan"})
out = Console(highlight=False, soft_wrap=True, emoji=False, theme=THEME)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
# Text of a model must not move the cursor or rename the window.
CONTROL = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")})


def print_error(error: BaseException) -> None:
    """Print an error, with the class of an unexpected exception."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        text = ": ".join([*names, error.strerror])
    elif not isinstance(error, Qwen35Error):
        text = f"{type(error).__name__}: {text}".partition("\n")[0].strip(": ")
    err.print("[bold red]error:[/] ", end="")
    err.print(text, markup=False)


def note(text: str) -> None:
    """Print a remark."""
    err.print(text, style="dim", markup=False, soft_wrap=not err.is_terminal)


_held: list[str] | None = None


def warn(text: str) -> None:
    """Print a warning of the package; held back while an answer is printed."""
    if _held is None:
        note(f"warning: {text}")
    else:
        _held.append(text)


@contextmanager
def held_warnings() -> Iterator[None]:
    """Hold warnings back until the end of the block, because they would break a line."""
    global _held
    held: list[str] = []
    _held = held
    try:
        yield
    finally:
        _held = None
        for text in held:
            warn(text)


def can_draw(console: Console) -> bool:
    """Whether the console is a terminal that can move its cursor."""
    return console.is_terminal and not console.is_dumb_terminal


def count(number: int, noun: str) -> str:
    """A number with its noun in singular or plural."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
