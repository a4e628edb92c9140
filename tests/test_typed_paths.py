"""Paths as terminals and people type them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen35_mlx.cli.typed_paths import typed_files, typed_path
from qwen35_mlx.errors import Qwen35Error

NAMES = (
    "plain.txt",
    "my notes (v2).txt",
    "it's.txt",
    'say "hi".txt',
    "'quoted'.txt",
    "back\\slash.txt",
    "[a] {b} $c & d; e.txt",
    "100% é 漢字.txt",
    # macOS names screenshots with a narrow space that is no ASCII space.
    "Screenshot at 9.41\u202fAM.txt",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "folder with spaces").mkdir()
    monkeypatch.chdir(tmp_path / "folder with spaces")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in NAMES:
        Path(name).touch()
    return Path.cwd()


def as_terminal_app(path: str) -> str:
    """A backslash before all that is special to a shell, and a space at the end."""
    return "".join(c if c.isalnum() or c in "/._-" else f"\\{c}" for c in path) + " "


def in_quotes(path: str) -> str:
    return "'" + path.replace("'", "'\\''") + "'"


def in_double_quotes(path: str) -> str:
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


def as_url(path: str) -> str:
    return Path(path).expanduser().absolute().as_uri()


@pytest.mark.parametrize("spelt", [str, as_terminal_app, in_quotes, in_double_quotes, as_url])
@pytest.mark.parametrize("where", ["", "~/folder with spaces/", "./", "absolute"])
def test_a_dropped_or_typed_file_is_found(
    folder: Path, spelt: Callable[[str], str], where: str
) -> None:
    for name in NAMES:
        path = f"{folder}/{name}" if where == "absolute" else where + name
        [found] = typed_files(spelt(path))
        assert found.samefile(folder / name), name
        assert os.path.samefile(typed_path(spelt(path)), folder / name), name


def test_several_dropped_files_are_all_found(folder: Path) -> None:
    for spelt in (as_terminal_app, in_quotes):
        assert [str(p) for p in typed_files(" ".join(map(spelt, NAMES)))] == list(NAMES)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("none.txt", "no file none.txt"),
        ("two words.txt", "no file two words.txt"),
        ('"abc', 'no file "abc'),
        ("'tis.txt", "no file 'tis.txt"),
        ("~nosuchuser/x", "no file ~nosuchuser/x"),
        ("\0", "no file \0"),
        ("\ud800", "no file \ud800"),
        ("x" * 5000, "no file xxx"),
        ("plain.txt none.txt", "no file none.txt"),
        ("''", "no file ''"),
        ("\\", "no file \\"),
    ],
)
def test_what_is_no_file_is_named(folder: Path, text: str, named: str) -> None:
    with pytest.raises(Qwen35Error) as caught:
        typed_files(text)
    assert str(caught.value).startswith(named)


def test_a_name_to_save_under_loses_its_quotes(folder: Path) -> None:
    assert typed_path("new\\ chat.json") == "new chat.json"
    assert typed_path("'~/new chat'") == str(folder.parent / "new chat")
    assert typed_path("two words") == "two words"
    assert typed_path("it's") == "it's"
    assert typed_path("") == ""
