"""Texts for calibration and comparison: rows of ids, conversations, and what two texts share."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

from qwen35_mlx.cli import main as cli
from qwen35_mlx.cli.local_models import SOURCE
from qwen35_mlx.convert import plan
from qwen35_mlx.convert.calibration_text import (
    HELD_OUT_FILE,
    NUM_KEPT,
    TEXT_FILE,
    encode,
    overlap,
    read_text,
    sketch,
)
from qwen35_mlx.convert.job import output_config
from qwen35_mlx.convert.transform import Known
from qwen35_mlx.errors import CheckpointError, Qwen35Error
from qwen35_mlx.model.loading import load_tokenizer
from qwen35_mlx.quant.statistics import Calibration, load, save

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CHAT = {
    "messages": [
        {"role": "user", "content": "Is it warm in Oslo?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "I call the tool.",
            "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}],
        },
        {"role": "tool", "content": '{"degrees": 3}'},
        {"role": "assistant", "content": "No, 3 degrees."},
    ],
    "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": CITY}}],
}


def decoded(ids):
    return load_tokenizer(SOURCE, {}, {}).decode(ids.flatten().tolist())


def test_text_becomes_rows_of_equal_length(tmp_path):
    tokenizer = load_tokenizer(SOURCE, {}, {})
    text = "What is the capital of France? " * 12
    expected = tokenizer.encode(text, add_special_tokens=False)
    ids = encode(SOURCE, text, length=32)
    assert ids.shape == (len(expected) // 32, 32)
    assert ids.flatten().tolist() == expected[: ids.size]
    assert encode(SOURCE, text, length=32, most=40).tolist() == [expected[:32]]
    # Shorter than one row: a row of its own length.
    assert encode(SOURCE, text, length=5000).tolist() == [expected]
    for nothing in ("", "a"):
        with pytest.raises(Qwen35Error, match="the text is too short"):
            encode(SOURCE, nothing)
    with pytest.raises(Qwen35Error, match="no checkpoint at"):
        encode(tmp_path / "absent", text)
    small = shutil.copytree(SOURCE, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    config["text_config"]["vocab_size"] = 80
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(Qwen35Error, match=r"not in the model.s vocabulary"):
        encode(small, text)


def test_questions_go_through_the_template():
    back = decoded(encode(SOURCE, "Q: Who are you?\nA: I am.\n---\nplain"))
    assert "<|im_start|>user\nWho are you?<|im_end|>" in back
    assert back.endswith("plain")


def test_a_model_without_a_template_reads_questions_as_they_are(tmp_path):
    base = shutil.copytree(SOURCE, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    for text in ("Q: Who?\nA: I.", json.dumps(CHAT)):
        assert decoded(encode(base, text)) == text


def test_tool_calls_and_thoughts_of_a_conversation_are_in_the_models_format(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text(f"{json.dumps(CHAT)}\n\n{json.dumps({'text': 'plain'})}\n")
    ids = encode(SOURCE, file)
    back = decoded(ids)
    for part in (
        '"name": "get_weather"',
        "<think>\nI call the tool.\n</think>",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>",
        '<tool_response>\n{"degrees": 3}\n</tool_response>',
        "No, 3 degrees.<|im_end|>\nplain",
    ):
        assert part in back
    # The same as a passage of a text.
    passage = encode(SOURCE, f"plain\n---\n{json.dumps(CHAT)}")
    assert decoded(passage).removeprefix("plain") == back.partition("plain")[0]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"messages": "x"}, "messages are no list"),
        ({"messages": ["x"]}, "messages[0] is not usable"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [*CHAT["messages"][:1], {"role": "assistant", "content": 5}]}, "[1].content"),
        ({"messages": [*CHAT["messages"], {"role": "user", "tool_calls": "x"}]}, "[4].tool_calls"),
        ({"tools": {"name": "x"}}, "tools is not usable"),
        ({"tools": [CITY, "x"]}, "tools[1] is not usable"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_field_is_named_with_its_line_and_file(tmp_path, change, field):
    file = tmp_path / "chats.jsonl"
    file.write_text(f"{json.dumps(CHAT)}\n{json.dumps(CHAT | change)}\n")
    with pytest.raises(Qwen35Error) as raised:
        encode(SOURCE, file)
    assert f"line 2 of {file}" in str(raised.value) and field in str(raised.value)


def test_a_wrong_conversation_in_a_text_is_named_by_its_passage():
    with pytest.raises(Qwen35Error, match=r"passage 2: messages\[0\] is not usable"):
        encode(SOURCE, 'plain text\n---\n{"messages": [5]}')
    # Text about such conversations.
    about = '{"messages": …} is the form of a line.'
    assert decoded(encode(SOURCE, about)) == about


def test_text_that_is_none_is_refused(tmp_path):
    (tmp_path / "noise").write_bytes(b"\xff\xfe\xff")
    for name in ("noise", "absent"):
        with pytest.raises(Qwen35Error, match="cannot be read"):
            read_text(tmp_path / name)


def calibrated_with(folder, ids):
    facts = {"text": "x", "num_tokens": ids.size, "ngrams": sketch(ids)}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"qwen35_mlx": {"calibration": facts}}))
    return folder


def test_the_bundled_texts_have_every_kind_and_share_none(tmp_path):
    assert 50_000 < len(read_text(TEXT_FILE).encode()) < 120_000
    calibration, held_out = (encode(SOURCE, file) for file in (TEXT_FILE, HELD_OUT_FILE))
    assert held_out.size > 8192
    for ids in (calibration, held_out):
        back = decoded(ids)
        for part in ("<tool_call>", "<tool_response>", "</think>", "def ", "| ", "。", '{"'):
            assert part in back
        # Every conversation was one: none is left as JSON.
        assert '{"messages"' not in back
    # The template's words around tools are all that is in both.
    assert overlap(calibrated_with(tmp_path / "model", calibration), held_out) < 0.05


def test_the_share_of_a_text_that_a_calibration_has_read_is_found(tmp_path):
    rng = np.random.default_rng(0)
    for num_tokens in (NUM_KEPT // 2, 40 * NUM_KEPT):
        read = rng.integers(50_000, size=num_tokens)
        folder = calibrated_with(tmp_path / "model", mx.array(read))
        assert overlap(folder, mx.array(read).reshape(-1, 64)) == 1
        other = rng.integers(50_000, size=num_tokens // 2)
        assert overlap(folder, mx.array(other)) == 0
        # Shifted against the rows of the calibration, as the end of another text.
        half = np.concatenate([other, read[7 : 7 + len(other)]])
        assert overlap(folder, mx.array(half)) == pytest.approx(0.5, abs=0.08)
        # What stands there again and again counts once.
        again = np.concatenate([np.tile(read[:40], 9), other])
        assert overlap(folder, mx.array(again)) < 0.2
    assert overlap(folder, mx.array(read[:9])) == 0


def test_the_text_of_a_distillation_has_been_read_too(tmp_path):
    calibration, distillation, other = (np.arange(n, n + 500) for n in (0, 1000, 2000))
    facts = {
        name: {"ngrams": sketch(mx.array(ids))}
        for name, ids in (("calibration", calibration), ("distillation", distillation))
    }
    for known, shares in ((facts, (1, 1, 0)), ({"distillation": facts["distillation"]}, (0, 1, 0))):
        (tmp_path / "config.json").write_text(json.dumps({"qwen35_mlx": known}))
        texts = (mx.array(ids) for ids in (calibration, distillation, other))
        assert tuple(overlap(tmp_path, ids) for ids in texts) == shares


def test_folders_that_do_not_tell_their_text_are_not_judged(tmp_path):
    ids = mx.arange(64)
    assert overlap(SOURCE, ids) is None
    for facts in ({}, {"calibration": {}}, {"calibration": {"ngrams": ""}}):
        (tmp_path / "config.json").write_text(json.dumps({"qwen35_mlx": facts}))
        assert overlap(tmp_path, ids) is None
    (tmp_path / "config.json").write_text('{"qwen35_mlx": {"calibration": {"ngrams": "abc"}}}')
    with pytest.raises(CheckpointError, match=r"record of the calibration text .* is damaged"):
        overlap(tmp_path, ids)


def test_a_calibration_keeps_its_ngrams_and_gives_them_to_the_output(tmp_path):
    made = Calibration("demo", "layout", "digest", 64, sketch(mx.arange(64)))
    save(made, tmp_path / "c.safetensors")
    kept = load(tmp_path / "c.safetensors")
    assert (kept.ngrams, kept.digest) == (made.ngrams, made.digest)
    config = output_config(plan(SOURCE, bits=4), {}, Known(kept))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert overlap(tmp_path, mx.arange(64)) == 1
    assert overlap(tmp_path, mx.arange(70, 140)) == 0
    # A file of a version without them.
    older = Calibration("demo", "layout", "digest", 64)
    save(older, tmp_path / "c.safetensors")
    assert load(tmp_path / "c.safetensors").ngrams == ""
    assert older.digest != made.digest


@pytest.mark.slow
def test_fidelity_says_that_the_model_was_calibrated_with_its_text(
    tmp_path, converted_demo, monkeypatch
):
    text = tmp_path / "text"
    text.write_text("The capital of France is Paris, and that of Italy is Rome, says Anna.")
    out = shutil.copytree(converted_demo, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    ids = encode(SOURCE, text)
    for read, share in ((ids, 1), (mx.arange(64), 0)):
        facts = {"text": "x", "num_tokens": read.size, "ngrams": sketch(read)}
        config["qwen35_mlx"]["calibration"] = facts
        (out / "config.json").write_text(json.dumps(config))
        result = CliRunner().invoke(cli.app, ["fidelity", str(out), str(out), "--text", str(text)])
        assert result.exit_code == 0, result.stderr
        warned = "warning: out was calibrated with 100% of this text" in result.stderr
        assert warned == (share == 1)
        assert json.loads(result.stdout.splitlines()[-1])["calibration_overlap"] == share
