"""FP8 checkpoints give the bytes that their weights, multiplied out to bfloat16, would give."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Stored, Tensors, safetensors_bytes, stored, write_checkpoint
from everyday import everyday

from qwen35_mlx.convert import convert, plan, tasks
from qwen35_mlx.convert.fp8 import dequantize_fp8
from qwen35_mlx.errors import CheckpointError

KEPT = ("norm.weight", "layernorm.weight", "conv1d.weight", "in_proj_a.weight", "in_proj_b.weight",
        "A_log", "dt_bias", "mlp.gate.weight", "shared_expert_gate.weight", "embed_tokens.weight",
        "lm_head.weight")  # fmt: skip


def value_of(byte: int) -> float:
    """E4M3 as the paper defines it: no infinity, one NaN of each sign."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


VALUES = np.array([value_of(byte) for byte in range(256)], dtype=np.float32)


def quantized(
    shape: tuple[int, ...], block: tuple[int, int], seed: list[int], scale_dtype: str
) -> tuple[Stored, Stored, Stored]:
    """Random FP8 bytes, their scales, and the same weight in bfloat16."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[np.isnan(VALUES[codes])] = 1
    *leading, rows, columns = shape
    blocks = (*leading, -(-rows // block[0]), -(-columns // block[1]))
    kind, scales = stored(rng.uniform(1e-4, 1e-3, blocks).astype(np.float32), scale_dtype)
    factor = scales.astype(np.float32)
    if kind == "BF16":
        factor = (scales.astype(np.uint32) << 16).view(np.float32)
    for axis, size in ((-2, block[0]), (-1, block[1])):
        factor = factor.repeat(size, axis=axis)
    whole = VALUES[codes] * factor[..., :rows, :columns]
    return ("F8_E4M3", codes), (kind, scales), stored(whole, "BF16")


def write_both(
    folder: Path, block: tuple[int, int], *, experts: str, scale_dtype: str = "F32", **more
) -> tuple[Path, Path]:
    """The same model in FP8 and multiplied out."""
    plain: Tensors = {}

    def change(tensors: Tensors) -> None:
        for name, (_, values) in list(tensors.items()):
            if name.endswith(KEPT) or values.ndim < 2 or "visual" in name:
                continue
            seed = list(name.encode())
            fp8, scale, plain[name] = quantized(values.shape, block, seed, scale_dtype)
            tensors[name] = fp8
            tensors[f"{name}_scale_inv"] = scale

    settings = dict(
        quantization_config=dict(quant_method="fp8", fmt="e4m3", weight_block_size=list(block))
    )
    write_checkpoint(
        folder / "fp8", moe=True, mtp=True, vision=True, experts=experts, change=change,
        config=settings, **more,
    )  # fmt: skip
    write_checkpoint(
        folder / "plain", moe=True, mtp=True, vision=True, experts=experts,
        change=lambda tensors: tensors.update(plain), **more,
    )  # fmt: skip
    assert len(plain) > 20
    return folder / "fp8", folder / "plain"


@pytest.mark.parametrize("experts", everyday(["fused", "each"], 1))
@pytest.mark.parametrize(
    ("block", "scale_dtype"),
    everyday([((48, 40), "F32"), ((128, 128), "BF16"), ((96, 128), "F32")], 0),
)
def test_fp8_gives_the_bytes_of_the_weights_multiplied_out(
    tmp_path, monkeypatch, experts, block, scale_dtype
):
    # Slices of 50 rows, which end inside of blocks.
    monkeypatch.setattr(tasks, "SLICE_BYTES", 50 * 128 * 4)
    fp8, plain = write_both(tmp_path, block, experts=experts, scale_dtype=scale_dtype)
    for i, settings in enumerate((dict(bits=4), dict(dtype="bfloat16"))):
        files = [
            convert(source, tmp_path / f"{source.name}{i}", **settings) / "model.safetensors"
            for source in (fp8, plain)
        ]
        assert files[0].read_bytes() == files[1].read_bytes()
        config = json.loads((files[0].parent / "config.json").read_text())
        assert config.get("quantization_config") == config.get("quantization")


def test_scales_in_another_shard_than_their_weights(tmp_path):
    fp8, plain = write_both(tmp_path, (128, 128), experts="each", num_shards=7)
    index = json.loads((fp8 / "model.safetensors.index.json").read_text())["weight_map"]
    apart = [n for n in index if n.endswith("_scale_inv") and index[n] != index[n[:-10]]]
    assert apart
    files = [
        convert(source, tmp_path / f"out-{source.name}") / "model.safetensors"
        for source in (fp8, plain)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_every_number_of_fp8_is_that_of_its_definition():
    for shape in ((2, 127), (127, 2), (1, 253)):
        codes = np.array([b for b in range(256) if not math.isnan(VALUES[b])], dtype=np.uint8)
        rows = codes[: math.prod(shape)].reshape(shape)
        out = dequantize_fp8(rows, np.ones((shape[0], 1), np.float32), 128)
        assert np.array_equal(out, VALUES[rows])


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a checkpoint of one file."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    tensors: Tensors = {}
    kinds = {"F32": np.float32, "BF16": np.uint16, "F8_E4M3": np.uint8, "F16": np.float16}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (end + n for n in entry["data_offsets"])
            values = np.frombuffer(raw[start:stop], kinds[entry["dtype"]])
            tensors[name] = (entry["dtype"], values.reshape(entry["shape"]).copy())
    change(tensors)
    path.write_bytes(safetensors_bytes(tensors))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("layers.0.mlp.experts.1.up_proj.weight", "missing", "missing  .*up_proj.weight_scale_inv"),
        ("layers.1.self_attn.q_proj.weight", "shape", r"q_proj.weight_scale_inv: \[7, 1\], exp"),
        ("layers.1.self_attn.o_proj.weight", "kind", "o_proj.weight_scale_inv: F8_E4M3, expected"),
        ("layers.0.input_layernorm.weight", "extra", "unknown  .*layernorm.weight_scale_inv"),
        ("mtp.fc.weight", "missing", "missing  mtp.fc.weight_scale_inv"),
    ],
)
def test_scales_that_do_not_fit_are_refused(tmp_path, name, change, message):
    fp8, _ = write_both(tmp_path, (128, 128), experts="each")
    full = name if name.startswith("mtp") else f"model.language_model.{name}"
    scale = f"{full}_scale_inv"

    def edit(tensors: Tensors) -> None:
        if change == "missing":
            del tensors[scale]
        elif change == "shape":
            tensors[scale] = ("F32", np.ones((7, 1), np.float32))
        elif change == "kind":
            tensors[scale] = ("F8_E4M3", np.ones(tensors[scale][1].shape, np.uint8))
        else:
            tensors[scale] = ("F32", np.ones((1, 1), np.float32))

    rewrite(fp8, edit)
    with pytest.raises(CheckpointError, match=message):
        plan(fp8)


@pytest.mark.parametrize("is_vector", [False, True])
def test_fp8_without_scales_is_refused(tmp_path, is_vector):
    """No block in config.json, or a vector, which has no blocks: nothing says what a byte means."""
    name = "input_layernorm" if is_vector else "self_attn.q_proj"
    name = f"model.language_model.layers.1.{name}.weight"
    config = dict(quant_method="fp8", weight_block_size=[128, 128]) if is_vector else None

    def change(tensors: Tensors) -> None:
        tensors[name] = ("F8_E4M3", np.ones(tensors[name][1].shape, np.uint8))

    write_checkpoint(tmp_path / "src", change=change, config=dict(quantization_config=config))
    message = f"dtype    {name}: F8_E4M3, expected F32, F16, BF16"
    if not is_vector:
        message = "FP8 weights without a size of blocks"
    with pytest.raises(CheckpointError, match=message):
        plan(tmp_path / "src")


@pytest.mark.parametrize("part", ["weight", "scale"])
def test_nan_among_fp8_weights_and_scales_is_named(tmp_path, part):
    fp8, _ = write_both(tmp_path, (128, 128), experts="each")
    name = "model.language_model.layers.1.self_attn.q_proj.weight"

    def edit(tensors: Tensors) -> None:
        if part == "weight":
            tensors[name][1][3, 5] = 0xFF
        else:
            tensors[f"{name}_scale_inv"][1][1, 0] = np.nan

    rewrite(fp8, edit)
    with pytest.raises(CheckpointError, match=f"tensor {name} has values that are not finite"):
        convert(fp8, tmp_path / "out", dtype="bfloat16")
