"""The server's engine: tokens a second of many rows beside mlx-lm's, and answers by schemas.

Parts of `bench_server.py`; by itself it runs both and ends with one JSON line.
"""

import argparse
import functools
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from bench import write_checkpoint
from label import label
from mlx_lm.generate import BatchGenerator
from random_schemas import is_valid, random_schema

import qwen35_mlx
from qwen35_mlx.convert import convert
from qwen35_mlx.engine.grammar import Grammars
from qwen35_mlx.engine.requests import Grammar, Request, Token
from qwen35_mlx.engine.scheduler import Engine
from qwen35_mlx.model.loading import load_model
from qwen35_mlx.sampling import SamplingParams

DEMO = Path(qwen35_mlx.__file__).parent / "demo"
ROWS = (1, 2, 4, 8, 16)
PROMPT_TOKENS = 24
GREEDY = SamplingParams()


def prompts(num_rows: int, vocab: int) -> list[list[int]]:
    """Prompts of different lengths that have nothing in common."""
    draw = random.Random(num_rows)
    return [
        [draw.randrange(vocab) for _ in range(PROMPT_TOKENS + 5 * row)] for row in range(num_rows)
    ]


def steady_tps(times: list[list[float]]) -> float:
    """Tokens a second of all rows while each of them decodes."""
    start, end = max(row[0] for row in times), min(row[-1] for row in times)
    return sum(start < t <= end for row in times for t in row) / (end - start)


def our_tps(engine: Engine, ids: list[list[int]], num_tokens: int, draft: str = "off") -> float:
    """Of the engine, in its own thread, text and events included."""
    times: list[list[float]] = [[] for _ in ids]
    tickets = []
    for row, prompt in enumerate(ids):
        request = Request(
            prompt=prompt, params=GREEDY, max_tokens=num_tokens, ignore_eos=True, draft=draft
        )
        request.stop_loops = False
        ticket = engine.submit(request)
        # All rows decode until the last prompt is read, so each has tokens to spare.
        ticket.add_listener(
            lambda event, row=row: (
                isinstance(event, Token) and times[row].append(time.perf_counter())
            )
        )
        tickets.append(ticket)
    while not all(ticket.is_over for ticket in tickets):
        time.sleep(0.01)
    return steady_tps(times)


def their_tps(model: Any, ids: list[list[int]], num_tokens: int) -> float:
    """Of mlx-lm's BatchGenerator, which its server runs, without text and events."""
    generator = BatchGenerator(model, completion_batch_size=32, prefill_batch_size=8)
    rows = generator.insert([list(p) for p in ids], [num_tokens] * len(ids))
    times: dict[int, list[float]] = {row: [] for row in rows}
    while responses := generator.next_generated():
        for response in responses:
            times[response.uid].append(time.perf_counter())
    return steady_tps(list(times.values()))


def decode_tps_vs_mlx_lm(folder: Path, num_tokens: int, rounds: int) -> dict[int, float]:
    """Ratio of tokens a second by number of rows, both on one folder, in float32, in turns."""
    ours, _ = load_model(folder)
    _, tokenizer = qwen35_mlx.load(demo_folder())
    theirs, _ = mlx_lm.utils.load_model(folder)
    theirs.set_dtype(mx.float32)
    mx.eval(theirs.parameters())
    engine = Engine(ours, tokenizer)
    engine.start()
    ratios = {}
    for num_rows in ROWS:
        ids = prompts(num_rows, 2500)
        # The first rows go on until the last prompt is read.
        enough = num_tokens + 8 * num_rows
        pairs = [
            (our_tps(engine, ids, enough), their_tps(theirs, ids, enough)) for _ in range(rounds)
        ]
        mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios[num_rows] = mine / other
        print(
            f"{folder.name:10} {num_rows:3} rows: ours {mine:8.1f} tok/s,"
            f" mlx-lm {other:8.1f}, ratio {mine / other:5.2f}"
        )
    engine.stop()
    return ratios


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


@functools.cache
def demo_folder() -> Path:
    """The demo, converted once."""
    return convert(DEMO, Path(tempfile.mkdtemp()) / "demo", bits=4)


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--only-demo", action="store_true")
    options = parser.parse_args()
    sizes = options.tokens, options.rounds
    results = {"demo": decode_tps_vs_mlx_lm(demo_folder(), *sizes)}
    if not options.only_demo:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder) / "source")
            moe = convert(Path(folder) / "source", Path(folder) / "moe", bits=4)
            results["moe"] = decode_tps_vs_mlx_lm(moe, *sizes)
    _, tokenizer = qwen35_mlx.load(demo_folder())
    invalid = schema_invalid(options.schemas, tokenizer, 2560)
    print(json.dumps(label() | {"decode_tps_vs_mlx_lm": results, "schema_invalid": invalid}))


if __name__ == "__main__":
    main()
