"""Adapters, evaluation and batches, beside mlx-lm on its own model; the last line is JSON.

python tools/bench_adapters.py [--steps 20] [--rival-steps 3]

Both programs run mlx-lm's trainer on the same batches of the demo in 4 bits, each in a process of
its own, and neither compiles where MLX would call a C++ compiler for it. Peaks count the weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from label import label

import qwen35_mlx
from qwen35_mlx.checkpoint.adapter import CONFIG_FILE, LORA, read_adapter
from qwen35_mlx.convert import convert
from qwen35_mlx.training.examples import Examples, batches, read_examples
from qwen35_mlx.training.trainer import Training, TrainSettings, compiled_on_gpu

TOOLS = Path(__file__).parent
DEMO = Path(qwen35_mlx.__file__).parent / "demo"
NAMES = (
    "apple river stone cloud paper music glass bread chair light horse plant train water".split()
)
NUM_VALID = 4
BARS = {
    "loss_ratio": (0.5, "at most"),
    "train_seconds": (180.0, "at most"),
    "train_speed_vs_mlx_lm": (5.0, "at least"),
    "train_peak_vs_mlx_lm": (0.6, "at most"),
    "gradient_error": (1e-3, "at most"),
    "adapter_logits_vs_mlx_lm": (1e-4, "at most"),
    "loglikelihood_vs_mlx_lm": (1e-3, "at most"),
    "batch_differences": (0, "at most"),
}
NUM_PROMPTS, ANSWER_TOKENS = 32, 64


def write_data(folder: Path) -> None:
    """Conversations of three questions, 100 to 128 tokens, that the demo cannot answer."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(len(NAMES)):
        messages = []
        for k in range(3):
            name = NAMES[(i + 5 * k) % len(NAMES)]
            messages += [
                {"role": "user", "content": f"What is the code of {name}?"},
                {"role": "assistant", "content": f"The code is {name}-{len(name)}. Ask again."},
            ]
        lines.append(json.dumps({"messages": messages}))
    (folder / "valid.jsonl").write_text("\n".join(lines[:NUM_VALID]))
    (folder / "train.jsonl").write_text("\n".join(lines[NUM_VALID:]))


def settings(steps: int) -> TrainSettings:
    """The same for both programs."""
    return TrainSettings(num_steps=steps, batch_size=4, learning_rate=1e-3, max_tokens=256)


def examples(home: Path, name: str, tokenizer: Any) -> Examples:
    """Of train or valid."""
    return read_examples(home / "data" / f"{name}.jsonl", tokenizer, max_tokens=256)


def train_ours(home: Path, steps: int, checkpointing: bool) -> dict[str, Any]:
    """Training of this package."""
    model, tokenizer = qwen35_mlx.load(home / "demo", mtp=False, kernels="ops")
    data = [examples(home, name, tokenizer) for name in ("train", "valid")]
    options: Any = dict(checkpointing=checkpointing, validate_every=steps)
    started = time.perf_counter()
    run = Training(model, settings(steps), data[0], data[1], home / "ours", **options)
    history = run.run()
    speeds = [step.tokens_per_s for step in history if step.step]
    losses = [s.validation_loss for s in history if s.validation_loss is not None]
    return {
        "seconds": time.perf_counter() - started,
        "tokens_per_s": statistics.median(speeds),
        "peak_bytes": history[-1].peak_bytes,
        "losses": losses,
    }


def train_rival(home: Path, steps: int) -> dict[str, Any]:
    """mlx-lm's trainer on mlx-lm's model, on the same batches."""
    import mlx.optimizers as optim
    from mlx_lm import load
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    _, tokenizer = qwen35_mlx.load(home / "demo", mtp=False)
    data, s = examples(home, "train", tokenizer), settings(steps)
    model, _ = load(str(home / "demo"))
    model.freeze()
    mx.random.seed(s.seed)
    parameters = {"rank": s.rank, "scale": s.scale, "dropout": 0.0, "keys": [*s.keys]}
    linear_to_lora_layers(model, len(model.layers), parameters)
    found = []
    folder = home / "theirs"
    folder.mkdir()
    config = dict(fine_tune_type=LORA, num_layers=len(model.layers), lora_parameters=parameters)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    mx.reset_peak_memory()
    with compiled_on_gpu():
        train(
            model,
            optim.Adam(learning_rate=s.learning_rate),
            data.examples,
            args=TrainingArgs(
                iters=steps, steps_per_report=1, adapter_file=str(folder / "adapters.safetensors")
            ),
            iterate_batches=lambda **_: batches(data.examples, s.batch_size, s.seed),
            training_callback=SimpleNamespace(on_train_loss_report=found.append),
        )
    return {
        # The first step sets up what the others find there.
        "tokens_per_s": statistics.median(step["tokens_per_second"] for step in found[1:]),
        "peak_bytes": int(found[-1]["peak_memory"] * 1e9),
    }


def in_process(home: Path, program: str, steps: int) -> dict[str, Any]:
    """What a program measured in a process of its own."""
    command = [sys.executable, __file__, "--program", program, "--home", str(home)]
    print(f"{program}: {steps} steps", flush=True)
    run = subprocess.run([*command, "--steps", str(steps)], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    result = json.loads(run.stdout.splitlines()[-1])
    print(f"  {result}", flush=True)
    return result


def logits_difference(home: Path) -> float:
    """The largest, over an adapter of ours in mlx-lm, and one of mlx-lm in ours."""
    from mlx_lm import load

    worst = 0.0
    for name in ("ours", "theirs"):
        ours, tokenizer = qwen35_mlx.load(home / "demo", adapter=home / name)
        theirs, _ = load(str(home / "demo"), adapter_path=str(home / name))
        theirs.set_dtype(mx.float32)
        ids, _ = next(batches(examples(home, "valid", tokenizer).examples, 2))
        difference = mx.abs(ours(ids) - theirs(ids)).max().item()
        print(f"adapter of {name}: logits differ by {difference:.1e}", flush=True)
        worst = max(worst, difference)
    return worst


def gradient_error() -> float:
    """The largest of all kinds of layers and adapters."""
    sys.path.insert(0, str(TOOLS.parent / "tests"))
    from test_train import DORA, KINDS, freeze_norms, tiny_model
    from test_train import gradient_error as error_of

    worst = 0.0
    for kind, moe, adapter, num_tokens in KINDS:
        model = tiny_model(kind, moe, adapter)
        if adapter == DORA:
            freeze_norms(model)
        found = error_of(model, num_tokens, each=True)
        name = f"{kind}, {'moe' if moe else 'dense'}, {adapter}, {num_tokens} tokens"
        print(f"gradients of each parameter: {found:.1e}  {name}", flush=True)
        worst = max(worst, found)
    return worst


def fused_difference(home: Path) -> tuple[float, int]:
    """Logits of the fused demo in bf16 from those beside it, of their spread; tensors kept."""
    adapter = read_adapter(home / "ours")
    options: Any = dict(dtype="bfloat16")
    plain = convert(DEMO, home / "plain", **options)
    fused = convert(DEMO, home / "fused", **options, adapter=adapter)
    beside, tokenizer = qwen35_mlx.load(plain, adapter=home / "ours")
    ids, _ = next(batches(examples(home, "valid", tokenizer).examples, 2))
    expected = np.array(beside(ids))
    found = np.array(qwen35_mlx.load(fused)[0](ids))
    names = [
        [
            name
            for file in folder.glob("*.safetensors")
            for name in mx.load(str(file))
            if name.startswith(("mtp.", "vision_tower."))
        ]
        for folder in (plain, fused)
    ]
    assert sorted(names[0]) == sorted(names[1])
    return float(np.abs(found - expected).mean() / expected.std()), len(names[1])


def evaluated(home: Path) -> dict[str, Any]:
    """Log-likelihoods of a local task beside mlx-lm's, and the tokens that were read for them."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "HF_DATASETS_CACHE": str(home)}
    sys.path.insert(0, str(TOOLS.parent / "tests"))
    from local_tasks import ANSWER, CHOICE, requests, write_tasks
    from mlx_lm.evaluate import MLXLM

    from qwen35_mlx.evaluation.harness import HarnessModel, Journal

    tasks = write_tasks(home / "tasks")
    ours = HarnessModel(*qwen35_mlx.load(home / "demo"), Journal(None, ""))
    theirs = MLXLM(str(home / "demo"))
    theirs._model.set_dtype(mx.float32)
    given, questions = requests(tasks, CHOICE), requests(tasks, ANSWER)
    pairs = zip(ours.loglikelihood(given), theirs.loglikelihood(given), strict=True)
    answers = zip(ours.generate_until(questions), theirs.generate_until(questions), strict=True)
    return {
        "loglikelihood_vs_mlx_lm": max(abs(a - b) for (a, _), (b, _) in pairs),
        "answers_other_than_mlx_lm": sum(a != b for a, b in answers),
        "prompt_tokens_with_forks_over_without": ours.num_read / ours.num_asked,
    }


def batched(home: Path) -> dict[str, Any]:
    """Answers to prompts of many lengths together beside one by one."""
    model, tokenizer = qwen35_mlx.load(home / "demo")
    prompts: list[Any] = []
    for i in range(NUM_PROMPTS):
        text = "Some words to read. " * (11 * i % 37) + f"What is {i} + {2 * i + 3}?"
        prompts.append([{"role": "user", "content": text}])
    options: Any = dict(max_tokens=ANSWER_TOKENS, temperature=0.0, enable_thinking=True)
    seconds, texts = {}, {}
    ways: dict[str, Any] = {
        "alone": lambda: [qwen35_mlx.generate(model, tokenizer, p, **options) for p in prompts],
        "batch": lambda: qwen35_mlx.batch_generate(model, tokenizer, prompts, **options),
    }
    for turn in range(2):
        for name, answer in ways.items():
            started = time.perf_counter()
            texts[name] = answer()
            # In the first turn drafts learn what they bring.
            seconds[name] = time.perf_counter() - started if turn else 0.0
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts["alone"])
    return {
        "batch_differences": sum(a != b for a, b in zip(*texts.values(), strict=True)),
        "batch_tps": tokens / seconds["batch"],
        "batch_speed_vs_one_by_one": seconds["alone"] / seconds["batch"],
    }


def bench(home: Path, steps: int, rival_steps: int) -> dict[str, Any]:
    """All figures."""
    convert(DEMO, home / "demo", bits=4)
    write_data(home / "data")
    again = in_process(home, "ours-checkpointed", 3)
    ours = in_process(home, "ours", steps)
    theirs = in_process(home, "mlx-lm", rival_steps)
    fused, num_tensors = fused_difference(home)
    return {
        **label(),
        "steps": steps,
        "loss_ratio": ours["losses"][-1] / ours["losses"][0],
        "train_seconds": ours["seconds"],
        "train_tps": ours["tokens_per_s"],
        "train_speed_vs_mlx_lm": ours["tokens_per_s"] / theirs["tokens_per_s"],
        "train_peak_vs_mlx_lm": ours["peak_bytes"] / theirs["peak_bytes"],
        "checkpointed_speed_vs_mlx_lm": again["tokens_per_s"] / theirs["tokens_per_s"],
        "checkpointed_peak_vs_mlx_lm": again["peak_bytes"] / theirs["peak_bytes"],
        "gradient_error": gradient_error(),
        "adapter_logits_vs_mlx_lm": logits_difference(home),
        "fused_difference_of_spread": fused,
        "fused_mtp_and_vision_tensors": num_tensors,
        **evaluated(home),
        **batched(home),
    }


def main() -> int:
    """Print the figures; 1 if one misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rival-steps", type=int, default=3)
    parser.add_argument("--program", help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.program == "mlx-lm":
        print("\n" + json.dumps(train_rival(given.home, given.steps)))
        return 0
    if given.program:
        checkpointing = given.program != "ours"
        print("\n" + json.dumps(train_ours(given.home, given.steps, checkpointing)))
        return 0
    with tempfile.TemporaryDirectory() as home:
        result = bench(Path(home), given.steps, given.rival_steps)
    missed = [
        f"{name}: {result[name]:.3g}, {side} {bar:g} expected"
        for name, (bar, side) in BARS.items()
        if (result[name] > bar if side == "at most" else result[name] < bar)
    ]
    print("\n".join(missed))
    print(json.dumps(result))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
