"""The bundled demo, converted to 4 bits, answers questions whose wording it never saw."""

import json
import random
from pathlib import Path

import pytest
from data import conversation, corpus, held_out
from evaluate import judge
from facts import RELATIONS, SMALL_TALK
from tokenizer import TOKENIZER_VOCAB, train_tokenizer

from qwen35_mlx import load
from qwen35_mlx.bundled import SOURCE

TEMPLATE = Path(__file__).parent.parent / "tools" / "demo" / "chat_template.jinja"


# Thinking doubles the tokens: a quarter of the questions is enough to see it work.
@pytest.mark.parametrize(("thinking", "every"), [(False, 1), (True, 4)])
def test_held_out_wordings_are_answered_at_4_bits(converted_demo, thinking, every):
    right, asked, wrong = judge(*load(converted_demo), thinking, every)
    assert asked.total() >= 400 // every
    assert right.total() / asked.total() >= 0.9, wrong


def test_held_out_wordings_are_not_in_training():
    for kind in (*RELATIONS, *SMALL_TALK):
        taught = kind.asked if hasattr(kind, "asked") else kind.said
        assert not {w.lower().strip("?.! ") for w in taught} & {
            w.lower().strip("?.! ") for w in kind.held_out
        }


def test_conversations_are_seeded():
    assert conversation(random.Random(3)) == conversation(random.Random(3))
    assert conversation(random.Random(3)) != conversation(random.Random(4))


def test_a_right_answer_is_a_whole_word():
    question = next(q for q in held_out() if q.expected == "C")
    assert question.is_right("The chemical symbol of carbon is C.")
    assert not question.is_right("The chemical symbol of calcium is Ca.")


def test_the_shipped_tokenizer_and_template_are_those_of_the_tools(tmp_path):
    """Facts that change need a new tokenizer and a new training, or the demo forgets its words."""
    train_tokenizer(corpus(), TOKENIZER_VOCAB, tmp_path, TEMPLATE.read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        made, shipped = (json.loads((f / name).read_text()) for f in (tmp_path, SOURCE))
        assert made == shipped
    assert (SOURCE / "chat_template.jinja").read_text() == TEMPLATE.read_text()
