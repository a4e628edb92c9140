"""Input items of OpenAI's /v1/responses, converted to the form of `messages.py`."""

from typing import Any

from .chat_messages import read_parts
from .faults import ApiError
from .fields import Fields
from .hidden_thoughts import revealed
from .messages import Message, check_media, folded
from .messages import tool_call as history_call

ROLES = ("user", "assistant", "system", "developer", "tool")
# Items of OpenAI's own tools in a history, which have no meaning for this model.
LEFT_OUT = (
    "web_search_call",
    "file_search_call",
    "image_generation_call",
    "code_interpreter_call",
    "computer_call",
    "computer_call_output",
    "mcp_call",
    "mcp_list_tools",
    "mcp_approval_request",
    "mcp_approval_response",
    "tool_search_call",
    "tool_search_output",
    "compaction",
)


def read_input(body: Fields) -> list[dict[str, Any]]:
    """The items of `input`; a string is a message of the user."""
    given = body.raw("input")
    if given is None:
        raise body.missing("input")
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    if not isinstance(given, list):
        raise body.refuse("input", "a string or a list of items", "invalid_type")
    if not given:
        raise body.refuse("input", "at least one item")
    body.records("input")
    return given


def read_messages(items: list[dict[str, Any]], instructions: str | None) -> list[Message]:
    """The items as messages, folded; items of one answer become one message."""
    reader = _Reader()
    if instructions:
        reader.messages.append({"role": "system", "content": instructions})
    for i, item in enumerate(items):
        reader.read(Fields(item, f"input[{i}]"))
    return check_media(folded(reader.messages))


class _Reader:
    """Joins items into messages."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        # The assistant's message that further items may be added to.
        self._open: Message | None = None

    def read(self, item: Fields) -> None:
        """Add one item."""
        kind = item.text("type") or ("message" if "role" in item else None)
        if kind is None:
            raise item.missing("type")
        if kind == "message":
            self._message(item)
        elif kind == "reasoning":
            answer = self._answer(begins=True)
            thoughts = (answer.get("reasoning_content"), _thought(item))
            answer["reasoning_content"] = "\n".join(filter(None, thoughts))
        elif kind == "function_call":
            self._call(item, item.raw("arguments"))
        elif kind == "custom_tool_call":
            self._call(item, {"input": item.text("input") or ""})
        elif kind == "local_shell_call":
            call = history_call("local_shell", item.mapping("action"), item.text("call_id"))
            self._answer().setdefault("tool_calls", []).append(call)
        elif kind.endswith("_call_output") and kind not in LEFT_OUT:
            self._open = None
            self.messages.append({"role": "tool", "content": _parts(item, "output")})
        elif kind not in LEFT_OUT:
            raise item.refuse("type", "message, reasoning, function_call or function_call_output")

    def _message(self, item: Fields) -> None:
        role = item.needed_choice("role", ROLES)
        content = _parts(item, "content")
        if role == "assistant":
            answer = self._answer(begins=bool(self._open and self._open["content"]))
            answer["content"] = content
            return
        self._open = None
        role = "system" if role == "developer" else role
        self.messages.append({"role": role, "content": content})

    def _call(self, item: Fields, arguments: Any) -> None:
        name = item.needed_text("name")
        call = history_call(name, arguments, item.text("call_id") or item.text("id"))
        self._answer().setdefault("tool_calls", []).append(call)

    def _answer(self, begins: bool = False) -> Message:
        """The open message, or a new one."""
        answer = self._open
        if answer is None or (begins and (answer["content"] or "tool_calls" in answer)):
            answer = self._open = {"role": "assistant", "content": ""}
            self.messages.append(answer)
        return answer


def _thought(item: Fields) -> str:
    """The thought of a reasoning item, from whichever field has it."""
    if thought := revealed(item.text("encrypted_content")):
        return thought
    for field in ("content", "summary"):
        texts = [part.text("text") or "" for part in item.records(field) or ()]
        if text := "\n".join(texts):
            return text
    return ""


def _parts(item: Fields, field: str) -> Any:
    """A required content or output."""
    if field not in item:
        raise item.missing(field)
    return read_parts(item, field)


def found_item(identity: str | None, responses: Any) -> dict[str, Any]:
    """An item of an earlier response, by its id."""
    for response, given in responses:
        for item in (*response["output"], *given):
            if identity and item.get("id") == identity:
                return dict(item)
    raise ApiError(404, f"Item with id '{str(identity)[:80]}' not found.", param="input")
