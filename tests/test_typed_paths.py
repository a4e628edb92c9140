"""Paths as terminals and people type them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen35_mlx.cli.typed_paths import split_media, typed_documents, typed_files, typed_path
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


PICTURES = (
    "a.png",
    "my shot (v2).jpg",
    "it's.JPEG",
    "Screenshot at 9.41\u202fAM.png",
    "Sn\u00edmek\u00a014.30.png",
    "e\u0301te\u0301.webp",
    "100% [漢字].gif",
    "clip 1.mp4",
    "paper.pdf",
)


@pytest.fixture
def pictures(folder: Path) -> Path:
    for name in PICTURES:
        Path(name).touch()
    return folder


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("spelt", [as_terminal_app, in_quotes, in_double_quotes, as_url])
@pytest.mark.parametrize("where", ["~/folder with spaces/", "./", "absolute"])
def test_a_dropped_picture_is_cut_out_of_the_message(
    pictures: Path, name: str, spelt: Callable[[str], str], where: str
) -> None:
    dropped = spelt(f"{pictures}/{name}" if where == "absolute" else where + name).strip()
    for message, left in (
        ("{}", ""),
        ("{} ", ""),
        ("What's in {}?", "What's in?"),
        ("{}\nWhat is it?", "What is it?"),
        ("See {}, it's new; {} too", "See, it's new; too"),
    ):
        text, found, missing = split_media(message.format(dropped, dropped))
        assert text == left and not missing
        assert len(found) == message.count("{}")
        assert all(each.path.samefile(pictures / name) for each in found)


def test_a_path_with_plain_spaces_is_found(pictures: Path) -> None:
    name = "my shot (v2).jpg"
    for typed in (name, f"{pictures}/{name}", f"{pictures}/{name} what is it", f"See ./{name}"):
        [found] = split_media(typed)[1]
        assert found.path.samefile(name)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("Screenshot at 9.41 AM.png", "Screenshot at 9.41\u202fAM.png"),
        ("Sn\u00edmek 14.30.png", "Sn\u00edmek\u00a014.30.png"),
        ("\u00e9t\u00e9.webp", "e\u0301te\u0301.webp"),
    ],
)
def test_a_name_with_other_spaces_or_accents_is_found(
    pictures: Path, typed: str, name: str
) -> None:
    """Programs between the screen and us turn narrow spaces into plain ones."""
    assert split_media(f"look: '{pictures}/{typed}' now")[1][0].path.name == name
    assert typed_files(typed)[0].name == name


def test_one_of_two_names_that_differ_in_spaces_alone_is_not_guessed(folder: Path) -> None:
    for space in "\u202f\u00a0":
        Path(f"a{space}b.png").touch()
    assert split_media("'./a b.png'")[1:] == ([], ["./a b.png"])


@pytest.mark.parametrize(
    "text",
    [
        "What is in {}?", "'{}' what", '"{}"', "{}", "{}: what is it", "file://{} and",
        "no {}\nyes",
    ],
)  # fmt: skip
def test_a_picture_that_is_not_there_is_missing(folder: Path, text: str) -> None:
    message = text.format("/no/such.png")
    assert split_media(message) == (message, [], ["/no/such.png"])


@pytest.mark.parametrize(
    "text",
    [
        "/etc/hosts", "./plain.txt", "~/x.py", "an image/png file", "https://x.org/a.png what",
        "/a.png.txt", "none.png is a name", "see /usr/bin. Or .png", "'tis", "\0/x.png", "$x/[.png",
    ],
)  # fmt: skip
def test_what_names_no_picture_stays_text(folder: Path, text: str) -> None:
    assert split_media(text) == (text, [], [])


def test_the_lines_of_a_message_stay_lines(pictures: Path) -> None:
    text = "one\n\n  two\n./a.png\n\tthree"
    assert split_media(text)[0] == "one\n\n  two\n\n\tthree"


@pytest.mark.parametrize("typed", ["***", "src/**.py"])
def test_a_pattern_that_python_refuses_is_refused_in_words(typed: str) -> None:
    with pytest.raises(Qwen35Error, match=r"no (pattern of files|file in)"):
        typed_documents(typed)
