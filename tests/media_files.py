"""Pictures and videos for tests: patterns that any machine makes alike, and files of them."""

import io
import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from qwen35_mlx.media.settings import VisionSettings

# What the released checkpoints say.
PICTURE_CONFIG = dict(
    size=dict(shortest_edge=65536, longest_edge=16777216),
    patch_size=16,
    temporal_patch_size=2,
    merge_size=2,
    image_mean=[0.5, 0.5, 0.5],
    image_std=[0.5, 0.5, 0.5],
)
VIDEO_CONFIG = PICTURE_CONFIG | dict(size=dict(shortest_edge=4096, longest_edge=25165824))
HALF = (0.5, 0.5, 0.5)
SETTINGS = VisionSettings(16, 2, 2, HALF, HALF, 65536, 16777216, 4096, 25165824)
# Small limits, for tests that open many: 16 to 64 tokens.
SMALL = VisionSettings(16, 2, 2, HALF, HALF, 16 * 1024, 64 * 1024, 4096, 2**20)


def pattern(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, channels]: gradients and edges, by whole numbers alone."""
    y, x, c = np.ogrid[:height, :width, :channels]
    value = x * 7 + y * 13 + c * 50 + (x * y) // 5 + seed * 31
    edges = np.where((x // 9 + y // 7 + seed) % 3 == 0, 255, 0)
    return np.where((x + y) % 4 < 2, value % 256, edges).astype(np.uint8)


def pattern_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """The pattern in a mode of Pillow."""
    if mode == "P":
        image = Image.fromarray(pattern(width, height, 1)[:, :, 0], "P")
        image.putpalette(pattern(16, 16, 3, seed=5).tobytes())
        return image
    if mode == "RGBA":
        return Image.fromarray(pattern(width, height, 4))
    return Image.fromarray(pattern(width, height)).convert(mode)


# Name -> how to make it; what a golden file holds of each.
PICTURES = {
    "1x1": (1, 1, "RGB"),
    "10x2000": (10, 2000, "RGB"),
    "halves to even, 80x528": (80, 528, "RGB"),
    "no resize, 320x224": (320, 224, "RGB"),
    "screenshot, 1366x768": (1366, 768, "RGB"),
    "alpha, 301x299": (301, 299, "RGBA"),
    "gray, 333x257": (333, 257, "L"),
    "one bit, 257x333": (257, 333, "1"),
    "palette, 270x401": (270, 401, "P"),
    "ink, 300x300": (300, 300, "CMYK"),
}
# frames, fps, width, height; none needs a resize
VIDEOS = {
    "9 frames at 2": (9, 2, 64, 96),
    "61 frames at 25": (61, 25, 64, 64),
    "8 frames at 2": (8, 2, 96, 64),
}
# frames, fps
SAMPLINGS = [(total, 30.0) for total in (2, 3, 4, 5, 7, 59, 60, 61, 107, 300, 1799, 54000)] + [
    (300, 25.0),
    (301, 29.97),
    (1000, 23.976),
    (12, 1.0),
    (5, 0.5),
    (9999, 240.0),
]
# width x height
PICTURE_SIZES = [
    tuple(map(int, size.split("x")))
    for size in """1x1 16x16 64x64 10x2000 2000x10 80x80 336x240 1366x768 3024x4032 4100x4100
    8000x8000 5000x31 4081x4111 111x4100""".split()
]
# width x height x frames
VIDEO_SIZES = [
    tuple(map(int, size.split("x")))
    for size in """1920x1080x4 1920x1080x120 20x70x12 31x400x7 64x64x2 640x360x768 1280x720x5
    16x16x3 3840x2160x61 1080x1920x2 1x1x9""".split()
]


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """A file of a picture."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def animated(
    frames: Sequence[Image.Image], durations: int | list[int], format: str = "GIF"
) -> bytes:
    """A file of an animation; durations in ms."""
    return encoded(
        frames[0],
        format,
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        **(dict(lossless=True) if format == "WEBP" else {}),
    )


# All of good quality; the frames of x265 in order, and without its messages.
CODEC_OPTIONS = {
    "mpeg4": dict(qmin="1", qmax="2"),
    "libx264": dict(crf="8", preset="veryfast", bf="2"),
    "libx265": {"x265-params": "crf=8:bframes=0:keyint=1:log-level=none:pools=none"},
    "libvpx-vp9": dict(crf="8", deadline="realtime"),
}


def video_bytes(
    frames: Iterable[np.ndarray],
    fps: int = 10,
    format: str = "mp4",
    codec: str = "mpeg4",
    times: Sequence[float] | None = None,
) -> bytes:
    """A video file; `times` in seconds make a variable frame rate. Colours change a little."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.thread_count = 1
        stream.codec_context.options = CODEC_OPTIONS[codec]
        stream.codec_context.time_base = Fraction(1, 1000 if times else fps)
        for index, pixels in enumerate(frames):
            if index == 0:
                stream.height, stream.width = pixels.shape[:2]
                stream.pix_fmt = "yuv420p"
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = round(times[index] * 1000) if times else index
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def heic_bytes(pixels: np.ndarray, quarters: int = 0) -> bytes:
    """A HEIC file: a frame of HEVC, turned counterclockwise by quarters when it is shown."""
    mp4 = video_bytes([pixels], codec="libx265")
    place = mp4.index(b"hvcC") - 4
    hvcc = mp4[place : place + int.from_bytes(mp4[place : place + 4])]
    place = mp4.index(b"mdat")
    sample = mp4[place + 4 : place - 4 + int.from_bytes(mp4[place - 4 : place])]

    def box(kind: bytes, *parts: bytes, version: int | None = None) -> bytes:
        head = b"" if version is None else bytes([version, 0, 0, 0])
        body = kind + head + b"".join(parts)
        return struct.pack(">I", len(body) + 4) + body

    height, width = pixels.shape[:2]
    ispe = box(b"ispe", struct.pack(">II", width, height), version=0)
    irot = box(b"irot", bytes([quarters]))
    ipma = box(b"ipma", struct.pack(">IHB3B", 1, 1, 3, 0x81, 0x02, 0x83), version=0)
    infe = box(b"infe", struct.pack(">HH", 1, 0), b"hvc1\0", version=2)
    ftyp = box(b"ftyp", b"heic\0\0\0\0mif1heic")

    def meta(offset: int) -> bytes:
        where = struct.pack(">BBHHHHII", 0x44, 0, 1, 1, 0, 1, offset, len(sample))
        return box(
            b"meta",
            box(b"hdlr", bytes(4), b"pict", bytes(13), version=0),
            box(b"pitm", struct.pack(">H", 1), version=0),
            box(b"iloc", where, version=0),
            box(b"iinf", struct.pack(">H", 1), infe, version=0),
            box(b"iprp", box(b"ipco", hvcc, ispe, irot), ipma),
            version=0,
        )

    begin = len(ftyp) + len(meta(0)) + 8
    return ftyp + meta(begin) + box(b"mdat", sample)


def numbered(count: int, width: int = 64, height: int = 64) -> list[np.ndarray]:
    """Frames that say which they are: `number_of` reads it back after a codec."""
    frames = []
    for index in range(count):
        frame = np.zeros((height, width, 3), np.uint8)
        for bit in range(8):
            # Stripes, as bright as a bit is set.
            left, right = width * bit // 8, width * (bit + 1) // 8
            frame[:, left:right] = 230 if index >> bit & 1 else 25
        frames.append(frame)
    return frames


def number_of(frame: np.ndarray) -> int:
    """Which of the `numbered` frames this is."""
    width = frame.shape[1]
    middle = frame[frame.shape[0] // 2]
    return sum(1 << bit for bit in range(8) if middle[width * (2 * bit + 1) // 16].mean() > 128)
