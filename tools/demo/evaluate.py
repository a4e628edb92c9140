"""Evaluates the demo checkpoint: accuracy by skill and bits, and acceptance of MTP drafts.

python tools/demo/evaluate.py [--source FOLDER] [--each 50] [--bits 4 3 2] [--texts 128]
    [--work FOLDER] [--show-wrong]

transformers answers, greedily and in batches, with the dequantized weights of each conversion by
this package or mlx-lm. This package answers the questions about pictures too. The last line is
JSON.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from checks import is_right
from data import conversations, held_out
from pictures import picture, shown
from split import Sample

import qwen35_mlx
from qwen35_mlx.model.loading import load_tokenizer
from qwen35_mlx.prompt import encode_messages

SOURCE = Path(qwen35_mlx.__file__).parent / "demo"


def prompt_ids(tokenizer: Any, sample: Sample) -> list[int]:
    """Token ids of all but the sample's last message, as this package encodes them."""
    options: dict[str, Any] = {"tools": sample.tools} if sample.tools else {}
    return encode_messages(
        tokenizer,
        sample.messages[:-1],
        add_generation_prompt=True,
        enable_thinking=sample.thinking,
        **options,
    )


def answer(model: Any, tokenizer: Any, sample: Sample) -> str:
    """The model's greedy answer in place of the sample's last message, with its thought."""
    ids = prompt_ids(tokenizer, shown(sample) if sample.picture else sample)
    return qwen35_mlx.generate(model, tokenizer, ids, temperature=0, max_tokens=120)


def judge(
    model: Any, tokenizer: Any, samples: Iterable[Sample]
) -> tuple[Counter[str], Counter[str], list[tuple[Sample, str]]]:
    """Numbers of right answers and of questions by skill, and the wrong answers."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    wrong = []
    for sample in samples:
        text = answer(model, tokenizer, sample)
        asked[sample.skill] += 1
        if is_right(sample, text.rpartition("</think>")[2]):
            right[sample.skill] += 1
        else:
            wrong.append((sample, text))
    return right, asked, wrong


def pictures_right(folder: Path, num_pictures: int = 200, seed: int = 11) -> float | None:
    """The share of held-out pictures that this package names; None without a vision tower."""
    model, tokenizer = qwen35_mlx.load(folder)
    if model.vision_tower is None:
        return None
    rng = random.Random(seed)
    right, asked, _ = judge(model, tokenizer, [picture(rng, True) for _ in range(num_pictures)])
    return right["picture"] / asked["picture"]


def exam(num_each: int) -> list[Sample]:
    """The held-out questions, with every third of the facts."""
    samples = list(held_out(num_each))
    facts = [s for s in samples if s.skill == "facts"]
    return facts[::3] + [s for s in samples if s.skill != "facts"]


def converted(source: Path, home: Path, bits: Sequence[int], num_texts: int) -> dict[str, Path]:
    """Conversions of the checkpoint: in bf16, and at each of `bits` by several methods.

    The methods are rounding by this package and by mlx-lm, and, in as many bytes, error feedback
    and distillation, calibrated on `num_texts` texts of the training side. What an earlier run
    of the same source has finished in `home` is not made again, and what it has begun goes on.
    """
    from mlx_lm import convert as mlx_lm_convert

    from qwen35_mlx.convert import convert, plan
    from qwen35_mlx.convert.calibrate import calibrate
    from qwen35_mlx.convert.distilled import Distillation
    from qwen35_mlx.convert.fit import fit

    def made(name: str, **options: Any) -> Path:
        folder = home / name
        return folder if folder.exists() else convert(source, folder, **options)

    folders = {"bf16": made("bf16", dtype="bfloat16")}
    if bits:
        tokenizer = load_tokenizer(source, {}, {})._tokenizer
        rows = mx.array(conversations(tokenizer, num_texts=num_texts, length=256))
        found = calibrate(source, rows, hessians=True, measure=True)
    for b in bits:
        folders[f"{b}-bit"] = made(f"ours-{b}", bits=b)
        theirs = folders[f"{b}-bit mlx-lm"] = home / f"mlx-lm-{b}"
        shutil.rmtree(theirs, ignore_errors=True)
        mlx_lm_convert(str(source), str(theirs), quantize=True, q_bits=b, q_group_size=64)
        size = plan(source, bits=b).bits_per_weight
        distillation = Distillation(rows, finish_tokens=rows.size)
        for method, trained in (("gptq", None), ("distill", distillation)):
            choice = fit(source, bits_per_weight=size, calibration=found, method=method)
            folders[f"{size:.2f} {method}"] = made(
                f"{method}-{b}-{num_texts}",
                recipe=choice.recipe,
                method=method,
                calibration=found,
                distillation=trained,
            )
    return folders


def main() -> None:
    """Print a table of skills and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--each", type=int, default=50, help="questions of each generated skill")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--texts", type=int, default=128, help="calibration texts of 256 tokens")
    parser.add_argument("--work", type=Path, help="keep conversions of SOURCE here")
    parser.add_argument("--show-wrong", action="store_true")
    args = parser.parse_args()
    from reference import Reference

    started = time.monotonic()
    samples = exam(args.each)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        home = args.work or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        for name, folder in converted(args.source, home, args.bits, args.texts).items():
            reference = Reference(args.source, folder)
            answers = reference.answers(samples)
            asked = Counter(sample.skill for sample in samples)
            right = dict.fromkeys(asked, 0)
            for answer in answers:
                is_good = is_right(answer.sample, answer.text.rpartition("</think>")[2])
                right[answer.sample.skill] += is_good
                if args.show_wrong and not is_good:
                    question = answer.sample.messages[-2]["content"]
                    print(f"{name}: {answer.sample.skill}: {question[-90:]!r} -> {answer.text!r}")
            results[name] = {skill: right[skill] / count for skill, count in asked.items()}
            texts = [a for a in answers if not a.sample.picture and a.sample.skill != "facts"]
            results[name]["MTP acceptance"] = reference.acceptance(texts)
            if (share := pictures_right(folder)) is not None:
                results[name]["picture, this program"] = share
            print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    print(f"{'':24}" + "".join(f"{name:>14}" for name in results))
    for skill in results["bf16"]:
        shares = (column.get(skill) for column in results.values())
        cells = "".join(f"{'-' if share is None else f'{share:.1%}':>14}" for share in shares)
        print(f"{skill:24}{cells}")
    rounded = {n: {k: round(v, 4) for k, v in c.items()} for n, c in results.items()}
    counts = Counter(s.skill for s in samples)
    print(json.dumps({"demo_accuracy": rounded, "questions": counts}))


if __name__ == "__main__":
    main()
