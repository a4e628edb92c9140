"""Rotary positions: partial RoPE (default, YaRN), and the three positions of picture tokens.

B batch, T tokens, H heads, D head dim, R rotated dims. Text has one position for all three axes:
time, row, column. A picture of h x w tokens has one position in time, rows and columns count from
it, and what follows goes on max(h, w) further: from there on position and number of tokens differ.
"""

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import RopeConfig

# What is added to the number of tokens before a text token to get its position; one per row.
RopeDelta = int | mx.array
# Where new tokens are: cosines and sines, or what is added to the places in their cache.
Places = tuple[mx.array, mx.array] | RopeDelta | None


def shifted(offset: Any, delta: RopeDelta | None) -> Any:
    """offset + delta, without an operation where there is nothing to add."""
    return offset if delta is None or (isinstance(delta, int) and delta == 0) else offset + delta


def media_positions(ids: Sequence[int], start: int) -> tuple[np.ndarray, int]:
    """Positions `[3, T]` of the tokens of a piece, and where the next piece starts.

    `start` is the position of its first token, or of the first token of the picture in which the
    piece before ended: so long as a picture is not read to its end, nothing moves on. Tokens of
    pictures have a `span` (one picture, or one frame group of a video) and an `index` in it.
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
    """Which of time 0, row 1 and column 2 each frequency turns with.

    Interleaved: 0 1 2 0 1 2 …, rows and columns as many as their sections, the rest time.
    """
    axes = np.zeros(num_frequencies, dtype=np.int32)
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = axis
    return axes


def rope_periods(rope: RopeConfig) -> tuple[np.ndarray, float]:
    """Positions per radian `[R / 2]` (inverse frequencies inverted) and the YaRN attention factor.

    Source: arXiv 2309.00071, section 3.2; in float32 steps as the reference does them.
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
    # In the reference's order of operations: the last digits count at large positions.
    frequencies = 1 / (np.float32(rope.factor) * periods) * (1 - kept) + 1 / periods * kept
    return (1 / frequencies).astype(np.float32), rope.attention_factor or 1.0


class PartialRope:
    """Rotates the first R dims of each head, halves against each other."""

    def __init__(self, rope: RopeConfig):
        periods, self._factor = rope_periods(rope)
        # Underscored: derived from the config, so no parameter to load.
        self._periods = mx.array(periods)
        self._rotary_dim = rope.rotary_dim
        self._axes = mx.array(frequency_axes(rope.rotary_dim // 2, rope.mrope_section))

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """`[B, H, T, D]` at positions offset, offset + 1, …; offset an int or one per row."""
        if self._factor != 1.0:
            rotated, kept = mx.split(x, [self._rotary_dim], axis=-1)
            x = mx.concatenate([rotated * self._factor, kept], axis=-1)
        # Periods are given, not theta: the GPU's fast exp2 loses digits at large positions.
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

        Scaled by YaRN. Three positions are those in time, of the row and of the column.
        """
        if positions.ndim == 3:
            # [B, T, R / 2]: each frequency takes the position of its axis.
            chosen = mx.take(positions.moveaxis(0, -1), self._axes, axis=-1)
        else:
            chosen = positions[..., None]
        angles = chosen.astype(mx.float32) * (1 / self._periods)
        return mx.cos(angles) * self._factor, mx.sin(angles) * self._factor
