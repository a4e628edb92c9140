"""Control tokens: text of users, files and tools never becomes one of them.

`<|im_end|>`, `<think>`, `<tool_call>` and others end a turn, open a thought or call a tool. In a
prompt only the template may write them. `protect` puts a mark into their names wherever a message
contains them, before the template is rendered. `encode` encodes marked names as plain text, and the
rest as the tokenizer does.
"""

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# A Unicode noncharacter, which normal text does not contain. If a text does, it is doubled.
MARK = "\ufdd0"
# The shape of control tokens that are not declared special, like <think> and <tool_call>.
TAG = re.compile(r"<\S+>|\[\S+\]")
# Every message begins with it, and no token crosses its start.
TURN = "<|im_start|>"
MAX_CACHED_PIECES = 1024


class ControlTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, backend: "Backend"):
        from tokenizers import Tokenizer as Backend

        self._backend = backend
        # The same vocabulary without any added token.
        self._plain = Backend(backend.model)
        self._plain.normalizer = backend.normalizer
        self._plain.pre_tokenizer = backend.pre_tokenizer
        added = backend.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        # A token of one character has no place for a mark.
        tokens = [t for t in added.values() if len(t.content) > 1]
        tokens = [t for t in tokens if t.special or TAG.fullmatch(t.content)]
        self._normalized = any(t.normalized for t in tokens)
        rests: dict[str, list[str]] = {}
        for token in tokens:
            rests.setdefault(token.content[0], []).append(re.escape(token.content[1:]))
        # By first character, for a fast search.
        starts = (f"{re.escape(first)}(?={'|'.join(ends)})" for first, ends in rests.items())
        self._start = re.compile("|".join(starts) or r"(?!)")
        self._beginnings = {t.content[:n] for t in tokens for n in range(1, len(t.content))}
        self._longest = max(map(len, self._beginnings), default=0)
        cuts = [t for t in tokens if t.content == TURN and not (t.lstrip or t.single_word)]
        self._cut = re.compile(f"(?={re.escape(TURN)})" if cuts else r"(?!)")
        # In a conversation only the last messages are new.
        self._piece_ids = lru_cache(MAX_CACHED_PIECES)(self._encode_piece)

    def protect(self, value: Any) -> Any:
        """A copy of messages, tools or any other JSON value with marks in all its texts."""
        if isinstance(value, str):
            # Normalization turns some characters into ASCII, such as the Kelvin sign.
            text = normalize("NFC", value) if self._normalized else value
            text = self._start.sub(rf"\g<0>{MARK}", text.replace(MARK, MARK * 2))
            # Templates concatenate texts: a name may begin in this one and end in the next.
            lengths = range(1, min(self._longest, len(text)) + 1)
            for at in [len(text) - n for n in lengths if text[-n:] in self._beginnings]:
                text = text[: at + 1] + MARK + text[at + 1 :]
            return text
        if isinstance(value, dict):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.protect(item) for item in value]
        return value

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that was rendered from protected messages, or of a part of it."""
        ids: list[int] = []
        for piece in self._cut.split(text):
            ids += self._piece_ids(piece)
        return ids

    def _encode_piece(self, piece: str) -> list[int]:
        encoding = self._backend.encode(piece, add_special_tokens=False)
        if MARK not in piece:
            return encoding.ids
        # A marked name is no added token: each one found here was written by the template.
        found = zip(encoding.ids, encoding.offsets, strict=True)
        ids: list[int] = []
        start = 0
        for token, (at, end) in found:
            if token in self._added_ids:
                ids += [*self._encode_marked(piece[start:at]), token]
                start = end
        return ids + self._encode_marked(piece[start:])

    def _encode_marked(self, text: str) -> list[int]:
        """Encode text whose only names of added tokens are marked."""
        encoder = self._plain if MARK in text.replace(MARK * 2, "") else self._backend
        text = re.sub(f"{MARK}({MARK}?)", r"\1", text)
        return encoder.encode(text, add_special_tokens=False).ids


def control_tokens(backend: "Backend") -> ControlTokens:
    """The control tokens of a tokenizer of the `tokenizers` package."""
    return _control_tokens(backend, backend.get_vocab_size())


@lru_cache(maxsize=8)
def _control_tokens(backend: "Backend", vocab_size: int) -> ControlTokens:
    # `vocab_size` is a part of the key because tokens may be added later.
    return ControlTokens(backend)
