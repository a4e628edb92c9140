"""Many prompts in one call: the texts of one by one, whatever their lengths, and embeddings."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday

import qwen35_mlx
from qwen35_mlx.engine import scheduler
from qwen35_mlx.engine.prompt_cache import PromptCache
from qwen35_mlx.errors import PromptError, Qwen35Error

QUESTIONS = (
    "What is the capital of France?",
    "hi",
    "Count to ten.",
    "Who are you?",
    "What is 4+5?",
)


def prompts(number: int) -> list[Any]:
    """Messages, texts and ids of lengths between 1 and about 200."""
    found: list[Any] = [[7], "The capital of France is"]
    for i in range(number - 2):
        text = "Some words to read. " * (7 * i % 20) + QUESTIONS[i % len(QUESTIONS)]
        found.append([{"role": "user", "content": text}])
    return found[:number]


@pytest.mark.parametrize(
    "number, options",
    everyday(
        [
            (4, {"max_tokens": 6, "temperature": 0.8, "seed": 3}),
            (5, {"max_tokens": 6, "temperature": 0.0}),
            (4, {"max_tokens": 8, "temperature": 0.9, "seed": 3, "presence_penalty": 0.5}),
            (32, {"max_tokens": 60, "temperature": 0.0, "stop": ["Paris", "is"]}),
            (32, {"max_tokens": 60, "temperature": 0.7, "seed": 1, "batch_size": 5}),
        ],
        0,
    ),
)
def test_texts_are_those_of_one_by_one(demo, number, options):
    given = prompts(number)
    answered: dict[int, str] = {}
    found = qwen35_mlx.batch_generate(
        *demo, given, answered=answered.__setitem__, enable_thinking=False, **options
    )
    options.pop("batch_size", None)
    for i, prompt in enumerate(given):
        alone = qwen35_mlx.generate(*demo, prompt, enable_thinking=False, **options)
        assert found[i] == answered[i] == alone
    assert len(answered) == number and len(set(found)) > 1


def test_answers_are_decoded_together(demo, monkeypatch):
    passes: list[int] = []
    step = scheduler.Rows._step_together

    def counted(self: Any, rows: list[Any]) -> Any:
        passes.append(len(rows))
        return step(self, rows)

    monkeypatch.setattr(scheduler.Rows, "_step_together", counted)
    prompts = ["The capital of France is", "The opposite of hot is", "Count: one, two,"]
    options = dict(max_tokens=4, temperature=0.0)
    qwen35_mlx.batch_generate(*demo, prompts, **options)
    assert max(passes) == 3
    passes.clear()
    qwen35_mlx.batch_generate(*demo, prompts, batch_size=2, **options)
    assert max(passes) == 2


def test_a_failure_of_the_caller_ends_the_batch(demo):
    """What is raised while an answer is taken must not be lost."""

    def fail(place: int, text: str) -> None:
        raise KeyError(place)

    with pytest.raises(KeyError):
        qwen35_mlx.batch_generate(*demo, ["hi"], max_tokens=2, answered=fail)
    assert qwen35_mlx.batch_generate(*demo, [], max_tokens=2) == []


@pytest.mark.parametrize(
    "given, options, error",
    [
        ("hi", {}, Qwen35Error),
        ([[9999999]], {}, PromptError),
        (["hi", ""], {}, PromptError),
        (["hi"], {"max_tokens": 0}, Qwen35Error),
        (["hi"], {"stop": [1]}, Qwen35Error),
        (["hi"], {"temperature": -1.0}, Qwen35Error),
    ],
)
def test_mistakes_are_said_before_anything_is_read(demo, given, options, error):
    with pytest.raises(error):
        qwen35_mlx.batch_generate(*demo, given, **options)


def test_an_embedding_is_the_last_hidden_state_of_length_one(demo):
    model, tokenizer = demo
    texts = ["The capital of France is", "What is 4+5?"]
    found = np.array(qwen35_mlx.embed(model, tokenizer, texts))
    for row, text in zip(found, texts, strict=True):
        ids = tokenizer._tokenizer.encode(text, add_special_tokens=False)
        hidden = np.array(model.trunk(mx.array([ids])))[0, -1]
        np.testing.assert_allclose(row, hidden / np.linalg.norm(hidden), atol=2e-5)
    assert qwen35_mlx.embed(model, tokenizer, []).shape == (0, model.config.hidden_size)


def test_answers_follow_a_schema(demo):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    question = [{"role": "user", "content": "What is the capital of France?"}]
    found = qwen35_mlx.batch_generate(*demo, [question, "x"], schema=schema, temperature=0.0)
    assert [json.loads(text).keys() for text in found] == [{"city"}] * 2


@pytest.mark.slow
def test_what_prompts_begin_with_in_common_is_read_once_on_request(demo, monkeypatch):
    read = []
    read_piece = PromptCache._read_piece

    def counted(self: Any, piece: list[int], *others: Any) -> Any:
        read.append(len(piece))
        return read_piece(self, piece, *others)

    monkeypatch.setattr(PromptCache, "_read_piece", counted)
    examples = "Question: What is the capital of Italy?\nAnswer: Rome\n\n" * 4
    prompts = [f"{examples}Question: {question}\nAnswer:" for question in QUESTIONS]
    options = dict(max_tokens=3, temperature=0.0)
    apart = qwen35_mlx.batch_generate(*demo, prompts, **options)
    alone = sum(read)
    read.clear()
    assert qwen35_mlx.batch_generate(*demo, prompts, shares_prefix=True, **options) == apart
    assert sum(read) < alone / 2 and max(read) == read[0]


@pytest.mark.slow
def test_pictures_of_a_batch_are_seen(demo):
    picture = Path(qwen35_mlx.__file__).parent / "demo" / "picture.png"
    parts = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "What do you see?"}]
    shown, asked = ([{"role": "user", "content": content}] for content in (parts, "hi"))
    found = qwen35_mlx.batch_generate(*demo, [shown, asked, shown], max_tokens=40, temperature=0.0)
    assert "red star" in found[0] and found[0] == found[2] != found[1]
