"""A digest of a model's weights, which identifies its caches on disk."""

import hashlib
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..checkpoint.names import OF_EXPERTS
from ..kernels.matrix import arrays_of
from .language import Model

SAMPLED_ROWS, SAMPLED_COLUMNS = 8, 8


def model_identity(model: Model) -> str:
    """A digest of the names, shapes, types and a few numbers of each tensor.

    It is stored on the model while its arrays are the same, because it takes operations on each.
    """
    # Without the MTP layer, which changes no text, and without experts' slots, which change.
    tensors = sorted(
        (name, array)
        for name, array in arrays_of(model.parameters()).items()
        if not name.startswith("mtp.") and not (model.experts and OF_EXPERTS in name)
    )
    changes = model.cache_key + (model.experts.digest if model.experts else "")
    arrays = hash((changes, *(id(array) for _, array in tensors)))
    known = getattr(model, "_identity", "")
    if not known.startswith(f"{arrays} "):
        known = model._identity = f"{arrays} {_digest_of_weights(tensors, changes)}"
    return known.partition(" ")[2]


def _digest_of_weights(tensors: Sequence[tuple[str, mx.array]], changes: str) -> str:
    # The adapter's own digest, because samples could miss the difference of two adapters.
    digest = hashlib.sha256(changes.encode())
    samples = []
    for name, array in tensors:
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        # By rows, because a stack of experts has more elements than MLX's 32-bit indices.
        rows = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
        step = max(1, rows.shape[0] // SAMPLED_ROWS)
        samples.append(rows[::step][:SAMPLED_ROWS, :SAMPLED_COLUMNS].reshape(-1).view(mx.uint8))
    if samples:
        digest.update(np.array(mx.concatenate(samples)).tobytes())
    return digest.hexdigest()
