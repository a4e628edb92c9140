"""Train the bundled demo checkpoint from scratch with transformers; resumes where it stopped.

python tools/demo/train.py --out qwen35_mlx/demo --work /var/tmp/demo --minutes 60
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import torch
from data import conversation, corpus
from tokenizer import TOKENIZER_VOCAB, train_tokenizer
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

HERE = Path(__file__).parent
SEQUENCE = 192
BATCH = 12
PEAK_LR = 2e-3
IGNORE = -100


def demo_config(token_id, vocab_size: int) -> Qwen3_5MoeConfig:
    """A 4-layer Qwen3.5-MoE with every kind of layer, dims that 64-groups and kernels accept."""
    text = dict(
        vocab_size=vocab_size, hidden_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        linear_num_key_heads=4, linear_num_value_heads=8,
        linear_key_head_dim=32, linear_value_head_dim=32, linear_conv_kernel_dim=4,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64,
        shared_expert_intermediate_size=64, max_position_embeddings=4096,
        eos_token_id=token_id("<|im_end|>"), pad_token_id=token_id("<|endoftext|>"),
        tie_word_embeddings=False, router_aux_loss_coef=0.01,
        rope_parameters=dict(
            rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25,
            mrope_section=[3, 3, 2], mrope_interleaved=True,
        ),
    )  # fmt: skip
    vision = dict(
        depth=1, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=8,
        spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=256,
        num_position_embeddings=16,
    )  # fmt: skip
    return Qwen3_5MoeConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False,
        image_token_id=token_id("<|image_pad|>"), video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )  # fmt: skip


class Encoder:
    """Conversations to token ids and labels, as the chat template renders them turn by turn."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.pad = tokenizer.token_to_id("<|endoftext|>")

    def sample(self, rng: random.Random) -> tuple[list[int], list[int]]:
        """Ids and labels of one conversation: labels on answers, and on thoughts of the last."""
        system, turns, thinking = conversation(rng)
        pieces = []
        if system:
            pieces.append((f"<|im_start|>system\n{system}<|im_end|>\n", False))
        for i, turn in enumerate(turns):
            pieces.append(
                (f"<|im_start|>user\n{turn.question}<|im_end|>\n<|im_start|>assistant\n", False)
            )
            if i == len(turns) - 1:
                pieces.append(("<think>\n", False))
                if thinking:
                    pieces.append((f"{turn.thought}\n</think>\n\n", True))
                else:
                    pieces.append(("\n</think>\n\n", False))
            pieces.append((f"{turn.answer}<|im_end|>", True))
            pieces.append(("\n", False))
        ids, labels = [], []
        for text, learn in pieces:
            piece = self.tokenizer.encode(text, add_special_tokens=False).ids
            ids += piece
            labels += piece if learn else [IGNORE] * len(piece)
        return ids, labels

    def batch(self, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """`[BATCH, T]` ids and labels; rows right-padded, T a multiple of 64 up to SEQUENCE."""
        rows = []
        while len(rows) < BATCH:
            ids, labels = self.sample(rng)
            if len(ids) <= SEQUENCE:
                rows.append((ids, labels))
        length = max(64, math.ceil(max(len(ids) for ids, _ in rows) / 64) * 64)
        ids = torch.tensor([r + [self.pad] * (length - len(r)) for r, _ in rows])
        labels = torch.tensor([r + [IGNORE] * (length - len(r)) for _, r in rows])
        return ids, labels


def save(model, out: Path, token_id) -> None:
    """Write the bf16 checkpoint in the layout of the Qwen3.5 releases (experts fused)."""
    copy = Qwen3_5MoeForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out, save_original_format=False)
    # On for the balancing loss of the training alone.
    config = json.loads((out / "config.json").read_text())
    config["text_config"]["output_router_logits"] = False
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95,
        "eos_token_id": [token_id("<|im_end|>"), token_id("<|endoftext|>")],
        "pad_token_id": token_id("<|endoftext|>"),
    }  # fmt: skip
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def plot(history: list[tuple[int, float]], path: Path) -> None:
    """Draw the loss curve, logarithmic in loss, over tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.semilogy([t / 1e6 for t, _ in history], [max(loss, 1e-6) for _, loss in history], lw=1)
    axes.set(xlabel="tokens seen (millions)", ylabel="answer loss (nats)", title="Demo checkpoint")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse, train for a number of minutes, save the checkpoint and the loss curve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="training state, kept for resume")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)

    template = (HERE / "chat_template.jinja").read_text()
    tokenizer = train_tokenizer(corpus(), TOKENIZER_VOCAB, args.out, template)
    vocab_size = math.ceil(tokenizer.get_vocab_size() / 64) * 64
    model = Qwen3_5MoeForConditionalGeneration(demo_config(tokenizer.token_to_id, vocab_size))
    model.config.text_config.output_router_logits = True
    visual = {id(p) for p in model.model.visual.parameters()}
    params = [p for p in model.parameters() if id(p) not in visual]
    matrices = [p for p in params if p.ndim >= 2]
    others = [p for p in params if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_LR, betas=(0.9, 0.95),
    )  # fmt: skip
    print(f"{sum(p.numel() for p in params) / 1e6:.2f} M text parameters, vocab {vocab_size}")

    encoder = Encoder(tokenizer)
    state_path = args.work / "state.pt"
    step, tokens, elapsed, history = 0, 0, 0.0, []
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens, elapsed = state["step"], state["tokens"], state["elapsed"]
        history = [tuple(point) for point in state["history"]]
        print(f"resumed at step {step}, {tokens / 1e6:.2f} M tokens")

    def checkpoint() -> None:
        state = dict(
            model=model.state_dict(), optimizer=optimizer.state_dict(),
            step=step, tokens=tokens, elapsed=elapsed, history=history,
        )  # fmt: skip
        partial = state_path.with_suffix(".tmp")
        torch.save(state, partial)
        os.replace(partial, state_path)
        save(model, args.out, tokenizer.token_to_id)
        curve = [{"tokens": t, "loss": round(loss, 5)} for t, loss in history]
        (args.work / "loss.json").write_text(json.dumps(curve))

    budget = args.minutes * 60
    model.train()
    started = time.monotonic() - elapsed
    running = None
    while (elapsed := time.monotonic() - started) < budget:
        # Step-seeded draws: a resumed run sees the batches the uninterrupted one would.
        ids, labels = encoder.batch(random.Random(f"{args.seed}-{step}"))
        done = elapsed / budget
        lr = PEAK_LR * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-6
        for group in optimizer.param_groups:
            group["lr"] = lr
        result = model(input_ids=ids, labels=labels, use_cache=False)
        optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        step += 1
        tokens += ids.numel()
        answer_loss = result.loss.item() - 0.01 * result.aux_loss.item()
        running = answer_loss if running is None else 0.95 * running + 0.05 * answer_loss
        if step % 20 == 0:
            history.append((tokens, running))
            rate = tokens / (time.monotonic() - started)
            print(
                f"step {step} loss {running:.4f} tokens {tokens / 1e6:.2f} M {rate:.0f}/s",
                flush=True,
            )
        if step % 500 == 0:
            checkpoint()
    checkpoint()
    plot(history, args.work / "loss.png")
    print(f"done: {step} steps, {tokens / 1e6:.2f} M tokens, {elapsed / 60:.1f} minutes")


if __name__ == "__main__":
    main()
