"""Multi-token prediction: a layer that drafts from the trunk's hidden state and the next token.

B batch, T tokens, H hidden size. Module names are the tensor names on disk.
"""

import mlx.core as mx
import mlx.nn as nn

from ..config import ModelConfig
from ..kernels.projection import project
from ..kernels.tiers import PORTABLE, Tiers
from .attention import attention_mask
from .cache import KVCache
from .rope import RopeDelta


class MTP(nn.Module):
    """One full-attention decoder layer with its own cache, between norms.

    Entry t of the cache belongs to token t. Its input is the hidden state of token t and the
    embedding of token t + 1; its position is that of token t.
    """

    kernels: Tiers = PORTABLE

    def __init__(self, config: ModelConfig, layer: nn.Module):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = nn.RMSNorm(hidden, eps=eps)
        self.pre_fc_norm_hidden = nn.RMSNorm(hidden, eps=eps)
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.layers = [layer]
        self.norm = nn.RMSNorm(hidden, eps=eps)

    def __call__(
        self,
        hidden: mx.array,
        embeddings: mx.array,
        cache: KVCache | None = None,
        *,
        positions: mx.array | None = None,
        rope_delta: RopeDelta = 0,
        last_only: bool = False,
    ) -> mx.array:
        """`[B, T, H]` twice -> `[B, T, H]`; `model.head` turns it into the logits of tokens t + 2.

        hidden: the trunk's output for tokens t, after its final norm; for a further draft, the
        output of this layer for the token before. embeddings: of tokens t + 1. Positions and
        `rope_delta` as in `Trunk`. `last_only` gives `[B, 1, H]`; the cache gets all tokens.
        """
        layer, x = self.layers[0], self._joined(hidden, embeddings)
        places = layer.self_attn.places(x, cache, positions, rope_delta)
        mask = attention_mask(x.shape[1], cache)
        return self.norm(layer(x, mask, cache, places, last_only))

    def read(
        self,
        hidden: mx.array,
        embeddings: mx.array,
        cache: KVCache,
        *,
        positions: mx.array | None = None,
        rope_delta: RopeDelta = 0,
    ) -> None:
        """Append keys and values to the cache and compute nothing else, for a prompt's tokens."""
        layer, x = self.layers[0], self._joined(hidden, embeddings)
        places = layer.self_attn.places(x, cache, positions, rope_delta)
        layer.self_attn.read(x, layer.input_layernorm, cache, places)

    def _joined(self, hidden: mx.array, embeddings: mx.array) -> mx.array:
        parts = [self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden)]
        return project(mx.concatenate(parts, axis=-1), (self.fc,), self.kernels)[0]
