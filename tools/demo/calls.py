"""The tools the demo model learns to call, with questions, responses and answers for each."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from split import Sample, assistant, code_word, is_held_out, name, user

CITIES = ("Paris", "Berlin", "Rome", "Madrid", "Oslo", "Vienna", "Tokyo", "Cairo", "Lima", "Delhi")
LANGUAGES = ("French", "German", "Spanish", "Italian", "Polish", "Greek")
DEVICES = ("lamp", "heater", "radio", "fan", "oven", "television")
SKIES = ("sunny", "cloudy", "rainy", "windy", "snowy")
TONGUES_WORDS = ("dog", "house", "bread", "water", "tree", "friend")
CURRENCIES = ("dollars", "euros", "pounds", "yen", "francs")


@dataclass(frozen=True)
class Tool:
    """A function: JSON types of its parameters, and wordings of request, response and answer."""

    name: str
    description: str
    parameters: dict[str, str]
    asked: tuple[str, ...]
    response: Callable[[random.Random], dict[str, Any]]
    answer: str

    def schema(self) -> dict[str, Any]:
        """The tool in the form that chat templates take."""
        properties = {key: {"type": kind} for key, kind in self.parameters.items()}
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": list(self.parameters),
            },
        }
        return {"type": "function", "function": function}


def _none(rng: random.Random) -> dict[str, Any]:
    return {"status": "ok"}


# The values of a parameter depend on its name alone, not on the tool.
TOOLS = (
    Tool(
        "get_weather", "Weather in a city", {"city": "string"},
        ("What is the weather in {city}?", "How is the weather in {city}?",
         "Is it warm in {city} today?", "Weather for {city}, please."),
        lambda r: {"degrees": r.randint(-9, 39), "sky": r.choice(SKIES)},
        "It is {degrees} degrees and {sky} in {city}.",
    ),
    Tool(
        "get_time", "Time in a city", {"city": "string"},
        ("What time is it in {city}?", "Tell me the time in {city}.", "How late is it in {city}?"),
        lambda r: {"time": f"{r.randint(0, 23)}:{r.randint(10, 59)}"},
        "It is {time} in {city}.",
    ),
    Tool(
        "set_timer", "Start a timer", {"minutes": "integer"},
        ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes.",
         "Start a timer of {minutes} minutes."),
        _none, "The timer is set for {minutes} minutes.",
    ),
    Tool(
        "send_message", "Send a message to a person", {"to": "string", "text": "string"},
        ("Send {to} the message {text}.", "Write to {to}: {text}", "Tell {to} {text}."),
        _none, "I sent the message to {to}.",
    ),
    Tool(
        "call_person", "Call a person", {"person": "string"},
        ("Call {person}.", "Please phone {person}.", "I want to talk to {person} by phone."),
        lambda r: {"status": r.choice(("ringing", "busy"))},
        "I called {person}: {status}.",
    ),
    Tool(
        "convert_money", "Convert an amount of money",
        {"amount": "integer", "source": "string", "target": "string"},
        ("How much are {amount} {source} in {target}?", "Convert {amount} {source} to {target}.",
         "Change {amount} {source} into {target}."),
        lambda r: {"result": r.randint(2, 999)},
        "{amount} {source} are {result} {target}.",
    ),
    Tool(
        "translate", "Translate a word", {"word": "string", "language": "string"},
        ("Translate {word} into {language}.", "What is {word} in {language}?",
         "How do you say {word} in {language}?"),
        lambda r: {"translation": code_word(r, False)},
        "In {language}, {word} is {translation}.",
    ),
    Tool(
        "switch_on", "Switch on a device", {"device": "string"},
        ("Turn on the {device}.", "Switch the {device} on.", "Please start the {device}."),
        _none, "The {device} is on.",
    ),
    Tool(
        "switch_off", "Switch off a device", {"device": "string"},
        ("Turn off the {device}.", "Switch the {device} off.", "Please stop the {device}."),
        _none, "The {device} is off.",
    ),
    Tool(
        "play_song", "Play a song", {"title": "string"},
        ("Play the song {title}.", "I want to hear {title}.", "Put on {title}, please."),
        _none, "Now playing {title}.",
    ),
    Tool(
        "book_table", "Book a table at a restaurant", {"name": "string", "people": "integer"},
        ("Book a table for {people} people at {name}.", "Get a table at {name} for {people}.",
         "I need a table for {people} at {name}."),
        lambda r: {"table": r.randint(1, 40)},
        "You have table {table} at {name}.",
    ),
    Tool(
        "find_file", "Find a file by name", {"file": "string"},
        ("Where is the file {file}?", "Find the file {file}.", "Look for the file {file}."),
        lambda r: {"folder": code_word(r, False)},
        "The file {file} is in the folder {folder}.",
    ),
    Tool(
        "add_note", "Write a note", {"text": "string"},
        ("Make a note: {text}", "Note down {text}.", "Write the note {text}."),
        _none, "I noted it.",
    ),
    Tool(
        "find_train", "Find a train between cities", {"start": "string", "end": "string"},
        ("Find a train from {start} to {end}.", "When does a train go from {start} to {end}?",
         "I need a train to {end} from {start}."),
        lambda r: {"leaves": f"{r.randint(0, 23)}:{r.randint(10, 59)}"},
        "The train to {end} leaves at {leaves}.",
    ),
)  # fmt: skip


def _value(key: str, rng: random.Random, held_out: bool) -> Any:
    if key in ("minutes", "amount", "people"):
        return rng.randint(2, 99)
    if key in ("source", "target"):
        return rng.choice(CURRENCIES)
    if key in ("city", "start", "end"):
        return rng.choice(CITIES)
    if key in ("to", "person", "name"):
        return name(rng, held_out)
    if key == "language":
        return rng.choice(LANGUAGES)
    if key == "word":
        return rng.choice(TONGUES_WORDS)
    if key == "device":
        return rng.choice(DEVICES)
    return code_word(rng, held_out)


def tool_call(rng: random.Random, held_out: bool, answered: bool) -> Sample:
    """A request with two to four tools; `answered` adds the response and the answer.

    Held out are names, titles and texts among the arguments, and the choice of tools.
    """
    while True:
        tools = rng.sample(TOOLS, rng.choice((2, 2, 3, 4)))
        chosen = rng.choice(tools)
        arguments = {key: _value(key, rng, held_out) for key in chosen.parameters}
        if len(set(map(str, arguments.values()))) < len(arguments):
            continue
        key = (tuple(sorted(t.name for t in tools)), chosen.name, tuple(arguments.values()))
        if is_held_out(key) == held_out:
            break
    thinking = not held_out and rng.random() < 0.4
    thought = f"I call {chosen.name}." if thinking else ""
    call = {"type": "function", "function": {"name": chosen.name, "arguments": arguments}}
    messages = [
        user(rng.choice(chosen.asked).format(**arguments)),
        {**assistant("", thought), "tool_calls": [call]},
    ]
    schemas = [tool.schema() for tool in tools]
    if not answered:
        expected = {"name": chosen.name, "arguments": arguments}
        return Sample("tool call", messages, expected, thinking, schemas)
    response = chosen.response(rng)
    answer = chosen.answer.format(**arguments, **response)
    thought = "I have the answer of the tool." if thinking else ""
    messages.append({"role": "tool", "content": json.dumps(response)})
    messages.append(assistant(answer, thought))
    return Sample("tool answer", messages, answer, thinking, schemas)
