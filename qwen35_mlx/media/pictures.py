"""Picture: a file, bytes or an array, resized bit-equal to the official preprocessing."""

import base64
import binascii
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..errors import MediaError, first_line
from .heic import is_heic, read_heic
from .patches import picture_patches, picture_size, pixel_digest
from .settings import VisionSettings
from .tokens import Shown

if TYPE_CHECKING:
    from PIL.Image import Image

Source: TypeAlias = "str | os.PathLike[str] | bytes | Image | np.ndarray | Picture"

# Pillow has about forty more formats; few of them are well tested, and EPS starts a program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
FORMATS_READ = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or HEIC"
# 8192x8192: Pillow takes 4 bytes per pixel, and rotating or flattening makes a copy.
MAX_PIXELS = 2**26
MAX_FILE_BYTES = 2**29
STRIP_ROWS = 512
SIXTEEN_BIT = "I;16"


@dataclass(frozen=True, eq=False)
class Picture(Shown):
    """A picture, resized for the model; equal to one with the same pixels and settings."""

    name: str
    original_size: tuple[int, int]  # width, height
    pixels: np.ndarray  # uint8 [H, W, 3], resized
    settings: VisionSettings

    def __post_init__(self) -> None:
        # The digest identifies the pixels, so they must not change.
        self.pixels.setflags(write=False)

    @cached_property
    def digest(self) -> bytes:
        """sha256 of the pixels and of what the patches depend on."""
        return pixel_digest(self.pixels, self.settings)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frame groups, rows and columns of patches."""
        height, width = (side // self.settings.patch_size for side in self.pixels.shape[:2])
        return 1, height, width

    def patches(self) -> np.ndarray:
        """float32 [h*w, 3*p*p]: one temporal slice; the official patches hold it twice."""
        return picture_patches(self.pixels, self.settings)

    def describe(self) -> str:
        """Name, size and tokens."""
        width, height = self.original_size
        return f"{self.name}, {width}x{height}, {self.num_tokens:,} tokens"


def open_picture(source: Source, settings: VisionSettings, name: str = "picture") -> Picture:
    """Open a path, bytes, a data: URL, a Pillow image or an array of uint8 [H, W] or [H, W, C].

    `name`: for pictures that are not files. Of an animation it takes the first frame.
    """
    if isinstance(source, Picture):
        return source
    if isinstance(source, str) and source.startswith("data:"):
        source = data_url_bytes(source)
    if isinstance(source, str | os.PathLike):
        path = checked_path(source)
        name = path.name
        with path.open("rb") as file:
            return _from_file(file, name, settings)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_file(io.BytesIO(source), name, settings)
    with refusals(name):
        return picture_of(image_of(source, name), name, settings)


def checked_path(source: str | os.PathLike[str]) -> Path:
    """The path of a readable regular file that is not empty; raises MediaError otherwise."""
    text = os.fspath(source)
    if text.startswith(("http://", "https://")):
        raise MediaError(
            f"{text} is an address, not a file", hint="save it and give the path of the file"
        )
    path = Path(text).expanduser()
    try:
        if not path.is_file():
            found = "no regular file" if path.exists() else "not there"
            what = f"is {'a folder' if path.is_dir() else found}"
            raise MediaError(f"{path} {what}", expected="a file")
        num_bytes = path.stat().st_size
        with path.open("rb"):
            pass
    except (OSError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{path} cannot be read", got=error) from None
    if num_bytes == 0:
        raise MediaError(f"{path} is empty", got="0 bytes")
    return path


def data_url_bytes(url: str) -> bytes:
    """The content of a base64 data: URL."""
    header, comma, data = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise MediaError(
            "the data: URL cannot be read", got=header[:60], expected="data:image/png;base64,…"
        )
    try:
        # Some writers insert line breaks.
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError("the data: URL cannot be read", got=error, expected="base64") from None


def picture_of(
    image: "Image", name: str, settings: VisionSettings, *, is_ours: bool = False
) -> Picture:
    """Flatten and resize a decoded or a lazily opened image."""
    from PIL import Image

    check_pixels(image.size, name)
    image = flattened(image, name, is_ours=is_ours)
    height, width = picture_size(image.height, image.width, settings)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return Picture(name, image.size, np.array(resized), settings)


def too_large(name: str, got: str | None, expected: str, hint: str = "") -> MediaError:
    """The error for a file that may not fit into memory."""
    return MediaError(f"{name} is too large to open", got=got, expected=expected, hint=hint)


def check_pixels(size: tuple[int, int], name: str) -> None:
    """Refuse a picture that is too large, before it is decoded."""
    width, height = size
    if width * height > MAX_PIXELS:
        got = f"{width}x{height}, {width * height / 1e6:.0f} million pixels"
        expected = f"at most {MAX_PIXELS / 1e6:.0f} million"
        raise too_large(name, got, expected, "make it smaller first")


def flattened(image: "Image", name: str, *, is_ours: bool = False) -> "Image":
    """The image in RGB, rotated by its EXIF, transparency on white.

    `is_ours`: the image may be changed in place, which saves a copy.
    """
    from PIL import Image, ImageOps

    if is_ours:
        ImageOps.exif_transpose(image, in_place=True)
    else:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(SIXTEEN_BIT):
        # Pillow would clip all values above 255 to white.
        levels = np.asarray(image)
        scaled = np.empty(levels.shape, np.uint8)
        for top in range(0, image.height, STRIP_ROWS):
            rows = levels[top : top + STRIP_ROWS].astype(np.uint32)
            scaled[top : top + STRIP_ROWS] = (rows + 128) // 257
        return Image.fromarray(scaled).convert("RGB")
    if image.mode in ("I", "F"):
        raise MediaError(
            f"{name} has pixels without a known range",
            got=f"mode {image.mode}, 32 bits a pixel",
            expected="8 or 16 bits",
            hint="scale it to 8 bits first",
        )
    if image.has_transparency_data:
        flat = Image.new("RGB", image.size)
        # In strips, because a whole image would take three copies.
        for top in range(0, image.height, STRIP_ROWS):
            box = (0, top, image.width, min(top + STRIP_ROWS, image.height))
            strip = image.crop(box).convert("RGBA")
            white = Image.new("RGBA", strip.size, "white")
            flat.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
        return flat
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_file(file: Any, name: str, settings: VisionSettings) -> Picture:
    from PIL import Image, UnidentifiedImageError

    head = file.read(64)
    file.seek(0)
    with refusals(name):
        if is_heic(head):
            image = read_heic(file.read(MAX_FILE_BYTES), name)
            return picture_of(image, name, settings, is_ours=True)
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            what = kind(head)
            is_broken = what.startswith("a picture")
            raise MediaError(
                f"{name} is {'damaged or incomplete' if is_broken else 'in an unknown format'}",
                got=what,
                expected=None if is_broken else FORMATS_READ,
            ) from None
        with image:
            return picture_of(image, name, settings, is_ours=True)


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """Turn everything that Pillow raises for a damaged file into a MediaError."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # Warnings about odd metadata, and about sizes, which have a limit here.
            warnings.simplefilter("ignore")
            yield
    except MediaError as error:
        raise error if name in str(error) else MediaError(f"{name}: {error}") from None
    except MemoryError:
        raise MediaError(f"{name} does not fit into memory") from None
    except Image.DecompressionBombError:
        limit = f"at most {MAX_PIXELS / 1e6:.0f} million pixels"
        raise too_large(name, None, limit) from None
    except Exception as error:
        raise MediaError(f"{name} is damaged or incomplete", got=first_line(error)) from None


def image_of(source: object, name: str) -> "Image":
    """A Pillow image, or an array as one."""
    from PIL import Image

    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, np.ndarray):
        raise MediaError(
            f"{name} cannot be opened",
            got=type(source).__name__,
            expected="a path, bytes, a data: URL, a Pillow image or a numpy array",
        )
    if source.ndim == 3 and source.shape[2] == 1:
        source = source[:, :, 0]
    is_known = source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))
    if source.dtype != np.uint8 or not is_known or 0 in source.shape:
        raise MediaError(
            f"{name} is an array that is no picture",
            got=f"{source.dtype} {list(source.shape)}",
            expected="uint8 [height, width] or [height, width, 1, 3 or 4]",
        )
    return Image.fromarray(np.ascontiguousarray(source))


# First bytes of files that people try to open, and their names.
KINDS = (
    (b"%PDF", "a PDF"),
    (b"\x1aE\xdf\xa3", "a video (Matroska, WebM)"),
    (b"PK\x03\x04", "a ZIP archive or an office document"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "XML (SVG?)"),
    (b"<!DOCTYPE", "a web page"),
    (b"<html", "a web page"),
    (b"8BPS", "a Photoshop file"),
    (b"%!PS", "PostScript"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x89PNG", "a picture (PNG)"),
    (b"\xff\xd8\xff", "a picture (JPEG)"),
    (b"GIF8", "a picture (GIF)"),
    (b"BM", "a picture (BMP)"),
    (b"II*\0", "a picture (TIFF)"),
    (b"MM\0*", "a picture (TIFF)"),
)
RIFF_KINDS = {b"AVI ": "a video (AVI)", b"WEBP": "a picture (WebP)", b"WAVE": "sound (WAV)"}


def kind(head: bytes) -> str:
    """The kind of a file by its first bytes, in words."""
    if head[4:8] == b"ftyp":
        is_picture = is_heic(head) or head[8:12] in (b"avif", b"avis")
        return "a picture (AVIF, HEIC)" if is_picture else "a video (MP4, MOV)"
    if head[:4] == b"RIFF" and head[8:12] in RIFF_KINDS:
        return RIFF_KINDS[head[8:12]]
    for magic, name in KINDS:
        if head.lstrip().startswith(magic):
            return name
    return f"unknown data that begin with {head[:8]!r}"
