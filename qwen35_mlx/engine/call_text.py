"""Where a tool call ends in text that still grows; every character is looked at once.

A marker token is one unpaired surrogate in the text: no decoded text holds one, so tags that are
spelled by other tokens are text.
"""

import re
from collections.abc import Sequence

from ..prompt import THINK_CLOSE, THINK_OPEN
from .tool_calls import FUNCTION, ToolCall, read_json_calls, read_xml, tool_names
from .tool_values import Schema

THINK, THINK_END, CALL, CALL_END = "\ud800", "\ud801", "\ud802", "\ud803"
TAGS = {THINK: THINK_OPEN, THINK_END: THINK_CLOSE, CALL: "<tool_call>", CALL_END: "</tool_call>"}
FUNCTION_OPEN, FUNCTION_CLOSE, PARAMETER_OPEN = "<function=", "</function>", "<parameter="
VALUE_CLOSE = "</parameter>"
XML_END = re.compile(rf"{VALUE_CLOSE}\s*{FUNCTION_CLOSE}")
JSON_MARK = re.compile(rf"[{{}}\[\]\"'{CALL_END}]")
QUOTE_END = {quote: re.compile(rf"[{quote}\\]") for quote in "\"'"}
# Another call begins, and not only its tag is named.
NEW_CALL = re.compile(rf"{CALL}(?=\s*(?:{FUNCTION_OPEN}|\{{))|{CALL_END}")
# Where a call whose end never came ended most likely.
BROKEN_END = re.compile(rf"(?:{FUNCTION_CLOSE}|{VALUE_CLOSE}|[}}\]])\s*{CALL_END}")
SPACE = re.compile(r"\s*")


def written(text: str) -> str:
    """The text with markers as the model wrote them."""
    for marker, tag in TAGS.items():
        text = text.replace(marker, tag)
    return text


class CallText:
    """One or more calls at the start of a text that still comes; then `end` is where they end.

    before: the space and the tag in front of them. tagged: behind `<tool_call>`, else at a bare
    `<function=NAME>`. in_line: there is text before it in its line. in_thought: then a call
    counts only if nothing but calls and the end of the thought follows, and it must be of a known
    tool.
    """

    def __init__(
        self, before: str, tools: Sequence[Schema], *, tagged: bool, in_line: bool, in_thought: bool
    ):
        self.calls: list[ToolCall] = []
        self.end: int | None = None
        # The text up to `end` only looks like a call.
        self.is_talk = False
        self._tools = tools
        self._tagged, self._in_line, self._in_thought = tagged, in_line, in_thought
        # Text that was looked at, in parts: to add to one long text would copy it each time.
        self._parts, self._num_before = [before], len(before)
        self._text, self._at = "", 0
        # The end of the thought, and what follows it.
        self._behind = ""
        # Where in all of the text the call that is being read begins.
        self._body = len(before)
        self._quote, self._depth = "", 0
        self._step = self._between

    @property
    def text(self) -> str:
        """All of it, `before` included."""
        return "".join([*self._parts, self._text, self._behind])

    def read(self, text: str) -> None:
        """Take more text; sets `end` once it is known."""
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
        """Whether all that was read is calls, complete but for their last tag."""
        return self._step == self._between and bool(self.calls) and not self._text

    def finish(self) -> None:
        """Take the end of all text: calls of which only the last tag is missing are whole."""
        if self.end is not None or self._is_whole:
            self.end = len(self.text) if self.end is None else self.end
            return
        text = self.text
        broken = BROKEN_END.search(text, self._body)
        if broken and not self._in_thought and self._step in (self._value, self._json):
            # A value that goes on to the end of all text lacks its own end.
            self._spoil(text[: broken.end() - 1], broken.end())
        else:
            self._spoil(text, len(text))

    def _between(self) -> None:
        """Before a call, or behind one."""
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
        """In the tag of a function, or behind it before its first parameter."""
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
        """Among the parameters: they end where a value and the function do."""
        text = self._text
        if end := XML_END.search(text, self._at):
            self._take_xml(end.end())
            return
        last = text.rfind(VALUE_CLOSE, self._at)
        may_end = last >= 0 and FUNCTION_CLOSE.startswith(text[last + len(VALUE_CLOSE) :].lstrip())
        self._at = last if may_end else max(self._at, len(text) - len(VALUE_CLOSE) + 1)

    def _json(self) -> None:
        """In an object or a list, in JSON or Python's spelling."""
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
        """In a call that cannot be understood."""
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
        """Count `calls` as read, if they are whole; else the call broke there in its text."""
        # In a thought, a call of a function that is not there is talk.
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
        """This is no call that can be run: talk, or to be skipped up to its tag."""
        if self._in_thought or is_talk:
            return self._talk(at)
        # All before belongs to the call, looked at or not.
        whole = self.text
        self._parts, self._num_before = [], 0
        self._text, self._at = whole, len(whole) - len(self._text) + at
        self._step = self._skip
        return None

    def _talk(self, at: int) -> None:
        self.is_talk, self.end = True, self._num_before + at
        self.calls = []

    def _spoil(self, text: str, end: int) -> None:
        """Give a call of which `text` is all, as far as it can be understood."""
        self.end = end
        if self.calls and not self._in_thought:
            self.calls = [self.calls[0]._replace(complete=False)]
        else:
            call = read_xml(written(text[self._body :]), self._tools)
            self.calls.append(call._replace(complete=False))


def _crossed(text: str) -> int:
    """Where a call without an end of its own was closed, if another one begins behind; else -1."""
    depth, closed = 1, -1
    for mark in NEW_CALL.finditer(text):
        if mark[0] == CALL and closed >= 0:
            return closed
        depth += 1 if mark[0] == CALL else -1
        if depth == 0 and closed < 0:
            closed = mark.start()
    return -1
