"""Pictures and video beside transformers and mlx-vlm: exactness, speed and memory of the tower.

`logits` compares random checkpoints with transformers over prompts with pictures and videos, whole,
in pieces and in steps. `encode` runs the tower of the 0.8B model and mlx-vlm's on the same random
weights and pictures, in turns in one process; of the twelve blocks, which are alike, `--blocks`
run. Seconds are those of the processor: others may be at work. MLX's matrix products on Linux are
many times faster with OpenBLAS (LD_PRELOAD). mlx-vlm makes all scores at once: 8 GB at 1824 x 1824
pixels, and a crash of MLX's CPU backend at 2048 x 2048, beyond 2^31 of them; ours runs that alone.
Ends with one JSON line.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from label import label
from mlx.utils import tree_flatten

from qwen35_mlx.config import VisionConfig
from qwen35_mlx.model.vision import VisionTower

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

GATE = 6e-4
NUM_CHECKPOINTS = 20
SIDES, ALONE = (1344, 1824), 2048
# Of the 0.8B model.
TOWER = dict(
    hidden_size=768, intermediate_size=3072, num_heads=12, in_channels=3, patch_size=16,
    temporal_patch_size=2, spatial_merge_size=2, num_position_embeddings=2304,
    out_hidden_size=1024,
)  # fmt: skip
Program = Callable[[mx.array, tuple[int, int, int]], mx.array]


def logits_over_std(options: argparse.Namespace) -> dict[str, Any]:
    """The largest difference from transformers, in standard deviations of the logits."""
    # Imported here: the rest needs no torch.
    from live import test_vision_parity as tests
    from live import vision_parity as parity

    parity.torch.set_num_threads(1)
    worst, missed = 0.0, set()
    for index in range(options.checkpoints):
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            pair = parity.draw_pair(options.seed, index, Path(folder))
        largest = 0.0
        for draw in pair.maker.prompts():
            prompt, expected = pair.settled(draw)
            positions, _ = parity.media_positions(prompt.ids, 0)
            assert np.array_equal(positions, pair.reference_positions(prompt)), prompt.name
            for piece in (None, *parity.PIECES):
                ours = parity.read(pair.ours, prompt, parity.cut(prompt, piece))
                largest = max(largest, parity.over_std(ours, expected))
        if index == 0:
            # The last prompt has pictures and videos.
            found = {name: tests.mistaken(pair, m, prompt) for name, m in tests.MISTAKES.items()}
            found["sections one after the other"] = tests.interleaved_wrongly(pair, prompt)
            distances = {name: parity.over_std(ours, expected) for name, ours in found.items()}
            for name, distance in sorted(distances.items(), key=lambda item: item[1]):
                print(f"  mistake {distance:9.1e}  {name}")
            missed = {name for name, distance in distances.items() if distance <= GATE}
        seconds = time.perf_counter() - begun
        print(f"checkpoint {index:2} {largest:.1e} of std, {seconds:.0f} s  {pair.text[:60]}")
        worst = max(worst, largest)
    return {"logits_over_std": worst, "mistakes_missed": sorted(missed)}


def encode(options: argparse.Namespace) -> dict[str, Any]:
    """Time and peak memory of the tower over mlx-vlm's: their time by ours, our peak by theirs."""
    from mlx_vlm.models.qwen3_5.config import VisionConfig as TheirConfig
    from mlx_vlm.models.qwen3_5.vision import VisionModel

    sizes = TOWER | {"depth": options.blocks}
    ours = VisionTower(VisionConfig(**sizes))
    theirs = VisionModel(TheirConfig(model_type="qwen3_5", deepstack_visual_indexes=[], **sizes))
    weights = tree_flatten(ours.parameters())
    mx.random.seed(0)
    arrays = [(n, mx.random.normal(a.shape) / math.sqrt(a[0].size)) for n, a in weights]
    for tower in (ours, theirs):
        tower.load_weights(arrays, strict=True)
    mx.eval(arrays)

    def two_slices(patches: mx.array, grid: tuple[int, int, int]) -> mx.array:
        twice = mx.repeat(patches.reshape(len(patches), 3, 1, -1), 2, axis=2)
        return theirs(twice.reshape(len(patches), -1), mx.array([grid]))[0]

    times, peaks = [], []
    for side in options.sides:
        grid = (1, side // 16, side // 16)
        pixels = np.random.default_rng(side).standard_normal((grid[1] * grid[2], 768))
        patches = mx.array(pixels.astype(np.float32))
        runs: dict[str, list[tuple[float, int, mx.array]]] = {"ours": [], "mlx-vlm": []}
        for _ in range(options.rounds):
            runs["ours"].append(measured(ours, patches, grid))
            runs["mlx-vlm"].append(measured(two_slices, patches, grid))
        difference = mx.abs(runs["ours"][-1][2] - runs["mlx-vlm"][-1][2]).max().item()
        # Both sum in float32, in other orders.
        assert difference < 1e-3, difference
        seconds = {k: statistics.median(run[0] for run in found) for k, found in runs.items()}
        nbytes = {k: max(run[1] for run in found) for k, found in runs.items()}
        for name in runs:
            print(f"{side}x{side} {name:8} {seconds[name]:7.1f} s  {nbytes[name] / 1e9:6.2f} GB")
        times.append(seconds["mlx-vlm"] / seconds["ours"])
        peaks.append(nbytes["ours"] / nbytes["mlx-vlm"])
    patches = mx.zeros((ALONE // 16) ** 2 * 768).reshape(-1, 768)
    alone_s, alone_bytes, _ = measured(ours, patches, (1, ALONE // 16, ALONE // 16))
    print(f"{ALONE}x{ALONE} ours     {alone_s:7.1f} s  {alone_bytes / 1e9:6.2f} GB")
    # The worse of the sizes.
    return {
        f"encode_{ALONE}_s": round(alone_s, 1),
        f"encode_{ALONE}_peak_bytes": alone_bytes,
        "encode_sides": options.sides,
        "encode_blocks": options.blocks,
        "encode_time_vs_mlx_vlm": min(times),
        "encode_peak_vs_mlx_vlm": max(peaks),
    }


def measured(
    program: Program, patches: mx.array, grid: tuple[int, int, int]
) -> tuple[float, int, mx.array]:
    """Seconds, peak bytes beyond what was there, and the features."""
    mx.eval(patches)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    # Of all threads; where the GPU computes, it says nothing.
    clock = time.perf_counter if mx.default_device() == mx.Device(mx.gpu) else time.process_time
    begun = clock()
    features = program(patches, grid)
    mx.eval(features)
    return clock() - begun, mx.get_peak_memory() - before, features


# Name on the command line -> what gives its keys of the JSON line.
PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "logits": logits_over_std,
    "encode": encode,
}


def main() -> None:
    """Run the parts that are asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all without")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=int, default=NUM_CHECKPOINTS)
    parser.add_argument("--blocks", type=int, default=2, help="of twelve")
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name in options.parts or PARTS:
        begun = time.perf_counter()
        results |= PARTS[name](options)
        print(f"# {name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    print(json.dumps({"benchmark": "vision", **label(), **results}))
    good = (
        results.get("logits_over_std", 0) <= GATE
        and not results.get("mistakes_missed")
        and results.get("encode_time_vs_mlx_vlm", 1) >= 1
        and results.get("encode_peak_vs_mlx_vlm", 0) <= 0.5
    )
    sys.exit(not good)


if __name__ == "__main__":
    main()
