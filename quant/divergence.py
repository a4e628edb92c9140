"""How far a quantized model's predictions are from those of its reference."""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np


def log_probabilities(logits: mx.array) -> mx.array:
    """Logits `[..., vocab]` -> log probabilities in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def kl_divergence(reference: mx.array, quantized: mx.array) -> mx.array:
    """KL(reference || quantized) in nats of logits `[..., vocab]` -> `[...]`, never below 0."""
    p, q = log_probabilities(reference), log_probabilities(quantized)
    return mx.maximum((mx.exp(p) * (p - q)).sum(axis=-1), 0)


@dataclass
class Divergence:
    """Collects token by token; the totals are properties."""

    kls: list[np.ndarray] = field(default_factory=list)
    agreements: list[np.ndarray] = field(default_factory=list)
    # Of the tokens that really follow; the last position of a text has none.
    reference_losses: list[np.ndarray] = field(default_factory=list)
    quantized_losses: list[np.ndarray] = field(default_factory=list)

    def add(self, reference: mx.array, quantized: mx.array, following: mx.array) -> None:
        """Logits `[N, vocab]` of both, and the id that follows each, -1 where none does."""
        p, q = log_probabilities(reference), log_probabilities(quantized)
        known = np.array(following) >= 0
        ids = mx.maximum(following, 0)[:, None]
        self.kls.append(np.array(mx.maximum((mx.exp(p) * (p - q)).sum(axis=-1), 0)))
        self.agreements.append(np.array(mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)))
        for logs, losses in ((p, self.reference_losses), (q, self.quantized_losses)):
            losses.append(-np.array(mx.take_along_axis(logs, ids, axis=-1))[:, 0][known])

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.kls))

    @property
    def mean_kl(self) -> float:
        """Nats per token."""
        return float(np.concatenate(self.kls).mean(dtype=np.float64))

    @property
    def p99_kl(self) -> float:
        """99 of 100 tokens have at most this, in nats."""
        return float(np.percentile(np.concatenate(self.kls), 99))

    @property
    def top1_agreement(self) -> float:
        """Share of tokens where both would say the same, greedily."""
        return float(np.concatenate(self.agreements).mean())

    @property
    def perplexities(self) -> tuple[float, float]:
        """Of the reference and of the quantized model on the text; NaN for a single token."""
        reference, quantized = map(np.concatenate, (self.reference_losses, self.quantized_losses))
        if not len(reference):
            return float("nan"), float("nan")
        return float(np.exp(reference.mean(dtype=np.float64))), float(
            np.exp(quantized.mean(dtype=np.float64))
        )
