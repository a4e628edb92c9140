"""A digest of a model's weights, by which what it has read is known on disk."""

import hashlib
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..checkpoint.names import OF_EXPERTS
from ..kernels.matrix import arrays_of
from .language import Model

SAMPLED_ROWS, SAMPLED_COLUMNS = 8, 8


def model_identity(model: Model) -> str:
    """A digest of the model's names, shapes, types and of a few numbers of each tensor.

    Kept while the model has the same arrays: it takes an operation or more for each of them.
    """
    # Drafts change no text: the MTP layer may be there or not. Slots of experts always change.
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
    # Samples could miss what one adapter has and another has not.
    digest = hashlib.sha256(changes.encode())
    samples = []
    for name, array in tensors:
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        # By rows: a stack of experts has more elements than an index of MLX can count.
        rows = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
        step = max(1, rows.shape[0] // SAMPLED_ROWS)
        samples.append(rows[::step][:SAMPLED_ROWS, :SAMPLED_COLUMNS].reshape(-1).view(mx.uint8))
    if samples:
        digest.update(np.array(mx.concatenate(samples)).tobytes())
    return digest.hexdigest()
