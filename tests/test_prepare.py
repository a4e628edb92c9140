"""Requests before they are queued."""

import pytest

from qwen35_mlx.engine.prepare import Preparer
from qwen35_mlx.engine.requests import Request
from qwen35_mlx.errors import ContextFull

LONG = "x" * 3_000_000
TOLD = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": LONG}]


@pytest.mark.parametrize(
    "asked",
    [Request(prompt=LONG), Request(messages=TOLD), Request(messages=TOLD, continue_final=True)],
    ids=["prompt", "messages", "continued"],
)
def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(demo, monkeypatch, asked):
    for name in ("encode_prompt", "encode_text", "TurnPrompts.next_prompt"):
        monkeypatch.setattr(f"qwen35_mlx.engine.prepare.{name}", pytest.fail)
    with pytest.raises(ContextFull) as caught:
        Preparer(*demo).prepare(asked)
    assert caught.value.num_tokens > caught.value.context_length == 4096
