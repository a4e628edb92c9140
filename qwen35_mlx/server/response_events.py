"""The output items of a response, and their events."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..engine.requests import Request
from .events import sse
from .faults import ApiError
from .messages import hidden
from .replies import Reply, ReplyWriter, SentCall
from .service import Service


class _Part(NamedTuple):
    """Names in the API for an item with text."""

    # Type and field of the item, type of its only part, names of its events.
    item: str
    field: str
    part: str
    text_event: str
    part_event: str

    def of(self, text: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
        """The part as an object."""
        more = {"annotations": [], "logprobs": entries} if self.part == "output_text" else {}
        return {"type": self.part, "text": text, **more}


ANSWER = _Part("message", "content", "output_text", "output_text", "content_part")
THOUGHT = _Part("reasoning", "content", "reasoning_text", "reasoning_text", "content_part")
SUMMARY = _Part(
    "reasoning", "summary", "summary_text", "reasoning_summary_text", "reasoning_summary_part"
)


class ResponseWriter(ReplyWriter):
    """Writes a response, as events or as an object."""

    def __init__(
        self,
        service: Service,
        request: Request,
        response: dict[str, Any],
        given: list[dict[str, Any]],
    ):
        super().__init__(service, "", "", request)
        self._response = response
        self._given = given
        wants_summary = response["reasoning"]["summary"] not in (None, "none")
        self._thought_part = SUMMARY if wants_summary else THOUGHT
        self._number = 0
        # The items so far; the last one may be open.
        self._items: list[dict[str, Any]] = []
        self._open: _Part | None = None
        self._text_so_far = ""
        self._entries: list[dict[str, Any]] = []

    def _sign_of_life(self) -> bytes:
        return self._event("response.in_progress", response=self._response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return sse({"type": kind, "sequence_number": number, **fields}, kind)

    def _begin(self) -> bytes:
        self._response["created_at"] = int(self._created_s)
        return b"".join(
            self._event(f"response.{kind}", response=self._response)
            for kind in ("created", "in_progress")
        )

    def _failed(self, fault: ApiError) -> bytes:
        error = {"code": fault.code or "server_error", "message": fault.message}
        failed = self._response | {"status": "failed", "error": error}
        return self._event("response.failed", response=failed)

    def _end(self) -> bytes:
        response = self._object()
        return self._event(f"response.{response['status']}", response=response)

    def _thought(self, reply: Reply, text: str) -> bytes:
        return self._add(self._thought_part, text)

    def _text(self, reply: Reply, text: str, entries: list[dict[str, Any]]) -> bytes:
        return self._add(ANSWER, text, entries)

    def _done(self, reply: Reply, entries: list[dict[str, Any]]) -> bytes:
        self._entries += entries
        data = b"" if self._items else self._add(ANSWER, "")
        return data + self._close(is_cut=reply.finish_reason in ("length", "loop"))

    def _begin_item(self, item: dict[str, Any]) -> bytes:
        self._items.append(item)
        self._text_so_far, self._entries = "", []
        index = len(self._items) - 1
        return self._event("response.output_item.added", output_index=index, item=item)

    def _place(self, part: _Part | None = None, **more: Any) -> dict[str, Any]:
        """The last item for an event, and the index of its only part."""
        of_part = {f"{part.field}_index": 0} if part else {}
        index = len(self._items) - 1
        return {"item_id": self._items[-1]["id"], "output_index": index, **of_part, **more}

    def _add(self, part: _Part, text: str, entries: Sequence[dict[str, Any]] = ()) -> bytes:
        """Add text to an item; opens a new item if another kind is open."""
        data = b""
        if self._open is not part:
            data = self._close()
            self._open = part
            item: dict[str, Any] = {"type": part.item, "status": "in_progress", "content": []}
            if part is ANSWER:
                item |= {"id": f"msg_{secrets.token_hex(12)}", "role": "assistant"}
            else:
                item |= {"id": f"rs_{secrets.token_hex(12)}", "summary": []}
                item["encrypted_content"] = None
            data += self._begin_item(item)
            place = self._place(part) | {"part": part.of("", [])}
            data += self._event(f"response.{part.part_event}.added", **place)
        if not text:
            return data
        self._text_so_far += text
        self._entries += entries
        more = {"logprobs": list(entries)} if part is ANSWER else {}
        place = self._place(part, delta=text, **more)
        return data + self._event(f"response.{part.text_event}.delta", **place)

    def _call(self, reply: Reply, call: SentCall) -> bytes:
        item = {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }
        data = self._close() + self._begin_item(item)
        done = item | {"arguments": call.arguments, "status": "completed"}
        self._items[-1] = done
        kind = "response.function_call_arguments"
        data += self._event(f"{kind}.delta", **self._place(delta=call.arguments))
        place = self._place(name=call.name, arguments=call.arguments)
        data += self._event(f"{kind}.done", **place)
        return data + self._item_done()

    def _item_done(self) -> bytes:
        index = len(self._items) - 1
        return self._event("response.output_item.done", output_index=index, item=self._items[-1])

    def _close(self, is_cut: bool = False) -> bytes:
        """Close the open item."""
        if self._open is None:
            return b""
        part, self._open = self._open, None
        text, whole = self._text_so_far, part.of(self._text_so_far, self._entries)
        more = {"logprobs": self._entries} if part is ANSWER else {}
        place = self._place(part)
        data = self._event(f"response.{part.text_event}.done", **place, text=text, **more)
        data += self._event(f"response.{part.part_event}.done", **place, part=whole)
        status = "incomplete" if is_cut else "completed"
        self._items[-1] = self._items[-1] | {"status": status, part.field: [whole]}
        if part is not ANSWER:
            self._items[-1]["encrypted_content"] = hidden(text)
        return data + self._item_done()

    def _object(self) -> dict[str, Any]:
        """The final response; it is stored if the client wants that."""
        usage = self._usage
        is_cut = self._replies[0].finish_reason in ("length", "loop")
        self._response |= {
            "created_at": int(self._created_s),
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "completed_at": None if is_cut else int(time.time()),
            "output": self._items,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {
                    "cached_tokens": usage.cached_tokens,
                    "cache_write_tokens": 0,
                },
                "output_tokens": usage.generated_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.thought_tokens},
                "total_tokens": usage.prompt_tokens + usage.generated_tokens,
            },
        }
        if self._response["store"]:
            # A copy, so that later changes do not reach what is sent.
            kept = json.loads(json.dumps(self._response))
            self._service.keep_response(kept, self._given)
        return self._response
