"""Memory and speed of converting one MoE layer of the 397B, ours beside mlx-lm's.

Writes one layer of Qwen3.5-397B-A17B with its DeltaNet projections in random numbers, in bf16 with
fused experts and in FP8 with separate ones, converts each to 3 and 4 bits in a process of its own,
and lets mlx-lm convert the same bf16 files, with fewer experts if --peer-experts says so.
Ends with one JSON line. Speeds are megabytes of source a second.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from label import label

from qwen35_mlx.checkpoint.tensor_table import expected_shapes
from qwen35_mlx.config import ModelConfig
from qwen35_mlx.family import family_config

MODEL = "Qwen3.5-397B-A17B"
# Repeated, from another start each time: the quantizers do not mind, and drawing takes long.
RANDOM_VALUES = 2**24 + 12_345
CHUNK_VALUES = 2**23
VOCAB = 1024
NOT_FP8 = ("conv1d.weight", "in_proj_a.weight", "in_proj_b.weight", "gate.weight",
           "embed_tokens.weight", "head.weight")  # fmt: skip
OURS = """
import sys
from qwen35_mlx.convert import convert
convert(sys.argv[1], sys.argv[2], bits=int(sys.argv[3]))
"""
PEER = """
import sys
from mlx_lm import convert
convert(sys.argv[1], sys.argv[2], quantize=True, q_bits=int(sys.argv[3]), q_group_size=64)
"""
# Of this process alone: Linux would count what its parent held when it was started.
PEAK = """
import resource
from pathlib import Path
status = Path("/proc/self/status")
if status.exists():
    line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
    peak = int(line.split()[1]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak)
"""


def layer_config(experts: int, model: str = MODEL) -> dict[str, Any]:
    """The model with one layer, a small vocabulary and `experts` experts."""
    config = family_config(model)
    config["text_config"] |= dict(
        num_hidden_layers=1, layer_types=["linear_attention"], vocab_size=VOCAB, num_experts=experts
    )
    per_token = config["text_config"]["num_experts_per_tok"]
    config["text_config"]["num_experts_per_tok"] = min(per_token, max(experts // 4, 1))
    return config


def write_source(folder: Path, experts: int, fp8: bool, model: str = MODEL) -> int:
    """A checkpoint of one file; returns its number of bytes."""
    folder.mkdir()
    config = layer_config(experts, model)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in expected_shapes(ModelConfig.from_hf(config)).items():
        if not fp8 or len(shape) < 2 or name.endswith(NOT_FP8):
            shapes[name] = ("BF16", shape)
        elif ".mlp.experts." in name:
            stem, rows = name.rpartition(".")[0], shape[1]
            parts = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
            for e in range(shape[0]):
                for part in parts:
                    one = (rows // len(parts), shape[2])
                    shapes |= fp8_pair(f"{stem}.{e}.{part}.weight", one)
        else:
            shapes |= fp8_pair(name, shape)
    if fp8:
        config["quantization_config"] = dict(quant_method="fp8", weight_block_size=[128, 128])
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return write_weights(folder / "model.safetensors", shapes)


def fp8_pair(name: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """An FP8 weight and its scales."""
    blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
    return {name: ("F8_E4M3", shape), f"{name}_scale_inv": ("F32", blocks)}


def write_weights(path: Path, shapes: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """The file, a chunk at a time."""
    rng = np.random.default_rng(0)
    values = (0.02 * rng.standard_normal(RANDOM_VALUES)).astype(np.float32)
    codes = rng.integers(0, 256, RANDOM_VALUES).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    random = {
        "BF16": (values.view(np.uint32) >> 16).astype(np.uint16),
        "F32": np.abs(values) + 1e-4,
        "F8_E4M3": codes,
    }
    header, offset = {}, 0
    for name, (dtype, shape) in shapes.items():
        end = offset + math.prod(shape) * random[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for dtype, shape in shapes.values():
            pool, left = random[dtype], math.prod(shape)
            while left:
                start = int(rng.integers(0, len(pool) - 1))
                chunk = pool[start : start + min(left, CHUNK_VALUES)]
                file.write(chunk.data)
                left -= len(chunk)
    return path.stat().st_size


def write_tokenizer(folder: Path) -> None:
    """mlx-lm wants one."""
    words = {f"w{i}": i for i in range(VOCAB)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def run(script: str, *arguments: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of a Python process."""
    start = time.perf_counter()
    command = [sys.executable, "-c", script + PEAK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    return seconds, int(done.stdout.split()[-1])


def main() -> None:
    """Write, convert, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=512, help="512 is the real layer: 12.9 GB")
    parser.add_argument("--peer-experts", type=int, help="for mlx-lm and ours beside it")
    parser.add_argument("--folder", help="where to write; needs 1.5 times the source")
    args = parser.parse_args()
    peer_experts = args.peer_experts or args.experts
    rows: list[dict[str, Any]] = []

    def convert(tool: str, source: Path, nbytes: int, bits: int, experts: int) -> None:
        out = source.parent / "out"
        script = OURS if tool == "ours" else PEER
        seconds, peak_bytes = run(script, str(source), str(out), str(bits))
        shutil.rmtree(out)
        form = "FP8" if source.name == "fp8" else "bf16"
        row = dict(tool=tool, form=form, experts=experts, bits=bits, peak_bytes=peak_bytes)
        rows.append(row | dict(mb_per_s=nbytes / 1e6 / seconds))
        print(
            f"{tool:8} {form:5} {experts:4} experts {bits} bits  {nbytes / 1e9:6.2f} GB  "
            f"{seconds:7.1f} s  {rows[-1]['mb_per_s']:7.1f} MB/s  peak {peak_bytes / 1e9:5.2f} GB",
            flush=True,
        )

    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        sources = {"bf16": args.experts, "fp8": args.experts}
        if peer_experts != args.experts:
            sources["peer"] = peer_experts
        for form, experts in sources.items():
            source = Path(scratch) / form
            nbytes = write_source(source, experts, fp8=form == "fp8")
            for bits in (3, 4):
                convert("ours", source, nbytes, bits, experts)
                if form != "fp8" and experts == peer_experts:
                    convert("mlx-lm", source, nbytes, bits, experts)
            shutil.rmtree(source)

    ours = [row for row in rows if row["tool"] == "ours"]
    peers = [row for row in rows if row["tool"] == "mlx-lm"]
    beside = [r for r in ours if (r["experts"], r["form"]) == (peer_experts, "bf16")]
    result = {
        "peak_bytes": max(row["peak_bytes"] for row in ours),
        "mlx_lm_peak_bytes": max(row["peak_bytes"] for row in peers),
        "source_mb_per_s": round(sum(r["mb_per_s"] for r in beside) / len(beside), 1),
        "mlx_lm_source_mb_per_s": round(sum(r["mb_per_s"] for r in peers) / len(peers), 1),
        "experts": args.experts,
        "mlx_lm_experts": peer_experts,
        **label(),
        "cores": os.cpu_count(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
