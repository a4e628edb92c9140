"""How many of 200 pictures the demo names through this program, at 16 and at 4 bits.

Ends with one JSON line.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "demo"))
from evaluate import SOURCE, pictures_right

from qwen35_mlx.convert import convert

GATE = 0.98


def pictures_right_by_bits() -> dict[str, float]:
    """Shares of the pictures that were named exactly."""
    with tempfile.TemporaryDirectory() as home:
        folders = {
            "16bit": convert(SOURCE, Path(home) / "16bit", dtype="bfloat16"),
            "4bit": convert(SOURCE, Path(home) / "4bit", bits=4),
        }
        found = {name: pictures_right(folder) for name, folder in folders.items()}
    return {f"pictures_right_{name}": share or 0.0 for name, share in found.items()}


if __name__ == "__main__":
    shares = pictures_right_by_bits()
    print(json.dumps(shares))
    sys.exit(min(shares.values()) < GATE)
