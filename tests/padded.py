"""Caches of rows with padding, as mlx-lm's generators make them."""

from typing import Any

from mlx_lm.models.cache import ArraysCache, BatchKVCache

from qwen35_mlx.model.cache import holds_keys


def padded_cache(model: Any, left_padding: list[int]) -> list[Any]:
    """An empty one, of rows with so many pads at their start."""
    return [
        BatchKVCache(left_padding) if holds_keys(entry) else ArraysCache(2, left_padding)
        for entry in model.make_cache()
    ]
