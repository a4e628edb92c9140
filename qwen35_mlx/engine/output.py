"""Generated text, split while it streams into thought, answer and tool calls."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from ..prompt import THINK_CLOSE, THINK_OPEN


class ToolCall(NamedTuple):
    """A function that the model wants called."""

    name: str
    arguments: dict[str, Any]
    # As the model wrote them: so the next prompt repeats them.
    raw_arguments: dict[str, str]
    # False if the call was cut or cannot be understood: not to be run.
    complete: bool = True


class Piece(NamedTuple):
    """A bit of streamed text, of the thought or of the answer, or a whole tool call."""

    kind: Literal["thought", "answer", "tool_call"]
    text: str
    call: ToolCall | None = None


class ThoughtSplitter:
    """Splits streamed text at `</think>`; a tag cut over several tokens never shows."""

    def __init__(self, thinking: bool):
        """thinking: whether the prompt has opened a thought already."""
        # Whether what follows is thought, as far as that is certain.
        self.in_thought = thinking
        self._pending = ""
        self._blank = True

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain after `text`."""
        self._pending += text
        pieces: list[Piece] = []
        while True:
            tag = THINK_CLOSE if self.in_thought else THINK_OPEN
            at = self._pending.find(tag)
            # An answer may open a thought of its own, but only before it has said anything.
            said = not self.in_thought and not (self._blank and not self._pending[:at].strip())
            if at < 0 or said:
                break
            pieces += self._piece(self._pending[:at].rstrip("\n"))
            self._pending = self._pending[at + len(tag) :]
            self.in_thought = not self.in_thought
            self._blank = True
        keep = held_back(self._pending, (tag,)) if self.in_thought or self._blank else 0
        ready = len(self._pending) - keep
        if self.in_thought:
            ready = len(self._pending[:ready].rstrip("\n"))
        pieces += self._piece(self._pending[:ready])
        self._pending = self._pending[ready:]
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back, now that nothing follows."""
        rest, self._pending = self._pending, ""
        return self._piece(rest.rstrip("\n") if self.in_thought else rest)

    def _piece(self, text: str) -> list[Piece]:
        # The newlines around a tag belong to neither side.
        if self._blank:
            text = text.lstrip("\n")
        if not text:
            return []
        self._blank = self._blank and not text.strip()
        return [Piece("thought" if self.in_thought else "answer", text)]


def held_back(text: str, markers: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a marker."""
    longest = max((len(m) - 1 for m in markers), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(m.startswith(text[-size:]) for m in markers):
            return size
    return 0


class StopText:
    """Streams text through, ending before the first stop string, even one cut over tokens."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._pending = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What may be shown after `text`."""
        if not self._stops:
            return text
        self._pending += text
        found = [(at + len(s), at) for s in self._stops if (at := self._pending.find(s)) >= 0]
        if found:
            self.stopped = True
            # The one that was complete first, however the text was cut into tokens.
            return self._pending[: min(found)[1]]
        ready = len(self._pending) - held_back(self._pending, self._stops)
        shown, self._pending = self._pending[:ready], self._pending[ready:]
        return shown

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        rest, self._pending = self._pending, ""
        return rest


class OutputParser:
    """Temporary: the three filters behind one interface."""

    def __init__(self, tokenizer, *, stop=(), thinking=False, tools=(), split=True):
        from .tool_calls import ToolCallParser

        self._tokenizer, self._detokenizer = tokenizer, tokenizer.detokenizer
        self._stop = StopText(stop)
        self._splitter = ThoughtSplitter(thinking) if split else None
        self._tools = ToolCallParser(tools) if tools and split else None
        self.stopped = False

    @property
    def in_thought(self):
        return self._splitter is not None and self._splitter.in_thought

    def feed(self, token):
        if token in self._tokenizer.eos_token_ids:
            self.stopped = True
            return []
        self._detokenizer.add_token(token)
        text = self._stop.feed(self._detokenizer.last_segment)
        self.stopped = self._stop.stopped
        return self._split(text)

    def _split(self, text, end=False):
        if self._splitter is None:
            return [Piece("answer", text)] if text else []
        pieces = self._splitter.feed(text) + (self._splitter.finish() if end else [])
        if not self._tools:
            return pieces
        out = []
        for piece in pieces:
            out += self._tools.feed(piece.text) if piece.kind == "answer" else [piece]
        return out + (self._tools.finish() if end else [])

    def finish(self):
        self._detokenizer.finalize()
        text = self._stop.feed(self._detokenizer.last_segment)
        if not self._stop.stopped:
            text += self._stop.finish()
        return self._split(text, end=True)
