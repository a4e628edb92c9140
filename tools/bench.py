"""Prefill and decode speed of a 4-bit MoE checkpoint of about 300 MB, compared with mlx-lm.

Random weights at real proportions are converted once into a temporary folder. That folder is run
in turns by mlx-lm as it loads it, by mlx-lm forced to float32, and by this package. Ends with one
JSON line; a ratio above 1 means that this package is faster.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
from label import label

from qwen35_mlx.checkpoint.tensor_table import expected_shapes
from qwen35_mlx.config import ModelConfig
from qwen35_mlx.convert import convert
from qwen35_mlx.evaluation.bench import measure, mlx_lm_conversation, our_conversation, prompt_ids
from qwen35_mlx.family import family_config
from qwen35_mlx.model.loading import load_model

# About 300 MB at 4 bits.
CONFIG = family_config("Qwen3.5-35B-A3B")
CONFIG["text_config"] |= dict(
    hidden_size=1024,
    num_hidden_layers=8,
    num_attention_heads=8,
    head_dim=128,
    linear_num_key_heads=8,
    linear_num_value_heads=16,
    num_experts=64,
    moe_intermediate_size=256,
    shared_expert_intermediate_size=256,
    vocab_size=32_000,
    max_position_embeddings=32_768,
)


def write_checkpoint(folder: Path, seed: int = 0) -> None:
    """A random checkpoint in Hugging Face's format, bf16, experts fused."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    mx.random.seed(seed)
    tensors = {}
    for name, shape in expected_shapes(ModelConfig.from_hf(CONFIG)).items():
        scale = 0.3 if "conv1d" in name else 0.1 if len(shape) == 1 else shape[-1] ** -0.5
        tensors[name] = (scale * mx.random.normal(shape)).astype(mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})


def main() -> None:
    """Convert, run the three in turns, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source, folder = Path(temporary, "source"), Path(temporary, "converted")
        write_checkpoint(source)
        convert(source, folder, bits=4, group_size=64)
        megabytes = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6
        default, _ = mlx_lm.utils.load_model(folder)
        forced, _ = mlx_lm.utils.load_model(folder)
        forced.set_dtype(mx.float32)
        model, _ = load_model(folder)
    programs = {
        "ours": lambda: our_conversation(model),
        "float32": lambda: mlx_lm_conversation(forced),
        "default": lambda: mlx_lm_conversation(default),
    }
    prompt = prompt_ids(args.prompt_tokens, CONFIG["text_config"]["vocab_size"])
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for program in programs.values():
        # One short run each compiles the kernels and touches the weights.
        measure(program(), prompt[:8], 2, 1)
    for i in range(args.rounds):
        # Alternate the order, so that being first in a round does not matter.
        for name, program in list(programs.items())[:: 1 if i % 2 == 0 else -1]:
            # mlx-lm's default is an order of magnitude slower here, so two rounds are enough.
            if name != "default" or i < 2:
                run = measure(program(), prompt, args.new_tokens, 1)
                decode_tps = (args.new_tokens - 1) / run.decode_s
                speeds[name].append((len(prompt) / run.ttft_s, decode_tps))

    names = {"ours": "qwen35-mlx", "float32": "mlx-lm, float32", "default": "mlx-lm, as it loads"}
    print(
        f"{megabytes:.0f} MB, 4-bit group 64, {len(prompt)} prompt + {args.new_tokens} new tokens"
    )
    print(f"{'':20} {'prefill tok/s':>14} {'decode tok/s':>14} {'runs':>5}")
    medians = {}
    for name, rows in speeds.items():
        medians[name] = [statistics.median(column) for column in zip(*rows, strict=True)]
        prefill, decode = medians[name]
        print(f"{names[name]:20} {prefill:14.2f} {decode:14.2f} {len(rows):5}")
    result: dict[str, object] = {}
    for peer in ("default", "float32"):
        for i, phase in enumerate(("prefill", "decode")):
            # Round by round, so that drift of the machine's speed cancels.
            pairs = zip(speeds["ours"], speeds[peer], strict=False)
            ratio = statistics.median(a[i] / b[i] for a, b in pairs)
            result[f"{phase}_vs_mlx_lm_{peer}"] = round(ratio, 3)
    result |= label() | {
        "megabytes": round(megabytes),
        "bits": 4,
        "prompt_tokens": args.prompt_tokens,
        "median_of": args.rounds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
