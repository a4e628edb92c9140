"""The label in all JSON lines of benches: machine, versions and commit."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx


def label() -> dict[str, str]:
    """Machine, system, device, versions and commit, which is empty outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "machine": platform.machine(),
        "os": platform.platform(),
        "device": str(mx.default_device()),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "commit": git.stdout.strip(),
    }
