"""Distillation layer by layer: memory and time of a real layer, 25 kills, what routers miss.

The layer has the widths of the 397B's and few experts, steps and tokens; what 512 experts and all
layers need is computed from shapes and stated assumptions, not measured. Ends with one JSON line.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from bench_convert import MODEL, PEAK, VOCAB, layer_config, write_source
from label import label

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from checkpoints import VOCAB as SMALL_VOCAB
from checkpoints import write_checkpoint

from qwen35_mlx.cli.local_models import SOURCE
from qwen35_mlx.config import read_config
from qwen35_mlx.convert import convert, distill
from qwen35_mlx.convert.calibrate import calibrate
from qwen35_mlx.convert.distilled import EPOCHS, RATE, REPORT_FILE, Distillation
from qwen35_mlx.convert.fidelity import fidelity
from qwen35_mlx.convert.shards import sha256
from qwen35_mlx.family import family_config
from qwen35_mlx.model.loading import load_tokenizer
from qwen35_mlx.quant import statistics
from qwen35_mlx.quant.latent import Schedule

LENGTH, EXPERT_STEPS = 256, 4
NUM_KILLS, MOST_DELAY_S = 25, 0.05
DEMO_BITS, DEMO_TEXTS = 3.53, 32
# Of the run that is computed, on an M3 Ultra: 80 GPU cores of 128 multiply-adds at 1.38 GHz, and
# the bandwidth that Apple states. The shares are guesses.
TOKENS, BITS_PER_WEIGHT = 131_072, 3.5
TFLOPS, TFLOPS_SHARE, GBPS, GBPS_SHARE = 28.3, 0.4, 819, 0.6
# Bytes moved a trained weight a step, counted: gradient, Adam and settling, no operation fused.
STEP_BYTES = 260
IO = Path("/proc/self/io")


def parts_of(experts: int, model: str) -> dict[str, int]:
    """Weights of a DeltaNet layer by part, as many as are trained."""
    text = layer_config(experts, model)["text_config"]
    hidden, width = text["hidden_size"], text["moe_intermediate_size"]
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
    shared = 3 * hidden * text["shared_expert_intermediate_size"]
    attention = hidden * (2 * keys + 3 * values)
    routed = 3 * experts * hidden * width
    return dict(attention=attention, router=experts * hidden, experts=routed, shared=shared)


def run_layer(source: Path, experts: int, tokens: int) -> dict[str, Any]:
    """Distil the layer in this process; seconds and MLX's peak bytes by part."""
    seconds: dict[str, float] = defaultdict(float)
    peaks: dict[str, int] = defaultdict(int)
    # As of 512 experts: a Hessian for each expert's hidden units, one for all inputs.
    statistics.MAX_HESSIAN_BYTES = statistics.MAX_HESSIAN_BYTES * experts // 512

    def metered(function: Any, part_of: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            mx.reset_peak_memory()
            start = time.perf_counter()
            result = function(*given, **options)
            mx.eval(result if result is not None else [])
            part = part_of(given)
            seconds[part] += time.perf_counter() - start
            peaks[part] = max(peaks[part], mx.get_peak_memory())
            return result

        return call

    distill.EXPERT_STEPS, distill.MIN_EXPERT_TOKENS = EXPERT_STEPS, 1
    distill._Distiller._quantize = metered(
        distill._Distiller._quantize, lambda given: "Hessians and error feedback"
    )
    distill._Distiller._train = metered(
        distill._Distiller._train,
        lambda given: "experts" if given[1].startswith("expert ") else given[1],
    )
    ids = mx.array(np.random.default_rng(1).integers(VOCAB, size=(tokens // LENGTH, LENGTH)))
    training = Distillation(ids, schedule=Schedule(1, RATE))
    options: Any = dict(method="distill", distillation=training)
    start, read = time.perf_counter(), bytes_read()
    convert(source, source.parent / "out", bits=3, **options)
    whole = time.perf_counter() - start
    seconds["passes, reading, writing"] = whole - sum(seconds.values())
    return {
        "bytes_read": bytes_read() - read,
        "seconds": {part: round(s, 2) for part, s in seconds.items()},
        "peak_bytes": dict(peaks),
    }


def bytes_read() -> int:
    """By this process so far, from files in memory too; 0 where the system does not tell."""
    return int(IO.read_text().split()[1]) if IO.exists() else 0


def layer(work: Path, model: str, experts: int, tokens: int) -> dict[str, Any]:
    """The layer in a process of its own."""
    source = work / "source"
    nbytes = write_source(source, experts, fp8=False, model=model)
    lines = child(
        f"from bench_distill import *\n"
        f"print(json.dumps(run_layer(Path({str(source)!r}), {experts}, {tokens}))){PEAK}"
    )
    found = json.loads(lines[0])
    read = found.pop("bytes_read") / nbytes
    found |= {"model": model, "experts": experts, "tokens": tokens, "source_bytes": nbytes}
    found |= {"rss_bytes": int(lines[1]), "bytes_read_ratio": round(read, 3)}
    print(f"a layer of {model} with {experts} experts, {tokens} tokens, {nbytes / 1e9:.2f} GB")
    for part, seconds in found["seconds"].items():
        peak = found["peak_bytes"].get(part, 0) / 1e9
        print(f"  {part:26} {seconds:8.1f} s  peak {peak:6.2f} GB")
    print(f"  resident {found['rss_bytes'] / 1e9:.2f} GB; read {found['bytes_read_ratio']} times")
    # What a trained weight takes: the peak less what is held beside, in float32 on a CPU.
    parts = parts_of(experts, model)
    held = 4 * sum(parts.values()) + parts["experts"] * BITS_PER_WEIGHT / 8
    left = found["peak_bytes"]["attention"] - held
    found["bytes_per_trained_weight"] = round(left / parts["attention"], 1)
    return found


def child(script: str) -> list[str]:
    """The lines that a Python process prints."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.splitlines()


def computed(bytes_per_weight: float) -> dict[str, Any]:
    """Memory and hours of all layers with 512 experts in bf16, from shapes: not measured."""
    text = family_config(MODEL)["text_config"]
    hidden, layers, vocab = (text[k] for k in ("hidden_size", "num_hidden_layers", "vocab_size"))
    per_token, experts = text["num_experts_per_tok"], text["num_experts"]
    parts = parts_of(experts, MODEL)
    stacks, width = parts["experts"], text["moe_intermediate_size"]
    resident = parts["attention"] + parts["router"] + parts["shared"]
    quantized = stacks * BITS_PER_WEIGHT / 8
    peak = {
        "attention": 2 * stacks + quantized + parts["attention"] * bytes_per_weight,
        # Found and stored codes, one stack in float32 and once more in bf16.
        "experts": 2 * stacks + 2 * quantized + stacks / 3 * (4 + 2),
        "head": vocab * hidden * (bytes_per_weight + 4),
    }
    # Of one part of a layer, held beside the source's and the quantized stacks.
    hessians = 4 * (2 * hidden**2 + experts * width**2 + width**2)
    peak["Hessians"] = 2 * stacks + 2 * quantized + hessians
    steps = TOKENS * 7 / 8 / distill.BATCH_TOKENS * EPOCHS
    expert_steps = experts * distill.EXPERT_STEPS
    one = stacks / experts
    # Forward 2 and backward 4 a weight and token; attention from both streams.
    flops = layers * (
        6 * steps * distill.BATCH_TOKENS * (2 * parts["attention"] + parts["shared"])
        + 6 * expert_steps * distill.EXPERT_BATCH * one
        + 3 * 2 * TOKENS * (per_token * one + resident)
        + resident * hidden + stacks * (hidden + hidden + width) / 3
    ) + 8 * steps * distill.BATCH_TOKENS * vocab * hidden  # fmt: skip
    moved = STEP_BYTES * (layers * (steps * resident + expert_steps * one) + steps * vocab * hidden)
    hours = {
        "matrix products": flops / (TFLOPS * 1e12 * TFLOPS_SHARE) / 3600,
        "steps": moved / (GBPS * 1e9 * GBPS_SHARE) / 3600,
    }
    streams = 10 * 2 * TOKENS * hidden
    print(f"\ncomputed, not measured: {MODEL}, {layers} layers of {experts} experts, bf16,")
    print(f"  {TOKENS:,} tokens, {EPOCHS} epochs, {distill.EXPERT_STEPS} steps an expert;")
    print(f"  {TFLOPS} TFLOP/s at {TFLOPS_SHARE:.0%}, {GBPS} GB/s at {GBPS_SHARE:.0%},")
    print(f"  {STEP_BYTES} bytes moved a weight a step, {bytes_per_weight} held;")
    print("  launches of kernels, Python, the last pass over the whole model are left out")
    for name, nbytes in peak.items():
        print(f"  peak, {name}: {nbytes / 1e9:6.1f} GB")
    print(f"  beside: activations {streams / 1e9:.1f} GB")
    print("  hours: " + ", ".join(f"{name} {h:.1f}" for name, h in hours.items()))
    return {
        "peak_bytes": max(peak.values()) + streams,
        "hours": {name: round(h, 2) for name, h in hours.items()},
    }


def run_small(source: Path, out: Path) -> None:
    """Distil a small model in this process; prints each step."""
    distill.BATCH_TOKENS, distill.MIN_EXPERT_TOKENS, distill.EXPERT_STEPS = 33, 16, 4
    ids = small_ids()
    training = Distillation(
        ids,
        finish_tokens=66,
        schedule=Schedule(1, RATE),
        progress=lambda done, total, step: print(f"{done} {step}", flush=True),
    )
    options: Any = dict(method="distill", distillation=training)
    convert(source, out, bits=3, group_size=32, **options)


def small_ids() -> mx.array:
    """Four texts of 33 tokens."""
    return mx.array(np.random.default_rng(0).integers(SMALL_VOCAB, size=(4, 33)))


def kills(work: Path, number: int) -> dict[str, Any]:
    """Kill a distillation at steps spread over all of it; compare with the undisturbed one."""
    source = work / "small"
    write_checkpoint(source, moe=True, tokenizer=True)
    given = "from bench_distill import *; run_small(*(Path(p) for p in {}))"
    steps = child(given.format([str(source), str(work / "whole")]))
    places, rng = {step: place for place, step in enumerate(steps)}, random.Random(5)
    script = given.format([str(source), str(work / "killed")])
    command, others = [sys.executable, "-c", script], 0
    for place in sorted(rng.sample(range(len(steps) - 1), number)):
        with subprocess.Popen(
            command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout
            for line in process.stdout:
                # Losses are among what a step prints: they too must come again.
                at = places.get(line.strip())
                others += at is None
                # Or a later one: what the last process did before its end counts.
                if at is not None and at >= place:
                    break
            time.sleep(rng.uniform(0, MOST_DELAY_S))
            process.kill()
        print(f"killed behind {steps[place]}", file=sys.stderr, flush=True)
        if (work / "killed").exists():
            raise SystemExit(f"killed at {steps[place]}, yet finished")
    child(script)
    whole, killed = (
        {file.name: sha256(file) for file in sorted((work / name).iterdir())}
        for name in ("whole", "killed")
    )
    found = {
        "kills": number,
        "steps": len(steps),
        "steps_that_differ": others,
        "files": len(whole),
        "identical": whole == killed,
    }
    print("\nkilled and gone on:", ", ".join(f"{name} {value}" for name, value in found.items()))
    return found


def router(work: Path) -> dict[str, Any]:
    """Share of the source's experts that are missed, by layer; tokens of each expert."""
    # Here, as mlx-lm comes along: not in the processes that are measured or killed.
    from bench_kl import calibrated, conversations, distilled

    tokenizer = load_tokenizer(SOURCE, read_config(SOURCE), {})._tokenizer
    ids = mx.array(conversations(tokenizer, DEMO_TEXTS, LENGTH))
    other = mx.array(conversations(tokenizer, DEMO_TEXTS // 2, LENGTH, seed=11))
    calibration = calibrate(SOURCE, ids, hessians=True, measure=False)
    found: dict[str, Any] = {}
    print(f"\nthe demo at {DEMO_BITS} bits per weight, {ids.size} tokens; judged on {other.size}")
    for name, make in (("gptq", calibrated), ("distill", distilled)):
        make(SOURCE, DEMO_BITS, calibration, ids, work / name)
        report = fidelity(SOURCE, work / name, other).as_dict()
        found[name] = {
            "router_flips": [round(share, 4) for share in report["router_flips"]],
            "mean_kl_nats": round(report["mean_kl_nats"], 5),
        }
        print(f"  {name:8} {found[name]}")
    rows = json.loads((work / "distill" / REPORT_FILE).read_text())
    found["expert_tokens"] = [row["expert_tokens"] for row in rows if row["expert_tokens"]]
    return found


def main() -> None:
    """Run the parts, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL, help="with experts, whose layer is distilled")
    parser.add_argument("--experts", type=int, default=8, help="of the layer; really 512")
    parser.add_argument("--kills", type=int, default=NUM_KILLS)
    parser.add_argument("--tokens", type=int, default=1024, help="that the layer is trained on")
    parser.add_argument("--only", choices=["layer", "kills", "router"], help="this part alone")
    parser.add_argument("--folder", help="where to write; needs 1 GB")
    args = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        work = Path(temporary)
        if args.only in (None, "layer"):
            result["layer"] = layer(work, args.model, args.experts, args.tokens)
            per_weight = result["layer"]["bytes_per_trained_weight"]
            result["computed_not_measured"] = computed(per_weight)
        if args.only in (None, "kills"):
            result["kills"] = kills(work, args.kills)
        if args.only in (None, "router"):
            result["router"] = router(work)
    print(json.dumps(result | label()))
    if not result.get("kills", {}).get("identical", True):
        sys.exit(1)


if __name__ == "__main__":
    main()
