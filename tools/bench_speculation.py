"""Drafting several tokens a step: parity of the MTP layer, and how many drafts are taken.

python tools/bench_speculation.py [--prompts 16] [--configs 10]

A draft is taken if greedy decoding says the same token. Everything here is teacher-forced: after
each token of an answer of the demo the MTP layer drafts on from the true text. The last line is
JSON.
"""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from label import label

import qwen35_mlx
from qwen35_mlx.config import FULL
from qwen35_mlx.convert import convert
from qwen35_mlx.model.cache import KVCache
from qwen35_mlx.model.language import DecoderLayer, Model
from qwen35_mlx.model.mtp import MTP

TOOLS = Path(__file__).parent
sys.path[:0] = [str(TOOLS / "demo"), str(TOOLS.parent / "tests")]
from data import held_out  # noqa: E402
from evaluate import SOURCE, prompt_ids  # noqa: E402

DEPTH, MAX_ANSWER = 4, 64
BITS = (8, 6, 4, 3)
MAX_LOGITS_DIFFERENCE, MIN_FIRST_ACCEPTANCE = 3e-4, 0.90

# A prompt and what greedy decoding adds to it.
Text = tuple[list[int], list[int]]


def mtp_logits_difference(num_configs: int, seed: int = 0) -> float:
    """Largest distance to transformers' MtpModel over random configs; needs torch."""
    import torch
    import transformers
    from live.mtp_reference import draw_mtp_pair

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    worst = 0.0
    for index in range(num_configs):
        with tempfile.TemporaryDirectory() as home:
            pair = draw_mtp_pair(seed, index, Path(home))
            found = max(pair.difference(), pair.difference(num_read=20), pair.difference(piece=7))
        print(f"MTP logits {found:.1e}  {pair.config}", flush=True)
        worst = max(worst, found)
    return worst


def greedy_texts(model: Model, tokenizer: Any, num_prompts: int) -> list[Text]:
    """Held-out questions of every skill without pictures, and the model's answers."""
    by_skill: dict[str, list[Any]] = {}
    for sample in held_out(num_each=8):
        if sample.picture is None:
            by_skill.setdefault(sample.skill, []).append(sample)
    turns = zip(*(samples[:8] for samples in by_skill.values()), strict=False)
    texts = []
    for sample in [sample for turn in turns for sample in turn][:num_prompts]:
        prompt = prompt_ids(tokenizer, sample)
        settings = dict(temperature=0, max_tokens=MAX_ANSWER)
        said = [r.token for r in qwen35_mlx.stream_generate(model, tokenizer, prompt, **settings)]
        if len(said) > DEPTH:
            texts.append((prompt, said))
    return texts


def first_draft_acceptance(
    model: Model, texts: Sequence[Text], has_history: bool = True
) -> list[float]:
    """Share of the drafts that are taken at each depth, of those whose forerunners were.

    Without history the MTP layer has read nothing before the token that it starts from.
    """
    taken, drafted = [0] * DEPTH, [0] * DEPTH
    for prompt, said in texts:
        ids = prompt + said
        hidden, embeddings = model.trunk(mx.array([ids])), model.embed(ids)
        for start in range(len(prompt) - 1, len(ids) - 2):
            drafts = _drafts(model, ids, start, hidden, embeddings, has_history)
            for depth, is_taken in enumerate(drafts):
                drafted[depth] += 1
                taken[depth] += is_taken
    return [t / max(d, 1) for t, d in zip(taken, drafted, strict=True)]


def _drafts(
    model: Model,
    ids: list[int],
    start: int,
    hidden: mx.array,
    embeddings: mx.array,
    has_history: bool,
) -> Iterator[bool]:
    """Whether each draft behind token `start + 1` is right, up to the first that is not."""
    assert model.mtp is not None
    cache = KVCache()
    if has_history and start:
        model.mtp.read(hidden[:, :start], embeddings[:, 1 : start + 1], cache)
    state, embedding = hidden[:, start : start + 1], embeddings[:, start + 1 : start + 2]
    for position in range(start + 2, min(start + 2 + DEPTH, len(ids))):
        state = model.mtp(state, embedding, cache)
        draft = int(model.head(state[0, 0]).argmax().item())
        yield draft == ids[position]
        if draft != ids[position]:
            return
        embedding = embeddings[:, position : position + 1]


def with_mtp_bits(model: Model, unquantized: Model, bits: int) -> None:
    """Give the model the other's MTP layer at so many bits; router and fc have 8."""
    assert unquantized.mtp is not None
    model.mtp = MTP(model.config, DecoderLayer(model.config, FULL))
    model.mtp.update(unquantized.mtp.parameters())

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        is_kept = path.endswith(("fc", "mlp.gate", "shared_expert_gate"))
        return {"bits": 8 if is_kept else bits, "group_size": 64}

    nn.quantize(model.mtp, class_predicate=settings)


def acceptance_by_bits(home: Path, num_prompts: int) -> dict[str, list[float]]:
    """The demo at 4 bits, as it is converted and with its MTP layer at other bits."""
    model, tokenizer = qwen35_mlx.load(convert(SOURCE, home / "4-bit", bits=4))
    plain, _ = qwen35_mlx.load(convert(SOURCE, home / "bf16", dtype="bfloat16"))
    texts = greedy_texts(model, tokenizer, num_prompts)
    rows = {
        "as converted": first_draft_acceptance(model, texts),
        "without history": first_draft_acceptance(model, texts, has_history=False),
    }
    for bits in BITS:
        with_mtp_bits(model, plain, bits)
        rows[f"{bits} bits"] = first_draft_acceptance(model, texts)
    num_drafts = sum(len(said) - 1 for _, said in texts)
    print(f"\nAcceptance by depth, {len(texts)} prompts, {num_drafts} first drafts")
    for name, row in rows.items():
        print(f"{name:16}" + "".join(f"{share:8.3f}" for share in row))
    return rows


def main() -> None:
    """Print tables, then one JSON line; fail where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--configs", type=int, default=10)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    difference = mtp_logits_difference(args.configs)
    with tempfile.TemporaryDirectory() as home:
        rows = acceptance_by_bits(Path(home), args.prompts)
    first = rows["as converted"][0]
    is_good = difference <= MAX_LOGITS_DIFFERENCE and first >= MIN_FIRST_ACCEPTANCE
    figures = {
        "benchmark": "speculation",
        **label(),
        "mtp_logits_difference": difference,
        "first_draft_acceptance": round(first, 4),
        "acceptance_by_depth": {n: [round(share, 4) for share in row] for n, row in rows.items()},
        "passed": is_good,
    }
    print(json.dumps(figures))
    if not is_good:
        sys.exit(1)


if __name__ == "__main__":
    main()
