"""OpenAI's /v1/chat/completions."""

import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..engine.requests import Progress, Request, Usage
from . import options
from .chat_messages import read_messages, read_tool_choice, read_tools
from .events import sse
from .faults import ApiError
from .fields import Fields
from .messages import strict_names
from .replies import Reply, ReplyWriter, SentCall, timings
from .service import Service, begun

MAX_CHOICES = 128
MAX_STOPS = 4
DONE = b"data: [DONE]\n\n"
FINISH = {"loop": "length", "cancelled": "stop"}
# Fields that ask for answers other than text.
REFUSED = ("audio", "web_search_options")


async def chat_completions(http: HttpRequest) -> Response:
    """Answer messages."""
    service, body = await begun(http)
    chat = _Chat(service, body)
    answer = await service.answer(chat.request)
    return chat.response(answer, chat.is_stream)


def usage_object(usage: Usage) -> dict[str, Any]:
    """Usage in the form of chat completions and completions."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.generated_tokens,
        "total_tokens": usage.prompt_tokens + usage.generated_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": usage.thought_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def chat_request(service: Service, body: Fields) -> Request:
    """The engine's request for a body of chat completions."""
    _refuse_other_media(body)
    messages = read_messages(body)
    choice, tools = read_tool_choice(body, read_tools(body))
    thinking = options.thinking(body)
    wants_logprobs = body.flag("logprobs")
    num_top = body.integer("top_logprobs", 0, 20)
    if num_top and not wants_logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    parallel = body.flag("parallel_tool_calls")
    stops = body.texts("stop", MAX_STOPS)
    return Request(
        messages=messages,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=parallel is not False,
        strict_tools=strict_names(body),
        **vars(thinking),
        template=options.template_options(body),
        continue_final=_continues(body, messages),
        params=options.sampling(body, service.settings.defaults),
        logit_bias=options.logit_bias(body, service.settings.vocab_size),
        seed=options.seed(body),
        n=body.integer("n", 1, MAX_CHOICES) or 1,
        max_tokens=options.max_tokens(body, "max_completion_tokens", "max_tokens"),
        min_tokens=body.integer("min_tokens", 0) or 0,
        ignore_eos=body.flag("ignore_eos") or False,
        stop=stops,
        grammar=options.response_format(body) or options.structured_outputs(body),
        logprobs=(num_top or 0) if wants_logprobs else None,
        adapter=service.adapter(body),
        wants_progress=body.flag("return_progress") or False,
    )


def _refuse_other_media(body: Fields) -> None:
    for name in REFUSED:
        if name in body:
            raise body.refuse(name, "nothing: this server does not support it", "unsupported")
    if any(kind != "text" for kind in body.items("modalities") or ()):
        raise body.refuse("modalities", '["text"]', "unsupported")
    if body.text("reasoning_format") == "none":
        raise body.refuse("reasoning_format", "auto or deepseek", "unsupported")


def _continues(body: Fields, messages: list[Any]) -> bool:
    """Whether the answer continues the last message."""
    wanted = body.flag("continue_final_message") or False
    if body.flag("add_generation_prompt") is False and not wanted:
        raise body.refuse(
            "add_generation_prompt", "true, or continue_final_message: true", "unsupported"
        )
    if wanted and messages[-1]["role"] != "assistant":
        raise body.refuse("continue_final_message", "a last message of the assistant")
    return wanted


class _Chat(ReplyWriter):
    """One request for a chat completion, and its answer."""

    def __init__(self, service: Service, body: Fields):
        model, request = service.check_model(body), chat_request(service, body)
        super().__init__(service, "chatcmpl-", model, request)
        self.is_stream = body.flag("stream") or False
        self._wants_usage = options.includes_usage(body)
        # Clients of the oldest form of the API need its form of answers.
        self._is_old = "functions" in body and "tools" not in body

    def _sign_of_life(self) -> bytes:
        return self._delta(self._replies[0], {})

    def _begin(self) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._delta(reply, delta) for reply in self._replies)

    def _end(self) -> bytes:
        usage = self._usage
        if not self._wants_usage:
            return DONE
        return self._chunk([], usage=usage_object(usage), timings=timings(usage)) + DONE

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return sse(self._completion("chat.completion.chunk", choices, **more))

    def _delta(
        self,
        reply: Reply,
        delta: dict[str, Any],
        entries: Sequence[dict[str, Any]] = (),
        finish: str | None = None,
        **more: Any,
    ) -> bytes:
        """A chunk of one choice."""
        choice = {"index": reply.index, "delta": delta, "finish_reason": finish}
        choice["logprobs"] = {"content": entries, "refusal": None} if entries else None
        return self._chunk([choice], **more)

    def _take(self, place: int, event: Any) -> bytes:
        if not isinstance(event, Progress):
            return super()._take(place, event)
        # llama.cpp's form of prefill progress.
        progress = {
            "total": event.num_tokens,
            "cache": self._usage.cached_tokens,
            "processed": event.num_read,
            "time_ms": round((time.time() - self._created_s) * 1000),
        }
        return self._delta(self._replies[0], {}, prompt_progress=progress)

    def _thought(self, reply: Reply, text: str) -> bytes:
        return self._delta(reply, {"reasoning_content": text, "reasoning": text})

    def _text(self, reply: Reply, text: str, entries: list[dict[str, Any]]) -> bytes:
        return self._delta(reply, {"content": text}, entries)

    def _call(self, reply: Reply, call: SentCall) -> bytes:
        """Two chunks: the name of the call, then its arguments."""
        if self._is_old:
            function = {"name": call.name, "arguments": call.arguments}
            return self._delta(reply, {"function_call": function})
        index, function = reply.calls.index(call), {"name": call.name, "arguments": ""}
        head = {"index": index, "id": call.id, "type": "function", "function": function}
        tail = {"index": index, "function": {"arguments": call.arguments}}
        return b"".join(self._delta(reply, {"tool_calls": [part]}) for part in (head, tail))

    def _done(self, reply: Reply, entries: list[dict[str, Any]]) -> bytes:
        more = {} if self._wants_usage else {"timings": timings(self._usage)}
        return self._delta(reply, {}, entries, self._finish(reply), **more)

    def _finish(self, reply: Reply) -> str:
        reason = reply.finish_reason or "stop"
        if reason == "tool_calls" and self._is_old:
            return "function_call"
        return FINISH.get(reason, reason)

    def _object(self) -> dict[str, Any]:
        choices = [
            {
                "index": reply.index,
                "message": self._message(reply),
                "logprobs": {"content": reply.entries, "refusal": None} if reply.tokens else None,
                "finish_reason": self._finish(reply),
            }
            for reply in self._replies
        ]
        usage = self._usage
        more = {"usage": usage_object(usage), "timings": timings(usage)}
        return self._completion("chat.completion", choices, **more)

    def _message(self, reply: Reply) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": reply.text if reply.text or not reply.calls else None,
            "refusal": None,
            "annotations": [],
        }
        if reply.thought:
            message |= {"reasoning_content": reply.thought, "reasoning": reply.thought}
        if reply.calls and self._is_old:
            call = reply.calls[0]
            message["function_call"] = {"name": call.name, "arguments": call.arguments}
        elif reply.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in reply.calls
            ]
        return message
