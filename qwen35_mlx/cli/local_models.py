"""The bundled demo, its converted copy, and the record of models that this user converted."""

import atexit
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from .. import __version__
from ..checkpoint.headers import INDEX_FILE, read_index
from ..config import read_config
from ..errors import Qwen35Error
from ..files import cache_home, locked, write_json

SOURCE = Path(__file__).parent.parent / "demo"
# Maximum number of recorded conversions.
MOST_RECORDED = 50


def converted_demo(convert: Callable[[Path, Path], object]) -> Path:
    """The converted demo; `convert(source, out)` makes it once per version of its files."""
    digest = hashlib.sha256(__version__.encode())
    for file in sorted(f for f in SOURCE.iterdir() if f.is_file() and f.name[0] != "."):
        digest.update(file.name.encode() + file.read_bytes())
    try:
        home = cache_home()
    except Qwen35Error:
        home = _scratch_folder()
    folder = home / f"demo-4bit-{digest.hexdigest()[:12]}"
    # A conversion appears whole or not at all, so no lock is needed once it exists.
    if not (folder / "config.json").exists():
        with _lock(folder.parent):
            if not (folder / "config.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                convert(SOURCE, folder)
    return folder


@cache
def _scratch_folder() -> Path:
    """For a user without a home folder, one that is removed when this process ends."""
    folder = mkdtemp(prefix="qwen35-mlx-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def record_conversion(folder: Path) -> None:
    """Record a converted folder as the newest; raises Qwen35Error if that fails."""
    home = cache_home()
    with _lock(home):
        path = str(folder.resolve())
        folders = [*(f for f in recorded() if f != path), path][-MOST_RECORDED:]
        write_json(home / "converted.json", folders)


def newest_conversion() -> Path | None:
    """The folder converted last that is still complete, or None."""
    folders = (Path(path) for path in reversed(recorded()))
    return next((folder for folder in folders if _is_whole(folder)), None)


def recorded() -> list[str]:
    """Recorded folders, oldest first; an unreadable record, or no home folder, counts as empty."""
    try:
        folders = json.loads((cache_home() / "converted.json").read_text())
    # Qwen35Error is a ValueError.
    except (OSError, ValueError):
        return []
    return [f for f in folders if isinstance(f, str)] if isinstance(folders, list) else []


def _is_whole(folder: Path) -> bool:
    """Whether a folder has its configuration, a tokenizer and every shard of the index."""
    index = folder / INDEX_FILE
    try:
        read_config(folder)
        shards = set(read_index(index).values()) if index.exists() else {"model.safetensors"}
        has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        return has_tokenizer and all((folder / name).is_file() for name in shards)
    except (OSError, Qwen35Error):
        return False


@contextmanager
def _lock(home: Path) -> Iterator[None]:
    """Lock the block against other processes, which wait."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        held = ExitStack()
        held.enter_context(locked(home / "lock"))
    except OSError as error:
        raise Qwen35Error(
            "the cache folder cannot be used",
            got=error,
            expected=f"a folder to write to at {home}",
            hint="set QWEN35_MLX_CACHE to another folder",
        ) from None
    with held:
        yield
