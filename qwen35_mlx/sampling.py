"""Sampling parameters: their ranges, the presets, and the defaults of a checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from .errors import Qwen35Error


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0, top_p 1, min_p 0, repetition 1, other penalties 0: off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value):
                raise Qwen35Error(f"{name} is not usable", got=repr(value), expected="a number")
        checks = (
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0 and int(self.top_k) == self.top_k, "0 (off) or more"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("presence_penalty", -10 <= self.presence_penalty <= 10, "from -10 to 10"),
            ("frequency_penalty", -10 <= self.frequency_penalty <= 10, "from -10 to 10"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 is off"),
        )
        for name, is_fine, expected in checks:
            if not is_fine:
                raise Qwen35Error(
                    f"{name} is not usable", got=getattr(self, name), expected=expected
                )

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> "SamplingParams":
        """The defaults a checkpoint recommends; without `do_sample` it decodes greedily."""
        names = cls.__dataclass_fields__
        given = {name: config[name] for name in names if config.get(name) is not None}
        # Also what is not used below.
        cls(**given)
        samples = config.get("do_sample") or False
        if not isinstance(samples, bool):
            raise Qwen35Error(
                "do_sample is not usable", got=repr(samples), expected="true or false"
            )
        if not samples:
            given = {k: v for k, v in given.items() if k.endswith("_penalty")}
        elif "temperature" not in given:
            given["temperature"] = 1.0
        return cls(**given)

    def updated(self, **changes: Any) -> "SamplingParams":
        """A copy in which every argument that is not None replaces the default."""
        try:
            return replace(self, **{k: v for k, v in changes.items() if v is not None})
        except TypeError:
            known = self.__dataclass_fields__
            raise Qwen35Error(
                "unknown sampling option",
                got=", ".join(name for name in changes if name not in known),
                expected=", ".join(known),
            ) from None


# Recommended by the authors of Qwen3.5.
PRESETS = {
    "thinking": SamplingParams(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=1.5),
    "coding": SamplingParams(temperature=0.6, top_p=0.95, top_k=20),
    "instruct": SamplingParams(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5),
}
# Two more names: by whether the model thinks, and from generation_config.json.
AUTO, CHECKPOINT = "auto", "checkpoint"


def preset_params(preset: str, thinking: bool, checkpoint: SamplingParams) -> SamplingParams:
    """The parameters of a preset; auto is thinking or instruct."""
    if preset == CHECKPOINT:
        return checkpoint
    name = ("thinking" if thinking else "instruct") if preset == AUTO else preset
    if name not in PRESETS:
        raise Qwen35Error(
            "unknown preset", got=preset, expected=", ".join((*PRESETS, AUTO, CHECKPOINT))
        )
    return PRESETS[name]
