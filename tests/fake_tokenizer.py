"""A tokenizer whose tokens are whatever a test cuts a text into; its tags are added tokens."""

import codecs
import random
import re
from collections.abc import Callable, Iterator

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


class Detokenizer:
    def __init__(self, pieces: list[bytes]):
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._segment = ""

    def add_token(self, token: int) -> None:
        self._segment += self._decoder.decode(self._pieces[token])

    def finalize(self) -> None:
        self._segment += self._decoder.decode(b"", final=True)

    @property
    def last_segment(self) -> str:
        segment, self._segment = self._segment, ""
        return segment


class FakeTokenizer:
    """tags: which of the tags are tokens; the others are spelled."""

    def __init__(self, tags: tuple[str, ...] = TAGS):
        self._pieces = [tag.encode() for tag in tags]
        self._tags = tags
        self._known: dict[bytes, int] = {}

    @property
    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self._pieces)

    def get_added_vocab(self) -> dict[str, int]:
        return {tag: token for token, tag in enumerate(self._tags)}

    def spell(self, text: str, num_bytes: Callable[[], int] = lambda: 1) -> list[int]:
        """Tokens of so many bytes each; none of them is a tag's."""
        encoded, tokens = text.encode(), []
        while encoded:
            size = num_bytes()
            piece, encoded = encoded[:size], encoded[size:]
            if piece not in self._known:
                self._known[piece] = len(self._pieces)
                self._pieces.append(piece)
            tokens.append(self._known[piece])
        return tokens

    def encode(self, text: str, num_bytes: Callable[[], int] = lambda: 1) -> list[int]:
        """As `spell`, with the tags in the text as their tokens."""
        tokens: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, self._tags)) or '$.'})", text):
            tokens += (
                [self._tags.index(part)] if part in self._tags else self.spell(part, num_bytes)
            )
        return tokens

    def ways(self, text: str, seed: int = 0, count: int = 5) -> Iterator[list[int]]:
        """Several ways to cut the text into tokens: by bytes, in one, and at random."""
        chance = random.Random(seed)
        yield self.encode(text)
        yield self.encode(text, lambda: len(text.encode()))
        for _ in range(count):
            yield self.encode(text, lambda: chance.choice([1, 2, 3, 5, 9, 40]))
