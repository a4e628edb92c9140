"""transformers with the demo's weights, or with the dequantized weights of a converted folder."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import torch
from data import encode
from network import IGNORE, MTP, Forward
from pictures import paint
from PIL import Image
from safetensors.torch import load_file
from split import Sample
from tokenizers import Tokenizer
from train import SKILLS, collate
from transformers import AutoImageProcessor, Qwen3_5MoeForConditionalGeneration

BATCH = 16
MAX_NEW_TOKENS = 100


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """The text model of a converted folder in float32, under transformers' names and layout."""
    config = json.loads((folder / "config.json").read_text())
    settings = config.get("quantization", {})
    weights: dict[str, mx.array] = {}
    for file in folder.glob("*.safetensors"):
        weights |= mx.load(str(file))
    plain = {}
    for name, value in weights.items():
        stem = name.removesuffix(".weight")
        if name.endswith((".scales", ".biases")):
            continue
        if (scales := weights.get(f"{stem}.scales")) is not None:
            own = settings.get(stem)
            chosen = own if isinstance(own, dict) else settings
            value = mx.dequantize(
                value, scales, weights[f"{stem}.biases"],
                group_size=chosen["group_size"], bits=chosen["bits"],
            )  # fmt: skip
        plain[name] = torch.from_numpy(np.array(value.astype(mx.float32)))

    tensors = {}
    for name, value in plain.items():
        if not name.startswith("language_model."):
            continue
        short = name.removeprefix("language_model.")
        new = (
            short
            if short.startswith("lm_head")
            else short.replace("model.", "model.language_model.", 1)
        )
        if "switch_mlp" in new:
            stem, _, part = new.removesuffix(".weight").rpartition(".switch_mlp.")
            if part == "down_proj":
                tensors[f"{stem}.experts.down_proj"] = value
            elif part == "gate_proj":
                up = plain[name.replace("gate_proj", "up_proj")]
                tensors[f"{stem}.experts.gate_up_proj"] = torch.cat((value, up), 1)
            continue
        if new.endswith("conv1d.weight"):
            value = value.transpose(1, 2)
        # MLX weights of norms are 1 + w, but the delta rule's norm is the same in both.
        if new.endswith("norm.weight") and not new.endswith("linear_attn.norm.weight"):
            value = value - 1
        tensors[new] = value
    return tensors


def fused_mtp(tensors: dict[str, torch.Tensor], num_experts: int) -> dict[str, torch.Tensor]:
    """The state of `network.MTP` from the `mtp.*` tensors of a checkpoint."""
    state = {k.removeprefix("mtp."): v.float() for k, v in tensors.items() if k.startswith("mtp.")}
    stem = "layers.0.mlp.experts"

    def experts(part: str) -> torch.Tensor:
        return torch.stack([state.pop(f"{stem}.{i}.{part}.weight") for i in range(num_experts)])

    state[f"{stem}.gate_up_proj"] = torch.cat((experts("gate_proj"), experts("up_proj")), 1)
    state[f"{stem}.down_proj"] = experts("down_proj")
    return state


class Answer(NamedTuple):
    """The answer to a sample: ids with the end of the turn, and text without it."""

    sample: Sample
    prompt: list[int]
    ids: list[int]
    text: str


class Reference:
    """The demo in transformers, with text weights of `folder`, the others of `source`."""

    def __init__(self, source: Path, folder: Path | None = None):
        """`folder` is a converted copy; with None the text weights are the source's."""
        self.model = Qwen3_5MoeForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
        self.model.eval()
        if folder is not None:
            _, unexpected = self.model.load_state_dict(dequantized(folder), strict=False)
            assert not unexpected, unexpected
        self.mtp = MTP(self.model.config)
        tensors = load_file(source / "model.safetensors")
        self.mtp.load_state_dict(fused_mtp(tensors, self.model.config.text_config.num_experts))
        self.forward = Forward(self.model, self.mtp, torch.float32)
        self.tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        self.processor = AutoImageProcessor.from_pretrained(source)
        self.end = self.tokenizer.token_to_id("<|im_end|>")
        self.pad = self.model.config.text_config.pad_token_id
        self.image = self.model.config.image_token_id

    @torch.no_grad()
    def answers(self, samples: list[Sample]) -> list[Answer]:
        """Greedy answers in the order of samples, by transformers' processor and generate."""
        prompts = [_prompt_ids(sample, self.tokenizer) for sample in samples]
        order = sorted(
            range(len(samples)), key=lambda i: (bool(samples[i].picture), len(prompts[i]))
        )
        found: dict[int, Answer] = {}
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            for picked in (
                [i for i in batch if samples[i].picture],
                [i for i in batch if not samples[i].picture],
            ):
                if picked:
                    said = self._generate(
                        [prompts[i] for i in picked], [samples[i] for i in picked]
                    )
                    for i, ids in zip(picked, said, strict=True):
                        found[i] = Answer(samples[i], prompts[i], ids, self.tokenizer.decode(ids))
        return [found[i] for i in range(len(samples))]

    def _generate(self, prompts: list[list[int]], samples: list[Sample]) -> list[list[int]]:
        """Greedy ids up to the end of the turn, for left-padded prompts."""
        length = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (length - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
        inputs: dict[str, Any] = {}
        if samples[0].picture:
            images = [Image.fromarray(paint(*sample.picture)) for sample in samples]
            inputs = dict(self.processor(images=images, return_tensors="pt"))
            inputs["mm_token_type_ids"] = (ids == self.image).int()
        out: Any = self.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=self.end, pad_token_id=self.pad, top_k=None, top_p=None,
            temperature=None, **inputs,
        )  # fmt: skip
        said = [row[length:] for row in out.tolist()]
        return [row[: row.index(self.end) + 1] if self.end in row else row for row in said]

    @torch.no_grad()
    def acceptance(self, answers: list[Answer]) -> float:
        """Share of drafts (one per step) that greedy decoding accepts; text only."""
        accepted = drafted = 0
        answers = sorted(answers, key=lambda a: len(a.prompt) + len(a.ids))
        for first in range(0, len(answers), BATCH):
            rows = [
                (
                    a.prompt + a.ids,
                    [IGNORE] * len(a.prompt) + a.ids,
                    a.sample._replace(skill=SKILLS[0]),
                )
                for a in answers[first : first + BATCH]
            ]
            batch = collate(rows, self.pad, self.image)
            ahead = torch.nn.functional.pad(batch.labels[:, 2:], (0, 1), value=IGNORE)
            # Row i drafts token i + 2 from token i + 1, which must be part of the answer.
            wanted = (ahead != IGNORE) & (batch.labels[:, 1:] != IGNORE)
            self.forward.balance = []
            embedded, hidden, rope = self.forward.hidden(batch)
            drafts = self.forward.logits(self.forward.draft(embedded, hidden, rope, wanted)).argmax(
                -1
            )
            accepted += int((drafts == ahead[wanted]).sum())
            drafted += len(drafts)
        return accepted / max(1, drafted)


def _prompt_ids(sample: Sample, tokenizer: Tokenizer) -> list[int]:
    """Ids of the conversation before its last answer."""
    ids, labels = encode(sample, tokenizer)
    at = max(i for i, label in enumerate(labels) if label != IGNORE)
    while at > 0 and labels[at - 1] != IGNORE:
        at -= 1
    return ids[:at]
