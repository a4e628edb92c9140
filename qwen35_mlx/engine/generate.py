"""generate, stream_generate, batch_generate and embed: answers and embeddings for scripts.

N prompts, H hidden size.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from numbers import Integral
from typing import Any
from weakref import WeakSet

import mlx.core as mx

from ..errors import PromptError, Qwen35Error
from ..media.tokens import MediaToken
from ..model.cache import cached_tokens
from ..model.language import Model
from ..prompt import Prompt, banned_ids, check_ids, check_length, encode_prompt, without_media
from .decode import decode, embedding, log_probabilities
from .foreign import as_model, check_own
from .output import OutputParser
from .prompt_cache import UNKNOWN_ID, Progress, PromptCache, common_prefix
from .requests import Done, Grammar, Request, Token
from .sampler import Sampler
from .scheduler import Engine, Limits
from .speculate import AUTO, Drafter

# For scripts, where nobody stops an endless thought; and for chats, where the user can.
DEFAULT_MAX_TOKENS = 1_024
LONG_ANSWER_TOKENS = 32_768
# Layer caches of callers that have read pictures.
_with_pictures: WeakSet[Any] = WeakSet()


@dataclass
class GenerationResponse:
    """One token of an answer, with statistics under mlx-lm's names."""

    # The text that became final with this token; it may be empty, or complete earlier tokens.
    text: str
    token: int
    # Log probabilities of the whole vocabulary, not evaluated.
    logprobs: mx.array
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    # In GB (10**9 bytes).
    peak_memory: float
    # "stop" or "length" for the last token.
    finish_reason: str | None = None


def generate(
    model: Model, tokenizer: Any, prompt: Prompt, *, max_tokens: int | None = None, **options: Any
) -> str:
    """The whole answer as text; options as in `stream_generate`."""
    parts = stream_generate(model, tokenizer, prompt, max_tokens=max_tokens, **options)
    return "".join(response.text for response in parts)


def stream_generate(
    model: Model,
    tokenizer: Any,
    prompt: Prompt,
    *,
    images: Sequence[Any] | None = None,
    videos: Sequence[Any] | None = None,
    allow_url: bool = False,
    max_tokens: int | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    cache: list[Any] | None = None,
    cached_ids: Sequence[int] = (),
    enable_thinking: bool | None = None,
    prefill_step_size: int | None = None,
    progress: Progress | None = None,
    draft: str | Drafter = AUTO,
    num_draft_tokens: int | None = None,
    **sampling: Any,
) -> Iterator[GenerationResponse]:
    """Yield a response per token, with mlx-lm's fields; text may lag until it is final.

    prompt: plain text, token ids, or messages for the chat template, which gets `enable_thinking`.
    images: paths, bytes, data: URLs, Pillow images or arrays. videos: paths, bytes or lists of
    frames. Both come before the text of the user's last message; a plain text with them becomes a
    message. `allow_url` also fetches web addresses. cache: layer caches with the tokens before the
    prompt. cached_ids: the ids of these tokens; the repetition penalty then counts them, and they
    are required if the cache or the prompt has pictures. `stop` strings end the answer and are not
    part of it. `sampling` overrides `model.sampling_defaults`: temperature, top_p, top_k, min_p,
    presence_penalty, frequency_penalty, repetition_penalty. draft: the source of drafts, "mtp",
    "lookup" (earlier text), "auto" (both, as far as it is faster) or "off"; the text is the same.
    A `Drafter` keeps its measurements from call to call. num_draft_tokens: a fixed number of
    drafts. `progress(read, total)` is called during the prefill. The answer also ends at
    `max_tokens` (1,024 if None) and where the context is full. Errors in the arguments are raised
    by the call itself, before the first token.
    """
    model = as_model(model)
    ids = encode_prompt(
        tokenizer,
        prompt,
        enable_thinking=enable_thinking,
        images=images,
        videos=videos,
        allow_url=allow_url,
    )
    check_ids(ids, model.config.vocab_size)
    already = cached_tokens(cache or [])
    _check_cached(ids, cached_ids, cache or [])
    check_length(already + len(ids), model.config.context_length)
    room = model.config.context_length - already - len(ids)
    limit = check_count("max_tokens", DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens)
    if prefill_step_size is not None:
        check_count("prefill_step_size", prefill_step_size)
    stops = check_stops(stop)
    params = model.sampling_defaults.updated(**sampling)
    counted = mx.array(without_media(tokenizer, [*cached_ids, *ids]))
    sampler = Sampler(params, counted, seed, banned_ids(model, tokenizer))
    read_before = list(cached_ids) or [UNKNOWN_ID] * already
    prompt_cache = PromptCache(model, read_before, cache)
    drafter = draft if isinstance(draft, Drafter) else Drafter(model, draft, num_draft_tokens)
    parser = OutputParser(tokenizer, stop=stops, split=False)
    limit = min(limit, room)

    def responses() -> Iterator[GenerationResponse]:
        started = time.perf_counter()
        prompt_cache.feeds_mtp = drafter.uses_mtp
        hidden = prompt_cache.read(ids, step_size=prefill_step_size, progress=progress)
        assert hidden is not None
        prefill_seconds = 0.0
        with closing(decode(prompt_cache, hidden, sampler, limit, drafter)) as steps:
            for count, (token, logits, from_draft) in enumerate(steps, 1):
                if count == 1:
                    prefill_seconds = time.perf_counter() - started
                    started = time.perf_counter()
                is_end = token in tokenizer.eos_token_ids
                pieces = [] if is_end else parser.feed(token)
                finish = "stop" if is_end or parser.stopped else None
                if count == limit:
                    finish = finish or "length"
                if finish:
                    pieces += parser.finish()
                seconds = time.perf_counter() - started
                yield GenerationResponse(
                    text="".join(piece.text for piece in pieces),
                    token=token,
                    logprobs=log_probabilities(logits),
                    from_draft=from_draft,
                    prompt_tokens=len(ids),
                    prompt_tps=len(ids) / max(prefill_seconds, 1e-9),
                    generation_tokens=count,
                    # The first token is a result of the prefill.
                    generation_tps=(count - 1) / seconds if count > 1 and seconds > 0 else 0.0,
                    peak_memory=mx.get_peak_memory() / 1e9,
                    finish_reason=finish,
                )
                if finish:
                    return

    return responses()


def _check_cached(ids: Sequence[int], cached_ids: Sequence[int], cache: Sequence[Any]) -> None:
    """Require `cached_ids` with pictures: positions after them follow only from the ids."""
    already = cached_tokens(cache)
    shows = any(isinstance(i, MediaToken) for part in (ids, cached_ids) for i in part)
    if (shows or any(entry in _with_pictures for entry in cache)) and len(cached_ids) != already:
        raise PromptError(
            "cached_ids are needed with pictures",
            got=f"{len(cached_ids)} cached_ids and a cache of {already} tokens",
            expected=f"cached_ids: all {already}, with their MediaTokens",
            hint="qwen35_mlx.Chat keeps both together",
        )
    if shows:
        _with_pictures.update(cache)


def check_count(name: str, value: Any) -> int:
    """A number of tokens as int; raises Qwen35Error if it is not a whole number above 0."""
    if not isinstance(value, Integral) or value < 1:
        raise Qwen35Error(
            f"{name} is not usable", got=repr(value), expected="a whole number, 1 or more"
        )
    return int(value)


def check_stops(stop: Any) -> list[str]:
    """Stop strings as a list, from None, a text or several."""
    is_list = isinstance(stop, Sequence) and not isinstance(stop, str)
    stops: list[Any] = [] if stop is None else [*stop] if is_list else [stop]
    if not all(isinstance(s, str) for s in stops):
        raise Qwen35Error("stop is not usable", got=repr(stop), expected="text, or a list of texts")
    return [s for s in stops if s]


def batch_generate(
    model: Model,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    enable_thinking: bool | None = None,
    schema: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    shares_prefix: bool = False,
    answered: Callable[[int, str], None] = lambda index, text: None,
    **sampling: Any,
) -> list[str]:
    """The answer to each prompt, as `generate` gives it; prompts may have any lengths.

    A prompt is a text, token ids or messages. Up to `batch_size` answers are decoded together, one
    token of each per pass. `shares_prefix` prefills the common beginning of all prompts once; this
    changes rounding, which can decide between equally likely tokens. `schema`, a JSON schema,
    makes every answer JSON that is valid for it, without a thought. `answered(place, text)` is
    called when an answer is complete. Other options as in `stream_generate`.
    """
    if isinstance(prompts, str):
        raise Qwen35Error("prompts are not usable", got="one text", expected="a list of prompts")
    check_own(model, "batch_generate")
    check_count("batch_size", batch_size)
    limit = check_count("max_tokens", DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens)
    if schema is not None:
        enable_thinking = False
    requests = [
        Request(
            prompt=encode_prompt(tokenizer, prompt, enable_thinking=enable_thinking),
            params=model.sampling_defaults.updated(**sampling),
            seed=seed,
            max_tokens=limit,
            stop=check_stops(stop),
            stop_loops=False,
            grammar=None if schema is None else Grammar("json_schema", schema),
        )
        for prompt in prompts
    ]
    limits = Limits(max_running=batch_size, max_queued=len(requests) + 1)
    texts = [""] * len(requests)
    engine = Engine(model, tokenizer, limits=limits)
    prepared = [engine.prepare(request) for request in requests]
    if shares_prefix and prepared:
        ids = [each.ids[:-1] for each in prepared]
        # The common prefix of the smallest and the largest is that of all.
        for each in prepared:
            each.marks |= {common_prefix(min(ids), max(ids))}
    for place, event in engine.answer(prepared):
        if isinstance(event, Token | Done):
            texts[place] += "".join(piece.text for piece in event.pieces)
        if isinstance(event, Done):
            answered(place, texts[place])
    return texts


def embed(model: Model, tokenizer: Any, prompts: Sequence[Prompt]) -> mx.array:
    """Embeddings `[N, H]` of the prompts: hidden states of their last tokens, scaled to length 1.

    They are taken after the final norm, in float32. Qwen3.5 is not trained for embeddings: similar
    texts have similar ones, but an embedding model is better at search.
    """
    check_own(model, "embed")
    rows = []
    for prompt in prompts:
        ids = encode_prompt(tokenizer, prompt)
        check_ids(ids, model.config.vocab_size)
        check_length(len(ids), model.config.context_length)
        hidden = PromptCache(model).read(ids)
        assert hidden is not None
        rows.append(embedding(hidden))
        mx.eval(rows[-1])
    return mx.stack(rows) if rows else mx.zeros((0, model.config.hidden_size))
