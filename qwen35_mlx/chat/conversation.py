"""Chat: a conversation with thoughts, tools and pictures that prefills no token twice."""

import os
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from ..engine.foreign import UNKNOWN, as_model
from ..engine.generate import LONG_ANSWER_TOKENS, check_count
from ..engine.grammar import Grammars, Matcher
from ..engine.output import OutputParser, Piece, ToolCall
from ..engine.prefix_store import MIN_POINT_TOKENS, PrefixStore, snapshot_marks
from ..engine.prompt_cache import Progress, PromptCache
from ..engine.requests import Grammar, Request
from ..engine.row import Vocabulary
from ..engine.sampler import Sampler
from ..engine.segments import Segments
from ..engine.speculate import AUTO, Drafter
from ..engine.tool_calls import Schema, as_message, calls_of, check_tools
from ..engine.turn_prompts import TurnPrompts
from ..errors import Qwen35Error
from ..model.language import Model
from ..prompt import (
    THINK_CLOSE,
    banned_ids,
    check_ids,
    check_length,
    open_messages,
    without_media,
)
from ..sampling import CHECKPOINT, SamplingParams, preset_params
from ..text.media_parts import Part, media_of, media_parts, source_parts, text_of
from ..text.messages import Message, tool_message, user_message
from .answer import TurnStats, answer

if TYPE_CHECKING:
    from ..text.media_parts import Media

LOOP_ACTIONS = ("stop", "penalize", "off")
# Short: a new message has to wait until a step ends.
READ_AHEAD_STEP_SIZE = 64


@dataclass
class Chat:
    """A conversation with one model; an answer has at most `max_tokens` (32,768 if None).

    tools: JSON schemas as OpenAI's API takes them. think_budget: tokens after which a thought is
    closed. preset: "thinking", "coding", "instruct", "auto" (by mode) or "checkpoint" (its
    generation_config.json); `sampling` overrides it, as in stream_generate. on_loop: "stop" an
    answer that repeats itself, "penalize", or "off"; None is "off" in the coding preset, else
    "stop". `stop` strings end an answer. Chats that share a `store` prefill a common prefix once.
    Pictures and videos are paths, bytes, data: URLs, Pillow images, arrays or, of videos, lists of
    frames; `allow_url` also fetches web addresses. In `messages` they are parts as in OpenAI's API.
    draft and num_draft_tokens: as in stream_generate. schema: a JSON schema that every answer is
    valid for, unless it calls a tool; thoughts are free.
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
    on_loop: str | None = None
    messages: list[Message] = field(default_factory=list)
    stats: TurnStats = field(default_factory=TurnStats)
    store: PrefixStore | None = None
    stop: Sequence[str] = ()
    allow_url: bool = False
    draft: str = AUTO
    num_draft_tokens: int | None = None
    schema: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.model = as_model(self.model)
        check_tools(self.tools)
        self._grammars = Grammars(self.tokenizer, self.model.config.vocab_size)
        self.messages = self._opened(self.messages)
        if self.system:
            self.messages.insert(0, {"role": "system", "content": self.system})
        self.set_on_loop(self.on_loop)
        self.prefixes = self.store or PrefixStore(self.model)
        self.set_draft(self.draft, self.num_draft_tokens)
        self._cache: PromptCache | None = None
        # The iterator of the last turn; the next turn closes it.
        self._turn: Callable[[], Generator[Piece, None, None] | None] = lambda: None
        self._read_ahead_tokens = 0
        # The saved cache of the session.
        self.disk: Segments | None = None
        # Where the last answer begins; the next prompt will contain it without its thought.
        self._answer_start = 0
        # Whether the cache holds a part of a prompt whose prefill was stopped.
        self._is_interrupted = False
        # The message that `undo` removed; `send` reuses its pictures.
        self._undone: Message = {}

    def send(
        self,
        text: str,
        progress: Progress | None = None,
        *,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
    ) -> Generator[Piece, None, None]:
        """Send `text`; yield thought, answer and tool calls as they are generated.

        Pictures and videos come before the text. They are opened at once, so an unreadable one
        changes nothing. Closing the iterator early, or an interrupt, keeps the answer so far. If
        the prompt is refused, or its prefill is stopped, the message is removed. A text that was
        just undone gets its pictures again, unless others are given.
        """
        message = self._user_message(text, source_parts(images, videos))
        undone = self._undone
        if undone and images is None and videos is None and text == text_of(undone["content"]):
            message = undone
        return self._start(lambda: [*self.messages, message], progress)

    def regenerate(self, progress: Progress | None = None) -> Generator[Piece, None, None]:
        """Answer the last message again; the old answer is dropped when the new one begins."""
        return self._start(lambda: self.messages[: self._last_turn() + 1], progress)

    def edit(
        self,
        text: str,
        progress: Progress | None = None,
        *,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
    ) -> Generator[Piece, None, None]:
        """Replace the last message by `text` and answer it.

        The old message is dropped when the answer begins. Its pictures and videos stay unless
        others are given.
        """
        given = {"image": images, "video": videos}
        # Opened now, as in `send`.
        new = media_parts(self._user_message(text, source_parts(images, videos))["content"])

        def edited() -> list[Message]:
            last = self._last_turn()
            kept = media_parts(self.messages[last]["content"])
            kept = [part for part in kept if given[part["type"]] is None]
            messages = [*self.messages[:last], user_message(text, [*kept, *new])]
            self._keep_branch()
            return messages

        return self._start(edited, progress)

    def undo(self) -> str:
        """Remove the last message of the user and all after it; return its text."""
        self._close_turn()
        last = self._last_turn()
        self._undone = self.messages[last]
        self.messages = self.messages[:last]
        self._keep_branch()
        return text_of(self._undone["content"])

    def last_message(self) -> str:
        """The text of the user's last message."""
        return text_of(self.messages[self._last_turn()]["content"])

    def last_media(self) -> "list[Media]":
        """Pictures and videos of the user's last message."""
        return media_of([self.messages[self._last_turn()]])

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The tool calls of the last answer, for `answer_tools`."""
        return calls_of(self.messages[-1], self.tools) if self.messages else []

    def answer_tools(
        self, results: Sequence[Any], progress: Progress | None = None
    ) -> Generator[Piece, None, None]:
        """Send the results of `tool_calls`, in call order, and stream the reply.

        A result that is not text is sent as JSON, unless it is a list of parts with a picture.
        """
        messages = self._opened([tool_message(result) for result in results])

        def answered() -> list[Message]:
            num_calls = len(self.tool_calls)
            if not results or len(results) != num_calls:
                raise Qwen35Error(
                    "the results do not fit the tool calls",
                    got=f"{len(results)} results",
                    expected=f"one for each of {num_calls} calls",
                )
            return [*self.messages, *messages]

        return self._start(answered, progress)

    def restart(self, system: str | None = None) -> None:
        """Start a new conversation; this one's cache stays in the store while there is room."""
        self._leave()
        self.messages = []
        self.set_system(system)
        self.stats = TurnStats()

    def set_system(self, system: str | None) -> None:
        """Change the system prompt; the conversation is then prefilled again."""
        self._close_turn()
        behind = self.messages[1:] if self.system else self.messages
        self.system = system
        self.messages = [*([{"role": "system", "content": system}] if system else []), *behind]

    def set_draft(self, mode: str, num_draft_tokens: int | None = None) -> None:
        """Set the source and number of drafts, as in stream_generate; they change no text."""
        self.drafter = Drafter(self.model, mode, num_draft_tokens)
        self.draft, self.num_draft_tokens = mode, num_draft_tokens

    def set_on_loop(self, action: str | None) -> None:
        """Set what to do with an answer that repeats itself; None leaves it to the preset."""
        if action is not None and action not in LOOP_ACTIONS:
            raise Qwen35Error("unknown on_loop", got=action, expected=", ".join(LOOP_ACTIONS))
        self.on_loop = action

    @property
    def loop_action(self) -> str:
        """`on_loop`, or the default of the preset: correct code often repeats itself."""
        return self.on_loop or ("off" if self.preset == "coding" else "stop")

    def thinks(self) -> bool:
        """Whether the template opens a thought."""
        return self._prompts.thinks()

    def num_context_tokens(self) -> int:
        """Length of the next prompt, without its message."""
        return len(self._prompts.before_message(self.messages))

    def drop_oldest(self) -> int:
        """Drop turns, oldest first, until half of the context is free; return their number."""
        self._close_turn()
        dropped, half = 0, self.model.config.context_length // 2
        while (turns := self._turns()) and not (dropped and self.num_context_tokens() <= half):
            first, following = [*turns, len(self.messages)][:2]
            self.messages = self.messages[:first] + self.messages[following:]
            dropped += 1
        return dropped

    def read_ahead(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Prefill the last answer as the next prompt will contain it, without its thought.

        Then only the new message is left to read in the next turn. Ends early, after at most
        64 tokens, once `should_stop()` is true.
        """
        self.prefixes.background.stop()
        if not self.messages or self.messages[-1]["role"] != "assistant" or self.tool_calls:
            return
        # The interrupted prompt may be sent again.
        if self._is_interrupted:
            return
        ids = self._prompts.before_message(self.messages)
        if len(ids) >= self.model.config.context_length:
            return
        cache = self._take(ids)
        start = len(cache.ids)
        try:
            cache.read(
                ids[start:],
                marks=[self._prompts.system_end(self.messages), len(ids)],
                step_size=READ_AHEAD_STEP_SIZE,
                should_stop=should_stop,
            )
        finally:
            self._read_ahead_tokens += len(cache.ids) - start
            self.prefixes.trim()

    def start_reading_ahead(self) -> None:
        """`read_ahead` and `write_cache` in the background; any later call of the chat stops it."""
        self._close_turn()
        self.prefixes.background.start(self._work_ahead)

    def _work_ahead(self, should_stop: Callable[[], bool]) -> None:
        self.read_ahead(should_stop)
        with closing(self.write_cache()) as pieces:
            # `next` gives False after the last piece.
            while not should_stop() and next(pieces, False) is None:
                pass

    def write_cache(self, *, every_point: bool = False) -> Generator[None]:
        """Append the cache to `disk`, if there is one, in pieces of up to 32 MiB.

        It includes the snapshot that the next prompt continues from, or all snapshots.
        """
        self.prefixes.background.stop()
        cache = self._cache
        if self.disk is not None and cache is not None:
            start = self._answer_start if self._answer_start in cache.snapshots else 0
            points = {start or cache.last_point, *(cache.snapshots if every_point else ())}
            for point in sorted(points):
                yield from self.disk.write(cache, point)

    def stop_reading_ahead(self, *, wait_for_end: bool = False) -> None:
        """Stop reading ahead, at once or when it is complete."""
        self.prefixes.background.stop(wait_for_end=wait_for_end)

    def save(self, session: str | os.PathLike[str], *, with_cache: bool = True) -> Path:
        """Save the messages under a name, or at a path, and append the cache; return the file.

        Without the cache it is quick; `start_reading_ahead` then writes it in the background.
        """
        from .sessions import save_conversation

        self.prefixes.background.stop()
        conversation = {
            "messages": self.messages,
            "tools": list(self.tools),
            "enable_thinking": self.enable_thinking,
            "think_budget": self.think_budget,
        }
        file = save_conversation(session, conversation, self.model)
        self._use_disk(file)
        if with_cache:
            for _ in self.write_cache():
                pass
        return file

    def load(self, session: str | os.PathLike[str]) -> str | None:
        """Continue a saved conversation without a prefill; return a warning if it needs one."""
        from .sessions import load_conversation, session_file

        conversation, warning = load_conversation(session, self.model, self.tokenizer)
        self._leave()
        self.messages, self.tools = conversation["messages"], conversation["tools"]
        self.enable_thinking = conversation["enable_thinking"]
        self.think_budget = conversation["think_budget"]
        first = self.messages[0] if self.messages else {}
        self.system = first["content"] if first.get("role") == "system" else None
        self.stats = TurnStats()
        disk = self._use_disk(session_file(session))
        if self.messages:
            self._take(self._prompts.before_message(self.messages))
            self.prefixes.trim()
        if disk.problems:
            warning = f"a part of the session's cache is read again: {disk.problems[0]}"
        return warning

    def _use_disk(self, file: Path) -> Segments:
        from .sessions import cache_folder

        if self.disk is None or self.disk.folder != cache_folder(file):
            self.disk = Segments(cache_folder(file), self.model)
        return self.disk

    def _take(self, ids: Sequence[int]) -> PromptCache:
        """Take the cache with the longest prefix of `ids`; it then belongs to this chat."""
        cache = self._cache = self.prefixes.take(ids, self._cache, self, self.disk)
        cache.feeds_mtp = self.drafter.uses_mtp
        self._answer_start = 0
        return cache

    @property
    def _prompts(self) -> TurnPrompts:
        return TurnPrompts(self.tokenizer, self.tools, self.enable_thinking)

    def _grammar(self, banned: Sequence[int]) -> Matcher | None:
        if self.schema is None:
            return None
        vocab_size = self.model.config.vocab_size
        if vocab_size == UNKNOWN:
            raise Qwen35Error("a schema needs a model that states its vocab_size")
        request = Request(tools=self.tools, grammar=Grammar("json_schema", self.schema))
        matcher = self._grammars.of(request, self._prompts.renders_json_arguments)
        never = Vocabulary(self.tokenizer, vocab_size, banned).forbidden
        return matcher.copy(never) if matcher else None

    def _opened(self, messages: Sequence[Message]) -> list[Message]:
        return list(open_messages(self.tokenizer, messages, allow_url=self.allow_url))

    def _user_message(self, text: str, media: Sequence[Part]) -> Message:
        return self._opened([user_message(text, media)])[0]

    def _leave(self) -> None:
        self._close_turn()
        self._keep_branch()
        self._undone, self.disk = {}, None
        self.prefixes.trim()

    def _keep_branch(self) -> None:
        """Leave the cache to the store: the next turn begins before its end."""
        self._is_interrupted = False
        if self._cache is not None:
            self._cache.release()
            self._cache = None

    def _start(
        self, messages: Callable[[], list[Message]], progress: Progress | None
    ) -> Generator[Piece, None, None]:
        """The iterator of a turn; nothing happens until its first piece is requested."""
        turn = self._reply(messages, progress, lambda: turn)
        return turn

    def _close_turn(self) -> None:
        """Close the iterator of an earlier turn, and stop reading ahead."""
        if turn := self._turn():
            turn.close()
        self._turn = lambda: None
        self.prefixes.background.stop()

    def sampling_params(self, thinking: bool | None = None) -> SamplingParams:
        """Sampling parameters of the next answer; thinking: None leaves it to the template."""
        thinking = self.thinks() if thinking is None else thinking
        params = preset_params(self.preset, thinking, self.model.sampling_defaults)
        return params.updated(**{k: v for k, v in self.sampling.items() if k != "seed"})

    def _turns(self) -> list[int]:
        """Indices of the user's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]

    def _last_turn(self) -> int:
        if not (turns := self._turns()):
            raise Qwen35Error("there is no message yet", expected="a conversation with a turn")
        return turns[-1]

    def _reply(
        self,
        next_messages: Callable[[], list[Message]],
        progress: Progress | None,
        turn: Callable[[], Generator[Piece, None, None]],
    ) -> Generator[Piece, None, None]:
        """Make `next_messages()` the conversation, prefill it, and yield the answer."""
        started = time.perf_counter()
        self._close_turn()
        self._turn = weakref.ref(turn())
        # Otherwise the iterator would refer to itself, and an abandoned one would never be closed.
        del turn
        messages = self._opened(next_messages())
        most = LONG_ANSWER_TOKENS if self.max_tokens is None else self.max_tokens
        check_count("max_tokens", most)
        if self.think_budget is not None:
            check_count("think_budget", self.think_budget)
        prompt, start, boundary = self._prompts.next_prompt(messages)
        check_ids(prompt, self.model.config.vocab_size)
        context_length = self.model.config.context_length
        hint = "shorten the message, take turns back, or drop the oldest ones"
        check_length(len(prompt), context_length, hint)
        thinking = self._prompts.opens_thought(prompt)
        banned = banned_ids(self.model, self.tokenizer)
        sampler = Sampler(
            self.sampling_params(thinking),
            mx.array(without_media(self.tokenizer, prompt)),
            self.sampling.get("seed"),
            banned,
        )
        grammar = self._grammar(banned)
        cache = self._take(prompt[:-1])
        num_kept, num_encoded = len(cache.ids), cache.features.num_encoded
        stats = TurnStats(len(prompt), len(prompt) - num_kept)
        stats.read_ahead_tokens, self._read_ahead_tokens = self._read_ahead_tokens, 0
        system_end = self._prompts.system_end(self.messages)
        turns = {n for n in (system_end, start) if n >= MIN_POINT_TOKENS}
        marks = {*turns, boundary, *snapshot_marks(num_kept, boundary)}
        self._is_interrupted = True
        try:
            hidden = cast(mx.array, cache.read(prompt[num_kept:], marks=marks, progress=progress))
            self._is_interrupted, self._answer_start = False, boundary
        finally:
            # Every turn and other conversations can continue from it.
            cache.mark_used(system_end)
            self.prefixes.trim()
        stats.prefill_tps = stats.prefilled_tokens / max(time.perf_counter() - started, 1e-9)
        stats.pictures_encoded = cache.features.num_encoded - num_encoded
        self.stats, self.messages, self._undone = stats, messages, {}
        parser = OutputParser(self.tokenizer, stop=self.stop, thinking=thinking, tools=self.tools)
        texts: dict[str, list[str]] = {"thought": [], "answer": []}
        calls: list[ToolCall] = []
        limit = min(most, context_length - len(prompt))
        question = self.last_message() if self._turns() else ""
        try:
            pieces = answer(self, question, cache, hidden, sampler, parser, limit, grammar)
            with closing(pieces):
                for piece in pieces:
                    if piece.call is None:
                        texts[piece.kind].append(piece.text)
                    elif piece.call.complete:
                        calls.append(piece.call)
                    try:
                        yield piece
                    finally:
                        # Another chat with the same caches may read ahead.
                        self.prefixes.background.stop()
        finally:
            message: Message = {"role": "assistant", "content": "".join(texts["answer"]).strip()}
            # Without this key, templates look for a thought in an answer that contains the tag.
            if texts["thought"] or THINK_CLOSE in message["content"]:
                message["reasoning_content"] = "".join(texts["thought"]).strip()
            if calls:
                typed = self._prompts.renders_json_arguments()
                message["tool_calls"] = [as_message(call, typed=typed) for call in calls]
            self.messages.append(message)
