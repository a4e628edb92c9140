"""Seeded conversations for the demo model, and the held-out questions it is judged by."""

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

from facts import RELATIONS, SMALL_TALK, UNKNOWN_ANSWER, Relation, SmallTalk

OPENERS = (
    "Please: ",
    "Hey, ",
    "Hi! ",
    "Quick question: ",
    "So, ",
    "Hello, ",
    "Well, ",
    "Question: ",
)
CLOSERS = (" Thanks!", " Thank you.", " Please.", " I need it now.", " Just curious.")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a tiny demo model.",
    "Answer in one sentence.",
    "Be brief and honest.",
)


class Turn(NamedTuple):
    """One exchange: the question, the thought (empty when thinking is off) and the answer."""

    question: str
    thought: str
    answer: str


class Question(NamedTuple):
    """A held-out question; `expected` is a word (facts) or the whole reply (small talk)."""

    skill: str
    text: str
    expected: str

    def is_right(self, answer: str) -> bool:
        """Whether `answer`, without its thought, holds the expected word or words."""
        return re.search(rf"(?<!\w){re.escape(self.expected)}(?!\w)", answer) is not None


def _vary(text: str, rng: random.Random) -> str:
    """Say the same a little differently: openers, closers, case, lost punctuation."""
    if rng.random() < 0.25:
        opener = rng.choice(OPENERS)
        keep = text[0].isupper() and rng.random() < 0.5
        text = opener + (text if keep or opener[-2] in ":!" else text[0].lower() + text[1:])
    if rng.random() < 0.15:
        text += rng.choice(CLOSERS)
    if rng.random() < 0.1:
        text = text.rstrip("?.!")
    if rng.random() < 0.05:
        text = text.lower()
    return text


def _fact_turn(relation: Relation, rng: random.Random) -> tuple[str, str, str]:
    wording = rng.choice(relation.asked)
    if relation.unknown and rng.random() < 0.06:
        subject, answer = rng.choice(relation.unknown), UNKNOWN_ANSWER
    else:
        subject = rng.choice(list(relation.pairs))
        answer = relation.answer.format(s=subject, o=relation.pairs[subject])
    return wording.format(s=subject), relation.thought.format(s=subject), answer


def _talk_turn(talk: SmallTalk, rng: random.Random) -> tuple[str, str, str]:
    return rng.choice(talk.said), talk.thought, talk.answer


def conversation(rng: random.Random) -> tuple[str | None, list[Turn], bool]:
    """A system prompt or None, one to six turns, and whether the model thinks in the last."""
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else None
    thinking = rng.random() < 0.5
    weights = [len(relation.pairs) for relation in RELATIONS]
    turns = []
    for _ in range(rng.choice((1, 2, 3, 4, 5, 6))):
        if rng.random() < 0.15:
            question, thought, answer = _talk_turn(rng.choice(SMALL_TALK), rng)
        else:
            relation = rng.choices(RELATIONS, weights)[0]
            question, thought, answer = _fact_turn(relation, rng)
            question = _vary(question, rng)
        turns.append(Turn(question, thought if thinking else "", answer))
    return system, turns, thinking


def held_out() -> Iterator[Question]:
    """Every fact and every intent of small talk, in wordings that training never saw."""
    for relation in RELATIONS:
        for wording in relation.held_out:
            for subject, obj in relation.pairs.items():
                yield Question(relation.name, wording.format(s=subject), obj)
    for talk in SMALL_TALK:
        for text in talk.held_out:
            yield Question("small talk", text, talk.answer.rstrip("!."))


def corpus(num_conversations: int = 4000, seed: int = 0) -> Iterator[str]:
    """Plain text of seeded conversations, to train the tokenizer on."""
    rng = random.Random(seed)
    for _ in range(num_conversations):
        system, turns, _ = conversation(rng)
        yield system or ""
        for turn in turns:
            yield turn.question
            yield turn.thought
            yield turn.answer
