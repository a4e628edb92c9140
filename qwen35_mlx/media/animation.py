"""An animated GIF, PNG or WebP as a video, through Pillow."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from .pictures import check_pixels, flattened, too_large

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("GIF", "PNG", "WEBP")
# Browsers show frames with a duration below 20 ms for 100 ms.
MIN_MS, USUAL_MS = 20, 100
# To see one frame, all before it are decoded; a minute at 1080p and 30 fps has 3.7e9 pixels.
MAX_PIXELS = 2**32


class Animation:
    """Decodes every frame twice, first for the times; holds one frame."""

    def __init__(self, file: Any, name: str):
        from PIL import Image

        self.name = name
        self.image = Image.open(file, formats=FORMATS)
        check_pixels(self.image.size, name)
        num_frames = getattr(self.image, "n_frames", 1)
        width, height = self.image.size
        if num_frames * width * height > MAX_PIXELS:
            got = f"{num_frames} frames of {width}x{height}"
            raise too_large(name, got, f"at most {MAX_PIXELS // (width * height)} frames")
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
            yield flattened(self.image.copy(), self.name)
