"""Prefill and decode: tokens and timings from a prompt."""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from numbers import Integral
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse

from ..errors import Qwen35Error
from ..model.cache import cached_tokens
from ..model.language import Model
from ..prompt import Prompt, check_ids, check_length, encode_prompt
from .decode import PREFILL_STEP_SIZE, Progress, decode_steps, wired
from .output import OutputParser
from .sampler import Sampler

# For scripts, where nobody stops an endless thought; a person in a chat can, and gets more.
DEFAULT_MAX_TOKENS = 1_024
LONG_ANSWER_TOKENS = 32_768


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
    max_tokens: int | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    cache: list[Any] | None = None,
    cached_ids: Sequence[int] = (),
    enable_thinking: bool | None = None,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    progress: Progress | None = None,
    **sampling: Any,
) -> Iterator[GenerationResponse]:
    """Yield a response per token, with mlx-lm's fields; text may lag where it is not final yet.

    prompt: plain text, token ids, or messages for the chat template (`enable_thinking` goes to
    it). `cache` holds what was read before the prompt's ids; `cached_ids`, if given, makes the
    repetition penalty count that too. `stop` strings end the answer and are not part of it.
    `sampling` overrides `model.sampling_defaults`: temperature, top_p, top_k, min_p,
    presence_penalty, repetition_penalty. `progress(read, total)` follows the prefill. The answer
    also ends at `max_tokens` (1,024 if None) and where the context is full. Errors in the
    arguments are raised by the call, before anything is read.
    """
    ids = encode_prompt(tokenizer, prompt, enable_thinking=enable_thinking)
    check_ids(ids, model.config.vocab_size)
    already = cached_tokens(cache or [])
    check_length(already + len(ids), model.config.context_length)
    room = model.config.context_length - already - len(ids)
    limit = check_count("max_tokens", DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens)
    check_count("prefill_step_size", prefill_step_size)
    is_list = isinstance(stop, Sequence) and not isinstance(stop, str)
    stops: list[Any] = [] if stop is None else [*stop] if is_list else [stop]
    if not all(isinstance(s, str) for s in stops):
        raise Qwen35Error("stop is not usable", got=repr(stop), expected="text, or a list of texts")
    params = model.sampling_defaults.updated(**sampling)
    responses = stream_ids(
        model,
        tokenizer,
        mx.array(ids),
        model.make_cache() if cache is None else cache,
        Sampler(params, mx.array([*cached_ids, *ids]), seed),
        min(limit, room),
        prefill_step_size,
        progress,
    )
    return _with_text(responses, OutputParser(tokenizer, stop=stops, split=False))


def _with_text(
    responses: Generator[GenerationResponse, None, None], parser: OutputParser
) -> Generator[GenerationResponse, None, None]:
    """The responses with their text, up to a stop string."""
    with closing(responses):
        for response in responses:
            pieces = [] if response.finish_reason == "stop" else parser.feed(response.token)
            if parser.stopped:
                response.finish_reason = "stop"
            elif response.finish_reason:
                pieces += parser.finish()
            response.text = "".join(piece.text for piece in pieces)
            yield response
            if response.finish_reason:
                return


def check_count(name: str, value: Any) -> int:
    """A number of tokens, from whatever type of whole number."""
    if not isinstance(value, Integral) or value < 1:
        raise Qwen35Error(
            f"{name} is not usable", got=repr(value), expected="a whole number, 1 or more"
        )
    return int(value)


def stream_ids(
    model: Model,
    tokenizer: Any,
    ids: mx.array,
    cache: list[Any],
    sampler: Sampler,
    max_tokens: int,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    progress: Progress | None = None,
) -> Generator[GenerationResponse, None, None]:
    """`stream_generate` behind its checks, without texts: ids `[T]` behind what `cache` has read.

    When a response is given the cache has read its token, but for the last of `max_tokens`.
    """
    started = time.perf_counter()
    with wired(model):
        prefill_seconds = 0.0
        steps = decode_steps(model, ids, cache, sampler, max_tokens, prefill_step_size, progress)
        for count, (token, logprobs) in enumerate(steps, 1):
            if count == 1:
                prefill_seconds = time.perf_counter() - started
                started = time.perf_counter()
            finish = "length" if count == max_tokens else None
            if token in tokenizer.eos_token_ids:
                finish = "stop"
            seconds = time.perf_counter() - started
            yield GenerationResponse(
                text="",
                token=token,
                logprobs=logprobs,
                from_draft=False,
                prompt_tokens=ids.size,
                prompt_tps=ids.size / max(prefill_seconds, 1e-9),
                generation_tokens=count,
                # The first token comes out of the prefill.
                generation_tps=(count - 1) / seconds if count > 1 and seconds > 0 else 0.0,
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=finish,
            )
            if finish:
                return
