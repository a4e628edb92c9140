"""The routed experts with MLX operations, or as two Metal products over rows sorted by expert.

N tokens, K experts per token, R = N * K rows, E experts, H hidden, I expert width.
"""

import mlx.core as mx
import mlx.nn as nn

from .expert_step import weighted_sum
from .matrix import FLOATS, Matrix, matrices
from .metal import kernel
from .switch import SORT_FROM, SwitchGLU
from .tiers import PORTABLE, Tiers

TILE_ROWS = 64
# Rows of weights by which a threadgroup multiplies a tile: 64 of gate and of up, or 128 of down.
TILE_COLUMNS = 128


def expert_mlp(
    x: mx.array, indices: mx.array, scores: mx.array, experts: SwitchGLU, kernels: Tiers = PORTABLE
) -> mx.array:
    """Weighted sum of SwiGLU experts, `[N, H]` in x's type.

    x `[N, H]`; indices and scores `[N, K]`; gate_proj and up_proj of experts hold `[E, I, H]`,
    down_proj `[E, H, I]`, quantized or not.
    """
    if kernels.runs("grouped_expert_matmul", x.shape[0]) and indices.size >= SORT_FROM:
        found = eligible(x, [experts.gate_proj, experts.up_proj, experts.down_proj])
        if found is not None:
            return grouped_expert_mlp(x, indices, scores, *found)
    return weighted_sum(experts(x, indices), scores)


def eligible(x: mx.array, projections: list[nn.Module]) -> list[Matrix] | None:
    """gate, up and down in the form for the kernel, or None if it cannot run them."""
    found = matrices(projections)
    if found is None or x.dtype not in FLOATS:
        return None
    gate, up, down = found
    alike = (gate.bits, gate.group_size) == (up.bits, up.group_size)
    return found if alike and gate.out_dims % 8 == down.out_dims % 8 == 0 else None


def tiles(flat: mx.array, num_experts: int) -> tuple[mx.array, mx.array]:
    """Running sums over experts, `[E]` each: of rows, and of tiles of up to 64 rows.

    flat: `[R]`, the expert of each row. The device computes all, so nothing waits for the counts.
    """
    counts = mx.zeros(num_experts, mx.int32).at[flat].add(1)
    return mx.cumsum(counts), mx.cumsum((counts + TILE_ROWS - 1) // TILE_ROWS)


def num_matrix_macs(counts: list[int], in_dims: int, out_dims: int) -> int:
    """Multiply-adds for experts with these rows, which are rounded up to eight, as columns are."""
    columns = -(-out_dims // TILE_COLUMNS) * TILE_COLUMNS
    return sum(-(-n // 8) * 8 for n in counts) * in_dims * columns


def grouped_expert_mlp(
    x: mx.array, indices: mx.array, scores: mx.array, gate: Matrix, up: Matrix, down: Matrix
) -> mx.array:
    """`expert_mlp` for many tokens, in two dispatches after those that sort the rows."""
    num_tokens, per_token = indices.shape
    flat = indices.flatten()
    order = mx.argsort(flat)
    row_ends, tile_ends = tiles(flat, gate.arrays[0].shape[0])
    rows = (order, scores.flatten().astype(mx.float32), row_ends, tile_ends)
    hidden = _multiply(x, rows, gate, up, per_token)
    out = _multiply(hidden, rows, down, None, per_token)
    return out.reshape(num_tokens, per_token, -1).sum(axis=1)


def _multiply(
    x: mx.array, rows: tuple[mx.array, ...], w: Matrix, up: Matrix | None, per_token: int
) -> mx.array:
    num_rows, num_experts = rows[0].size, w.arrays[0].shape[0]
    # Each expert's last tile may be short, and no tile is empty.
    num_tiles = min(num_rows, num_rows // TILE_ROWS + num_experts)
    columns = TILE_COLUMNS if up is None else TILE_COLUMNS // 2
    run = kernel(
        "grouped_expert_matmul",
        (
            *("x", "order", "scores", "row_ends", "tile_ends"),
            *("w", "scales", "biases", "up", "up_scales", "up_biases"),
        ),
        ("out",),
    )
    return run(
        inputs=[x, *rows, *w.arrays, *(up or w).arrays],
        template=[
            ("T", x.dtype),
            ("BITS", w.bits),
            ("GROUP", w.group_size),
            ("GATED", up is not None),
            ("PER_TOKEN", per_token),
        ],
        grid=(128 * num_tiles, -(-w.out_dims // columns), 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(num_rows, w.out_dims)],
        output_dtypes=[x.dtype],
    )[0]
