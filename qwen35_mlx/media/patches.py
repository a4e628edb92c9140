"""uint8 pixels to patches: sizes, normalisation, merge-block order."""

# H, W pixels; h, w patches; p patch_size; m merge_size; C channels; t frame groups of T frames

import hashlib
import math

import numpy as np

from ..errors import MediaError
from .settings import VisionSettings

MAX_RATIO = 200


def picture_size(height: int, width: int, settings: VisionSettings) -> tuple[int, int]:
    """Height and width to resize a picture to: a whole number of tokens, within the limits."""
    check_ratio(height, width)
    return _fit(height, width, 1, 1, settings.factor, settings.min_pixels, settings.max_pixels)


def check_ratio(height: int, width: int) -> None:
    """Refuse very narrow pictures, the same ones as the official preprocessing."""
    if min(height, width) < 1:
        raise MediaError("the picture is empty", got=f"{width}x{height} pixels")
    if max(height, width) / min(height, width) > MAX_RATIO:
        raise MediaError(
            "the picture is too narrow",
            got=f"{width}x{height} pixels",
            expected=f"sides of at most {MAX_RATIO}:1",
        )


def video_size(
    height: int, width: int, num_frames: int, settings: VisionSettings, max_pixels: int
) -> tuple[int, int]:
    """Height and width to resize each frame to: the total area of all frames within the limits."""
    assert settings.video_min_pixels is not None
    factor, pair = settings.factor, settings.temporal_patch_size
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    check_ratio(height, width)
    even_frames = round(num_frames / pair) * pair
    return _fit(
        height, width, num_frames, even_frames, factor, settings.video_min_pixels, max_pixels
    )


def _fit(
    height: int, width: int, frames: int, even_frames: int, factor: int, least: int, most: int
) -> tuple[int, int]:
    """Python's `round` rounds halves to even, as the official preprocessing does."""
    fitted_h, fitted_w = round(height / factor) * factor, round(width / factor) * factor
    area = even_frames * fitted_h * fitted_w
    if area > most:
        shrink = math.sqrt(frames * height * width / most)
        fitted_h = max(factor, math.floor(height / shrink / factor) * factor)
        fitted_w = max(factor, math.floor(width / shrink / factor) * factor)
    elif area < least:
        stretch = math.sqrt(least / (frames * height * width))
        fitted_h = math.ceil(height * stretch / factor) * factor
        fitted_w = math.ceil(width * stretch / factor) * factor
    return fitted_h, fitted_w


def picture_patches(pixels: np.ndarray, settings: VisionSettings) -> np.ndarray:
    """uint8 [H, W, 3] to float32 [h*w, 3*p*p]; the official patches hold each slice twice."""
    # float64, then float32: the order of the official code, for equal bits.
    levels = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(v, np.float32)[:, None] for v in (settings.mean, settings.std))
    return _patches(pixels[None], 1, (levels - mean) / std, settings)


def video_patches(frames: np.ndarray, settings: VisionSettings) -> np.ndarray:
    """uint8 [t*T, H, W, 3] to float32 [t*h*w, 3*T*p*p]."""
    # Official code scales and normalises videos in one step, so last bits differ from pictures.
    levels = np.arange(256, dtype=np.float32)
    mean, std = (np.array(v, np.float32)[:, None] * 255 for v in (settings.mean, settings.std))
    return _patches(frames, settings.temporal_patch_size, (levels - mean) / std, settings)


def _patches(frames: np.ndarray, T: int, table: np.ndarray, settings: VisionSettings) -> np.ndarray:
    """Patches in merge-block order; `table` [C, 256] has the value of each level per channel."""
    p, m = settings.patch_size, settings.merge_size
    num_frames, height, width, channels = frames.shape
    t, h, w = num_frames // T, height // p, width // p
    # -> (t, h/m, w/m, m, m, C, T, p, p)
    blocks = frames.reshape(t, T, h // m, m, p, w // m, m, p, channels)
    blocks = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, channels, T * p * p)
    patches = np.empty(blocks.shape, np.float32)
    for channel in range(channels):
        patches[:, channel] = table[channel][blocks[:, channel]]
    return patches.reshape(t * h * w, channels * T * p * p)


def pixel_digest(pixels: np.ndarray, settings: VisionSettings, extra: str = "") -> bytes:
    """sha256 of resized pixels, their shape and everything else that the patches depend on."""
    patch = (settings.patch_size, settings.temporal_patch_size, settings.merge_size)
    header = f"{pixels.shape} {patch} {settings.mean} {settings.std} {extra}\n"
    hasher = hashlib.sha256(header.encode())
    hasher.update(np.ascontiguousarray(pixels).data)
    return hasher.digest()
