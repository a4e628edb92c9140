"""Splits generated tokens, while they stream, into thought, answer and tool calls."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from ..text.detokenizer import detokenizer_of
from .call_text import CALL, CALL_END, FUNCTION_OPEN, TAGS, THINK, THINK_END, CallText, written
from .tool_calls import UNREADABLE, Schema, ToolCall, tool_names

__all__ = ["OutputParser", "Piece", "ToolCall", "held_back"]
ORPHAN = re.compile(rf"\s*{CALL_END}")
FENCE = re.compile(r"^ {0,3}(?:```|~~~)", re.MULTILINE)


class Piece(NamedTuple):
    """A part of the streamed thought or answer, or a whole tool call."""

    kind: Literal["thought", "answer", "tool_call"]
    text: str
    call: ToolCall | None = None


class OutputParser:
    """Converts token ids to pieces. Text is held back while it may be part of a tag or stop string.

    stop: strings that end the text; with `split`, only in the answer. thinking: whether the prompt
    has opened a thought. tools: the known tools; without tools, a call is text. split: if False,
    all text is the answer, with its tags.

    Tags are added tokens; the same characters from other tokens are text, unless the tokenizer has
    no such token. A call starts with `<tool_call>`, or with `<function=NAME>` of a known tool at
    the start of a line outside of a code block. In a thought, it is accepted only if no text
    follows. Line breaks around tags are dropped; an empty line replaces calls between texts.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop: Sequence[str] = (),
        thinking: bool = False,
        tools: Sequence[Schema] = (),
        split: bool = True,
    ):
        # Whether the current text is in a thought.
        self.in_thought = thinking and split
        # The stop string that ended the text.
        self.stop_text: str | None = None
        self._detokenizer = detokenizer_of(tokenizer)
        self._stops = [text for text in stop if text]
        self._tools = tools if split else ()
        tags = {tag: marker for marker, tag in TAGS.items()} if split else {}
        added = tokenizer.get_added_vocab() if split else {}
        self._markers = {added[tag]: marker for tag, marker in tags.items() if tag in added}
        self._spelled = {tag: marker for tag, marker in tags.items() if tag not in added}
        self._openings = tuple(f"{FUNCTION_OPEN}{name}>" for name in tool_names(self._tools))
        self._bare = re.compile("|".join(map(re.escape, self._openings)))
        # Text that is not emitted yet, and how much of it is plain text despite its tags.
        self._buffer = ""
        self._num_plain = 0
        # An incomplete tag, if the tokenizer has no token for it.
        self._cut_tag = ""
        self._call: CallText | None = None
        self._at_line_start = True
        # Whether nothing was emitted since the last tag, and whether that was the end of a call.
        self._is_opening, self._is_after_call = split, False
        # Whether the answer is empty so far, so that a thought may begin.
        self._is_blank = split
        self._has_answered = False
        # The emitted text since the last tag.
        self._shown: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stop_text is not None

    def feed(self, token: int) -> list[Piece]:
        """Add a token; returns the pieces that are complete."""
        if marker := self._markers.get(token):
            return self._read(self._finished_text() + marker)
        self._detokenizer.add_token(token)
        return self._read(self._detokenizer.last_segment)

    def insert(self, tokens: Iterable[int]) -> list[Piece]:
        """Add tokens that the model did not generate; returns the pieces that are complete."""
        pieces = self._read(self._finished_text())
        for token in tokens:
            pieces += self.feed(token)
        return pieces

    def finish(self) -> list[Piece]:
        """End the text; returns what was held back. An unfinished call is marked incomplete."""
        return self._read(self._finished_text(), is_end=True)

    def _finished_text(self) -> str:
        """The remaining text of the detokenizer, without an incomplete character."""
        self._detokenizer.finalize()
        return str(self._detokenizer.last_segment).rstrip("\ufffd")

    def _read(self, text: str, is_end: bool = False) -> list[Piece]:
        if self._spelled:
            text = self._cut_tag + text
            for tag, marker in self._spelled.items():
                text = text.replace(tag, marker)
            ready = len(text) - (0 if is_end else held_back(text, tuple(self._spelled)))
            text, self._cut_tag = text[:ready], text[ready:]
        self._buffer += text
        pieces: list[Piece] = []
        more = True
        while more and not self.stopped and (self._buffer or self._call):
            if self._call:
                more = self._read_call(self._call, pieces, is_end)
            else:
                more = self._read_text(pieces, is_end)
        return pieces

    def _read_text(self, pieces: list[Piece], is_end: bool) -> bool:
        """Emit text up to the next tag; returns False if there is no tag."""
        if self._is_after_call and (tag_end := ORPHAN.match(self._buffer)):
            self._buffer = self._buffer[tag_end.end() :]
            return True
        tag, at = self._next_tag()
        text = written(self._buffer[:at])
        behind = self._buffer[at:]
        held = 0 if tag else self._num_held_by_bare_call(text, is_end)
        if not self.in_thought and self._stops:
            gap = len(text) - len(self._without_gap(text))
            if found := self._first_stop(text[gap:]):
                start, self.stop_text = found
                self._show(text[: gap + start], pieces)
                self._buffer = ""
                return False
            held = max(held, 0 if tag or is_end else held_back(text, self._stops))
        shown = text[: len(text) - held]
        if self.in_thought or tag == THINK:
            shown = shown.rstrip("\n")
        elif tag or held or not is_end:
            # Hold back space, which belongs to a call that may follow, or line breaks to a thought.
            shown = shown.rstrip() if self._tools else shown
            shown = shown.rstrip("\n") if self._is_blank else shown
        in_line = text.rpartition("\n")[2].strip() or ("\n" not in text and not self._at_line_start)
        self._show(shown, pieces)
        rest = text[len(shown) :]
        self._num_plain = max(0, self._num_plain - len(shown))
        if tag in (THINK, THINK_END):
            self._buffer = behind[1:]
            self.in_thought = tag == THINK
            self._begin()
        elif tag:
            is_tagged = tag == CALL
            self._buffer = behind[is_tagged:]
            self._call = CallText(
                rest + behind[:is_tagged],
                self._tools,
                tagged=is_tagged,
                in_line=bool(in_line),
                in_thought=self.in_thought,
            )
        elif is_end:
            if held:
                pieces.append(Piece("tool_call", "", UNREADABLE))
            self._buffer = ""
        else:
            self._buffer = rest
        return bool(tag)

    def _next_tag(self) -> tuple[str, int]:
        """The next tag in the buffer and its position; without a tag, "" and the buffer's end."""
        buffer, start = self._buffer, self._num_plain
        places = {}
        if self.in_thought:
            places[THINK_END] = buffer.find(THINK_END, start)
        elif self._is_blank and (at := buffer.find(THINK, start)) >= 0 and not buffer[:at].strip():
            places[THINK] = at
        if self._tools:
            places[CALL] = buffer.find(CALL, start)
        for bare in self._bare.finditer(buffer, start) if self._openings else ():
            at = bare.start()
            begins_line = buffer[at - 1] == "\n" if at else self._at_line_start
            if begins_line and not self._is_in_code(buffer[:at]):
                places[FUNCTION_OPEN] = at
                break
        found = [(at, tag) for tag, at in places.items() if at >= 0]
        at, tag = min(found, default=(len(buffer), ""))
        return tag, at

    def _num_held_by_bare_call(self, text: str, is_end: bool) -> int:
        """The number of characters at the end of `text` that may start a call without a tag."""
        start = text.rfind("\n") + 1
        line = text[start:]
        if not line or start < self._num_plain or not (start or self._at_line_start):
            return 0
        may_open = any(opening.startswith(line) for opening in self._openings)
        may_open = may_open and not self._is_in_code(text[:start])
        # At the end of the text, the start of a call must contain `<function=`.
        return len(line) if may_open and (not is_end or line.startswith(FUNCTION_OPEN)) else 0

    def _is_in_code(self, text: str) -> bool:
        """Whether a code block is open after the emitted text and `text`."""
        return len(FENCE.findall("".join([*self._shown, text]))) % 2 == 1

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        """The position of the stop string that ends first, and the string."""
        found = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        return min(found)[1:] if found else None

    def _read_call(self, call: CallText, pieces: list[Piece], is_end: bool) -> bool:
        """Continue parsing a call; returns False if more text is needed."""
        call.read(self._buffer)
        self._buffer = ""
        if is_end:
            call.finish()
        if call.end is None:
            return False
        self._call, self._buffer = None, call.text
        if call.is_talk:
            # Not a call: the text is plain, even if it contains tags.
            self._num_plain = call.end
        else:
            self._buffer = call.text[call.end :]
            pieces += [Piece("tool_call", "", call) for call in call.calls]
            self._begin()
            self._is_after_call, self._is_blank = True, False
        return True

    def _begin(self) -> None:
        """Reset the state after a tag."""
        self._is_opening = self._at_line_start = True
        self._is_blank = not self.in_thought
        self._num_plain = 0
        self._shown = []

    def _without_gap(self, text: str) -> str:
        """The text without the space after a tag."""
        return text.lstrip() if self._is_after_call else text.lstrip("\n" * self._is_opening)

    def _show(self, text: str, pieces: list[Piece]) -> None:
        """Emit text without the space after a tag."""
        if text:
            self._at_line_start = text.endswith("\n")
            self._shown.append(text)
        if text := self._without_gap(text):
            if self._is_after_call and self._has_answered:
                text = f"\n\n{text}"
            self._is_opening = self._is_after_call = False
            self._is_blank = self._is_blank and not text.strip()
            self._has_answered = self._has_answered or not self.in_thought
            pieces.append(Piece("thought" if self.in_thought else "answer", text))


def held_back(text: str, markers: Sequence[str]) -> int:
    """The number of characters at the end of `text` that may be the start of a marker."""
    longest = max((len(m) - 1 for m in markers), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(m.startswith(text[-size:]) for m in markers):
            return size
    return 0
