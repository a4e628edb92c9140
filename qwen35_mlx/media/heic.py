"""HEIC, the format of iPhone photos: through pi-heif, or on a Mac through `sips`."""

import io
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image

BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
SIPS_SECONDS = 60


def is_heic(head: bytes) -> bool:
    """Whether a file with these first bytes is HEIC; AVIF is similar, and Pillow reads it."""
    if head[4:8] != b"ftyp":
        return False
    brands = [head[8:12], *(head[i : i + 4] for i in range(16, len(head) - 3, 4))]
    return brands[0] in BRANDS and b"avif" not in brands


def read_heic(data: bytes, name: str) -> "Image":
    """Decode the primary picture, rotated as its metadata say."""
    from PIL import Image

    try:
        import pi_heif
    except ImportError:
        if sys.platform == "darwin":
            return _through_sips(data, name)
        raise MediaError(
            f"{name} is a HEIC picture; reading it takes one more package",
            hint="pip install 'qwen35-mlx[heic]', or save it as JPEG",
        ) from None
    from .pictures import check_pixels

    heif = pi_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=True)
    check_pixels(heif.size, name)
    # libheif has rotated it; without its EXIF it is not rotated again.
    return Image.frombytes(heif.mode, heif.size, heif.data, "raw", heif.mode, heif.stride)


def _through_sips(data: bytes, name: str) -> "Image":
    from PIL import Image

    with tempfile.TemporaryDirectory(prefix="qwen35-mlx-") as folder:
        source, target = Path(folder, "picture.heic"), Path(folder, "picture.png")
        source.write_bytes(data)
        command = ["sips", "-s", "format", "png", str(source), "--out", str(target)]
        try:
            result = subprocess.run(command, capture_output=True, timeout=SIPS_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MediaError(f"{name} is a HEIC picture; sips failed", got=error) from None
        if result.returncode != 0 or not target.is_file():
            said = result.stderr.decode(errors="replace").strip()
            raise MediaError(f"{name} is a HEIC picture that sips cannot read", got=said or None)
        return Image.open(io.BytesIO(target.read_bytes()), formats=("PNG",))
