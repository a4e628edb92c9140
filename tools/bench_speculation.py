"""Drafting several tokens a step: that no text changes, how many drafts are right, what it costs.

python tools/bench_speculation.py [--prompts 16] [--configs 10] [--conversations 500]

Acceptance by bits is teacher-forced: after each token of an answer of the demo the MTP layer
drafts on from the true text. Tokens a pass are those of answers as they are generated, prompts
included in what the layer has read. The last line is JSON.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from label import label
from speculation_bytes import round_bytes, state_bytes_of_a_round
from speculation_draws import chi_squares
from speculation_exact import compare
from speculation_lookup import lookup_tokens_per_pass

import qwen35_mlx
from qwen35_mlx import Chat
from qwen35_mlx.config import FULL
from qwen35_mlx.convert import convert
from qwen35_mlx.engine.mtp_state import MTPState
from qwen35_mlx.engine.speculate import AUTO, OFF, Drafter
from qwen35_mlx.engine.speculate import MTP as BY_MTP
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
MIN_TOKENS_PER_PASS = {1: 1.80, 2: 2.20, 3: 2.45, 4: 2.65}
MIN_LOOKUP_TOKENS_PER_PASS = 4.0
MIN_P, MAX_ACCEPTANCE_CHANGE = 1e-3, 0.02

KEPT = ("snapshot", "session")
SECOND_TURNS = [
    (first, second)
    for first in ("Who are you?", "What is the capital of France?", "What is 12 + 7?")
    for second in (
        "Repeat: the quick brown fox and the lazy dog",
        "What is the capital of Italy?",
        "What is the opposite of hot?",
        "Spell: garden",
        "What is 47 + 85?",
        "What colour is the sky?",
    )
]

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


def acceptance_by_bits(model: Model, plain: Model, texts: Sequence[Text]) -> dict[str, list[float]]:
    """The demo as it is converted to 4 bits, and with its MTP layer at other bits."""
    converted = model.mtp
    rows = {
        "as converted": first_draft_acceptance(model, texts),
        "without history": first_draft_acceptance(model, texts, has_history=False),
    }
    for bits in BITS:
        with_mtp_bits(model, plain, bits)
        rows[f"{bits} bits"] = first_draft_acceptance(model, texts)
    model.mtp = converted
    num_drafts = sum(len(said) - 1 for _, said in texts)
    print(f"\nAcceptance by depth, {len(texts)} prompts, {num_drafts} first drafts")
    for name, row in rows.items():
        print(f"{name:16}" + "".join(f"{share:8.3f}" for share in row))
    return rows


def tokens_per_pass(model: Model, tokenizer: Any, texts: Sequence[Text]) -> dict[int, float]:
    """Of answers as they are generated with K drafts of the MTP layer a pass."""
    found = {}
    print("\nTokens a pass and acceptance by depth of generated answers")
    for number in MIN_TOKENS_PER_PASS:
        drafter = Drafter(model, BY_MTP, number)
        num_tokens = 0
        for prompt, said in texts:
            settings: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_ANSWER}
            responses = qwen35_mlx.stream_generate(
                model, tokenizer, prompt, draft=drafter, **settings
            )
            tokens = [response.token for response in responses]
            assert tokens == said
            num_tokens += len(tokens)
        # A draft behind the end of an answer is no token of it.
        found[number] = num_tokens / drafter.stats.num_passes
        shares = "".join(f"{share:8.3f}" for share in drafter.stats.acceptance(BY_MTP))
        print(f"K={number}: {found[number]:.3f} {shares}")
    return found


def acceptance_of_kept_states(model: Model, tokenizer: Any, home: Path) -> dict[str, float]:
    """How often first drafts are right in second turns: as ever, after an undo, after a load.

    Beside them, where the layer has forgotten what it had read.
    """
    shares = {}
    print("\nFirst drafts that are right in the second turn")
    for way in ("uninterrupted", *KEPT, "forgotten"):
        drafted = accepted = 0
        options: dict[str, Any] = {
            "draft": BY_MTP, "num_draft_tokens": 3, "sampling": {"temperature": 0.0},
            "max_tokens": MAX_ANSWER, "enable_thinking": False,
        }  # fmt: skip
        for first, second in SECOND_TURNS:
            chat = Chat(model, tokenizer, **options)
            list(chat.send(first))
            chat.read_ahead()
            if way == "snapshot":
                list(chat.send("Say something else."))
                chat.undo()
            elif way == "session":
                chat.save(home / "kept")
                chat = Chat(model, tokenizer, **options)
                assert chat.load(home / "kept") is None
            elif way == "forgotten" and (cache := chat._cache) and cache.mtp:
                cache.mtp = MTPState(model, cache.mtp.layer)
            chat.drafter = Drafter(model, BY_MTP, 3)
            list(chat.send(second))
            of_chat = chat.drafter.stats.first_drafts
            drafted, accepted = drafted + of_chat[0], accepted + of_chat[1]
        shares[way] = accepted / drafted
        print(f"{way:14} {shares[way]:.4f} of {drafted}")
    return shares


def speed_of_auto(model: Model, tokenizer: Any, texts: Sequence[Text]) -> float:
    """Tokens a second as drafting is by itself, over those without; in turns."""
    drafters = {mode: Drafter(model, mode) for mode in (OFF, AUTO)}
    seconds = dict.fromkeys(drafters, 0.0)
    for index, (prompt, _) in enumerate(texts):
        for mode in [*drafters][:: 1 if index % 2 else -1]:
            responses = qwen35_mlx.stream_generate(
                model, tokenizer, prompt, draft=drafters[mode], temperature=0,
                max_tokens=MAX_ANSWER,
            )  # fmt: skip
            next(responses)
            started = time.perf_counter()
            for _ in responses:
                pass
            seconds[mode] += time.perf_counter() - started
    return seconds[OFF] / seconds[AUTO]


def main() -> None:
    """Print tables, then one JSON line; fail where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--configs", type=int, default=10)
    parser.add_argument("--conversations", type=int, default=500)
    parser.add_argument("--edits", type=int, default=40)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    difference = mtp_logits_difference(args.configs)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        model, tokenizer = qwen35_mlx.load(convert(SOURCE, home / "4-bit", bits=4))
        plain, _ = qwen35_mlx.load(convert(SOURCE, home / "bf16", dtype="bfloat16"))
        texts = greedy_texts(model, tokenizer, args.prompts)
        rows = acceptance_by_bits(model, plain, texts)
        per_pass = tokens_per_pass(model, tokenizer, texts)
        kept = acceptance_of_kept_states(model, tokenizer, home)
        speed = speed_of_auto(model, tokenizer, texts)
        print(
            f"\nSpeed with drafts, as far as they are faster: {speed:.2f} of that without",
            flush=True,
        )
        found = compare(home, 0, args.conversations)
    lookup = lookup_tokens_per_pass(args.edits)
    min_p = min(row.p for row in chi_squares())
    print()
    table, states = round_bytes(), state_bytes_of_a_round()
    first = rows["as converted"][0]
    change = max(abs(kept[way] - kept["uninterrupted"]) for way in KEPT)
    checks = {
        "mtp_logits_difference": difference <= MAX_LOGITS_DIFFERENCE,
        "first_draft_acceptance": first >= MIN_FIRST_ACCEPTANCE,
        "tokens_per_pass": all(per_pass[k] >= least for k, least in MIN_TOKENS_PER_PASS.items()),
        "lookup_tokens_per_pass": lookup["lookup_tokens_per_pass"] >= MIN_LOOKUP_TOKENS_PER_PASS,
        "acceptance_change": change <= MAX_ACCEPTANCE_CHANGE,
        "differences": not found["differences"],
        "chi_square_min_p": min_p >= MIN_P,
        "state_bytes_over_plain": states["state_bytes_over_plain"] <= 1,
    }
    figures = {
        "benchmark": "speculation",
        **label(),
        **found,
        "tokens_per_pass": {k: round(v, 3) for k, v in per_pass.items()},
        "first_draft_acceptance": round(first, 4),
        **lookup,
        "state_bytes_over_plain": states["state_bytes_over_plain"],
        "chi_square_min_p": round(min_p, 4),
        "mtp_logits_difference": difference,
        "acceptance_by_depth": {n: [round(share, 4) for share in row] for n, row in rows.items()},
        "acceptance_of_kept_states": {n: round(share, 4) for n, share in kept.items()},
        "auto_speed_over_off": round(speed, 3),
        "cost_of_a_round": {
            bits: [row["cost"] for row in of_bits] for bits, of_bits in table.items()
        },
        "failed": [name for name, is_good in checks.items() if not is_good],
        "passed": all(checks.values()),
    }
    print(json.dumps(figures))
    if not figures["passed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
