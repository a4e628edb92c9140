"""Shell completion of values; imports no MLX."""

import os
import shlex
from typing import Any


def models(ctx: Any, args: list[str], incomplete: str) -> list[str]:
    """Folders that this user converted; if none matches, the shell completes files."""
    from .local_models import recorded

    folders = [f for f in reversed(recorded()) if os.path.isdir(f)]
    return [f for f in folders if _is_plain(f) and f.startswith(incomplete)]


def sessions(ctx: Any, args: list[str], incomplete: str) -> list[str]:
    """Names of saved conversations."""
    from ..errors import Qwen35Error
    from ..files import session_home

    try:
        names = sorted(file.stem for file in session_home().glob("[!.]*.json"))
    except Qwen35Error:
        return []
    return [name for name in names if _is_plain(name) and name.startswith(incomplete)]


def recipes(ctx: Any, args: list[str], incomplete: str) -> list[str]:
    """Names of recipes."""
    return [name for name in "q8 q6 q5 q4 q3 q2".split() if name.startswith(incomplete)]


def _is_plain(word: str) -> bool:
    # Typer's scripts insert words without quoting.
    return shlex.quote(word) == word
