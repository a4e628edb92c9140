"""The vision tower: patches of a picture or video to features, one for each token of the text."""

import mlx.core as mx
import mlx.nn as nn

from ..config import VisionConfig


class VisionTower(nn.Module):
    """Patch embedding, blocks of attention within a picture, and a merger of 2 x 2 patches."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config

    def __call__(self, patches: mx.array, grid: tuple[int, int, int]) -> mx.array:
        """Patches `[N, C * p * p]`, or `[N, C * 2 * p * p]` of a video -> features `[N / 4, H]`.

        `grid` is (frame groups, rows, columns) in patches, N their product; the patches of a block
        that is merged follow each other.
        """
        raise NotImplementedError
