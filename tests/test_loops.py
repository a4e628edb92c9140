"""The detector of loops: it hears them soon, and nothing else."""

import random
from pathlib import Path
from typing import Any

import pytest

import qwen35_mlx
from qwen35_mlx.chat.loops import MIN_REPEATED_TOKENS, LoopDetector


def first_alarm(ids: list[int]) -> int | None:
    detector = LoopDetector()
    return next((at for at, token in enumerate(ids) if detector.feed(token)), None)


@pytest.mark.parametrize("period", [1, 2, 3, 7, 8, 50, 130, 700])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_loop_is_found(period: int, seed: int) -> None:
    generator = random.Random(seed)
    before = [generator.randrange(1000) for _ in range(500)]
    # Few different tokens: passages that repeat inside of the passage.
    passage = [generator.randrange(1000 if seed else 4) for _ in range(period)]
    at = first_alarm(before + passage * (8000 // period))
    repeated = max(MIN_REPEATED_TOKENS, 3 * period)
    assert at is not None
    earliest = len(before) + repeated - 1
    assert earliest <= at <= earliest + 2 * period + 20


def test_a_loop_with_a_changing_number_is_none() -> None:
    generator = random.Random(0)
    passage = [generator.randrange(1000) for _ in range(30)]
    ids = [token for i in range(200) for token in (*passage, 2000 + i)]
    assert first_alarm(ids) is None


def texts() -> dict[str, str]:
    """Text that repeats itself and is none the worse for it."""
    code = sorted(Path(qwen35_mlx.__file__).parent.glob("*.py"))
    rows = "".join(f"| {i} | {i * i} | yes | 0.00 | 0.00 | - | - |\n" for i in range(150))
    zeros = "[\n" + "".join(f"    [{', '.join(['0'] * 12)}],\n" for _ in range(12)) + "]\n"
    switch = "".join(
        f"    case {i}:\n        return handle(event, state, {i});\n        break;\n"
        for i in range(100)
    )
    return {
        "code": "".join(file.read_text() for file in code),
        "table": "| n | square | prime | a | b | c | d |\n|---|---|---|---|---|---|---|\n" + rows,
        "bullets": "".join(f"- the answer to question {i} is yes\n" for i in range(200)),
        "tasks": "- [ ] to do\n" * 60,
        "matrix": zeros,
        "switch": switch,
        "json": "".join(f'{{"id": {i}, "ok": true, "tags": [], "x": null}},\n' for i in range(99)),
        "rule": "-" * 300,
        "tree": "".join(f"│   │   │   ├── file{i}.py\n" for i in range(80)),
    }


@pytest.mark.parametrize("name", sorted(texts()))
def test_no_false_alarm(demo: Any, name: str) -> None:
    # The demo's tokenizer makes two to three times as many tokens of it as that of Qwen3.5.
    ids = demo[1].encode(texts()[name], add_special_tokens=False)
    assert len(ids) > 50
    assert first_alarm(ids) is None
