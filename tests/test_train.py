"""Training of adapters: gradients, examples, resumption, memory, and what the command says."""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from everyday import everyday
from mlx.utils import tree_flatten, tree_unflatten

from qwen35_mlx.checkpoint.adapter import DORA, LORA, WEIGHTS_FILE, read_adapter
from qwen35_mlx.config import FULL, LINEAR, ModelConfig
from qwen35_mlx.errors import MemoryRefused, Qwen35Error
from qwen35_mlx.model.adapters import DEFAULT_KEYS, EXPERT_KEYS, add_new, attach_to_model
from qwen35_mlx.model.language import Model
from qwen35_mlx.training import estimate
from qwen35_mlx.training.examples import Example, Examples, batches, encode_example, read_examples
from qwen35_mlx.training.trainer import (
    STATE_FILE,
    CheckpointedLayer,
    Training,
    TrainSettings,
    loss_of_batch,
)

WORDS = "apple river stone cloud paper music glass bread chair light horse plant".split()


def tiny_config(kind: str, moe: bool) -> ModelConfig:
    from checkpoints import text_config

    text = text_config(moe, tied=False)
    if moe:
        # All of them, or a token's experts would change within the differences.
        text["num_experts_per_tok"] = text["num_experts"]
    return ModelConfig.from_hf(text | dict(num_hidden_layers=2, layer_types=[kind] * 2))


def tiny_model(kind: str, moe: bool, adapter: str, seed: int = 0) -> Model:
    """fp32, with an adapter that changes something already."""
    mx.random.seed(seed)
    model = Model(tiny_config(kind, moe))
    keys = DEFAULT_KEYS + (EXPERT_KEYS if adapter == LORA else ())
    add_new(model, keys, num_layers=2, rank=2, scale=2.0, dropout=0.0, kind=adapter)
    changed = [
        (name, 0.1 * mx.random.normal(array.shape) if name.endswith("lora_b") else array)
        for name, array in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(changed, strict=False)
    # Norms of small numbers would make the loss too crooked for differences.
    embedding = model.language_model.model.embed_tokens
    embedding.weight = 10 * embedding.weight
    mx.eval(model.parameters())
    return model


def loss_in_float64(model: Model, ids: mx.array, spans: mx.array) -> float:
    """From all logits; the digits of float32 would be too few for differences."""
    logits = np.array(model(ids[:, :-1])).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    places = [(row, t) for row, (a, b) in enumerate(spans.tolist()) for t in range(a, b)]
    return -float(np.mean([log_p[row, t - 1, int(ids[row, t])] for row, t in places]))


def gradient_error(model: Model, num_tokens: int, each: bool = False) -> float:
    """The largest error of the slope along the gradient, of all parameters together or of each.

    Against central differences without their first error term, at the best of three distances,
    relative to the largest slope.
    """
    rng = np.random.default_rng(0)
    ids = mx.array(rng.integers(1, model.config.vocab_size, (2, num_tokens + 1)))
    spans = mx.array([[1, num_tokens + 1], [2, num_tokens]])
    _, tree = nn.value_and_grad(model, loss_of_batch)(model, ids, spans)
    gradients = dict(tree_flatten(tree))
    values = dict(tree_flatten(model.trainable_parameters()))
    assert gradients.keys() == values.keys() and len(values) > 5

    def loss(names: list[str], norm: float, distance: float) -> float:
        moved = [(name, values[name] + distance / norm * gradients[name]) for name in names]
        model.update(tree_unflatten(moved))
        found = loss_in_float64(model, ids, spans)
        model.update(tree_unflatten([(name, values[name]) for name in names]))
        return found

    errors, slopes = [], []
    for names in [[name] for name in values] if each else [[*values]]:
        slope = sum(mx.square(gradients[name]).sum().item() for name in names) ** 0.5
        assert slope > 0, names
        found = []
        # The longest is too far for some, and the shortest too near for the digits of the loss.
        for step in (0.02, 0.006, 0.002):
            near, far = (
                (loss(names, slope, h) - loss(names, slope, -h)) / (2 * h) for h in (step, 2 * step)
            )
            found.append(abs(slope - (4 * near - far) / 3))
            if found[-1] < 3e-4 * slope:
                break
        errors.append(min(found))
        slopes.append(slope)
    return max(errors) / max(slopes)


KINDS = [
    (kind, moe, adapter, num_tokens)
    for kind in (LINEAR, FULL)
    for moe in (False, True)
    for adapter in (LORA, DORA)
    for num_tokens in (70, 5)
]


@pytest.mark.parametrize("kind, moe, adapter, num_tokens", everyday(KINDS, 1, 10))
def test_gradients_are_those_of_finite_differences(kind, moe, adapter, num_tokens):
    """Long texts by the chunk rule, short ones token by token."""
    model = tiny_model(kind, moe, adapter)
    # Of DoRA's norms no gradient is taken, as its authors have it: its slopes are others.
    if adapter == DORA:
        freeze_norms(model)
    assert gradient_error(model, num_tokens) <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind, moe, adapter, num_tokens", KINDS)
def test_gradients_of_each_parameter_are_those_of_finite_differences(
    kind, moe, adapter, num_tokens
):
    model = tiny_model(kind, moe, adapter)
    if adapter == DORA:
        freeze_norms(model)
    assert gradient_error(model, num_tokens, each=True) <= 1e-3


def freeze_norms(model: Model) -> None:
    from qwen35_mlx.model.adapters import DoRALinear

    for module in model.modules():
        if isinstance(module, DoRALinear):
            module.fix()


@pytest.mark.parametrize("kind, moe", everyday([(LINEAR, True), (FULL, False)], 0))
def test_layers_that_are_run_again_give_the_same_gradients(kind, moe):
    model = tiny_model(kind, moe, LORA)
    ids = mx.array(np.random.default_rng(0).integers(1, 90, (2, 41)))
    spans = mx.array([[1, 41], [3, 30]])
    of = nn.value_and_grad(model, loss_of_batch)
    (kept, _), expected = of(model, ids, spans)
    mx.eval(expected)
    for layer in model.layers:
        layer.__class__ = CheckpointedLayer
    (again, _), found = of(model, ids, spans)
    assert kept.item() == pytest.approx(again.item(), abs=1e-6)
    for (name, a), (_, b) in zip(tree_flatten(expected), tree_flatten(found), strict=True):
        assert mx.abs(a - b).max().item() <= 1e-5, name


def test_the_loss_is_the_mean_over_what_is_to_be_learned(monkeypatch):
    """In blocks of rows that do not divide them; padding and prompts count nothing."""
    from qwen35_mlx.training import trainer

    monkeypatch.setattr(trainer, "LOSS_ROWS", 16)
    model = tiny_model(FULL, False, LORA)
    ids = mx.array(np.random.default_rng(0).integers(1, 90, (2, 24)))
    spans = mx.array([[4, 24], [2, 9]])
    loss, count = loss_of_batch(model, ids, spans)
    assert int(count) == 27
    assert loss.item() == pytest.approx(loss_in_float64(model, ids, spans), rel=1e-5)


def write_data(folder: Path, num_valid: int = 4) -> Path:
    """Questions whose answers the demo does not know, in three forms."""
    rows: list[dict[str, Any]] = []
    for word in WORDS:
        question, answer = f"What is the code of {word}?", f"The code is {word}-{len(word)}."
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        rows.append({"messages": messages})
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(row) for row in rows]
    (folder / "train.jsonl").write_text("\n".join(lines[num_valid:]) + "\n\n")
    (folder / "valid.jsonl").write_text("\n".join(lines[:num_valid]) + "\n")
    return folder


MESSAGES = [
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "The Rhine."},
]


@pytest.mark.parametrize(
    "record",
    [{"messages": MESSAGES}, {"prompt": "Name a river.", "completion": "The Rhine."}],
    ids=["messages", "completion"],
)
def test_only_the_answer_is_learned_of_a_masked_prompt(demo, record):
    tokenizer = demo[1]
    whole, masked = (encode_example(tokenizer, record, mask) for mask in (False, True))
    assert whole.ids.tolist() == masked.ids.tolist()
    assert whole.first_target == 1
    prompt = tokenizer.decode(masked.ids[: masked.first_target].tolist())
    answer = tokenizer.decode(masked.ids[masked.first_target :].tolist())
    assert "Name a river." in prompt and "assistant" in prompt
    assert "The Rhine." in answer and "river" not in answer


def test_a_text_ends_where_it_ends(demo):
    tokenizer = demo[1]
    ids = encode_example(tokenizer, {"text": "The sky is blue."}).ids.tolist()
    assert ids[-1] in tokenizer.eos_token_ids and ids[-2] not in tokenizer.eos_token_ids


@pytest.mark.parametrize(
    "line, expected",
    [
        ("[1]", "not a JSON object"),
        ('{"prompt": "x"}', "no completion"),
        ('{"messages": []}', "messages are no list"),
        ('{"messages": ', "Expecting value"),
        ('{"text": "abc"}', "no prompt to mask"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no answer to train on"),
    ],
)
def test_a_line_that_is_no_example_is_named(demo, tmp_path, line, expected):
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"messages": MESSAGES}) + "\n" + line + "\n")
    with pytest.raises(Qwen35Error) as raised:
        read_examples(file, demo[1], max_tokens=64, mask_prompt=True)
    assert "line 2" in str(raised.value) and expected in str(raised.value)


def test_examples_that_are_cut_and_those_without_an_answer_are_counted(demo, tmp_path):
    long = [{"role": "user", "content": "river " * 90}, MESSAGES[1]]
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps({"messages": m}) for m in (MESSAGES, long)))
    found = read_examples(file, demo[1], max_tokens=50, mask_prompt=True)
    assert (len(found.examples), found.num_cut, found.num_dropped) == (1, 1, 1)
    kept = read_examples(file, demo[1], max_tokens=50)
    assert (len(kept.examples), kept.longest, kept.num_dropped) == (2, 50, 0)
    file.write_text(json.dumps({"messages": long}))
    with pytest.raises(Qwen35Error, match="no example to train on"):
        read_examples(file, demo[1], max_tokens=50, mask_prompt=True)


def test_every_example_comes_once_an_epoch_and_a_late_start_changes_nothing():
    rng = random.Random(0)
    examples = [Example(np.full(rng.randint(2, 70), i + 1, np.int32), 1) for i in range(11)]
    stream = batches(examples, 4, seed=3)
    first = [next(stream) for _ in range(9)]
    for epoch in range(3):
        rows = [int(row[0]) for ids, _ in first[3 * epoch : 3 * epoch + 3] for row in ids]
        assert sorted(rows) == list(range(1, 12))
    late = batches(examples, 4, seed=3, start=5)
    for ids, spans in first[5:]:
        other = next(late)
        assert mx.array_equal(ids, other[0]) and mx.array_equal(spans, other[1])
    assert all((ids.shape[1] - 1) % 32 == 0 for ids, _ in first)


def training(out: Path, num_steps: int, **options: Any) -> Training:
    """Of a new model, the same each time, on texts that count up."""
    mx.random.seed(0)
    model = Model(tiny_config(LINEAR, False))
    settings = TrainSettings(num_steps=num_steps, learning_rate=1e-2, batch_size=2, rank=4)
    texts = [np.arange(1 + i, 12 + i, dtype=np.int32) for i in range(7)]
    examples = Examples([Example(ids, 1) for ids in texts], digest="texts")
    return Training(model, settings, examples, examples, out, **options)


@pytest.mark.slow
def test_a_resumed_training_ends_like_one_that_was_never_stopped(tmp_path):
    whole = training(tmp_path / "whole", 8, validate_every=4, checkpointing=False)
    history = whole.run()
    assert [s.step for s in history] == [*range(9)]
    losses = {s.step: s.validation_loss for s in history if s.validation_loss is not None}
    assert [*losses] == [0, 4, 8] and losses[8] < losses[4] < losses[0]
    training(tmp_path / "parts", 5).run()
    second = training(tmp_path / "parts", 8)
    second.resume()
    assert second.step == 5
    second.run()
    one, two = (mx.load(str(tmp_path / name / WEIGHTS_FILE)) for name in ("whole", "parts"))
    assert one.keys() == two.keys()
    assert all(mx.abs(one[name] - two[name]).max().item() <= 1e-5 for name in one)
    # And it is what a model computes that the adapter is loaded into.
    mx.random.seed(0)
    loaded = Model(tiny_config(LINEAR, False))
    attach_to_model(loaded, read_adapter(tmp_path / "whole"))
    ids = mx.array([[5, 6, 7, 8]])
    assert mx.abs(loaded(ids) - whole.model(ids)).max().item() <= 1e-5


def test_a_training_is_not_resumed_with_other_settings_or_a_damaged_state(tmp_path):
    tmp_path = tmp_path / "runs" / "first"
    first = training(tmp_path, 1)
    assert first.run()[-1].step == 1
    # For whoever generates with it.
    assert not first.model.training
    changed = training(tmp_path, 2)
    changed.settings = replace(changed.settings, learning_rate=1e-4)
    with pytest.raises(Qwen35Error, match="learning_rate="):
        changed.resume()
    changed = training(tmp_path, 2)
    changed.train = replace(changed.train, digest="others")
    with pytest.raises(Qwen35Error, match="data="):
        changed.resume()
    (tmp_path / STATE_FILE).write_bytes(b"\x10" * 20)
    with pytest.raises(Qwen35Error, match="cannot be read"):
        training(tmp_path, 2).resume()


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.slow
def test_the_estimate_is_no_less_than_what_a_step_takes(moe, checkpointing):
    """And not three times as much."""
    model = tiny_model(FULL, moe, LORA)
    model = Model(replace(model.config, layer_types=(LINEAR, FULL)))
    settings = TrainSettings(batch_size=2, rank=8)
    add_new(model, settings.keys, rank=8, scale=1.0, dropout=0.0, kind=LORA, num_layers=2)
    mx.eval(model.parameters())
    for layer in model.layers:
        if checkpointing:
            layer.__class__ = CheckpointedLayer
    ids, spans = mx.ones((2, 513), mx.int32), mx.array([[1, 513]] * 2)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(nn.value_and_grad(model, loss_of_batch)(model, ids, spans))
    taken = mx.get_peak_memory() - before
    counted = estimate.count(model, 0, settings, 513, checkpointing)
    estimated = counted.activations + counted.logits
    assert taken <= estimated <= 3 * taken


def test_training_that_does_not_fit_is_refused_with_the_numbers(monkeypatch):
    model = tiny_model(FULL, False, LORA)
    machine = estimate.describe()
    whole, less = (
        estimate.count(model, 10**6, TrainSettings(), 2048, way).total for way in (False, True)
    )
    assert less < whole
    small, large = (
        estimate.count(model, 0, TrainSettings(rank=rank), 64, True).adapter for rank in (4, 8)
    )
    assert large == 2 * small > 0

    def require(limit: int, **options: Any) -> Any:
        monkeypatch.setattr(estimate, "describe", lambda: machine._replace(gpu_limit_bytes=limit))
        return estimate.require_memory(model, 10**6, TrainSettings(), 2048, **options)

    assert [require(n).checkpointing for n in (whole, whole - 1, less)] == [False, True, True]
    with pytest.raises(MemoryRefused, match="--batch-size"):
        require(less - 1)
    assert require(less - 1, force=True).total == less


def test_train_says_what_it_does_and_does_it_once(run_cli, converted_demo, tmp_path):
    data, out, png = write_data(tmp_path / "data", 2), tmp_path / "out", tmp_path / "loss.png"
    options = ("--data", data, "--adapter-path", out, "--batch-size", "1", "--rank", "2")
    options += ("--num-layers", "1", "--max-tokens", "20", "--validation-batches", "1")
    made = run_cli("train", converted_demo, *options, "--steps", "1", "--png", png)
    assert made.exit_code == 0, made.stderr
    for line in (
        r"\d+ examples of \d+ tokens, the longest 20; 2 to validate",
        r"\d+ examples are longer than --max-tokens and were cut, 0 of them have nothing left",
        r"memory: about \d+\.\d\d GB\n  .{42} +\d+\.\d{3} GB",
        r"step 0: validation loss \d",
        r"loss \d+\.\d{3}, \d+ tokens/s, 0\.\d\d GB, 0:00 left",
    ):
        assert re.search(line, made.stderr), (line, made.stderr)
    assert re.fullmatch(
        r"(validation loss \d+\.\d+ after step [01]\n){2}peak memory 0\.\d+ GB\n"
        rf"adapter written to {re.escape(str(out))}\n",
        made.stdout,
    )
    assert png.read_bytes().startswith(b"\x89PNG")
    again = run_cli("train", converted_demo, *options, "--steps", "1")
    assert again.exit_code == 1 and "--resume" in again.stderr
    complete = run_cli("train", converted_demo, *options, "--steps", "1", "--resume")
    assert complete.exit_code == 1 and "more --steps" in complete.stderr


def test_training_ends_where_the_loss_is_no_number_and_keeps_what_was_saved(tmp_path):
    """It went on to its last step, and saved NaN over the last weights that were numbers."""
    training(tmp_path, 1).run()
    diverging = training(tmp_path, 3, save_every=1)
    diverging.resume()
    diverging.optimizer.learning_rate = 1e30
    with pytest.raises(Qwen35Error, match=r"diverged\n.*loss of nan.*\n.*\n.*--learning-rate"):
        diverging.run()
    assert all(mx.isfinite(array).all() for array in mx.load(str(tmp_path / WEIGHTS_FILE)).values())


def test_training_that_could_not_be_saved_does_not_begin(tmp_path):
    (tmp_path / "file").touch()
    begun = training(tmp_path / "file" / "adapter", 1)
    with pytest.raises(Qwen35Error, match="cannot write"):
        begun.run()
    assert begun.step == 0


def test_a_full_disk_leaves_what_was_saved_or_nothing_at_all(tmp_path, full_disk):
    folder = tmp_path / "new" / "adapter"
    with full_disk(), pytest.raises(Qwen35Error, match=r"cannot write (.|\n)* bytes are needed"):
        training(folder, 1).run()
    assert list(tmp_path.iterdir()) == []
    training(folder, 1).run()
    before = {file: file.read_bytes() for file in folder.iterdir()}
    resumed = training(folder, 2)
    resumed.resume()
    with full_disk(), pytest.raises(Qwen35Error, match="--resume"):
        resumed.run()
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_a_disk_without_room_is_refused_before_the_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    begun = training(tmp_path / "adapter", 1)
    with pytest.raises(Qwen35Error, match=r"not enough disk space(.|\n)*free disk space"):
        begun.run()
    assert begun.history == [] and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_train_writes_an_adapter_that_answers_in_the_trained_pattern(
    run_cli, converted_demo, tmp_path
):
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    options = ("--data", data, "--adapter-path", out, "--batch-size", "2", "--rank", "4")
    small = ("--num-layers", "1", "--learning-rate", "2e-3", "--validate-every", "2")
    made = run_cli("train", converted_demo, *options, *small, "--steps", "3")
    assert made.exit_code == 0, made.stderr
    first, last = (
        float(line.split()[2]) for line in made.stdout.splitlines() if "validation loss" in line
    )
    assert last < first
    assert "memory: about" in made.stderr and "tokens/s" in made.stderr and "left" in made.stderr
    again = run_cli("train", converted_demo, *options, "--steps", "3")
    assert again.exit_code == 1 and "--resume" in again.stderr
    complete = run_cli("train", converted_demo, *options, *small, "--steps", "3", "--resume")
    assert complete.exit_code == 1 and "more --steps" in complete.stderr
    png = tmp_path / "loss.png"
    more = run_cli(
        "train", converted_demo, *options, *small, "--steps", "4", "--resume", "--png", png
    )
    assert more.exit_code == 0 and "after step 4" in more.stdout
    assert png.read_bytes().startswith(b"\x89PNG")
    answer = run_cli(
        "generate", converted_demo, "--adapter-path", out, "-p", "Hi", "--max-tokens=4"
    )
    assert answer.exit_code == 0


def test_training_without_mlx_lm_names_its_pip_line(run_cli, converted_demo, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mlx_lm.tuner.trainer", None)
    found = run_cli("train", converted_demo, "--data", tmp_path)
    assert found.exit_code == 1
    assert "pip install 'qwen35-mlx[train]'" in found.stderr


def test_an_adapter_is_loaded_without_mlx_lm(converted_demo, tmp_path):
    import subprocess
    import sys

    from test_adapters import random_adapter

    from qwen35_mlx.checkpoint.adapter import write_adapter

    write_adapter(tmp_path, random_adapter(converted_demo))
    code = (
        "import sys; sys.modules['mlx_lm'] = None; import qwen35_mlx; "
        f"m, _ = qwen35_mlx.load({str(converted_demo)!r}, adapter={str(tmp_path)!r}); "
        "print(len(m.adapter_digest))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "64", run.stderr


def test_a_picture_in_an_example_is_refused():
    from qwen35_mlx.training.examples import _example

    with pytest.raises(Qwen35Error, match="a picture"):
        _example([4, -9, 5], 1)
    assert Examples([_example([4, 5], 1)]).longest == 2
