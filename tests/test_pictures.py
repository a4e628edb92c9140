"""Pictures: equal to the official preprocessing to the bit; what cannot be used is refused."""

import base64
import hashlib
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from everyday import everyday
from media_files import (
    PICTURE_SIZES,
    PICTURES,
    SETTINGS,
    SMALL,
    animated,
    encoded,
    heic_bytes,
    numbered,
    pattern,
    pattern_image,
)
from PIL import Image, ImageOps

from qwen35_mlx.errors import MediaError
from qwen35_mlx.media import heic
from qwen35_mlx.media.patches import picture_size
from qwen35_mlx.media.pictures import Picture, open_picture

GOLDEN = json.loads((Path(__file__).parent / "golden" / "media.json").read_text())


@pytest.mark.parametrize("name", everyday(PICTURES, 0, 1, 2, 3, 5, 6, 7, 8, 9))
def test_patches_have_the_bits_of_the_official_processor(name):
    picture = open_picture(pattern_image(*PICTURES[name]), SETTINGS)
    assert list(picture.grid) == GOLDEN["pictures"][name]["grid"]
    patches = picture.patches().astype("<f4")
    assert hashlib.sha256(patches).hexdigest() == GOLDEN["pictures"][name]["sha256"]


def test_sizes_are_those_of_the_official_processor():
    ours = [list(picture_size(height, width, SETTINGS)) for width, height in PICTURE_SIZES]
    assert ours == GOLDEN["picture_sizes"]


def pixels(source: object) -> np.ndarray:
    return open_picture(source, SMALL).pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_by_its_exif(orientation):
    upright = pattern_image(160, 96)
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turn[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(encoded(stored, exif=exif)), pixels(upright))


def test_what_is_transparent_is_white():
    """The colours behind were shown: often black, sometimes what the author had cut out."""
    hidden = np.zeros((64, 64, 4), np.uint8)
    hidden[:, :32] = (255, 0, 0, 255)
    gray = Image.merge("LA", [Image.new("L", (64, 64)), Image.fromarray(hidden[:, :, 3])])
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.paste(0, (0, 0, 32, 64))
    keyed = Image.new("RGB", (64, 64), (1, 2, 3))
    keyed.paste((255, 0, 0), (0, 0, 32, 64))
    for source in (
        hidden,
        Image.fromarray(hidden),
        encoded(Image.fromarray(hidden)),
        encoded(Image.fromarray(hidden), "WEBP", lossless=True),
        encoded(palette, transparency=1),
        encoded(keyed, transparency=(1, 2, 3)),
    ):
        seen = pixels(source)
        assert (seen[:, -40:] == 255).all()
        assert (seen[:, :40] == (255, 0, 0)).all()
    assert (pixels(gray)[:, -40:] == 255).all()
    assert (pixels(gray)[:, :40] == 0).all()


def test_half_transparent_is_mixed_with_white():
    assert (pixels(np.full((64, 64, 4), (0, 0, 0, 51), np.uint8)) == 204).all()


def test_sixteen_bits_are_scaled_not_clipped():
    """30000 of 65535 became white."""
    levels = np.full((64, 64), 30000, np.uint16)
    levels[:, :32] = 65535
    for source in (Image.fromarray(levels), encoded(Image.fromarray(levels))):
        seen = pixels(source)
        assert (seen[:, -40:] == round(30000 / 257)).all()
        assert (seen[:, :40] == 255).all()
    big_endian = Image.frombytes("I;16B", (64, 64), levels.astype(">u2").tobytes())
    assert np.array_equal(pixels(big_endian), pixels(Image.fromarray(levels)))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_range_are_refused(mode):
    with pytest.raises(MediaError, match=f"range\n  got: mode {mode}"):
        open_picture(Image.new(mode, (64, 64)), SMALL)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_an_animation_shows_its_first_frame(format):
    first, second = pattern_image(64, 64, "L"), pattern_image(64, 64, "L").rotate(90)
    assert np.array_equal(pixels(animated([first, second], 100, format)), pixels(first))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_formats_that_are_read(format):
    seen = pixels(encoded(Image.new("RGB", (48, 48), (200, 40, 90)), format))
    assert np.abs(seen.astype(int) - (200, 40, 90)).max() <= 12


def test_a_photo_with_more_pictures_inside_shows_the_first():
    """What many phones call .jpg; Pillow calls it MPO."""
    first = pattern_image(64, 64, "L").convert("RGB")
    data = encoded(first, "MPO", save_all=True, append_images=[first.rotate(90)], quality=95)
    assert b"MPF" in data
    assert np.abs(pixels(data).astype(int) - pixels(first)).mean() < 12


@pytest.mark.parametrize("format", ["PPM", "TGA", "ICO", "EPS", "PCX", "JPEG2000"])
def test_other_formats_are_refused_though_pillow_reads_them(format):
    with pytest.raises(MediaError, match="PNG, JPEG, WebP") as refusal:
        open_picture(encoded(Image.new("RGB", (48, 48)), format), SMALL, name="shot")
    assert str(refusal.value).startswith("shot is in an unknown format")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"%PDF-1.7\n", "a PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG"),
        (b"\0\0\0\x20ftypisom", "a video"),
        (b"PK\3\4abc", "a ZIP archive"),
        (b"hello", "unknown data that begin with b'hello'"),
        (b"", "unknown data"),
    ],
)
def test_a_refusal_says_what_the_file_is(data, what):
    with pytest.raises(MediaError, match=f"got: {what}"):
        open_picture(data, SMALL)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_truncated_file_is_refused(format):
    data = encoded(pattern_image(300, 200), format)
    for end in (len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(MediaError, match=r"cut\.png is damaged or incomplete"):
            open_picture(data[:end], SMALL, name="cut.png")


def png_that_claims(width: int, height: int) -> bytes:
    """A small file whose header promises a large picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


@pytest.mark.parametrize("size", [(8193, 8192), (10_000, 10_000), (20_000, 20_000)])
def test_a_bomb_is_refused_before_it_is_decoded(size, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(MediaError, match="picture is too large to open"):
        open_picture(png_that_claims(*size), SMALL)


def test_strips_and_nothing_are_refused():
    open_picture(Image.new("RGB", (200, 1)), SMALL)
    with pytest.raises(MediaError, match="too narrow\n  got: 201x1"):
        open_picture(Image.new("RGB", (201, 1)), SMALL)
    with pytest.raises(MediaError, match="picture is empty"):
        open_picture(Image.new("RGB", (0, 5)), SMALL)
    with pytest.raises(MediaError):
        open_picture(png_that_claims(0, 5), SMALL)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8, 2), np.uint8),
        np.zeros((8,), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((1, 8, 8, 3), np.uint8),
    ],
)
def test_an_array_that_is_no_picture_is_refused(array):
    with pytest.raises(MediaError, match="array that is no picture"):
        open_picture(array, SMALL)


def test_all_sources_give_the_same_picture(tmp_path):
    array = pattern(100, 80)
    image = Image.fromarray(array)
    file = tmp_path / "Screenshot at 9.41\u202fPM.png"
    file.write_bytes(data := encoded(image))
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    opened = [
        open_picture(source, SMALL)
        for source in (array, array[:, ::-1][:, ::-1], image, file, str(file), data, url)
    ]
    assert len(set(opened)) == 1
    assert opened[3].name == file.name
    assert open_picture(opened[0], SETTINGS) is opened[0]
    assert np.array_equal(pixels(array[:, :, :1]), pixels(array[:, :, 0]))


def test_a_file_that_changed_is_another_picture(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(encoded(pattern_image(64, 64)))
    before = open_picture(file, SMALL)
    file.write_bytes(encoded(pattern_image(64, 64).rotate(180)))
    assert open_picture(file, SMALL) != before


def test_paths_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, what in {
        "missing.png": "is not there",
        ".": "is a folder",
        "empty.png": "is empty",
        "pipe": "is no regular file",
        "a\0b": "cannot be read|is not there",
        "x" * 300: "cannot be read|is not there",
    }.items():
        with pytest.raises(MediaError, match=what):
            open_picture(f"{tmp_path}/{name}", SMALL)
    with pytest.raises(MediaError, match="an address, not a file"):
        open_picture("https://example.org/a.png", SMALL)


@pytest.mark.parametrize("url", ["data:image/png,abc", "data:image/png;base64,?", "data:"])
def test_a_data_url_that_is_none_is_refused(url):
    with pytest.raises(MediaError, match="data: URL cannot be read"):
        open_picture(url, SMALL)


def test_pixels_cannot_be_changed_behind_the_digest():
    picture = open_picture(pattern(64, 64), SMALL)
    with pytest.raises(ValueError):
        picture.pixels[0, 0] = 0


def test_a_picture_made_again_from_its_pixels_is_equal():
    picture = open_picture(pattern(99, 70), SMALL)
    again = Picture("other name", (1, 1), picture.pixels.copy(), SMALL)
    assert again == picture and again.spans[0].tokens() == picture.spans[0].tokens()


def test_description():
    shot = open_picture(pattern(1366, 768), SETTINGS, name="shot.png")
    assert shot.describe() == "shot.png, 1366x768, 1,032 tokens"


def heic_photo() -> bytes:
    """The beginning of a file: enough to be known as HEIC."""
    return b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


def test_avif_is_not_taken_for_heic():
    assert heic.is_heic(heic_photo())
    assert not heic.is_heic(encoded(Image.new("RGB", (16, 16)), "AVIF")[:64])
    assert not heic.is_heic(b"\0\0\0\x18ftypisom\0\0\0\0")


def test_heic_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(
        MediaError, match=r"a\.heic is a HEIC.*\n.*pip install 'qwen35-mlx\[heic\]'"
    ):
        open_picture(heic_photo(), SMALL, name="a.heic")


@pytest.mark.parametrize("quarters", range(4))
def test_a_heic_photo_is_turned_once(quarters):
    """libheif turns it, and the EXIF beside it says so again."""
    pytest.importorskip("pi_heif")
    frame = numbered(5, 128, 64)[3]
    seen = pixels(heic_bytes(frame, quarters))
    upright = pixels(np.rot90(frame, quarters))
    assert seen.shape == upright.shape
    assert np.abs(seen.astype(int) - upright).mean() < 8


def test_damaged_heic_is_refused():
    pytest.importorskip("pi_heif")
    with pytest.raises(MediaError, match="picture is damaged"):
        open_picture(heic_photo(), SMALL)


def test_a_mac_decodes_heic_with_sips(monkeypatch):
    shown = pattern_image(64, 96)
    exif = Image.Exif()
    exif[0x0112] = 6

    def sips(command, **_):
        source, target = Path(command[4]), Path(command[6])
        assert command[:4] == ["sips", "-s", "format", "png"]
        assert source.read_bytes() == heic_photo()
        target.write_bytes(encoded(shown, exif=exif))
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setitem(sys.modules, "pi_heif", None)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", sips)
    assert np.array_equal(pixels(heic_photo()), pixels(shown.rotate(-90, expand=True)))

    def fails(command, **_):
        return subprocess.CompletedProcess(command, 13, b"", b"Error 13: an error")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(MediaError, match="that sips cannot read\n  got: Error 13"):
        open_picture(heic_photo(), SMALL)


def test_opening_a_picture_warns_of_nothing(recwarn):
    """Pillow warns of odd metadata on standard error, in the middle of a chat."""
    open_picture(encoded(ImageOps.grayscale(pattern_image(64, 64)).convert("P")), SMALL)
    with pytest.raises(MediaError):
        open_picture(png_that_claims(9600, 9600), SMALL)
    assert len(recwarn) == 0
