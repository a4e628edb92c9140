"""Messages of the user, with pictures, and of tools."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..text.media_parts import Part, is_media

Message = dict[str, Any]


def user_message(text: str, media: Sequence[Part] = ()) -> Message:
    """A message of the user; pictures and videos come before the text."""
    content = [*media, {"type": "text", "text": text}] if media else text
    return {"role": "user", "content": content}


def tool_message(result: Any) -> Message:
    """The message for a tool's result: text and parts with a picture as given, all else as JSON."""
    is_parts = (
        isinstance(result, list | tuple)
        and all(isinstance(part, Mapping) for part in result)
        and any(map(is_media, result))
    )
    if isinstance(result, str) or is_parts:
        return {"role": "tool", "content": result}
    return {"role": "tool", "content": json.dumps(result, ensure_ascii=False)}
