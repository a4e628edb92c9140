"""Grammars that an answer follows: schemas, patterns, required tools."""

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from everyday import everyday
from random_schemas import is_valid, random_schema

from qwen35_mlx.engine.grammar import GrammarError, Grammars
from qwen35_mlx.engine.output import OutputParser
from qwen35_mlx.engine.requests import Done, Grammar, Request, Token, ToolName
from qwen35_mlx.engine.row import Row
from qwen35_mlx.engine.scheduler import Engine
from qwen35_mlx.engine.speculate import Drafter
from qwen35_mlx.engine.tool_calls import as_message
from qwen35_mlx.sampling import SamplingParams

# Wider than the tokenizer, as the heads of real models are.
VOCAB = 2560 + 24
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 2, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
    {
        "type": "function",
        "function": {
            "name": "paint",
            "parameters": {
                "type": "object",
                "properties": {
                    "colour": {"type": "string", "enum": ["red", "dark blue"]},
                    "sizes": {"type": "array", "items": {"$ref": "#/$defs/size"}, "maxItems": 2},
                    "wet": {"type": "boolean"},
                },
                "required": ["colour", "sizes"],
                "$defs": {"size": {"type": "integer", "minimum": 1, "maximum": 5}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def grammars(demo: Any) -> Grammars:
    return Grammars(demo[1], VOCAB)


@pytest.fixture(scope="module")
def engine(demo: Any) -> Iterator[Engine]:
    engine = Engine(*demo)
    engine.start()
    yield engine
    engine.stop()


def drawn(
    grammars: Grammars, request: Request, seed: int, tokenizer: Any, as_json: bool = False
) -> list[int]:
    """Tokens by random logits, of which a grammar forbids some."""
    compiled = grammars.of(request, lambda: as_json)
    assert compiled is not None
    matcher, draw, ids = compiled.copy(), np.random.default_rng(seed), list[int]()
    while not matcher.is_finished:
        forbidden = matcher.forbidden()
        assert len(forbidden) == VOCAB and forbidden[2560:].all()
        # Ends are likely, or a text of a call would be long.
        logits = draw.normal(size=VOCAB)
        token = int(np.where(forbidden, -np.inf, logits).argmax())
        if token in tokenizer.eos_token_ids:
            break
        matcher.accept(token)
        ids.append(token)
        assert len(ids) < 2000
    return ids


def request(grammar: Grammar | None = None, **options: Any) -> Request:
    return Request(prompt="x", grammar=grammar, **options)


@pytest.mark.parametrize("seed", everyday(range(40), *range(6)))
def test_every_answer_keeps_its_schema(grammars, demo, seed):
    schema = random_schema(random.Random(seed))
    ids = drawn(grammars, request(Grammar("json_schema", schema)), seed, demo[1])
    text = demo[1].decode(ids)
    assert is_valid(json.loads(text), schema), (text, schema)


@pytest.mark.parametrize(
    ("text", "is_object"),
    [('{"a": [1, null]}', True), ("{}", True), ("[1]", False), ("1", False), ('"a"', False)],
)
def test_an_answer_is_an_object_where_no_schema_is_given(grammars, demo, text, is_object):
    matcher = grammars.of(request(Grammar("json_object")), lambda: False).copy()
    for token in demo[1].encode(text):
        if matcher.forbidden()[token]:
            assert not is_object
            return
        matcher.accept(token)
    assert is_object and (matcher.is_finished or not matcher.forbidden()[demo[1].eos_token_id])


def test_a_wrong_token_is_an_error_and_nothing_is_printed(grammars, demo, capfd):
    matcher = grammars.of(request(Grammar("json_object")), lambda: False).copy()
    with pytest.raises(GrammarError, match="cannot be followed"):
        matcher.accept(demo[1].encode("]")[0])
    assert capfd.readouterr() == ("", "")


POINT = {"type": "object", "properties": {"x": {"enum": [1]}}, "required": ["x"]}


@pytest.mark.parametrize(
    ("schema", "more", "takes_more"),
    [
        (POINT, {"z": 1}, False),
        ({"$ref": "#/$defs/p", "$defs": {"p": POINT}}, {"z": 1}, False),
        ({"anyOf": [POINT, {"type": "null"}]}, {"z": 1}, False),
        ({**POINT, "additionalProperties": {"type": "integer"}}, {"z": 1}, True),
        ({"allOf": [POINT, {"type": "object", "properties": {"y": {}}}]}, {"y": 1}, True),
        ({**POINT, "anyOf": [{"properties": {"y": {"enum": [1]}}}]}, {"y": 1}, True),
        ({**POINT, "required": ["x", "z"]}, {"z": 1}, True),
        ({"type": "object"}, {"z": 1}, True),
        ({"type": "object", "properties": {"x": {}, "properties": {}}}, {"properties": 1}, True),
    ],
)
def test_an_object_gets_no_keys_that_its_schema_does_not_name(
    grammars, demo, schema, more, takes_more
):
    """Or a model that should fill in a form goes on with keys of its own."""
    compiled = grammars.of(request(Grammar("json_schema", schema)), lambda: False)
    text = json.dumps({"x": 1, **more})
    ids = demo[1]._tokenizer.encode(text, add_special_tokens=False)
    assert (compiled.copy()._matcher.validate_tokens(ids) == len(ids)) is takes_more


def test_is_valid_notices_what_is_wrong():
    schema = random_schema(random.Random(1))
    assert not is_valid([], schema) and not is_valid({"other": 1}, schema)
    assert not is_valid(True, {"enum": [1]}) and is_valid(1, {"enum": [1]})
    assert not is_valid(3, {"type": "integer", "minimum": 4, "maximum": 5})


@pytest.mark.parametrize("as_json", [False, True])
def test_required_calls_have_the_arguments_of_their_schemas(grammars, demo, as_json):
    tokenizer, found = demo[1], set()
    # Of free text only the end is drawn soon enough with random logits.
    tools = json.loads(json.dumps(TOOLS).replace('"maxLength": 12', '"enum": ["Rome", "a b"]'))
    for seed in range(6):
        asked = request(tools=tools, tool_choice="required", parallel_tool_calls=False)
        ids = drawn(grammars, asked, seed, tokenizer, as_json)
        parser = OutputParser(tokenizer, tools=tools)
        pieces = [piece for token in ids for piece in parser.feed(token)] + parser.finish()
        (call,) = [piece.call for piece in pieces]
        assert call.complete, tokenizer.decode(ids)
        found.add(call.name)
        if call.name == "get_weather":
            assert call.arguments["city"] in ("Rome", "a b") and 2 <= call.arguments["days"] <= 9
        elif call.name == "paint":
            assert call.arguments["colour"] in ("red", "dark blue")
            assert all(1 <= size <= 5 for size in call.arguments["sizes"])
        else:
            assert call.name == "now"
    assert len(found) > 1


def test_a_call_is_written_as_the_template_shows_it(grammars, demo):
    """Or the next prompt would differ from what was read."""
    tokenizer = demo[1]
    named = request(tools=TOOLS, tool_choice=ToolName("paint"), parallel_tool_calls=False)
    ids = drawn(grammars, named, 3, tokenizer)
    parser = OutputParser(tokenizer, tools=TOOLS)
    (call,) = [p.call for token in ids for p in parser.feed(token)]
    said = {"role": "assistant", "content": "", "tool_calls": [as_message(call)]}
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}, said], tools=TOOLS, tokenize=False
    )
    assert tokenizer.decode(ids) in text


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("regex", "[0-9]{3}-(yes|no)"), "[0-9]{3}-(yes|no)"),
        (Grammar("lark", 'start: "a" NUM\nNUM: /[0-9]{2}/'), "a[0-9]{2}"),
    ],
)
def test_patterns_are_kept(grammars, demo, grammar, pattern):
    text = demo[1].decode(drawn(grammars, request(grammar), 1, demo[1]))
    assert re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"type": "foo"}, r"\$:?"),
        ({"properties": {"a": {"items": {"uniqueItems": True}}}}, r"\$.properties.a.items"),
        ({"anyOf": [{"type": "null"}, {"not": {"type": "null"}}]}, r"\$.anyOf\[1\]"),
        ({"type": "string", "pattern": "(?=a)"}, r"\$"),
        ({"type": "object", "properties": {"n": {"type": "integer", "minimum": 5, "maximum": 2}},
          "required": ["n"]}, r"\$.properties.n"),
        ({"$ref": "http://127.0.0.1:9/x"}, r"\$"),
        ({"type": "object", "properties": {"n": 5}}, r"\$.properties.n"),
        ({"type": "object", "properties": {"n": {}}, "required": 5}, r"\$"),
        ({"type": "object", "properties": [5], "required": [[5]]}, r"\$"),
        ("text", "not usable"),
        ({"enum": ["x" * 300_000]}, "too long"),
        ({"const": float("nan")}, "not usable"),
    ],
)  # fmt: skip
def test_schemas_that_cannot_be_kept_are_refused_with_their_path(grammars, schema, path):
    with pytest.raises(GrammarError, match=path):
        grammars.of(request(Grammar("json_schema", schema)), lambda: False)


@pytest.mark.parametrize(
    "options",
    [
        {"grammar": Grammar("regex", "[")},
        {"grammar": Grammar("lark", "start: foo")},
        {"grammar": Grammar("lark", None)},
        {"grammar": Grammar("xml", "x")},
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": ToolName("other")},
        {"tools": TOOLS, "tool_choice": "sometimes"},
    ],
)
def test_grammars_that_cannot_be_kept_are_refused(grammars, options):
    with pytest.raises(GrammarError):
        grammars.of(request(**options), lambda: False)


def test_without_calls_and_a_grammar_an_answer_is_free(grammars):
    for tools in ([], TOOLS):
        asked = request(tools=tools, tool_choice="none", strict_tools={"now"})
        assert grammars.of(asked, lambda: False) is None


class Said:
    """What an engine answered."""

    def __init__(self, engine: Engine, question: str = "Weather in Paris?", **options: Any):
        options = {"params": SamplingParams(), "max_tokens": 120} | options
        asked = Request(messages=[{"role": "user", "content": question}], **options)
        events = list(engine.submit(asked).events())
        pieces = [p for e in events if isinstance(e, Token | Done) for p in e.pieces]
        self.text = "".join(p.text for p in pieces if p.kind == "answer")
        self.thought = "".join(p.text for p in pieces if p.kind == "thought")
        self.calls = [p.call for p in pieces if p.call]
        self.finish_reason = events[-1].finish_reason


@pytest.mark.parametrize(
    "options", everyday([{}, {"think_budget": 4}, {"enable_thinking": False}], 1, 2)
)
def test_the_grammar_begins_behind_the_thought(engine, options):
    """Whether it ends by itself, by its budget, or there is none."""
    said = Said(engine, grammar=Grammar("json_schema", CITY), **options)
    assert is_valid_city(json.loads(said.text)) and said.finish_reason == "stop"
    assert bool(said.thought) == (options.get("enable_thinking") is None)


def is_valid_city(value: Any) -> bool:
    return set(value) == {"city", "days"} and 2 <= value["days"] <= 9


def test_rows_with_grammars_do_not_share_a_matcher(engine):
    options = {"grammar": Grammar("json_schema", CITY), "enable_thinking": False, "n": 3}
    params = SamplingParams(temperature=1.5)
    asked = Request(messages=[{"role": "user", "content": "x"}], params=params, seed=1, **options)
    texts = ["", "", ""]
    for event in engine.submit(asked).events():
        if isinstance(event, Token | Done):
            texts[event.index] += "".join(p.text for p in event.pieces)
    assert all(is_valid_city(json.loads(text)) for text in texts) and len(set(texts)) > 1


def test_an_answer_may_be_json_or_a_call_where_both_are_asked_for(grammars, demo):
    asked = request(Grammar("json_schema", CITY), tools=TOOLS[2:])
    compiled = grammars.of(asked, lambda: False)
    allowed = np.flatnonzero(~compiled.copy().forbidden())
    call = demo[1].get_added_vocab()["<tool_call>"]
    texts = {demo[1].decode([int(i)])[0] for i in allowed if i != call}
    assert call in allowed and texts == {"{"}


@pytest.mark.slow
def test_a_required_call_follows_the_thought(engine):
    said = Said(engine, tools=TOOLS[:1], tool_choice="required", think_budget=6)
    assert said.finish_reason == "tool_calls" and said.thought and not said.text
    assert {call.name for call in said.calls} == {"get_weather"}


def test_an_answer_that_is_cut_says_so(engine):
    grammar = Grammar("json_schema", CITY)
    said = Said(engine, grammar=grammar, enable_thinking=False, max_tokens=3)
    assert said.finish_reason == "length"


def test_the_end_of_a_thought_is_not_inserted_behind_the_last_token(engine):
    asked = Request(
        messages=[{"role": "user", "content": "Weather in Paris?"}],
        params=SamplingParams(),
        think_budget=3,
        max_tokens=4,
    )
    end = list(engine.submit(asked).events())[-1]
    assert end.finish_reason == "length" and end.usage.generated_tokens <= 4


STRICT = CITY | {"properties": CITY["properties"] | {"city": {"type": "string", "enum": ["Rome"]}}}
STRICT_TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": STRICT}},
    {"type": "function", "function": {"name": "free", "parameters": CITY}},
]
GOOD = "<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n5\n"
GOOD += "</parameter>\n</function>"
FREE = "<function=free>\n<parameter=other>\nwhat it likes\n</parameter>\n</function>"


@pytest.mark.parametrize(
    ("text", "is_kept"),
    [
        ("Any text, {x", True),
        (f"I look.\n<tool_call>\n{GOOD}\n</tool_call>", True),
        (f"<tool_call>\n{FREE}\n</tool_call>", True),
        (f"<tool_call>\n{GOOD}\n</tool_call>\n<tool_call>\n{FREE}\n</tool_call> Done.", True),
        (f"<tool_call>\n{GOOD.replace('5', '95')}\n</tool_call>", False),
        (f"<tool_call>\n{GOOD.replace('city', 'town')}\n</tool_call>", False),
        ("<tool_call>\n<function=unknown>\n</function>\n</tool_call>", False),
    ],
)
@pytest.mark.parametrize("parallel", [True, False])
def test_calls_of_strict_tools_keep_their_schemas_where_the_model_may_call(
    grammars, demo, text, is_kept, parallel
):
    """Text is free; so are calls of tools that are not strict."""
    options = {"strict_tools": ["get_weather"], "parallel_tool_calls": parallel}
    compiled = grammars.of(request(tools=STRICT_TOOLS, **options), lambda: False)
    matcher = compiled.copy()
    is_kept = is_kept and (parallel or text.count("<tool_call>") < 2)
    for token in demo[1].encode(text, add_special_tokens=False):
        if matcher.forbidden()[token]:
            assert not is_kept
            return
        matcher.accept(token)
    assert is_kept and (matcher.is_finished or not matcher.forbidden()[demo[1].eos_token_id])


def test_tools_that_are_not_strict_need_no_grammar(grammars):
    assert grammars.of(request(tools=TOOLS), lambda: False) is None
    assert grammars.of(request(tools=TOOLS, strict_tools=["other"]), lambda: False) is None


@pytest.mark.slow
def test_one_call_ends_the_answer_where_parallel_calls_are_off(engine, monkeypatch):
    called = "<tool_call>\n<function=get_weather>\n</function>\n</tool_call>"
    prefilled = {"role": "assistant", "content": f"{called}\n{called}"}
    ids = engine.tokenizer.encode(prefilled["content"], add_special_tokens=False)
    end = engine.tokenizer.eos_token_id
    taken = []

    class Fed(Row):
        def take(self, token, logits, from_draft=False):
            taken.append(token)
            super().take([*ids, end][len(taken) - 1], logits, from_draft)

    monkeypatch.setattr("qwen35_mlx.engine.scheduler.Row", Fed)
    options = {"enable_thinking": False, "parallel_tool_calls": False, "tools": TOOLS}
    said = Said(engine, **options)
    assert len(said.calls) == 1 and said.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("seed", "temperature"), everyday([(0, 1.0), *((n, float(n // 6 % 2)) for n in range(100))], 0)
)
def test_drafts_inside_a_grammar_change_no_text(engine, demo, monkeypatch, seed, temperature):
    """Drafts are one or three, right ones and those that the grammar forbids."""
    drafters = []

    def drafter(model: Any, mode: str) -> Drafter:
        drafters.append(Drafter(model, mode, 1 + 2 * (seed % 2)))
        return drafters[-1]

    monkeypatch.setattr("qwen35_mlx.engine.rows.Drafter", drafter)
    monkeypatch.setattr(engine._rows, "_drafters", {})
    schema = CITY if seed == 0 else random_schema(random.Random(seed))
    options = {"grammar": Grammar("json_schema", schema), "max_tokens": 60, "seed": seed}
    options |= {"question": "What is 47 + 85?", "enable_thinking": seed % 3 == 1}
    options["params"] = SamplingParams(temperature=temperature)
    plain = Said(engine, **options, draft="off")
    for mode in ("mtp", "lookup"):
        said = Said(engine, **options, draft=mode)
        assert (said.thought, said.text) == (plain.thought, plain.text)
        assert said.finish_reason == plain.finish_reason
    _, of_layer, _ = drafters
    drafted, accepted = of_layer.stats.first_drafts
    assert drafted > accepted
    if seed == 0 and temperature == 0:
        assert accepted > 3


def test_masks_behind_drafts_are_those_of_a_matcher_that_took_them(grammars, demo):
    compiled = grammars.of(request(Grammar("json_schema", CITY)), lambda: False)
    matcher, ids = compiled.copy(), demo[1].encode('{"city": "Rome", "days": 3}')
    assert len(matcher.forbidden_behind([ids[1], ids[0]])) == 2
    masks = matcher.forbidden_behind([*ids[:5], demo[1].eos_token_id, 5])
    for token, mask in zip(ids[:5], masks[:5], strict=True):
        matcher.accept(token)
        assert np.array_equal(mask, matcher.forbidden())
    masks = matcher.forbidden_behind(ids[5:])
    assert not matcher.is_finished and not np.array_equal(masks[0], masks[1])
