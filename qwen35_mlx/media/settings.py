"""VisionSettings: a checkpoint's preprocessing of pictures and videos."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import read_object

# transformers 4.57 replaced the template's <|vision_start|>…<|vision_end|> around a video by the
# frame groups; since 5.10 the pair stays around all groups, two tokens more. It is not published
# which of them the checkpoints were trained with; their configs name 4.57.
KEEPS_OUTER_PAIR = False
# At most this many pixels in a frame, however short the clip; None leaves the budget of the whole
# clip as the only limit, which is the default of transformers 5.24.
CAP_PIXELS_PER_FRAME: int | None = None

PICTURE_FILE, VIDEO_FILE = "preprocessor_config.json", "video_preprocessor_config.json"
# Newer checkpoints have both in one file, under these keys.
NESTED_FILE, NESTED_PICTURE = "processor_config.json", "image_processor"
NESTED_VIDEO = "video_processor"
PICTURE_TYPES = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
VIDEO_TYPES = ("Qwen3VLVideoProcessor",)
# Keys that would change the pixels, and the supported values; 3 is bicubic.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), (True, None)),
    **dict.fromkeys(("do_center_crop", "do_pad", "cap_pixels_per_frame"), (False, None)),
    "do_sample_frames": (True, None),
    "resample": (3, None),
    "num_frames": (None,),
}
# Far more than in any released model.
MAX_PATCH, MAX_PIXELS = 64, 2**30


@dataclass(frozen=True)
class VisionSettings:
    """Preprocessing; limits are areas in pixels, of a picture or of all frames of a video together.

    The limits of a video are None if the checkpoint has no settings for videos.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_pixels: int
    max_pixels: int
    video_min_pixels: int | None = None
    video_max_pixels: int | None = None
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    @property
    def factor(self) -> int:
        """Pixels along one side of a token."""
        return self.patch_size * self.merge_size

    def with_tokens(self, max_tokens: int) -> "VisionSettings":
        """The settings with at most `max_tokens` for a picture, if that is less than before.

        Very narrow pictures may take more, because each side has at least one token.
        """
        if max_tokens < 1:
            raise ConfigError("a picture needs at least one token", got=max_tokens, expected=">= 1")
        limit = min(self.max_pixels, max_tokens * self.factor**2)
        # Small pictures are rounded up to whole tokens; half of the limit leaves room for that.
        return replace(self, max_pixels=limit, min_pixels=min(self.min_pixels, limit // 2))


def read_settings(folder: str | Path) -> VisionSettings | None:
    """The settings of a checkpoint's folder, or None if it has none for pictures."""
    folder = Path(folder)
    nested = _Values.of(folder / NESTED_FILE)
    picture = (nested and nested.inside(NESTED_PICTURE)) or _Values.of(folder / PICTURE_FILE)
    if picture is None:
        return None
    picture.check("image_processor_type", PICTURE_TYPES)
    shared = picture.patches()
    min_pixels, max_pixels = picture.areas()
    video = (nested and nested.inside(NESTED_VIDEO)) or _Values.of(folder / VIDEO_FILE)
    if video is None:
        return VisionSettings(*shared, min_pixels=min_pixels, max_pixels=max_pixels)
    video.check("video_processor_type", VIDEO_TYPES)
    if video.patches() != shared:
        raise ConfigError(
            f"{video.name} cuts videos into other patches than pictures",
            got=video.patches(),
            expected=shared,
        )
    video_min, video_max = video.areas()
    min_frames = video.integer("min_frames", 1, MAX_PIXELS, default=4)
    return VisionSettings(
        *shared,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        video_min_pixels=video_min,
        video_max_pixels=video_max,
        fps=video.number("fps", default=2.0),
        min_frames=min_frames,
        max_frames=video.integer("max_frames", min_frames, MAX_PIXELS, default=768),
    )


class _Values:
    """The configuration of one processor; each key is checked when it is read."""

    def __init__(self, values: object, name: str):
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{name} cannot be used", got=type(values).__name__, expected="a JSON object"
            )
        self.values, self.name = values, name

    @classmethod
    def of(cls, file: Path) -> "_Values | None":
        """The values in a file, or None if it does not exist."""
        return cls(read_object(file), str(file)) if file.is_file() else None

    def inside(self, key: str) -> "_Values | None":
        """The values under a key, or None if it does not exist."""
        value = self.values.get(key)
        return None if value is None else _Values(value, f"{self.name}: {key}")

    def check(self, type_key: str, types: tuple[str, ...]) -> None:
        """Refuse settings that would give other pixels."""
        for key, allowed in (NEUTRAL | {type_key: (*types, None)}).items():
            value = self.values.get(key)
            if value not in allowed:
                raise self._error(key, value, " or ".join(map(str, allowed)))
        scale = self.values.get("rescale_factor", 1 / 255)
        if not _is_number(scale) or abs(scale * 255 - 1) > 1e-9:
            raise self._error("rescale_factor", scale, 1 / 255)

    def areas(self) -> tuple[int, int]:
        """Minimum and maximum of pixels; `min_pixels` and `max_pixels` override `size`."""
        size = self.inside("size")
        values = dict(size.values) if size else {}
        for edge, key in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
            if self.values.get(key) is not None:
                values[edge] = self.values[key]
        edges = _Values(values, f"{self.name}: size")
        least = edges.integer("shortest_edge", 1, MAX_PIXELS)
        return least, edges.integer("longest_edge", least, MAX_PIXELS)

    def patches(self) -> tuple[int, int, int, tuple[float, ...], tuple[float, ...]]:
        """patch_size, temporal_patch_size, merge_size, mean and std."""
        return (
            self.integer("patch_size", 1, MAX_PATCH),
            self.integer("temporal_patch_size", 2, 2),
            self.integer("merge_size", 1, MAX_PATCH),
            self._channels("image_mean", low=-1000.0),
            self._channels("image_std", low=1e-6),
        )

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number in a range; required without a default."""
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            wanted = f"a whole number from {low} to {high}" if low < high else low
            raise self._error(key, value, wanted)
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        value = self.values.get(key, default)
        if not _is_number(value) or value <= 0:
            raise self._error(key, value, "a number above 0")
        return float(value)

    def _channels(self, key: str, low: float) -> tuple[float, ...]:
        value = self.values.get(key)
        if (
            not isinstance(value, list)
            or len(value) != 3
            or not all(_is_number(v) and low <= v <= 1000.0 for v in value)
        ):
            raise self._error(key, value, "3 numbers")
        return tuple(float(v) for v in value)

    def _error(self, key: str, got: object, expected: object) -> ConfigError:
        return ConfigError(f"{self.name}: {key} cannot be used", got=got, expected=expected)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
