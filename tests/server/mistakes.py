"""Requests with a mistake each: what the server answers to them stands in a page of tests/pages."""

from typing import Any

CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
RESPONSES, EMBEDDINGS = "/v1/responses", "/v1/embeddings"
HI: list[Any] = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
USE = {"name": "look", "input_schema": {"type": "object"}}
WEB = {"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}

CHAT_FIELDS: list[dict[str, Any]] = [
    {"model": "gpt-9"},
    {"messages": None},
    {"messages": []},
    {"messages": "Hi"},
    {"messages": ["Hi"]},
    {"messages": [{"content": "Hi"}]},
    {"messages": [{"role": "critic", "content": "Hi"}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": [{"type": "sound"}]}]},
    {"messages": [{"role": "user", "content": [WEB]}]},
    {"messages": [{"role": "user", "content": "word " * 5000}]},
    {"temperature": 3},
    {"top_p": -1},
    {"top_k": "all"},
    {"n": 0},
    {"max_tokens": 0},
    {"stop": ["a", "b", "c", "d", "e"]},
    {"stop": [1]},
    {"stream": "yes"},
    {"seed": 10**30},
    {"logit_bias": {"x": 1}},
    {"logit_bias": {"5": 101}},
    {"logit_bias": [1]},
    {"logit_bias": {"5": "a"}},
    {"repetition_penalty": 0},
    {"min_p": 2},
    {"top_logprobs": 21, "logprobs": True},
    {"top_logprobs": 2},
    {"continue_final_message": True},
    {"add_generation_prompt": False},
    {"tools": "all"},
    {"tools": [5]},
    {"tools": [{"type": "function"}]},
    {"tools": [{"type": "function", "function": {"name": "a b"}}]},
    {"tools": [{"type": "function", "function": {"name": "a" * 257}}]},
    {"tools": [{"type": "function", "function": {"name": "a", "parameters": [5]}}]},
    {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"properties": 5}}}]},
    {"tools": [TOOL], "tool_choice": "sometimes"},
    {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
    {"tool_choice": "required"},
    {"response_format": {}},
    {"response_format": {"type": "xml"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "s"}}},
    {"reasoning_effort": "e" * 80},
    {"modalities": ["audio"]},
]
TEXT_FIELDS: list[dict[str, Any]] = [
    {"prompt": 1.5},
    {"suffix": "b"},
    {"logprobs": 21},
    {"echo": 1},
]
MESSAGE_FIELDS: list[dict[str, Any]] = [
    {"max_tokens": None},
    {"max_tokens": 0},
    {"model": "claude"},
    {"messages": None},
    {"messages": []},
    {"messages": [{"content": "Hi"}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64"}}]}]},
    {"messages": [*HI, {"role": "assistant", "content": [{"type": "tool_use"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
    {"messages": [{"role": "user", "content": "word " * 5000}]},
    {"tool_choice": {"type": "any"}},
    {"tools": [USE], "tool_choice": {}},
    {"tools": [USE], "tool_choice": {"type": "tool"}},
    {"tools": [USE], "tool_choice": {"type": "maybe"}},
    {"thinking": {"type": "sometimes"}},
    {"system": 5},
]
RESPONSE_FIELDS: list[dict[str, Any]] = [
    {"input": None},
    {"input": 5},
    {"input": [{"type": "noise"}]},
    {"input": [{"type": "message", "content": "Hi"}]},
    {"input": [{"type": "function_call"}]},
    {"input": [{"type": "item_reference", "id": "msg_0"}]},
    {"previous_response_id": "resp_0"},
    {"background": True},
    {"tool_choice": "required"},
    {"text": {"format": {"type": "xml"}}},
    {"truncation": "most"},
    {"max_output_tokens": 0},
]
EMBEDDING_FIELDS: list[dict[str, Any]] = [
    {"input": None},
    {"input": ""},
    {"input": [1.5]},
    {"dimensions": 0},
    {"encoding_format": "hex"},
]
OLLAMA: list[tuple[str, dict[str, Any]]] = [
    ("/api/chat", {"model": None}),
    ("/api/chat", {"model": "other"}),
    ("/api/chat", {"messages": [{"role": "x"}]}),
    ("/api/chat", {"messages": HI, "format": 5}),
    ("/api/chat", {"messages": HI, "options": {"temperature": "hot"}}),
    ("/api/chat", {"messages": HI, "think": "a lot"}),
    ("/api/generate", {"prompt": "a", "suffix": "b"}),
    ("/api/generate", {"prompt": "a", "context": [1]}),
    ("/api/generate", {"prompt": "a", "raw": True, "images": ["AAAA"]}),
    ("/api/embed", {"input": ""}),
    ("/api/show", {"model": "other"}),
    ("/api/nothing", {}),
    *((f"/api/{name}", {}) for name in ("pull", "push", "create", "copy")),
]
RAW: list[tuple[str, str, bytes | None, dict[str, str]]] = [
    ("POST", CHAT, None, {}),
    ("POST", CHAT, b"{", {}),
    ("POST", CHAT, b"[]", {}),
    ("POST", CHAT, b"\xff{}", {}),
    ("POST", CHAT, b'{"temperature": NaN}', {}),
    ("POST", CHAT, b'{"temperature": 1e999}', {}),
    ("POST", CHAT, b'{"seed": ' + b"9" * 5000 + b"}", {}),
    ("POST", CHAT, b'{"a": ' * 300 + b"1" + b"}" * 300, {}),
    ("POST", CHAT, b"{}", {"content-encoding": "gzip"}),
    ("POST", CHAT, b"{}", {"host": "evil.example"}),
    ("POST", CHAT, b"{}", {"origin": "https://evil.example"}),
    ("GET", CHAT, None, {}),
    ("GET", "/v1/models/gpt-9", None, {}),
    ("GET", "/v1/nothing", None, {}),
    ("GET", "/v1/responses/resp_0", None, {}),
    ("POST", "/v1/responses/resp_0/cancel", None, {}),
    ("DELETE", "/api/delete", b"{}", {}),
    ("GET", "/" + "a" * 10_000, None, {}),
]


def requests(model: str) -> list[tuple[str, str, Any, dict[str, str], str]]:
    """Each request, and how the page names it; a field that is None is left out."""
    given: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        *((CHAT, {"messages": HI}, fields) for fields in CHAT_FIELDS),
        *((TEXT, {"prompt": "Hi"}, fields) for fields in TEXT_FIELDS),
        *((MESSAGES, {"messages": HI, "max_tokens": 9}, fields) for fields in MESSAGE_FIELDS),
        *((RESPONSES, {"input": "Hi"}, fields) for fields in RESPONSE_FIELDS),
        *((EMBEDDINGS, {"input": "Hi"}, fields) for fields in EMBEDDING_FIELDS),
        *((path, {}, fields) for path, fields in OLLAMA),
    ]
    found: list[tuple[str, str, Any, dict[str, str], str]] = []
    for path, usual, fields in given:
        body = {k: v for k, v in ({"model": model} | usual | fields).items() if v is not None}
        found.append(("POST", path, body, {}, str(fields)))
    return found + [(*one, f"{one[2] or ''} {one[3] or ''}".strip()) for one in RAW]
