"""Tensor split: the part of each tensor that a process holds if several run one model.

Layers are split by heads and by feed-forward widths. Embeddings, head, vision tower and MTP layer
are whole on rank 0; the other ranks get hidden states from it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..config import FULL, LINEAR, ModelConfig
from ..errors import Qwen35Error

LAYERS = "language_model.model.layers."
NORM = "language_model.model.norm."
PARTS = ("weight", "scales", "biases", "bias")
Range = tuple[int, int]


class Cut(NamedTuple):
    """Ranges of an axis with `total` places; arrays of scales and packed words have fewer."""

    axis: int
    total: int
    ranges: tuple[Range, ...]

    def places(self, shape: Sequence[int]) -> list[Range]:
        """The ranges in an array of this shape."""
        length = shape[self.axis]
        return [(a * length // self.total, b * length // self.total) for a, b in self.ranges]

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the part of an array with this shape."""
        kept = list(shape)
        kept[self.axis] = sum(b - a for a, b in self.places(shape))
        return tuple(kept)


@dataclass
class Sharding:
    """The part of process `rank` of `size`.

    `group_sizes`: group sizes of quantized modules by name; no group may be split. What cannot be
    split is whole on every rank, and is not in `splits`. Raises if nothing can be split.
    """

    config: ModelConfig
    rank: int
    size: int
    group_sizes: Mapping[str, int]
    # Some of: attention, linear, mlp, experts (by width), whole experts, shared expert.
    splits: set[str] = field(default_factory=set)
    # The config of this part, with its numbers of heads and its widths.
    local: ModelConfig = field(init=False)
    # The experts of this part, if whole experts are distributed.
    experts: Range | None = None

    def __post_init__(self) -> None:
        self.cuts: dict[str, Cut] = {}
        self.local = self.config
        config = self.config
        if FULL in config.layer_types:
            self._split_attention()
        if LINEAR in config.layer_types:
            self._split_linear()
        if config.is_moe:
            self._split_experts()
        elif width := self._width(config.intermediate_size, ".mlp"):
            self._add("mlp", intermediate_size=width[1] - width[0])
            self._cut_mlp("mlp", config.intermediate_size, width)
        if not self.splits:
            columns = config.intermediate_size or config.moe_intermediate_size
            raise Qwen35Error(
                f"the model cannot be split on {self.size} Macs",
                got=f"{config.num_attention_heads} attention heads, {config.linear_num_value_heads}"
                f" linear value heads, feed-forward width {columns}",
                expected="a number that divides the heads, or the width in whole groups of weights",
                hint="2, 4 and 8 divide the released models",
            )

    def cut(self, name: str) -> Cut | None:
        """The cut of a parameter, by its name on disk; None if it is whole."""
        if not name.startswith(LAYERS):
            return None
        inner = name.removeprefix(LAYERS).partition(".")[2]
        module, _, last = inner.rpartition(".")
        return self.cuts.get(module if last in PARTS else inner)

    def holds(self, name: str) -> bool:
        """Whether this rank has any of the parameter."""
        return self.rank == 0 or name.startswith((LAYERS, NORM))

    def name_here(self, name: str) -> str:
        """A parameter's name in the model of this rank."""
        return name

    @property
    def note(self) -> str:
        """Large parts that are whole on every rank, for the user; empty if there are none."""
        c, kinds = self.config, list[str]()
        if FULL in c.layer_types and "attention" not in self.splits:
            kinds.append(f"attention ({c.num_attention_heads} heads)")
        if LINEAR in c.layer_types and "linear" not in self.splits:
            kinds.append(f"linear attention ({c.linear_num_value_heads} value heads)")
        if not self.splits & {"mlp", "experts", "whole experts"}:
            width = c.intermediate_size or c.moe_intermediate_size
            kinds.append(f"feed-forward (width {width})")
        return f"whole on each of {self.size} Macs: {', '.join(kinds)}" if kinds else ""

    def _add(self, kind: str, **sizes: Any) -> None:
        self.splits.add(kind)
        self.local = replace(self.local, **sizes)

    def _part(self, count: int) -> Range | None:
        """This rank's part of `count` items; None if they cannot be divided equally."""
        part = count // self.size
        return None if not part or count % self.size else (self.rank * part, (self.rank + 1) * part)

    def _width(self, width: int, parent: str) -> Range | None:
        """This rank's part of a feed-forward width, in whole quantization groups."""
        return self._in_groups(self._part(width), 1, f"{parent}.down_proj")

    def _in_groups(self, part: Range | None, item: int, module: str) -> Range | None:
        """The part, if its columns (`item` for each place) are whole groups of the module."""
        sizes = [
            g for n, g in self.group_sizes.items() if n.startswith(LAYERS) and n.endswith(module)
        ]
        whole = part is not None and (part[1] - part[0]) * item % max(sizes, default=1) == 0
        return part if whole else None

    def _heads(self, groups: int, heads: int, dim: int, out: str) -> tuple[Range, Range] | None:
        """Key heads and query heads of this rank; several ranks may have the same key head."""
        part = self._in_groups(self._part(heads), dim, out)
        if part is None:
            return None
        if self.size % groups == 0:
            first = self.rank * groups // self.size
            return (first, first + 1), part
        shared = self._part(groups)
        return shared and (shared, part)

    def _split_attention(self) -> None:
        c = self.config
        found = self._heads(
            c.num_key_value_heads, c.num_attention_heads, c.head_dim, "self_attn.o_proj"
        )
        if found is None:
            return
        keys, queries = found
        self._add(
            "attention",
            num_attention_heads=queries[1] - queries[0],
            num_key_value_heads=keys[1] - keys[0],
        )
        of_queries = c.num_attention_heads, (queries,)
        self.cuts["self_attn.q_proj"] = Cut(0, *of_queries)
        self.cuts["self_attn.o_proj"] = Cut(-1, *of_queries)
        for name in ("k_proj", "v_proj"):
            self.cuts[f"self_attn.{name}"] = Cut(0, c.num_key_value_heads, (keys,))

    def _split_linear(self) -> None:
        c = self.config
        heads = c.linear_num_key_heads, c.linear_num_value_heads
        found = self._heads(*heads, c.linear_value_head_dim, "linear_attn.out_proj")
        if found is None:
            return
        keys, values = found
        self._add(
            "linear",
            linear_num_key_heads=keys[1] - keys[0],
            linear_num_value_heads=values[1] - values[0],
        )
        # The channels of q, then k, then v.
        dim_k, dim_v = c.linear_key_head_dim, c.linear_value_head_dim
        parts = [(0, keys, dim_k), (heads[0] * dim_k, keys, dim_k)]
        parts.append((2 * heads[0] * dim_k, values, dim_v))
        channels = tuple((at + a * dim, at + b * dim) for at, (a, b), dim in parts)
        for name in ("in_proj_qkv", "conv1d"):
            self.cuts[f"linear_attn.{name}"] = Cut(0, c.conv_dim, channels)
        for name in ("in_proj_z", "in_proj_b", "in_proj_a", "A_log", "dt_bias"):
            self.cuts[f"linear_attn.{name}"] = Cut(0, heads[1], (values,))
        self.cuts["linear_attn.out_proj"] = Cut(-1, heads[1], (values,))

    def _split_experts(self) -> None:
        c = self.config
        if width := self._width(c.moe_intermediate_size, "switch_mlp"):
            self._add("experts", moe_intermediate_size=width[1] - width[0])
            self._cut_mlp("mlp.switch_mlp", c.moe_intermediate_size, width, first=1)
        elif part := self._part(c.num_experts):
            self.splits.add("whole experts")
            self.experts = part
            for name in ("gate_proj", "up_proj", "down_proj"):
                self.cuts[f"mlp.switch_mlp.{name}"] = Cut(0, c.num_experts, (part,))
        else:
            return
        # If it is not split, only rank 0 adds its output.
        if width := self._width(c.shared_expert_intermediate_size, "shared_expert"):
            self._add("shared expert", shared_expert_intermediate_size=width[1] - width[0])
            self._cut_mlp("mlp.shared_expert", c.shared_expert_intermediate_size, width)

    def _cut_mlp(self, module: str, width: int, part: Range, first: int = 0) -> None:
        for name in ("gate_proj", "up_proj"):
            self.cuts[f"{module}.{name}"] = Cut(first, width, (part,))
        self.cuts[f"{module}.down_proj"] = Cut(-1, width, (part,))
