"""Ask a converted demo model every held-out question; print the share of right answers.

python tools/demo/evaluate.py FOLDER [--thinking]
"""

import argparse
import json
from collections import Counter

from data import held_out

import qwen35_mlx


def main() -> None:
    """Print a line per skill and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--thinking", action="store_true", help="let the model think first")
    parser.add_argument("--show-wrong", action="store_true")
    args = parser.parse_args()
    model, tokenizer = qwen35_mlx.load(args.folder)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for question in held_out():
        text = qwen35_mlx.generate(
            model,
            tokenizer,
            [{"role": "user", "content": question.text}],
            enable_thinking=args.thinking,
            temperature=0,
            max_tokens=80,
        )
        answer = text.rpartition("</think>")[2].strip()
        is_right = question.is_right(answer)
        asked[question.skill] += 1
        right[question.skill] += is_right
        if args.show_wrong and not is_right:
            print(f"  {question.text} -> {answer}")
    for skill, count in asked.items():
        print(f"{skill:12} {right[skill]:4} of {count:4}  {right[skill] / count:6.1%}")
    share = right.total() / asked.total()
    print(json.dumps({"held_out_accuracy": round(share, 4), "questions": asked.total()}))


if __name__ == "__main__":
    main()
