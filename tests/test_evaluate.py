"""lm-evaluation-harness on our model: mlx-lm's numbers, prompts read once, resumed after a stop."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from local_tasks import ANSWER, CHOICE, requests, write_tasks

import qwen35_mlx

pytestmark = [
    pytest.mark.slow,
    # sacrebleu and datasets, when they are imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Read when `datasets` is first imported, so the same for all tests."""
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


@pytest.fixture
def harness(demo: tuple[Any, Any]) -> Any:
    from qwen35_mlx.evaluation.harness import HarnessModel, Journal

    return lambda **options: HarnessModel(*demo, Journal(None, ""), **options)


def test_log_likelihoods_are_those_of_mlx_lm(demo, harness, converted_demo, tasks):
    from mlx_lm.evaluate import MLXLM

    given = requests(tasks, CHOICE)
    theirs = MLXLM(str(converted_demo))
    theirs._model.set_dtype(mx.float32)
    expected = theirs.loglikelihood(given)
    ours = harness()
    found = ours.loglikelihood(given)
    for (value, greedy), (their_value, their_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(their_value, abs=1e-3)
        assert greedy == bool(their_greedy)
    # Four choices of each of four questions, behind the same examples.
    assert ours.num_read < ours.num_asked / 4


def test_a_whole_text_is_scored_from_its_first_token(harness, tasks):
    from types import SimpleNamespace

    ours = harness()
    text = "The capital of France is Paris."
    (whole,) = ours.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    ids = ours.tok_encode(text)
    ((expected, _),) = ours._loglikelihood_tokens([(None, [ours.eot_token_id], ids)])
    assert whole == pytest.approx(expected, abs=1e-4) and whole < -5


def test_answers_end_at_their_stops_and_leave_the_thought_out(demo, harness, tasks):
    ours = harness(enable_thinking=True)
    for request, found in zip(
        given := requests(tasks, ANSWER), ours.generate_until(given), strict=True
    ):
        text = qwen35_mlx.generate(*demo, request.args[0], max_tokens=24, temperature=0.0)
        assert found == text.partition("\n")[0].partition(".")[0]
    prompt = ours.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}]
    )
    from types import SimpleNamespace

    settings = {"until": ["\n\n"], "max_gen_toks": 200}
    (found,) = ours.generate_until([SimpleNamespace(args=(prompt, settings))])
    assert prompt.endswith("<think>\n") and "Paris" in found and "think" not in found


@pytest.mark.parametrize("chat_template", [False, True])
def test_a_stopped_run_goes_on_to_the_same_results(
    run_cli, converted_demo, tasks, tmp_path, monkeypatch, chat_template
):
    from qwen35_mlx.evaluation import harness

    options = ["--include-path", tasks]
    options += ["--chat-template", "--no-think"] if chat_template else []
    command = ("evaluate", converted_demo, "--tasks", f"{CHOICE},{ANSWER}", *options)
    whole = run_cli(*command, "--out", tmp_path / "whole.json")
    assert whole.exit_code == 0 and f"|{CHOICE}" in whole.stdout.replace(" ", "")
    left = 9

    def counted(add: Any) -> Any:
        def one(*arguments: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            add(*arguments)

        return one

    with monkeypatch.context() as patch:
        patch.setattr(harness.Journal, "add", counted(harness.Journal.add))
        stopped = run_cli(*command, "--out", tmp_path / "part.json")
    assert stopped.exit_code != 0 and not (tmp_path / "part.json").exists()
    partial = tmp_path / "part.json.partial"
    # A line that was being written when the program was killed.
    partial.write_bytes(partial.read_bytes() + b'\n["cut')
    again = run_cli(*command, "--out", tmp_path / "part.json")
    assert again.exit_code == 0 and not partial.exists()
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("whole", "part"))
    assert first["results"] == second["results"]
    assert second["prompt_tokens_read"] < first["prompt_tokens_read"]
    assert "pretty_env_info" not in first and str(os.getcwd()) not in json.dumps(first)


def test_an_adapter_has_answers_of_its_own(tmp_path):
    from qwen35_mlx.evaluation.harness import Journal

    Journal(tmp_path / "j", "model").add([1.0, True], "score", [1], [2])
    assert Journal(tmp_path / "j", "model").get("score", [1], [2]) == [1.0, True]
    assert Journal(tmp_path / "j", "model adapter").get("score", [1], [2]) is None


def test_unknown_tasks_are_a_plain_error(run_cli, converted_demo, tasks, tmp_path):
    options = ("--include-path", tasks, "--out", tmp_path / "o.json")
    result = run_cli("evaluate", converted_demo, "--tasks", "none_such", *options)
    assert result.exit_code == 1 and "cannot be run" in result.stderr
    assert "none_such" in result.stderr
