"""The demo checkpoint in the package, and where this user's converted copy of it lives."""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).parent / "demo"


def cache_home() -> Path:
    """This user's cache folder; the environment variable QWEN35_MLX_CACHE overrides it."""
    if own := os.environ.get("QWEN35_MLX_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qwen35-mlx"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qwen35-mlx"


def converted_demo(convert: Callable[[Path, Path], Path]) -> Path:
    """The converted demo; `convert(source, out)` makes it once for every state of its files."""
    digest = hashlib.sha256()
    for file in sorted(SOURCE.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    folder = cache_home() / f"demo-4bit-{digest.hexdigest()[:12]}"
    # The config is written last: a folder that has it is complete.
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        convert(SOURCE, folder)
    return folder
