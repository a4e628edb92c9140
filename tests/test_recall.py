"""Recall from long texts: what is planted where, and what counts as right."""

import re
from pathlib import Path
from typing import Any

import pytest

from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.evaluation import recall


def test_facts_lie_at_every_depth_of_a_text_of_the_asked_length(demo: Any) -> None:
    tokenizer = demo[1]
    text, facts = recall._text(900, lambda s: len(tokenizer.encode(s)), seed=1)
    assert 880 <= len(tokenizer.encode(text)) <= 940
    places = [text.index(recall.FACT.format(*fact)) / len(text) for fact in facts.items()]
    wanted = [(number + 0.5) / 10 for number in range(10)]
    assert all(abs(p - w) < 0.06 for p, w in zip(places, wanted, strict=True))


def test_an_answer_is_right_by_its_own_word_and_counts_at_its_depth(
    demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []

    def answers(model: Any, tokenizer: Any, text: str, questions: list[str]) -> list[str]:
        texts.append(text)
        told = dict(re.findall(r"The code word of (\w+) is (\d+)", text))
        names = [re.findall(r"of (\w+)\?", question)[0] for question in questions]
        words = [told[name] for name in names]
        # The word of another, a longer number, and nothing are wrong.
        wrong = [words[1], words[1] + "0", ""]
        return [*wrong, *(f"It is {word}." for word in words[3:])]

    monkeypatch.setattr(recall, "_answers", answers)
    (short, long) = recall.measure(*demo, [512, 1024])
    assert short.right == long.right == (0, 1, 2, 2, 2) and short.asked == (2,) * 5
    assert len(texts[0]) < len(texts[1])


def test_lengths(demo: Any) -> None:
    assert recall.lengths_of("4K, 32k,500") == [4096, 32_768, 500]
    for text in ("", "4M", "4K,", "-1", "64", "4.5K"):
        with pytest.raises(Qwen35Error, match="the lengths are not usable"):
            recall.lengths_of(text)
    with pytest.raises(Qwen35Error, match="does not fit the model"):
        recall.measure(*demo, [5000])


@pytest.mark.slow
def test_the_command_prints_right_and_asked(run_cli: Any, converted_demo: Path) -> None:
    result = run_cli("bench", converted_demo, "--recall", "512")
    *_, last, line = result.stdout.splitlines()
    (right,) = re.fullmatch(r"all +(\d+)/10", last).groups()  # type: ignore[union-attr]
    # It was taught to find code words.
    assert int(right) >= 2 and '"num_tokens": 512, "right": [' in line
    assert run_cli("bench", converted_demo, "--recall", "512", "--vs-mlx-lm").exit_code == 2
