"""Writes a model of random weights with many experts, in the form that `convert` writes."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import qwen35_mlx
from qwen35_mlx.checkpoint.headers import SourceTensor
from qwen35_mlx.checkpoint.tensor_table import expected_shapes
from qwen35_mlx.config import ModelConfig, VisionConfig, read_config
from qwen35_mlx.convert import plan
from qwen35_mlx.convert.job import _index, output_config
from qwen35_mlx.convert.plan import OutputTensor
from qwen35_mlx.convert.shards import ShardWriter
from qwen35_mlx.convert.source import Source

DEMO = Path(qwen35_mlx.__file__).parent / "demo"
LAYERS, EXPERTS, PER_TOKEN = 12, 64, 4
# 768 experts of 3 x 1,152 x 2,048 weights and 4.5 bits: 3.06 GB.
SIZES = {
    "hidden_size": 2048,
    "moe_intermediate_size": 1152,
    "shared_expert_intermediate_size": 512,
    "num_experts": EXPERTS,
    "num_experts_per_tok": PER_TOKEN,
    "num_hidden_layers": LAYERS,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (LAYERS // 4),
    "mtp_num_hidden_layers": 0,
}
BLOCK_BYTES = 2**26


def write_large_model(out: Path, layout: str) -> Path:
    """Write the demo with larger layers and random weights, in 4 bits."""
    raw = read_config(DEMO)
    raw["text_config"] |= SIZES
    raw["vision_config"]["out_hidden_size"] = SIZES["hidden_size"]
    text = ModelConfig.from_hf(raw)
    vision = VisionConfig.from_hf(raw, text.hidden_size)
    shapes = expected_shapes(replace(text, vision=vision))
    file = out / "source.safetensors"
    tensors = {
        name: SourceTensor(name, "BF16", shape, file, 0, 2 * math.prod(shape))
        for name, shape in shapes.items()
    }
    planned = plan(Source(out, raw, tensors), bits=4, experts_layout=layout)
    out.mkdir()
    draw = np.random.default_rng(0)
    block = np.resize(np.frombuffer(draw.bytes(BLOCK_BYTES), np.uint8), 2 * BLOCK_BYTES)
    for shard in planned.shards:
        writer = ShardWriter(out / shard.file, shard.tensors)
        for tensor in shard.tensors:
            piece = tensor.nbytes // (tensor.shape[0] if tensor.is_apart else 1)
            for start in range(0, tensor.nbytes, piece):
                writer.write(tensor.name, start, _drawn(tensor, piece, draw, block))
        writer.missing_bytes = 0
        writer.finish()
    (out / "model.safetensors.index.json").write_text(json.dumps(_index(planned)))
    (out / "config.json").write_text(json.dumps(output_config(planned, {})))
    for path in DEMO.iterdir():
        if path.suffix in (".json", ".jinja") and not (out / path.name).exists():
            shutil.copy(path, out)
    return out


def _drawn(tensor: OutputTensor, num_bytes: int, draw: Any, block: np.ndarray) -> memoryview:
    """Random bytes for a piece of a tensor: codes, their scales, norms around 1, small weights."""
    if tensor.dtype == "U32":
        start = int(draw.integers(BLOCK_BYTES))
        return memoryview(block[start : start + num_bytes])
    values = draw.standard_normal(num_bytes // (4 if tensor.dtype == "F32" else 2), np.float32)
    if tensor.name.endswith(".scales"):
        values = 0.004 + 0.0005 * np.tanh(values)
    elif tensor.name.endswith(".biases"):
        values = -0.03 + 0.002 * np.tanh(values)
    elif "norm" in tensor.name:
        values = 1 + 0.05 * values
    else:
        values *= 0.02
    if tensor.dtype == "F32":
        return memoryview(values).cast("B")
    return memoryview((values.view(np.uint32) >> 16).astype(np.uint16)).cast("B")
