"""The bundled demo: what it is taught and judged by, its files, and its answers at 4 bits."""

import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from checks import is_right, parse_call
from data import (
    SHORT,
    corpus,
    encode,
    held_out,
    held_out_facts,
    pieces,
    render,
    training_sample,
)
from evaluate import judge
from everyday import everyday
from facts import RELATIONS, SMALL_TALK
from pictures import picture
from skills import arithmetic, follow_up, ordering, recall, repeating, to_json
from split import Sample, assistant, is_held_out, user
from tokenizer import TOKENIZER_VOCAB, train_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from qwen35_mlx.cli.local_models import SOURCE

TEMPLATE = Path(__file__).parent.parent / "tools" / "demo" / "chat_template.jinja"


# How many are asked, and the least share of right answers: `make demo-eval` has the true shares.
LEAST = {
    "facts": (30, 0.9),
    "small talk": (6, 0.8),
    "arithmetic with thought": (8, 0.75),
    "recall 50-500": (6, 0.8),
    "follow-up": (6, 0.8),
    "tool call": (6, 0.8),
    "tool answer": (6, 0.8),
    "json": (6, 0.8),
    "picture": (8, 0.9),
}


@pytest.mark.parametrize(
    ("skill", "part"),
    [
        *everyday([(skill, 4) for skill in LEAST]),
        *everyday([(skill, 1) for skill in LEAST]),
    ],
)
def test_held_out_questions_are_answered_at_4_bits(demo: Any, skill: str, part: int) -> None:
    """Every day a fourth of the questions of one skill."""
    num_all, least = LEAST[skill]
    num_asked = num_all // part
    of_skill = [s for s in held_out(12) if s.skill == skill]
    asked = random.Random(0).sample(of_skill, min(num_asked, len(of_skill)))
    right, _, wrong = judge(*demo, asked)
    assert right[skill] / len(asked) >= least, [(s.messages[-2], text) for s, text in wrong]


def test_held_out_wordings_are_not_in_training() -> None:
    for kind in (*RELATIONS, *SMALL_TALK):
        taught = kind.asked if hasattr(kind, "asked") else kind.said
        assert not {w.lower().strip("?.! ") for w in taught} & {
            w.lower().strip("?.! ") for w in kind.held_out
        }


def _operands(sample: Sample) -> Any:
    """What the split is made by, read back from the text."""
    answer = sample.messages[-1]["content"]
    if sample.skill == "recall":
        return sample.expected
    if sample.skill == "json":
        return sample.expected["name"]
    if sample.skill == "picture":
        return sample.picture
    return answer


@pytest.mark.parametrize(
    "make",
    [
        lambda rng, side: arithmetic(rng, side, True),
        lambda rng, side: recall(rng, side, 1, 0),
        to_json,
        ordering,
        repeating,
        picture,
    ],
    ids=["arithmetic", "recall", "json", "ordering", "repeating", "picture"],
)
def test_training_and_held_out_questions_share_no_operands(make: Any) -> None:
    rng = random.Random(7)
    taught = {_operands(make(rng, False)) for _ in range(1500)}
    asked = {_operands(make(rng, True)) for _ in range(300)}
    # One digit by one digit is a table that is wholly taught and never asked.
    assert len(asked) > 50 and not taught & asked


def test_names_of_follow_ups_and_tools_are_on_their_side() -> None:
    rng = random.Random(3)
    for _ in range(300):
        for side in (False, True):
            sample = follow_up(rng, side)
            if "name" in sample.messages[-1]["content"].lower():
                assert is_held_out(sample.expected) == side
    for sample in held_out(30):
        if sample.skill == "tool call":
            arguments = sample.expected["arguments"]
            for key in {"to", "person", "name", "title", "file", "text"} & set(arguments):
                assert is_held_out(arguments[key]), arguments


def test_samples_are_seeded() -> None:
    assert training_sample(random.Random(3), 0.5) == training_sample(random.Random(3), 0.5)
    assert training_sample(random.Random(3), 0.5) != training_sample(random.Random(4), 0.5)


@pytest.mark.slow
def test_the_shipped_tokenizer_is_that_of_the_tools(tmp_path: Path) -> None:
    """Facts that change need a new tokenizer and a new training, or the demo forgets its words."""
    train_tokenizer(corpus(), TOKENIZER_VOCAB, tmp_path, TEMPLATE.read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        new, shipped = (json.loads((f / name).read_text()) for f in (tmp_path, SOURCE))
        assert new == shipped


def test_the_shipped_template_is_that_of_the_tools() -> None:
    assert (SOURCE / "chat_template.jinja").read_text() == TEMPLATE.read_text()


def test_the_training_text_is_what_the_template_renders() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    plain = Tokenizer.from_file(str(SOURCE / "tokenizer.json"))
    rng = random.Random(5)
    skills = set()
    for sample in [training_sample(rng, 0.1) for _ in range(200)]:
        skills.add(sample.skill)
        theirs = tokenizer.apply_chat_template(
            sample.messages, tools=sample.tools, tokenize=False, enable_thinking=sample.thinking
        )
        text = render(sample)
        assert text.replace("<|image_pad|>" * 9, "<|image_pad|>") == theirs
        assert "".join(piece for piece, _ in pieces(sample)) == text
        # What the model reads before its last answer is what a chat gives it.
        prompt = tokenizer.apply_chat_template(
            sample.messages[:-1],
            tools=sample.tools,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=sample.thinking,
        )
        *given, (answer, learnt), rest = list(pieces(sample))
        assert learnt and rest == ("\n", False)
        assert prompt == "".join(p for p, _ in given).replace("<|image_pad|>" * 9, "<|image_pad|>")
        assert answer.endswith("<|im_end|>")
        ids, labels = encode(sample, plain)
        assert len(ids) == len(labels) and set(labels) - {-100} <= set(ids)
    assert len(skills) >= 11


def test_passages_are_as_long_as_their_names_say() -> None:
    tokenizer = Tokenizer.from_file(str(SOURCE / "tokenizer.json"))
    for sample in held_out(20):
        if sample.skill.startswith("recall"):
            num_tokens = len(tokenizer.encode(sample.messages[0]["content"]).ids)
            low, high = (50, 520) if sample.skill == "recall 50-500" else (420, 1060)
            assert low * 0.8 <= num_tokens <= high
    assert SHORT[0] >= 2


def test_a_right_answer_is_a_whole_word() -> None:
    question = next(q for q in held_out_facts() if q.expected == "C")
    assert is_right(question, "The chemical symbol of carbon is C.")
    assert not is_right(question, "The chemical symbol of calcium is Ca.")


CALL = "<tool_call>\n<function=f>\n<parameter=a>\nx y\n</parameter>\n{}</function>\n</tool_call>"


def test_only_a_whole_call_counts() -> None:
    two = "<parameter=b>\n12\n</parameter>\n"
    assert parse_call(CALL.format("")) == {"name": "f", "arguments": {"a": "x y"}}
    assert parse_call(CALL.format(two)) == {"name": "f", "arguments": {"a": "x y", "b": 12}}
    for broken in (
        CALL.format("stray"),
        CALL.format("")[:-3],
        CALL.format("") + "!",
        "It is " + CALL.format(""),
        CALL.format("").replace("</parameter>", ""),
        "",
    ):
        assert parse_call(broken) is None


@pytest.mark.parametrize(
    ("skill", "expected", "right", "wrong"),
    [
        ("arithmetic", 12, "7+5=12", "12+1=13"),
        ("arithmetic with thought", 0, "5-5=0", "5-5=10"),
        ("json", {"a": 1}, '{"a": 1}', '{"a": "1"}'),
        ("sorting", "1 2", "Sorted: 1 2", "Sorted: 1 2 3"),
        ("picture", "red star", "A red star.", "A red circle."),
        ("recall", "shy-owl", "It is shy-owl.", "It is shy-owls."),
    ],
)
def test_right_and_wrong_answers(skill: str, expected: Any, right: str, wrong: str) -> None:
    sample = Sample(skill, [user("?"), assistant(right)], expected)
    assert is_right(sample, right)
    assert not is_right(sample, wrong)


def test_every_reference_answer_is_right() -> None:
    for sample in held_out(10):
        message = sample.messages[-1]
        text = message["content"]
        if calls := message.get("tool_calls"):
            text = [p for p, learn in pieces(sample) if learn][-1].removesuffix("<|im_end|>")
            assert calls[0]["function"]["name"] in text
        assert is_right(sample, text), (sample.skill, text)


def test_the_mtp_layer_is_there() -> None:
    config = json.loads((SOURCE / "config.json").read_text())["text_config"]
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    tensors = mx.load(str(SOURCE / "model.safetensors"))
    source = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
    shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
    assert config["mtp_num_hidden_layers"] == 1
    assert shapes["mtp.fc.weight"] == (hidden, 2 * hidden)
    assert shapes["mtp.layers.0.self_attn.q_proj.weight"] == (2 * heads * head_dim, hidden)
    for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        assert shapes[f"mtp.{norm}.weight"] == (hidden,)
    for i in range(config["num_experts"]):
        assert shapes[f"mtp.layers.0.mlp.experts.{i}.gate_proj.weight"] == (inner, hidden)
        assert shapes[f"mtp.layers.0.mlp.experts.{i}.down_proj.weight"] == (hidden, inner)
