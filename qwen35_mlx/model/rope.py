"""Rotary positions: partial RoPE (default, YaRN), and the three positions of picture tokens.

B batch, T tokens, H heads, D head dim, R rotated dims. A text token has one position for the three
axes time, row and column. A picture of h x w tokens has one position in time, and rows and columns
count from it. The next token's position is max(h, w) higher, so after a picture the position of a
token differs from its index.
"""

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import RopeConfig

# Position of a text token minus its index; one number, or one per row.
RopeDelta = int | mx.array
# Positions of new tokens: tables of cosines and sines, or a delta to add to the cache's offset.
Places = tuple[mx.array, mx.array] | RopeDelta | None


def shifted(offset: Any, delta: RopeDelta | None) -> Any:
    """offset + delta, without an operation where there is nothing to add."""
    return offset if delta is None or (isinstance(delta, int) and delta == 0) else offset + delta


def media_positions(ids: Sequence[int], start: int) -> tuple[np.ndarray, int]:
    """Positions `[3, T]` of the tokens of a piece, and where the next piece starts.

    `start`: the position of the first token; if the previous piece ended inside a picture, the
    position of that picture. Tokens of pictures have a `span` (one picture, or one frame group of a
    video) and an `index` in it.
    """
    positions = np.empty((3, len(ids)), dtype=np.int32)
    for i, token in enumerate(ids):
        span = getattr(token, "span", None)
        if span is None:
            positions[:, i] = start
            start += 1
            continue
        index: int = token.index  # type: ignore[attr-defined]
        positions[:, i] = start, start + index // span.width, start + index % span.width
        if index == span.height * span.width - 1:
            start += max(span.height, span.width)
    return positions, start


def frequency_axes(num_frequencies: int, section: tuple[int, int, int]) -> np.ndarray:
    """The axis of each frequency: 0 time, 1 row, 2 column.

    Interleaved: 0 1 2 0 1 2 …, until the sections of row and column are used up; the rest is time.
    """
    axes = np.zeros(num_frequencies, dtype=np.int32)
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = axis
    return axes


def rope_periods(rope: RopeConfig) -> tuple[np.ndarray, float]:
    """Positions per radian `[R / 2]` (inverse frequencies inverted) and the YaRN attention factor.

    Source: arXiv 2309.00071, section 3.2; with the reference's steps in float32.
    """
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / rope.rotary_dim
    # float64: numpy's float32 power is off in the last digit, 0.01 rad at the end of the context.
    periods = (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    trained_length = rope.original_max_position_embeddings
    if rope.factor is None or trained_length is None:
        return periods, 1.0

    def dim_of(num_rotations: float) -> float:
        length = trained_length / (num_rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    span = (high - low) or 0.001
    dims = np.arange(rope.rotary_dim // 2, dtype=np.float32)
    kept = 1 - np.clip((dims - low) / np.float32(span), 0, 1)
    # The reference's order of operations, because last digits matter at large positions.
    frequencies = 1 / (np.float32(rope.factor) * periods) * (1 - kept) + 1 / periods * kept
    return (1 / frequencies).astype(np.float32), rope.attention_factor or 1.0


class PartialRope:
    """Rotates the first R dims of each head; dim i is paired with dim i + R / 2."""

    def __init__(self, rope: RopeConfig):
        periods, self._factor = rope_periods(rope)
        # Underscored, so that MLX does not take it for a parameter.
        self._periods = mx.array(periods)
        self._rotary_dim = rope.rotary_dim
        self._axes = mx.array(frequency_axes(rope.rotary_dim // 2, rope.mrope_section))

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """Rotate x `[B, H, T, D]` at positions offset, offset + 1, …; an offset or one per row."""
        if self._factor != 1.0:
            rotated, kept = mx.split(x, [self._rotary_dim], axis=-1)
            x = mx.concatenate([rotated * self._factor, kept], axis=-1)
        # Periods instead of theta: the GPU's fast exp2 loses digits at large positions.
        return mx.fast.rope(
            x,
            self._rotary_dim,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._periods,
        )

    def tables(self, positions: mx.array) -> tuple[mx.array, mx.array]:
        """Cosines and sines `[B, T, R / 2]` of positions `[B, T]` or `[3, B, T]`, in fp32.

        Scaled by YaRN's attention factor. `[3, B, T]` are the positions in time, row and column.
        """
        if positions.ndim == 3:
            # [B, T, R / 2]: each frequency takes the position of its axis.
            chosen = mx.take(positions.moveaxis(0, -1), self._axes, axis=-1)
        else:
            chosen = positions[..., None]
        angles = chosen.astype(mx.float32) * (1 / self._periods)
        return mx.cos(angles) * self._factor, mx.sin(angles) * self._factor
