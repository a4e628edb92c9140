"""Finds the end of a tool call in streamed text; reads every character once.

A tag token is represented by an unpaired surrogate, which decoded text never contains. So the same
characters from other tokens are plain text.
"""

import re
from collections.abc import Sequence

from ..prompt import THINK_CLOSE, THINK_OPEN
from .tool_calls import FUNCTION, Schema, ToolCall, read_json_calls, read_xml, tool_names

THINK, THINK_END, CALL, CALL_END = "\ud800", "\ud801", "\ud802", "\ud803"
TAGS = {THINK: THINK_OPEN, THINK_END: THINK_CLOSE, CALL: "<tool_call>", CALL_END: "</tool_call>"}
FUNCTION_OPEN, FUNCTION_CLOSE, PARAMETER_OPEN = "<function=", "</function>", "<parameter="
VALUE_CLOSE = "</parameter>"
XML_END = re.compile(rf"{VALUE_CLOSE}\s*{FUNCTION_CLOSE}")
JSON_MARK = re.compile(rf"[{{}}\[\]\"'{CALL_END}]")
QUOTE_END = {quote: re.compile(rf"[{quote}\\]") for quote in "\"'"}
# The start of another call (a tag alone may be mentioned in text), or an end tag.
NEW_CALL = re.compile(rf"{CALL}(?=\s*(?:{FUNCTION_OPEN}|\{{))|{CALL_END}")
# The most likely end of a call without a valid end.
BROKEN_END = re.compile(rf"(?:{FUNCTION_CLOSE}|{VALUE_CLOSE}|[}}\]])\s*{CALL_END}")
SPACE = re.compile(r"\s*")


def written(text: str) -> str:
    """Replace the markers in a text by their tags."""
    for marker, tag in TAGS.items():
        text = text.replace(marker, tag)
    return text


class CallText:
    """Parses one or more calls at the start of a streamed text; sets `end` to their end.

    before: space and tag before the calls. tagged: whether they start with `<tool_call>`, not with
    `<function=NAME>` alone. in_line: whether text precedes them in their line. in_thought: then
    they are accepted only if all tools are known, and only the end of the thought follows them.
    """

    def __init__(
        self, before: str, tools: Sequence[Schema], *, tagged: bool, in_line: bool, in_thought: bool
    ):
        self.calls: list[ToolCall] = []
        self.end: int | None = None
        # Whether the text up to `end` is not a call.
        self.is_talk = False
        self._tools = tools
        self._tagged, self._in_line, self._in_thought = tagged, in_line, in_thought
        # Processed text, in parts, because appending to one long string would copy it each time.
        self._parts, self._num_before = [before], len(before)
        self._text, self._at = "", 0
        # The end of the thought, and what follows it.
        self._behind = ""
        # Start of the current call, in the whole text.
        self._body = len(before)
        self._quote, self._depth = "", 0
        self._step = self._between

    @property
    def text(self) -> str:
        """The whole text, with `before`."""
        return "".join([*self._parts, self._text, self._behind])

    def read(self, text: str) -> None:
        """Append text and parse it; sets `end` when it is known."""
        closes = self._in_thought and (self._behind or THINK_END in text)
        at = 0 if self._behind else text.find(THINK_END) if closes else len(text)
        self._text, self._behind = self._text + text[:at], self._behind + text[at:]
        last = None
        while self.end is None and self._step != last:
            last = self._step
            last()
        num_done = min(self._at, len(self._text))
        self._parts.append(self._text[:num_done])
        self._num_before += num_done
        self._text, self._at = self._text[num_done:], self._at - num_done
        if closes and self.end is None and (not self._is_whole or self._behind[1:].strip()):
            self._talk(len(self._text))

    @property
    def _is_whole(self) -> bool:
        """Whether the whole text consists of calls; only the last end tag may be missing."""
        return self._step == self._between and bool(self.calls) and not self._text

    def finish(self) -> None:
        """Handle the end of the text. Calls without the last end tag are complete."""
        if self.end is not None or self._is_whole:
            self.end = len(self.text) if self.end is None else self.end
            return
        text = self.text
        broken = BROKEN_END.search(text, self._body)
        if broken and not self._in_thought and self._step in (self._value, self._json):
            # The value has no valid end: use the most likely one.
            self._spoil(text[: broken.end() - 1], broken.end())
        else:
            self._spoil(text, len(text))

    def _between(self) -> None:
        """State: before or after a call."""
        text = self._text
        while True:
            space = SPACE.match(text, self._at)
            if space and space.end() > self._at:
                self._in_line = self._in_line and "\n" not in space[0]
                self._at = space.end()
            rest = text[self._at : self._at + len(FUNCTION_OPEN)]
            if rest[:1] == CALL_END and self.calls:
                self._at += 1
                if not self._in_thought:
                    self.end = self._num_before + self._at
                    return
                self._tagged = False
            elif rest[:1] == CALL:
                self._at += 1
                self._tagged = True
            else:
                break
        self._body = self._num_before + self._at
        if rest == FUNCTION_OPEN:
            self._step = self._name
        elif rest[:1] in ("{", "[") and self._tagged:
            self._step = self._json
        elif not FUNCTION_OPEN.startswith(rest):
            is_mention = self._in_line and not self.calls and rest[0] != "<"
            self._break(self._at, is_talk=is_mention)

    def _name(self) -> None:
        """State: in the tag of a function, or before its first parameter."""
        if not (function := FUNCTION.match(self._text, self._at)):
            name = self._text[self._at + len(FUNCTION_OPEN) :]
            if "\n" in name or name[:1] == ">":
                self._break(self._at)
            return
        space = SPACE.match(self._text, function.end())
        at = space.end() if space else function.end()
        rest = self._text[at : at + len(PARAMETER_OPEN)]
        if rest == PARAMETER_OPEN:
            self._at, self._step = at, self._value
        elif rest == FUNCTION_CLOSE:
            self._take_xml(at + len(rest))
        elif not PARAMETER_OPEN.startswith(rest) and not FUNCTION_CLOSE.startswith(rest):
            self._break(at, is_talk=not self._tagged)

    def _value(self) -> None:
        """State: in the parameters, up to the end tags of a value and of the function."""
        text = self._text
        if end := XML_END.search(text, self._at):
            self._take_xml(end.end())
            return
        last = text.rfind(VALUE_CLOSE, self._at)
        may_end = last >= 0 and FUNCTION_CLOSE.startswith(text[last + len(VALUE_CLOSE) :].lstrip())
        self._at = last if may_end else max(self._at, len(text) - len(VALUE_CLOSE) + 1)

    def _json(self) -> None:
        """State: in an object or a list, in JSON or in Python syntax."""
        while True:
            pattern = QUOTE_END[self._quote] if self._quote else JSON_MARK
            if not (mark := pattern.search(self._text, self._at)):
                self._at = max(self._at, len(self._text))
                return
            self._at = mark.end()
            if mark[0] == "\\":
                self._at += 1
            elif self._quote or mark[0] in QUOTE_END:
                self._quote = "" if self._quote else mark[0]
            elif mark[0] == CALL_END:
                return self._break(mark.start())
            else:
                self._depth += 1 if mark[0] in "{[" else -1
                if self._depth == 0:
                    break
        body = self.text[self._body : self._num_before + self._at]
        self._take(read_json_calls(written(body), self._tools), body.find(CALL_END))

    def _skip(self) -> None:
        """State: in a call that cannot be parsed."""
        close = self._text.find(CALL_END, self._at)
        self._at = len(self._text) if close < 0 else close
        if close >= 0:
            end = self._num_before + close
            self._spoil(self.text[:end], end + 1)

    def _take_xml(self, end: int) -> None:
        self._at = end
        body = self.text[self._body : self._num_before + end]
        crossed = _crossed(body)
        self._take([] if crossed >= 0 else [read_xml(written(body), self._tools)], crossed)

    def _take(self, calls: list[ToolCall], broken_at: int) -> None:
        """Accept `calls` if all are complete; otherwise the call is invalid from `broken_at` on."""
        # In a thought, a call to an unknown function is text.
        known = tool_names(self._tools) if self._in_thought else [call.name for call in calls]
        if not calls or not all(call.complete and call.name in known for call in calls):
            start = self._body - self._num_before
            self._break(start + broken_at if broken_at >= 0 else self._at)
            return
        self.calls += calls
        self._step = self._between
        if not self._tagged and not self._in_thought:
            self.end = self._num_before + self._at

    def _break(self, at: int, is_talk: bool = False) -> None:
        """Handle an invalid call: treat it as text, or skip it up to its end tag."""
        if self._in_thought or is_talk:
            return self._talk(at)
        # All text so far belongs to the call.
        whole = self.text
        self._parts, self._num_before = [], 0
        self._text, self._at = whole, len(whole) - len(self._text) + at
        self._step = self._skip
        return None

    def _talk(self, at: int) -> None:
        self.is_talk, self.end = True, self._num_before + at
        self.calls = []

    def _spoil(self, text: str, end: int) -> None:
        """Add an incomplete call with everything that can be parsed in `text`."""
        self.end = end
        if self.calls and not self._in_thought:
            self.calls = [self.calls[0]._replace(complete=False)]
        else:
            call = read_xml(written(text[self._body :]), self._tools)
            self.calls.append(call._replace(complete=False))


def _crossed(text: str) -> int:
    """The position of the end tag of the call in `text` if another call follows it, or -1."""
    depth, closed = 1, -1
    for mark in NEW_CALL.finditer(text):
        if mark[0] == CALL and closed >= 0:
            return closed
        depth += 1 if mark[0] == CALL else -1
        if depth == 0 and closed < 0:
            closed = mark.start()
    return -1
