"""The MTP layer of a random model: transformers' MtpModel, and ours from the same checkpoint."""

# B batch, T tokens, H hidden size, V vocabulary

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from golden import make_golden as golden
from live.random_configs import FULL, RandomConfig, draw_config
from safetensors.torch import save_file
from transformers.modeling_layers import MtpModel

from qwen35_mlx.convert import convert
from qwen35_mlx.model.cache import KVCache
from qwen35_mlx.model.language import Model
from qwen35_mlx.model.loading import load_model

# As in the comparison of whole models.
MAX_DIFFERENCE, MIN_ROUTER_MARGIN, MAX_REDRAWS = 3e-4, 1e-4, 24
# What inputs that differ in the last digits may move the logits by.
MAX_NOISE, NUM_NUDGES = MAX_DIFFERENCE / 4, 3
NUM_DRAFTS = 3
# Names outside the decoder layer, which is `layers.0.mtp_block` here and `mtp.layers.0` on disk.
ON_DISK = {
    "layers.0.enorm": "mtp.pre_fc_norm_embedding",
    "layers.0.hnorm": "mtp.pre_fc_norm_hidden",
    "layers.0.eh_proj": "mtp.fc",
    "layers.0.post_norm": "mtp.norm",
}


@dataclass
class MtpPair:
    """One random model in both implementations, its inputs, and what the reference says."""

    config: RandomConfig
    ours: Model
    # The reference's states [1, T, H] of tokens t, ids [1, T] of tokens t + 1, positions of t.
    hidden: np.ndarray
    next_ids: np.ndarray
    positions: np.ndarray | None
    # Logits [T, V] behind all of them, and [NUM_DRAFTS, V] behind further drafts `drafts`.
    logits: np.ndarray
    drafts: list[int]
    draft_logits: np.ndarray

    def difference(self, num_read: int = 0, piece: int | None = None) -> float:
        """Largest distance of any logit: `num_read` tokens are read, then pieces are computed."""
        mtp, cache = self.ours.mtp, KVCache()
        assert mtp is not None
        length = self.hidden.shape[1]
        if num_read:
            self._run(mtp.read, 0, num_read, cache)
        outputs = [
            self._run(mtp, start, start + (piece or length), cache)
            for start in range(num_read, length, piece or length)
        ]
        state, delta = outputs[-1][:, -1:], 0
        if self.positions is not None:
            # Behind a picture tokens count on from the largest of the three positions.
            delta = int(self.positions[0, 0, -1]) - (length - 1)
        expected = np.concatenate([self.logits[num_read:], self.draft_logits])
        for draft in self.drafts:
            embedding = self.ours.embed([draft])
            state = mtp(state, embedding, cache, rope_delta=delta)
            outputs.append(state)
        logits = self.ours.head(mx.concatenate(outputs, axis=1))[0]
        return float(np.abs(np.array(logits) - expected).max())

    def _run(self, what: Any, start: int, stop: int, cache: KVCache) -> Any:
        """The MTP layer, or its `read`, on tokens from `start` to `stop`."""
        positions = None if self.positions is None else mx.array(self.positions[..., start:stop])
        embeddings = self.ours.embed(self.next_ids[0, start:stop].tolist())
        hidden = mx.array(self.hidden[:, start:stop])
        return what(hidden, embeddings, cache, positions=positions)


def draw_mtp_pair(seed: int, index: int, folder: Path) -> MtpPair:
    """Config `index` of a seed, whether or not the others are drawn; every third has pictures."""
    rng = np.random.default_rng([seed, index])
    for attempt in range(MAX_REDRAWS):
        config = draw_config(rng, index)
        pair = _draw(config, folder / str(attempt), rng, has_pictures=index % 3 == 2)
        if pair is not None:
            return pair
    raise AssertionError(f"seed {seed}, config {index}: no settled input")


@torch.no_grad()
def _draw(
    config: RandomConfig, folder: Path, rng: np.random.Generator, has_pictures: bool
) -> MtpPair | None:
    text = config.text_config | dict(num_mtp_layers=1, mtp_layer_types=[FULL])
    # MtpModel takes the kind of its norms from the last layer; the released models end in this one.
    text["layer_types"] = sorted(text["layer_types"], key=lambda kind: kind == FULL)
    model = golden.build(config.model_type, text, rng)
    mtp = MtpModel(model, 1).float().eval()
    own = [n for n, _ in mtp.named_parameters() if n.startswith("layers.")]
    head, embedding = model.lm_head.weight.clone(), model.get_input_embeddings().weight.clone()
    golden.randomize_weights(mtp, rng)
    # They are the model's own, and were drawn already.
    model.lm_head.weight.copy_(head)
    model.get_input_embeddings().weight.copy_(embedding)
    golden.save_checkpoint(
        model,
        folder / "source",
        fused_experts=config.fused_experts,
        max_shard_size=config.max_shard_size,
    )
    state = {n: p for n, p in mtp.state_dict().items() if n in own}
    apart = not config.fused_experts
    write_mtp(state, folder / "source" / "mtp.safetensors", apart=apart)
    convert(folder / "source", folder / "converted", dtype="float32")
    # It has no way to read single experts of a model with a vision tower.
    apart = apart and config.model_type != "qwen3_5_moe"
    write_mtp(state, folder / "official" / "model.safetensors", apart=apart)
    mtp = load_official(model, folder / "official")

    watched = golden.Reference(mtp)
    ids = torch.from_numpy(rng.integers(text["vocab_size"], size=(1, 40)))
    hidden = model.get_decoder()(input_ids=ids).last_hidden_state[:, :-1]
    embeddings = model.get_input_embeddings()(ids)[:, 1:]
    length = hidden.shape[1]
    positions = torch.arange(length)[None]
    if has_pictures:
        positions = picture_positions(length)

    def run(hidden: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        width = hidden.shape[1]
        more = positions[..., -1:] + torch.arange(1, width - length + 1)
        place = torch.cat([positions, more], dim=-1)
        mask = torch.full((width, width), float("-inf")).triu(1)[None, None]
        rotary = mtp.rotary_emb(hidden, position_ids=place)
        return mtp.layers[0](embeddings, hidden, rotary, mask, None, None)

    states = run(hidden, embeddings)
    logits = model.lm_head(states)[0].numpy()
    for _ in range(NUM_NUDGES):
        nudge = 1 + 2.0**-21 * torch.from_numpy(rng.standard_normal((2, *hidden.shape), np.float32))
        moved = run(hidden * nudge[0], embeddings * nudge[1])
        if np.abs(model.lm_head(moved)[0].numpy() - logits).max() > MAX_NOISE:
            return None
    drafts, draft_logits, chain_hidden, chain = [], [], hidden, embeddings
    last = states[:, -1:]
    for _ in range(NUM_DRAFTS):
        drafts.append(int(model.lm_head(last)[0, 0].argmax()))
        chain_hidden = torch.cat([chain_hidden, last], dim=1)
        draft = model.get_input_embeddings()(torch.tensor([[drafts[-1]]]))
        chain = torch.cat([chain, draft], dim=1)
        last = run(chain_hidden, chain)[:, -1:]
        draft_logits.append(model.lm_head(last)[0, 0].numpy())
    if watched.min_router_margin < MIN_ROUTER_MARGIN:
        return None
    return MtpPair(
        replace(config, text_config=text),
        load_model(folder / "converted")[0],
        hidden.numpy(),
        ids[:, 1:].numpy(),
        positions.numpy() if has_pictures else None,
        logits,
        drafts,
        np.stack(draft_logits),
    )


def picture_positions(length: int) -> torch.Tensor:
    """`[3, 1, T]`: five tokens of text, a picture of 3 rows and 4 columns, and text behind it."""
    text = torch.arange(5).expand(3, 5)
    rows, columns = torch.arange(12) // 4, torch.arange(12) % 4
    picture = 5 + torch.stack([torch.zeros(12, dtype=torch.long), rows, columns])
    rest = (9 + torch.arange(length - 17)).expand(3, length - 17)
    return torch.cat([text, picture, rest], dim=1)[:, None]


def load_official(model: Any, folder: Path) -> MtpModel:
    """The layer as transformers itself reads it: names and order of rows are no choice of ours."""
    model.config.name_or_path, model.config.dtype = str(folder), torch.float32
    # Where it finds the names of the tensors; models with a vision tower do not say it.
    model._keys_to_ignore_on_load_unexpected = ["^mtp.*"]
    return MtpModel.from_pretrained(model).eval()


def write_mtp(state: dict[str, torch.Tensor], file: Path, *, apart: bool) -> None:
    """The layer as Hugging Face has it; experts fused or apart."""
    tensors = {}
    for name, value in state.items():
        stem, _, end = name.rpartition(".")
        new = f"{ON_DISK[stem]}.{end}" if stem in ON_DISK else ""
        new = new or name.replace("layers.0.mtp_block.", "mtp.layers.0.")
        if not apart or ".experts." not in new:
            tensors[new] = value.contiguous()
            continue
        prefix, _, matrix = new.rpartition(".")
        for i, expert in enumerate(value):
            parts = expert.chunk(2) if matrix == "gate_up_proj" else [expert]
            names = ("gate_proj", "up_proj") if matrix == "gate_up_proj" else ("down_proj",)
            for one, part in zip(names, parts, strict=True):
                tensors[f"{prefix}.{i}.{one}.weight"] = part.contiguous()
    file.parent.mkdir(exist_ok=True)
    save_file(tensors, file, metadata={"format": "pt"})
