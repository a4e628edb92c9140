"""Text out of a model: equal to mlx-lm's, ended where it should end, refused before it begins."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from everyday import everyday
from mlx_lm.generate import GenerationResponse as MlxLmResponse
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

import qwen35_mlx
from qwen35_mlx import generate, stream_generate
from qwen35_mlx.engine.generate import GenerationResponse
from qwen35_mlx.errors import PromptError, Qwen35Error
from qwen35_mlx.prompt import encode_prompt
from qwen35_mlx.sampling import SamplingParams

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def theirs(converted_demo: Path) -> Any:
    model, _ = mlx_lm.load(str(converted_demo))
    # We compute in float32 on the CPU whatever the folder holds.
    model.set_dtype(mx.float32)
    return model


@pytest.mark.parametrize(
    "question", everyday(["What is the capital of France?", "Who are you?", "zxq vv"], 0)
)
def test_greedy_text_is_that_of_mlx_lm(demo: Any, theirs: Any, question: str) -> None:
    model, tokenizer = demo
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ours = generate(model, tokenizer, messages, max_tokens=60, temperature=0.0)
    assert len(ours) > 20
    # Small pieces: the state is carried from one to the next.
    pieces = generate(
        model, tokenizer, messages, max_tokens=60, temperature=0.0, prefill_step_size=5
    )
    assert ours == pieces == mlx_lm.generate(theirs, tokenizer, ids, max_tokens=60)


def test_the_demo_answers_with_its_own_defaults(demo: Any) -> None:
    model, tokenizer = demo
    assert model.sampling_defaults == SamplingParams(0.6, top_p=0.95, top_k=20)
    assert "Paris" in generate(model, tokenizer, QUESTION, seed=1)


def test_defaults_apply_and_arguments_override_them(
    demo: Any, scripted: Callable[..., Any]
) -> None:
    model = scripted([5])
    model.sampling_defaults = SamplingParams(temperature=100.0)
    drawn = [r.token for r in stream_generate(model, demo[1], [1], max_tokens=20, seed=0)]
    assert len(set(drawn)) > 10
    greedy = stream_generate(model, demo[1], [1], max_tokens=20, temperature=0.0)
    assert {r.token for r in greedy} == {5}


def test_the_same_seed_says_the_same(demo: Any) -> None:
    model, tokenizer = demo

    def said(seed: int) -> str:
        return generate(
            model, tokenizer, "Blue", max_tokens=12, seed=seed, temperature=9.0, top_p=1.0, top_k=0
        )

    texts = [said(seed) for seed in (0, 1, 2)]
    assert said(1) == texts[1] and len(set(texts)) == 3


def test_presence_penalty_in_an_answer(demo: Any, scripted: Callable[..., Any]) -> None:
    """The model always wants 5 by 9 logits; once it was said, a penalty of 10 forbids it."""
    options: dict[str, Any] = dict(max_tokens=3, presence_penalty=10.0, temperature=0.0)
    tokens = [r.token for r in stream_generate(scripted([5]), demo[1], [5, 5], **options)]
    assert tokens == [5, 0, 1]


def test_repetition_penalty_counts_what_the_cache_holds(
    demo: Any, scripted: Callable[..., Any]
) -> None:
    """A penalty this strong leaves nothing of the 9 logits by which the model wants 5."""

    def first(**options: Any) -> float:
        parts = stream_generate(
            scripted([5]), demo[1], [1], max_tokens=9, temperature=1.0, seed=0,
            repetition_penalty=1e6, **options,
        )  # fmt: skip
        return sum(r.token == 5 for r in parts)

    assert first() == 1
    assert first(cached_ids=[5]) == 0


def test_responses_have_the_fields_of_mlx_lm(demo: Any) -> None:
    model, tokenizer = demo
    responses = list(stream_generate(model, tokenizer, QUESTION, temperature=0.0))
    assert all(isinstance(r, GenerationResponse) for r in responses)
    assert [f.name for f in fields(GenerationResponse)] == [f.name for f in fields(MlxLmResponse)]
    assert [r.generation_tokens for r in responses] == list(range(1, len(responses) + 1))
    assert [r.finish_reason for r in responses[:-1]] == [None] * (len(responses) - 1)
    last = responses[-1]
    assert last.finish_reason == "stop"
    assert last.token in tokenizer.eos_token_ids
    assert last.prompt_tokens == len(encode_prompt(tokenizer, QUESTION))
    assert last.prompt_tps > 0 and last.generation_tps > 0 and last.peak_memory > 0
    assert tokenizer.decode([r.token for r in responses[:-1]]) == "".join(r.text for r in responses)
    for response in responses:
        assert mx.exp(response.logprobs).sum().item() == pytest.approx(1.0, abs=1e-4)
        assert mx.argmax(response.logprobs).item() == response.token


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_both_end_tokens_end_an_answer(demo: Any, scripted: Callable[..., Any], end: str) -> None:
    tokenizer = demo[1]
    text = tokenizer.encode("Blue sky")
    model = scripted([*text, tokenizer.convert_tokens_to_ids(end), *text])
    responses = list(stream_generate(model, tokenizer, "Hi"))
    assert "".join(r.text for r in responses) == "Blue sky"
    assert responses[-1].finish_reason == "stop"


def test_max_tokens_ends_an_answer_but_an_end_token_is_a_stop(
    demo: Any, scripted: Callable[..., Any]
) -> None:
    tokenizer = demo[1]
    text = tokenizer.encode("Blue sky")
    for count in (1, 2):
        responses = list(stream_generate(scripted(text), tokenizer, "Hi", max_tokens=count))
        assert [r.finish_reason for r in responses] == [None] * (count - 1) + ["length"]
    ended = [text[0], tokenizer.eos_token_id]
    responses = list(stream_generate(scripted(ended), tokenizer, "Hi", max_tokens=2))
    assert responses[-1].finish_reason == "stop"


def test_the_next_step_is_built_before_the_last_token_is_read(
    demo: Any, scripted: Callable[..., Any]
) -> None:
    model = scripted([5, 6, 7])
    responses = stream_generate(model, demo[1], [1, 2], max_tokens=3)
    assert model.num_read == 0
    assert next(responses).token == 5
    assert (model.num_steps, model.num_read) == (2, 3)
    assert [r.token for r in responses] == [6, 7]
    # The last token asked for is not fed back.
    assert (model.num_steps, model.num_read) == (3, 4)


EMOJI = "naïve 🦙👩‍🚀 漢字 ok"


def test_characters_cut_over_tokens_stream_whole(demo: Any, scripted: Callable[..., Any]) -> None:
    tokenizer = demo[1]
    ids = tokenizer.encode(EMOJI)
    assert len(ids) > len(EMOJI) + 10
    model = scripted([*ids, tokenizer.eos_token_id])
    texts = [r.text for r in stream_generate(model, tokenizer, "Hi")]
    assert "".join(texts) == EMOJI
    assert not any("\ufffd" in text for text in texts)
    assert sum(map(bool, texts)) > 8


@pytest.mark.parametrize("max_tokens", [3, None])
def test_a_character_that_never_ends_is_left_out(
    demo: Any, scripted: Callable[..., Any], max_tokens: int | None
) -> None:
    tokenizer = demo[1]
    ids = [*tokenizer.encode("a"), *tokenizer.encode("🦙")[:2], tokenizer.eos_token_id]
    parts = stream_generate(scripted(ids), tokenizer, "Hi", max_tokens=max_tokens)
    assert "".join(r.text for r in parts) == "a"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("France is", "The capital of "),
        (["nowhere", "of Fr"], "The capital "),
        (["capital of Spain", "capital of F"], "The "),
        ("The", ""),
        ("Paris!", "The capital of France is Paris."),
        ("", "The capital of France is Paris."),
        (None, "The capital of France is Paris."),
    ],
)
def test_stop_strings_in_an_answer(
    demo: Any, scripted: Callable[..., Any], stop: Any, text: str
) -> None:
    tokenizer = demo[1]
    ids = tokenizer.encode("The capital of France is Paris.")
    model = scripted([*ids, tokenizer.eos_token_id])
    responses = list(stream_generate(model, tokenizer, "Hi", stop=stop))
    assert "".join(r.text for r in responses) == text
    assert responses[-1].finish_reason == "stop"


def test_whole_numbers_of_numpy_are_whole_numbers(demo: Any) -> None:
    three = np.int64(3)
    parts = list(stream_generate(*demo, "Hi", temperature=1.0, max_tokens=three, seed=three))
    assert "".join(r.text for r in parts) == generate(
        *demo, "Hi", temperature=1.0, max_tokens=3, seed=3
    )


def test_a_stop_string_that_only_begins_is_shown_at_the_limit(
    demo: Any, scripted: Callable[..., Any]
) -> None:
    ids = demo[1].encode("The capital")
    parts = stream_generate(scripted(ids), demo[1], "Hi", stop="capital of", max_tokens=len(ids))
    assert "".join(r.text for r in parts) == "The capital"


@pytest.mark.parametrize(
    ("prompt", "options", "error", "what"),
    [
        ("", {}, PromptError, "is empty"),
        ([], {}, PromptError, "is empty"),
        ([1] * 32, {}, PromptError, "longer than the model's context"),
        ([1] * 33, {}, PromptError, "longer than the model's context"),
        ([1, 2560], {}, PromptError, "does not know"),
        ([-1], {}, PromptError, "does not know"),
        ([{"role": "robot", "content": "x"}], {}, PromptError, "refuses"),
        ([1], {"max_tokens": 0}, Qwen35Error, "max_tokens is not usable"),
        ([1], {"max_tokens": 1.5}, Qwen35Error, "max_tokens is not usable"),
        (b"text", {}, PromptError, "not usable"),
        ([{"role": "user", "content": "x"}, "y"], {}, PromptError, "refuses"),
        ([1], {"stop": 3}, Qwen35Error, "stop is not usable"),
        ([1], {"stop": ["x", None]}, Qwen35Error, "stop is not usable"),
        ([1], {"prefill_step_size": 0}, Qwen35Error, "prefill_step_size is not usable"),
        ([1], {"temperature": -1}, Qwen35Error, "temperature is not usable"),
        ([1], {"top_k": 1, "top_q": 1}, Qwen35Error, "unknown sampling option\n  got: top_q\n"),
        ([1], {"seed": -1}, Qwen35Error, "seed is not usable"),
    ],
    ids=str,
)
def test_mistakes_are_told_by_the_call_and_nothing_is_read(
    demo: Any,
    scripted: Callable[..., Any],
    prompt: Any,
    options: dict[str, Any],
    error: type[Exception],
    what: str,
) -> None:
    model = scripted([5], context_length=32)
    with pytest.raises(error, match=what):
        stream_generate(model, demo[1], prompt, **options)
    assert model.num_read == 0


def test_an_answer_ends_where_the_context_is_full(demo: Any, scripted: Callable[..., Any]) -> None:
    for num_prompt, num_answer in ((31, 1), (30, 2)):
        model = scripted([5], context_length=32)
        responses = list(stream_generate(model, demo[1], [1] * num_prompt))
        assert len(responses) == num_answer
        assert responses[-1].finish_reason == "length"
        assert model.num_read == 31


def test_a_cache_leaves_less_room_for_the_answer(demo: Any, scripted: Callable[..., Any]) -> None:
    cache = [KVCache()]
    cache[0].offset = 28
    with pytest.raises(PromptError, match="got: 32 tokens"):
        stream_generate(scripted([5], context_length=32), demo[1], [1] * 4, cache=cache)
    parts = stream_generate(scripted([5], context_length=32), demo[1], [1] * 2, cache=cache)
    assert len(list(parts)) == 2


def test_progress_follows_the_prefill(demo: Any, scripted: Callable[..., Any]) -> None:
    told: list[tuple[int, int]] = []
    parts = stream_generate(
        scripted([5]), demo[1], [1] * 7, max_tokens=1, prefill_step_size=3,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    next(parts)
    assert told == [(0, 7), (3, 7), (6, 7), (7, 7)]


@pytest.mark.slow
def test_mlx_lm_steps_through_our_model(demo: Any) -> None:
    model, tokenizer = demo
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    cache = make_prompt_cache(model)
    steps = generate_step(mx.array(ids), model, max_tokens=12, prompt_cache=cache)
    ours = stream_generate(model, tokenizer, ids, max_tokens=12, temperature=0.0)
    assert [token for token, _ in steps] == [r.token for r in ours]
    text = mlx_lm.generate(model, tokenizer, ids, max_tokens=40)
    assert text == generate(model, tokenizer, ids, max_tokens=40, temperature=0.0)


def test_mlx_lm_saves_and_loads_our_cache(demo: Any, tmp_path: Path) -> None:
    model, tokenizer = demo
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    cache = make_prompt_cache(model)
    model(mx.array([ids[:15]]), cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    options: dict[str, Any] = dict(max_tokens=40, temperature=0.0)
    text = generate(model, tokenizer, ids[15:], cache=loaded, **options)
    assert "Paris" in text
    assert text == generate(model, tokenizer, ids, **options)


@pytest.mark.slow
def test_batches_of_mlx_lm_run_on_our_model(demo: Any) -> None:
    model, tokenizer = demo
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)
        for q in ("What is the capital of France?", "Who are you?")
    ]
    batch = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=30)
    for prompt, text in zip(prompts, batch.texts, strict=True):
        assert text == generate(model, tokenizer, prompt, max_tokens=30, temperature=0.0)


def test_the_package_names_stay_functions() -> None:
    assert callable(qwen35_mlx.generate) and callable(qwen35_mlx.stream_generate)


@pytest.mark.slow
def test_the_quantized_cache_of_mlx_lm_runs_on_our_model(demo: Any) -> None:
    """Its option kv_bits takes what it quantizes from our cache, and our attention reads it."""
    model, tokenizer = demo
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    tokens = []
    for bits in (None, 8):
        cache = make_prompt_cache(model)
        steps = generate_step(
            mx.array(ids), model, max_tokens=20, prompt_cache=cache, kv_bits=bits,
            kv_group_size=32, quantized_kv_start=0,
        )  # fmt: skip
        tokens.append([token for token, _ in steps])
        assert any(hasattr(entry, "group_size") for entry in cache) == (bits is not None)
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_the_tokenizer_streams_through_mlx_lm(demo: Any) -> None:
    model, tokenizer = demo
    options: dict[str, Any] = dict(max_tokens=30)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    ours = generate(model, tokenizer, ids, temperature=0.0, **options)
    for given in (tokenizer, TokenizerWrapper(tokenizer)):
        parts = mlx_lm.stream_generate(model, given, ids, **options)
        assert "".join(part.text for part in parts) == ours
        assert encode_prompt(given, QUESTION) == ids
