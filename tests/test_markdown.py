"""Markdown while it streams: in the end as if printed whole, and without flicker."""

import io
import random
import re
from typing import Any

import pyte
import pytest
from everyday import everyday
from rich.console import Console

from qwen35_mlx.cli import markdown
from qwen35_mlx.cli.markdown import MarkdownStream, block_end, hard_breaks

TEXT = """# A title with `code`

A paragraph with **bold** words and *others*, long enough to be wrapped at the end of its line.
Second line, with 漢字漢字漢字 and an emoji 😀.

1. first
2. second
   - nested, and also rather long so that it needs another line of its own

   more of second

3. third
| name | value |
|------|------:|
| a | 1 |
| much longer name | 22 |

Here is code:
```python
def f(x: int) -> str:
    '''Of three

    lines.'''

    return "x" * x  # comment
```
> quoted

~~~
```
~~~
Setext
======

- done

The end."""


@pytest.fixture(autouse=True)
def draw_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(markdown, "REST_FACTOR", 0.0)


class Terminal(io.StringIO):
    """A file that is a terminal: pyte draws what is written."""

    def __init__(self, width: int, height: int):
        super().__init__()
        self.screen = pyte.HistoryScreen(width, height, history=5000, ratio=0.5)
        self.screen.set_mode(pyte.modes.LNM)
        self._stream = pyte.Stream(self.screen)
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        self._stream.feed(text)
        return len(text)

    def lines(self) -> list[str]:
        """All rows, those that left the screen too, as plain text."""
        width = self.screen.columns
        gone = ["".join(row[x].data for x in range(width)) for row in self.screen.history.top]
        return [line.rstrip() for line in [*gone, *self.screen.display]]


def streamed(parts: list[str], width: int, height: int, **options: Any) -> Terminal:
    terminal = Terminal(width, height)
    console = Console(
        file=terminal, force_terminal=True, width=width, height=height, color_system="truecolor",
        legacy_windows=False, **options,
    )  # fmt: skip
    stream = MarkdownStream(console)
    for part in parts:
        stream.feed(part)
    stream.finish()
    return terminal


def cuts(text: str, seed: int) -> list[str]:
    generator = random.Random(seed)
    at, parts = 0, []
    while at < len(text):
        length = generator.choice([1, 1, 2, 3, 5, 17])
        parts.append(text[at : at + length])
        at += length
    return parts


@pytest.mark.parametrize("width", everyday([20, 40, 100], 0))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_stream_ends_as_if_printed_at_once(width: int, seed: int) -> None:
    whole = streamed([TEXT], width, 200)
    assert streamed(cuts(TEXT, seed), width, 200).lines() == whole.lines()
    shown = "\n".join(whole.lines())
    assert "漢字" in shown and "A title" in shown and "**" not in shown and "=====" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_what_left_the_screen_stays_and_is_there_once(seed: int) -> None:
    code = "".join(f"    print('line {i}')\n" for i in range(60))
    text = f"Look:\n\n```python\n{code}```\n\nThat was it."
    lines = streamed(cuts(text, seed), 60, 12).lines()
    found = [int(n) for n in re.findall(r"line (\d+)'", "\n".join(lines))]
    assert found == list(range(60))
    assert [line for line in lines if line][-1] == "That was it."


def test_no_flicker() -> None:
    """Each write erases no more than it draws again, and almost all of them only add."""
    terminal = streamed(cuts(TEXT, 0), 80, 200)
    erasing = [w for w in terminal.writes if "\x1b[K" in w]
    # Cleared and drawn in one write.
    assert erasing and all(markdown.ESCAPES.sub("", w).strip() for w in erasing)
    assert not any("\x1b[2J" in w or "\x1b[?25l" in w for w in terminal.writes)
    # A paragraph's earlier lines are left alone: what goes back goes back a line or two.
    up = [int(n) for w in erasing for n in re.findall(r"\x1b\[(\d+)A", w)]
    assert len([n for n in up if n > 6]) == 0


def test_a_narrower_terminal_meanwhile() -> None:
    text = "word " * 60
    terminal = Terminal(80, 30)
    console = Console(
        file=terminal, force_terminal=True, width=80, height=30, color_system="truecolor",
        legacy_windows=False,
    )  # fmt: skip
    stream = MarkdownStream(console)
    stream.feed(text[:200])
    drawn = [line.cells for line in stream._drawn]
    console.width = 40
    terminal.writes.clear()
    stream.feed(text[200:])
    # Rows that the terminal made of the lines it had to wrap.
    rows = sum(-(-cells // 40) for cells in drawn)
    assert terminal.writes[-1].startswith(f"\r\x1b[{rows - 1}A\x1b[K")
    stream.finish()


def test_without_colour_there_is_none() -> None:
    terminal = streamed([TEXT], 80, 200, no_color=True)
    assert not re.search(r"\x1b\[[0-9;]*[34][0-7]", "".join(terminal.writes))


@pytest.mark.parametrize(
    ("source", "first"),
    [
        ("a\nb", ""),
        ("a\n\n", ""),
        ("a\n\nb", "a\n\n"),
        # Blank lines before a block belong to it.
        ("\na\n\nb", "\na\n\n"),
        ("# a\nb", "# a\n"),
        ("- a\n\n  b\n\nc", "- a\n\n  b\n\n"),
        ("```\na\n\nb\n", ""),
        ("```\na\n\nb\n```\n", "```\na\n\nb\n```\n"),
        ("````\n```\n````\nx", "````\n```\n````\n"),
        ("a\n```\nb", "a\n"),
        ("1. a\n   ```\n   b\n   ```\n   c", ""),
    ],
)
def test_blocks(source: str, first: str) -> None:
    assert source[: block_end(source)] == first


def test_line_ends_are_kept_outside_of_code() -> None:
    assert hard_breaks("a\nb\n\n```\nc\nd\n```\ne") == "a  \nb  \n\n```\nc\nd\n```\ne  "
    # A fence ends with as many signs as it began with, and nothing behind them.
    for inner in ("```", "~~~~", "````x"):
        source = f"````md\na\n{inner}\nb\n````\nc"
        assert hard_breaks(source) == source + "  "


def test_what_has_left_a_low_terminal_is_not_drawn_again() -> None:
    """Five lines in six rows, of which four are on the screen."""
    console = Console(file=io.StringIO(), force_terminal=True, width=10, height=4)
    stream = MarkdownStream(console)
    old = [markdown._Line(text, len(text)) for text in ("a", "b" * 15, "c", "d", "e")]
    new = [markdown._Line(text, len(text)) for text in ("A", "B" * 15, "C", "D", "E")]
    assert stream._change(old, new) == "\r\x1b[2A\x1b[K\x1b[1B\x1b[J\x1b[1AC\nD\nE"
    # A last line that alone is higher than the screen is drawn all the same.
    tall = [markdown._Line("x" * 60, 60)]
    assert stream._change(tall, new[:1]) == "\r\x1b[5A\x1b[K\x1b[1B\x1b[J\x1b[1AA"
    assert stream._change(new[:1], [new[0], new[2]]) == "\nC"
    assert stream._change(old[:1], new[:1]) == "\r\x1b[KA"
