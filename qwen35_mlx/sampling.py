"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, in that order.

The order is that of transformers, whose generation_config.json gives the defaults.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import mlx.core as mx

from .errors import Qwen35Error

MAX_SEED = 2**63 - 1
# Dividing logits by less than this would overflow float32.
GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0, top_p 1, min_p 0, presence 0 and repetition 1 are off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not isinstance(value, Real) or not math.isfinite(value):
                raise Qwen35Error(f"{name} is not usable", got=repr(value), expected="a number")
        checks = (
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0 and int(self.top_k) == self.top_k, "0 (off) or more"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("presence_penalty", -10 <= self.presence_penalty <= 10, "from -10 to 10"),
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
        if not config.get("do_sample", False):
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


# What the authors of Qwen3.5 recommend for each kind of work.
PRESETS = {
    "thinking": SamplingParams(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=1.5),
    "coding": SamplingParams(temperature=0.6, top_p=0.95, top_k=20),
    "instruct": SamplingParams(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5),
}
# Besides their names: as the mode asks, and as generation_config.json says.
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


class Sampler:
    """Draws tokens one after another; remembers what the penalties need, all on the device."""

    def __init__(self, params: SamplingParams, prompt: mx.array, seed: int | None = None):
        """prompt: ids `[T]`; the repetition penalty counts them, the presence penalty does not."""
        if seed is not None and not (isinstance(seed, Integral) and 0 <= seed <= MAX_SEED):
            raise Qwen35Error("seed is not usable", got=repr(seed), expected=f"0 to {MAX_SEED}")
        self.params = params
        self._key = mx.random.key(secrets.randbits(63) if seed is None else int(seed))
        self._prompt = prompt
        self._in_text: mx.array | None = None
        self._in_answer: mx.array | None = None
        self._answered: mx.array | None = None

    def penalise_repeats(self, penalty: float, answered: Sequence[int]) -> None:
        """From now on with this presence penalty; `answered` are the ids said so far."""
        self.params = self.params.updated(presence_penalty=penalty)
        self._answered = mx.array(list(answered), dtype=mx.int32)
        self._in_answer = None

    def __call__(self, logits: mx.array) -> mx.array:
        """logits `[1, V]` -> token `[1]`; nothing is evaluated here."""
        logits = self._penalise(logits.astype(mx.float32))
        if self.params.temperature < GREEDY_BELOW:
            token = mx.argmax(logits, axis=-1)
        else:
            self._key, key = mx.random.split(self._key)
            token = draw(logits / self.params.temperature, self.params, key)
        if self._in_answer is not None:
            self._in_answer[token] = True
        if self._in_text is not None:
            self._in_text[token] = True
        return token

    def _penalise(self, logits: mx.array) -> mx.array:
        params, vocab = self.params, logits.shape[-1]
        if params.repetition_penalty != 1.0:
            if self._in_text is None:
                self._in_text = mx.zeros(vocab, dtype=mx.bool_)
                self._in_text[self._prompt] = True
            weaker = mx.where(
                logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty
            )
            logits = mx.where(self._in_text, weaker, logits)
        if params.presence_penalty != 0.0:
            if self._in_answer is None:
                self._in_answer = mx.zeros(vocab, dtype=mx.bool_)
                if self._answered is not None:
                    self._in_answer[self._answered] = True
            logits = logits - params.presence_penalty * self._in_answer
        return logits


def draw(logits: mx.array, params: SamplingParams, key: mx.array) -> mx.array:
    """A token `[1]` from logits `[1, V]`, temperature already applied."""
    vocab = logits.shape[-1]
    if params.top_k == 0 and params.top_p == 1.0 and params.min_p == 0.0:
        return mx.random.categorical(logits, key=key)
    if 0 < params.top_k < vocab:
        # Only the candidates are sorted: the vocabulary has a quarter of a million entries.
        ids = mx.argpartition(-logits, kth=params.top_k - 1, axis=-1)[..., : params.top_k]
        logits = mx.take_along_axis(logits, ids, axis=-1)
        order = mx.argsort(-logits, axis=-1)
        ids = mx.take_along_axis(ids, order, axis=-1)
    else:
        ids = order = mx.argsort(-logits, axis=-1)
    logits = mx.take_along_axis(logits, order, axis=-1)
    if params.top_p < 1.0:
        probabilities = mx.softmax(logits, axis=-1)
        before = mx.cumsum(probabilities, axis=-1) - probabilities
        logits = mx.where(before < params.top_p, logits, -mx.inf)
    if params.min_p > 0.0:
        probabilities = mx.softmax(logits, axis=-1)
        logits = mx.where(probabilities >= params.min_p * probabilities[..., :1], logits, -mx.inf)
    choice = mx.random.categorical(logits, key=key)
    return mx.take_along_axis(ids, choice[..., None], axis=-1)[..., 0]
