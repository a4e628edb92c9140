"""The demo checkpoint in the package, and where this user's converted copy of it lives."""

import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import __version__
from .errors import Qwen35Error

SOURCE = Path(__file__).parent / "demo"


def cache_home() -> Path:
    """This user's cache folder; the environment variable QWEN35_MLX_CACHE overrides it."""
    if own := os.environ.get("QWEN35_MLX_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qwen35-mlx"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qwen35-mlx"


def converted_demo(convert: Callable[[Path, Path], object]) -> Path:
    """The converted demo; `convert(source, out)` makes it once for every state of its files."""
    digest = hashlib.sha256(__version__.encode())
    for file in sorted(f for f in SOURCE.iterdir() if f.is_file() and f.name[0] != "."):
        digest.update(file.name.encode() + file.read_bytes())
    folder = cache_home() / f"demo-4bit-{digest.hexdigest()[:12]}"
    # A conversion appears whole or not at all, so nobody waits for a lock once it is there.
    if not (folder / "config.json").exists():
        with _lock(folder.parent):
            if not (folder / "config.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                convert(SOURCE, folder)
    return folder


@contextmanager
def _lock(home: Path) -> Iterator[None]:
    """One process at a time in this block; the others wait."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = (home / "lock").open("w")
    except OSError as error:
        raise Qwen35Error(
            "the converted demo cannot be stored",
            got=error,
            expected=f"a folder to write to at {home}",
            hint="set QWEN35_MLX_CACHE to another folder",
        ) from None
    with file:
        # Some network drives know no locks.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
