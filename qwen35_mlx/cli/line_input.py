"""Reads messages: an editor with history and completion on a terminal, plain lines elsewhere."""

import os
import re
import sys
import termios
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PROMPT = "> "
TAKE_FILES = ("/file", "/image", "/video", "/pdf")
# Complete words, and the one being typed: after an open quote, or with escaped characters.
LAST_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|\\.|[^\\'"])*?('[^']*|"[^"]*|(?:\\.|[^\s\\'"])*)$""")


class LineReader:
    """Reads a message per line; raises EOFError at the end, KeyboardInterrupt for Ctrl-C."""

    def read(self, default: str = "") -> str:
        """The next line; `default` is not supported."""
        return input(PROMPT)

    def ask(self, question: str) -> str:
        """The next line."""
        return input(question)


class EditingReader:
    """An editor with prompt_toolkit: Enter sends; Alt-Enter, Ctrl-J or a final \\ add a line."""

    def __init__(self, commands: Mapping[str, Iterable[str]], history: Path | None):
        """commands: names to complete, each with the words that may follow it."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import Completer, Completion, PathCompleter
        from prompt_toolkit.document import Document
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.keys import Keys

        class Commands(Completer):
            """Completes commands, their words, and files for commands that take files."""

            def get_completions(self, document: Document, complete_event: Any) -> Iterable[Any]:
                text = document.text_before_cursor
                command, space, rest = text.partition(" ")
                if not text.startswith("/") or "\n" in text:
                    return
                if command in TAKE_FILES and space:
                    if match := LAST_WORD.match(rest):
                        yield from self._files(match[1], complete_event)
                    return
                typed = rest if space else command
                for word in commands.get(command, ()) if space else commands:
                    if word.startswith(typed):
                        yield Completion(word, start_position=-len(typed))

            def _files(self, word: str, complete_event: Any) -> Iterable[Any]:
                """Paths in a shell's form: in quotes if a quote is open, else with backslashes."""
                is_quoted = word[:1] in ("'", '"')
                path = word[1:] if is_quoted else re.sub(r"\\(.)", r"\1", word)
                files = PathCompleter(expanduser=True)
                for found in files.get_completions(Document(path), complete_event):
                    if not is_quoted:
                        found.text = re.sub(r"([^\w./~+-])", r"\\\1", found.text)
                    yield found

        keys = KeyBindings()

        @keys.add("enter")
        def send(event: Any) -> None:
            buffer = event.current_buffer
            if buffer.document.text_before_cursor.endswith("\\"):
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("c-j")
        @keys.add("escape", "enter")
        def go_on_below(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add(Keys.Vt100MouseEvent)
        def ignore(event: Any) -> None:
            """Colours in pasted text look like clicks, which prompt_toolkit fails to read."""

        kept: Any = InMemoryHistory()
        with suppress(OSError):
            if history:
                history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                history.touch(mode=0o600)
                kept = FileHistory(str(history))
        self._session: Any = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation="  ",
            history=kept,
            completer=Commands(),
            complete_while_typing=Condition(
                lambda: self._session.app.current_buffer.text.startswith("/")
            ),
            key_bindings=keys,
            enable_open_in_editor=True,
        )
        self._answers: Any = PromptSession(history=InMemoryHistory())

    def read(self, default: str = "") -> str:
        """A message, which may have several lines."""
        return str(self._session.prompt(default=default))

    def ask(self, question: str) -> str:
        """A line that does not go into the history."""
        return str(self._answers.prompt(question))


Reader = LineReader | EditingReader


def open_reader(commands: Mapping[str, Iterable[str]], history: Path | None) -> Reader:
    """An editor on a terminal that supports it, else a reader of lines."""
    return EditingReader(commands, history) if can_edit() else LineReader()


def can_edit() -> bool:
    """Whether stdin and stdout are a terminal that supports an editor."""
    streams = (sys.stdin, sys.stdout)
    return all(s and s.isatty() for s in streams) and os.environ.get("TERM") != "dumb"


@contextmanager
def silent_keys(raw: bool = False) -> Iterator[None]:
    """Keep keys for the next message during the block, without showing them in the answer.

    raw: keep them as the editor needs them, without changing Enter to a line break.
    """
    try:
        fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
    # No terminal, or no file at all.
    except (ValueError, OSError, AttributeError, termios.error):
        yield
        return
    quiet = termios.tcgetattr(fd)
    quiet[3] &= ~termios.ECHO
    if raw:
        quiet[0] &= ~termios.ICRNL
        quiet[3] &= ~termios.ICANON
    termios.tcsetattr(fd, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
