"""Recall from a long text: facts are planted at every depth, and a question asks for each.

The text is prefilled once; each question continues from its end.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..engine.decode import greedy
from ..engine.prompt_cache import PromptCache, common_prefix
from ..errors import Qwen35Error
from ..model.language import Model
from ..progress import StepProgress
from ..prompt import encode_messages
from .behaviour import NAMES

# Two facts for each fifth of the text.
NUM_FACTS, NUM_DEPTHS = 10, 5
MAX_ANSWER = 48
# Tokens for the template, the question and the answer.
ROOM = 160
DEEDS = (
    "walked along the river", "painted a door", "read a letter", "baked bread", "fed the birds",
    "waited for the train", "sang an old song", "cleaned the windows", "drew a map",
)  # fmt: skip
TIMES = ("in the morning", "on Sunday", "before lunch", "after the rain", "at night", "in May")
FACT, QUESTION = "The code word of {} is {}.", "What is the code word of {}?"


class Recall(NamedTuple):
    """Numbers of right answers and of questions at one length, by depth in the text."""

    num_tokens: int
    right: tuple[int, ...]
    asked: tuple[int, ...]


def lengths_of(text: str) -> list[int]:
    """Parse lengths in tokens such as 4K,32K; K is 1,024."""
    found = [re.fullmatch(r"(\d{1,9})(K?)", part.strip().upper()) for part in text.split(",")]
    lengths = [int(m[1]) * (1024 if m[2] else 1) for m in found if m]
    if len(lengths) < len(found) or min(lengths) <= 2 * ROOM:
        expected = f"lengths of more than {2 * ROOM} tokens, such as 4K,32K"
        raise Qwen35Error("the lengths are not usable", got=text, expected=expected)
    return lengths


def measure(
    model: Model, tokenizer: Any, lengths: Sequence[int], progress: StepProgress | None = None
) -> list[Recall]:
    """Measure the recall at each length."""
    for length in lengths:
        if length > model.config.context_length:
            raise Qwen35Error(
                "the text does not fit the model",
                got=f"{length:,} tokens",
                expected=f"at most {model.config.context_length:,}",
            )
    results = []
    for done, length in enumerate(lengths):
        if progress:
            progress(done, len(lengths), f"{length:,} tokens")
        text, facts = _text(length - ROOM, lambda s: len(tokenizer.encode(s)), seed=length)
        answers = _answers(model, tokenizer, text, [QUESTION.format(who) for who in facts])
        right, asked = [0] * NUM_DEPTHS, [0] * NUM_DEPTHS
        for number, (word, answer) in enumerate(zip(facts.values(), answers, strict=True)):
            depth = number * NUM_DEPTHS // NUM_FACTS
            asked[depth] += 1
            right[depth] += word in re.findall(r"\d+", answer)
        results.append(Recall(length, tuple(right), tuple(asked)))
    return results


def _text(num_tokens: int, count: Callable[[str], int], seed: int) -> tuple[str, dict[str, str]]:
    """A text of about `num_tokens`, and the code word of each name in it, in text order."""
    generator = random.Random(seed)
    names = generator.sample(NAMES, NUM_FACTS)
    facts = {name: str(generator.randint(1000, 9999)) for name in names}
    sentences: list[str] = []
    left = num_tokens - sum(count(" " + FACT.format(*fact)) for fact in facts.items())
    while left > 0:
        parts = (generator.choice(words) for words in (NAMES, DEEDS, TIMES))
        sentences.append("{} {} {}.".format(*parts))
        left -= count(" " + sentences[-1])
    # From the end, so that the places of the other facts do not move.
    for number, fact in reversed(list(enumerate(facts.items()))):
        place = round((number + 0.5) / NUM_FACTS * len(sentences))
        sentences.insert(place, FACT.format(*fact))
    return " ".join(sentences), facts


def _answers(model: Model, tokenizer: Any, text: str, questions: Sequence[str]) -> list[str]:
    """Greedy answers without a thought."""
    prompts = []
    for question in questions:
        messages = [{"role": "user", "content": f"{text}\n\n{question}"}]
        options: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": False}
        prompts.append(encode_messages(tokenizer, messages, **options))
    shared = min(common_prefix(prompts[0], prompt) for prompt in prompts[1:])
    cache = PromptCache(model)
    cache.read(prompts[0][:shared], marks=[shared])
    answers = []
    for prompt in prompts:
        cache.rewind(shared)
        tokens = []
        for step in greedy(cache, prompt[shared:], MAX_ANSWER):
            if step.token in tokenizer.eos_token_ids:
                break
            tokens.append(step.token)
        answers.append(tokenizer.decode(tokens))
    return answers
