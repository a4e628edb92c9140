"""Video: frames sampled from a file, a list or an animation, with their times."""

# n kept frames; t frame groups

import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from ..errors import MediaError
from . import pictures
from . import settings as constants
from .patches import pixel_digest, video_patches, video_size
from .settings import VisionSettings
from .tokens import Shown

if TYPE_CHECKING:
    from PIL.Image import Image

Source: TypeAlias = "str | os.PathLike[str] | bytes | Sequence[Image | np.ndarray] | Video"

# The official preprocessing assumes this rate if none is given.
UNKNOWN_FPS = 24.0
MAX_SECONDS = 4 * 3600
MIN_FRAMES = 2
ANIMATIONS = ("GIF", "PNG", "WEBP")
# Browsers show frames with a duration below 20 ms for 100 ms.
MIN_MS, USUAL_MS = 20, 100
# To see one frame, all before it are decoded; a minute at 1080p and 30 fps has 3.7e9 pixels.
MAX_PIXELS = 2**32


@dataclass(frozen=True, eq=False)
class Video(Shown):
    """A video, sampled and resized for the model; equal to one with the same frames and times."""

    name: str
    original_size: tuple[int, int]  # width, height
    frames: np.ndarray  # uint8 [n, H, W, 3], resized
    seconds: tuple[float, ...]  # of each frame, from the beginning of the video
    settings: VisionSettings

    def __post_init__(self) -> None:
        # The digest identifies the frames, so they must not change.
        self.frames.setflags(write=False)

    @cached_property
    def digest(self) -> bytes:
        """sha256 of the frames, their times and what the patches depend on."""
        return pixel_digest(self.frames, self.settings, repr(self.seconds))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frame groups, rows and columns of patches."""
        num_frames, *sides = self.frames.shape[:3]
        height, width = (side // self.settings.patch_size for side in sides)
        return math.ceil(num_frames / self.settings.temporal_patch_size), height, width

    @property
    def timestamps(self) -> tuple[float, ...]:
        """Time of each frame group in seconds: the mean of its first and last frame."""
        size = self.settings.temporal_patch_size
        last = len(self.seconds) - 1
        return tuple(
            (self.seconds[first] + self.seconds[min(first + size - 1, last)]) / 2
            for first in range(0, len(self.seconds), size)
        )

    def patches(self) -> np.ndarray:
        """float32 [t*h*w, 3*2*p*p]; an incomplete group repeats the last frame."""
        missing = -len(self.frames) % self.settings.temporal_patch_size
        frames = np.concatenate([self.frames, *[self.frames[-1:]] * missing])
        return video_patches(frames, self.settings)

    def describe(self) -> str:
        """Name, size, time, frames and tokens."""
        width, height = self.original_size
        return (
            f"{self.name}, {width}x{height}, {self.seconds[-1]:.1f} s, "
            f"{len(self.frames)} frames, {self.num_tokens:,} tokens"
        )


class Clip(Protocol):
    """Frames that can be read once, in order."""

    times: Sequence[float]  # seconds of every frame, ascending
    fps: float | None  # None: not constant

    def read(self, indices: Sequence[int]) -> "Iterator[Image]":
        """Yield the frames as RGB, one in memory at a time. An index may occur several times."""
        ...


def open_video(
    source: Source, settings: VisionSettings, name: str = "video", fps: float | None = None
) -> Video:
    """Open a path, bytes, a data: URL, or a list of frames with their rate `fps`.

    An animated GIF, PNG or WebP is a video too. Holds the sampled frames and one more.
    """
    if isinstance(source, Video):
        return source
    if settings.video_max_pixels is None:
        raise MediaError(
            "this model has no settings for videos",
            expected=f"a file {constants.VIDEO_FILE} beside its weights",
            hint="give single frames as pictures",
        )
    if isinstance(source, str) and source.startswith("data:"):
        source = pictures.data_url_bytes(source)
    if isinstance(source, str | os.PathLike):
        path = pictures.checked_path(source)
        with path.open("rb") as file:
            return _from_file(file, path.name, settings)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_file(io.BytesIO(source), name, settings)
    if isinstance(source, np.ndarray) and source.ndim == 4:
        source = list(source)
    if not isinstance(source, list | tuple):
        raise MediaError(
            f"{name} cannot be opened",
            got=type(source).__name__,
            expected="a path, bytes, a data: URL or a list of frames",
        )
    with pictures.refusals(name):
        return _sampled(FrameList(source, fps, name), name, settings)


def _from_file(file: Any, name: str, settings: VisionSettings) -> Video:
    head = file.read(64)
    file.seek(0)
    with pictures.refusals(name):
        if head.startswith((b"GIF8", b"\x89PNG")) or head[8:12] == b"WEBP":
            return _sampled(Animation(file, name), name, settings)
        from .containers import VideoFile

        with VideoFile(file, name, pictures.kind(head)) as clip:
            return _sampled(clip, name, settings)


def _sampled(clip: Clip, name: str, settings: VisionSettings) -> Video:
    """Sample and resize the frames according to the settings."""
    from PIL import Image

    indices, seconds = sample(clip.times, clip.fps, settings)
    if len(indices) < MIN_FRAMES:
        raise MediaError(
            f"{name} is too short for a video",
            got=f"{len(clip.times)} frame" + "s" * (len(clip.times) != 1),
            expected=f"at least {MIN_FRAMES}",
            hint="open it as a picture",
        )
    original_size, frames = (0, 0), np.empty(0, np.uint8)
    for place, image in enumerate(clip.read(indices)):
        if place == 0:
            original_size = image.size
            most = frame_budget(len(indices), settings)
            height, width = video_size(image.height, image.width, len(indices), settings, most)
            frames = np.empty((len(indices), height, width, 3), np.uint8)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        frames[place] = np.asarray(image)
    return Video(name, original_size, frames, tuple(seconds), settings)


def frame_budget(num_frames: int, settings: VisionSettings) -> int:
    """Maximum number of pixels of all frames together."""
    assert settings.video_max_pixels is not None and settings.video_min_pixels is not None
    cap = constants.CAP_PIXELS_PER_FRAME
    if cap is None:
        return settings.video_max_pixels
    share = min(cap, settings.video_max_pixels // num_frames)
    return max(share, int(settings.video_min_pixels * 1.05)) * num_frames


def sample(
    times: Sequence[float], fps: float | None, settings: VisionSettings
) -> tuple[list[int], list[float]]:
    """Indices of the frames to keep, and their times in seconds.

    With a constant rate they are chosen by index, as the official preprocessing does; otherwise by
    time: the frame that a player would show at that moment.
    """
    total = len(times)
    if total < MIN_FRAMES:
        return list(range(total)), [0.0] * total
    span = times[-1] - times[0]
    if span > MAX_SECONDS:
        raise MediaError(
            "the video is too long",
            got=f"{span / 60:.0f} minutes",
            expected=f"at most {MAX_SECONDS // 60}",
            hint="cut it to the part that matters",
        )
    steps = np.asarray(times) - times[0]
    # A tolerance of half a frame, because times are rounded, in Matroska to 1/1000 s.
    if fps and (np.abs(steps - np.arange(total) / fps) <= 0.5 / fps).all():
        wanted = max(int(total / fps * settings.fps), settings.min_frames)
        wanted = min(wanted, settings.max_frames, total)
        indices = np.linspace(0, total - 1, wanted).round().astype(int).tolist()
        return indices, [index / fps for index in indices]
    # A frame may be shown for long, and then be kept several times.
    wanted = min(max(int(span * settings.fps), settings.min_frames), settings.max_frames)
    moments = np.linspace(0.0, span, wanted)
    indices = (np.searchsorted(steps, moments, side="right") - 1).tolist()
    return indices, moments.tolist()


class FrameList:
    """Frames that are already in memory."""

    def __init__(self, frames: Sequence["Image | np.ndarray"], fps: float | None, name: str):
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise MediaError(f"{name}: the rate cannot be used", got=fps, expected="fps above 0")
        rate = fps or UNKNOWN_FPS
        self.frames, self.name = frames, name
        self.fps: float | None = rate
        self.times: Sequence[float] = [index / rate for index in range(len(frames))]

    def read(self, indices: Sequence[int]) -> "Iterator[Image]":
        """Yield the frames as RGB; all must have the same size."""
        size = None
        for index in indices:
            image = pictures.image_of(self.frames[index], f"frame {index} of {self.name}")
            pictures.check_pixels(image.size, self.name)
            image = pictures.flattened(image, self.name)
            if size not in (None, image.size):
                raise MediaError(
                    f"the frames of {self.name} differ in size", got=[size, image.size]
                )
            size = image.size
            yield image


class Animation:
    """Decodes every frame twice, first for the times; holds one frame."""

    def __init__(self, file: Any, name: str):
        from PIL import Image

        self.name = name
        self.image = Image.open(file, formats=ANIMATIONS)
        pictures.check_pixels(self.image.size, name)
        num_frames = getattr(self.image, "n_frames", 1)
        width, height = self.image.size
        if num_frames * width * height > MAX_PIXELS:
            got = f"{num_frames} frames of {width}x{height}"
            raise pictures.too_large(name, got, f"at most {MAX_PIXELS // (width * height)} frames")
        durations = []
        for index in range(num_frames):
            self.image.seek(index)
            # WebP has the duration only after decoding.
            self.image.load()
            milliseconds = self.image.info.get("duration", USUAL_MS)
            durations.append(milliseconds if milliseconds >= MIN_MS else USUAL_MS)
        self.times: Sequence[float] = [ms / 1000 for ms in accumulate(durations[:-1], initial=0)]
        self.fps = 1000 / durations[0] if len(set(durations)) == 1 else None

    def read(self, indices: Sequence[int]) -> "Iterator[Image]":
        """Yield the frames, on a white background."""
        for index in indices:
            self.image.seek(index)
            yield pictures.flattened(self.image.copy(), self.name)
