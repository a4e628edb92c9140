"""Markdown drawn while it streams: a finished block once, of the last one only its changes."""

import math
import re
import time
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Heading, Markdown

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
# Padding to the terminal's width, which would wrap when it gets narrower.
PADDING = re.compile(r"(?:\x1b\[[0-9;]*m| )*$")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
MIN_SECONDS = 0.04
# Drawing takes at most a fifth of the time, however long a block gets.
REST_FACTOR = 4


class _LeftHeading(Heading):
    """Where the text is; rich would centre it."""

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
    """Draws on a terminal; the cursor stays behind the last character."""

    def __init__(self, console: Console):
        self._console = console
        self._source = ""
        self._drawn: list[_Line] = []
        self._has_blocks = False
        self._next_draw = 0.0

    def feed(self, text: str) -> None:
        """Draw what `text` adds, unless something was drawn a moment ago."""
        self._source += text
        if time.monotonic() >= self._next_draw:
            started = time.monotonic()
            self._draw_all()
            ended = time.monotonic()
            self._next_draw = ended + max(MIN_SECONDS, REST_FACTOR * (ended - started))

    def finish(self) -> None:
        """Draw what is left, and end the line."""
        self._draw_all()
        self._source = ""
        if self._has_blocks or self._drawn:
            self._write("\n")
        self._drawn, self._has_blocks = [], False

    def _draw_all(self) -> None:
        """Finish the blocks that have ended, and draw what there is of the next."""
        while end := block_end(self._source):
            self._draw(self._source[:end])
            self._source = self._source[end:].lstrip("\n")
            self._has_blocks = self._has_blocks or bool(self._drawn)
            self._drawn = []
        self._draw(self._source)

    def _draw(self, source: str) -> None:
        """Bring the block on the screen from the lines drawn so far to `source`."""
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
        """What turns `drawn`, with the cursor at its end, into `lines`."""
        pairs = zip(drawn, lines, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(drawn), len(lines)))
        if len(lines) < len(drawn):
            # The last line is drawn again, so that the cursor ends behind it.
            same = min(same, len(lines) - 1)
        if same == len(drawn):
            return "\n" + _joined(lines[same:])
        last = drawn[-1].text
        if same == len(drawn) - 1 < len(lines) and _goes_on(last, lines[same].text):
            return _joined(lines[same:])[len(last) :]
        width, height = self._console.width, self._console.height
        up = sum(line.rows(width) for line in drawn[same:]) - 1
        # What has left the screen stays as it is.
        while up > height - 1 and same < len(drawn) - 1:
            up -= drawn[same].rows(width)
            same += 1
        # Never all of the screen at once: tmux would put it into its history.
        back = f"\r\x1b[{up}A\x1b[K\x1b[1B\x1b[J\x1b[1A" if up else "\r\x1b[K"
        return back + _joined(lines[same:])

    def _render(self, source: str) -> list[_Line]:
        """The block as lines of text with escapes, none of them wider than the terminal."""
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
        # One write for each change: nothing half drawn is ever shown.
        self._console.file.write(text)
        self._console.file.flush()


def _joined(lines: list[_Line]) -> str:
    return "\n".join(line.text for line in lines)


def _goes_on(old: str, new: str) -> bool:
    """Whether a line only got longer, by what cannot melt with its last character."""
    added = new[len(old) :]
    return new.startswith(old) and "\x1b" not in old and added[:1].isascii()


def block_end(source: str) -> int:
    """Where the first block ends for good, whatever follows; 0 if it does not yet."""
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
    """Line ends as they were written; Markdown would join the lines of a paragraph."""
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
