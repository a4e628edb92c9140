"""Checks a request and prepares it for the engine: token ids, snapshot marks, grammar.

Many clients drop thoughts or rewrite the arguments of calls when they send an answer back. These
are restored, so that the prompt does not differ from the cached one. It uses no MLX, so it runs in
any thread.
"""

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from ..errors import ContextFull, PromptError, Qwen35Error
from ..model.language import Model
from ..prompt import check_ids, encode_prompt, encode_text, open_messages
from ..sampling import SamplingParams
from ..text.messages import tool_calls
from .grammar import Grammars, Matcher
from .prefix_store import MIN_POINT_TOKENS
from .requests import Request
from .sampler import MAX_SEED
from .speculate import MODES
from .tool_calls import ToolCall, as_message
from .turn_prompts import THOUGHT_END, TurnPrompts

MAX_LOGPROBS, MAX_ANSWERS = 20, 128
MAX_BIAS = 100.0
MESSAGE_END = "<|im_end|>"
Message = Mapping[str, Any]
MAX_REMEMBERED = 4096
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


@dataclass
class Prepared:
    """A request that passed all checks."""

    request: Request
    ids: list[int]
    params: SamplingParams
    # Maximum length of the answer.
    max_tokens: int = 0
    # Lengths at which a later prompt probably branches off: take snapshots there.
    marks: frozenset[int] = frozenset()
    # Length of the prompt without the start of the answer, which later prompts render differently.
    boundary: int = 0
    # Whether the prompt ends in an open thought.
    thinking: bool = False
    # Key of the conversation for `AnswerMemory`; None for a raw prompt.
    key: bytes | None = None
    grammar: Matcher | None = None
    # Whether the template writes arguments of calls as JSON.
    typed_calls: bool = False
    thought_end: Sequence[int] = ()
    question: str = ""


class Preparer:
    """Prepares requests for one model; restores what clients dropped from earlier answers."""

    def __init__(self, model: Model, tokenizer: Any):
        self.config = model.config
        self.defaults = model.sampling_defaults
        self.tokenizer = tokenizer
        self.answers = AnswerMemory()
        self.grammars = Grammars(tokenizer, model.config.vocab_size)
        self._longest_token = 0
        self._typed_calls: bool | None = None

    def count(self, request: Request) -> int:
        """Number of tokens of the prompt."""
        return len(self._encoded(request).ids)

    def prepare(self, request: Request) -> Prepared:
        """Check the request and encode its prompt; raises Qwen35Error."""
        self._check(request)
        prepared = self._encoded(request)
        check_ids(prepared.ids, self.config.vocab_size)
        room = self.config.context_length - len(prepared.ids)
        if room <= 0:
            raise ContextFull(len(prepared.ids), self.config.context_length)
        wanted = room if request.max_tokens is None else request.max_tokens
        prepared.max_tokens = min(wanted, room)
        if request.prompt_logprobs is not None and min(prepared.ids) < 0:
            raise PromptError("log probabilities of a prompt with pictures are not computed")
        prepared.grammar = self.grammars.of(request, self._has_typed_calls)
        return prepared

    def _check(self, request: Request) -> None:
        for name, low, high in (
            ("max_tokens", 0, math.inf),
            ("think_budget", 1, math.inf),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
            ("n", 1, MAX_ANSWERS),
            ("min_tokens", 0, math.inf),
            ("seed", 0, MAX_SEED),
        ):
            value = getattr(request, name)
            if value is not None and not (_is_whole(value) and low <= value <= high):
                most = "or more" if high == math.inf else f"to {high}"
                raise Qwen35Error(
                    f"{name} is not usable",
                    got=repr(value)[:80],
                    expected=f"a whole number, {low} {most}",
                )
        if request.draft not in MODES:
            raise Qwen35Error(
                "unknown kind of drafts", got=repr(request.draft)[:80], expected=", ".join(MODES)
            )
        if not all(isinstance(text, str) for text in request.stop):
            raise Qwen35Error("stop is not usable", got=repr(request.stop)[:80], expected="texts")
        for token, bias in request.logit_bias.items():
            if not (_is_whole(token) and 0 <= token < self.config.vocab_size):
                raise Qwen35Error(
                    "logit_bias names an unknown token",
                    got=repr(token)[:80],
                    expected=f"0 to {self.config.vocab_size - 1}",
                )
            is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
            if not (is_number and abs(bias) <= MAX_BIAS):
                raise Qwen35Error(
                    "logit_bias is not usable",
                    got=repr(bias)[:80],
                    expected=f"{-MAX_BIAS:g} to {MAX_BIAS:g}",
                )

    def _encoded(self, request: Request) -> Prepared:
        if (request.messages is None) == (request.prompt is None):
            raise PromptError("a request needs messages or a prompt, and not both")
        if request.messages is not None:
            return self._of_messages(request)
        prompt = request.prompt
        assert prompt is not None
        if isinstance(prompt, str):
            self._check_size(len(prompt))
        ids = encode_prompt(self.tokenizer, prompt)
        return Prepared(request, ids, request.params or self.defaults, boundary=len(ids))

    def _of_messages(self, request: Request) -> Prepared:
        if not request.messages:
            raise PromptError("there are no messages", expected="at least one")
        opened = open_messages(self.tokenizer, request.messages)
        messages, key = self.answers.restored(opened, request.adapter)
        tools = () if request.tool_choice == "none" else request.tools
        prompts = TurnPrompts(self.tokenizer, tools, request.enable_thinking, request.template)
        if request.continue_final:
            text = prompts.render(messages, False)
            self._check_size(len(text))
            end = text.rstrip("\n")
            text = text.part(0, len(end.removesuffix(MESSAGE_END)))
            ids = encode_text(self.tokenizer, text)
            start = boundary = len(ids)
        else:
            self._check_size(sum(len(str(m.get("content") or "")) for m in _mappings(messages)))
            ids, start, boundary = prompts.next_prompt(messages)
        if not ids:
            raise PromptError("the prompt is empty", expected="at least one token")
        system_end = prompts.system_end(messages)
        turns = {n for n in (system_end, start) if n >= MIN_POINT_TOKENS}
        users = [m for m in _mappings(messages) if m.get("role") == "user"]
        return Prepared(
            request,
            ids,
            request.params or self.defaults,
            marks=frozenset({*turns, boundary}),
            boundary=boundary,
            thinking=not request.continue_final and prompts.opens_thought(ids),
            key=None if request.continue_final else key,
            typed_calls=bool(tools) and self._has_typed_calls(),
            thought_end=encode_text(self.tokenizer, THOUGHT_END),
            question=str(users[-1].get("content", ""))[:4096] if users else "",
        )

    def _has_typed_calls(self) -> bool:
        if self._typed_calls is None:
            self._typed_calls = TurnPrompts(self.tokenizer).renders_json_arguments()
        return self._typed_calls

    def _check_size(self, num_characters: int) -> None:
        """Refuse a text that cannot fit before it is encoded, which takes a second per megabyte."""
        context = self.config.context_length
        if num_characters <= 16 * context:
            return
        if not self._longest_token:
            self._longest_token = max(map(len, self.tokenizer.get_vocab()), default=1)
        if (fewest := num_characters // self._longest_token) >= context:
            raise ContextFull(fewest, context)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _mappings(messages: Sequence[Any]) -> list[Any]:
    return [m for m in messages if hasattr(m, "get")]


class AnswerMemory:
    """Thoughts and calls of recent answers, by a hash of the conversation up to them.

    So no conversation gets the thought of another one. Thread-safe.
    """

    def __init__(self) -> None:
        self._answers: OrderedDict[bytes, tuple[str, list[dict[str, Any]]]] = OrderedDict()
        self._lock = Lock()

    def restored(self, messages: Sequence[Any], adapter: str = "") -> tuple[list[Any], bytes]:
        """The messages with answers as the model wrote them, and the key for the next answer.

        Answers of other adapters are not found.
        """
        key, restored = adapter.encode(), list[Any]()
        for message in messages:
            key = _key(key, message)
            if isinstance(message, Mapping) and message.get("role") == "assistant":
                with self._lock:
                    if (known := self._answers.get(key)) is not None:
                        self._answers.move_to_end(key)
                if known is not None:
                    message = _as_written(message, *known)
            restored.append(message)
        return restored, key

    def remember(
        self, key: bytes, content: str, thought: str, calls: Sequence[ToolCall], typed: bool
    ) -> None:
        """Store the answer to the messages of `key`; `typed` as in `as_message`."""
        sent = [as_message(call, typed=True) for call in calls]
        answer = {"role": "assistant", "content": content, "tool_calls": sent}
        written = [as_message(call, typed=typed)["function"]["arguments"] for call in calls]
        with self._lock:
            self._answers[_key(key, answer)] = thought, written
            while len(self._answers) > MAX_REMEMBERED:
                self._answers.popitem(last=False)


def _as_written(message: Message, thought: str, written: Sequence[dict[str, Any]]) -> Message:
    changed = {k: v for k, v in message.items() if k not in THOUGHTS}
    changed["reasoning_content"] = thought
    if written:
        changed["tool_calls"] = [
            {**call, "function": {**(call.get("function") or call), "arguments": arguments}}
            for call, arguments in zip(message["tool_calls"], written, strict=True)
        ]
    return changed


def _key(before: bytes, message: Any) -> bytes:
    """The key of a message after others; it ignores the thought and the spelling of calls."""
    if not isinstance(message, Mapping):
        said: Any = repr(message)
    else:
        content = message.get("content")
        if isinstance(content, list | tuple):
            parts = [_shown(part) for part in content]
            # Text parts are equal to one text.
            is_text = all(isinstance(part, str) for part in parts)
            content = "".join(parts) if is_text else parts
        try:
            calls = [(name, arguments) for name, arguments, _ in tool_calls(message)]
        except PromptError:
            calls = []
        text = content.strip() if isinstance(content, str) else content or ""
        said = [message.get("role"), text, calls]
    written = json.dumps(said, sort_keys=True, default=repr, ensure_ascii=True)
    return hashlib.sha256(before + written.encode()).digest()


def _shown(part: Any) -> Any:
    """A part's text, or the digest of its picture."""
    if not isinstance(part, Mapping):
        return [part]
    if isinstance(part.get("text"), str):
        return part["text"]
    digest = next((v.digest for v in part.values() if hasattr(v, "digest")), None)
    return [digest.hex()] if digest else [part]
