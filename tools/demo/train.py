"""Trains the bundled demo checkpoint from scratch; resumes where it stopped.

python tools/demo/train.py --out FOLDER --work FOLDER --tokens 18.5e6

The learning rate warms up, stays constant, and decays over the last three quarters of the tokens.
`stable.pt` has the state before the decay, from which training continues with a larger --tokens.
"""

import argparse
import json
import math
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import torch
from checkpoint import demo_config, plot, save
from data import IGNORE, corpus, encode, training_sample
from initial import initialize
from network import CHUNK, MTP, Batch, Forward
from optim import Muon
from pictures import GRID, paint, patches
from sight import teach_sight
from split import Sample
from tokenizer import TOKENIZER_VOCAB, train_tokenizer
from transformers import Qwen3_5MoeForConditionalGeneration

HERE = Path(__file__).parent
STEP_TOKENS = 3072
MUON_LR, ADAM_LR = 0.015, 3e-3
# The vision tower is trained first, by itself, and then with a tenth of the learning rate.
SIGHT_STEPS, SIGHT_SHARE = 1200, 0.1
WARMUP_STEPS = 60
DECAY_SHARE = 0.75
CURRICULUM_TOKENS = 4e6
MTP_WEIGHT, BALANCE_WEIGHT = 0.3, 0.01
# The MTP layer learns faster than the trunk, so it is trained in every fourth step, and at the end
# in every step.
MTP_EVERY, MTP_SHARE = 4, 0.1
SKILLS = (
    "facts", "small talk", "arithmetic with thought", "arithmetic", "recall", "follow-up",
    "tool call", "tool answer", "json", "sorting", "reversing", "picture",
    "repeating",
)  # fmt: skip


def positions(ids: list[int], image_token: int) -> list[list[int]]:
    """mRoPE positions by axis (time, row, column) of a row with square pictures."""
    axes: list[list[int]] = [[], [], []]
    place, i = 0, 0
    while i < len(ids):
        if ids[i] != image_token:
            for axis in axes:
                axis.append(place)
            place, i = place + 1, i + 1
            continue
        for j in range(GRID * GRID):
            for axis, offset in zip(axes, (0, j // GRID, j % GRID), strict=True):
                axis.append(place + offset)
        place, i = place + GRID, i + GRID * GRID
    return axes


def collate(rows: list[tuple[list[int], list[int], Sample]], pad: int, image_token: int) -> Batch:
    """A batch of rows, right-padded to a multiple of the chunk."""
    length = math.ceil(max(len(ids) for ids, _, _ in rows) / CHUNK) * CHUNK
    ids = torch.tensor([r + [pad] * (length - len(r)) for r, _, _ in rows])
    labels = torch.tensor([r + [IGNORE] * (length - len(r)) for _, r, _ in rows])
    places = torch.tensor([positions(r, image_token) for r in ids.tolist()]).transpose(0, 1)
    skills = torch.tensor([SKILLS.index(sample.skill) for _, _, sample in rows])
    pictures = [paint(*sample.picture) for _, _, sample in rows if sample.picture]
    if not pictures:
        return Batch(ids, labels, places, skills)
    pixels = torch.from_numpy(np.ascontiguousarray(patches(pictures)))
    grid = torch.tensor([[1, 2 * GRID, 2 * GRID]] * len(pictures))
    return Batch(ids, labels, places, skills, pixels, grid)


def split_rows(rows: list) -> list[list]:
    """Sort rows by length and split them into up to three parts with the least padding."""
    rows.sort(key=lambda row: len(row[0]))
    lengths = [math.ceil(len(row[0]) / CHUNK) * CHUNK for row in rows]
    ends = range(1, len(rows) + 1)

    def padded(i: int, j: int) -> int:
        return i * lengths[i - 1] + (j - i) * lengths[j - 1] + (len(rows) - j) * lengths[-1]

    i, j = min(((i, j) for i in ends for j in ends if i <= j), key=lambda cut: padded(*cut))
    return [part for part in (rows[:i], rows[i:j], rows[j:]) if part]


def step_batches(seed: object, done: float, tokenizer, pad: int, image_token: int) -> list[Batch]:
    """The batches of one optimizer step: about STEP_TOKENS tokens in two lengths."""
    rng = random.Random(f"{seed}")
    rows, total = [], 0
    while total < STEP_TOKENS:
        sample = training_sample(rng, done)
        ids, labels = encode(sample, tokenizer)
        rows.append((ids, labels, sample))
        total += len(ids)
    return [collate(part, pad, image_token) for part in split_rows(rows)]


def build(out: Path, seed: int):
    """The untrained model, its MTP layer and the tokenizer, which is written to `out`."""
    torch.manual_seed(seed)
    template = (HERE / "chat_template.jinja").read_text()
    tokenizer = train_tokenizer(corpus(), TOKENIZER_VOCAB, out, template)
    vocab_size = math.ceil(tokenizer.get_vocab_size() / 64) * 64
    config = demo_config(tokenizer.token_to_id, vocab_size)
    model = Qwen3_5MoeForConditionalGeneration(config)
    initialize(model)
    return model, MTP(config), tokenizer


def optimizers(model, mtp) -> tuple[Muon, torch.optim.AdamW]:
    """Muon takes the projections of text and MTP layers, AdamW the rest."""
    matrices, others, visual = [], [], []
    for name, p in [*model.named_parameters(), *mtp.named_parameters(prefix="mtp")]:
        inner = ("proj" in name or "fc." in name) and p.ndim >= 2
        small = "in_proj_a" in name or "in_proj_b" in name
        if "visual" in name:
            visual.append(p)
        else:
            (matrices if inner and not small else others).append(p)
    groups = [{"params": others, "share": 1.0}, {"params": visual, "share": SIGHT_SHARE}]
    adam = torch.optim.AdamW(groups, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.01)
    return Muon(matrices), adam


def main() -> None:
    """Parse, train to a number of tokens, save the checkpoint and the loss curve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="training state, kept for resume")
    parser.add_argument("--tokens", type=float, default=18.5e6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, help="stop early, to measure")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)

    model, mtp, tokenizer = build(args.out, args.seed)
    pad, image = tokenizer.token_to_id("<|endoftext|>"), model.config.image_token_id
    muon, adam = optimizers(model, mtp)
    forward = Forward(model, mtp, torch.float32)
    parameters = [*model.parameters(), *mtp.parameters()]
    print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, on {args.threads} threads")

    step, tokens, elapsed, history = 0, 0, 0.0, []
    state_path, stable_path = args.work / "state.pt", args.work / "stable.pt"
    decay_from = args.tokens * (1 - DECAY_SHARE)
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        if state["tokens"] > decay_from and state["total"] != args.tokens:
            state = torch.load(stable_path, weights_only=True)
        model.load_state_dict(state["model"])
        mtp.load_state_dict(state["mtp"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        step, tokens, elapsed = state["step"], state["tokens"], state["elapsed"]
        history = state["history"]
        print(f"resumed at step {step}, {tokens / 1e6:.2f} M tokens")
    else:
        teach_sight(model.model.visual, SIGHT_STEPS, float(model.lm_head.weight.std()))

    def keep(path: Path) -> None:
        state = {
            "model": model.state_dict(),
            "mtp": mtp.state_dict(),
            "muon": muon.state_dict(),
            "adam": adam.state_dict(),
            "step": step,
            "tokens": tokens,
            "elapsed": elapsed,
            "history": history,
            "total": args.tokens,
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    started = time.monotonic() - elapsed
    sums, counts = torch.zeros(2, len(SKILLS)), torch.zeros(len(SKILLS))
    saved_at = time.monotonic()
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    model.train()
    while tokens < args.tokens and (args.max_steps is None or step < args.max_steps):
        if stopped:
            keep(state_path)
            print(f"stopped at step {step}", flush=True)
            return
        # Draws are seeded by step, so that a resumed run sees the same batches.
        done = min(1.0, tokens / CURRICULUM_TOKENS)
        batches = step_batches((args.seed, step), done, tokenizer, pad, image)
        labels = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
        with_mtp = step % MTP_EVERY == 0 or tokens >= args.tokens * (1 - MTP_SHARE)
        for batch in batches:
            trunk, drafted, balance, skills = forward.losses(batch, with_mtp)
            share = len(trunk) / labels
            loss = (trunk.sum() + MTP_WEIGHT * drafted.sum()) / labels
            (loss + BALANCE_WEIGHT * share * balance).backward()
            sums[0].index_add_(0, skills, trunk.detach())
            counts.index_add_(0, skills, torch.ones(len(skills)))
            sums[1, 0] += drafted.detach().sum()
            sums[1, 1] += len(drafted)
            tokens += batch.ids.numel()
        for group in adam.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        left = min(1.0, (args.tokens - tokens) / (args.tokens * DECAY_SHARE))
        scale = warm * max(left, 0.01)
        muon.step(MUON_LR * scale)
        for group in adam.param_groups:
            group["lr"] = ADAM_LR * scale * group["share"]
        adam.step()
        for p in parameters:
            p.grad = None
        step += 1
        elapsed = time.monotonic() - started
        if step % 20 == 0:
            mean = (sums[0].sum() / counts.sum()).item()
            draft_mean = (sums[1, 0] / sums[1, 1]).item()
            by_skill = {
                skill: round(value, 4)
                for skill, value in zip(SKILLS, (sums[0] / counts).tolist(), strict=True)
                if value == value
            }
            history.append({"tokens": tokens, "loss": mean, "mtp": draft_mean, **by_skill})
            sums.zero_()
            counts.zero_()
            detail = " ".join(f"{k.replace(' ', '-')}={v:.3f}" for k, v in by_skill.items())
            print(
                f"step {step} {tokens / 1e6:.2f}M {tokens / elapsed:.0f}/s lr {scale:.2f} "
                f"loss {mean:.4f} mtp {draft_mean:.4f} | {detail}",
                flush=True,
            )
        if tokens >= decay_from and not stable_path.exists():
            keep(stable_path)
        if time.monotonic() - saved_at > 240:
            keep(state_path)
            saved_at = time.monotonic()
    keep(state_path)
    save(model, mtp, args.out, tokenizer.token_to_id)
    (args.work / "loss.json").write_text(json.dumps(history))
    plot(history, args.work / "loss.png")
    print(f"done: {step} steps, {tokens / 1e6:.2f} M tokens, {elapsed / 60:.1f} minutes")


if __name__ == "__main__":
    main()
