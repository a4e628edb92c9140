"""Opens damaged pictures and videos, each in a process with limits; the last line is JSON.

Usage: python tools/fuzz_media.py [number of files] [seed]

A file must open or be refused with a MediaError. Failures are: another exception, a crash, more
than 5 seconds of CPU time, a wait of 30 seconds, and more than 1 GB of memory.
"""

import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import av  # noqa: E402, F401
import pi_heif  # noqa: E402, F401
from media_files import (  # noqa: E402
    SETTINGS,
    animated,
    encoded,
    heic_bytes,
    numbered,
    pattern_image,
    video_bytes,
)
from PIL import Image  # noqa: E402

from qwen35_mlx.errors import MediaError  # noqa: E402
from qwen35_mlx.media.pictures import open_picture  # noqa: E402
from qwen35_mlx.media.video import open_video  # noqa: E402

MAX_CPU_SECONDS, MAX_WAIT_SECONDS, MAX_BYTES = 5, 30, 2**30
# Protects the machine where the system enforces it; failures count the memory really used.
MAX_ADDRESS_BYTES = 2**33
# Lengths, counts and sizes at which parsers often fail.
NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
HEADER_BYTES = 256
# Exit codes of a process that finished: opened, or refused.
YES, NO = 0, 3
KINDS = "flipped header number cut joined moved garbage".split()


def make_seeds(folder: Path) -> None:
    """Write the valid files to start from."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        data = encoded(
            pattern_image(150, 90), format, **({} if format == "GIF" else {"exif": exif})
        )
        (folder / f"picture.{format.lower()}").write_bytes(data)
    for mode in ("RGBA", "P", "L", "1"):
        (folder / f"picture.{mode.lower()}.png").write_bytes(encoded(pattern_image(70, 110, mode)))
    for compression in ("tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits"):
        data = encoded(pattern_image(64, 64), "TIFF", compression=compression)
        (folder / f"picture.{compression}.tiff").write_bytes(data)
    (folder / "picture.16.png").write_bytes(encoded(Image.new("I;16", (50, 40), 30000)))
    (folder / "picture.progressive.jpeg").write_bytes(
        encoded(pattern_image(150, 90), "JPEG", progressive=True)
    )
    (folder / "picture.heic").write_bytes(heic_bytes(numbered(4, 128, 64)[3], 1))
    frames = [Image.fromarray(frame) for frame in numbered(8)]
    for format in ("GIF", "PNG", "WEBP"):
        data = animated(frames, [100, 50, 400, 100, 100, 100, 20, 100], format)
        (folder / f"video.{format.lower()}").write_bytes(data)
    for format, codec in (
        ("mp4", "mpeg4"),
        ("mp4", "libx264"),
        ("mp4", "libx265"),
        ("mov", "libx264"),
        ("matroska", "libx264"),
        ("webm", "libvpx-vp9"),
        ("avi", "mpeg4"),
        ("mpegts", "libx264"),
        ("flv", "libx264"),
    ):
        data = video_bytes(numbered(20), 10, format, codec)
        (folder / f"video.{codec}.{format}").write_bytes(data)


def damaged(seeds: dict[str, bytes], rng: random.Random) -> tuple[str, bytes]:
    """A name that tells the damage, and the data."""
    name, kind = rng.choice(list(seeds)), rng.choice(KINDS)
    data = bytearray(seeds[name])
    if kind == "flipped":
        for _ in range(rng.randint(1, 30)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == "header":
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(min(HEADER_BYTES, len(data)))] ^= 1 << rng.randrange(8)
    elif kind == "number":
        for _ in range(rng.randint(1, 4)):
            area = len(data) if rng.random() < 0.5 else HEADER_BYTES
            place = rng.randrange(max(1, min(area, len(data)) - 4))
            layout = rng.choice((">I", "<I", ">H", "<H", "B"))
            size = struct.calcsize(layout)
            number = rng.choice(NUMBERS) & (1 << 8 * size) - 1
            data[place : place + size] = struct.pack(layout, number)
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "joined":
        other = rng.choice(list(seeds.values()))
        data = data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]
    elif kind == "moved":
        begin, end = sorted(rng.randrange(len(data)) for _ in range(2))
        piece = data[begin:end]
        if rng.random() < 0.5:
            del data[begin:end]
        place = rng.randrange(len(data) + 1)
        data[place:place] = piece
    else:
        data[rng.randint(0, 40) :] = rng.randbytes(rng.randint(0, 5000))
    if data.startswith(b"\x89PNG") and rng.random() < 0.8:
        # Without this, Pillow would stop at the wrong checksum.
        repair_png(data)
    return f"{name} {kind}", bytes(data)


def repair_png(data: bytearray) -> None:
    """Write the right checksum after each chunk."""
    place = 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 8 + length
        if end + 4 > len(data):
            return
        struct.pack_into(">I", data, end, zlib.crc32(data[place + 4 : end]))
        place = end + 4


def open_any(name: str, data: bytes) -> bool:
    """Open it as a picture and as a video, read all that a model would; whether one opened."""
    is_open = False
    for opener in (open_picture, open_video):
        try:
            media = opener(data, SETTINGS, name=name)
        except MediaError:
            continue
        media.patches()
        assert sum(len(span.tokens()) for span in media.spans) == media.num_tokens
        media.describe()
        is_open = True
    return is_open


def outcome(job: Callable[[], object]) -> bool | str:
    """Run it in a process of its own; returns its result, or a text on what failed."""
    with tempfile.TemporaryFile() as messages:
        process = os.fork()
        if process == 0:
            child(job, messages.fileno())
        _, status, usage = os.wait4(process, 0)
        messages.seek(0)
        said = messages.read().decode(errors="replace").strip()
    peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if os.WIFSIGNALED(status):
        names = {signal.SIGXCPU: "too slow", signal.SIGALRM: "hangs", signal.SIGKILL: "killed"}
        number = os.WTERMSIG(status)
        return f"{names.get(number, f'crashed by signal {number}')} {said}"
    code = os.waitstatus_to_exitcode(status)
    if code not in (YES, NO):
        return said or f"exit {code}"
    if peak_bytes > MAX_BYTES:
        return f"took {peak_bytes / 1e6:.0f} MB"
    return code == YES


def child(job: Callable[[], object], messages: int) -> None:
    """Run the job under limits and exit with its result; never returns."""
    os.dup2(messages, 1)
    os.dup2(messages, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS + 1))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_BYTES, MAX_ADDRESS_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(MAX_WAIT_SECONDS)
    code = 1
    try:
        code = YES if job() else NO
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def seed_files() -> dict[str, bytes]:
    """Name -> data; made in a process of its own, because encoders leave threads behind."""
    with tempfile.TemporaryDirectory() as folder:
        problem = outcome(lambda: make_seeds(Path(folder)))
        assert problem is False, problem
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def main(num_files: int, seed: int) -> int:
    """The number of failures; each is kept in the current folder."""
    seeds, rng, failures, opened = seed_files(), random.Random(seed), 0, 0
    for name, data in seeds.items():
        assert outcome(lambda n=name, d=data: open_any(n, d)) is True, name
    for index in range(num_files):
        name, data = damaged(seeds, rng)
        result = outcome(lambda n=name, d=data: open_any(n, d))
        opened += result is True
        if isinstance(result, str):
            failures += 1
            kept = Path(f"fuzz-{seed}-{index}.bin")
            kept.write_bytes(data)
            print(f"{kept} ({name}): {result}")
        if index % 500 == 499:
            print(f"{index + 1} of {num_files} files, {failures} failures", file=sys.stderr)
    print(json.dumps(dict(fuzz_failures=failures, files=num_files, opened=opened)))
    return failures


if __name__ == "__main__":
    arguments = [int(a) for a in sys.argv[1:]] + [10_000, 0][len(sys.argv) - 1 :]
    sys.exit(main(*arguments) > 0)
