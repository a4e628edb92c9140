"""OpenAI's /v1/chat/completions: messages and tools are read, answers written."""

import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..engine.requests import Progress, Request, ToolName, Usage
from . import options
from .events import sse
from .faults import ApiError
from .fields import Fields
from .messages import (
    Message,
    assistant_message,
    call_id,
    check_media,
    folded,
    given_messages,
    history_call,
    joined,
    picture,
    read_function,
    read_functions,
    strict_names,
)
from .replies import Reply, ReplyWriter, SentCall, timings
from .service import Service, begun

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Types of text parts, and the field with the text.
TEXTS = dict.fromkeys(("text", "input_text", "output_text", "summary_text"), "text")
TEXTS |= {"reasoning_text": "text", "refusal": "refusal"}
MAX_CHOICES = 128
MAX_STOPS = 4
DONE = b"data: [DONE]\n\n"
FINISH = {"loop": "length", "cancelled": "stop"}
# Fields that ask for answers other than text.
REFUSED = ("audio", "web_search_options")


def read_messages(body: Fields) -> list[Message]:
    """The messages, folded; see `messages.py`."""
    return check_media(folded([_message(message) for message in given_messages(body)]))


def _message(message: Fields) -> Message:
    role = message.needed_choice("role", ROLES)
    content = read_parts(message, sees=role in ("user", "tool"))
    if role in ("system", "developer"):
        return {"role": "system", "content": content}
    if role in ("tool", "function"):
        return {"role": "tool", "content": content}
    if role == "user":
        if "content" not in message:
            raise message.missing("content")
        return {"role": "user", "content": content}
    thought = message.text("reasoning_content") or message.text("reasoning")
    calls = [_call(call) for call in message.records("tool_calls") or ()]
    if (old := message.record("function_call")) is not None:
        calls.append(history_call(old.needed_text("name"), old.raw("arguments"), call_id()))
    return assistant_message(content, thought, calls)


def read_parts(holder: Fields, field: str = "content", sees: bool = True) -> Any:
    """A content of OpenAI's APIs as text, or as parts if there are pictures; None is empty."""
    content = holder.raw(field)
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise holder.refuse(field, "a string or a list of parts", "invalid_type")
    # Strings in the list are not valid parts, but some clients send them.
    texts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in content]
    return joined([_part(part, sees) for part in holder.records(field, texts) or ()])


def _part(part: Fields, sees: bool) -> dict[str, Any]:
    kind = part.text("type") or ("text" if "text" in part else "")
    if kind in TEXTS:
        return {"type": "text", "text": part.text(TEXTS[kind]) or ""}
    if kind in ("thinking", "reasoning"):
        return {"type": "text", "text": ""}
    if kind in ("image_url", "input_image") and sees:
        is_object = isinstance(part.raw("image_url"), dict)
        holder = part.record("image_url") if is_object else None
        return picture(
            part.text("image_url") if holder is None else holder.text("url"), part, "image_url"
        )
    raise part.refuse("type", "text or image_url" if sees else "text", "unsupported_content")


def _call(call: Fields) -> dict[str, Any]:
    kind = call.text("type") or "function"
    if kind == "custom":
        custom = call.record("custom") or call
        holder, arguments = custom, {"input": custom.text("input") or ""}
    else:
        holder = call.needed_record("function")
        arguments = holder.raw("arguments")
    return history_call(holder.needed_text("name"), arguments, call.text("id"))


def read_tools(body: Fields) -> list[dict[str, Any]]:
    """The tools, or the field `functions` of the oldest form of the API."""
    functions = body.records("functions") or ()
    return read_functions(body) or [read_function(function) for function in functions]


def read_tool_choice(
    body: Fields, tools: list[dict[str, Any]]
) -> tuple[str | ToolName, list[dict[str, Any]]]:
    """The tool choice (auto, none, required or a name), and the tools to choose from."""
    field = "tool_choice" if "tool_choice" in body else "function_call"
    choice = body.raw(field)
    if choice is None:
        return "auto", tools
    names = [tool["function"]["name"] for tool in tools]
    if isinstance(choice, str):
        if choice == "any":
            choice = "required"
        if choice not in ("auto", "none", "required"):
            raise body.refuse(field, "auto, none, required or a function")
        if choice == "required" and not tools:
            raise _without_tools(body, field)
        return choice, tools
    given = body.record(field)
    assert given is not None
    kind = given.text("type") or "function"
    if kind == "allowed_tools":
        allowed = given.record("allowed_tools") or given
        wanted = [_chosen(tool) for tool in allowed.records("tools") or ()]
        mode = allowed.choice("mode", ("auto", "required")) or "auto"
        kept = [tool for tool in tools if tool["function"]["name"] in wanted]
        if mode == "required" and not kept:
            raise _without_tools(body, field)
        return mode, kept
    name = _chosen(given)
    if not tools:
        raise _without_tools(body, field)
    if name not in names:
        expected = ", ".join(names)[:200]
        raise ApiError(400, f"{field}: got {name[:80]!r}, expected one of {expected}", param=field)
    return ToolName(name), tools


def _chosen(choice: Fields) -> str:
    """The name in a tool choice of OpenAI's APIs."""
    inner = choice.record("function") or choice.record("custom") or choice
    return inner.needed_text("name")


def _without_tools(body: Fields, field: str) -> ApiError:
    return ApiError(
        400,
        f"{field}: there are no tools to choose from",
        param=body.name(field),
        code="invalid_value",
    )


async def chat_completions(http: HttpRequest) -> Response:
    """Answer messages."""
    return await _Chat(*await begun(http)).respond()


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
            return self._delta(reply, {"function_call": call.function})
        index, function = reply.calls.index(call), call.function | {"arguments": ""}
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
            message["function_call"] = reply.calls[0].function
        elif reply.calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": c.function} for c in reply.calls
            ]
        return message
