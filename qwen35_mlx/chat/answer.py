"""One answer of a conversation: its pieces, thinking budget, loop detection and statistics."""

import math
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from ..engine.decode import decode
from ..engine.grammar import Matcher
from ..engine.loops import LoopDetector
from ..engine.output import OutputParser, Piece
from ..engine.prompt_cache import PromptCache
from ..engine.sampler import Sampler
from ..engine.turn_prompts import THOUGHT_END
from ..prompt import THINK_CLOSE, encode_text

if TYPE_CHECKING:
    from .conversation import Chat

LOOP_PENALTY = 1.0


def answer(
    chat: "Chat",
    question: str,
    cache: PromptCache,
    hidden: mx.array,
    sampler: Sampler,
    parser: OutputParser,
    limit: int,
    grammar: Matcher | None = None,
) -> Generator[Piece, None, None]:
    """Yield the pieces of an answer of at most `limit` tokens; update `chat.stats` meanwhile.

    What follows the thought is constrained by `grammar`.
    """
    stats, action = chat.stats, chat.loop_action
    detector = LoopDetector(chat.tokenizer, question)
    num_prompt = len(cache.ids)
    budget = chat.think_budget or math.inf
    started = time.perf_counter()

    def forbidden_behind(tokens: mx.array) -> mx.array:
        assert grammar
        return mx.array(grammar.forbidden_behind(cast(list[int], tokens.tolist())))

    while True:
        left = limit - stats.generation_tokens
        masks: tuple[Any, ...] = ()
        if grammar and not parser.in_thought:
            masks = mx.array(grammar.forbidden()), forbidden_behind
        with closing(decode(cache, hidden, sampler, left, chat.drafter, *masks)) as steps:
            for token, _, from_draft in steps:
                stats.draft_tokens += from_draft
                stats.generation_tokens += 1
                if stats.generation_tokens == 1:
                    started = time.perf_counter()
                else:
                    seconds = max(time.perf_counter() - started, 1e-9)
                    stats.decode_tps = (stats.generation_tokens - 1) / seconds
                was_thought = parser.in_thought
                stats.thought_tokens += was_thought
                stats.peak_memory_gb = mx.get_peak_memory() / 1e9
                is_end = token in chat.tokenizer.eos_token_ids
                pieces = [] if is_end else parser.feed(token)
                follows = grammar if not was_thought else None
                if follows and not is_end:
                    follows.accept(token)
                if is_end or parser.stopped or (follows and follows.is_finished):
                    stats.finish_reason = "stop"
                elif stats.generation_tokens == limit:
                    stats.finish_reason = "length"
                elif action != "off" and detector.feed(token):
                    detector = LoopDetector(chat.tokenizer, question)
                    if action == "stop":
                        stats.finish_reason = "loop"
                    else:
                        stats.loops += 1
                        higher = sampler.params.presence_penalty + LOOP_PENALTY
                        sampler.penalise_repeats(min(higher, 10.0), cache.ids[num_prompt:])
                yield from pieces
                if stats.finish_reason:
                    yield from parser.finish()
                    return
                if parser.in_thought and stats.thought_tokens >= budget:
                    forced = THOUGHT_END
                    break
                if grammar and was_thought and not parser.in_thought:
                    forced = THOUGHT_END.partition(THINK_CLOSE)[2]
                    break
        end = encode_text(chat.tokenizer, forced)
        if stats.generation_tokens + len(end) >= limit:
            stats.finish_reason = "length"
            yield from parser.finish()
            return
        hidden = cast(mx.array, cache.read(end))
        sampler.accept(mx.array(end))
        stats.generation_tokens += len(end)
        yield from parser.insert(end)


@dataclass
class TurnStats:
    """Statistics of one turn; `prefilled_tokens` excludes tokens that were in the cache."""

    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    prefill_tps: float = 0.0
    generation_tokens: int = 0
    decode_tps: float = 0.0
    peak_memory_gb: float = 0.0
    # "stop", "length", "loop", or None if the caller stopped it.
    finish_reason: str | None = None
    thought_tokens: int = 0
    # Prefilled in the background before the turn began.
    read_ahead_tokens: int = 0
    # How often a loop raised the presence penalty.
    loops: int = 0
    # Accepted drafts: tokens of the answer without a pass of their own.
    draft_tokens: int = 0
    # Pictures and videos that went through the vision tower.
    pictures_encoded: int = 0
