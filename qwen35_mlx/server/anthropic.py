"""Anthropic's /v1/messages and /v1/messages/count_tokens: messages are read, answers written."""

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ..engine.requests import Grammar, Request, Started, ToolName
from . import options
from .events import sse
from .faults import ApiError
from .fields import Fields
from .messages import (
    BILLING,
    Message,
    assistant_message,
    check_media,
    folded,
    function_tool,
    given_messages,
    hidden,
    history_call,
    joined,
    picture,
    revealed,
    strict_names,
)
from .replies import Reply, ReplyWriter, SentCall
from .service import Service, begun

# Separates text blocks without white space between them.
BETWEEN = "\n"
REMINDER = "<system-reminder>"
MAX_STOPS = 64
MIN_BUDGET = 1024


def read_messages(body: Fields) -> list[Message]:
    """The system prompt and the messages, folded."""
    given = given_messages(body)
    messages: list[Message] = []
    if "system" in body:
        messages.append({"role": "system", "content": _system(body, "system")})
    for message in given:
        role = message.needed_choice("role", ("user", "assistant", "system"))
        if role == "system":
            messages.append({"role": "system", "content": _system(message, "content")})
        elif role == "user":
            messages += _user(message)
        else:
            messages.append(_assistant(message))
    return check_media(folded(messages))


def _blocks(holder: Fields, field: str) -> list[Fields]:
    """The blocks of a content; a string is one block."""
    value = holder.raw(field)
    if value is None:
        raise holder.missing(field)
    if isinstance(value, str):
        return [Fields({"type": "text", "text": value}, holder.name(field))]
    if not isinstance(value, list):
        raise holder.refuse(field, "a string or a list of blocks", "invalid_type")
    return holder.records(field) or []


def _text(block: Fields) -> str:
    return block.text("text") or ""


def _system(holder: Fields, field: str) -> Any:
    """The text of a system prompt, without the billing line, which changes with each request."""
    blocks = _blocks(holder, field)
    for block in blocks:
        if block.text("type") != "text":
            raise block.refuse("type", "text", "unsupported_content")
    texts = [_text(block) for block in blocks]
    kept = [text for text in texts if not text.startswith(BILLING)]
    return joined([{"type": "text", "text": text} for text in kept], BETWEEN)


def _user(message: Fields) -> list[Message]:
    """A user's message; the results of tools in it become separate messages."""
    messages: list[Message] = []
    parts: list[dict[str, Any]] = []
    for block in _blocks(message, "content"):
        kind = block.text("type")
        if kind == "tool_result":
            block.needed_text("tool_use_id")
            if parts:
                messages.append({"role": "user", "content": joined(parts, BETWEEN)})
                parts = []
            messages.append({"role": "tool", "content": _result(block)})
        elif kind == "text" and not parts and messages and _text(block).startswith(REMINDER):
            # Append it to the result: as a message of the user it would end the turn of the tools.
            result = messages[-1]
            held = result["content"]
            held = held if isinstance(held, list) else [{"type": "text", "text": held}]
            addition = {"type": "text", "text": f"\n\n{_text(block)}"}
            result["content"] = joined([*held, addition])
        else:
            parts.append(_part(block, kind))
    if parts or not messages:
        messages.append({"role": "user", "content": joined(parts, BETWEEN)})
    return messages


def _part(block: Fields, kind: str | None) -> dict[str, Any]:
    if kind == "text":
        return {"type": "text", "text": _text(block)}
    if kind == "image":
        return _picture(block)
    if kind == "tool_reference":
        return {"type": "text", "text": block.text("tool_name") or ""}
    if kind == "document":
        source = block.record("source")
        if source is not None and source.text("type") == "text":
            title = block.text("title")
            text = source.text("data") or ""
            return {"type": "text", "text": f"{title}\n\n{text}" if title else text}
        raise block.refuse("source", "a document of type text", "unsupported_content")
    if kind == "search_result":
        texts = [_text(part) for part in block.records("content") or ()]
        head = f"{block.text('title') or ''} {block.text('source') or ''}".strip()
        return {"type": "text", "text": "\n".join([head, *texts])}
    raise block.refuse("type", "text, image, document or tool_result", "unsupported_content")


def _picture(block: Fields) -> dict[str, Any]:
    source = block.needed_record("source")
    kind = source.text("type")
    if kind == "base64":
        media_type = source.text("media_type") or "image/png"
        data = source.text("data")
        if data is None:
            raise source.missing("data")
        return picture(f"data:{media_type};base64,{data}", block, "source")
    if kind == "url":
        return picture(source.text("url"), source, "url")
    raise source.refuse("type", "base64", "unsupported_content")


def _result(block: Fields) -> Any:
    """The result of a tool; errors are marked in the text."""
    if "content" not in block:
        content: Any = ""
    else:
        parts = [_part(part, part.text("type")) for part in _blocks(block, "content")]
        content = joined(parts, BETWEEN)
    if block.flag("is_error") and isinstance(content, str) and "error" not in content.lower():
        return f"Error: {content}"
    return content


def _assistant(message: Fields) -> Message:
    parts: list[dict[str, Any]] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in _blocks(message, "content"):
        kind = block.text("type")
        if kind == "text":
            parts.append({"type": "text", "text": _text(block)})
        elif kind == "thinking":
            thoughts.append(block.text("thinking") or revealed(block.text("signature")))
        elif kind == "redacted_thinking":
            thoughts.append(revealed(block.text("data")))
        elif kind == "tool_use":
            name = block.needed_text("name")
            calls.append(history_call(name, block.mapping("input"), block.text("id")))
    thought = "\n".join(filter(None, thoughts))
    return assistant_message(joined(parts, BETWEEN), thought, calls)


def read_tools(body: Fields) -> list[dict[str, Any]]:
    """Tools that the client runs, without those of Anthropic's servers.

    Deferred tools are left out too: a model has to search for them first.
    """
    tools = []
    for tool in body.records("tools") or ():
        if (tool.text("type") or "custom") != "custom" or tool.flag("defer_loading"):
            continue
        schema = tool.needed_record("input_schema").values
        tools.append(function_tool(tool.text("name"), tool.text("description"), schema, tool))
    return tools


def read_tool_choice(body: Fields, tools: list[dict[str, Any]]) -> tuple[str | ToolName, bool]:
    """The tool choice, and whether several calls at a time are allowed."""
    given = body.record("tool_choice")
    if given is None:
        return "auto", True
    parallel = not given.flag("disable_parallel_tool_use")
    kind = given.needed_choice("type", ("auto", "any", "tool", "none"))
    if kind in ("auto", "none"):
        return kind, parallel
    if not tools:
        raise ApiError(400, "tool_choice: there are no tools to choose from", param="tool_choice")
    if kind == "any":
        return "required", parallel
    name = given.needed_text("name")
    if name not in [tool["function"]["name"] for tool in tools]:
        raise given.refuse("name", "the name of a tool")
    return ToolName(name), parallel


async def messages(http: HttpRequest) -> Response:
    """Answer messages."""
    return await _Messages(*await begun(http)).respond()


async def count_tokens(http: HttpRequest) -> Response:
    """The length of a prompt."""
    service, body = await begun(http)
    service.check_model(body)
    num_tokens = await service.count(_request(service, body, max_tokens=1))
    return JSONResponse({"input_tokens": num_tokens})


def _request(service: Service, body: Fields, max_tokens: int) -> Request:
    tools = read_tools(body)
    choice, parallel = read_tool_choice(body, tools)
    given = read_messages(body)
    thinking = _thinking(body, max_tokens)
    body.items("stop_sequences")
    last = given[-1]
    return Request(
        messages=given,
        adapter=service.adapter(body),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        strict_tools=strict_names(body),
        **vars(thinking),
        continue_final=last["role"] == "assistant" and not last.get("tool_calls"),
        params=_sampling(service, body),
        max_tokens=max_tokens,
        stop=body.texts("stop_sequences", MAX_STOPS),
        grammar=_grammar(body),
    )


def _sampling(service: Service, body: Fields) -> Any:
    body.number("temperature", 0, 1)
    body.integer("top_k", 0)
    return options.sampling(body, service.settings.defaults)


def _thinking(body: Fields, max_tokens: int) -> options.Thinking:
    """The thinking options; without the field, Anthropic's models do not think."""
    effort = body.part("output_config").choice("effort", options.EFFORTS)
    given = body.record("thinking")
    if given is None:
        return options.Thinking(enable_thinking=False)
    kind = given.needed_choice("type", ("enabled", "disabled", "adaptive", "between_tools"))
    if kind == "disabled":
        return options.Thinking(enable_thinking=False)
    budget = given.integer("budget_tokens", MIN_BUDGET)
    if kind == "enabled":
        if budget is None:
            raise given.missing("budget_tokens")
        if "max_tokens" in body and budget >= max_tokens:
            raise given.refuse("budget_tokens", f"less than max_tokens, which is {max_tokens}")
    elif effort is not None:
        budget = options.of_effort(effort).think_budget
    return options.Thinking(enable_thinking=True, think_budget=budget)


def _grammar(body: Fields) -> Grammar | None:
    """The schema of the answer, from either of the fields that clients use."""
    inner = options.response_format(body.part("output_config"), "format")
    return inner or options.response_format(body, "output_format")


def _event(kind: str, **fields: Any) -> bytes:
    """An event of a stream."""
    return sse({"type": kind, **fields}, kind)


PING = _event("ping")


class _Messages(ReplyWriter):
    """One request for a message, and its answer as events or as one object."""

    dialect = "anthropic"

    def __init__(self, service: Service, body: Fields):
        model, max_tokens = service.check_model(body), body.integer("max_tokens", 1)
        if max_tokens is None:
            raise body.missing("max_tokens")
        request = _request(service, body, max_tokens)
        super().__init__(service, "msg_", model, request, prefix="toolu_")
        self.is_stream = body.flag("stream") or False
        shown = body.part("thinking").choice("display", ("summarized", "omitted"))
        self._omits_thoughts = shown == "omitted"
        # The blocks so far; the last one may be open.
        self._blocks: list[dict[str, Any]] = []
        self._is_open = False
        self._thoughts = ""
        self._has_started = False

    def keepalive(self) -> bytes:
        """A ping, after the start of the message."""
        return self._start() + PING

    def _start(self) -> bytes:
        if self._has_started:
            return b""
        self._has_started = True
        message = self._object() | {"content": []} | {"stop_reason": None, "stop_sequence": None}
        return _event("message_start", message=message)

    def _object(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": self._blocks,
            **self._stop(),
            "usage": self._usage_object(),
        }

    def _usage_object(self) -> dict[str, Any]:
        """The usage; tokens from the cache are counted separately."""
        usage = self._usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.generated_tokens,
            "service_tier": "standard",
        }

    def _stop(self) -> dict[str, Any]:
        (reply,) = self._replies
        reasons = {"length": "max_tokens", "loop": "max_tokens", "tool_calls": "tool_use"}
        reason: str = reasons.get(reply.finish_reason or "", "end_turn")
        if reply.finish_reason == "stop" and reply.stop_text is not None:
            reason = "stop_sequence"
        usage, context = self._usage, self._service.settings.context_length
        is_full = usage.prompt_tokens + usage.generated_tokens >= context - 1
        if reply.finish_reason == "length" and is_full:
            reason = "model_context_window_exceeded"
        return {
            "stop_reason": reason,
            "stop_sequence": reply.stop_text if reason == "stop_sequence" else None,
        }

    def _end(self) -> bytes:
        last = _event("message_delta", delta=self._stop(), usage=self._usage_object())
        return last + _event("message_stop")

    def _failed(self, fault: ApiError) -> bytes:
        return sse(fault.body(self.dialect), "error")

    def _take(self, place: int, event: Any) -> bytes:
        """The stream's events for an event of the engine; `_blocks` collects their content."""
        data = PING if isinstance(event, Started) else super()._take(place, event)
        return self._start() + data if data else b""

    def _thought(self, reply: Reply, text: str) -> bytes:
        data = self._begun("thinking")
        self._thoughts += text
        return data if self._omits_thoughts else data + self._added("thinking", text)

    def _text(self, reply: Reply, text: str, entries: list[dict[str, Any]]) -> bytes:
        return self._begun("text") + self._added("text", text)

    def _done(self, reply: Reply, entries: list[dict[str, Any]]) -> bytes:
        return (b"" if self._blocks else self._begun("text")) + self._close()

    def _begun(self, kind: str) -> bytes:
        """Open a block of this kind, unless the last one is open and of the same kind."""
        if self._is_open and self._blocks[-1]["type"] == kind:
            return b""
        block = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
        return self._close() + self._open(block)

    def _added(self, kind: str, text: str) -> bytes:
        self._blocks[-1][kind] += text
        return self._delta({"type": f"{kind}_delta", kind: text})

    def _call(self, reply: Reply, call: SentCall) -> bytes:
        block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        data = self._close() + self._open(block)
        data += self._delta({"type": "input_json_delta", "partial_json": call.arguments})
        self._blocks[-1]["input"] = call.call.arguments
        return data + self._close()

    def _open(self, block: dict[str, Any]) -> bytes:
        self._blocks.append(dict(block))
        self._is_open = True
        return _event("content_block_start", index=len(self._blocks) - 1, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _close(self) -> bytes:
        if not self._is_open:
            return b""
        data = b""
        self._is_open = False
        block = self._blocks[-1]
        if block["type"] == "thinking":
            block["signature"] = hidden(self._thoughts)
            data += self._delta({"type": "signature_delta", "signature": block["signature"]})
            self._thoughts = ""
        return data + _event("content_block_stop", index=len(self._blocks) - 1)
