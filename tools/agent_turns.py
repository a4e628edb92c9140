"""Replays turns in the form in which each agent sends them, and counts the tokens that are read.

The answers come from the model. This package's server gets each agent's own API. mlx-lm's server
has only chat completions, so it gets the same turns as a translating proxy would send them, with
system messages at the front, because it fails on others.
"""

import json
from collections.abc import Callable
from typing import Any

from server_process import ServerProcess

ANSWER_TOKENS = 40
Message = dict[str, Any]
SYSTEM = " ".join(f"Rule {i}: be brief and read the file before you change it." for i in range(30))
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"The tool {name} of the agent, to {name} a thing.",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}, "text": {"type": "string"}},
                "required": ["path"],
            },
        },
    }
    for name in ("read", "write", "search", "run")
]
WEB_SEARCH = {"type": "web_search"}
REMINDER = "The folder has these files: main.py, notes.md, picture.png. Today is Thursday."


def question(turn: int) -> str:
    """The text of the user, or of a tool, in a turn."""
    return f"Step {turn}: " + "look at the next part of the file and go on. " * 2


class Agent:
    """The conversation of one agent, in the form of chat completions."""

    path = "/v1/chat/completions"

    def __init__(self) -> None:
        self.messages: list[Message] = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": question(0)},
        ]

    def body(self, turn: int) -> dict[str, Any]:
        """The request of a turn."""
        return {"messages": self.messages, "tools": TOOLS, "max_tokens": ANSWER_TOKENS}

    def plain(self, turn: int) -> dict[str, Any]:
        """The same request for a server that has only chat completions."""
        return self.body(turn)

    def message(self, answer: dict[str, Any]) -> Message:
        """The message that the agent keeps of an answer."""
        return kept(answer["choices"][0]["message"])

    def usage(self, answer: dict[str, Any]) -> tuple[int, int]:
        """Tokens of the prompt, and those of them that were cached."""
        return chat_usage(answer)

    def go_on(self, message: Message, turn: int) -> None:
        """Add an answer and the next question or tool results."""
        self.messages.append(message)
        if calls := message.get("tool_calls"):
            for call in calls:
                result = {"role": "tool", "tool_call_id": call["id"], "content": question(turn)}
                self.messages.append(result)
        else:
            self.messages.append({"role": "user", "content": question(turn)})


class QwenCode(Agent):
    """Sends contents as lists of parts, rewrites arguments, and sends thoughts back."""

    def body(self, turn: int) -> dict[str, Any]:
        messages = []
        for message in self.messages:
            message = dict(message)
            if message["role"] in ("user", "tool"):
                message["content"] = [{"type": "text", "text": message["content"]}]
            if calls := message.get("tool_calls"):
                message["tool_calls"] = [_rewritten(call) for call in calls]
            messages.append(message)
        return super().body(turn) | {"messages": messages}

    def message(self, answer: dict[str, Any]) -> Message:
        given = answer["choices"][0]["message"]
        thought = given.get("reasoning_content") or given.get("reasoning")
        return kept(given) | ({"reasoning_content": thought} if thought else {})


class Claude(Agent):
    """Sends a changing billing line, a system message after the question, moving cache marks."""

    path = "/v1/messages"

    def body(self, turn: int) -> dict[str, Any]:
        billing = f"x-anthropic-billing-header: cc_version=2.1; cch={turn:05x};"
        messages: list[Message] = []
        for message in self.messages[1:]:
            messages.append(_anthropic(message))
            if len(messages) == 1:
                messages.append({"role": "system", "content": REMINDER})
        mark = {"cache_control": {"type": "ephemeral"}}
        last = messages[-1]
        if isinstance(last["content"], str):
            last["content"] = [{"type": "text", "text": last["content"], **mark}]
        return {
            "system": [{"type": "text", "text": billing}, {"type": "text", "text": SYSTEM, **mark}],
            "messages": messages,
            "max_tokens": ANSWER_TOKENS,
            "thinking": {"type": "adaptive", "display": "omitted"},
            "tools": [
                {
                    "name": f["name"],
                    "description": f["description"],
                    "input_schema": f["parameters"],
                }
                for f in (tool["function"] for tool in TOOLS)
            ],
        }

    def plain(self, turn: int) -> dict[str, Any]:
        billing = f"x-anthropic-billing-header: cc_version=2.1; cch={turn:05x};"
        system = f"{billing}\n{SYSTEM}\n{REMINDER}"
        messages = [{"role": "system", "content": system}, *self.messages[1:]]
        return Agent.body(self, turn) | {"messages": messages}

    def message(self, answer: dict[str, Any]) -> Message:
        if "choices" in answer:
            return super().message(answer)
        return {"role": "assistant", "content": answer["content"]}

    def usage(self, answer: dict[str, Any]) -> tuple[int, int]:
        if "choices" in answer:
            return chat_usage(answer)
        usage = answer["usage"]
        cached = usage["cache_read_input_tokens"]
        return usage["input_tokens"] + cached, cached

    def go_on(self, message: Message, turn: int) -> None:
        blocks = message["content"] if isinstance(message["content"], list) else []
        uses = [block for block in blocks if block["type"] == "tool_use"]
        if not uses:
            super().go_on(message, turn)
            return
        results = [
            {"type": "tool_result", "tool_use_id": use["id"], "content": question(turn)}
            for use in uses
        ]
        self.messages += [message, {"role": "user", "content": results}]


class OpenCode(Agent):
    """Also sends a request for a title with each first turn."""

    def side_request(self) -> dict[str, Any]:
        """The request for a title."""
        messages = [
            {"role": "system", "content": "Write a title of three words. " * 10},
            {"role": "user", "content": question(0)},
        ]
        return {"messages": messages, "max_tokens": 10}


class Codex(Agent):
    """Sends items instead of messages, and instructions as messages of the developer."""

    path = "/v1/responses"

    def body(self, turn: int) -> dict[str, Any]:
        items: list[Message] = [
            {"type": "message", "role": "developer", "content": _input(SYSTEM)},
            {"type": "message", "role": "developer", "content": _input(REMINDER)},
        ]
        for message in self.messages[1:]:
            items += message["items"] if "items" in message else [_item(message)]
        return {
            "input": items,
            "tools": [*({"type": "function", **t["function"]} for t in TOOLS), WEB_SEARCH],
            "store": False,
            "include": ["reasoning.encrypted_content"],
            "reasoning": {"summary": "auto"},
            "prompt_cache_key": "a",
            "max_output_tokens": ANSWER_TOKENS,
        }

    def plain(self, turn: int) -> dict[str, Any]:
        messages = [{"role": "system", "content": f"{SYSTEM}\n{REMINDER}"}, *self.messages[1:]]
        return Agent.body(self, turn) | {"messages": messages}

    def message(self, answer: dict[str, Any]) -> Message:
        return super().message(answer) if "choices" in answer else {"items": answer["output"]}

    def usage(self, answer: dict[str, Any]) -> tuple[int, int]:
        if "choices" in answer:
            return chat_usage(answer)
        usage = answer["usage"]
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]

    def go_on(self, message: Message, turn: int) -> None:
        if "items" not in message:
            super().go_on(message, turn)
            return
        calls = [item for item in message["items"] if item["type"] == "function_call"]
        outputs = [
            {"type": "function_call_output", "call_id": call["call_id"], "output": question(turn)}
            for call in calls
        ]
        self.messages.append(message)
        self.messages.append(
            {"items": outputs} if outputs else {"role": "user", "content": question(turn)}
        )


AGENTS: dict[str, Callable[[], Agent]] = {
    "qwen-code": QwenCode,
    "claude": Claude,
    "opencode": OpenCode,
    "codex": Codex,
}


def kept(message: Message) -> Message:
    """An answer without its thought."""
    names = ("role", "content", "tool_calls")
    return {name: message[name] for name in names if message.get(name)} | {
        "content": message.get("content") or ""
    }


def chat_usage(answer: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the prompt, and those of them that were cached."""
    usage = answer["usage"]
    details = usage.get("prompt_tokens_details") or {}
    return usage["prompt_tokens"], details.get("cached_tokens") or 0


def _rewritten(call: Message) -> Message:
    """A call whose arguments were parsed and serialized again."""
    function = call["function"]
    try:
        arguments = json.dumps(json.loads(function["arguments"]), separators=(",", ":"))
    except ValueError:
        arguments = function["arguments"]
    return {**call, "function": {**function, "arguments": arguments}}


def _anthropic(message: Message) -> Message:
    return {"role": message["role"], "content": message["content"]}


def _input(text: str) -> list[Message]:
    return [{"type": "input_text", "text": text}]


def _item(message: Message) -> Message:
    return {"type": "message", "role": message["role"], "content": _input(message["content"])}


def num_prefilled(
    server: ServerProcess, name: str, num_turns: int, is_ours: bool
) -> tuple[int, int]:
    """Tokens that a server reads in a conversation of an agent, and all tokens of its prompts."""
    agent = AGENTS[name]()
    read = total = 0
    for turn in range(num_turns):
        body = agent.body(turn) if is_ours else agent.plain(turn)
        path = agent.path if is_ours else Agent.path
        given = {"model": server.model if is_ours else "default_model", "temperature": 0}
        answer = server.post(path, body | given)
        prompt, cached = agent.usage(answer)
        read += prompt - cached
        total += prompt
        if isinstance(agent, OpenCode) and turn == 0:
            side = server.post(Agent.path, agent.side_request() | given)
            prompt, cached = chat_usage(side)
            read += prompt - cached
            total += prompt
        agent.go_on(agent.message(answer), turn + 1)
    return read, total
