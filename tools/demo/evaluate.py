"""Ask a converted demo model every held-out question; print the share of right answers.

python tools/demo/evaluate.py FOLDER [--thinking] [--show-wrong]
"""

import argparse
import json
from collections import Counter
from typing import Any

from data import Question, held_out

import qwen35_mlx
from qwen35_mlx.model import Model


def judge(
    model: Model, tokenizer: Any, thinking: bool, every: int = 1
) -> tuple[Counter[str], Counter[str], list[tuple[Question, str]]]:
    """Right answers and questions by skill, and the wrong answers; greedy, each asked alone."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    wrong = []
    for question in list(held_out())[::every]:
        text = qwen35_mlx.generate(
            model,
            tokenizer,
            [{"role": "user", "content": question.text}],
            enable_thinking=thinking,
            temperature=0,
            max_tokens=80,
        )
        answer = text.rpartition("</think>")[2].strip()
        asked[question.skill] += 1
        if question.is_right(answer):
            right[question.skill] += 1
        else:
            wrong.append((question, answer))
    return right, asked, wrong


def main() -> None:
    """Print a line per skill and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--thinking", action="store_true", help="let the model think first")
    parser.add_argument("--show-wrong", action="store_true")
    args = parser.parse_args()
    right, asked, wrong = judge(*qwen35_mlx.load(args.folder), args.thinking)
    if args.show_wrong:
        for question, answer in wrong:
            print(f"  {question.text} -> {answer}")
    for skill, count in asked.items():
        print(f"{skill:12} {right[skill]:4} of {count:4}  {right[skill] / count:6.1%}")
    share = right.total() / asked.total()
    print(json.dumps({"held_out_accuracy": round(share, 4), "questions": asked.total()}))


if __name__ == "__main__":
    main()
