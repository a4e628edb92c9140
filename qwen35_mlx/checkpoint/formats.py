"""Formats of weights: layout of MLX or Hugging Face, FP8 blocks, and formats that are not read."""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..config import ModelConfig
from ..errors import CheckpointError
from .headers import FP8, SourceTensor
from .quantization import quantization_block

log = logging.getLogger(__name__)

# Rows and columns that share a scale.
Block = tuple[int, int]

SCALE = "_scale_inv"  # ends the name of the scales of an FP8 tensor
# Of FP8 where config.json does not say it, as in the reference; the scales must have that shape.
FP8_BLOCK = [128, 128]
# Ends of tensor names -> formats that are not read. The first match counts.
FOREIGN = {
    (".qweight", ".qzeros", ".g_idx"): "GPTQ or AWQ",
    (".absmax", ".quant_map", ".SCB", ".quant_state.bitsandbytes__nf4"): "bitsandbytes",
    (".quant_state.bitsandbytes__fp4", ".weight_format"): "bitsandbytes",
    (".weight_packed", ".weight_zero_point", ".weight_shape"): "compressed-tensors",
    ("_blocks", ".weight_scale_2", ".weight_global_scale"): "FP4",
    ("_scale",): "scales of whole tensors or channels",
}
# Scales of activations and of the KV cache; FP8 weights do not need them.
ACTIVATION_SCALE = re.compile(r"([._](activation|input|output)|\.(q|k|v|kv|prob))_scale(_inv)?$")
# Computed from config.json, not learned.
BUFFER = re.compile(r"\.rotary(_pos)?_emb\.inv_freq$")
BF16_HINT = "convert from the bf16 checkpoint of the same model"


def refuse_foreign(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse a checkpoint that is quantized in a format this project does not read."""
    names = [name for name in names if not ACTIVATION_SCALE.search(name)]
    for endings, form in FOREIGN.items():
        if found := next((name for name in names if name.endswith(endings)), ""):
            method = quantization_block(config).get("quant_method")
            raise CheckpointError(
                f"the source is quantized in a format that is not read: {method or form}",
                got=f"tensor {found}",
                expected="bf16, fp16, fp32, block-wise FP8, or weights quantized by MLX",
                hint=BF16_HINT,
            )


def fp8_block(config: Mapping[str, Any], tensors: Mapping[str, SourceTensor]) -> Block | None:
    """Rows and columns that share a scale in an FP8 checkpoint; None if it is not FP8.

    The tensors decide. A quantization block in config.json without quantized tensors is reported.
    """
    refuse_foreign(config, tensors)
    settings = quantization_block(config)
    weights = (name for name in tensors if not ACTIVATION_SCALE.search(name))
    scales = [tensors[name] for name in weights if name.endswith(SCALE)]
    if not scales and not any(tensor.dtype == FP8 for tensor in tensors.values()):
        if settings and not any(name.endswith(".scales") for name in tensors):
            log.warning(
                "config.json says that the weights are quantized (%s), but none is: they are taken"
                " as they are",
                settings.get("quant_method") or "by MLX",
            )
        return None
    for scale in scales:
        if scale.dtype in ("F8_E8M0", "U8"):
            raise _fp8_error("scales that are powers of two (UE8M0)", scale)
        if scale.shape in ((), (1,)):
            raise _fp8_error("one scale for a whole tensor", scale)
    block = FP8_BLOCK if settings.get("quant_method") == "fp8" else None
    block = settings.get("weight_block_size", block)
    pair = block if isinstance(block, list) and len(block) == 2 else [0, 0]
    if not all(type(n) is int and n > 0 for n in pair):
        raise CheckpointError(
            "FP8 weights without a size of blocks",
            got=f"weight_block_size={block!r} in config.json",
            expected="two numbers, as [128, 128]",
            hint=BF16_HINT,
        )
    return pair[0], pair[1]


def _fp8_error(what: str, scale: SourceTensor) -> CheckpointError:
    return CheckpointError(
        f"the source is quantized to FP8 with {what}",
        got=f"tensor {scale.name}, {scale.dtype} {list(scale.shape)}",
        expected="a scale in float32 or bfloat16 for each block of a weight",
        hint=BF16_HINT,
    )


def is_mlx_layout(config: ModelConfig, tensors: Mapping[str, SourceTensor]) -> bool:
    """Whether MLX wrote the tensors, given by bare names: taps before channels, norms shifted.

    The convolutions of all files decide, as in mlx-lm: torch has `[C, 1, K]`, MLX `[C, K, 1]`.
    """
    shapes = [
        tensor.shape
        for name, tensor in tensors.items()
        if name.startswith("layers.") and name.endswith(".conv1d.weight")
    ]
    taps = config.linear_conv_kernel_dim
    if shapes and taps > 1:
        return 2 * sum(shape[1:] == (taps, 1) for shape in shapes) > len(shapes)
    return is_named_by_mlx(tensor.name for tensor in tensors.values())


def is_named_by_mlx(names: Iterable[str]) -> bool:
    """Whether some names are used by MLX programs only; an MLX model may have none of them."""
    starts = ("language_model.model.", "language_model.lm_head.", "vision_tower.")
    return any(name.startswith(starts) or ".switch_mlp." in name for name in names)


def mtp_norms_are_shifted(config: Mapping[str, Any], tensors: Iterable[SourceTensor]) -> bool:
    """Whether the norms of an MTP layer in an MLX folder already have the 1 added.

    They have not if the file was not written by MLX: it was copied from a Hugging Face checkpoint.
    They have not either if an early version of this project converted it, which shifted only the
    norms of the trunk.
    """
    stored = list(tensors)
    names = (tensor.name for tensor in stored)
    by_mlx = any(t.by_mlx for t in stored) or any(
        ".switch_mlp." in name or name.endswith(".scales") for name in names
    )
    ours = config.get("qwen35_mlx")
    return by_mlx and (not isinstance(ours, Mapping) or ours.get("mtp_norms_shifted") is True)
