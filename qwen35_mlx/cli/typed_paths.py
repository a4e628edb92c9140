"""Paths as people type, paste or drop them into a terminal."""

import os
import re
import shlex
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from ..errors import Qwen35Error

# Endings by which a name in a message is taken for a picture, video or PDF.
SUFFIXES = {
    "image": ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif"),
    "video": ("mp4", "mov", "m4v", "webm", "mkv", "avi"),
    "pdf": ("pdf",),
}
KINDS = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}
_END, _BEHIND = rf"\.({'|'.join(KINDS)})", r"[,.;:!?)\]]*"
# Such a name ends before white space, a quote or punctuation.
NAME_END = re.compile(rf"{_END}(?={_BEHIND}(?:[\s'\"]|$))", re.IGNORECASE)
LAST_END = re.compile(rf"{_END}({_BEHIND})$", re.IGNORECASE)
# A word in a shell's syntax: quoted parts, escaped characters and plain ones.
SHELL_WORD = re.compile(r"""(?:'[^'\n]*'|"(?:\\.|[^"\\\n])*"|\\.|[^\s'"\\])+""")
WITH_FOLDER = re.compile(r"/|~|\.\.?/")
GENERATED = frozenset(("__pycache__", "node_modules"))
MAX_FOUND = 1000
# Maximum number of endings that are tried for a name with unescaped spaces.
MAX_ENDINGS = 4


def media_kind(name: str) -> str | None:
    """The kind of a file by its ending: image, video or pdf; None for others."""
    return KINDS.get(name.rpartition(".")[2].lower())


class MediaPath(NamedTuple):
    """A picture, video or PDF that a message names."""

    path: Path
    kind: str


def typed_path(text: str) -> str:
    """One path or name, without the quotes and backslashes that terminals add."""
    if found := find_file(text):
        return str(found)
    words = shell_words(text)
    return os.path.expanduser(words[0] if len(words) == 1 else text)


def typed_files(text: str) -> list[Path]:
    """The existing files that `text` names: one verbatim, or several, split as by a shell.

    Raises Qwen35Error if one of them does not exist.
    """
    if found := find_file(text):
        return [found]
    words = shell_words(text)
    files = {word: find_file(word) for word in words}
    missing = [word for word, file in files.items() if file is None]
    if missing or not words:
        # If no word is a file, the words are one name with spaces.
        name = missing[0] if 0 < len(missing) < len(words) else text
        raise Qwen35Error(f"no file {name}", expected="the path of a file")
    return [file for word in words if (file := files[word])]


def typed_documents(text: str) -> tuple[list[Path], list[Path]]:
    """The files that `text` names, and those in its folders and patterns such as **/*.py.

    The second list has no hidden or generated files and folders.
    """
    named: list[Path] = []
    found: list[Path] = []
    whole = find_file(text)
    for word in [text] if whole else shell_words(text) or [text]:
        path = find_file(word)
        if path is not None and not path.is_dir():
            named.append(path)
        elif path is not None:
            found += _files_in(path, None, word)
        elif any(sign in word for sign in "*?["):
            parts = Path(os.path.expanduser(word)).parts
            first = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
            found += _files_in(Path(*parts[:first]), os.path.join(*parts[first:]), word)
        else:
            named += typed_files(word if shell_words(text)[1:] else text)
    return named, found


def _files_in(folder: Path, pattern: str | None, typed: str) -> list[Path]:
    """The files in a folder that match a pattern, or all of them, sorted."""
    files: list[Path] = []
    try:
        for file in _walk(folder) if pattern is None else folder.glob(pattern):
            if not any(map(_is_left_out, file.relative_to(folder).parts)) and file.is_file():
                files.append(file)
            if len(files) > MAX_FOUND:
                expected = f"at most {MAX_FOUND:,}"
                raise Qwen35Error(f"{typed} has too many files", expected=expected)
    except Qwen35Error:
        raise
    except OSError:
        # What was found before is enough.
        pass
    except (ValueError, NotImplementedError) as error:
        hint = "** stands alone between slashes, as in src/**/*.py"
        raise Qwen35Error(f"{typed} is no pattern of files", got=error, hint=hint) from None
    if not files:
        raise Qwen35Error(f"no file in {typed}", expected="a folder or a pattern of files")
    return sorted(files)


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_left_out(name))
        yield from (Path(root, name) for name in names)


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name in GENERATED


def find_file(text: str) -> Path | None:
    """The file or folder with this name; None if there is none, or it is not a valid path.

    If it is missing, a file whose name differs only in kinds of spaces and in the composition of
    accents: macOS puts a narrow space into the names of screenshots, and other programs change it
    to a plain space.
    """
    if not text:
        return None
    path = Path(os.path.expanduser(text))
    if os.path.exists(path):
        return path
    alike: list[Path] = []
    with suppress(OSError, ValueError):
        wanted = _folded(path.name)
        alike = [file for file in path.parent.iterdir() if _folded(file.name) == wanted]
    return alike[0] if len(alike) == 1 else None


def split_media(text: str) -> tuple[str, list[MediaPath], list[str]]:
    """A message without the pictures, videos and PDFs that it names; these; and missing ones.

    A path may be plain, in quotes, with backslashes before its spaces, or a file URL. A path with a
    folder and such an ending that does not exist is missing.
    """
    found: list[MediaPath] = []
    missing: list[str] = []
    kept, at = "", 0
    # Most messages name no such file.
    starts = re.finditer(r"(?<!\S)\S", text) if NAME_END.search(text) else ()
    for start in (match.start() for match in starts):
        if start < at:
            continue
        names = list(_names(text, start))
        for name, end in names:
            # Bare names are common in prose, so no folder is searched for them.
            path = find_file(name) if WITH_FOLDER.match(name) else Path(name)
            if path and os.path.isfile(path):
                found.append(MediaPath(path, media_kind(name) or "image"))
                kept, at = _joined(kept, text[at:start]), end
                break
        else:
            surely = [name for name, end in names if " " not in name or end - start == len(text)]
            missing += [name for name in surely if WITH_FOLDER.match(name)][:1]
    return _joined(kept, text[at:]).strip(), found, missing


def _names(text: str, start: int) -> Iterator[tuple[str, int]]:
    """Names of media files that may begin here, each with its end in the text."""
    word = SHELL_WORD.match(text, start)
    unquoted = shell_words(word[0]) if word else []
    if word and unquoted and (end := LAST_END.search(unquoted[0])):
        # Punctuation after the name belongs to the sentence, unless it is quoted too.
        behind = end[2]
        if word[0].endswith(behind):
            yield unquoted[0].removesuffix(behind), word.end() - len(behind)
    if WITH_FOLDER.match(text, start) or start == 0:
        line = text[start:].partition("\n")[0]
        for ending in islice(NAME_END.finditer(line), MAX_ENDINGS):
            yield line[: ending.end()], start + ending.end()


def _joined(before: str, behind: str) -> str:
    """Join two parts of a text from which a path between them was removed."""
    if not before or not behind:
        return before + behind
    gap = "" if before[-1] == "\n" or behind[0] in "\n,.;:!?)" else " "
    return before.rstrip(" ") + gap + behind.lstrip(" ")


def shell_words(text: str) -> list[str]:
    """The words of `text` in a shell's syntax, file URLs as paths; empty if a quote is open."""
    try:
        words = shlex.split(text)
    except ValueError:
        return []
    # Remove any host; ? and # are part of the path.
    return [unquote(re.sub("^file://[^/]*", "", w)) if w[:7] == "file://" else w for w in words]


def _folded(name: str) -> str:
    """A name with composed accents and plain spaces."""
    return " ".join(unicodedata.normalize("NFKC", name).split())
