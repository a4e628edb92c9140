"""Skills with generated questions: arithmetic, recall, JSON, sorting, reversing, follow-ups."""

import json
import random
from typing import Any

from facts import RELATIONS, Relation
from split import (
    ADJECTIVES,
    FIRST_NAMES,
    LAST_NAMES,
    NOUNS,
    Sample,
    assistant,
    code_word,
    draw,
    is_held_out,
    name,
    user,
)

ASK_SUM = (
    "What is {q}?",
    "{q}",
    "{q} = ?",
    "Calculate {q}.",
    "How much is {q}?",
    "Please work out {q}.",
    "compute {q}",
)


def _column_thought(a: int, sign: str, b: int) -> str:
    """A thought that computes the digits from the right; each line ends with the result so far."""
    if sign == "*":
        top, lines, carry, done = str(a), [], 0, ""
        for i, digit in enumerate(reversed(top)):
            value = int(digit) * b + carry
            last = i == len(top) - 1
            done = (str(value) if last else str(value % 10)) + done
            lines.append(f"{digit}*{b}+{carry}={value}:{done}")
            carry = value // 10
        return "\n".join([f"{a}*{b}", *lines])
    width = max(len(str(a)), len(str(b)))
    x, y = str(a).zfill(width), str(b).zfill(width)
    lines, carry, done = [f"{x}{sign}{y}"], 0, ""
    for i in reversed(range(width)):
        if sign == "+":
            value = int(x[i]) + int(y[i]) + carry
            done = (str(value) if i == 0 else str(value % 10)) + done
            lines.append(f"{x[i]}+{y[i]}+{carry}={value}:{done}")
            carry = value // 10
        else:
            value = int(x[i]) - int(y[i]) - carry
            borrow = int(value < 0)
            done = str(value + 10 * borrow) + done
            lines.append(f"{x[i]}-{y[i]}-{carry}={value}:{done}")
            carry = borrow
    return "\n".join(lines)


def _result(a: int, sign: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def arithmetic(rng: random.Random, held_out: bool, thinking: bool, signs: str = "") -> Sample:
    """`a + b` and `a - b` (never below zero) up to 999 with a thought and up to 99 without.

    Products are of two digits by one with a thought, and of one digit by one without. The latter
    are a table of 64, all of it in training. `signs` weights the operations.
    """

    def operands(r: random.Random) -> tuple[int, str, int]:
        sign = r.choice(signs or ("++--*" if thinking or not held_out else "+-"))
        if sign == "*":
            return r.randint(2, 99 if thinking else 9), sign, r.randint(2, 9)
        top = 10 ** r.choice((1, 2, 2, 3, 3) if thinking else (1, 2, 2)) - 1
        a, b = r.randint(0, top), r.randint(0, 10 ** r.randint(1, len(str(top))) - 1)
        return (max(a, b), sign, min(a, b)) if sign == "-" else (a, sign, b)

    while True:
        a, sign, b = operands(rng)
        # The table of one digit by one digit has no held-out part.
        if sign == "*" and a < 10 and b < 10 and not held_out:
            break
        if is_held_out((a, sign, b)) == held_out:
            break
    spoken = rng.choice((sign, sign, {"+": "plus", "-": "minus", "*": "times"}[sign]))
    query = f"{a} {spoken} {b}"
    if spoken == sign and rng.random() < 0.4:
        query = f"{a}{sign}{b}"
    thought = _column_thought(a, sign, b) if thinking else ""
    result = _result(a, sign, b)
    return Sample(
        "arithmetic with thought" if thinking else "arithmetic",
        [user(rng.choice(ASK_SUM).format(q=query)), assistant(f"{a}{sign}{b}={result}", thought)],
        result,
        thinking,
    )


PEOPLE = (
    "The baker",
    "A farmer",
    "The old captain",
    "My neighbour",
    "The teacher",
    "A young nurse",
)
DEEDS = (
    "bought {n} apples at the market",
    "walked along the river with a dog",
    "painted the door of the house green",
    "waited for the train to the city",
    "found a silver coin under the bridge",
    "wrote a long letter to a friend",
    "carried {n} bags of flour up the hill",
    "sang a song about the sea",
    "lost a hat in the wind",
    "planted {n} trees behind the school",
    "opened the window and looked at the moon",
    "cooked soup with carrots and beans",
)
TAILS = ("", " in the morning", " on Sunday", " before lunch", " last winter", " without a word")
SCENES = (
    "It rained for {n} hours.",
    "The sky was gray and the road was wet.",
    "Nobody said a word.",
    "The shop on the corner was closed.",
    "A cat slept on the warm stones.",
    "The bell of the church rang {n} times.",
    "Later the sun came out again.",
    "The children played with a red ball.",
    "There was bread and milk on the table.",
    "The boat came back from the island.",
)


def _filler(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice(SCENES).format(n=rng.randint(2, 9))
    deed = rng.choice(DEEDS).format(n=rng.randint(2, 9))
    return f"{rng.choice(PEOPLE)} {deed}{rng.choice(TAILS)}."


TELL_ONE = (
    "The code word is {w}.",
    "Remember the code word {w}.",
    "The secret code word is {w}.",
    "Note that the code word is {w}.",
)
TELL_OF = (
    "The code word of {n} is {w}.",
    "{n} has the code word {w}.",
    "{n}'s code word is {w}.",
)
ASK_ONE = ("What is the code word?", "Which code word was in the text?", "Tell me the code word.")
ASK_OF = ("What is {n}'s code word?", "What is the code word of {n}?", "Which code word has {n}?")


def recall(rng: random.Random, held_out: bool, num_sentences: int, num_names: int) -> Sample:
    """A passage of sentences with one code word, or with one for each of several names.

    Training asks for every name in turn, held-out questions ask for one.
    """
    sentences = [_filler(rng) for _ in range(num_sentences)]
    words: dict[str, str] = {}
    while len(words) < max(1, num_names):
        number = str(draw(lambda r: r.randint(1000, 9999), rng, held_out))
        word = number if rng.random() < 0.2 else code_word(rng, held_out)
        words[name(rng, held_out) if num_names else ""] = word
    tell, ask = (TELL_OF, ASK_OF) if num_names else (TELL_ONE, ASK_ONE)
    for who, word in words.items():
        sentence = rng.choice(tell).format(n=who, w=word)
        sentences.insert(rng.randint(0, len(sentences)), sentence)
    messages, passage = [], " ".join(sentences) + "\n\n"
    asked = rng.sample(list(words), 1 if held_out else min(len(words), 4))
    for who in asked:
        question = rng.choice(ask).format(n=who)
        of = f" of {who}" if who else ""
        thought = f"The user asks for the code word{of}."
        messages += [user(passage + question), assistant(f"The code word{of} is {words[who]}.", "")]
        passage = ""
    thinking = not held_out and rng.random() < 0.3
    if thinking:
        messages[-1]["reasoning_content"] = thought
    return Sample("recall", messages, words[asked[-1]], thinking)


CITIES = tuple(RELATIONS[0].pairs.values())
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ITEMS = ("apples", "books", "chairs", "lamps", "cups", "eggs", "pens", "shirts", "bottles", "keys")
JOBS = ("baker", "teacher", "nurse", "farmer", "pilot", "painter", "doctor", "writer", "cook")
ASK_JSON = (
    "Read this into JSON: {s}",
    "Turn this into JSON: {s}",
    "Give me JSON for this sentence: {s}",
    "{s} As JSON, please.",
    "Write as JSON: {s}",
)
SCHEMAS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("name", "age", "city"),
        (
            "{name} is {age} years old and lives in {city}.",
            "{name} lives in {city} and is {age} years old.",
            "In {city} lives {name}, aged {age}.",
        ),
    ),
    (
        ("name", "count", "item", "price"),
        (
            "{name} bought {count} {item} for {price} dollars.",
            "For {price} dollars, {name} got {count} {item}.",
            "{count} {item} were sold to {name} for {price} dollars.",
        ),
    ),
    (
        ("name", "day", "hour"),
        (
            "I meet {name} on {day} at {hour}.",
            "On {day} at {hour} there is a meeting with {name}.",
            "The meeting with {name} is at {hour} on {day}.",
        ),
    ),
    (
        ("name", "job", "city"),
        (
            "{name} works as a {job} in {city}.",
            "The {job} {name} comes from {city}.",
            "In {city}, {name} is a {job}.",
        ),
    ),
)


def to_json(rng: random.Random, held_out: bool) -> Sample:
    """A sentence, to convert to a JSON object with given keys in order; the split is by name."""
    keys, wordings = rng.choice(SCHEMAS)
    values: dict[str, Any] = {
        "name": name(rng, held_out), "age": rng.randint(3, 99), "city": rng.choice(CITIES),
        "count": rng.randint(2, 99), "item": rng.choice(ITEMS), "price": rng.randint(2, 99),
        "day": rng.choice(DAYS), "hour": rng.randint(1, 23), "job": rng.choice(JOBS),
    }  # fmt: skip
    values = {key: values[key] for key in keys}
    sentence = rng.choice(wordings).format(**values)
    thinking = not held_out and rng.random() < 0.25
    thought = f"The keys are {', '.join(keys)}." if thinking else ""
    question = rng.choice(ASK_JSON).format(s=sentence)
    return Sample(
        "json", [user(question), assistant(json.dumps(values), thought)], values, thinking
    )


WORDS = (
    "red blue green tree house river stone bread milk chair table window door hat coin boat bell "
    "road moon sun cat dog bird fish apple lamp key book pen cup"
).split()
ASK_SORT = ("Sort {l}.", "Sort these: {l}", "Put {l} in order.", "Sort from small to big: {l}")
ASK_REVERSE = ("Reverse {l}.", "Say {l} backwards.", "Reverse the order: {l}", "Turn {l} around.")


def ordering(rng: random.Random, held_out: bool, least: int = 3) -> Sample:
    """Sort `least` to `least + 2` numbers below 100, or reverse as many words or numbers."""
    kind = rng.choice(("sort", "words", "numbers"))

    def items(r: random.Random) -> tuple[str, ...]:
        length = r.randint(least, least + 2)
        if kind == "words":
            return tuple(r.sample(WORDS, length))
        return tuple(str(n) for n in r.sample(range(1, 100), length))

    drawn = draw(items, rng, held_out)
    ask = ASK_SORT if kind == "sort" else ASK_REVERSE
    ordered = sorted(drawn, key=int) if kind == "sort" else drawn[::-1]
    answer = " ".join(ordered)
    label = "Sorted" if kind == "sort" else "Reversed"
    thinking = not held_out and rng.random() < 0.2
    thought = "I sort from small to big." if kind == "sort" else "I go from last to first."
    return Sample(
        "sorting" if kind == "sort" else "reversing",
        [
            user(rng.choice(ask).format(l=" ".join(drawn))),
            assistant(f"{label}: {answer}", thought if thinking else ""),
        ],
        answer,
        thinking,
    )


ASK_REPEAT = ("Repeat: {l}", "Say this: {l}", "Repeat after me: {l}", "Copy this: {l}")


def repeating(rng: random.Random, held_out: bool, least: int = 4, most: int = 14) -> Sample:
    """Repeat random words and numbers: the simplest task of looking things up."""

    def items(r: random.Random) -> tuple[str, ...]:
        pools = (FIRST_NAMES, LAST_NAMES, ADJECTIVES, WORDS)
        drawn = []
        for _ in range(r.randint(least, most)):
            word = r.choice(r.choice(pools))
            number = str(r.randint(1, 999))
            drawn.append(
                r.choice((word, word, f"{r.choice(ADJECTIVES)}-{r.choice(NOUNS)}", number))
            )
        return tuple(drawn)

    answer = " ".join(draw(items, rng, held_out))
    return Sample(
        "repeating",
        [user(rng.choice(ASK_REPEAT).format(l=answer)), assistant("Repeated: " + answer)],
        answer,
    )


AND_OF = ("And {s}?", "What about {s}?", "And of {s}?", "and for {s}?", "Now {s}.", "{s}?")
AND_OF_HELD_OUT = ("And what about {s}?", "How about {s}?")
TELL_NAME = ("My name is {n}.", "I am {n}.", "Hi, I am called {n}.", "Call me {n}.")
ASK_NAME = ("What is my name?", "Do you remember my name?", "Who am I?", "What am I called?")
AGAIN = ("Say that again.", "Repeat that.", "Again, please.", "What did you say?", "Pardon?")


def _fact(relation: Relation, subject: str) -> str:
    return relation.answer.format(s=subject, o=relation.pairs[subject])


def follow_up(rng: random.Random, held_out: bool, thinking: bool = False) -> Sample:
    """Two or three turns; the last question needs an earlier turn.

    Held out are the pair of subjects and the wording of the second question, or the name.
    """
    kind = rng.choice(("fact", "fact", "name", "again"))
    relation = rng.choices(RELATIONS, [len(r.pairs) for r in RELATIONS])[0]
    first, second = draw(lambda r: tuple(r.sample(list(relation.pairs), 2)), rng, held_out)
    asked = user(rng.choice(relation.asked).format(s=first))
    said = assistant(_fact(relation, first))
    if kind == "fact":
        thought = relation.thought.format(s=second)
        wording = rng.choice(AND_OF_HELD_OUT if held_out else AND_OF)
        expected = relation.pairs[second]
        messages = [asked, said, user(wording.format(s=second))]
        messages.append(assistant(_fact(relation, second), thought if thinking else ""))
    elif kind == "name":
        who = name(rng, held_out)
        expected = who
        greeting = rng.choice(TELL_NAME).format(n=who)
        messages = [user(greeting), assistant(f"Hello, {who}! How can I help?")]
        if rng.random() < 0.5:
            messages += [asked, said]
        thought = "The user asks for the name given before."
        messages += [user(rng.choice(ASK_NAME))]
        messages.append(assistant(f"Your name is {who}.", thought if thinking else ""))
    else:
        expected = relation.pairs[first]
        thought = "The user wants to hear it again."
        messages = [asked, said, user(rng.choice(AGAIN))]
        messages.append(assistant(_fact(relation, first), thought if thinking else ""))
    return Sample("follow-up", messages, expected, thinking)
