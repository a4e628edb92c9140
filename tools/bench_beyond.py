"""Models larger than the memory, and several Macs: exactness, bytes and speed; last line JSON.

python tools/bench_beyond.py [--folder DIR]

Experts from disk: the demo, and a model of 3 GB with 64 experts in each of 12 layers and random
weights, so that any expert is as likely as any other: the worst that a pool can meet. Each run is
a process of its own; the disk is the page cache here, so speeds show what the pool costs.

Pools of 25, 50 and 75 % run under RLIMIT_DATA: what the process has before, resident weights and
pool, and 10 %. A process that asks for more ends, as one with all experts in memory has to.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from bench_beyond_ring import failures, measure
from label import label
from large_model import DEMO, EXPERTS, LAYERS, PER_TOKEN, write_large_model
from mlx.utils import tree_flatten

from qwen35_mlx.checkpoint.headers import read_headers
from qwen35_mlx.checkpoint.names import OF_EXPERTS
from qwen35_mlx.checkpoint.resolver import resolve
from qwen35_mlx.config import read_config
from qwen35_mlx.convert import convert, plan
from qwen35_mlx.convert.fit import quality_settings
from qwen35_mlx.convert.mac_models import find_macs
from qwen35_mlx.convert.report import disk_lines, family_source
from qwen35_mlx.engine.prompt_cache import PromptCache
from qwen35_mlx.model import feed_forward
from qwen35_mlx.model.expert_pool import slot_bytes
from qwen35_mlx.model.loading import load_model, open_model

TOOLS = Path(__file__).parent
PROMPT_TOKENS, STEP_SIZE, NEW_TOKENS = 24, 8, 12
SHARES = (0.25, 0.5, 0.75)
# Of what may be allocated: resident weights and pool, and so much more.
SPARE, STACK_BYTES = 1.1, 2**20
# At most.
BARS = {
    "disk_logit_difference": 0.0,
    "disk_bytes_over_misses": 1.02,
    "disk_peak_over_budget": 1.1,
    "disk_prefill_reads_over_distinct": 1.0,
}
# Bits a weight, and the Mac that they are for.
PREDICTED = [
    *[(bits, f"{chip} {gb}GB") for chip, gb in (("M4 Max", 64), ("M3 Ultra", 96), ("M4 Max", 128))
      for bits in (3.5, 4.5)],
    (6.5, "M3 Ultra 256GB"),
]  # fmt: skip


def status(name: str) -> int:
    """A number of /proc: VmHWM, the peak of resident memory, in bytes, or rchar, bytes read."""
    file = "/proc/self/io" if name == "rchar" else "/proc/self/status"
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * (1 if name == "rchar" else 1024)


def bytes_of_a_slot(folder: Path) -> int:
    """Memory of one expert in every layer."""
    found = resolve(read_config(folder), read_headers(folder))
    return slot_bytes([m for m in found.text_matches if OF_EXPERTS in m.name], True)


def limit_memory(folder: Path, num_slots: int) -> None:
    """Let this process allocate what a model with so many slots takes, and 10 % of that."""
    memory = num_slots * bytes_of_a_slot(folder)
    needed = open_model(folder, mtp=False, experts_memory=memory)[2]
    # Each thread has a stack; MLX's own start here.
    threading.stack_size(STACK_BYTES)
    mx.eval(mx.ones((256, 256)) @ mx.ones((256, 256)))
    most = status("VmData") + int(SPARE * needed)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def run(folder: Path, num_slots: int, out: Path, limit_slots: int) -> dict[str, Any]:
    """Read a prompt in pieces and decode; with 0 slots, all experts in memory.

    With `limit_slots`, in the memory of a model with so many.
    """
    if limit_slots:
        limit_memory(folder, limit_slots)
    before = status("VmHWM")
    memory = num_slots * bytes_of_a_slot(folder) if num_slots else None
    model, _ = load_model(folder, mtp=False, experts_memory=memory)
    experts = model.experts
    distinct = spy() if not experts else []
    ids = np.random.default_rng(1).integers(5, 2500, PROMPT_TOKENS + NEW_TOKENS).tolist()
    cache = PromptCache(model)
    read = status("rchar")
    started = time.perf_counter()
    hidden = [cache.read(ids[:PROMPT_TOKENS], marks=[PROMPT_TOKENS // 2], step_size=STEP_SIZE)]
    prefill_s = time.perf_counter() - started
    prefill_misses = experts.stats.misses if experts else 0
    num_distinct = count_distinct(distinct, len(model.layers))
    times = []
    for token in ids[PROMPT_TOKENS:]:
        started = time.perf_counter()
        hidden.append(cache.step(mx.array([token])))
        cache.commit(token)
        mx.eval(hidden[-1])
        times.append(time.perf_counter() - started)
    logits = model.head(mx.concatenate(hidden, axis=1))
    np.save(out, np.array(logits))
    read = status("rchar") - read
    resident = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    return {
        "decode_tps": 1 / statistics.median(times),
        "prefill_tps": PROMPT_TOKENS / prefill_s,
        "distinct": num_distinct,
        "prefill_misses": prefill_misses,
        "bytes_over_misses": read / experts.stats.num_bytes if experts else None,
        "peak_over_budget": status("VmHWM") / (before + resident),
        **(experts.figures() if experts else {}),
    }


# Reads ids behind those that it has read.
Reader = Callable[[list[int]], None]


def reader(folder: Path, num_slots: int) -> Reader:
    """Ours, with so many slots; with 0, all experts in memory."""
    memory = num_slots * bytes_of_a_slot(folder) if num_slots else None
    model, _ = load_model(folder, mtp=False, experts_memory=memory)
    cache = PromptCache(model)

    def read(ids: list[int]) -> None:
        if len(ids) > 1:
            cache.read(ids)
            return
        mx.eval(model.head(cache.step(mx.array(ids))))
        cache.commit(ids[0])

    return read


def mlx_vlm_reader(folder: Path, num_slots: int) -> Reader:
    """mlx-vlm's, with an expert cache of as many bytes, in float32."""
    from mlx_vlm.moe_offload import repack
    from mlx_vlm.utils import load_model as load_theirs

    # Its own form of the folder.
    offload = folder.with_name(f"{folder.name}-offload")
    if not offload.exists():
        repack(str(folder), str(offload))
    gigabytes = num_slots * bytes_of_a_slot(folder) / 1e9
    model = load_theirs(offload, lazy=True, expert_cache_gb=gigabytes)
    model.set_dtype(mx.float32)
    language = model.language_model
    cache = language.make_cache()
    return lambda ids: mx.eval(language(mx.array([ids]), cache=cache).logits)


def in_turns(rival: Reader, ours: Reader) -> float:
    """Speed of decoding, ours over the other's: a token of each in turn."""
    ids = np.random.default_rng(1).integers(5, 2500, PROMPT_TOKENS + NEW_TOKENS).tolist()
    times: list[list[float]] = [[], []]
    rival(ids[:PROMPT_TOKENS])
    ours(ids[:PROMPT_TOKENS])
    for token in ids[PROMPT_TOKENS:]:
        for read, taken in zip((rival, ours), times, strict=True):
            started = time.perf_counter()
            read([token])
            taken.append(time.perf_counter() - started)
    return statistics.median(times[0]) / statistics.median(times[1])


def spy() -> list[set[int]]:
    """The experts of each call of the router from now on."""
    found: list[set[int]] = []
    route = feed_forward.route

    def spied(*args: Any) -> Any:
        routing = route(*args)
        found.append(set(np.array(routing.indices).ravel().tolist()))
        return routing

    feed_forward.route = spied
    return found


def count_distinct(calls: list[set[int]], num_layers: int) -> int:
    """Distinct experts of all layers; of the last one, those of the last call alone."""
    if not calls:
        return 0
    layers = [calls[i::num_layers] for i in range(num_layers)]
    return sum(len(set().union(*layer)) for layer in layers[:-1]) + len(layers[-1][-1])


def in_process(*args: object) -> Any:
    """What this program prints last, as JSON, in a process of its own."""
    command = [sys.executable, __file__, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(
    folder: Path, capacities: list[int], home: Path, name: str, limited: Collection[int] = ()
) -> dict[int, Any]:
    """Runs with all experts in memory (0) and with so many; prints each, checks the bits."""
    runs = {}
    for num_slots in [0, *capacities]:
        logits, limit = home / f"{num_slots}.npy", num_slots if num_slots in limited else 0
        found = runs[num_slots] = in_process("--run", folder, num_slots, logits, limit)
        if num_slots:
            expected = np.load(home / "0.npy")
            found["difference"] = float(np.abs(np.load(logits) - expected).max())
            print(
                f"{name}, {num_slots:3} slots: logits differ by {found['difference']:.1e}, "
                f"{found['expert_hit_rate']:.1%} hits, {found['expert_gb_per_s']:.2f} GB/s, "
                f"decode {found['decode_tps']:.2f} tok/s, "
                f"prefill read {found['prefill_misses']} of {runs[0]['distinct']} distinct, "
                f"bytes {found['bytes_over_misses']:.4f} of misses, "
                f"peak {found['peak_over_budget']:.3f} of budget"
                f"{', under a limit' * bool(limit)}",
                flush=True,
            )
        else:
            print(f"{name}: decode {found['decode_tps']:.2f} tok/s, all in memory", flush=True)
    return runs


def ends_above_the_limit(folder: Path, num_slots: int, home: Path) -> bool:
    """Whether all experts do not run in the memory of so many."""
    try:
        in_process("--run", folder, 0, home / "none.npy", num_slots)
    except RuntimeError as error:
        said = str(error).strip().splitlines()[-1]
        print(f"all experts in the memory of {num_slots}: {said}", flush=True)
        return True
    return False


def vs_mlx_vlm(folder: Path, num_slots: int) -> float | None:
    """Decoding with so many slots over mlx-vlm's; None where its cache does not run."""
    try:
        return round(float(in_process("--rival", folder, num_slots)), 2)
    except RuntimeError as error:
        print("mlx-vlm's expert cache does not run:", str(error).strip().splitlines()[-1])
        return None


def measure_disk(folder: Path | None = None) -> dict[str, Any]:
    """All figures of experts from disk; `folder` holds the large model if it is there already."""
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        demo = convert(DEMO, home / "demo", bits=4, experts_layout="disk")
        small = compare(demo, list(range(2, 8)), home, "demo")
        large = folder or write_large_model(home / "large", "disk")
        shares = {share: int(share * EXPERTS) for share in SHARES}
        capacities = sorted({PER_TOKEN, *shares.values(), EXPERTS - 1})
        name, limited = f"{LAYERS} layers of {EXPERTS} experts", shares.values()
        found = compare(large, capacities, home, name, limited)
        runs = [*small.values(), *found.values()]
        pooled = [one for one in runs if "difference" in one]
        distinct = [
            (one, runs[0]["distinct"])
            for runs in (small, found)
            for one in runs.values()
            if "difference" in one
        ]
        return {
            "disk_logit_difference": max(one["difference"] for one in pooled),
            "disk_bytes_over_misses": max(one["bytes_over_misses"] for one in pooled),
            # With 4 slots the 50 MB that the program takes itself are a sixth of all.
            "disk_peak_over_budget": max(found[n]["peak_over_budget"] for n in shares.values()),
            "disk_limit_ends_more": ends_above_the_limit(large, shares[0.75], home),
            "disk_prefill_reads_over_distinct": max(
                one["prefill_misses"] / number for one, number in distinct
            ),
            "disk_tps_vs_resident": {
                share: round(float(in_process("--turns", large, n)), 3)
                for share, n in shares.items()
            },
            "disk_hit_rate": {s: round(found[n]["expert_hit_rate"], 3) for s, n in shares.items()},
            "disk_gb_per_s": round(max(one["expert_gb_per_s"] for one in pooled), 2),
            "disk_tps_vs_mlx_vlm": vs_mlx_vlm(large, shares[0.5]),
        }


def predict() -> None:
    """What to expect of the largest model on Macs that cannot hold it."""
    for bits, name in PREDICTED:
        source = family_source("Qwen3.5-397B-A17B")
        settings, _ = quality_settings(source, bits_per_weight=bits)
        print(f"397B at {bits} bits a weight:", flush=True)
        print(*disk_lines(plan(source, **settings), find_macs(name))[1:], sep="\n", flush=True)


def main() -> int:
    """Prints the figures; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the large model stays between runs")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--turns", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rival", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        folder, num_slots, out, limit = args.run
        print(json.dumps(run(Path(folder), int(num_slots), Path(out), int(limit))))
        return 0
    for given, make in ((args.turns, reader), (args.rival, mlx_vlm_reader)):
        if given:
            folder, num_slots = Path(given[0]), int(given[1])
            others = 0 if make is reader else num_slots
            print(in_turns(make(folder, others), reader(folder, num_slots)))
            return 0
    if args.folder and not args.folder.exists():
        write_large_model(args.folder, "disk")
    predict()
    result = label() | measure_disk(args.folder)
    result |= measure()
    failed = [f"{name} fails: {result[name]}" for name, bar in BARS.items() if result[name] > bar]
    if not result["disk_limit_ends_more"]:
        failed.append("a process that asks for more than the limit goes on")
    failed += failures(result)
    print(*failed, sep="\n")
    print(json.dumps(result))
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
