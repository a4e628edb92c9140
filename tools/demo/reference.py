"""transformers on the demo's weights, those of a converted folder dequantized: pictures and MTP."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
        new = short if short.startswith("lm_head") else short.replace("model.", "model.language_model.", 1)
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
        # mlx holds 1 + w; the norm of the delta rule alone is plain in both.
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


class Reference:
    """The demo in transformers; text weights from `folder`, picture and MTP weights of `source`."""

    def __init__(self, source: Path, folder: Path | None = None):
        """folder: a converted copy; None takes the source's own text weights."""
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
        self.pad = self.model.config.text_config.pad_token_id
        self.image = self.model.config.image_token_id

    @torch.no_grad()
    def answers(self, samples: list[Sample]) -> Iterator[tuple[Sample, str]]:
        """Greedy answers to questions about pictures, by transformers' processor and generate."""
        for sample in samples:
            ids, labels = encode(sample, self.tokenizer)
            prompt = torch.tensor([ids[: labels_start(labels)]])
            images = self.processor(images=[Image.fromarray(paint(*sample.picture))], return_tensors="pt")
            out = self.model.generate(
                input_ids=prompt,
                pixel_values=images["pixel_values"],
                image_grid_thw=images["image_grid_thw"],
                mm_token_type_ids=(prompt == self.image).int(),
                attention_mask=torch.ones_like(prompt),
                do_sample=False, max_new_tokens=20, top_k=None, top_p=None, temperature=None,
            )  # fmt: skip
            yield sample, self.tokenizer.decode(out[0, prompt.shape[1] :].tolist())

    @torch.no_grad()
    def acceptance(self, samples: list[Sample]) -> float:
        """Share of drafted tokens (one draft a step) that greedy decoding takes."""
        accepted = drafted = 0
        for sample in samples:
            ids, labels = encode(sample, self.tokenizer)
            start = labels_start(labels)
            said = self._greedy(ids[:start])
            row = ids[:start] + said
            answer_labels = [IGNORE] * start + said
            skill = sample.skill if sample.skill in SKILLS else SKILLS[0]
            batch = collate(
                [(row, answer_labels, sample._replace(skill=skill))], self.pad, self.image
            )
            ahead = torch.nn.functional.pad(batch.labels[:, 2:], (0, 1), value=IGNORE)
            rows = ahead != IGNORE
            # A draft starts from a token that was said; the prompt's last token is not.
            rows[:, : start - 1] = False
            self.forward.balance = []
            embedded, hidden, rope = self.forward.hidden(batch)
            drafts = self.forward.logits(self.forward.draft(embedded, hidden, rope, rows)).argmax(-1)
            accepted += int((drafts == ahead[rows]).sum())
            drafted += len(drafts)
        return accepted / max(1, drafted)

    def _greedy(self, prompt: list[int], max_tokens: int = 100) -> list[int]:
        ids = torch.tensor([prompt])
        out: Any = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=max_tokens, top_k=None, top_p=None, temperature=None,
        )  # fmt: skip
        return out[0, len(prompt) :].tolist()


def labels_start(labels: list[int]) -> int:
    """Where the last run of labels begins: the length of the prompt."""
    at = max(i for i, label in enumerate(labels) if label != IGNORE)
    while at > 0 and labels[at - 1] != IGNORE:
        at -= 1
    return at
