"""Memory of the model's own answers, for clients that send them back changed.

Many clients drop thoughts or rewrite the arguments of calls. Then the next prompt would differ from
the cached one, and everything after the difference would be prefilled again.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from ..errors import PromptError
from ..text.messages import tool_calls
from .tool_calls import ToolCall, as_message

Message = Mapping[str, Any]
MAX_ANSWERS = 4096
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


class AnswerMemory:
    """Thoughts and calls of recent answers, by a hash of the conversation up to them.

    So no conversation gets the thought of another one. Thread-safe.
    """

    def __init__(self) -> None:
        self._answers: OrderedDict[bytes, tuple[str, list[dict[str, Any]]]] = OrderedDict()
        self._lock = Lock()

    def restored(self, messages: Sequence[Any], adapter: str = "") -> tuple[list[Any], bytes]:
        """The messages with answers as the model wrote them, and the key for the next answer.

        Answers of other adapters are not found.
        """
        key, restored = adapter.encode(), list[Any]()
        for message in messages:
            key = _key(key, message)
            if isinstance(message, Mapping) and message.get("role") == "assistant":
                with self._lock:
                    if (known := self._answers.get(key)) is not None:
                        self._answers.move_to_end(key)
                if known is not None:
                    message = _as_written(message, *known)
            restored.append(message)
        return restored, key

    def remember(
        self, key: bytes, content: str, thought: str, calls: Sequence[ToolCall], typed: bool
    ) -> None:
        """Store the answer to the messages of `key`; `typed` as in `as_message`."""
        sent = [as_message(call, typed=True) for call in calls]
        answer = {"role": "assistant", "content": content, "tool_calls": sent}
        written = [as_message(call, typed=typed)["function"]["arguments"] for call in calls]
        with self._lock:
            self._answers[_key(key, answer)] = thought, written
            while len(self._answers) > MAX_ANSWERS:
                self._answers.popitem(last=False)


def _as_written(message: Message, thought: str, written: Sequence[dict[str, Any]]) -> Message:
    changed = {k: v for k, v in message.items() if k not in THOUGHTS}
    changed["reasoning_content"] = thought
    if written:
        changed["tool_calls"] = [
            {**call, "function": {**(call.get("function") or call), "arguments": arguments}}
            for call, arguments in zip(message["tool_calls"], written, strict=True)
        ]
    return changed


def _key(before: bytes, message: Any) -> bytes:
    """The key of a message after others; it ignores the thought and the spelling of calls."""
    if not isinstance(message, Mapping):
        said: Any = repr(message)
    else:
        content = message.get("content")
        if isinstance(content, list | tuple):
            parts = [_shown(part) for part in content]
            # Text parts are equal to one text.
            is_text = all(isinstance(part, str) for part in parts)
            content = "".join(parts) if is_text else parts
        try:
            calls = [(name, arguments) for name, arguments, _ in tool_calls(message)]
        except PromptError:
            calls = []
        text = content.strip() if isinstance(content, str) else content or ""
        said = [message.get("role"), text, calls]
    written = json.dumps(said, sort_keys=True, default=repr, ensure_ascii=True)
    return hashlib.sha256(before + written.encode()).digest()


def _shown(part: Any) -> Any:
    """A part's text, or the digest of its picture."""
    if not isinstance(part, Mapping):
        return [part]
    if isinstance(part.get("text"), str):
        return part["text"]
    digest = next((v.digest for v in part.values() if hasattr(v, "digest")), None)
    return [digest.hex()] if digest else [part]
