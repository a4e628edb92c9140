"""The output items of a response, and the events that tell of them."""

import json
import secrets
import time
from typing import Any

from ..engine.requests import Done, Token
from .events import sse
from .faults import ApiError
from .hidden_thoughts import hidden
from .replies import AnswerTokens, Reply, SentCall, Writer
from .service import Service

COMMENT = b": keepalive\n\n"
MESSAGE, REASONING = "message", "reasoning"


class ResponseWriter(Writer):
    """Builds a response."""

    def __init__(self, service: Service, response: dict[str, Any], given: list[dict[str, Any]]):
        super().__init__(service)
        self._response = response
        self._given = given
        self._reply = Reply()
        self._tokens = AnswerTokens(service)
        self._wants_logprobs = False
        self._wants_summary = response["reasoning"]["summary"] not in (None, "none")
        self._number = 0
        self._num_keepalives = 0
        # The items so far, the last of which may be open.
        self._items: list[dict[str, Any]] = []
        self._is_open = False
        self._text = ""
        self._entries: list[dict[str, Any]] = []

    def keepalive(self) -> bytes:
        """A comment; now and then an event, for clients that count only those."""
        self._num_keepalives += 1
        if self._num_keepalives % 5:
            return COMMENT
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

    def _take(self, place: int, event: Any) -> bytes:
        """The events for one of the engine's."""
        if not isinstance(event, Token | Done):
            return b""
        if isinstance(event, Token) and event.logprob is not None:
            self._wants_logprobs = True
        entries = self._tokens.add(event) if self._wants_logprobs else []
        data = b""
        for piece, call in self._reply.add(event, self._service):
            if call is not None:
                data += self._close() + self._call(call)
            elif piece.kind == "thought":
                data += self._thought(piece.text)
            else:
                data += self._answer(piece.text, entries)
                entries = []
        self._entries += entries
        if isinstance(event, Done):
            if not self._items:
                data += self._answer("", [])
            data += self._close(is_cut=event.finish_reason in ("length", "loop"))
        return data

    def _open(self, item: dict[str, Any]) -> bytes:
        self._items.append(item)
        self._is_open = True
        self._text, self._entries = "", []
        return self._event(
            "response.output_item.added", output_index=len(self._items) - 1, item=item
        )

    def _is_in(self, kind: str) -> bool:
        return self._is_open and self._items[-1]["type"] == kind

    def _place(self, **more: Any) -> dict[str, Any]:
        index = len(self._items) - 1
        return {"item_id": self._items[-1]["id"], "output_index": index, **more}

    def _thought(self, text: str) -> bytes:
        data = b""
        if not self._is_in(REASONING):
            data = self._close()
            data += self._open(
                {
                    "id": f"rs_{secrets.token_hex(12)}",
                    "type": REASONING,
                    "summary": [],
                    "content": [],
                    "encrypted_content": None,
                    "status": "in_progress",
                }
            )
            if self._wants_summary:
                data += self._event(
                    "response.reasoning_summary_part.added",
                    **self._place(summary_index=0, part={"type": "summary_text", "text": ""}),
                )
            else:
                part = {"type": "reasoning_text", "text": ""}
                data += self._event(
                    "response.content_part.added", **self._place(content_index=0, part=part)
                )
        self._text += text
        if self._wants_summary:
            place = self._place(summary_index=0, delta=text)
            return data + self._event("response.reasoning_summary_text.delta", **place)
        return data + self._event(
            "response.reasoning_text.delta", **self._place(content_index=0, delta=text)
        )

    def _answer(self, text: str, entries: list[dict[str, Any]]) -> bytes:
        data = b""
        if not self._is_in(MESSAGE):
            data = self._close()
            data += self._open(
                {
                    "id": f"msg_{secrets.token_hex(12)}",
                    "type": MESSAGE,
                    "role": "assistant",
                    "status": "in_progress",
                    "content": [],
                }
            )
            data += self._event(
                "response.content_part.added",
                **self._place(content_index=0, part=_output_text("", [])),
            )
        if not text:
            return data
        self._text += text
        self._entries += entries
        return data + self._event(
            "response.output_text.delta",
            **self._place(content_index=0, delta=text, logprobs=entries),
        )

    def _call(self, call: SentCall) -> bytes:
        item = {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }
        data = self._open(item)
        done = item | {"arguments": call.arguments, "status": "completed"}
        self._items[-1] = done
        data += self._event(
            "response.function_call_arguments.delta", **self._place(delta=call.arguments)
        )
        data += self._event(
            "response.function_call_arguments.done",
            **self._place(name=call.name, arguments=call.arguments),
        )
        self._is_open = False
        return data + self._item_done()

    def _item_done(self) -> bytes:
        index = len(self._items) - 1
        return self._event("response.output_item.done", output_index=index, item=self._items[-1])

    def _close(self, is_cut: bool = False) -> bytes:
        """End the item that is open."""
        if not self._is_open:
            return b""
        self._is_open = False
        text = self._text
        status = "incomplete" if is_cut else "completed"
        if self._items[-1]["type"] == MESSAGE:
            part: dict[str, Any] = _output_text(text, self._entries)
            data = self._event(
                "response.output_text.done",
                **self._place(content_index=0, text=text, logprobs=self._entries),
            )
            data += self._event(
                "response.content_part.done", **self._place(content_index=0, part=part)
            )
            self._items[-1] = self._items[-1] | {"status": status, "content": [part]}
            return data + self._item_done()
        finished: dict[str, Any] = {"status": status, "encrypted_content": hidden(text)}
        if self._wants_summary:
            part = {"type": "summary_text", "text": text}
            place = self._place(summary_index=0)
            data = self._event("response.reasoning_summary_text.done", **place, text=text)
            data += self._event("response.reasoning_summary_part.done", **place, part=part)
            finished["summary"] = [part]
        else:
            part = {"type": "reasoning_text", "text": text}
            place = self._place(content_index=0)
            data = self._event("response.reasoning_text.done", **place, text=text)
            data += self._event("response.content_part.done", **place, part=part)
            finished["content"] = [part]
        self._items[-1] = self._items[-1] | finished
        return data + self._item_done()

    def _object(self) -> dict[str, Any]:
        """The response with what is known at the end; it is kept if that is wanted."""
        usage = self._usage
        is_cut = self._reply.finish_reason in ("length", "loop")
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
            # A copy: what is sent may be changed no more.
            kept = json.loads(json.dumps(self._response))
            self._service.keep_response(kept, self._given)
        return self._response


def _output_text(text: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": entries}
