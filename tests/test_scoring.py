"""Log-likelihoods: those of whole passes, with shared prompts read once; perplexity by windows."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday

from qwen35_mlx.engine import reading
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.evaluation.scoring import Pair, perplexity, score
from qwen35_mlx.training.examples import encode_example

RNG = np.random.default_rng(0)
SHARED = RNG.integers(2500, size=30).tolist()


def of_whole_passes(model: Any, pair: Pair) -> tuple[float, bool]:
    """Without a cache."""
    ids = [*pair.context, *pair.continuation]
    logits = np.array(model(mx.array([ids[:-1]])))[0, len(pair.context) - 1 :].astype(np.float64)
    targets = ids[len(pair.context) :]
    normalizers = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    value = (logits[np.arange(len(targets)), targets] - normalizers).sum()
    return float(value), bool((logits.argmax(1) == targets).all())


def random_ids(length: int) -> list[int]:
    return RNG.integers(2500, size=length).tolist()


PAIRS = [
    # Choices of one prompt, of one token and of several; one is the beginning of another.
    Pair([*SHARED, 7, 8], [5]),
    Pair([*SHARED, 7, 8], [5, 9, 11]),
    Pair([*SHARED, 7, 8], [5, 9]),
    # The same tokens, divided elsewhere.
    Pair([*SHARED, 7], [8, 5]),
    # Other questions behind the same examples, and behind a part of them.
    Pair(SHARED + random_ids(12), random_ids(3)),
    Pair(SHARED + random_ids(5), random_ids(66)),
    Pair(SHARED[:15] + random_ids(9), random_ids(2)),
    Pair(SHARED[:1], random_ids(4)),
    Pair(random_ids(20), random_ids(1)),
]


@pytest.mark.slow
def test_scores_are_those_of_whole_passes_in_any_order(demo):
    model, _ = demo
    expected = [of_whole_passes(model, pair) for pair in PAIRS]
    order = RNG.permutation(len(PAIRS)).tolist()
    seen: dict[int, Any] = {}
    found, num_read = score(model, [PAIRS[i] for i in order], seen.__setitem__)
    for place, i in enumerate(order):
        assert found[place].log_likelihood == pytest.approx(expected[i][0], abs=2e-3)
        assert found[place].is_greedy == expected[i][1]
        assert seen[place] == found[place]
    # Each part that some share is read once, but for the last token before a continuation.
    distinct = len(
        {tuple(p.context + p.continuation[:-1])[:n] for p in PAIRS for n in range(1, 120)}
    )
    asked = sum(len(p.context) + len(p.continuation) - 1 for p in PAIRS)
    assert distinct <= num_read <= distinct + len(PAIRS) < asked / 2


def test_the_greedy_continuation_is_known(demo):
    model, tokenizer = demo
    context = tokenizer.encode("The capital of France is", add_special_tokens=False)
    logits = model(mx.array([context]))[0, -1]
    likeliest = int(mx.argmax(logits))
    found, _ = score(model, [Pair(context, [likeliest]), Pair(context, [likeliest ^ 1])])
    assert [one.is_greedy for one in found] == [True, False]
    assert found[0].log_likelihood > found[1].log_likelihood


def test_nothing_to_score_is_refused(demo):
    for pair in (Pair([], [1]), Pair([1], [])):
        with pytest.raises(Qwen35Error, match="nothing to score"):
            score(demo[0], [pair])


@pytest.mark.parametrize(
    "window, stride", everyday([(16, 16), (20, 9), (16, 5), (16, 1), (200, None)], 1)
)
def test_each_token_of_a_text_is_scored_once_in_its_window(demo, window, stride):
    model, _ = demo
    ids = SHARED
    found = perplexity(model, ids, window=window, stride=stride)
    step = stride or window
    total, end = 0.0, 1
    while end < len(ids):
        stop = min(len(ids), end + (window - 1 if end == 1 else step))
        start = min(max(0, stop - window), end - 1)
        total += of_whole_passes(model, Pair(ids[start:end], ids[end:stop]))[0]
        end = stop
    assert found["num_tokens"] == 29
    assert found["nll_nats_per_token"] == pytest.approx(-total / 29, abs=1e-3)
    assert found["perplexity"] == pytest.approx(math.exp(-total / 29), rel=2e-3)


@pytest.mark.parametrize("window, stride", [(1, None), (16, 17), (16, 0), (10**7, None)])
def test_impossible_windows_are_refused(demo, window, stride):
    with pytest.raises(Qwen35Error, match="window and stride"):
        perplexity(demo[0], SHARED, window=window, stride=stride)


def test_the_perplexity_of_a_text_is_written_and_printed(run_cli, converted_demo, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("The capital of France is Paris. " * 4)
    command = ("evaluate", converted_demo, "--text", text, "--out", out)
    result = run_cli(*command, "--window", 20, "--stride", 7)
    assert result.exit_code == 0, result.stderr
    found = json.loads(out.read_text())
    bits = found["nll_nats_per_token"] * found["num_tokens"] / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / len(text.read_bytes()))
    assert f"{found['perplexity']}" in result.stdout and str(tmp_path) not in str(found)
    again = run_cli(*command)
    assert again.exit_code == 1 and "exists already" in again.stderr
    assert run_cli(*command, "--limit", 2).exit_code == 2


def test_results_without_a_folder_are_refused_before_anything_is_read(
    run_cli: Any, tmp_path: Path
) -> None:
    result = run_cli("evaluate", tmp_path / "none", "--out", tmp_path / "new" / "results.json")
    assert result.exit_code == 1
    assert "no folder for results.json" in result.stderr
    result = run_cli("evaluate", tmp_path / "none", "--out", tmp_path / ("x" * 250))
    assert result.exit_code == 1 and "cannot write" in result.stderr


def test_conversations_of_a_jsonl_file_are_measured_as_they_are_trained(
    run_cli: Any, demo: Any, converted_demo: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "talk.jsonl", tmp_path / "out.json"
    record = {"prompt": "Who are you?", "completion": "A small model."}
    file.write_text(f"{json.dumps(record)}\n" * 2)
    result = run_cli("evaluate", converted_demo, "--text", file, "--out", out)
    assert result.exit_code == 0, result.stderr
    ids = [int(i) for i in encode_example(demo[1], record).ids] * 2
    found, expected = json.loads(out.read_text()), perplexity(demo[0], ids)
    assert found["num_tokens"] == len(ids) - 1
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)


def test_a_prompt_is_scored_in_pieces_to_its_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SCORED_TOKENS", 2)
    ids = [3, 1, 4, 1, 0, 2, 4]
    prepared: Any = SimpleNamespace(ids=ids, request=SimpleNamespace(prompt_logprobs=1))
    # The hidden states are the logits.
    logits = mx.array(RNG.standard_normal((1, len(ids), 5)), mx.float32)
    model, scores = SimpleNamespace(head=lambda hidden: hidden), reading.Scores(prepared)
    for start, stop in ((0, 5), (5, 7)):
        scores.add(model, logits[:, start:stop])  # type: ignore[arg-type]
    event = scores.event()
    expected = np.array(logits - mx.logsumexp(logits, -1, keepdims=True))[0]
    assert event.logprobs[0] is None and len(event.logprobs) == len(event.top) == len(ids)
    for place in range(1, len(ids)):
        row = expected[place - 1]
        assert event.logprobs[place] == pytest.approx(row[ids[place]], abs=1e-5)
        ((token, logprob),) = event.top[place]
        assert token == row.argmax() and logprob == pytest.approx(row.max(), abs=1e-5)
