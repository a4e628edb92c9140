"""Streams Markdown to a terminal: finished blocks are drawn once, the last one is updated."""

import math
import re
import time
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Heading, Markdown

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
# Padding to the terminal's width; it would wrap if the terminal gets narrower.
PADDING = re.compile(r"(?:\x1b\[[0-9;]*m| )*$")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
MIN_SECONDS = 0.04
# Wait so many times the last drawing time: drawing takes at most a fifth of all time.
REST_FACTOR = 4


class _LeftHeading(Heading):
    """A heading on the left; rich would centre it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Markdown(Markdown):
    elements = {**Markdown.elements, "heading_open": _LeftHeading}  # noqa: RUF012


@dataclass
class _Line:
    text: str
    cells: int

    def rows(self, width: int) -> int:
        return max(1, math.ceil(self.cells / width))


class MarkdownStream:
    """Draws on a terminal; the cursor stays after the last character."""

    def __init__(self, console: Console):
        self._console = console
        self._source = ""
        self._drawn: list[_Line] = []
        self._has_blocks = False
        self._next_draw = 0.0

    def feed(self, text: str) -> None:
        """Add text and draw it, unless the last drawing was a moment ago."""
        self._source += text
        if time.monotonic() >= self._next_draw:
            started = time.monotonic()
            self._draw_all()
            ended = time.monotonic()
            self._next_draw = ended + max(MIN_SECONDS, REST_FACTOR * (ended - started))

    def finish(self) -> None:
        """Draw the rest, and end the line."""
        self._draw_all()
        self._source = ""
        if self._has_blocks or self._drawn:
            self._write("\n")
        self._drawn, self._has_blocks = [], False

    def _draw_all(self) -> None:
        """Draw the finished blocks, and the beginning of the next one."""
        while end := block_end(self._source):
            self._draw(self._source[:end])
            self._source = self._source[end:].lstrip("\n")
            self._has_blocks = self._has_blocks or bool(self._drawn)
            self._drawn = []
        self._draw(self._source)

    def _draw(self, source: str) -> None:
        """Update the current block on the screen to `source`."""
        lines = self._render(source)
        if not lines or lines == self._drawn:
            return
        if self._drawn:
            self._write(self._change(self._drawn, lines))
        else:
            # A blank line between two blocks.
            self._write(("\n\n" if self._has_blocks else "") + _joined(lines))
        self._drawn = lines

    def _change(self, drawn: list[_Line], lines: list[_Line]) -> str:
        """The output that changes `drawn`, with the cursor at its end, to `lines`."""
        pairs = zip(drawn, lines, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(drawn), len(lines)))
        if len(lines) < len(drawn):
            # Draw the last line again, so that the cursor ends after it.
            same = min(same, len(lines) - 1)
        if same == len(drawn):
            return "\n" + _joined(lines[same:])
        last = drawn[-1].text
        if same == len(drawn) - 1 < len(lines) and _goes_on(last, lines[same].text):
            return _joined(lines[same:])[len(last) :]
        width, height = self._console.width, self._console.height
        up = sum(line.rows(width) for line in drawn[same:]) - 1
        # Lines that have scrolled off the screen cannot be changed.
        while up > height - 1 and same < len(drawn) - 1:
            up -= drawn[same].rows(width)
            same += 1
        # Never clear the whole screen at once: tmux would put it into its history.
        back = f"\r\x1b[{up}A\x1b[K\x1b[1B\x1b[J\x1b[1A" if up else "\r\x1b[K"
        return back + _joined(lines[same:])

    def _render(self, source: str) -> list[_Line]:
        """The block as lines with escape sequences, none wider than the terminal."""
        with self._console.capture() as capture:
            markdown = _Markdown(hard_breaks(source), code_theme="ansi_dark", hyperlinks=False)
            self._console.print(markdown, soft_wrap=False)
        lines = []
        for text in capture.get().split("\n"):
            kept = PADDING.sub("", text)
            kept += "\x1b[0m" if "\x1b" in kept else ""
            lines.append(_Line(kept, cell_len(ESCAPES.sub("", kept))))
        while lines and not lines[-1].cells:
            lines.pop()
        while lines and not lines[0].cells:
            lines.pop(0)
        return lines

    def _write(self, text: str) -> None:
        # One write per change, so that no partial state is visible.
        self._console.file.write(text)
        self._console.file.flush()


def _joined(lines: list[_Line]) -> str:
    return "\n".join(line.text for line in lines)


def _goes_on(old: str, new: str) -> bool:
    """Whether a line only got longer, by characters that do not combine with its last one."""
    added = new[len(old) :]
    return new.startswith(old) and "\x1b" not in old and added[:1].isascii()


def block_end(source: str) -> int:
    """The end of the first block, if later text cannot change it; 0 if it is not finished."""
    fence, is_own_block, at, blank = "", False, 0, False
    for line in source.splitlines(keepends=True):
        match = FENCE.match(line)
        if not line.endswith("\n") and (fence or not line.strip() or not blank):
            return 0
        if fence:
            if match and match[1].startswith(fence) and not line[match.end() :].strip():
                if is_own_block:
                    return at + len(line)
                fence = ""
        elif not line.strip():
            blank = at > 0
        elif blank and not line[0].isspace():
            return at
        elif match:
            # A paragraph may end without a blank line before a fence.
            if at and not blank and not source[0].isspace() and source[0] not in "-*+0123456789>":
                return at
            fence, is_own_block = match[1], at == 0
        elif at == 0 and re.match(r"#{1,6} ", line):
            return at + len(line)
        else:
            blank = False
        at += len(line)
    return 0


def hard_breaks(source: str) -> str:
    """Keep line breaks; Markdown would join the lines of a paragraph."""
    fence, lines = "", []
    for line in source.split("\n"):
        match = FENCE.match(line.lstrip())
        if match and not fence:
            fence = match[1]
        elif match and match[1].startswith(fence) and match.end() == len(line.strip()):
            fence = ""
        elif not fence and line.strip():
            line = line.rstrip() + "  "
        lines.append(line)
    return "\n".join(lines)
