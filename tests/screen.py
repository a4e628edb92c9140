"""A program in a terminal, and what a person would see on it."""

import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

import pyte

# The child must own the terminal for Ctrl-C to reach it.
CLI = "from qwen35_mlx.cli.main import main; main()"
OWN = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
HIDDEN = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "INPUTRC", "TTY_COMPATIBLE")


class Screen:
    """`qwen35-mlx` in a terminal of 100 columns; `written` is all it wrote."""

    def __init__(self, *arguments: object, code: str = CLI, **environment: str):
        self.written, self._from = "", 0
        self.display = pyte.HistoryScreen(100, 24, history=5000, ratio=0.5)
        self._stream = pyte.Stream(self.display)
        self._fd, child = pty.openpty()
        termios.tcsetwinsize(child, (24, 100))
        inherited = {k: v for k, v in os.environ.items() if k not in HIDDEN}
        self.job = subprocess.Popen(
            [sys.executable, "-c", OWN + code, *map(str, arguments)],
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            env=inherited | {"TERM": "xterm-256color", "INPUTRC": os.devnull} | environment,
        )
        os.close(child)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def resize(self, lines: int, columns: int) -> None:
        """As a window does: the program gets a signal."""
        ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.display.resize(lines, columns)

    def lines(self) -> list[str]:
        """All rows, those that left the screen too."""
        columns = range(self.display.columns)
        gone = ["".join(row[x].data for x in columns) for row in self.display.history.top]
        text = "\n".join(line.rstrip() for line in [*gone, *self.display.display])
        return text.rstrip("\n").split("\n")

    def wait_for(self, pattern: str, stay: bool = False) -> str:
        """What is below the last thing waited for, once `pattern` is in it.

        stay: this does not count as waited for.
        """
        limit = time.monotonic() + 30
        while True:
            lines = self.lines()
            text = "\n".join(lines[self._from :])
            if re.search(pattern, text):
                # The line of the prompt is still going to change.
                self._from = self._from if stay else len(lines) - 1
                return text
            assert time.monotonic() < limit, f"no {pattern!r} in\n{text}"
            self._read()

    def _read(self) -> None:
        if not select.select([self._fd], [], [], 0.1)[0]:
            return
        try:
            text = os.read(self._fd, 65536).decode(errors="replace")
        except OSError:
            # Linux says so when the other side is closed.
            time.sleep(0.05)
            return
        self.written += text
        # What pyte does not know and would print.
        self._stream.feed(re.sub(r"\x1b\[[>?=][0-9;]*[mu]", "", text))
        if "\x1b[6n" in text:
            cursor = self.display.cursor
            self.type(f"\x1b[{cursor.y + 1};{cursor.x + 1}R")

    def exit_code(self) -> int:
        limit = time.monotonic() + 30
        while self.job.poll() is None and time.monotonic() < limit:
            self._read()
        return self.job.wait(timeout=1)

    def close(self) -> None:
        self.job.kill()
        self.job.wait()
        os.close(self._fd)
