"""What a model answers to lm-evaluation-harness, of which a stand-in is enough here."""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

import qwen35_mlx

NAME = "qwen35_mlx.evaluation.harness"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, imported without the harness, which takes seconds."""
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.tasks", "lm_eval.utils"):
        module: Any = ModuleType(name)
        module.TemplateLM = module.TaskManager = object
        module.simple_evaluate = module.handle_non_serializable = module.make_table = None
        module.get_rolling_token_windows = lambda token_list, prefix_token, **_: [
            ([prefix_token], token_list)
        ]
        module.make_disjoint_window = lambda window: window
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def test_likelihoods_and_answers_are_those_of_the_model_and_come_once(
    harness: Any, demo: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = demo
    prompt, steps = "What is the capital of France?", list[Any]()

    def made() -> Any:
        journal = harness.Journal(tmp_path / "answers", "demo")
        return harness.HarnessModel(
            model, tokenizer, journal, enable_thinking=True, progress=lambda *s: steps.append(s)
        )

    ours = made()
    ids = ours.tok_encode(prompt)
    logits = model(mx.array([[ours.eot_token_id, *ids]]))[0, :-1]
    rows = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    each = [rows[i, token].item() for i, token in enumerate(ids)]
    request = SimpleNamespace(args=(prompt,))
    assert ours.loglikelihood_rolling([request]) == [pytest.approx(sum(each), abs=1e-3)]
    context, best = ids[:4], int(rows[4].argmax())
    pairs = [(None, [ours.eot_token_id, *context], [token]) for token in (ids[4], best)]
    scores = ours._loglikelihood_tokens(pairs)
    assert scores[0] == (pytest.approx(each[4], abs=1e-3), best == ids[4])
    assert scores[1][0] >= scores[0][0] and scores[1][1]
    asked = ours.apply_chat_template([{"role": "user", "content": prompt}])
    thought = SimpleNamespace(args=(asked, {"until": "is", "max_gen_toks": 120}))
    plain = SimpleNamespace(args=(prompt, {"until": [" "], "max_gen_toks": 9}))
    answers = ours.generate_until([thought, plain])
    whole = qwen35_mlx.generate(model, tokenizer, asked, max_tokens=120, temperature=0.0)
    assert answers[0] == whole.rpartition("</think>")[2].lstrip().partition("is")[0] != ""
    assert (
        answers[1]
        == qwen35_mlx.generate(model, tokenizer, prompt, max_tokens=9, temperature=0.0).partition(
            " "
        )[0]
    )
    begun = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "So"}]
    open_end = ours.apply_chat_template(begun, add_generation_prompt=False)
    assert open_end.endswith("So")
    assert steps == [(0, 1, "log-likelihoods"), (0, 2, "log-likelihoods"),
                     (1, 2, "log-likelihoods"), (0, 2, "answers"), (1, 2, "answers")]  # fmt: skip
    # A run that was killed in a line goes on, and reads nothing again.
    with (tmp_path / "answers").open("a") as stream:
        stream.write('\n["cut')
    again, before = made(), len(steps)
    assert again.generate_until([thought, plain]) == answers
    assert again._loglikelihood_tokens(pairs) == scores
    assert (again.num_read, len(steps)) == (0, before)
