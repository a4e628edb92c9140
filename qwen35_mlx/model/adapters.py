"""Adapters on a model: LoRA and DoRA for plain, quantized and stacked matrices.

E experts, r rank. Parameters have mlx-lm's names. The matrices of the model do not change.
"""

import copy
from collections.abc import Collection
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.adapter import DORA, LORA, Adapter, Change
from ..checkpoint.names import OF_EXPERTS
from ..errors import CheckpointError, Qwen35Error
from ..kernels.switch import QuantizedSwitchLinear, SwitchLinear
from .language import Model
from .ring import no_adapter

MATRIX, STACK = (nn.Linear, nn.QuantizedLinear), (SwitchLinear, QuantizedSwitchLinear)
LAYER = "language_model.model.layers."
# Matrices of a layer that a new adapter changes; and the routed experts, on request.
DEFAULT_KEYS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    *(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
)
EXPERT_KEYS = tuple(f"mlp.switch_mlp.{name}_proj" for name in ("gate", "up", "down"))


class LoRALinear(nn.Module):
    """`linear(x) + scale * x @ lora_a @ lora_b`; lora_a `[in, r]`, lora_b `[r, out]`."""

    def __init__(self, linear: nn.Module, change: Change, dropout: float = 0.0):
        super().__init__()
        self.linear = linear
        self.lora_a, self.lora_b = change.lora_a, change.lora_b
        self.scale = change.scale
        self.dropout = nn.Dropout(dropout)

    def __call__(self, x: mx.array) -> mx.array:
        """`[..., in]` -> `[..., out]`."""
        return self.linear(x) + self._added(x)

    def _added(self, x: mx.array) -> mx.array:
        # In the type of x: otherwise training keeps a float32 copy of x.
        a, b = self["lora_a"].astype(x.dtype), self["lora_b"].astype(x.dtype)
        return self.scale * ((self.dropout(x) @ a) @ b)

    def change(self) -> Change:
        """The change, for an adapter's file."""
        return Change(self.lora_a, self.lora_b, self.scale)


class DoRALinear(LoRALinear):
    """LoRA with each row of the changed matrix scaled to the norm `m` (arXiv 2402.09353)."""

    def __init__(self, linear: nn.Module, change: Change, dropout: float = 0.0):
        super().__init__(linear, change, dropout)
        self._fixed_norms: mx.array | None = None
        self.m = self._norms() if change.magnitudes is None else change.magnitudes

    def __call__(self, x: mx.array) -> mx.array:
        """`[..., in]` -> `[..., out]`."""
        norms = self._norms() if self._fixed_norms is None else self._fixed_norms
        # As in the paper, no gradient goes through the norms.
        factors = (self["m"] / mx.stop_gradient(norms)).astype(x.dtype)
        out, bias = self.linear(x), self.linear.get("bias")
        if bias is None:
            return factors * (out + self._added(x))
        return factors * (out - bias + self._added(x)) + bias

    def fix(self) -> None:
        """Compute the norms once, for inference."""
        self._fixed_norms = self._norms()
        mx.eval(self._fixed_norms)

    def _norms(self) -> mx.array:
        delta = self.scale * (self["lora_b"].T @ self["lora_a"].T)
        return mx.linalg.norm(dense_weight(self.linear).astype(mx.float32) + delta, axis=1)

    def change(self) -> Change:
        """The change, for an adapter's file."""
        return Change(self.lora_a, self.lora_b, self.scale, self.m)


class LoRASwitchLinear(LoRALinear):
    """LoRA of each expert of a stack; lora_a `[E, r, in]`, lora_b `[E, out, r]`."""

    def __call__(  # type: ignore[override]
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False
    ) -> mx.array:
        """x `[..., 1, in]`, expert indices `[...]` -> `[..., 1, out]`."""
        low_rank = self.dropout(x)
        for name in ("lora_a", "lora_b"):
            low_rank = mx.gather_mm(
                low_rank,
                self[name].astype(x.dtype).swapaxes(-1, -2),
                rhs_indices=indices,
                sorted_indices=sorted_indices,
            )
        out = self.linear(x, indices, sorted_indices)
        return out + self.scale * low_rank


def attach(module: nn.Module, adapter: Adapter) -> None:
    """Wrap the matrices of a module that the adapter changes.

    Raises CheckpointError if a change does not fit any matrix.
    """
    matrices = {name: found for name, found in module.named_modules() if name in adapter.changes}
    problems = []
    for name, change in adapter.changes.items():
        base = matrices.get(name)
        if not isinstance(base, (*MATRIX, *STACK)):
            problems.append(f"{name}: no such matrix")
        elif weight_shape(base) != change.shape:
            problems.append(f"{name}: {list(weight_shape(base))}, not {list(change.shape)}")
    if problems:
        raise CheckpointError(
            "the adapter does not fit the model",
            got="".join(f"\n    {problem}" for problem in problems[:6]),
            expected=f"the model that it was trained on, for all {len(adapter.changes)} matrices",
        )
    for name, change in adapter.changes.items():
        wrapped = wrap(matrices[name], change)
        if isinstance(wrapped, DoRALinear):
            wrapped.fix()
        replace_module(module, name, wrapped)


def attach_to_model(model: Model, adapter: Adapter) -> None:
    """Attach an adapter to a model that has none, before any cache is made with it."""
    if model.adapter_digest:
        # A cache in memory is valid for one model and adapter.
        raise Qwen35Error(
            "the model has an adapter", expected="one adapter a model", hint="load the model again"
        )
    if model.ring is not None:
        raise no_adapter(f"one of {len(adapter.changes)} matrices")
    if model.experts and any(OF_EXPERTS in name for name in adapter.changes):
        raise Qwen35Error(
            "the adapter changes experts, of which some are on disk only",
            got=f"memory for {model.experts.num_slots} of {model.experts.num_experts}",
            expected="an adapter of other layers, or memory for all experts",
            hint="fuse it: qwen35-mlx fuse",
        )
    attach(model, adapter)
    # Changed matrices run without kernels.
    model._exact_rows = None
    model.adapter_digest = adapter.digest


def with_adapter(model: Model, adapter: Adapter) -> Model:
    """A second model with an adapter; both share all weights of the first.

    Each needs its own caches.
    """
    twin = _twin(model)
    attach_to_model(twin, adapter)
    # Arrays that are not evaluated cannot be used by another thread.
    mx.eval(twin.parameters())
    return twin


def _twin(part: Any) -> Any:
    """A copy of the modules that shares their arrays."""
    if isinstance(part, nn.Module):
        twin = copy.copy(part)
        for name, value in part.items():
            dict.__setitem__(twin, name, _twin(value))
        return twin
    return [_twin(value) for value in part] if isinstance(part, list) else part


def wrap(base: nn.Module, change: Change, dropout: float = 0.0, kind: str = LORA) -> LoRALinear:
    """The matrix wrapped with a change."""
    if isinstance(base, STACK):
        return LoRASwitchLinear(base, change, dropout)
    is_dora = kind == DORA or change.magnitudes is not None
    return (DoRALinear if is_dora else LoRALinear)(base, change, dropout)


def add_new(
    model: Model, keys: Collection[str], num_layers: int, rank: int, scale: float, **kind: Any
) -> list[str]:
    """Freeze the model and add new changes, zero at first, to its last layers.

    `kind` as in `wrap`. Returns the names of the wrapped modules.
    """
    model.freeze()
    num_all, names = len(model.layers), []
    for index in range(num_all - num_layers, num_all):
        for key, base in model.layers[index].named_modules():
            if key not in keys or not isinstance(base, (*MATRIX, *STACK)):
                continue
            *experts, out_dims, in_dims = weight_shape(base)
            shapes = (
                ((*experts, rank, in_dims), (*experts, out_dims, rank))
                if experts
                else ((in_dims, rank), (rank, out_dims))
            )
            bound = in_dims**-0.5
            change = Change(mx.random.uniform(-bound, bound, shapes[0]), mx.zeros(shapes[1]), scale)
            names.append(f"{LAYER}{index}.{key}")
            replace_module(model, names[-1], wrap(base, change, **kind))
    return names


def changes_of(module: nn.Module) -> dict[str, Change]:
    """All changes in a module, by the names of the matrices."""
    return {
        name: found.change()
        for name, found in module.named_modules()
        if isinstance(found, LoRALinear)
    }


def weight_shape(base: nn.Module) -> tuple[int, ...]:
    """Shape of the unquantized matrix or stack, without its change."""
    base = base.linear if isinstance(base, LoRALinear) else base
    weight = base["weight"]
    if "scales" not in base:
        return tuple(weight.shape)
    return (*weight.shape[:-1], base["scales"].shape[-1] * base.group_size)


def dense_weight(linear: nn.Module) -> mx.array:
    """The matrix of a linear layer; a copy if it is quantized."""
    if "scales" not in linear:
        return linear["weight"]
    return mx.dequantize(
        linear["weight"],
        linear["scales"],
        linear.get("biases"),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    )


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at `path`."""
    parent: Any = root
    *parents, last = path.split(".")
    for part in parents:
        parent = parent[int(part)] if isinstance(parent, list) else parent[part]
    parent[last] = module
