"""Streaming detokenizer: emits each character as soon as it is complete."""

import codecs
from collections.abc import Callable
from functools import cache
from typing import Any


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
    """The bytes of a token of the vocabulary; empty for None, an id that does not exist."""
    if token is None:
        return b""
    known = byte_of_character()
    try:
        return bytes([known[character] for character in token])
    except KeyError:
        # An added token with a space, for example: its text is used directly.
        return token.encode()


class StreamingDetokenizer:
    """Decodes tokens that are added one at a time.

    All segments together are the decoded text. Bytes that form no character are left out.
    """

    def __init__(self, token_of: Callable[[int], str | None]):
        self._token_of = token_of
        self.reset()

    def reset(self) -> None:
        """Start over."""
        self.tokens: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._parts: list[str] = []
        self._num_read = 0

    def add_token(self, token: int) -> None:
        """Add the next token."""
        self.tokens.append(token)
        if part := self._decoder.decode(token_bytes(self._token_of(token))):
            self._parts.append(part)

    def finalize(self) -> None:
        """End the text; an incomplete character is left out."""
        self._decoder.reset()

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._parts)

    @property
    def last_segment(self) -> str:
        """The text since the last access."""
        segment = "".join(self._parts[self._num_read :])
        self._num_read = len(self._parts)
        return segment


def detokenizer_of(tokenizer: Any) -> Any:
    """A new detokenizer of ours or of another tokenizer, for one answer."""
    found = tokenizer.detokenizer
    # mlx-lm's for byte-level vocabularies leaves out a space at the start.
    if type(found).__name__ == "BPEStreamingDetokenizer":
        return StreamingDetokenizer(tokenizer.convert_ids_to_tokens)
    return found
