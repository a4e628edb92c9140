"""Tensor names, without the prefixes of different programs."""

import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import dropwhile
from typing import TypeVar

from ..errors import CheckpointError

T = TypeVar("T")

# Leading components without a meaning, in any number and order.
PREFIXES = ("model", "language_model", "module", "base_model")
# Components that torch.compile and FSDP insert anywhere.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
TRUNK = ("embed_tokens", "layers", "norm")
# Part of the name of each stack of experts.
OF_EXPERTS = ".switch_mlp."
# The prefixes of the vision tower in MLX programs and in Hugging Face.
TOWER = "vision_tower."
TOWERS = (TOWER, "visual.")
ROOTS = (*TRUNK, "lm_head", "visual", "vision_tower", "mtp")


@lru_cache(2**16)
def bare(name: str) -> str:
    """`model.language_model.layers.0.x` -> `layers.0.x`; an unknown name stays as it is."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    parts = list(dropwhile(lambda part: part in PREFIXES, parts))
    return ".".join(parts) if parts and parts[0] in ROOTS else name


def is_of_tower(name: str) -> bool:
    """Whether a tensor belongs to a vision tower."""
    return bare(name).startswith(TOWERS)


def is_mtp(name: str) -> bool:
    """Whether a tensor belongs to the MTP layer."""
    return bare(name).startswith("mtp.")


def by_bare_name(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors under their bare names; refuses two tensors with the same one."""
    names: dict[str, str] = {}
    for name in tensors:
        other = names.setdefault(bare(name), name)
        if other != name:
            raise CheckpointError(
                f"two tensors are named {bare(name)} once prefixes are left out",
                got=f"{other} and {name}",
                expected="one of them",
            )
    return {short: tensors[name] for short, name in names.items()}


def output_name(short: str) -> str:
    """The name in mlx-lm and mlx-vlm for a bare name."""
    root = short.partition(".")[0]
    if root in TRUNK:
        return f"language_model.model.{short}"
    return f"language_model.{short}" if root == "lm_head" else short


def fold(name: str) -> str:
    """The name with layer and expert numbers replaced by `*`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]
