"""Token ids to text while they arrive: only whole characters, each as soon as it is complete."""

import codecs
from collections.abc import Callable
from functools import cache


@cache
def byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable characters of Latin-1 stand for themselves; the other bytes, in their order, are
    written as the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


def token_bytes(token: str | None) -> bytes:
    """The bytes of a token as the vocabulary spells it; none of an id that it does not have."""
    if token is None:
        return b""
    known = byte_of_character()
    try:
        return bytes([known[character] for character in token])
    except KeyError:
        # An added token with, for example, a space: the decoder takes its text as it is.
        return token.encode()


class StreamingDetokenizer:
    """Text of tokens that are added one at a time.

    The segments together are the decoded text of all tokens. Bytes that are no character are left
    out, in the middle as well as at the end.
    """

    def __init__(self, token_of: Callable[[int], str | None]):
        self._token_of = token_of
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.tokens: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._parts: list[str] = []
        self._num_read = 0

    def add_token(self, token: int) -> None:
        """Take the next token."""
        self.tokens.append(token)
        if part := self._decoder.decode(token_bytes(self._token_of(token))):
            self._parts.append(part)

    def finalize(self) -> None:
        """No token follows: an incomplete character stays out."""
        self._decoder.reset()

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._parts)

    @property
    def last_segment(self) -> str:
        """The text that was added since this was last asked for."""
        segment = "".join(self._parts[self._num_read :])
        self._num_read = len(self._parts)
        return segment
