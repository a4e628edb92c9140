"""Speed of a model on this machine at several contexts.

One run at a context of N tokens is a conversation of two turns. Cold: a prompt of N tokens is
prefilled into an empty cache, and an answer is decoded. Warm: a short message follows, and only its
tokens are prefilled. Both use random ids and no drafts, which need real text. Drafts are measured
separately, on answers to a few questions. mlx-lm, which is not a dependency, can be compared with.
"""

import math
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..checkpoint.headers import read_headers
from ..checkpoint.resolver import resolve as resolve_tensors
from ..config import ModelConfig, read_config
from ..engine.decode import greedy
from ..engine.prompt_cache import PromptCache
from ..engine.speculate import AUTO, OFF, Drafter
from ..errors import Qwen35Error
from ..kernels.matrix import arrays_of
from ..machine import GIB, describe
from ..memory import decode_bytes
from ..model.language import Model
from ..progress import StepProgress
from ..prompt import encode_messages

# Version of the JSON; increased when a figure changes its meaning.
FORMAT = 1
FIRST_CONTEXT, CONTEXT_FACTOR, DEFAULT_CONTEXT = 512, 8, 32_768
# Tokens of the answer, and of the next message.
NEW_TOKENS, WARM_TOKENS = 64, 64
ROOM = NEW_TOKENS + WARM_TOKENS
# Prose, code, and text that repeats its prompt; and the maximum length of each answer.
QUESTIONS = (
    "Explain in a few paragraphs why the sky is blue.",
    "Write a Python function that merges two sorted lists, with a docstring and three tests.",
    "Repeat this line by line, in capitals:\none red apple\ntwo green pears\nthree yellow plums",
)
MAX_ANSWER = 128
SPEEDS = ("prefill_tps", "warm_prefill_tps", "decode_tps")

# Appends ids to its context, and yields that many tokens; ours does not read the last one.
Conversation = Callable[[list[int], int], Iterator[int]]
# Makers of empty conversations, by the name of the program.
Programs = Mapping[str, Callable[[], Conversation]]
Clock = Callable[[], float]
OURS, MLX_LM = "qwen35_mlx", "mlx_lm"


class Run(NamedTuple):
    """Times of one run, and its peak memory with the weights."""

    ttft_s: float
    decode_s: float
    warm_ttft_s: float
    peak_memory_bytes: int


def contexts(config: ModelConfig, longest: int | None = None) -> list[int]:
    """Prompt lengths 512, 4,096, 32,768 and so on, and `longest` itself."""
    most = config.context_length - ROOM
    if longest is None:
        longest = min(most, DEFAULT_CONTEXT)
    if not 1 <= longest <= most:
        raise Qwen35Error(
            "the context does not fit the model",
            got=f"{longest:,} tokens",
            expected=f"1 to {most:,}; the answer and the next message take {ROOM}",
        )
    sizes, size = [], FIRST_CONTEXT
    while size < longest:
        sizes.append(size)
        size *= CONTEXT_FACTOR
    return [*sizes, longest]


def our_conversation(model: Model) -> Conversation:
    """A greedy conversation, with the cache and the decode loop of this package."""
    cache = PromptCache(model)

    def turn(ids: list[int], num_tokens: int) -> Iterator[int]:
        return (step.token for step in greedy(cache, ids, num_tokens))

    return turn


def measure(
    conversation: Conversation,
    prompt: list[int],
    num_new: int,
    num_warm: int,
    clock: Clock = time.perf_counter,
) -> Run:
    """One run; the time to the first token counts as prefill."""
    mx.reset_peak_memory()
    started = clock()
    tokens, times = [], []
    for token in conversation(prompt, num_new):
        tokens.append(token)
        times.append(clock())
    message = ([tokens[-1], *prompt] * num_warm)[:num_warm]
    warm_started = clock()
    for _ in conversation(message, 1):
        pass
    warm_s = clock() - warm_started
    return Run(times[0] - started, times[-1] - times[0], warm_s, mx.get_peak_memory())


def measure_in_turns(
    programs: Programs, prompt: list[int], num_runs: int, clock: Clock = time.perf_counter
) -> dict[str, list[Run]]:
    """`num_runs` of each program, in alternating order, because the first one has an advantage."""
    runs: dict[str, list[Run]] = {name: [] for name in programs}
    for i in range(num_runs):
        for name, make in list(programs.items())[:: 1 if i % 2 == 0 else -1]:
            runs[name].append(measure(make(), prompt, NEW_TOKENS, WARM_TOKENS, clock))
            mx.clear_cache()
    return runs


def medians(runs: Sequence[Run], context: int) -> dict[str, float]:
    """Speeds from the medians of the times, and the highest peak of memory."""
    seconds = [max(statistics.median(column), 1e-9) for column in list(zip(*runs, strict=True))[:3]]
    ttft_s, decode_s, warm_ttft_s = seconds
    return {
        "prefill_tps": context / ttft_s,
        "ttft_s": ttft_s,
        "warm_prefill_tps": WARM_TOKENS / warm_ttft_s,
        "warm_ttft_s": warm_ttft_s,
        "decode_tps": (NEW_TOKENS - 1) / decode_s,
        "peak_memory_bytes": max(run.peak_memory_bytes for run in runs),
    }


def bench(
    model: Model,
    programs: Programs,
    sizes: Sequence[int],
    num_runs: int = 3,
    progress: StepProgress = lambda done, total, what: None,
    clock: Clock = time.perf_counter,
) -> list[dict[str, Any]]:
    """One row per context: our figures, another program's under its name, and ratios to them."""
    limit = bandwidth_limit()
    ids = prompt_ids(sizes[-1], model.config.vocab_size)
    for make in programs.values():
        # Warm up: compile kernels and touch the weights before anything is measured.
        measure(make(), ids[:WARM_TOKENS], 2, 1)
    rows = []
    for i, size in enumerate(sizes):
        progress(i, len(sizes), f"{size:,} tokens")
        runs = measure_in_turns(programs, ids[:size], num_runs, clock)
        figures = {name: medians(those, size) for name, those in runs.items()}
        row: dict[str, Any] = {"context": size, **figures.pop(OURS)}
        read = bytes_per_token(model, size + NEW_TOKENS // 2)
        gbps = row["decode_tps"] * read / 1e9
        row |= {"decode_bytes_per_token": read, "decode_gb_per_s": gbps}
        row["percent_of_bandwidth"] = 100 * gbps / limit if limit else None
        for name, theirs in figures.items():
            row[name] = theirs
            row[f"vs_{name}"] = {speed: row[speed] / theirs[speed] for speed in SPEEDS}
        rows.append(row)
    return rows


def drafting(
    model: Model, tokenizer: Any, num_runs: int = 3, clock: Clock = time.perf_counter
) -> dict[str, Any] | None:
    """Decoding speed with and without drafts, in alternating runs; None without an MTP layer."""
    if getattr(model, "mtp", None) is None:
        return None
    drafters = {mode: Drafter(model, mode) for mode in (OFF, AUTO)}
    seconds, num_tokens = dict.fromkeys(drafters, 0.0), 0
    # The first run is not counted: it compiles kernels and times passes of every size.
    for run in range(num_runs + 1):
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            ids = encode_messages(tokenizer, messages, add_generation_prompt=True)
            for mode in [*drafters][:: 1 if run % 2 else -1]:
                count, taken = _answer(model, tokenizer, ids, drafters[mode], clock)
                if run:
                    seconds[mode] += taken
                    num_tokens += count if mode == OFF else 0
    plain_tps, decode_tps = (num_tokens / max(seconds[mode], 1e-9) for mode in (OFF, AUTO))
    stats = drafters[AUTO].stats
    return {
        "plain_decode_tps": plain_tps,
        "decode_tps": decode_tps,
        "vs_plain": decode_tps / plain_tps if plain_tps else 1.0,
        "tokens_per_pass": stats.tokens_per_pass,
        "acceptance": stats.summary,
    }


def _answer(
    model: Model, tokenizer: Any, ids: list[int], drafter: Drafter, clock: Clock
) -> tuple[int, float]:
    """Number of tokens of a greedy answer after its first one, and their seconds."""
    cache = PromptCache(model)
    times = []
    with closing(greedy(cache, ids, MAX_ANSWER, drafter)) as steps:
        for step in steps:
            times.append(clock())
            if step.token in tokenizer.eos_token_ids:
                break
    return len(times) - 1, times[-1] - times[0]


def prompt_ids(num_tokens: int, vocab_size: int) -> list[int]:
    """Random ids, the same each time."""
    return random.Random(0).choices(range(vocab_size), k=num_tokens)


def bytes_per_token(model: Model, context: int) -> int:
    """Bytes that decoding one token reads: weights (of experts only the chosen), caches, states."""
    experts = model.experts
    # With experts on disk, the arrays hold only some of them.
    whole = experts.num_experts / experts.num_slots if experts else 1.0
    sizes = (
        (name.rpartition(".")[0], array.nbytes * (whole if ".switch_mlp." in name else 1))
        for name, array in arrays_of(model.parameters()).items()
    )
    item_bytes = model.language_model.model.norm.weight.dtype.size
    return decode_bytes(model.config, sizes, context, item_bytes)


def bandwidth_limit() -> float | None:
    """Memory bandwidth of this machine in 10^9 bytes per second, if its chip is known."""
    machine = describe()
    return machine.gbps or None if machine.gpu_limit_bytes else None


def label(folder: Path, model: str) -> dict[str, Any]:
    """Machine, versions and model of a bench; nothing personal: only the last name of a path."""
    machine = describe()
    found = resolve_tensors(read_config(folder), read_headers(folder))
    stored = {
        segment.tensor.name: segment.tensor.nbytes
        for match in found.text_matches
        for part in match.parts
        for segment in part.segments
    }
    num_weights = sum(math.prod(match.shape) for match in found.text_matches)
    return {
        "format": FORMAT,
        "machine": machine.chip,
        "memory_gib": round(machine.memory_bytes / GIB, 1),
        "os": machine.os,
        "device": str(mx.default_device()),
        "version": machine.versions["qwen35-mlx"],
        "commit": commit(),
        "mlx": machine.versions["mlx"],
        "mlx_lm": machine.versions.get("mlx-lm"),
        "model": folder.resolve().name if Path(model).expanduser().is_dir() else model,
        "bits_per_weight": 8 * sum(stored.values()) / num_weights,
        "bandwidth_limit_gbps": bandwidth_limit(),
        "new_tokens": NEW_TOKENS,
        "warm_tokens": WARM_TOKENS,
    }


def commit() -> str | None:
    """The git commit of the checkout that this package runs from; None if it is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def mlx_lm_program(folder: Path, model: Model) -> Callable[[], Conversation]:
    """Greedy conversations with mlx-lm's own model and generator.

    It shares the arrays of `model`, so no second copy takes memory, unless it needs other ones.
    """
    try:
        from mlx_lm.utils import load_model
    except ImportError:
        raise Qwen35Error(
            "mlx-lm is not installed",
            expected="the program to compare with",
            hint="pip install mlx-lm",
        ) from None
    theirs, _ = load_model(folder, lazy=True)
    with suppress(ValueError):
        arrays = arrays_of({"language_model": model.language_model.parameters()})
        theirs.load_weights(list(arrays.items()), strict=True)
    mx.eval(theirs.parameters())
    return lambda: mlx_lm_conversation(theirs)


def mlx_lm_conversation(model: Any) -> Conversation:
    """A conversation with an empty cache of mlx-lm."""
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)

    def turn(ids: list[int], num_tokens: int) -> Iterator[int]:
        steps = generate_step(mx.array(ids), model, max_tokens=num_tokens, prompt_cache=cache)
        yield from (int(token) for token, _ in steps)
        # It still evaluates the last token; wait, so that this is not measured with the next turn.
        mx.eval([entry.state for entry in cache])

    return turn
