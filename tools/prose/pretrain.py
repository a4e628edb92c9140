"""Trains a small dense or MoE checkpoint on prose for an hour; resumes where it stopped.

python tools/prose/pretrain.py dense --work build/prose/dense --until-minutes 60

Writes `model/`, a Hugging Face folder, and `texts.safetensors`: token ids `[N, 256]` of
`calibration` and `judged`, from documents that are not in training.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from corpus import corpus
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))
from checkpoint import plot
from initial import initialize
from network import Batch, Forward
from tokenizer import train_tokenizer
from train import ADAM_LR, BALANCE_WEIGHT, HERE, MUON_LR, optimizers

VOCAB_SIZE, TEXT_TOKENS, TEXTS_A_STEP = 4096, 256, 16
WARMUP_STEPS, STABLE_SHARE, SAVE_S = 40, 0.25, 180.0
NUM_CALIBRATION, NUM_JUDGED = 128, 32
END = "<|endoftext|>"


def text_config(kind: str, end: int, stop: int) -> dict[str, Any]:
    """Eight layers in the 3:1 layout; widths are multiples of 64, Dk != Dv, Hk != Hv."""
    config = dict(
        model_type="qwen3_5_text", vocab_size=VOCAB_SIZE, hidden_size=256, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=1024,
        linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=32,
        linear_value_head_dim=64, linear_conv_kernel_dim=4, max_position_embeddings=4096,
        eos_token_id=stop, pad_token_id=end, tie_word_embeddings=True, rms_norm_eps=1e-6,
        hidden_act="silu", full_attention_interval=4,
        rope_parameters=dict(
            rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25,
            mrope_section=[3, 3, 2], mrope_interleaved=True,
        ),
    )  # fmt: skip
    if kind == "moe":
        del config["intermediate_size"]
        config |= dict(
            model_type="qwen3_5_moe_text", num_experts=16, num_experts_per_tok=2,
            moe_intermediate_size=128, shared_expert_intermediate_size=128,
            tie_word_embeddings=False,
        )  # fmt: skip
    return config


def build(text: dict[str, Any], seed: int) -> nn.Module:
    """The untrained model, without a vision tower."""
    torch.manual_seed(seed)
    # transformers names tensors like the releases only with a vision tower, which is then dropped.
    vision = dict(
        depth=1, hidden_size=64, intermediate_size=64, num_heads=2, patch_size=8,
        out_hidden_size=text["hidden_size"], num_position_embeddings=36,
    )  # fmt: skip
    moe = "moe" in text["model_type"]
    make_config = Qwen3_5MoeConfig if moe else Qwen3_5Config
    make = Qwen3_5MoeForConditionalGeneration if moe else Qwen3_5ForConditionalGeneration
    tied = text["tie_word_embeddings"]
    config = make_config(text_config=dict(text), vision_config=vision, tie_word_embeddings=tied)
    model = make(config)
    initialize(model)
    del model.model.visual
    return model


def save(model: nn.Module, text: dict[str, Any], out: Path) -> None:
    """Write bf16 tensors and the config in the layout of the Qwen3.5 releases."""
    tensors = {n: t.to(torch.bfloat16).contiguous() for n, t in model.state_dict().items()}
    # Embedding and head are tied in training; the untied checkpoint stores the tensor twice.
    head = tensors.pop("lm_head.weight")
    if not text["tie_word_embeddings"]:
        tensors["lm_head.weight"] = head.clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    kind = text["model_type"].removesuffix("_text")
    name = "Qwen3_5Moe" if "moe" in kind else "Qwen3_5"
    config = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": kind,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "dtype": "bfloat16",
        "text_config": text,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    stops = {"eos_token_id": [text["eos_token_id"], text["pad_token_id"]]}
    (out / "generation_config.json").write_text(json.dumps(stops, indent=2) + "\n")


def spread(ids: list[int], count: int) -> Tensor:
    """`[count, 256]`: windows at equal distances, without overlap."""
    whole = torch.tensor(ids[: len(ids) // TEXT_TOKENS * TEXT_TOKENS]).reshape(-1, TEXT_TOKENS)
    return whole[torch.arange(count) * len(whole) // count]


def main() -> None:
    """Collect texts, train until the time limit, save the checkpoint and the loss curve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("dense", "moe"))
    parser.add_argument("--work", type=Path, required=True, help="everything is written here")
    parser.add_argument("--cache", type=Path, help="downloaded packages; else beside --work")
    parser.add_argument("--until-minutes", type=float, default=60, help="clock time of training")
    parser.add_argument("--max-steps", type=int, help="stop early, to measure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.work / "model"
    out.mkdir(parents=True, exist_ok=True)

    documents = corpus(args.cache or args.work.parent / "cache")
    template = (HERE / "chat_template.jinja").read_text()
    tokenizer = train_tokenizer(documents["train"], VOCAB_SIZE, out, template)
    end, stop = tokenizer.token_to_id(END), tokenizer.token_to_id("<|im_end|>")
    text = text_config(args.kind, end, stop)
    ids = {
        share: [i for d in tokenizer.encode_batch(texts) for i in [*d.ids, end]]
        for share, texts in documents.items()
    }
    size = {share: len(tokens) for share, tokens in ids.items()}
    counts = {"calibration": NUM_CALIBRATION, "judged": NUM_JUDGED}
    texts = {share: spread(ids[share], count) for share, count in counts.items()}
    save_file(texts, args.work / "texts.safetensors")
    train = torch.tensor(ids["train"])

    model = build(text, args.seed)
    muon, adam = optimizers(model, nn.Module())
    forward = Forward(model, nn.Module())
    parameters = list(model.parameters())
    state = args.work / "state.pt"
    step, elapsed, history = 0, 0.0, []
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        step, elapsed, history = saved["step"], saved["elapsed"], saved["history"]
        print(f"resumed at step {step}, minute {elapsed / 60:.0f}")
    print(
        f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters; tokens: {size}", flush=True
    )

    def batch(ids: Tensor) -> Batch:
        places = torch.arange(TEXT_TOKENS).expand(3, len(ids), -1)
        return Batch(ids, ids, places, torch.zeros(len(ids), dtype=torch.long))

    @torch.no_grad()
    def held_out() -> float:
        losses = [forward.losses(batch(t), False)[0] for t in texts["judged"].split(8)]
        return torch.cat(losses).mean().item()

    def keep() -> None:
        content = dict(
            model=model.state_dict(), muon=muon.state_dict(), adam=adam.state_dict(),
            step=step, elapsed=elapsed, history=history,
        )  # fmt: skip
        torch.save(content, state.with_suffix(".tmp"))
        os.replace(state.with_suffix(".tmp"), state)
        (args.work / "loss.json").write_text(json.dumps(history))

    stopped = False

    def on_signal(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, on_signal)
    total, resumed_at = 60 * args.until_minutes, time.monotonic() - elapsed
    saved_at, losses = time.monotonic(), []
    while elapsed < total and step != args.max_steps:
        # Draws are seeded by step, so that a resumed run sees the same texts.
        rng = random.Random(f"{args.seed} {step}")
        places = [rng.randrange(len(train) - TEXT_TOKENS) for _ in range(TEXTS_A_STEP)]
        rows = torch.stack([train[i : i + TEXT_TOKENS] for i in places])
        loss, _, balance, _ = forward.losses(batch(rows), with_mtp=False)
        (loss.mean() + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], 1.0)
        left = min(1.0, (1 - elapsed / total) / (1 - STABLE_SHARE))
        scale = min(1.0, (step + 1) / WARMUP_STEPS) * max(left, 0.01)
        muon.step(MUON_LR * scale)
        for group in adam.param_groups:
            group["lr"] = ADAM_LR * scale
        adam.step()
        for p in parameters:
            p.grad = None
        losses.append(loss.mean().item())
        step, elapsed = step + 1, time.monotonic() - resumed_at
        if step % 10 == 0 or elapsed >= total:
            tokens = step * TEXTS_A_STEP * TEXT_TOKENS
            history.append({"tokens": tokens, "loss": sum(losses) / len(losses)})
            losses = []
            if step % 100 == 0 or elapsed >= total:
                history[-1]["held out"] = held_out()
            speed = f"{tokens / elapsed:.0f} tokens/s"
            print(f"{step} {elapsed:.0f} s {speed} lr {scale:.2f} {history[-1]}", flush=True)
        if stopped or time.monotonic() - saved_at > SAVE_S:
            keep()
            saved_at = time.monotonic()
        if stopped:
            print(f"stopped at step {step}")
            return
    keep()
    save(model, text, out)
    plot(history, args.work / "loss.png")
    print(f"done: {step} steps in {elapsed / 60:.0f} minutes")


if __name__ == "__main__":
    main()
