"""Many prompts in one call: all answers, or all embeddings.

N prompts, H hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from ..errors import Qwen35Error
from ..model.language import Model
from ..prompt import Prompt, check_ids, check_length, encode_prompt
from .decode import embedding
from .generate import DEFAULT_MAX_TOKENS, check_count, check_stops
from .prompt_cache import PromptCache, common_prefix
from .requests import Done, Grammar, Request, Token
from .scheduler import Engine, Limits


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
