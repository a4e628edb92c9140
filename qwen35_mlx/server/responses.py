"""OpenAI's /v1/responses, with stored responses: input items become messages of the engine."""

import secrets
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ..engine.requests import Request
from . import options
from .faults import ApiError, TooLong, as_fault
from .fields import Fields
from .messages import (
    Message,
    check_media,
    folded,
    history_call,
    read_functions,
    revealed,
    strict_names,
)
from .models import list_object
from .openai import read_parts, read_tool_choice
from .response_events import ResponseWriter
from .service import Service, begun, service_of

ROLES = ("user", "assistant", "system", "developer", "tool")
# Items of OpenAI's own tools in a history, which have no meaning for this model.
LEFT_OUT = (
    "web_search_call file_search_call image_generation_call code_interpreter_call computer_call "
    "computer_call_output mcp_call mcp_list_tools mcp_approval_request mcp_approval_response "
    "tool_search_call tool_search_output compaction".split()
)
INCLUDE_LOGPROBS = "message.output_text.logprobs"


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
    for response, given, _ in responses:
        for item in (*response["output"], *given):
            if identity and item.get("id") == identity:
                return dict(item)
    raise ApiError(404, f"Item with id '{str(identity)[:80]}' not found.", param="input")


async def create_response(http: HttpRequest) -> Response:
    """Answer input items."""
    service, body = await begun(http)
    model = service.check_model(body)
    items = _items(service, body)
    request = _request(service, body, items)
    writer = ResponseWriter(service, request, _template(body, model, request), items)
    writer.is_stream = body.flag("stream") or False
    return writer.response(await _submitted(service, body, request))


async def _submitted(service: Service, body: Fields, request: Request) -> Any:
    """Submit; with `truncation: auto`, drop the oldest turns until the rest fits."""
    while True:
        try:
            return await service.answer(request)
        except Exception as error:
            fault = as_fault(error)
            shorter = _without_oldest(list(request.messages or ()))
            may_shorten = isinstance(fault, TooLong) and body.text("truncation") == "auto"
            if not may_shorten or shorter is None:
                raise fault from None
            request.messages = shorter


def _without_oldest(messages: list[Any]) -> list[Any] | None:
    """The messages without the first turn after the system message; None if one turn is left."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    for i in range(first + 1, len(messages)):
        if messages[i]["role"] == "user":
            return messages[:first] + messages[i:]
    return None


def _items(service: Service, body: Fields) -> list[dict[str, Any]]:
    """The items of the conversation: earlier ones by id, then those of this request."""
    items = read_input(body)
    items = [
        found_item(item.get("id"), service.responses.values())
        if item.get("type") == "item_reference"
        else item
        for item in items
    ]
    if "conversation" in body:
        raise body.refuse("conversation", "previous_response_id, or all of the history")
    previous = body.text("previous_response_id")
    if previous is None:
        return items
    if previous not in service.responses:
        raise ApiError(
            400,
            f"Previous response with id '{previous[:80]}' not found.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    response, given, _ = service.responses[previous]
    return [*given, *response["output"], *items]


def _request(service: Service, body: Fields, items: list[dict[str, Any]]) -> Request:
    if body.flag("background"):
        raise body.refuse("background", "false", "unsupported")
    body.choice("truncation", ("auto", "disabled"))
    choice, tools = read_tool_choice(body, read_functions(body))
    thinking = _thinking(body)
    num_top = body.integer("top_logprobs", 0, 20)
    included = body.items("include") or []
    wants_logprobs = INCLUDE_LOGPROBS in included or bool(num_top)
    return Request(
        messages=read_messages(items, body.text("instructions")),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.flag("parallel_tool_calls") is not False,
        strict_tools=strict_names(body),
        **vars(thinking),
        template=options.template_options(body),
        params=options.sampling(body, service.settings.defaults),
        seed=options.seed(body),
        max_tokens=options.max_tokens(body, "max_output_tokens"),
        stop=body.texts("stop", 4),
        grammar=options.response_format(body.part("text"), "format"),
        logprobs=(num_top or 0) if wants_logprobs else None,
        adapter=service.adapter(body),
    )


def _thinking(body: Fields) -> options.Thinking:
    effort = body.part("reasoning").choice("effort", options.EFFORTS)
    return options.of_effort(effort) if effort is not None else options.thinking(body)


def _template(body: Fields, model: str, request: Request) -> dict[str, Any]:
    """A new response, with the fields that it repeats from its request."""
    reasoning = body.part("reasoning")
    kept = {"format": {"type": "text"}, "verbosity": "medium"}
    given = {name: body.part("text").raw(name) for name in kept}
    kept |= {name: value for name, value in given.items() if value is not None}
    params = request.params
    assert params is not None
    return {
        "id": f"resp_{secrets.token_hex(16)}",
        "object": "response",
        "created_at": 0,
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.text("instructions"),
        "max_output_tokens": request.max_tokens,
        "max_tool_calls": body.integer("max_tool_calls"),
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls,
        "previous_response_id": body.text("previous_response_id"),
        "prompt_cache_key": body.text("prompt_cache_key"),
        "reasoning": {name: reasoning.text(name) for name in ("effort", "summary")},
        "safety_identifier": body.text("safety_identifier"),
        "service_tier": "default",
        "store": body.flag("store") is not False,
        "temperature": params.temperature,
        "text": kept,
        "tool_choice": body.raw("tool_choice") or "auto",
        "tools": body.items("tools") or [],
        "top_logprobs": request.logprobs or 0,
        "top_p": params.top_p,
        "truncation": body.text("truncation") or "disabled",
        "usage": None,
        "user": body.text("user"),
        "metadata": body.mapping("metadata") or {},
    }


async def input_tokens(http: HttpRequest) -> Response:
    """The length of a prompt."""
    service, body = await begun(http)
    service.check_model(body)
    request = _request(service, body, _items(service, body))
    num_tokens = await service.count(request)
    return JSONResponse({"object": "response.input_tokens", "input_tokens": num_tokens})


def _stored(http: HttpRequest) -> tuple[Service, str]:
    service = service_of(http)
    name = http.path_params["name"]
    if name not in service.responses:
        raise ApiError(404, f"Response with id '{name[:80]}' not found.", param="response_id")
    return service, name


async def get_response(http: HttpRequest) -> Response:
    """A stored response."""
    service, name = _stored(http)
    return JSONResponse(service.responses[name][0])


async def delete_response(http: HttpRequest) -> Response:
    """Delete a stored response."""
    service, name = _stored(http)
    del service.responses[name]
    return JSONResponse({"id": name, "object": "response", "deleted": True})


async def cancel_response(http: HttpRequest) -> Response:
    """Refuse: only background responses can be cancelled, and there are none."""
    _stored(http)
    raise ApiError(400, "Cannot cancel a synchronous response.", param="response_id")


async def list_input_items(http: HttpRequest) -> Response:
    """The input items of a stored response, the last one first."""
    service, name = _stored(http)
    given = service.responses[name][1]
    items = [_listed(item, i) for i, item in enumerate(given)]
    if http.query_params.get("order", "desc") != "asc":
        items.reverse()
    return JSONResponse(list_object(items))


def _listed(item: dict[str, Any], place: int) -> dict[str, Any]:
    """An item in the API's list form: with an id, and text as a part."""
    item = {"id": f"item_{place}", "type": "message", **item}
    if item["type"] == "message" and isinstance(item.get("content"), str):
        kind = "output_text" if item.get("role") == "assistant" else "input_text"
        item["content"] = [{"type": kind, "text": item["content"]}]
    return item
