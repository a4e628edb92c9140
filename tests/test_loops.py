"""The detector of loops: it hears them in time, and nothing that somebody wanted."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from repetitive_texts import SENTENCES, WANTED, loops, wanted_texts

import qwen35_mlx
from qwen35_mlx.engine.loops import (
    MAX_DATA_TOKENS,
    MAX_PROSE_TOKENS,
    MAX_SENTENCE_LINES_TOKENS,
    MAX_TEXT_TOKENS,
    LoopDetector,
    largest_number,
    passage_limit,
)

LOOP_TOKENS = 16_000


class Prose:
    """A tokenizer to which all is a sentence."""

    def decode(self, ids: Sequence[int]) -> str:
        return "It was a sentence of running text. " * 2


class Words:
    """A tokenizer of a text, each of whose words is a token."""

    def __init__(self, text: str):
        self.words = text.split(" ")

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in ids)


def first_alarm(ids: Sequence[int], tokenizer: Any = None, question: str = "") -> int | None:
    detector = LoopDetector(tokenizer or Prose(), question)
    return next((at for at, token in enumerate(ids) if detector.feed(token)), None)


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer._tokenizer.backend_tokenizer.encode(text).ids)


@pytest.mark.parametrize("period", [1, 2, 3, 7, 8, 50, 130, 700])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_loop_is_found(period: int, seed: int) -> None:
    generator = random.Random(seed)
    before = [generator.randrange(1000) for _ in range(500)]
    # Few different tokens: passages that repeat inside of the passage.
    passage = [generator.randrange(1000 if seed else 4) for _ in range(period)]
    at = first_alarm(before + passage * (8000 // period))
    repeated = max(MAX_PROSE_TOKENS, 3 * period)
    assert at is not None
    earliest = len(before) + repeated - 1
    assert earliest <= at <= earliest + 2 * period + 20


@pytest.mark.parametrize(
    ("text", "question", "limit"),
    [
        ("and then it went on.", "", MAX_PROSE_TOKENS),
        ("and then it went on.", "on went it then AND", MAX_TEXT_TOKENS),
        ("and then it went on.", "and then it went", MAX_PROSE_TOKENS),
        ("and then it went on.", "Say it 1000 times, or 300.", 5 * 1100),
        ("Go on.", "", MAX_TEXT_TOKENS),
        # Four times at least.
        ("and then it went on " * 50, "", 3 * 251),
        ("and then it went on " * 50, "A thousand times!", MAX_DATA_TOKENS),
    ],
)
def test_the_alarm_comes_at_the_first_token_that_is_too_much(
    text: str, question: str, limit: int
) -> None:
    tokenizer = Words(text)
    period = len(tokenizer.words)
    if period > 10:
        tokenizer.words[-1] = "."
    tokenizer.words *= 2
    ids = [*range(period)] * (12_800 // period)
    assert first_alarm(ids, tokenizer, question) == period + limit - 1
    # Another passage counts anew.
    cut = ids[: period + limit - 1]
    ids = [*cut, *(token + period for token in ids)]
    assert first_alarm(ids, tokenizer, question) == len(cut) + period + limit - 1


def test_a_loop_with_a_changing_number_is_none() -> None:
    generator = random.Random(0)
    passage = [generator.randrange(1000) for _ in range(30)]
    ids = [token for i in range(200) for token in (*passage, 2000 + i)]
    assert first_alarm(ids) is None


def false_alarms(tokenizer: Any, count: int, seed: int) -> list[str]:
    return [
        text
        for question, text in wanted_texts(count, seed)
        if first_alarm(encode(tokenizer, text), tokenizer, question) is not None
    ]


def missed(tokenizer: Any, count: int, seed: int) -> list[str]:
    return [
        unit
        for beginning, unit in loops(count, seed)
        if first_alarm(repeated(tokenizer, beginning, unit), tokenizer) is None
    ]


def repeated(tokenizer: Any, beginning: str, unit: str) -> list[int]:
    start = encode(tokenizer, beginning)
    ids = encode(tokenizer, unit * 8)
    return (start + ids * (LOOP_TOKENS // len(ids) + 1))[:LOOP_TOKENS]


def test_no_alarm_for_what_was_wanted_and_one_for_each_loop(demo: Any) -> None:
    assert false_alarms(demo[1], 3 * len(WANTED), seed=1) == []
    assert missed(demo[1], 30, seed=1) == []


@pytest.mark.slow
def test_no_alarm_for_two_thousand_wanted_texts_and_one_for_each_of_two_hundred_loops(
    demo: Any,
) -> None:
    assert false_alarms(demo[1], 2000, seed=0) == []
    assert missed(demo[1], 200, seed=0) == []


def reported() -> dict[str, str]:
    """What was cut by detectors of others, and of ours."""
    row = "[" + ", ".join(["0"] * 40) + "]"
    return {
        "matrix of zeros": "M = [\n" + ",\n".join([f" {row}"] * 40) + "\n]\nDone.",
        "larger matrix": "\n".join([" ".join(["0"] * 64)] * 64),
        "sentence": "\n".join(["I will not talk in class."] * 300) + "\nDone.",
        "form": "| day | note |\n|---|---|\n" + "|  |  |\n" * 120 + "\nDone.",
        "modular table": "".join(
            "| " + " | ".join(str(i * j % 7) for j in range(9)) + " |\n" for i in range(40)
        ),
        "code": "".join(f.read_text() for f in Path(qwen35_mlx.__file__).parent.glob("*.py")),
        "tree": "".join(f"│   │   │   ├── file{i}.py\n" for i in range(80)),
    }


@pytest.mark.parametrize("name", reported())
def test_no_false_alarm(demo: Any, name: str) -> None:
    ids = encode(demo[1], reported()[name])
    assert len(ids) > 500
    assert first_alarm(ids, demo[1]) is None


PARAGRAPH = "It was the best of times, it was the worst of times. " * 3


@pytest.mark.parametrize(
    ("passage", "limit"),
    [
        ("and then it went on. ", MAX_PROSE_TOKENS),
        ("I don't know. ", MAX_PROSE_TOKENS),
        (PARAGRAPH, MAX_PROSE_TOKENS),
        (f"{PARAGRAPH}\n\n", MAX_PROSE_TOKENS),
        (f"{PARAGRAPH}\n", MAX_PROSE_TOKENS),
        ("Go on now. ", MAX_PROSE_TOKENS),
        ("Go on. ", MAX_TEXT_TOKENS),
        ("one, two, three four. ", MAX_PROSE_TOKENS),
        ("one, two, three. ", MAX_TEXT_TOKENS),
        ("我以后不再迟到。", MAX_PROSE_TOKENS),
        ("it goes on and on and on and ", MAX_PROSE_TOKENS),
        ("Wait, let me check.\n\nNo, that is wrong.\n\n", MAX_SENTENCE_LINES_TOKENS),
        ("I will not talk in class.\n", MAX_TEXT_TOKENS),
        ("Day:\nMorning:\n\n", MAX_TEXT_TOKENS),
        ("red, green, blue, red, ", MAX_TEXT_TOKENS),
        ("la la ", MAX_TEXT_TOKENS),
        ("True, False, None, ", MAX_TEXT_TOKENS),
        ("x = foo(bar) or baz(x); ", MAX_TEXT_TOKENS),
        ("-", MAX_TEXT_TOKENS),
        ("!!", MAX_TEXT_TOKENS),
        ("0, ", MAX_DATA_TOKENS),
        ("AAAA", MAX_DATA_TOKENS),
        ("|  |  |\n", MAX_DATA_TOKENS),
        ("\n", MAX_DATA_TOKENS),
    ],
)
def test_what_repeats_decides_how_long_it_may(passage: str, limit: int) -> None:
    assert passage_limit(passage * 2) == limit


@pytest.mark.parametrize("sentence", [s for s in SENTENCES if s.isascii() and s.count(" ") > 4])
def test_what_the_question_asks_for_is_no_loop(demo: Any, sentence: str) -> None:
    ids = encode(demo[1], " ".join([sentence] * 100))
    assert first_alarm(ids, demo[1], "What is 17 + 25? It was 2024.") is not None
    for question in ("Say it 100 times.", "A hundred times!", f"Fill a page with {sentence!r}"):
        assert first_alarm(ids, demo[1], question) is None
    # Without an end it is one all the same.
    assert first_alarm((ids * 20)[:LOOP_TOKENS], demo[1], "Say it 100 times.") is not None


@pytest.mark.parametrize(
    ("question", "number"),
    [
        ("Say it 2,000 times.", 2000),
        ("Say it 2 000 times.", 2000),
        ("Say it 2\u202f000 times.", 2000),
        ("Sag es 10.000 mal!", 10_000),
        ("Sag es 2'000-mal", 2000),
        ("1,234,567 lines", 1_234_567),
        ("Say it 2000 times.", 2000),
        ("Say it 5000x", 5000),
        ("Say it 2k times, not 300.", 2000),
        ("Say it two thousand times.", 2000),
        ("2 thousand lines, please", 2000),
        ("Twenty-five hundred times!", 2500),
        ("two thousand five hundred", 2000),
        ("three hundred thousand", 300_000),
        ("\u91cd\u590d100\u6b21", 100),
        ("\u91cd\u590d3000\u6b21", 3000),
        ("Say it 100x.", 100),
        ("A thousand times!", 1000),
        ("It was 2024, or 1999.", 0),
        ("What is 4827 + 12345?", 0),
        ("0.125, 3.14, 12.05.2024 and v1.2", 0),
        ("the 4th of 3D and 100ms", 0),
        ("17 of 25", 25),
        ("", 0),
    ],
)
def test_numbers_of_a_question_are_read_in_every_form(question: str, number: int) -> None:
    assert largest_number(question) == number


@pytest.mark.parametrize("number", ["2,000", "2 000", "2.000", "2000", "two thousand"])
def test_two_thousand_wanted_repeats_are_no_loop(number: str) -> None:
    """An alarm came at 512 tokens, because 2,000 was read as no number."""
    ids = [1, 2, 3, 4] * 2000
    assert first_alarm(ids, question=f"Say it {number} times.") is None
    assert first_alarm(ids * 2, question=f"Say it {number} times.") is not None


def test_time_and_memory_a_token_are_constant(demo: Any) -> None:
    """A passage is looked at once, however long it goes on."""

    class Counted(Prose):
        num_calls = 0

        def decode(self, ids: Sequence[int]) -> str:
            self.num_calls += 1
            return "0, 0, "

    tokenizer = Counted()
    assert first_alarm([1, 2] * 6000, tokenizer) is None
    assert tokenizer.num_calls == 1
