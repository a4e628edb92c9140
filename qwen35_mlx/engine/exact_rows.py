"""How many tokens one pass may read so that each has the bits of a pass of its own.

On the CPU the portable operations give them. On a GPU MLX's own products and attention choose
their order of sums by the number of rows; the kernels of this package do not.
"""

from typing import Any

import mlx.core as mx

from ..kernels.decode_attention import PACKED_BITS
from ..kernels.matrix import MAX_ROWS
from ..kernels.tiers import DECODE_OPERATIONS, Tiers
from ..model.cache import accept
from ..model.language import Model

# What a dense model has no use for.
OF_EXPERTS = ("router", "expert_gate_up", "expert_down")


def exact_rows(model: Model) -> int:
    """From 1, where drafts would change the text, to 8."""
    if runs_on_cpu():
        return MAX_ROWS
    known: int | None = getattr(model, "_exact_rows", None)
    if known is None:
        # Depends on the weights and the kernels alone, as the kernels themselves.
        known = model._exact_rows = _exact_rows_of(model)
    return known


def runs_on_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def kernel_rows(tiers: Tiers, is_moe: bool, kv_bits: tuple[int, int] | None = None) -> int:
    """Most rows for which every operation of a decoding pass is a kernel of this package."""
    if kv_bits not in (None, (PACKED_BITS, PACKED_BITS)):
        return 0
    other = "decode_attention" if kv_bits else "packed_attention"
    skipped = (other,) if is_moe else (other, *OF_EXPERTS)
    return min(tiers.kernel_rows.get(op, 0) for op in DECODE_OPERATIONS if op not in skipped)


def _exact_rows_of(model: Model) -> int:
    most = min(kernel_rows(model.kernels, model.config.is_moe, model.config.kv_bits), MAX_ROWS)
    # Tried, for some weights are read by no kernel, and then MLX multiplies.
    return next((rows for rows in (8, 4, 2) if rows <= most and rows_agree(model, rows)), 1)


def rows_agree(model: Model, num_rows: int) -> bool:
    """Whether a pass of so many tokens gives the logits and states of passes of one token."""
    ids = [(7 * i + 3) % model.config.vocab_size for i in range(num_rows)]
    single, together = model.make_cache(), model.make_cache()
    logits = [model.head(model.trunk(mx.array([[i]]), single)) for i in ids]
    hidden = model.trunk(mx.array([ids]), together, keep_states=True)
    pairs = [(mx.concatenate(logits, axis=1), model.head(hidden))]
    accept(together, num_rows)
    for a, b in zip(single, together, strict=True):
        pairs += zip(_states(a), _states(b), strict=True)
    return all(mx.array_equal(a, b).item() for a, b in pairs)


def _states(entry: Any) -> list[mx.array]:
    if hasattr(entry, "keys"):
        return list(entry.rows(0, entry.offset).values())
    return list(entry.cache)
