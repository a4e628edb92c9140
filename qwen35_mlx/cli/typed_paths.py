"""Paths as people type, paste or drop them into a terminal."""

import os
import shlex
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..errors import Qwen35Error


def typed_path(text: str) -> str:
    """One path or name without the quotes and backslashes that a terminal adds to it."""
    if _exists(text):
        return os.path.expanduser(text)
    words = _words(text)
    return os.path.expanduser(words[0] if len(words) == 1 else text)


def typed_files(text: str) -> list[Path]:
    """The existing files that `text` names: one as it is typed, or several as a shell splits them.

    Raises Qwen35Error if one of them is not there.
    """
    if _exists(text):
        return [Path(os.path.expanduser(text))]
    words = _words(text)
    missing = [word for word in words if not _exists(word)]
    if missing or not words:
        # Several words of which none is a file are one name with spaces.
        name = missing[0] if 0 < len(missing) < len(words) else text
        raise Qwen35Error(f"no file {name}", expected="the path of a file")
    return [Path(os.path.expanduser(word)) for word in words]


def _words(text: str) -> list[str]:
    """What a shell makes of `text`, with file URLs as paths; nothing where a quote is left open."""
    try:
        words = shlex.split(text)
    except ValueError:
        return []
    return [unquote(urlsplit(w).path) if w.startswith("file://") else w for w in words]


def _exists(text: str) -> bool:
    """False also for what cannot be a path."""
    return bool(text) and os.path.exists(os.path.expanduser(text))
