"""The model: token ids and picture features -> layers -> norm (the trunk) -> logits (the head).

B batch, T tokens, H hidden size. Module names are the tensor names on disk.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import FULL, LINEAR, ModelConfig
from ..errors import Qwen35Error
from ..kernels.projection import project
from ..kernels.tiers import PORTABLE, Tiers
from ..memory import Allowance
from ..sampling import SamplingParams
from .attention import Attention, attention_mask
from .cache import check_keeping, make_cache, padded_cache
from .feed_forward import DenseMLP, SparseMoE
from .gated_delta_net import GatedDeltaNet
from .mtp import MTP
from .ring import Leader, leader
from .rope import Places, RopeDelta
from .shard import Stages, shard
from .vision import VisionTower

if TYPE_CHECKING:
    from .expert_pool import Experts


class DecoderLayer(nn.Module):
    """Norm, attention of either kind, residual; norm, feed-forward, residual."""

    kernels: Tiers = PORTABLE

    def __init__(self, config: ModelConfig, layer_type: str):
        super().__init__()
        self.is_linear = layer_type == LINEAR
        if self.is_linear:
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = Attention(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.is_moe:
            self.mlp: nn.Module = SparseMoE(config)
        else:
            self.mlp = DenseMLP(config.hidden_size, config.intermediate_size)

    def __call__(
        self,
        x: mx.array,
        mask: Any,
        cache: Any | None,
        places: Places,
        last_only: bool = False,
        keep_states: bool = False,
    ) -> mx.array:
        """`[B, T, H]` -> the same, or `[B, 1, H]` of the last token."""
        x = self.attend(x, mask, cache, places, keep_states)
        if last_only:
            x = x[:, -1:]
        return self.mlp(x, self.post_attention_layernorm)

    def attend(
        self, x: mx.array, mask: Any, cache: Any | None, places: Places, keep_states: bool = False
    ) -> mx.array:
        """The first half of the layer: x + attention."""
        norm = self.input_layernorm
        if self.is_linear:
            return self.linear_attn(x, norm, mask, cache, keep_states)
        return self.self_attn(x, norm, mask, cache, places)


class Trunk(nn.Module):
    """Token ids or embeddings to the hidden state after the final norm."""

    # Set if other processes have the other layers.
    stages: Stages | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, layer_type) for layer_type in config.layer_types]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._find_first()

    def _find_first(self) -> None:
        kinds = [LINEAR if layer.is_linear else FULL for layer in self.layers]
        self._first = {k: kinds.index(k) if k in kinds else None for k in (LINEAR, FULL)}

    def keep_layers(self, first: int, end: int, stages: Stages) -> None:
        """Keep these layers; other processes have the others."""
        self.layers, self.stages = self.layers[first:end], stages
        self._find_first()

    def __call__(
        self,
        ids: mx.array | None,
        cache: Sequence[Any] | None = None,
        *,
        embeddings: mx.array | None = None,
        positions: mx.array | None = None,
        rope_delta: RopeDelta = 0,
        last_only: bool = False,
        keep_states: bool = False,
    ) -> mx.array:
        """ids `[B, T]` or embeddings `[B, T, H]` -> `[B, T, H]`.

        positions `[B, T]` or `[3, B, T]`; None: they follow the tokens in the cache, plus
        `rope_delta`, one number or `[B]`. `last_only` gives `[B, 1, H]` and skips the last layer's
        feed-forward for the other tokens. After a pass with `keep_states`, of up to 8 tokens of one
        sequence, `cache.accept` may drop the last of them.
        """
        x = self.embed_tokens(ids) if embeddings is None else embeddings
        if keep_states:
            check_keeping(cache, *x.shape[:2])
        x = self.stages.enter(x) if self.stages else x
        entries: Sequence[Any] = cache if cache is not None else [None] * len(self.layers)
        # One mask for all layers of a kind.
        linear, full = self._first[LINEAR], self._first[FULL]
        linear_mask = full_mask = places = None
        if linear is not None and entries[linear] is not None:
            linear_mask = entries[linear].make_mask(x.shape[1])
        if full is not None:
            full_mask = attention_mask(x.shape[1], entries[full])
            attention = self.layers[full].self_attn
            places = attention.places(x, entries[full], positions, rope_delta)
        ends_here = last_only and (not self.stages or self.stages.has_last_layer)
        for layer, entry in zip(self.layers, entries, strict=True):
            mask = linear_mask if layer.is_linear else full_mask
            only = ends_here and layer is self.layers[-1]
            x = layer(x, mask, entry, places, only, keep_states)
        return self.norm(self.stages.leave(x, last_only) if self.stages else x)


class LanguageModel(nn.Module):
    """Trunk and head, under their names on disk."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class Model(nn.Module):
    """A Qwen3.5 model; mlx-lm's generators, caches and quantizers accept it.

    `vision_tower` and `mtp` are None if the checkpoint has none, or none is loaded.
    """

    kernels: Tiers = PORTABLE
    # Digest of the attached adapter.
    adapter_digest: str = ""
    # Set if experts are read from disk.
    experts: "Experts | None" = None
    # Set on rank 0 if other processes have parts of the model.
    ring: Leader | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model_type = config.model_type
        self.sampling_defaults = SamplingParams()
        self.allowance = Allowance()
        self.language_model = LanguageModel(config)
        self.vision_tower = None if config.vision is None else VisionTower(config.vision)
        self.mtp = MTP(config, DecoderLayer(config, FULL)) if config.num_mtp_layers else None

    def __call__(
        self,
        ids: mx.array,
        cache: Sequence[Any] | None = None,
        *,
        left_padding: Sequence[int] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """ids `[B, T]` -> logits `[B, T, vocab]`.

        `left_padding`: pad tokens at the start of each row, for calls without a cache; otherwise
        give it to `make_cache`.
        """
        if left_padding is not None:
            if cache is not None:
                raise Qwen35Error(
                    "left_padding cannot be used with a cache",
                    hint="make the cache with model.make_cache(left_padding=...)",
                )
            cache = self.make_cache(left_padding)
        return self.head(self.trunk(ids, cache, embeddings=input_embeddings))

    def trunk(
        self, ids: mx.array | None, cache: Sequence[Any] | None = None, **options: Any
    ) -> mx.array:
        """The hidden state after the final norm, `[B, T, H]`; options as in `Trunk`."""
        trunk = self.language_model.model
        run = trunk if self.ring is None else partial(self.ring.trunk, trunk)
        return run(ids, cache, **options)

    def embed(self, ids: Sequence[int], features: mx.array | None = None) -> mx.array:
        """Embeddings `[1, T, H]`; picture tokens get the rows of features `[N, H]`, in order.

        Picture tokens have ids below -1; their number must be N.
        """
        numbers = np.array([int(i) for i in ids], dtype=np.int64)
        places = np.flatnonzero(numbers < -1)
        num_features = 0 if features is None else len(features)
        if len(places) != num_features:
            raise Qwen35Error(
                "tokens of pictures and features do not match",
                got=f"{len(places)} tokens and {num_features} features",
                expected="one feature for each token",
            )
        numbers[places] = 0
        x = self.language_model.model.embed_tokens(mx.array(numbers.astype(np.int32))[None])
        if features is not None:
            x[:, mx.array(places.astype(np.int32))] = features.astype(x.dtype)
        return x

    def head(self, hidden: mx.array) -> mx.array:
        """`[..., H]` -> logits `[..., vocab]`."""
        language = self.language_model
        tied = self.config.tie_word_embeddings
        head = language.model.embed_tokens if tied else language.lm_head
        return project(hidden, (head,), self.kernels)[0]

    @property
    def cache_key(self) -> str:
        """What changes the numbers in a cache, besides the model's own weights."""
        return " ".join(filter(None, [self.adapter_digest, self.config.cache_key]))

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers, in order."""
        return self.language_model.model.layers

    def make_cache(self, left_padding: Sequence[int] | None = None) -> list[Any]:
        """An empty cache, one entry per layer; see `model.cache`.

        With `left_padding`, pad tokens at the start of each row, it is mlx-lm's batch cache.
        """
        if left_padding is not None:
            return padded_cache(self.config, left_padding)
        entries = make_cache(self.config)
        if self.ring is not None:
            self.ring.hold(entries)
        return entries

    def shard(self, group: mx.distributed.Group) -> None:
        """Keep this process's part. Rank 0 is then used as usual; others call `model.ring.follow`.

        Under `qwen35-mlx cluster`, `load` reads only the part.
        """
        shard(self, group)
        if group.rank() == 0:
            self.ring = leader()

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
        """The modules that mlx-lm's quantizers may change; the router gets 8 bits."""

        def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
            if path.startswith("vision_tower.") or path.endswith(("in_proj_a", "in_proj_b")):
                return False
            if path.endswith(("mlp.gate", "shared_expert_gate")):
                return {"group_size": 64, "bits": 8}
            return hasattr(module, "to_quantized")

        return predicate
