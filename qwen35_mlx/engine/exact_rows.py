"""How many tokens a pass may read so that each has the same bits as in a pass of its own.

On the CPU this holds for the portable operations. On a GPU, MLX's matmul and attention sum in an
order that depends on the number of rows; the kernels of this package do not.
"""

from typing import Any

import mlx.core as mx

from ..kernels.decode_attention import PACKED_BITS
from ..kernels.matrix import MAX_ROWS
from ..kernels.tiers import DECODE_OPERATIONS, Tiers
from ..model.cache import accept, holds_keys
from ..model.language import Model

# Operations that a dense model does not have.
OF_EXPERTS = ("router", "expert_gate_up", "expert_down")


def exact_rows(model: Model) -> int:
    """The number of tokens: from 1, where drafts would change the text, to 8."""
    if runs_on_cpu():
        return MAX_ROWS
    known: int | None = getattr(model, "_exact_rows", None)
    if known is None:
        # Stored, because it depends only on the weights and the kernels.
        known = model._exact_rows = _exact_rows_of(model)
    return known


def runs_on_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def kernel_rows(tiers: Tiers, is_moe: bool, kv_bits: tuple[int, int] | None = None) -> int:
    """The number of rows up to which all operations of a decode pass are our kernels."""
    if kv_bits not in (None, (PACKED_BITS, PACKED_BITS)):
        return 0
    other = "decode_attention" if kv_bits else "packed_attention"
    skipped = (other,) if is_moe else (other, *OF_EXPERTS)
    return min(tiers.kernel_rows.get(op, 0) for op in DECODE_OPERATIONS if op not in skipped)


def _exact_rows_of(model: Model) -> int:
    most = min(kernel_rows(model.kernels, model.config.is_moe, model.config.kv_bits), MAX_ROWS)
    # Tested, because some weights have a form that no kernel reads; MLX then multiplies.
    return next((rows for rows in (8, 4, 2) if rows <= most and rows_agree(model, rows)), 1)


def rows_agree(model: Model, num_rows: int) -> bool:
    """Whether a pass of `num_rows` tokens gives the logits and states of single passes."""
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
    return list(entry.rows(0, entry.offset).values() if holds_keys(entry) else entry.cache)
