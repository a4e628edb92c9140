"""Prompts in every form, and what is refused."""

import copy
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen35_mlx.errors import PromptError
from qwen35_mlx.prompt import _plain, check_ids, check_length, encode_prompt

HELLO = [{"role": "user", "content": "Hello"}]


def test_text_ids_arrays_and_messages_become_ids(demo: Any) -> None:
    _, tokenizer = demo
    ids = tokenizer.encode("What is blue?")
    assert tokenizer.decode(ids) == "What is blue?"
    for prompt in ("What is blue?", ids, tuple(ids), np.array(ids), mx.array(ids)):
        assert encode_prompt(tokenizer, prompt) == ids
    text = tokenizer.decode(encode_prompt(tokenizer, HELLO))
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think>\n"


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ("", "is empty"),
        ([], "is empty"),
        (mx.array([], dtype=mx.int32), "is empty"),
        (None, "is not usable"),
        (7, "is not usable"),
        ([1.5], "is not usable"),
        (["1"], "is not usable"),
        ([[1, 2]], "is not usable"),
        (mx.array([1.0]), "is not usable"),
        (HELLO[0], "is not usable"),
        ("a\udce9b", "not valid Unicode"),
        ([{"role": "user", "content": "a\udce9b"}], "not valid Unicode"),
        ([{"role": "system", "content": "Be kind."}], "No user query"),
        ([*HELLO, {"role": "narrator", "content": "x"}], "Unexpected message role"),
        ([{"role": "user", "content": 7}], "template refuses"),
        ([*HELLO, {"content": "x"}], "template refuses"),
        ([{"role": "user", "content": [{"type": "image"}]}], "has no image"),
        ([*HELLO, {"role": "tool", "content": [{"image_url": "a"}, {"text": "x"}]}], "a data: URL"),
    ],
    ids=repr,
)
def test_prompts_that_are_refused(demo: Any, prompt: Any, what: str) -> None:
    with pytest.raises(PromptError, match=what):
        encode_prompt(demo[1], prompt)


def test_a_template_that_fails_in_python_is_a_prompt_error(demo: Any) -> None:
    tokenizer = with_template(demo[1], "{{ 'x' + 1 }}")
    with pytest.raises(PromptError, match="template refuses"):
        encode_prompt(tokenizer, HELLO)


def test_messages_without_a_template_are_refused(demo: Any) -> None:
    with pytest.raises(PromptError, match=r"no chat template(.|\n)*generate --raw"):
        encode_prompt(with_template(demo[1], None), HELLO)


@pytest.mark.parametrize(("enable_thinking", "text"), [(None, "default"), (True, "think"),
                                                      (False, "direct")])  # fmt: skip
def test_the_template_decides_on_thinking_unless_told(
    demo: Any, enable_thinking: bool | None, text: str
) -> None:
    """The 0.8B model does not think by default, the larger ones do."""
    tokenizer = with_template(
        demo[1],
        "{% if enable_thinking is not defined %}default"
        "{% elif enable_thinking %}think{% else %}direct{% endif %}",
    )
    ids = encode_prompt(tokenizer, HELLO, enable_thinking=enable_thinking)
    assert tokenizer.decode(ids) == text


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def test_lengths_and_ids_at_the_edge() -> None:
    check_length(99, 100)
    with pytest.raises(PromptError, match="longer than the model's context"):
        check_length(100, 100)
    check_ids([0, 9], 10)
    for ids in ([3, 10], [-1]):
        with pytest.raises(PromptError, match=rf"got: {ids[-1]}\n"):
            check_ids(ids, 10)


def test_a_template_sees_plain_values_alone(demo: Any) -> None:
    class Odd:
        secret = "x"

    value = {"a": (1, 2.5, None, True), Odd(): np.array([[1, 2]]), "b": mx.array(3), "c": Odd()}
    expected = {"a": [1, 2.5, None, True], "<Odd>": [[1, 2]], "b": 3, "c": "<Odd>"}
    assert _plain(value) == expected
    assert _plain("text") == "text"
