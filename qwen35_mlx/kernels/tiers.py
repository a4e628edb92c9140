"""The three tiers that run an operation, and the choice of a model for each operation.

ops: portable MLX operations, the reference, used on a CPU. mlx: MLX's fused operations and compiled
chains for the GPU. metal: the kernels of this package. A `Tiers` belongs to a model: `use` sets it
as the attribute `kernels` of each module that declares one. Nothing is global, so two models may
differ.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import mlx.nn as nn

from ..errors import Qwen35Error
from .matrix import MAX_ROWS

OPS, MLX, METAL = "ops", "mlx", "metal"
# Every operation with a kernel of this package.
DECODE_OPERATIONS = (
    "projection",
    "delta_step",
    "qk_norm_rope",
    "decode_attention",
    "output_gate",
    "router",
    "expert_gate_up",
    "expert_down",
    "packed_attention",
)
PREFILL_OPERATIONS = ("chunk_delta_rule", "grouped_expert_matmul")
OPERATIONS = DECODE_OPERATIONS + PREFILL_OPERATIONS
ANY_ROWS = 2**31
# Maximum rows of activations of the kernels. The router's kernel has one row per simdgroup.
ROW_LIMITS = (
    dict.fromkeys(DECODE_OPERATIONS, MAX_ROWS)
    | dict.fromkeys(PREFILL_OPERATIONS, ANY_ROWS)
    | {"router": ANY_ROWS}
)


@dataclass(frozen=True)
class Tiers:
    """A tier for each operation and number of rows.

    `kernel_rows`: the maximum rows for which an operation runs as a kernel of this package. Other
    operations, and more rows, run on `base`, which is ops or mlx.
    """

    base: str = OPS
    kernel_rows: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.kernel_rows) - set(OPERATIONS)):
            raise Qwen35Error(
                f"no such kernel: {', '.join(unknown)}", got=unknown, expected=", ".join(OPERATIONS)
            )

    def runs(self, operation: str, num_rows: int) -> bool:
        """Whether the operation runs as a kernel of this package."""
        return num_rows <= self.kernel_rows.get(operation, 0)

    @property
    def on_mlx(self) -> bool:
        """Whether all else runs on the tier mlx."""
        return self.base == MLX

    def of(self, operation: str, num_rows: int = 1) -> str:
        """The tier of an operation: ops, mlx or metal."""
        return METAL if self.runs(operation, num_rows) else self.base


PORTABLE = Tiers()


def with_kernels(operations: Iterable[str] = OPERATIONS, base: str = MLX) -> Tiers:
    """Tiers that run these operations as kernels wherever these can run."""
    return Tiers(base, {op: ROW_LIMITS.get(op, ANY_ROWS) for op in operations})


def use(model: nn.Module, tiers: Tiers) -> None:
    """Give every module of the model its tiers."""
    for module in model.modules():
        if hasattr(type(module), "kernels"):
            module.kernels = tiers
