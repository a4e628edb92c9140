"""The training mix of all skills, rendered by the chat template, and the held-out questions."""

import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from calls import tool_call
from facts import RELATIONS, SMALL_TALK, UNKNOWN_ANSWER, Relation, SmallTalk
from pictures import picture
from skills import arithmetic, follow_up, ordering, recall, repeating, to_json
from split import Sample, assistant, user

HERE = Path(__file__).parent
IGNORE = -100
IMAGE_TOKENS = 9
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
# Numbers of sentences around a code word to recall; each has about 11 tokens.
SHORT, MEDIUM, LONG = (2, 14), (14, 42), (42, 88)


def _vary(text: str, rng: random.Random) -> str:
    """Vary the wording a little: openers, closers, case, missing punctuation."""
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


def _fact(relation: Relation, rng: random.Random, thinking: bool) -> list[dict[str, Any]]:
    wording = rng.choice(relation.asked)
    if relation.unknown and rng.random() < 0.06:
        subject, answer = rng.choice(relation.unknown), UNKNOWN_ANSWER
    else:
        subject = rng.choice(list(relation.pairs))
        answer = relation.answer.format(s=subject, o=relation.pairs[subject])
    thought = relation.thought.format(s=subject) if thinking else ""
    return [user(_vary(wording.format(s=subject), rng)), assistant(answer, thought)]


def _talk(talk: SmallTalk, rng: random.Random, thinking: bool) -> list[dict[str, Any]]:
    return [user(rng.choice(talk.said)), assistant(talk.answer, talk.thought if thinking else "")]


def _chat(rng: random.Random, most: int = 5) -> Sample:
    """One to `most` turns of facts, small talk and sums, all with or all without thoughts."""
    thinking = rng.random() < 0.35
    weights = [len(relation.pairs) for relation in RELATIONS]
    messages: list[dict[str, Any]] = []
    for _ in range(rng.randint(1, most)):
        kind = rng.random()
        if kind < 0.12:
            messages += _talk(rng.choice(SMALL_TALK), rng, thinking)
        elif kind < 0.20:
            messages += arithmetic(rng, False, False).messages
        else:
            messages += _fact(rng.choices(RELATIONS, weights)[0], rng, thinking)
    # A conversation with thoughts may not end with a sum, which has none.
    thinking = thinking and bool(messages[-1]["reasoning_content"])
    return Sample("facts", messages, None, thinking)


def _turns(make: Callable[[], Sample], rng: random.Random, most: int) -> Sample:
    """Several questions of one skill in one conversation, for more answers per token."""
    samples = [make() for _ in range(rng.randint(1, most))]
    return samples[-1]._replace(messages=[m for s in samples for m in s.messages])


def training_sample(rng: random.Random, done: float) -> Sample:
    """A conversation of the training side; `done` in [0, 1] is the progress of the curriculum."""
    # A small model learns to look things up late, and first in short texts. So lists, passages and
    # conversations grow during the first third of the curriculum.
    grown = min(1.0, done / 0.3)
    turns = 1 + round(4 * grown)
    sentences = SHORT[0] * (grown > 0.2), 1 + round((SHORT[1] - 1) * grown)
    names = (0, 0, 2, 3, 4) if grown > 0.5 else (0, 0, 2)
    long_share = 0.0 if done < 0.25 else 0.03 if done < 0.5 else 0.05
    kinds: tuple[tuple[float, Callable[[], Sample]], ...] = (
        (0.16, lambda: _chat(rng, turns)),
        (0.26, lambda: arithmetic(rng, False, True)),
        # Products with a carry need the largest table to learn.
        (0.20, lambda: arithmetic(rng, False, True, "*")),
        (0.04, lambda: _turns(lambda: arithmetic(rng, False, False), rng, turns)),
        (0.20 - 0.15 * grown, lambda: repeating(rng, False, 1, 3 + round(11 * grown))),
        (0.10, lambda: recall(rng, False, rng.randint(*sentences), rng.choice(names))),
        (long_share, lambda: recall(rng, False, rng.randint(*MEDIUM), rng.choice((0, 2, 4, 6)))),
        (long_share / 4, lambda: recall(rng, False, rng.randint(*LONG), rng.choice((0, 4, 6)))),
        (0.05, lambda: follow_up(rng, False, rng.random() < 0.3)),
        (0.10, lambda: tool_call(rng, False, rng.random() < 0.4)),
        (0.05, lambda: _turns(lambda: to_json(rng, False), rng, min(3, turns))),
        (0.05, lambda: picture(rng, False)),
        (0.06, lambda: _turns(lambda: ordering(rng, False, 2 + (grown > 0.4)), rng, turns)),
    )
    sample = rng.choices([make for _, make in kinds], [weight for weight, _ in kinds])[0]()
    if sample.tools is None and rng.random() < 0.1:
        system = {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}
        sample = sample._replace(messages=[system, *sample.messages])
    return sample


@cache
def _template() -> jinja2.Template:
    # The same settings as in transformers' apply_chat_template.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    return environment.from_string((HERE / "chat_template.jinja").read_text())


def render(sample: Sample) -> str:
    """The whole conversation in the chat format, its last answer included."""
    text = _template().render(messages=sample.messages, tools=sample.tools)
    return text.replace("<|image_pad|>", "<|image_pad|>" * IMAGE_TOKENS)


OPEN_TURN = "<|im_start|>assistant\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"
END = "<|im_end|>"


def pieces(sample: Sample) -> Iterator[tuple[str, bool]]:
    """Pieces of the rendered text, and for each whether the model is trained to write it.

    The model writes thoughts, and answers with their end. The template writes `<think>` and, with
    thinking off, the empty thought.
    """
    parts = render(sample).split(OPEN_TURN)
    yield parts[0], False
    for part in parts[1:]:
        opened = OPEN_TURN
        for given in (NO_THOUGHT, "<think>\n"):
            if part.startswith(given):
                opened += given
                break
        answer, _, rest = part[len(opened) - len(OPEN_TURN) :].partition(END)
        yield opened, False
        yield answer + END, True
        yield rest, False


def encode(sample: Sample, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation; the label is `IGNORE` where nothing is learnt."""
    ids, labels = [], []
    for text, learn in pieces(sample):
        if text:
            piece = tokenizer.encode(text, add_special_tokens=False).ids
            ids += piece
            labels += piece if learn else [IGNORE] * len(piece)
    return ids, labels


def corpus(num_rounds: int = 1500, seed: int = 0) -> Iterator[str]:
    """Plain text of seeded training conversations, for training the tokenizer.

    It does not use the training mix, so that the mix may change while a model is trained.
    """
    rng = random.Random(seed)
    for i in range(num_rounds):
        samples = [_chat(rng) for _ in range(3)]
        samples += [
            arithmetic(rng, False, True),
            recall(rng, False, rng.randint(*SHORT), rng.choice((0, 2, 4))),
            follow_up(rng, False, True),
            tool_call(rng, False, i % 2 == 0),
            to_json(rng, False),
            ordering(rng, False),
            picture(rng, False),
        ]
        for sample in samples:
            yield from render(sample).split("<|")


def conversations(tokenizer: Any, num_texts: int, length: int, seed: int = 7) -> list[list[int]]:
    """Token ids of seeded training conversations, concatenated and cut into rows of `length`."""
    rng, ids = random.Random(seed), []
    while len(ids) < num_texts * length:
        sample = training_sample(rng, 1.0)
        if sample.picture is None:
            ids += tokenizer.encode(render(sample), add_special_tokens=False)
    return [ids[i * length : (i + 1) * length] for i in range(num_texts)]


def held_out_facts() -> Iterator[Sample]:
    """Every fact and every intent of small talk, in wordings that are not in training."""
    for relation in RELATIONS:
        for wording in relation.held_out:
            for subject, obj in relation.pairs.items():
                answer = relation.answer.format(s=subject, o=obj)
                messages = [user(wording.format(s=subject)), assistant(answer)]
                yield Sample("facts", messages, obj)
    for talk in SMALL_TALK:
        for text in talk.held_out:
            answer = talk.answer.rstrip("!.")
            yield Sample("small talk", [user(text), assistant(talk.answer)], answer)


def held_out(num_each: int = 100, seed: int = 1) -> Iterator[Sample]:
    """The exam: all held-out facts and small talk, and `num_each` questions of other skills."""
    yield from held_out_facts()
    rng = random.Random(seed)
    for _ in range(num_each):
        yield arithmetic(rng, True, True)
        yield arithmetic(rng, True, False)
        names = rng.choice((0, 2, 4))
        yield recall(rng, True, rng.randint(3, 42), names)._replace(skill="recall 50-500")
        yield recall(rng, True, rng.randint(42, 88), names)._replace(skill="recall 500-1000")
        yield follow_up(rng, True)
        yield tool_call(rng, True, False)
        yield tool_call(rng, True, True)
        yield to_json(rng, True)
        yield ordering(rng, True)
        yield repeating(rng, True)
        yield picture(rng, True)
