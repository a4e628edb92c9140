"""Requests that are answered: what the server says to them stands in a page of tests/pages."""

from typing import Any

from server.fake_engine import call, thought
from server.mistakes import CHAT, HI, MESSAGES, RESPONSES, TEXT, TOOL, USE

from qwen35_mlx.engine.requests import Progress

# What the engine says: text, then a thought and a call behind it.
TEXTS: list[Any] = ["Paris", " is\n", "it."]
CALLS: list[Any] = [thought("Hm."), "So:", call("look", at="x", often=2), call("look", at="y")]
OLD = {"functions": [TOOL["function"]]}
RESPONSE_TOOL = {"type": "function", **TOOL["function"]}
OLLAMA = {"model": "demo", "messages": HI, "tools": [TOOL]}
ASKED: list[tuple[str, dict[str, Any], list[Any]]] = [
    (CHAT, {"messages": HI}, TEXTS),
    (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 2}, TEXTS[:1]),
    (CHAT, {"messages": HI, "tools": [TOOL]}, CALLS),
    (CHAT, {"messages": HI, **OLD}, CALLS[2:3]),
    (CHAT, {"messages": HI, "stream": True, "n": 2}, [Progress(3, 7), *TEXTS]),
    (CHAT, {"messages": HI, "stream": True, "tools": [TOOL]}, CALLS),
    (CHAT, {"messages": HI, "stream": True, "logprobs": True, "top_logprobs": 2}, TEXTS[:1]),
    (CHAT, {"messages": HI, "stream": True, **OLD}, CALLS[2:3]),
    (CHAT, {"messages": HI, "stream": True, "stream_options": {"include_usage": True}}, TEXTS),
    (CHAT, {"messages": HI, "stream": True}, ["A", RuntimeError("gone")]),
    (TEXT, {"prompt": ["Hi", "Ho"], "echo": True, "logprobs": 1}, TEXTS[:1]),
    (TEXT, {"prompt": "Hi", "stream": True, "stream_options": {"include_usage": True}}, TEXTS),
    (MESSAGES, {"messages": HI, "max_tokens": 9}, TEXTS),
    (MESSAGES, {"messages": HI, "max_tokens": 9, "tools": [USE]}, CALLS),
    (MESSAGES, {"messages": HI, "max_tokens": 9, "tools": [USE], "stream": True}, CALLS),
    (MESSAGES, {"messages": HI, "max_tokens": 9, "stream": True}, ["A", RuntimeError("gone")]),
    (f"{MESSAGES}/count_tokens", {"messages": HI}, []),
    (RESPONSES, {"input": "Hi"}, TEXTS),
    (RESPONSES, {"input": "Hi", "tools": [RESPONSE_TOOL]}, CALLS),
    (RESPONSES, {"input": "Hi", "tools": [RESPONSE_TOOL], "stream": True}, CALLS),
    (RESPONSES, {"input": "Hi", "stream": True}, ["A", RuntimeError("gone")]),
    (f"{RESPONSES}/input_tokens", {"input": "Hi"}, []),
    ("/api/chat", {**OLLAMA, "stream": False}, CALLS),
    ("/api/chat", OLLAMA, CALLS),
    ("/api/generate", {"model": "demo", "prompt": "Hi", "stream": False}, TEXTS),
    ("/api/generate", {"model": "demo", "prompt": "Hi"}, TEXTS),
    ("/api/show", {"model": "demo:latest"}, []),
]
SHOWN = ("/health", "/metrics", "/v1/models", "/v1/models/demo:one", "/api/tags", "/api/ps")
