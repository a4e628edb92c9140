"""What is typed into the editor of the chat, and a terminal that shows no keys meanwhile."""

import io
import os
import stat
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from qwen35_mlx.cli import line_input
from qwen35_mlx.cli.line_input import EditingReader, LineReader, open_reader, silent_keys

COMMANDS = {"/think": ("on", "off"), "/trim": (), "/file": ("never",), "/set": ("top_p", "top_k")}
UP, ALT_ENTER, CTRL_C, CTRL_D = "\x1b[A", "\x1b\r", "\x03", "\x04"


@pytest.fixture
def history(tmp_path: Path) -> Path:
    return tmp_path / "home" / ".history"


@pytest.fixture
def typed(history: Path) -> Iterator[Callable[..., Any]]:
    """What `read` or `ask` returns for keys; every call has a new editor."""
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):

        def run(*texts: str, default: str = "", ask: str = "", file: Path = history) -> list[str]:
            reader = EditingReader(COMMANDS, file)
            found = []
            for text in texts:
                keys.send_text(text)
                found.append(reader.ask(ask) if ask else reader.read(default))
            return found

        yield run


def test_colours_in_pasted_text_are_no_clicks(typed: Any) -> None:
    """prompt_toolkit failed to read where, and two of them ended the chat."""
    assert typed("\x1b[31mred\x1b[0m and \x1b[32mgreen\r") == ["red and green"]


def test_enter_sends_and_three_ways_go_on_below(typed: Any) -> None:
    assert typed("hello\r", "a\\\rb\r", "a\nb\r", f"a{ALT_ENTER}b\r", "a\\b\r", "\r") == [
        "hello", "a\nb", "a\nb", "a\nb", "a\\b", "",
    ]  # fmt: skip


def test_a_draft_can_be_changed(typed: Any) -> None:
    assert typed("!\r", default="draft") == ["draft!"]


@pytest.mark.parametrize(("key", "error"), [(CTRL_C, KeyboardInterrupt), (CTRL_D, EOFError)])
def test_keys_that_leave(typed: Any, key: str, error: type[BaseException]) -> None:
    with pytest.raises(error):
        typed(key)


def test_messages_are_remembered_for_the_next_time_and_answers_are_not(
    typed: Any, history: Path
) -> None:
    assert typed("one\r", "two\r") == ["one", "two"]
    assert typed("k\r", ask="Keep? ") == ["k"]
    assert typed(f"{UP}\r", f"{UP}{UP}\r") == ["two", "one"]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) & 0o077 == 0


def test_a_history_that_cannot_be_written_is_kept_in_memory(typed: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert typed("one\r", f"{UP}\r", file=tmp_path / "file" / ".history") == ["one", "one"]


def test_without_a_home_folder_the_history_is_kept_in_memory(typed: Any) -> None:
    assert typed("one\r", f"{UP}\r", file=None) == ["one", "one"]


def test_the_prompt_is_that_of_a_pipe_and_lines_below_are_indented(typed: Any) -> None:
    session = EditingReader(COMMANDS, Path("/nowhere/x"))._session
    assert (session.message, session.prompt_continuation) == (line_input.PROMPT, "  ")
    assert session.enable_open_in_editor and session.multiline
    for text, is_shown in (("/th", True), ("a /th", False)):
        session.app = SimpleNamespace(current_buffer=SimpleNamespace(text=text))
        assert session.complete_while_typing() == is_shown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/t", ["/think", "/trim"]),
        ("/", list(COMMANDS)),
        ("/think o", ["on", "off"]),
        ("/set top_k", ["top_k"]),
        ("/trim ", []),
        ("/unknown ", []),
        ("t", []),
        ("", []),
        (" /t", []),
        ("/t\n", []),
        ("/file", ["/file"]),
    ],
)
def test_commands_and_their_words_are_completed(typed: Any, text: str, words: list[str]) -> None:
    completer = EditingReader(COMMANDS, Path("/nowhere/x"))._session.completer
    found = list(completer.get_completions(Document(text), None))
    assert [c.text for c in found] == words
    last = text.rpartition(" ")[2]
    assert {-c.start_position for c in found} <= {len(last)}


def test_paths_are_completed_behind_file(
    typed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("apple.txt", "apricot.txt", "b.txt"):
        (tmp_path / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    completer = EditingReader(COMMANDS, Path("/nowhere/x"))._session.completer
    for folder in (f"{tmp_path}", "~"):
        found = completer.get_completions(Document(f"/file {folder}/ap"), None)
        assert sorted(c.text for c in found) == ["ple.txt", "ricot.txt"]


def test_completed_paths_are_in_a_shells_form(typed: Any, tmp_path: Path) -> None:
    (tmp_path / "two words (1).txt").touch()
    completer = EditingReader(COMMANDS, Path("/nowhere/x"))._session.completer
    forms = {"tw": r"o\ words\ \(1\).txt", r"two\ w": r"ords\ \(1\).txt", '"tw': "o words (1).txt"}
    for name, rest in forms.items():
        word = f'"{tmp_path}/{name[1:]}' if name[0] == '"' else f"{tmp_path}/{name}"
        (found,) = completer.get_completions(Document(f"/file {word}"), None)
        assert found.text == rest


def test_lines_are_read_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or "line")
    reader = open_reader({}, Path("unused"))
    assert isinstance(reader, LineReader)
    assert (reader.read("draft"), reader.ask("Why? ")) == ("line", "line")
    assert asked == ["> ", "Why? "]


@pytest.mark.parametrize(
    ("stdin", "stdout", "term", "expected"),
    [
        (True, True, "xterm", True),
        (False, True, "xterm", False),
        (True, False, "xterm", False),
        (True, True, "dumb", False),
        (None, True, "xterm", False),
    ],
)
def test_an_editor_needs_a_terminal_on_both_sides(
    typed: Any, monkeypatch: pytest.MonkeyPatch, history: Path, stdin: bool | None, stdout: bool,
    term: str, expected: bool,
) -> None:  # fmt: skip
    def stream(is_terminal: bool | None) -> Any:
        return None if is_terminal is None else SimpleNamespace(isatty=lambda: is_terminal)

    monkeypatch.setattr(line_input.sys, "stdin", stream(stdin))
    monkeypatch.setattr(line_input.sys, "stdout", stream(stdout))
    monkeypatch.setenv("TERM", term)
    assert isinstance(open_reader({}, history), EditingReader) == expected


@pytest.mark.parametrize("raw", [False, True])
def test_keys_are_silent_until_the_end(monkeypatch: pytest.MonkeyPatch, raw: bool) -> None:
    parent, child = os.openpty()
    try:
        monkeypatch.setattr(line_input.sys, "stdin", SimpleNamespace(fileno=lambda: child))
        before = termios.tcgetattr(child)
        with pytest.raises(KeyboardInterrupt), silent_keys(raw):
            inside = termios.tcgetattr(child)
            raise KeyboardInterrupt
        after = termios.tcgetattr(child)
    finally:
        os.close(parent)
        os.close(child)
    changed = [0, 0, 0, termios.ECHO, 0, 0]
    if raw:
        changed[0], changed[3] = termios.ICRNL, termios.ECHO | termios.ICANON
    assert [a & ~c for a, c in zip(before[:6], changed, strict=True)] == inside[:6]
    assert before[0] & termios.ICRNL and before[3] & termios.ICANON and before[3] & termios.ECHO
    assert after == before


@pytest.mark.parametrize("stdin", [io.StringIO(), None])
def test_a_standard_input_that_is_no_terminal_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, stdin: Any
) -> None:
    monkeypatch.setattr(line_input.sys, "stdin", stdin)
    with silent_keys():
        pass
    reading, writing = os.pipe()
    monkeypatch.setattr(line_input.sys, "stdin", SimpleNamespace(fileno=lambda: reading))
    with silent_keys(raw=True):
        pass
    os.close(reading)
    os.close(writing)
