"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, in that order.

The order is that of transformers.
"""

import secrets
from collections.abc import Sequence
from numbers import Integral

import mlx.core as mx

from ..errors import Qwen35Error
from ..sampling import SamplingParams

MAX_SEED = 2**63 - 1
# Dividing logits by less than this would overflow float32.
GREEDY_BELOW = 1e-5


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
            return mx.argmax(logits, axis=-1)
        self._key, key = mx.random.split(self._key)
        return draw(logits / self.params.temperature, self.params, key)

    def accept(self, tokens: mx.array) -> None:
        """Count `tokens` `[N]`, drawn or forced, as part of the answer."""
        if self._in_answer is not None:
            self._in_answer[tokens] = True
        if self._in_text is not None:
            self._in_text[tokens] = True

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
