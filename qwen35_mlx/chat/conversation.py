"""A conversation: messages, thoughts apart from answers, tools, and nothing read twice."""

import json
import math
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..engine.decode import Progress
from ..engine.generate import LONG_ANSWER_TOKENS, check_count, stream_ids
from ..engine.output import OutputParser, Piece, ToolCall
from ..engine.prefix_cache import (
    READ_AHEAD_STEP_SIZE,
    PrefixStore,
    PromptCache,
    Stop,
    common_prefix,
    snapshot_marks,
)
from ..engine.sampler import Sampler
from ..engine.tool_calls import as_message, calls_of
from ..engine.tool_values import Schema
from ..errors import ContextFull, PromptError, Qwen35Error
from ..model.cache import cached_tokens
from ..model.language import Model
from ..prompt import THINK_CLOSE, THINK_OPEN, check_ids, check_length, encode_text, render_messages
from ..sampling import CHECKPOINT, SamplingParams, preset_params
from .loops import LoopDetector

Message = dict[str, Any]
# As the template closes a thought.
THOUGHT_END = f"\n{THINK_CLOSE}\n\n"
LOOP_ACTIONS = ("stop", "penalize", "off")
LOOP_PENALTY = 1.0
# Fewer are read again sooner than a recurrent state is kept for them.
MIN_POINT_TOKENS = 32


@dataclass
class TurnStats:
    """What the last turn cost; `prefilled_tokens` leaves out what the cache already held."""

    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    prefill_tps: float = 0.0
    generation_tokens: int = 0
    decode_tps: float = 0.0
    peak_memory_gb: float = 0.0
    # "stop", "length", "loop", or None if it was stopped from outside
    finish_reason: str | None = None
    thought_tokens: int = 0
    # Read while nobody waited, before the turn began.
    read_ahead_tokens: int = 0
    # How often a loop was answered with a higher presence penalty.
    loops: int = 0


@dataclass
class Chat:
    """Turns with one model; an answer has at most `max_tokens` (32,768 if None).

    tools: JSON schemas as OpenAI's API takes them. think_budget: tokens after which a thought is
    closed. preset: "thinking", "coding", "instruct", "auto" (by mode) or "checkpoint" (its
    generation_config.json); `sampling` overrides it, as in stream_generate. on_loop: "stop" an
    answer that repeats itself, "penalize", or "off". Chats that share a `store` read a common
    beginning once.
    """

    model: Model
    tokenizer: Any
    system: str | None = None
    tools: Sequence[Schema] = ()
    enable_thinking: bool | None = None
    think_budget: int | None = None
    max_tokens: int | None = None
    preset: str = CHECKPOINT
    sampling: dict[str, Any] = field(default_factory=dict)
    on_loop: str = "stop"
    messages: list[Message] = field(default_factory=list)
    stats: TurnStats = field(default_factory=TurnStats)
    store: PrefixStore | None = None

    def __post_init__(self) -> None:
        if self.system:
            self.messages.insert(0, {"role": "system", "content": self.system})
        self.set_on_loop(self.on_loop)
        self.prefixes = self.store or PrefixStore(self.model)
        self._cache: PromptCache | None = None
        self._read_ahead_tokens = 0

    def send(self, text: str, progress: Progress | None = None) -> Generator[Piece, None, None]:
        """Say `text` and yield thought, answer and tool calls as they come.

        Closing the iterator early, or an interrupt, keeps what was said so far; if the prompt
        is refused, or stopped while it is read, the message is taken back.
        """
        yield from self._reply([*self.messages, _user(text)], progress)

    def regenerate(self, progress: Progress | None = None) -> Generator[Piece, None, None]:
        """Answer the last message again; the old answer is gone once the new one begins."""
        yield from self._reply(self.messages[: self._last_turn() + 1], progress)

    def edit(self, text: str, progress: Progress | None = None) -> Generator[Piece, None, None]:
        """Say `text` in place of the last message; that is gone once the answer begins."""
        yield from self._reply([*self.messages[: self._last_turn()], _user(text)], progress)

    def undo(self) -> str:
        """Take the last message and all behind it back; returns its text."""
        text = self.last_message()
        self.messages = self.messages[: self._last_turn()]
        return text

    def last_message(self) -> str:
        """What the user said last."""
        return str(self.messages[self._last_turn()]["content"])

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls that wait for `answer_tools`."""
        return calls_of(self.messages[-1], self.tools) if self.messages else []

    def answer_tools(
        self, results: Sequence[Any], progress: Progress | None = None
    ) -> Generator[Piece, None, None]:
        """Give the results of `tool_calls`, in their order, and go on; no text: JSON of it."""
        if not results or len(results) != len(self.tool_calls):
            raise Qwen35Error(
                "the results do not fit the tool calls",
                got=f"{len(results)} results",
                expected=f"one for each of {len(self.tool_calls)} calls",
            )
        told = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in results]
        messages = [{"role": "tool", "content": text} for text in told]
        yield from self._reply([*self.messages, *messages], progress)

    def restart(self, system: str | None = None) -> None:
        """A new conversation; what was read of this one stays in the store while there is room."""
        self._leave()
        self.messages = []
        self.set_system(system)
        self.stats = TurnStats()

    def set_system(self, system: str | None) -> None:
        """Another system prompt for the same conversation, which is then read anew."""
        behind = self.messages[1:] if self.system else self.messages
        self.system = system
        self.messages = [*([{"role": "system", "content": system}] if system else []), *behind]

    def set_on_loop(self, action: str) -> None:
        """What to do about an answer that repeats itself."""
        if action not in LOOP_ACTIONS:
            raise Qwen35Error("unknown on_loop", got=action, expected=", ".join(LOOP_ACTIONS))
        self.on_loop = action

    def thinks(self) -> bool:
        """Whether the template opens a thought."""
        return self._opens_thought(encode_text(self.tokenizer, self._render([_user("a")], True)))

    def num_context_tokens(self) -> int:
        """How long the next prompt is without its message."""
        return len(self._before_message(self.messages))

    def drop_oldest(self) -> int:
        """Forget turns, oldest first, until half of the context is free; returns how many."""
        dropped, half = 0, self.model.config.context_length // 2
        while (turns := self._turns()) and not (dropped and self.num_context_tokens() <= half):
            first, following = [*turns, len(self.messages)][:2]
            self.messages = self.messages[:first] + self.messages[following:]
            dropped += 1
        return dropped

    def read_ahead(self, stop: Stop = lambda: False) -> None:
        """Read the last answer as the template will show it, without its thought.

        What then is left to read in the next turn is the new message. Ends early, after at most
        64 tokens, once `stop()` is true.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant" or self.tool_calls:
            return
        ids = self._before_message(self.messages)
        if len(ids) >= self.model.config.context_length:
            return
        cache = self._cache = self.prefixes.take(ids, self._cache, self)
        start = len(cache.ids)
        try:
            cache.read(
                ids[start:],
                marks=[self._system_end(), len(ids)],
                step_size=READ_AHEAD_STEP_SIZE,
                stop=stop,
            )
        finally:
            self._read_ahead_tokens += len(cache.ids) - start
            self.prefixes.trim()

    def start_reading_ahead(self) -> None:
        """`read_ahead` in the background; whatever is asked of the chat next stops it."""
        self.prefixes.read_ahead(self.read_ahead)

    def stop_reading_ahead(self, *, wait_for_end: bool = False) -> None:
        """End the reading in the background, at once or when it is done."""
        self.prefixes.stop_reading(wait_for_end=wait_for_end)

    def save(self, session: str | os.PathLike[str], *, with_cache: bool = True) -> Path:
        """Store messages, ids and cache under a name, or at a path; returns the file's.

        Without the cache it is quick; an older one stays and is used as far as it goes.
        """
        from .sessions import save_conversation

        self.prefixes.stop_reading()
        conversation = {
            "messages": self.messages,
            "tools": list(self.tools),
            "enable_thinking": self.enable_thinking,
            "think_budget": self.think_budget,
        }
        return save_conversation(
            session, conversation, self.model, self._cache if with_cache else None
        )

    def load(self, session: str | os.PathLike[str]) -> str | None:
        """Go on with a saved conversation, without a prefill; returns a warning if it needs one."""
        from .sessions import load_conversation

        conversation, cache, warning = load_conversation(session, self.model)
        self._leave()
        self.messages, self.tools = conversation["messages"], conversation["tools"]
        self.enable_thinking = conversation["enable_thinking"]
        self.think_budget = conversation["think_budget"]
        first = self.messages[0] if self.messages else {}
        self.system = first["content"] if first.get("role") == "system" else None
        self.stats = TurnStats()
        if cache is not None:
            self._cache = self.prefixes.take(cache.ids, cache, self)
            self.prefixes.trim()
        return warning

    def _leave(self) -> None:
        self.prefixes.stop_reading()
        if self._cache is not None:
            self._cache.close()
            self._cache = None
            self.prefixes.trim()

    def sampling_params(self, thinking: bool | None = None) -> SamplingParams:
        """What the next answer is drawn with; whether it thinks is for the template if None."""
        thinking = self.thinks() if thinking is None else thinking
        params = preset_params(self.preset, thinking, self.model.sampling_defaults)
        return params.updated(**{k: v for k, v in self.sampling.items() if k != "seed"})

    def _turns(self) -> list[int]:
        """Where in the messages the user speaks."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]

    def _last_turn(self) -> int:
        if not (turns := self._turns()):
            raise Qwen35Error("there is no message yet", expected="a conversation with a turn")
        return turns[-1]

    def _reply(
        self, messages: list[Message], progress: Progress | None
    ) -> Generator[Piece, None, None]:
        """Read `messages`, which then are the conversation, and yield the answer to them."""
        started = time.perf_counter()
        self.prefixes.stop_reading()
        most = LONG_ANSWER_TOKENS if self.max_tokens is None else self.max_tokens
        check_count("max_tokens", most)
        if self.think_budget is not None:
            check_count("think_budget", self.think_budget)
        prompt, start, boundary = self._prompt(messages)
        check_ids(prompt, self.model.config.vocab_size)
        context_length = self.model.config.context_length
        hint = "shorten the message, take turns back, or drop the oldest ones"
        check_length(len(prompt), context_length, ContextFull, hint)
        thinking = self._opens_thought(prompt)
        sampler = Sampler(
            self.sampling_params(thinking), mx.array(prompt), self.sampling.get("seed")
        )
        cache = self._cache = self.prefixes.take(prompt[:-1], self._cache, self)
        num_kept = len(cache.ids)
        stats = TurnStats(len(prompt), len(prompt) - num_kept)
        stats.read_ahead_tokens, self._read_ahead_tokens = self._read_ahead_tokens, 0
        system_end = self._system_end()
        turns = {n for n in (system_end, start) if n >= MIN_POINT_TOKENS}
        marks = {*turns, boundary, *snapshot_marks(num_kept, boundary)}
        try:
            cache.read(prompt[num_kept:boundary], marks=marks, progress=progress)
        finally:
            # Of use to every turn and to other conversations, if only as a reserve.
            cache.touch(system_end)
            self.prefixes.trim()
        self.stats, self.messages = stats, messages
        parser = OutputParser(self.tokenizer, thinking=thinking, tools=self.tools)
        said: dict[str, list[str]] = {"thought": [], "answer": []}
        calls: list[ToolCall] = []
        limit = min(most, context_length - len(prompt))
        try:
            with closing(self._generate(cache, prompt, sampler, parser, limit, started)) as pieces:
                for piece in chain(pieces, _rest(parser)):
                    if piece.call is None:
                        said[piece.kind].append(piece.text)
                    elif piece.call.complete:
                        calls.append(piece.call)
                    yield piece
        finally:
            message: Message = {"role": "assistant", "content": "".join(said["answer"]).strip()}
            # Without it, templates look for the thought in an answer that names the tag.
            if said["thought"] or THINK_CLOSE in message["content"]:
                message["reasoning_content"] = "".join(said["thought"]).strip()
            if calls:
                typed = self._renders_json_arguments()
                message["tool_calls"] = [as_message(call, typed=typed) for call in calls]
            self.messages.append(message)

    def _generate(
        self,
        cache: PromptCache,
        prompt: list[int],
        sampler: Sampler,
        parser: OutputParser,
        limit: int,
        started: float,
    ) -> Generator[Piece, None, None]:
        """Pieces of the answer; what `parser` still holds back at the end is left to the caller."""
        stats = self.stats
        question = self.last_message() if self._turns() else ""
        detector = LoopDetector(self.tokenizer, question)
        presence = sampler.params.presence_penalty
        budget = self.think_budget or math.inf
        ids = list(prompt)
        first_at = 0.0
        try:
            while True:
                rest = mx.array(ids[len(cache.ids) :])
                left = limit - (len(ids) - len(prompt))
                stream = stream_ids(self.model, self.tokenizer, rest, cache.entries, sampler, left)
                with closing(stream):
                    cache.is_whole = False
                    for response in stream:
                        # While one token is looked at, all layers have read the same.
                        cache.is_whole = True
                        ids.append(response.token)
                        stats.generation_tokens = len(ids) - len(prompt)
                        now = time.perf_counter()
                        if not first_at:
                            first_at = now
                            stats.prefill_tps = stats.prefilled_tokens / max(now - started, 1e-9)
                        elif now > first_at:
                            stats.decode_tps = (stats.generation_tokens - 1) / (now - first_at)
                        stats.thought_tokens += parser.in_thought
                        stats.peak_memory_gb = response.peak_memory
                        stats.finish_reason = response.finish_reason
                        if response.finish_reason != "stop":
                            yield from parser.feed(response.token)
                        if response.finish_reason:
                            return
                        if self.on_loop != "off" and detector.feed(response.token):
                            if self.on_loop == "stop":
                                stats.finish_reason = "loop"
                                return
                            stats.loops += 1
                            presence = min(presence + LOOP_PENALTY, 10.0)
                            sampler.penalise_repeats(presence, ids[len(prompt) :])
                            detector = LoopDetector(self.tokenizer, question)
                        if parser.in_thought and stats.thought_tokens >= budget:
                            break
                        cache.is_whole = False
                end = encode_text(self.tokenizer, THOUGHT_END)
                if len(ids) + len(end) >= len(prompt) + limit:
                    stats.finish_reason = "length"
                    return
                cache.ids = ids[: cached_tokens(cache.entries)]
                ids += end
                yield from parser.insert(end)
        finally:
            # Evaluated here: a lazy array cannot be used by the thread that reads ahead.
            mx.eval([entry.state for entry in cache.entries])
            num_read = cached_tokens(cache.entries)
            cache.is_whole = cache.is_whole and num_read <= len(ids)
            cache.ids = ids[:num_read]

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        template = {"tools": list(self.tools)} if self.tools else {}
        return render_messages(
            self.tokenizer,
            messages,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=self.enable_thinking,
            **template,
        )

    def _renders_json_arguments(self) -> bool:
        """Whether the template renders the arguments of a call as JSON, not value by value."""
        call = as_message(ToolCall("probe", {"key": "a-probe"}, {}))
        answer = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": [call]}
        try:
            return '"a-probe"' in self._render([_user("a"), answer], False)
        except PromptError:
            return False

    def _prompt(self, messages: Sequence[Message]) -> tuple[list[int], int, int]:
        """Ids of the next prompt, and how many come before its message and before the answer.

        These are the points behind which later prompts differ: another message, and an answer
        that the template shows without its thought.
        """
        text, history = self._render(messages, True), self._render(messages, False)
        prompt = encode_text(self.tokenizer, text)
        if not prompt:
            raise PromptError("the prompt is empty", expected="at least one token")
        other = self._render([*messages[:-1], _user("\0")], False)
        # Encoded from the end, which is short; what comes before melts with none of it.
        message = encode_text(self.tokenizer, text[common_prefix(text, other) :])
        start = max(0, len(prompt) - len(message))
        opening = encode_text(self.tokenizer, text[len(history) :])
        if opening and text.startswith(history) and prompt[-len(opening) :] == opening:
            return prompt, start, max(0, len(prompt) - len(opening))
        boundary = common_prefix(prompt, encode_text(self.tokenizer, history))
        return prompt, start, min(boundary, len(prompt) - 1)

    def _system_end(self) -> int:
        """How many ids conversations with this system prompt and these tools share; 0 if none."""
        system = [m for m in self.messages[:1] if m["role"] == "system"]
        return len(self._before_message(system)) if system or self.tools else 0

    def _before_message(self, messages: Sequence[Message]) -> list[int]:
        """What every next prompt behind `messages` begins with, whatever its message says."""
        one, other = (self._render([*messages, _user(text)], False) for text in ("a", "1"))
        return encode_text(self.tokenizer, one[: common_prefix(one, other)])

    def _opens_thought(self, prompt: list[int]) -> bool:
        return bool(self.tokenizer.decode(prompt[-4:]).rstrip().endswith(THINK_OPEN))


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _rest(parser: OutputParser) -> Iterator[Piece]:
    """What the parser held back, asked for once nothing follows."""
    yield from parser.finish()
