"""One process's part of a model: its slices of the weights, and sums over all processes."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..checkpoint.headers import ITEM_BYTES, SourceTensor
from ..checkpoint.pipeline import Pipeline, divide
from ..checkpoint.sharding import Cut, Sharding
from ..errors import CheckpointError
from ..kernels.matrix import MAX_ROWS, arrays_of
from ..kernels.router import Routing
from ..machine import GIB
from .expert_files import STORED

if TYPE_CHECKING:
    from .language import Model

# Shorter pieces are copied from mapped pages, because a read call for each would take longer.
PIECE_BYTES = 4096
# Bytes mapped at a time.
MAPPED_BYTES = 8 * 2**20


def joined(partial: mx.array, residual: mx.array, group: mx.distributed.Group | None) -> mx.array:
    """`residual` + the sum of `partial` over all processes; without a group, `partial` has both.

    A sum of few rows has a fixed order, so that each row has the same bits as alone.
    """
    if group is None:
        return partial
    if group.size() > 2 and partial.size // partial.shape[-1] <= MAX_ROWS:
        return residual + mx.distributed.all_gather(partial[None], group=group).sum(axis=0)
    return residual + mx.distributed.all_sum(partial, group=group)


class OwnExperts:
    """Restricts a routing to this process's experts: scores of the others become 0."""

    def __init__(self, experts: tuple[int, int] | None, adds_shared: bool):
        self.experts, self.adds_shared = experts, adds_shared

    def __call__(self, routing: Routing) -> Routing:
        indices, scores, shared = routing
        if self.experts is not None:
            first, end = self.experts
            is_own = (indices >= first) & (indices < end)
            indices = mx.where(is_own, indices - first, 0).astype(indices.dtype)
            scores = mx.where(is_own, scores, 0).astype(scores.dtype)
        return Routing(indices, scores, shared if self.adds_shared else mx.zeros_like(shared))


class Stages:
    """Passes hidden states through the processes if each has some of the layers."""

    def __init__(self, group: mx.distributed.Group):
        self._group, self._rank, self._size = group, group.rank(), group.size()
        self.has_last_layer = self._rank == self._size - 1

    def enter(self, x: mx.array) -> mx.array:
        """The embeddings on rank 0, else the hidden states from the previous process."""
        self._dtype = x.dtype
        return self._received(x, self._rank - 1) if self._rank else x

    def leave(self, x: mx.array, last_only: bool) -> mx.array:
        """Send the hidden states to the next process; rank 0 returns those of the last process."""
        x = x.astype(self._dtype)
        mx.async_eval(mx.distributed.send(x, (self._rank + 1) % self._size, group=self._group))
        if self._rank:
            return x
        return self._received(x[:, -1:] if last_only else x, self._size - 1)

    def _received(self, like: mx.array, source: int) -> mx.array:
        x = mx.distributed.recv_like(like, source, group=self._group)
        if like.shape[1] > MAX_ROWS:
            # macOS ends GPU commands that wait for seconds.
            mx.eval(x)
        return x


def shard(
    model: "Model",
    group: mx.distributed.Group,
    nbytes: Mapping[str, int] | None = None,
    limits: Sequence[int] | None = None,
    by_layers: bool = False,
) -> Sharding | Pipeline:
    """Reduce a model to the part of this process, in place; lazy arrays stay lazy.

    `nbytes`, `limits` and `by_layers` as in `divide`.
    """
    found = {n: m.group_size for n, m in model.named_modules() if hasattr(m, "group_size")}
    parameters = arrays_of(model.parameters())
    nbytes = nbytes or {name: array.nbytes for name, array in parameters.items()}
    limits = limits or [2**20 * GIB] * group.size()
    sharding = divide(model.config, group.rank(), limits, nbytes, found, by_layers)
    if isinstance(sharding, Pipeline):
        model.language_model.model.keep_layers(*sharding.layers, Stages(group))
    else:
        _cut(model, group, sharding, parameters)
    model.config = sharding.local
    if group.rank():
        model.language_model.model.pop("embed_tokens")
        model.language_model.pop("lm_head", None)
        model.vision_tower = model.mtp = None
    return sharding


def _cut(
    model: "Model",
    group: mx.distributed.Group,
    sharding: Sharding,
    parameters: Mapping[str, mx.array],
) -> None:
    """Keep a part of each layer."""
    cuts = [(name, array, sharding.cut(name)) for name, array in parameters.items()]
    kept = [(name, taken(array, cut)) for name, array, cut in cuts if cut]
    model.load_weights(kept, strict=False)
    local, splits = sharding.local, sharding.splits
    adds_shared = "shared expert" in splits or group.rank() == 0
    for layer in model.layers:
        if layer.is_linear:
            if "linear" in splits:
                layer.linear_attn.set_heads(local)
                layer.linear_attn.group = group
        elif "attention" in splits:
            layer.self_attn.set_heads(local)
            layer.self_attn.group = group
        if splits & {"mlp", "experts", "whole experts"}:
            layer.mlp.group = group
            if sharding.experts is not None or not adds_shared:
                layer.mlp.own_experts = OwnExperts(sharding.experts, adds_shared)


def taken(array: mx.array, cut: Cut) -> mx.array:
    """The cut's ranges of an array, concatenated."""
    axis = cut.axis % array.ndim
    before = (slice(None),) * axis
    parts = [array[(*before, slice(a, b))] for a, b in cut.places(array.shape)]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)


def read_cut(tensor: SourceTensor, cut: Cut) -> mx.array:
    """The cut's ranges of a tensor in a file, concatenated; reads little else of it."""
    axis = cut.axis % len(tensor.shape)
    places, item = cut.places(tensor.shape), ITEM_BYTES[tensor.dtype]
    # [outer, axis, inner] in bytes.
    outer, inner = prod(tensor.shape[:axis]), prod(tensor.shape[axis + 1 :]) * item
    held = np.empty((outer, sum(b - a for a, b in places) * inner), np.uint8)
    at = 0
    for first, end in places:
        piece = held[:, at : at + (end - first) * inner]
        _fill(piece, tensor, tensor.shape[axis] * inner, first * inner)
        at += piece.shape[1]
    stored, dtype = STORED[tensor.dtype]
    return mx.array(held.view(stored).reshape(cut.shape(tensor.shape))).view(dtype)


def _fill(pieces: np.ndarray, tensor: SourceTensor, pitch: int, first: int) -> None:
    """Read pieces `[N, bytes]` that are `pitch` bytes apart in the file, from `first` on."""
    start, (number, length) = tensor.offset + first, pieces.shape
    if length >= PIECE_BYTES:
        with tensor.file.open("rb", buffering=0) as file:
            for row in range(number):
                file.seek(start + row * pitch)
                rest = memoryview(pieces[row])
                while rest:
                    num_read = file.readinto(rest)
                    if not num_read:
                        raise _shorter(tensor)
                    rest = rest[num_read:]
        return
    step = max(1, MAPPED_BYTES // pitch)
    for row in range(0, number, step):
        rows = min(step, number - row)
        size = (rows - 1) * pitch + length
        try:
            mapped = np.memmap(tensor.file, np.uint8, "r", start + row * pitch, (size,))
        except ValueError:
            raise _shorter(tensor) from None
        strided = np.lib.stride_tricks.as_strided(mapped, (rows, length), (pitch, 1))
        copy_mapped(pieces[row : row + rows], strided)


def _shorter(tensor: SourceTensor) -> CheckpointError:
    return CheckpointError(f"{tensor.file.name} is shorter than it was", hint="copy it again")


def copy_mapped(target: np.ndarray, mapped: np.ndarray) -> None:
    """Copy from mapped pages."""
    target[:] = mapped
