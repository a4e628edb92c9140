"""One answer of a request while it is decoded: parsing, constraints, and its end."""

import time
from collections.abc import Collection, Generator, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..prompt import THINK_CLOSE
from .decode import Decoding, Step, likeliest, log_probabilities
from .grammar import Matcher
from .loops import LoopDetector
from .output import OutputParser, Piece
from .prepare import Prepared
from .prompt_cache import PromptCache
from .reading import Reading
from .requests import Done, FinishReason, Token, Top
from .sampler import Sampler
from .speculate import Drafter
from .tool_calls import ToolCall


class Vocabulary:
    """End tokens and banned tokens, for all rows of an engine."""

    def __init__(self, tokenizer: Any, vocab_size: int, banned: Sequence[int]):
        """banned: ids that are never sampled, besides those unknown to the tokenizer."""
        self.ends: Collection[int] = frozenset(tokenizer.eos_token_ids)
        forbidden = np.zeros(vocab_size, dtype=bool)
        forbidden[[i for i in banned if i < vocab_size]] = True
        forbidden[len(tokenizer) :] = True
        with_ends = forbidden.copy()
        with_ends[[i for i in self.ends if i < vocab_size]] = True
        self.forbidden = forbidden
        # None if nothing is banned, because a mask costs an operation per token.
        self._banned = mx.array(forbidden) if forbidden.any() else None
        self.banned_and_ends = mx.array(with_ends)

    def banned(self, prepared: Prepared) -> mx.array | None:
        """The mask `[V]` of banned tokens; with a grammar or `ignore_eos`, of end tokens too."""
        has_end = prepared.grammar is None and not prepared.request.ignore_eos
        return self._banned if has_end else self.banned_and_ends


class Row:
    """An answer of a request; `cache` holds all of its tokens except the last one sampled."""

    def __init__(
        self,
        reading: Reading,
        cache: PromptCache,
        sampler: Sampler,
        vocabulary: Vocabulary,
        tokenizer: Any,
        index: int = 0,
    ):
        """The answer `index` to the prompt of `reading`, which owns the cache."""
        prepared = reading.prepared
        request = prepared.request
        self.prepared, self.ticket, self.usage = prepared, reading.ticket, reading.usage
        self.cache, self.sampler, self.index, self._owner = cache, sampler, index, reading
        self.num_generated = self.num_thought_tokens = 0
        self.finish_reason: FinishReason | None = None
        # Tokens that come next, whatever the model predicts.
        self.forced: Sequence[int] = ()
        tools = () if request.tool_choice == "none" else request.tools
        is_chat = request.messages is not None
        self.parser = OutputParser(
            tokenizer,
            stop=request.stop,
            thinking=prepared.thinking,
            tools=tools,
            split=is_chat and not prepared.request.continue_final,
        )
        self._ends, self._vocabulary = vocabulary.ends, vocabulary
        self._detector = LoopDetector(tokenizer, prepared.question) if request.stop_loops else None
        grammar = prepared.grammar
        self._grammar: Matcher | None = grammar.copy(vocabulary.forbidden) if grammar else None
        # The template's tokens after the end of a thought.
        close = tokenizer.get_added_vocab().get(THINK_CLOSE)
        end = list(prepared.thought_end)
        self._gap = end[end.index(close) + 1 :] if close in end else []
        self._texts: dict[str, list[str]] = {"thought": [], "answer": []}
        self._calls: list[ToolCall] = []
        # Set when the prompt is prefilled.
        self.decoding: Decoding
        self.num_drafted = 0
        self._steps: Generator[Step, None, None] | None = None
        self._seconds_before = time.perf_counter()

    @property
    def token(self) -> mx.array:
        """The token `[1]` that is sampled, but not in the cache yet."""
        return self.decoding.token

    @property
    def goes_on(self) -> bool:
        """Whether another token has to be sampled."""
        return self.finish_reason is None and not self.forced

    @property
    def left(self) -> int:
        """Number of tokens left up to the maximum length."""
        return self.prepared.max_tokens - self.num_generated

    @property
    def can_draft(self) -> bool:
        """Whether drafts are possible: no constraint depends on tokens unknown to the host."""
        if self.num_generated < self.prepared.request.min_tokens:
            return False
        # In a thought: the template's tokens follow its end, so later tokens are sampled again.
        return self._grammar is None or not self.parser.in_thought or bool(self._gap)

    def forbidden(self) -> mx.array | None:
        """The mask `[V]` of tokens that must not come next; None: only the banned ones."""
        request, vocabulary = self.prepared.request, self._vocabulary
        if self._grammar is not None and not self.parser.in_thought:
            return mx.array(self._grammar.forbidden())
        # The next one is the token `num_generated + 1`.
        is_early = self.num_generated < request.min_tokens
        return vocabulary.banned_and_ends if is_early else None

    def _forbidden_behind(self, tokens: mx.array) -> mx.array | None:
        """Masks `[T, V]` of what must not follow each of tokens `[T]`, all but the first drafts."""
        if self._grammar is None or self.parser.in_thought:
            return None
        return mx.array(self._grammar.forbidden_behind(cast(list[int], tokens.tolist())))

    def begin(self, hidden: mx.array) -> None:
        """Sample the token after `hidden` `[1, 1, H]`."""
        behind = self._forbidden_behind if self._grammar else None
        self.decoding = Decoding(self.cache, hidden, self.sampler, self.forbidden(), behind)

    def speculative_step(self, drafter: Drafter) -> Step:
        """The next token of a row that runs alone, with drafts."""
        if self._steps is None:
            self.cache.feeds_mtp = drafter.uses_mtp
            self._steps = self.decoding.steps(self.left, drafter)
        return next(self._steps)

    def pause(self) -> None:
        """End the loop of single steps; batches, or a new loop, continue from here."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def take(self, token: int, logits: mx.array, from_draft: bool = False) -> None:
        """Process a token and the logits `[1, V]` that it was sampled from; send its event."""
        request, parser, usage = self.prepared.request, self.parser, self.usage
        now = time.perf_counter()
        self.num_generated += 1
        usage.generated_tokens += 1
        usage.draft_tokens += from_draft
        self.num_drafted += from_draft
        usage.thought_tokens += parser.in_thought
        self.num_thought_tokens += parser.in_thought
        logprob: float | None = None
        top: Top = ()
        if request.logprobs is not None:
            row = np.array(log_probabilities(logits))
            logprob, top = float(row[token]), likeliest(row, request.logprobs)
        was_thought = parser.in_thought
        is_end = token in self._ends and not request.ignore_eos
        pieces = [] if is_end else parser.feed(token)
        self._keep(pieces)
        if self._grammar is not None and not is_end and not was_thought:
            self._grammar.accept(token)
        follows = self._grammar if not was_thought else None
        has_called = bool(self._calls) and not request.parallel_tool_calls
        is_over = is_end or parser.stopped or has_called
        if is_over or (follows is not None and follows.is_finished):
            self.finish_reason = "stop"
        elif self.left <= 0:
            self.finish_reason = "length"
        elif self._detector is not None and self._detector.feed(token):
            self.finish_reason = "loop"
        elif self._grammar is not None and was_thought and not parser.in_thought:
            self.forced = self._gap
        elif (
            parser.in_thought
            and request.think_budget is not None
            and self.num_thought_tokens >= request.think_budget
        ):
            self.forced = self.prepared.thought_end
        usage.decode_seconds += now - self._seconds_before
        self._seconds_before = now
        self.ticket.send(Token(pieces, token, logprob, top, from_draft, self.index))
        if self.forced and len(self.forced) >= self.left:
            self.forced, self.finish_reason = (), "length"

    def read_forced(self) -> None:
        """Append the forced tokens, and sample the next one."""
        tokens, self.forced = list(self.forced), ()
        self.pause()
        hidden = self.cache.read(tokens)
        assert hidden is not None
        self.sampler.accept(mx.array(tokens))
        pieces = self.parser.insert(tokens)
        self._keep(pieces)
        self.num_generated += len(tokens)
        self.usage.generated_tokens += len(tokens)
        for i, token in enumerate(tokens):
            shown = pieces if i == len(tokens) - 1 else []
            self.ticket.send(Token(shown, token, index=self.index))
        self.begin(hidden)

    def end(self, reason: FinishReason) -> Done:
        """The last event, with the text that was held back."""
        pieces = self.parser.finish() if reason != "cancelled" else []
        self._keep(pieces)
        if reason == "stop" and self._calls:
            reason = "tool_calls"
        return Done(reason, self.parser.stop_text, self.usage, pieces, self.index)

    def answer(self) -> tuple[str, str, list[ToolCall]]:
        """Text, thought and complete calls so far."""
        content, thought = ("".join(self._texts[kind]).strip() for kind in ("answer", "thought"))
        return content, thought, self._calls

    def _keep(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if piece.call is None:
                self._texts[piece.kind].append(piece.text)
            elif piece.call.complete:
                self._calls.append(piece.call)
