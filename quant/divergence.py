"""Divergence of a quantized model's predictions from its reference: KL, agreement, perplexity."""

import math
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np


def log_probabilities(logits: mx.array) -> mx.array:
    """Logits `[..., vocab]` -> log probabilities in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def kl_divergence(reference: mx.array, quantized: mx.array) -> mx.array:
    """KL(reference || quantized) of logits `[..., vocab]`: nats `[...]`, at least 0."""
    return _kl(log_probabilities(reference), log_probabilities(quantized))


def _kl(p: mx.array, q: mx.array) -> mx.array:
    return mx.maximum((mx.exp(p) * (p - q)).sum(axis=-1), 0)


@dataclass
class Divergence:
    """Figures of each token; the properties summarize them."""

    kls: list[np.ndarray] = field(default_factory=list)
    agreements: list[np.ndarray] = field(default_factory=list)
    # Cross-entropy of the next token in nats; the last position of a text has no next token.
    reference_losses: list[np.ndarray] = field(default_factory=list)
    quantized_losses: list[np.ndarray] = field(default_factory=list)

    def add(self, reference: mx.array, quantized: mx.array, following: mx.array) -> None:
        """Add logits `[N, vocab]` of both models; `following [N]`: the next ids, -1 for none."""
        p, q = log_probabilities(reference), log_probabilities(quantized)
        known = np.array(following) >= 0
        ids = mx.maximum(following, 0)[:, None]
        self.kls.append(np.array(_kl(p, q)))
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
        """The 99th percentile of KL over tokens, in nats."""
        return float(np.percentile(np.concatenate(self.kls), 99))

    @property
    def top1_agreement(self) -> float:
        """The share of tokens for which both models have the same most likely next token."""
        return float(np.concatenate(self.agreements).mean())

    @property
    def perplexities(self) -> tuple[float, float]:
        """Perplexity of the reference and of the quantized model; NaN for a single token."""
        return _perplexity(self.reference_losses), _perplexity(self.quantized_losses)


def _perplexity(losses: list[np.ndarray]) -> float:
    nats = np.concatenate(losses)
    return float(np.exp(nats.mean(dtype=np.float64))) if len(nats) else math.nan
