"""Chooses the tiers of a model: by name, or by measurements on this machine."""

import sys
from collections import Counter
from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn

from ..config import ModelConfig
from ..errors import Qwen35Error
from .tiers import METAL, MLX, OPERATIONS, OPS, PREFILL_OPERATIONS, ROW_LIMITS, Tiers, with_kernels
from .verdicts import Format, Verdict, member_of, shape_of

AUTO = "auto"
KERNELS = (AUTO, OPS, MLX, METAL)
# Numbers of tokens for which decode kernels are compiled and measured.
TOKENS = (1, 2, 4, 8)
PREFILL_TOKENS = 2048


def require(kernels: str) -> None:
    """Raise Qwen35Error for an unknown choice, or one that is not available here."""
    if kernels not in KERNELS:
        raise Qwen35Error(
            "no such choice of kernels", got=repr(kernels), expected=", ".join(map(repr, KERNELS))
        )
    if kernels == METAL and (problem := unavailable()):
        raise Qwen35Error(
            "Metal kernels cannot run here",
            got=problem,
            expected="a Mac with Apple silicon, on its GPU",
            hint="kernels='auto' runs everywhere",
        )


def unavailable() -> str | None:
    """The reason why kernels cannot run; None if they can."""
    if not mx.metal.is_available():
        return "no Metal on this machine"
    if sys.platform == "darwin" and mx.default_device() == mx.Device(mx.cpu):
        return "the CPU as default device"
    return None


def named(kernels: str) -> Tiers:
    """The tiers of ops, mlx or metal."""
    return with_kernels() if kernels == METAL else Tiers(kernels)


def measured(verdicts: Iterable[Verdict], config: ModelConfig, formats: dict[str, Format]) -> Tiers:
    """Kernels where they are correct and faster for this model and number of rows; else mlx."""
    shape = shape_of(member_of(config))
    found = {v.key: v for v in verdicts}
    kernel_rows = {}
    for op in OPERATIONS:
        for num_tokens in tokens_of(op):
            verdict = found.get((op, shape, *formats[op], num_tokens))
            if verdict is None or not verdict.is_faster:
                break
            is_last = num_tokens == tokens_of(op)[-1]
            kernel_rows[op] = ROW_LIMITS[op] if is_last else num_tokens
    return Tiers(MLX, kernel_rows)


def tokens_of(op: str) -> tuple[int, ...]:
    """Numbers of tokens for which an operation is measured."""
    return (PREFILL_TOKENS,) if op in PREFILL_OPERATIONS else TOKENS


def formats_of(model: nn.Module) -> dict[str, Format]:
    """The format of most weights that each operation reads, in this model."""
    experts: Counter[tuple[int, int]] = Counter()
    others: Counter[tuple[int, int]] = Counter()
    dtypes: Counter[str] = Counter()
    for name, module in model.named_modules():
        if "weight" not in module or name.startswith("vision_tower."):
            continue
        counts = experts if ".mlp." in name else others
        if "scales" in module:
            counts[module.bits, module.group_size] += module.weight.nbytes // module.bits
            dtypes[dtype_name(module.scales.dtype)] += 1
        elif module.weight.ndim > 1 and not isinstance(module, nn.Conv1d):
            counts[0, 32] += module.weight.size // 8
        else:
            dtypes[dtype_name(module.weight.dtype)] += 1
    dtype = dtypes.most_common(1)[0][0]

    def most(counts: Counter[tuple[int, int]]) -> Format:
        return Format(dtype, *counts.most_common(1)[0][0])

    # Operations without weights may have any format.
    return {op: most(experts if "expert" in op else others) for op in OPERATIONS}


def dtype_name(dtype: mx.Dtype) -> str:
    """The name of a type, such as bfloat16."""
    return str(dtype).removeprefix("mlx.core.")
