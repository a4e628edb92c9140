"""Compares the answers of a quantized model with those of its reference."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine.requests import Done, Request, Token
from ..engine.scheduler import Engine, Limits
from ..engine.tool_calls import Schema, ToolCall
from ..model.language import Model
from ..progress import StepProgress
from ..sampling import SamplingParams

NUM_EACH = 16
# Compared tokens of an answer, and maximum lengths of answers without and with a thought.
COMPARED_TOKENS, MAX_TOKENS, MAX_THOUGHT_TOKENS = 200, 400, 2048
# Rows of one call that do not change each other's bits.
BATCH_SIZE = 8
FENCE = re.compile(r"\s*(?:```(?:json)?\n)?(.*?)(?:\n```)?\s*", re.DOTALL)
TYPES: dict[str, Any] = {"string": str, "integer": int, "number": int | float, "array": list}

TEXT, WHOLE, NUMBER, YES_OR_NO = ({"type": t} for t in ("string", "integer", "number", "boolean"))
TEXTS: Schema = {"type": "array", "items": TEXT}
CITIES = "Paris Berlin Rome Madrid Oslo Vienna Tokyo Cairo Lima Delhi".split()
NAMES = "Anna Paul Lena Max Nora Hugo Ida Leo Rosa Emil Vera Tom".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ITEMS = "apples pears lamps books chairs cups pencils stamps".split()
CURRENCIES = "dollars euros pounds yen francs".split()
# Values for the placeholders of the questions, by name.
VALUES: dict[str, Sequence[Any]] = {
    "a": range(12, 99), "b": range(12, 99), "c": range(2, 10),
    "age": range(3, 99), "amount": range(5, 500), "city": CITIES, "count": range(2, 60),
    "day": DAYS, "hour": range(1, 24), "item": ITEMS, "job": "baker nurse pilot teacher".split(),
    "level": range(1, 11), "minutes": range(2, 90), "name": NAMES, "other": NAMES,
    "people": range(2, 12), "place": ["Chez Louis", "The Oak", "Blue Door", "Da Marco"],
    "price": range(2, 99), "source": CURRENCIES, "target": CURRENCIES, "town": CITIES,
    "things": ITEMS, "topic": ["rainbows", "tides", "yeast", "magnets", "inflation", "glaciers"],
    "task": ["reverses a list", "counts words", "finds primes", "merges two dicts"],
    "text": ["I am late", "the train is full", "dinner is ready", "call me back"],
}  # fmt: skip
TALKS = (
    "What is the capital of France, and what is {city} known for?",
    "Explain {topic} to a child.",
    "Write a short story about {name} in {city}.",
    "Write a Python function that {task}, with an example.",
    "List five facts about {topic}.",
    "Write a polite e-mail to {name}: {text}.",
)
SUMS = (
    "What is {a} + {b}?",
    "What is {a} * {c}?",
    "{name} has {a} {item} and gives {c} of them away. How many are left?",
    "A train needs {c} hours for {a} km. How far does it go in {b} hours?",
    "Sort these from small to big: {a} {b} {price} {count}",
)
# Name, description, parameters and question of each tool.
TOOLS: tuple[tuple[str, str, dict[str, Schema], str], ...] = (
    ("get_weather", "Weather in a city", {"city": TEXT}, "What is the weather in {city}?"),
    ("get_time", "Time in a city", {"city": TEXT}, "What time is it in {city}?"),
    ("set_timer", "Start a timer", {"minutes": WHOLE}, "Set a timer for {minutes} minutes."),
    ("send_message", "Send a message to a person", {"to": TEXT, "text": TEXT},
     "Send {name} the message {text}."),
    ("convert_money", "Convert an amount of money",
     {"amount": NUMBER, "source": {"enum": CURRENCIES}, "target": {"enum": CURRENCIES}},
     "Convert {amount} {source} to {target}."),
    ("book_table", "Book a table at a restaurant", {"name": TEXT, "people": WHOLE},
     "Book a table for {people} people at {place}."),
    ("find_train", "Find a train between cities", {"start": TEXT, "end": TEXT},
     "Find a train from {city} to {town}."),
    ("plan_meeting", "Plan a meeting", {"people": TEXTS, "day": {"enum": DAYS}, "hour": WHOLE},
     "Plan a meeting with {name} and {other} on {day} at {hour}."),
    ("set_light", "Switch a light", {"room": TEXT, "on": YES_OR_NO}, "Turn on the kitchen light."),
)  # fmt: skip
# A sentence and the JSON schema of its facts.
RECORDS: tuple[tuple[str, dict[str, Schema]], ...] = (
    ("{name} is {age} years old and lives in {city}.", {"name": TEXT, "age": WHOLE, "city": TEXT}),
    ("{name} bought {count} {item} for {price} dollars.",
     {"name": TEXT, "count": WHOLE, "item": TEXT, "price": NUMBER}),
    ("The meeting with {name} is at {hour} on {day}.",
     {"name": TEXT, "day": {"enum": DAYS}, "hour": WHOLE}),
    ("{name} works as a {job} in {city}.", {"name": TEXT, "job": TEXT, "city": TEXT}),
    ("{name} and {other} are invited, {count} chairs are there, and it is outdoors.",
     {"guests": TEXTS, "chairs": WHOLE, "outdoors": YES_OR_NO}),
    ("{name} ordered {count} {item} and {people} {things}.",
     {"name": TEXT, "items": {"type": "array", "items": {
         "type": "object", "properties": {"item": TEXT, "count": WHOLE}}}}),
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A prompt, and what the answer should have: a thought, a tool call, or JSON."""

    text: str
    thinks: bool = False
    tools: Sequence[Schema] = ()
    schema: Schema | None = None


@dataclass
class Answer:
    """A model's answer; `tokens` ends with -1 if the model ended it itself."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    thought_tokens: int = 0


def questions(num_each: int = NUM_EACH, seed: int = 0) -> list[Question]:
    """`num_each` questions of each kind; the same for the same seed."""
    rng = random.Random(seed)
    found = []
    for number in range(num_each):
        found.append(Question(_filled(TALKS[number % len(TALKS)], rng)))
        found.append(Question(_filled(SUMS[number % len(SUMS)], rng), thinks=True))
        wanted = TOOLS[number % len(TOOLS)]
        others = rng.sample([tool for tool in TOOLS if tool is not wanted], rng.randint(1, 3))
        tools = [_tool(*tool[:3]) for tool in rng.sample([wanted, *others], len(others) + 1)]
        found.append(Question(_filled(wanted[3], rng), tools=tools))
        sentence, properties = RECORDS[number % len(RECORDS)]
        schema = {"type": "object", "properties": properties}
        keys = ", ".join(properties)
        is_flat = not any("items" in part for part in properties.values())
        how = f"the keys {keys}" if is_flat else f"this schema: {json.dumps(schema)}"
        text = f"Turn this into JSON: {_filled(sentence, rng)} Answer with JSON alone, with {how}"
        found.append(Question(text, schema=schema))
    return found


def _filled(wording: str, rng: random.Random) -> str:
    drawn: dict[str, Any] = {}
    for place in re.findall(r"{(\w+)}", wording):
        drawn[place] = rng.choice([v for v in VALUES[place] if v not in drawn.values()])
    return wording.format(**drawn)


def _tool(name: str, description: str, properties: Mapping[str, Schema]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def answers(
    model: Model,
    tokenizer: Any,
    asked: Sequence[Question],
    progress: StepProgress = lambda done, total, step: None,
) -> list[Answer]:
    """The greedy answers of a model."""
    requests = [
        Request(
            messages=[{"role": "user", "content": question.text}],
            tools=question.tools,
            params=SamplingParams(),
            enable_thinking=question.thinks,
            max_tokens=MAX_THOUGHT_TOKENS if question.thinks else MAX_TOKENS,
            stop_loops=False,
        )
        for question in asked
    ]
    engine = Engine(model, tokenizer, limits=Limits(BATCH_SIZE, max_queued=len(requests) + 1))
    found, num_done = [Answer() for _ in asked], 0
    for place, event in engine.answer(requests):
        answer = found[place]
        if isinstance(event, Token):
            answer.tokens.append(event.token)
        if isinstance(event, Token | Done):
            answer.calls += [piece.call for piece in event.pieces if piece.call]
            answer.text += "".join(piece.text for piece in event.pieces if piece.kind == "answer")
        if isinstance(event, Done):
            answer.thought_tokens = event.usage.thought_tokens
            answer.tokens += [] if event.finish_reason == "length" else [-1]
            if num_done % BATCH_SIZE == 0:
                progress(num_done, len(asked), "answers")
            num_done += 1
    return found


def figures(
    asked: Sequence[Question], reference: Sequence[Answer], own: Sequence[Answer]
) -> dict[str, Any]:
    """How far a model's answers agree with the reference's, and how many of them are valid.

    Shares are from 0 to 1; `thought_ratio` is None if the reference does not think.
    """
    shared = [_shared(a.tokens, b.tokens) for a, b in zip(reference, own, strict=True)]
    thoughts = [
        (a.thought_tokens, b.thought_tokens)
        for question, a, b in zip(asked, reference, own, strict=True)
        if question.thinks
    ]
    before, after = (sum(column) / len(thoughts) for column in zip(*thoughts, strict=True))
    calls = [_is_call(a, q.tools) for q, a in zip(asked, own, strict=True) if q.tools]
    objects = [_is_json(a.text, q.schema) for q, a in zip(asked, own, strict=True) if q.schema]
    return {
        "same_tokens": sum(shared) / len(shared),
        "identical_answers": sum(share == 1 for share in shared) / len(shared),
        "thought_tokens": after,
        "thought_ratio": after / before if before else None,
        "cut_thoughts": sum(n >= MAX_THOUGHT_TOKENS - 1 for _, n in thoughts) / len(thoughts),
        "valid_tool_calls": sum(calls) / len(calls),
        "valid_json": sum(objects) / len(objects),
    }


def _shared(reference: Sequence[int], own: Sequence[int]) -> float:
    """The share of the longer answer, up to the compared length, before the first difference."""
    a, b = reference[:COMPARED_TOKENS], own[:COMPARED_TOKENS]
    longest = max(len(a), len(b))
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return (min(len(a), len(b)) if same is None else same) / longest if longest else 1.0


def _is_call(answer: Answer, tools: Sequence[Schema]) -> bool:
    """Whether there are calls, all to these tools and valid for their schemas."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    return bool(answer.calls) and all(
        call.complete and call.name in schemas and _follows(call.arguments, schemas[call.name])
        for call in answer.calls
    )


def _is_json(text: str, schema: Schema) -> bool:
    match = FENCE.fullmatch(text)
    try:
        return match is not None and _follows(json.loads(match[1]), schema)
    except (ValueError, RecursionError):
        return False


def _follows(value: Any, schema: Schema) -> bool:
    """Whether a value is valid for one of the schemas here; objects need exactly all properties."""
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "boolean" or isinstance(value, bool):
        return kind == "boolean" and isinstance(value, bool)
    if kind == "object":
        parts = schema["properties"]
        same_keys = isinstance(value, dict) and value.keys() == parts.keys()
        return same_keys and all(_follows(value[key], parts[key]) for key in parts)
    if not isinstance(value, TYPES[kind]):
        return False
    return kind != "array" or all(_follows(item, schema["items"]) for item in value)
