"""The server under load: tokens a second of many answers beside mlx-lm's, and schemas kept.

Parts of `bench_server.py`; by itself it runs both and ends with one JSON line.
"""

import argparse
import http.client
import itertools
import json
import random
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from bench import CONFIG, write_checkpoint
from label import label
from random_schemas import is_valid, random_schema
from server_process import ANSWER_SECONDS, ServerProcess, mlx_lms, ours

import qwen35_mlx
from qwen35_mlx.convert import convert
from qwen35_mlx.engine.grammar import Grammars
from qwen35_mlx.engine.requests import Grammar, Request

DEMO = Path(qwen35_mlx.__file__).parent / "demo"
VOCAB, ENDS = 2560, (2547, 2549)
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
]
ROWS = (1, 2, 4, 8, 16)


def stream(server: ServerProcess, prompt: str, num_tokens: int, counts: list[int]) -> None:
    """Add the length of a streamed answer to the counts."""
    body: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "stream": True,
    }
    body["stream_options"] = {"include_usage": True}
    # To their full length, all of them.
    body["logit_bias"] = {str(token): -100 for token in ENDS}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=ANSWER_SECONDS)
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"}
    )
    for line in connection.getresponse():
        if line.startswith(b"data: {") and (usage := json.loads(line[6:]).get("usage")):
            counts.append(usage["completion_tokens"])
    connection.close()


class Served(NamedTuple):
    """Tokens a second of all answers together, and CPU seconds of the server for a token."""

    tps: float
    cpu_s: float


def served(server: ServerProcess, prompts: list[str], num_tokens: int) -> Served:
    """From the first request to the last token."""
    counts: list[int] = []
    threads = [
        threading.Thread(target=stream, args=(server, prompt, num_tokens, counts))
        for prompt in prompts
    ]
    began, cpu_before = time.perf_counter(), server.cpu_seconds()
    for thread in threads:
        thread.start()
        # mlx-lm's server takes in few connections at a time, and resets the others.
        time.sleep(0.005)
    for thread in threads:
        thread.join()
    assert len(counts) == len(prompts), f"{len(prompts) - len(counts)} answers are not whole"
    seconds, cpu_seconds = time.perf_counter() - began, server.cpu_seconds() - cpu_before
    return Served(sum(counts) / seconds, cpu_seconds / sum(counts))


def decode_vs_mlx_lm(
    folder: Path, num_tokens: int, rounds: int
) -> tuple[dict[int, float], dict[int, float]]:
    """Ratios by number of answers, above 1 where ours is better: tokens a second, CPU a token.

    Both servers run, and answer in turns.
    """
    speeds, cpu = dict[int, float](), dict[int, float]()
    # Unknown to both: mlx-lm keeps the shortest of prompts, ours none below 32 tokens.
    numbers = itertools.count(1)
    with ours(folder) as mine, mlx_lms(folder) as theirs:
        # The first row of all is tried twice: both servers compile what they need.
        for num_rows in (1, *ROWS):
            pairs = []
            for _ in range(rounds):
                prompts = [f"{next(numbers)} is the number of a story:" for _ in range(num_rows)]
                pairs.append([served(one, prompts, num_tokens) for one in (mine, theirs)])
            speeds[num_rows] = round(statistics.median(a.tps / b.tps for a, b in pairs), 2)
            cpu[num_rows] = round(statistics.median(b.cpu_s / a.cpu_s for a, b in pairs), 2)
            a, b = (
                statistics.median(run.tps for run in column) for column in zip(*pairs, strict=True)
            )
            print(
                f"{folder.name:10} {num_rows:3} answers: ours {a:8.1f} tok/s, mlx-lm {b:8.1f}, "
                f"ratio {speeds[num_rows]:5.2f}, by CPU {cpu[num_rows]:5.2f}",
                flush=True,
            )
    return speeds, cpu


def schema_invalid(num_schemas: int, tokenizer: Any, vocab_size: int) -> int:
    """How many answers to random schemas are not valid, where tokens are drawn at random."""
    grammars, invalid = Grammars(tokenizer, vocab_size), 0
    for seed in range(num_schemas):
        schema = random_schema(random.Random(seed))
        if not is_valid(random_answer(grammars, schema, seed, tokenizer), schema):
            print(f"schema {seed} is not kept: {json.dumps(schema)}")
            invalid += 1
    return invalid


def random_answer(grammars: Grammars, schema: Any, seed: int, tokenizer: Any) -> Any:
    """What the grammar lets through of random logits; ValueError if it is no JSON."""
    compiled = grammars.of(
        Request(prompt="", grammar=Grammar("json_schema", schema)), lambda: False
    )
    assert compiled is not None
    matcher, key = compiled.copy(), mx.random.key(seed)
    ids: list[int] = []
    while not matcher.is_finished:
        key, own = mx.random.split(key)
        forbidden = mx.array(matcher.forbidden())
        logits = mx.random.normal(forbidden.shape, key=own)
        token = int(mx.argmax(mx.where(forbidden, -mx.inf, logits)).item())
        if token in tokenizer.eos_token_ids:
            break
        matcher.accept(token)
        ids.append(token)
    return json.loads(tokenizer.decode(ids))


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--only-demo", action="store_true")
    options = parser.parse_args()
    sizes = options.tokens, options.rounds
    with tempfile.TemporaryDirectory() as scratch:
        # Both compute in float32, as mlx-lm does what is not quantized in the checkpoint's type.
        demo = convert(DEMO, Path(scratch) / "demo", bits=4, dtype="float32")
        results = {"": decode_vs_mlx_lm(demo, *sizes)}
        if not options.only_demo:
            source = Path(scratch) / "source"
            CONFIG["text_config"]["vocab_size"] = VOCAB
            write_checkpoint(source)
            for name in TOKENIZER_FILES:
                shutil.copy(DEMO / name, source / name)
            moe = convert(source, Path(scratch) / "moe", bits=4, dtype="float32")
            results["moe_"] = decode_vs_mlx_lm(moe, *sizes)
        tokenizer = qwen35_mlx.load(demo)[1]
    invalid = schema_invalid(options.schemas, tokenizer, VOCAB)
    figures: dict[str, Any] = {"schema_invalid": invalid}
    for prefix, (speeds, cpu) in results.items():
        figures[f"{prefix}decode_tps_vs_mlx_lm"] = speeds
        figures[f"{prefix}decode_cpu_vs_mlx_lm"] = cpu
    print(json.dumps(label() | figures))


if __name__ == "__main__":
    main()
