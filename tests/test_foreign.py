"""Models of mlx-lm's interface, mlx-lm's own and stubs, answer as ours do."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import pytest

import qwen35_mlx
from qwen35_mlx.engine.prefix_store import PrefixStore
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.text.detokenizer import detokenizer_of

FRANCE, HOT = "What is the capital of France?", "What is the opposite of hot?"
GREEDY = {"temperature": 0.0}


class Called:
    """A model that can only be called, and counts the tokens that it has read."""

    def __init__(self, model: Any):
        self.model, self.num_read = model, 0

    def make_cache(self) -> list[Any]:
        return list(self.model.make_cache())

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        self.num_read += ids.shape[1]
        return self.model(ids, cache)


def split(model: Any) -> Any:
    """With a trunk and a head, and without the facts of a loaded model."""
    return SimpleNamespace(
        trunk=model.trunk, head=model.head, make_cache=model.make_cache, config=model.config
    )


def stated(model: Any) -> Any:
    """With mlx-lm's `args`, which bound the ids and the length."""
    called = Called(model)
    config = {"vocab_size": model.config.vocab_size, "max_position_embeddings": 64}
    called.args = SimpleNamespace(model_type="qwen3_5", text_config=config)  # type: ignore[attr-defined]
    return called


def conversation(model: Any, tokenizer: Any, **options: Any) -> list[str]:
    chat = qwen35_mlx.Chat(
        model, tokenizer, enable_thinking=False, max_tokens=9, sampling=GREEDY, **options
    )
    return ["".join(piece.text for piece in chat.send(text)) for text in (FRANCE, HOT)]


@pytest.mark.parametrize("form", [Called, split])
def test_a_stub_without_the_facts_of_a_loaded_model_answers(demo: Any, form: Any) -> None:
    """AttributeError: no attribute 'config', or 'sampling_defaults'."""
    model, tokenizer = demo
    stub, asked = form(model), [{"role": "user", "content": FRANCE}]
    options: dict[str, Any] = {"max_tokens": 8, "enable_thinking": False}
    expected = qwen35_mlx.generate(model, tokenizer, asked, **options, **GREEDY)
    # Greedy, because it recommends nothing else.
    assert qwen35_mlx.generate(stub, tokenizer, asked, **options) == expected
    assert conversation(stub, tokenizer) == conversation(model, tokenizer)


def test_an_answer_is_valid_for_a_schema_if_the_vocabulary_is_known(
    demo: Any, converted_demo: Path
) -> None:
    model, tokenizer = demo[0], mlx_lm.utils.load_tokenizer(converted_demo)
    schema = {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}
    for form, refused in ((stated, False), (Called, True)):
        chat = qwen35_mlx.Chat(
            form(model), tokenizer, enable_thinking=False, sampling=GREEDY, schema=schema
        )
        if refused:
            with pytest.raises(Qwen35Error, match="states its vocab_size"):
                list(chat.send(HOT))
            assert chat.messages == []
        else:
            text = "".join(piece.text for piece in chat.send(HOT))
            assert all(isinstance(flag, bool) for flag in json.loads(text))


@pytest.mark.parametrize("task", [qwen35_mlx.batch_generate, qwen35_mlx.embed])
def test_what_needs_more_than_logits_refuses_a_stub(demo: Any, task: Any) -> None:
    """AttributeError: no attribute 'sampling_defaults', or 'config'."""
    model, tokenizer = demo
    with pytest.raises(Qwen35Error, match=f"(?s){task.__name__} needs a model.*Called"):
        task(Called(model), tokenizer, ["x"])


def test_a_stub_reads_the_common_part_of_a_conversation_once(demo: Any) -> None:
    model, tokenizer = demo
    stub = Called(model)
    store = PrefixStore(stub)  # type: ignore[arg-type]
    expected = conversation(stub, tokenizer, store=store)
    num_read = stub.num_read
    assert conversation(stub, tokenizer, store=store) == expected
    # Only what was decoded, and the last tokens of the prompts.
    assert stub.num_read - num_read < num_read - 20


def test_a_tokenizer_of_mlx_lm_keeps_the_space_at_the_start(
    demo: Any, converted_demo: Path
) -> None:
    """'Paris.' instead of ' Paris.'"""
    theirs = mlx_lm.utils.load_tokenizer(converted_demo)
    for start in ("The capital of France is", "The opposite of hot is"):
        said = [
            qwen35_mlx.generate(demo[0], tokenizer, start, max_tokens=3, temperature=0.0)
            for tokenizer in (demo[1], theirs)
        ]
        assert said[0] == said[1] and said[0].startswith(" ")
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(demo[0].config.vocab_size) for _ in range(rng.randint(1, 12))]
        texts = []
        for tokenizer in (demo[1], theirs):
            detokenizer = detokenizer_of(tokenizer)
            for token in ids:
                detokenizer.add_token(token)
            detokenizer.finalize()
            texts.append(detokenizer.text)
        assert texts[0] == texts[1]


def test_the_limits_that_a_stub_states_are_kept(demo: Any) -> None:
    stub = stated(demo[0])
    with pytest.raises(qwen35_mlx.errors.Qwen35Error, match="does not know"):
        qwen35_mlx.generate(stub, demo[1], [demo[0].config.vocab_size])
    with pytest.raises(qwen35_mlx.errors.Qwen35Error, match="longer than the model's context"):
        qwen35_mlx.generate(stub, demo[1], [5] * 64)


@pytest.mark.slow
def test_the_model_and_the_tokenizer_of_mlx_lm_answer_and_are_saved(
    demo: Any, converted_demo: Any, tmp_path: Any
) -> None:
    import mlx_lm

    theirs, wrapper = mlx_lm.load(str(converted_demo))[:2]
    expected = conversation(*demo)
    for tokenizer in (wrapper, demo[1]):
        assert conversation(theirs, tokenizer) == expected
        chat = qwen35_mlx.Chat(
            theirs, tokenizer, enable_thinking=False, max_tokens=9, sampling=GREEDY
        )
        text = "".join(piece.text for piece in chat.send(FRANCE))
        resumed = qwen35_mlx.Chat(theirs, tokenizer, max_tokens=9, sampling=GREEDY)
        assert resumed.load(chat.save(tmp_path / "talk")) is None
        assert [text, "".join(piece.text for piece in resumed.send(HOT))] == expected
