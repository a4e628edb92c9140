"""The server under load: tokens a second of many answers beside mlx-lm's, and schemas kept.

Parts of `bench_server.py`; by itself it runs both and ends with one JSON line.
"""

import argparse
import http.client
import json
import random
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from bench import CONFIG, write_checkpoint
from label import label
from random_schemas import is_valid, random_schema
from server_process import ServerProcess, mlx_lms, ours

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
ANSWER_SECONDS = 600


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


def served_tps(server: ServerProcess, prompts: list[str], num_tokens: int) -> float:
    """Tokens a second of all answers together, from the first request to the last token."""
    counts: list[int] = []
    threads = [
        threading.Thread(target=stream, args=(server, prompt, num_tokens, counts))
        for prompt in prompts
    ]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
        # mlx-lm's server takes in few connections at a time, and resets the others.
        time.sleep(0.005)
    for thread in threads:
        thread.join()
    assert len(counts) == len(prompts), f"{len(prompts) - len(counts)} answers are not whole"
    return sum(counts) / (time.perf_counter() - began)


def decode_tps_vs_mlx_lm(folder: Path, num_tokens: int, rounds: int) -> dict[int, float]:
    """Ratio of tokens a second by number of answers; both servers run, and answer in turns."""
    ratios = {}
    with ours(folder) as mine, mlx_lms(folder) as theirs:
        for num_rows in (1, *ROWS):
            pairs = []
            for turn in range(rounds):
                # Unknown to both, or one would have the beginning of it.
                prompts = [f"Round {turn} of {num_rows}, story {i}:" for i in range(num_rows)]
                pairs.append([served_tps(one, prompts, num_tokens) for one in (mine, theirs)])
            # The first row of all is tried twice: both servers compile what they need.
            ratios[num_rows] = statistics.median(a / b for a, b in pairs)
            a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(
                f"{folder.name:10} {num_rows:3} answers: ours {a:8.1f} tok/s, mlx-lm {b:8.1f}, "
                f"ratio {ratios[num_rows]:5.2f}",
                flush=True,
            )
    return {rows: round(ratio, 2) for rows, ratio in ratios.items()}


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
    matcher, key = compiled.matcher(), mx.random.key(seed)
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
        results = {"demo": decode_tps_vs_mlx_lm(demo, *sizes)}
        if not options.only_demo:
            source = Path(scratch) / "source"
            CONFIG["text_config"]["vocab_size"] = VOCAB
            write_checkpoint(source)
            for name in TOKENIZER_FILES:
                shutil.copy(DEMO / name, source / name)
            moe = convert(source, Path(scratch) / "moe", bits=4, dtype="float32")
            results["moe"] = decode_tps_vs_mlx_lm(moe, *sizes)
        tokenizer = qwen35_mlx.load(demo)[1]
    invalid = schema_invalid(options.schemas, tokenizer, VOCAB)
    print(json.dumps(label() | {"decode_tps_vs_mlx_lm": results, "schema_invalid": invalid}))


if __name__ == "__main__":
    main()
