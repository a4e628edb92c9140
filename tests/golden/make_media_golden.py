"""Make media.json: what the official processors make of the patterns in tests/media_files.py.

Needs torch, transformers and torchvision, which the tests that read the file do not.

    pictures      name -> grid, sha256 of the patches (float32, one of the two equal slices)
    picture_sizes [width, height] -> [height, width] after the resize
    videos        name -> indices of the kept frames, times, grid, sha256 of the patches
    video_sizes   [width, height, frames] -> [height, width] after the resize
    samplings     [frames, fps] -> indices of the kept frames
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

# First: it imports torchvision before transformers.
from live.reference_processor import picture_processor, torch, video_processor  # noqa: E402
from media_files import (  # noqa: E402
    PICTURE_CONFIG,
    PICTURE_SIZES,
    PICTURES,
    SAMPLINGS,
    VIDEO_CONFIG,
    VIDEO_SIZES,
    VIDEOS,
    pattern,
    pattern_image,
)
from transformers import Qwen3VLProcessor  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (  # noqa: E402
    smart_resize as picture_size,
)
from transformers.models.qwen3_vl.video_processing_qwen3_vl import (  # noqa: E402
    smart_resize as video_size,
)
from transformers.video_utils import VideoMetadata  # noqa: E402

FACTOR = 32


def sha256(patches: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(patches, "<f4")).hexdigest()


def picture(width: int, height: int, mode: str) -> dict[str, Any]:
    """One picture through the official processor."""
    out = picture_processor(PICTURE_CONFIG)(
        images=[pattern_image(width, height, mode)], return_tensors="np"
    )
    rows = out["pixel_values"].reshape(-1, 3, 2, 16 * 16)
    assert np.array_equal(rows[:, :, 0], rows[:, :, 1])
    return dict(grid=out["image_grid_thw"][0].tolist(), sha256=sha256(rows[:, :, 0]))


def video(count: int, fps: float, width: int, height: int) -> dict[str, Any]:
    """One video through the official processor."""
    frames = np.stack([pattern(width, height, seed=n) for n in range(count)])
    processor = video_processor(VIDEO_CONFIG)
    out = processor(
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
        video_metadata=[dict(total_num_frames=count, fps=fps)],
        return_tensors="np",
        return_metadata=True,
    )
    indices = [int(i) for i in out["video_metadata"][0].frames_indices]
    return dict(
        indices=indices,
        # It is a method that needs nothing of its object.
        timestamps=Qwen3VLProcessor._calculate_timestamps(None, list(indices), fps, 2),
        grid=out["video_grid_thw"][0].tolist(),
        sha256=sha256(out["pixel_values_videos"]),
    )


def sampling(total: int, fps: float) -> list[int]:
    """The frames that the official processor keeps."""
    metadata = VideoMetadata(total_num_frames=total, fps=fps)
    return [int(i) for i in video_processor(VIDEO_CONFIG).sample_frames(metadata)]


def main() -> None:
    """Write the file."""
    limits = [dict(min_pixels=c["size"]["shortest_edge"], max_pixels=c["size"]["longest_edge"])
              for c in (PICTURE_CONFIG, VIDEO_CONFIG)]  # fmt: skip
    golden = dict(
        pictures={name: picture(*case) for name, case in PICTURES.items()},
        picture_sizes=[
            picture_size(height, width, factor=FACTOR, **limits[0])
            for width, height in PICTURE_SIZES
        ],
        videos={name: video(*case) for name, case in VIDEOS.items()},
        video_sizes=[
            video_size(frames, height, width, factor=FACTOR, **limits[1])
            for width, height, frames in VIDEO_SIZES
        ],
        samplings=[sampling(*case) for case in SAMPLINGS],
    )
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(golden[key])}" for key in golden)
    (HERE / "media.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
