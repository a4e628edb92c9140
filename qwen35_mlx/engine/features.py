"""A cache of features of recent pictures and videos, so that none is encoded twice.

H hidden size of the text model.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import PromptError
from ..media.tokens import MediaToken
from ..memory import Allowance
from ..model.language import Model

if TYPE_CHECKING:
    from ..text.media_parts import Media


class FeatureStore:
    """Features of pictures by digest, with LRU eviction. Not thread-safe."""

    def __init__(self, model: Model, max_bytes: int | None = None):
        """`max_bytes` None: the model's allowance for features."""
        if max_bytes is None:
            max_bytes = getattr(model, "allowance", Allowance()).features_bytes
        self.model = model
        self.max_bytes = max_bytes
        # Number of runs of the tower.
        self.num_encoded = 0
        self._features: dict[bytes, mx.array] = {}

    def rows(self, tokens: Sequence[MediaToken]) -> mx.array:
        """The features `[N, H]` of picture tokens."""
        parts = []
        for digest, of_one in groupby(tokens, key=lambda token: token.span.media.digest):
            group = list(of_one)
            span = group[0].span
            features = self._features_of(span.media, digest)
            places = [t.span.index * span.height * span.width + t.index for t in group]
            parts.append(features[mx.array(places)])
        return mx.concatenate(parts)

    def trim(self, kept: int = 0) -> None:
        """Drop features until the rest fits the budget, but keep the last `kept`."""
        while len(self._features) > kept and self.nbytes > self.max_bytes:
            del self._features[next(iter(self._features))]

    @property
    def nbytes(self) -> int:
        """Memory of all features."""
        return sum(features.nbytes for features in self._features.values())

    def _features_of(self, media: "Media", digest: bytes) -> mx.array:
        features = self._features.pop(digest, None)
        if features is None:
            features = self._encode(media)
        # At the end, as the most recently used.
        self._features[digest] = features
        # Keep it: the next piece of the prompt may continue this picture.
        self.trim(kept=1)
        return features

    def _encode(self, media: "Media") -> mx.array:
        tower = getattr(self.model, "vision_tower", None)
        if tower is None:
            raise PromptError(
                "this model reads no pictures and no videos",
                got=f"{media.name} in the prompt; the model has no vision tower",
                expected="text",
            )
        features: mx.array = tower(mx.array(media.patches()), media.grid)
        if len(features) != media.num_tokens:
            raise PromptError(
                f"{media.name}: features and placeholders do not match",
                got=f"{len(features)} features",
                expected=f"{media.num_tokens} for its placeholders",
                hint="preprocessor_config.json and config.json must name the same size of patches",
            )
        mx.eval(features)
        self.num_encoded += 1
        return features
