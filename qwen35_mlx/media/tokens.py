"""Shown, Span and MediaToken: placeholders in a prompt, equal if their pictures are equal."""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .settings import VisionSettings

KEY_BITS = 62


class Shown:
    """Base class of pictures and videos; two are equal if they show the same."""

    settings: "VisionSettings"

    @property
    def digest(self) -> bytes:
        """sha256 of the pixels, and of what the patches depend on."""
        raise NotImplementedError

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frame groups, rows and columns of patches."""
        raise NotImplementedError

    @property
    def num_tokens(self) -> int:
        """Number of placeholders in a prompt, without the text of a video's timestamps."""
        return math.prod(self.grid) // self.settings.merge_size**2

    @cached_property
    def spans(self) -> tuple["Span", ...]:
        """One for each frame group."""
        groups, *sides = self.grid
        height, width = (side // self.settings.merge_size for side in sides)
        return tuple(Span(self, group, height, width) for group in range(groups))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True, eq=False)
class Span:
    """A picture, or one frame group of a video: a unit for attention and positions.

    `index`: the frame group, 0 for a picture; `height` and `width` are in tokens.
    """

    media: Any
    index: int
    height: int
    width: int

    def tokens(self) -> list["MediaToken"]:
        """Its placeholders, row by row."""
        return list(self._tokens)

    @cached_property
    def _tokens(self) -> tuple["MediaToken", ...]:
        grid = f"{self.height} {self.width} {self.index}".encode()
        key = hashlib.sha256(self.media.digest + grid).digest()
        start, step = (int.from_bytes(key[i : i + 8], "little") for i in (0, 8))
        # An odd step is a bijection modulo 2^62: the keys of one span all differ.
        indices = np.arange(self.height * self.width, dtype=np.uint64)
        keys = np.uint64(start) + indices * np.uint64(step | 1)
        values = -2 - (keys & np.uint64(2**KEY_BITS - 1)).astype(np.int64)
        return tuple(MediaToken.of(self, i, value) for i, value in enumerate(values.tolist()))


class MediaToken(int):
    """One placeholder in a sequence of token ids.

    The value is below -1, with 62 bits of a hash of digest, grid, frame group and index: equal
    pictures have equal ids, others differ. `index` counts row by row.
    """

    span: Span
    index: int

    @classmethod
    def of(cls, span: Span, index: int, value: int) -> "MediaToken":
        """The placeholder `index` of a span."""
        token = cls(value)
        token.span, token.index = span, index
        return token

    def __copy__(self) -> "MediaToken":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "MediaToken":
        # A copy of a conversation must not copy its pictures.
        return self
