"""Tool calls out of a stream: however it is cut, the same calls and no XML in the text."""

import json
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
from fake_tokenizer import FakeTokenizer

from qwen35_mlx.engine.output import OutputParser, ToolCall
from qwen35_mlx.engine.tool_calls import as_message, calls_of, coerce

PROPERTIES: dict[str, Any] = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "ratio": {"type": "number"},
    "deep": {"type": "object"},
    "list": {"type": "array"},
    "flag": {"type": "boolean"},
    "maybe": {"type": ["integer", "null"]},
    "either": {"anyOf": [{"type": "array"}, {"type": "string"}]},
    "free": {},
}
TOOL = {
    "type": "function",
    "function": {"name": "do", "parameters": {"type": "object", "properties": PROPERTIES}},
}


def run(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, list[ToolCall]]:
    parser = OutputParser(tokenizer, tools=[TOOL])
    pieces = [piece for token in tokens for piece in parser.feed(token)] + parser.finish()
    assert all(piece.text == "" for piece in pieces if piece.call)
    return "".join(p.text for p in pieces), [p.call for p in pieces if p.call]


def parse(text: str) -> tuple[str, list[ToolCall]]:
    """What is shown, and the calls, however the text is cut."""
    tokenizer = FakeTokenizer()
    first, *others = (run(tokenizer, tokens) for tokens in tokenizer.ways(text, count=2))
    assert all(other == first for other in others)
    return first


def called(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The calls to be run, where nothing but calls is said."""
    shown, calls = parse(text)
    assert shown == ""
    return [(call.name, call.arguments) for call in calls if call.complete]


def render(name: str, arguments: dict[str, str]) -> str:
    body = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


VALUES = [
    "Paris", "", "two\nlines", "\n\nblank lines\n\n", "3", "-7.5", "true", "False", "null", "[1]",
    '{"a": {"b": "</parameter>"}}', "a < b && c > d", "</parameter> in a line", "<tool_call>",
    "</tool_call>\nsaid he", "x</parameter>\n</parameter>y", "<function=no>", "  indented", "NaN",
    "emoji 👩‍👩‍👧 and 漢字", "def f():\n    return '<parameter=x>'\n", "1e400",
]  # fmt: skip
SAID = ["", "I will look.", "Two < three, and <b> too", "漢字 😀 ok", "a <tool", "Line\n\nline"]


def whole(text: str) -> tuple[str, list[tuple[str, dict[str, str]]]]:
    """Another way to parse: regular expressions over the whole text."""
    value = (
        r"<parameter=([^>\n]+)>((?:(?!</parameter>\s*(?:<parameter=|</function>)).)*)</parameter>"
    )
    call = (
        rf"\s*<tool_call>\s*<function=([^>\n]*)>((?:\s*{value})*)\s*</function>\s*</tool_call>\s*"
    )
    calls = []
    for match in re.finditer(call, text, re.DOTALL):
        found = re.findall(value, match[2], re.DOTALL)
        calls.append((match[1], {k: v.removeprefix("\n").removesuffix("\n") for k, v in found}))
    texts = re.sub(rf"(?:{call})+", "\0", text, flags=re.DOTALL).split("\0")
    return "\n\n".join(filter(None, texts)), calls


@pytest.mark.slow
def test_hundreds_of_streams_cut_at_random_tokens(demo: Any) -> None:
    tokenizer = demo[1]
    random_ = random.Random(0)
    num_calls = num_cut = 0
    for _ in range(400):
        calls = [
            (
                random_.choice(["do", "other-tool", "ns.do"]),
                {
                    name: random_.choice(VALUES)
                    for name in random_.sample([*PROPERTIES, "unknown"], random_.randint(0, 4))
                },
            )
            for _ in range(random_.randint(0, 3))
        ]
        said = random_.choice(SAID)
        between = random_.choice(["\n", "\n\n", ""])
        text = between.join([said, *(render(*call) for call in calls)])
        text += random_.choice(["", "\n", "\nDone."]) if calls else ""
        ids = tokenizer.encode(text, add_special_tokens=False)
        cut = random_.random() < 0.3
        if cut:
            ids = ids[: random_.randint(0, len(ids))]
        text = tokenizer.decode(ids)
        got = run(tokenizer, ids)
        fake = FakeTokenizer()
        assert all(got == run(fake, tokens) for tokens in fake.ways(text.rstrip("\ufffd"), count=1))
        shown, found = got
        assert "<tool_call" not in shown and "<function=" not in shown.replace("<function=no>", "")
        complete = [(c.name, c.raw_arguments) for c in found if c.complete]
        num_calls += len(complete)
        if cut:
            num_cut += any(not c.complete for c in found)
            assert complete == calls[: len(complete)]
        else:
            assert complete == calls == whole(text)[1] and len(found) == len(calls)
            assert shown.strip() == whole(text)[0].strip()
    assert num_calls > 320 and num_cut > 40


@pytest.mark.parametrize(
    ("text", "name", "arguments", "complete"),
    [
        ("<tool_call>", "", {}, False),
        ("<tool_call>\n<function=do>\n<parameter=text>\nhal", "do", {"text": "hal"}, False),
        ("<tool_call>\n<function=do>\n<parameter=text>\na\n</parameter>\n", "do", {"text": "a"},
         False),
        # All of it was said but the last tag.
        ("<tool_call>\n<function=do>\n</function>\n", "do", {}, True),
        ("<tool_call>\n{\"name\": \"do\"}\n</tool_call>\nno", "", {}, False),
        ("<tool_call>\n<function=do>\noops</function>\n</tool_call>", "do", {}, False),
        ("<tool_call>\n<function=do>\n</function>\nand\n</tool_call>no", "do", {}, False),
        ("<tool_call>\n<function=>\n</function>\n</tool_call>no", "", {}, False),
        ("<tool_call>\ndo(text='a')\n</tool_call>no", "", {}, False),
        ("<tool_call></tool_call>no", "", {}, False),
        ("<tool_call>\n<parameter=text>\na\n</parameter>\n</function>\n</tool_call>no", "", {},
         False),
        # A tag is missing: of the value, or of the function.
        ("<tool_call>\n<function=do>\n<parameter=text>\na\n</function>\n</tool_call>\nno", "do",
         {"text": "a\n</function>\n"}, False),
        ("<tool_call>\n<function=do>\n<parameter=text>\na\n</parameter>\n</tool_call>\nno", "do",
         {"text": "a"}, False),
    ],
)  # fmt: skip
def test_what_is_cut_or_spoilt_is_not_run(
    text: str, name: str, arguments: dict[str, str], complete: bool
) -> None:
    shown, (call,) = parse(text)
    assert (call.name, call.raw_arguments, call.complete) == (name, arguments, complete)
    assert shown in ("", "no")


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("text", "3", "3"), ("text", "true", "true"), ("count", "3", 3), ("count", "3.0", 3),
        ("count", "3.5", "3.5"), ("count", "true", "true"), ("count", "many", "many"),
        ("ratio", "3", 3), ("ratio", "1e-3", 0.001), ("ratio", "NaN", "NaN"),
        ("flag", "true", True), ("flag", "False", False), ("flag", "1", "1"),
        ("maybe", "null", None), ("maybe", "None", None), ("maybe", "4", 4),
        ("list", "[1, \"a\"]", [1, "a"]), ("list", "1", "1"), ("deep", '{"a": 1}', {"a": 1}),
        ("either", "[1]", [1]), ("either", "word", "word"), ("free", "3", "3"),
        ("unknown", "3", "3"), ("text", "", ""), ("text", "<![CDATA[x]]>", "<![CDATA[x]]>"),
        # Python's spelling, of arrays and objects alone.
        ("list", "['x', 'y']", ["x", "y"]), ("list", "[True, None, (1, 2)]", [True, None, [1, 2]]),
        ("deep", "{'k': 'it\\'s', 'z': None}", {"k": "it's", "z": None}),
        ("list", "[1, 2,]", [1, 2]), ("deep", '{"a": true,}', {"a": True}),
        ("deep", "{'a': \"it's true\", 'b': null}", {"a": "it's true", "b": None}),
        ("list", "['\\d+']", ["\\d+"]), ("deep", '{"a": "x\ny"}', {"a": "x\ny"}),
        ("either", "['x']", ["x"]), ("text", "['x']", "['x']"), ("count", "(3)", "(3)"),
        ("list", "{'a': 1}", "{'a': 1}"), ("deep", "[1]", "[1]"), ("list", "(1)", "(1)"),
        # Without a type, arrays and objects in JSON.
        ("free", '{"a": [1]}', {"a": [1]}), ("unknown", "[1]", [1]), ("free", "['x']", "['x']"),
        ("free", "true", "true"), ("free", "None", "None"),
        # What JSON cannot hold.
        ("list", "[NaN]", "[NaN]"), ("list", "[1e400]", "[1e400]"), ("ratio", "1e400", "1e400"),
        ("ratio", "-Infinity", "-Infinity"), ("list", "[1, {2, 3}]", "[1, {2, 3}]"),
        ("deep", "{1: 'a'}", "{1: 'a'}"), ("list", "[b'x', 1j, ...]", "[b'x', 1j, ...]"),
        ("list", '["\\ud800"]', '["\\ud800"]'),
        # Nothing is run.
        ("list", "[__import__('os').getcwd()]", "[__import__('os').getcwd()]"),
        ("list", "[f'{1}', 'a' * 3]", "[f'{1}', 'a' * 3]"), ("deep", "dict(a=1)", "dict(a=1)"),
    ],
)  # fmt: skip
def test_values_have_the_type_of_the_schema(name: str, raw: str, value: Any) -> None:
    _, (call,) = parse(render("do", {name: raw}))
    got = call.arguments[name]
    assert got == value and type(got) is type(value)


def test_schemas_with_references_and_enums() -> None:
    root = {"$defs": {"n": {"type": "integer"}, "me": {"$ref": "#/$defs/me"}}}
    assert coerce("3", {"$ref": "#/$defs/n"}, root) == 3
    assert coerce("3", {"$ref": "#/$defs/me"}, root) == "3"
    assert coerce("3", {"$ref": "#/$defs/none"}, root) == "3"
    assert coerce("2", {"enum": [1, 2]}, {}) == 2
    assert coerce("2", {"enum": ["1", "2"]}, {}) == "2"
    assert coerce("2", {"const": 2}, {}) == 2 and coerce("2", {"const": "2"}, {}) == "2"


@pytest.mark.parametrize(
    ("kind", "raw", "value"),
    [
        ("int", "3", 3), ("float", "0.5", 0.5), ("bool", "True", True), ("list", "['x']", ["x"]),
        ("dict", "{'a': None}", {"a": None}), ("str", "3", "3"),
        (["int", "NoneType"], "None", None),
    ],
)  # fmt: skip
def test_types_may_have_the_names_of_python(kind: Any, raw: str, value: Any) -> None:
    assert coerce(raw, {"type": kind}, {}) == value


@pytest.mark.parametrize("key", ["anyOf", "oneOf", "allOf"])
def test_types_may_be_in_the_parts_of_a_schema(key: str) -> None:
    """Also inside each other, and where another part says nothing of the type."""
    for schema in ({key: [{"type": "integer"}]}, {key: [{"minimum": 1}, {key: [{"const": 7}]}]}):
        assert coerce("3", schema, {}) == 3
        assert coerce("three", schema, {}) == "three"


def test_schemas_that_say_little_or_nonsense() -> None:
    assert coerce("null", {"type": "integer", "nullable": True}, {}) is None
    assert coerce("3", {"type": ["integer", None, {}]}, {}) == 3
    for schema in ({"type": None}, {"type": 5}, True, {"anyOf": [True, None]}, {"enum": None}):
        assert coerce("3", schema, {}) == "3"  # type: ignore[arg-type]
    assert coerce("3", {"$ref": "#/$defs/n"}, {"$defs": []}) == "3"  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "raw",
    ["[" * 100_000, "{'a':" * 5_000, "[" * 90 + "]" * 90, f"[{'9' * 5_000}]", f"[{'-' * 9_000}1]",
     f"[{'1+' * 50_000}1]", "[" + "'a', " * 60_000 + "]"],
    ids=["open", "objects", "deep", "digits", "signs", "sums", "long"],
)  # fmt: skip
def test_values_made_to_break_the_parser_stay_text(raw: str) -> None:
    for kind in ("array", "object", "integer"):
        assert coerce(raw, {"type": kind}, {}) == raw


def call_json(arguments: str, name: str = "do") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


DO = [("do", {"text": "a"})]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (call_json('{"text": "a"}'), DO),
        (call_json('{"text": "a"}') + "\n" + call_json("{}", "now"), [*DO, ("now", {})]),
        ('<tool_call>{"arguments":{"text":"a"},"name":"do"}</tool_call>', DO),
        ('<tool_call>\n\n{\n "name": "do",\n "arguments": {\n "text": "a"}\n}\n\n</tool_call>', DO),
        (call_json('{"count": 3, "list": [1, {"a": null}], "flag": true, "free": "[1]"}'),
         [("do", {"count": 3, "list": [1, {"a": None}], "flag": True, "free": "[1]"})]),
        # A text where the schema has another type.
        (call_json('{"count": "3", "list": "[1]", "text": "3"}'),
         [("do", {"count": 3, "list": [1], "text": "3"})]),
        (call_json('"{\\"text\\": \\"a\\"}"'), DO), (call_json('""'), [("do", {})]),
        (call_json("null"), [("do", {})]),
        ('<tool_call>{"name": "do", "parameters": {"text": "a"}}</tool_call>', DO),
        ('<tool_call>{"type": "function", "function": {"name": "do", "arguments": {"text": "a"}}}'
         "</tool_call>", DO),
        ('<tool_call>[{"name": "do", "arguments": {"text": "a"}},'
         '{"name": "do", "arguments": {"text": "a"}}]</tool_call>', DO * 2),
        ('<tool_call>{"name": "do", "arguments": {"text": "a"}}\n'
         '{"name": "do", "arguments": {"text": "a"}}</tool_call>', DO * 2),
        ("<tool_call>{'name': 'do', 'arguments': {'text': 'a', 'flag': True,}}</tool_call>",
         [("do", {"text": "a", "flag": True})]),
        (call_json('{"text": "a </tool_call> b <tool_call> } { </think>"}'),
         [("do", {"text": "a </tool_call> b <tool_call> } { </think>"})]),
        (call_json('{"text": "\\"\\\\"}'), [("do", {"text": '"\\'})]),
        (call_json('{"text": "it\'s"}'), [("do", {"text": "it's"})]),
        (call_json('{"text": "two\nlines"}'), [("do", {"text": "two\nlines"})]),
        # All of it was said but the tag.
        (call_json('{"text": "a"}')[:-12], DO), (call_json('{"text": "a"}')[:-13], DO),
        # Not complete, or not to be understood.
        (call_json('{"text": "a"}')[:-14], []), (call_json('{"text": "a"}')[:20], []),
        ('<tool_call>{"name": "do"}</tool_call>', []), ("<tool_call>[]</tool_call>", []),
        ('<tool_call>{"name": "", "arguments": {}}</tool_call>', []),
        ('<tool_call>{"name": ["do"], "arguments": {}}</tool_call>', []),
        ('<tool_call>{"function": "do", "arguments": {}}</tool_call>', []),
        (call_json("[1]"), []), (call_json('"a"'), []), (call_json("7"), []),
        (call_json('{"ratio": NaN}'), []), (call_json('{"ratio": 1e999}'), []),
        (call_json('{"text": "a"}').replace("}}", "}} Done"), []),
        (call_json('{"text": "a"}').replace("}}", "}}}"), []),
        (call_json('{"text": "a"}').replace("}}", "}"), []),
        (call_json('{"text": "a"}').replace('a"', "a"), []),
        (call_json("[" * 3_000), []), (call_json('{"a":' * 1_500 + "1" + "}" * 1_500), []),
    ],
)  # fmt: skip
def test_calls_in_json(text: str, calls: list[Any]) -> None:
    assert called(text) == calls
    if text.endswith("</tool_call>"):
        # Whatever it was, it ended there.
        shown, found = parse(f"Now:\n{text}\n{render('do', {'count': '1'})}\nDone")
        assert shown == "Now:\n\nDone"
        assert [(c.name, c.arguments) for c in found if c.complete] == [
            *calls,
            ("do", {"count": 1}),
        ]


@pytest.mark.parametrize(
    "broken",
    [
        render("do", {"text": "a"}).replace("</parameter>\n", ""),
        render("do", {"text": "a"}).replace("</function>\n", ""),
        render("do", {"text": "a"}).replace("\n</parameter>\n</function>", ""),
    ],
)
def test_a_call_without_its_end_does_not_swallow_the_next(broken: str) -> None:
    shown, found = parse(f"{broken}\n{render('do', {'text': 'b'})}")
    assert [(c.arguments, c.complete) for c in found][1:] == [({"text": "b"}, True)]
    assert shown == "" and not found[0].complete


@pytest.mark.parametrize("first", [render("do", {"text": "a"}), call_json('{"text": "a"}')])
@pytest.mark.parametrize("second", [render("do", {"text": "a"}), call_json('{"text": "a"}')])
def test_a_whole_call_whose_last_tag_is_missing_counts_before_the_next(
    first: str, second: str
) -> None:
    for between in ("\n", ""):
        untagged = first.removesuffix("</tool_call>").rstrip("\n") + between
        assert called(untagged + second) == DO * 2
        assert called(untagged * 2 + second.removesuffix("</tool_call>")) == DO * 3


@pytest.mark.parametrize(
    "value",
    [
        "<tool_call>\n<function=no>\n</function>\n</tool_call>",
        '<tool_call>{"name": "no"}</tool_call>\n<tool_call>{"name": "no"}</tool_call>',
        "</function>\n</tool_call>", "</tool_call>" * 50, "</parameter>" * 50, "<tool_call>" * 50,
        "</think>", "<think>\n</think>", "</parameter>\n</tool_call>", "<![CDATA[\n</x>\n]]>",
    ],
)  # fmt: skip
def test_tags_in_a_value_end_no_call(value: str) -> None:
    for behind in ("", "\nDone."):
        shown, (call,) = parse(render("do", {"text": value, "count": "3"}) + behind)
        assert (call.arguments, call.complete) == ({"text": value, "count": 3}, True)
        assert shown == behind.strip()


def test_of_a_parameter_that_comes_twice_the_last_counts() -> None:
    text = render("do", {"count": "1"}).replace(
        "</function>", "<parameter=count>2</parameter></function>"
    )
    assert called(text) == [("do", {"count": 2})]


def test_a_tag_in_a_sentence_is_text() -> None:
    for text in ("Write <tool_call> first, then </tool_call>.", "The tag `<tool_call>`."):
        assert parse(text) == (text, [])


def test_a_call_goes_into_the_messages_as_it_was_said() -> None:
    _, (call,) = parse(render("do", {"flag": "true", "deep": '{"a":1}'}))
    message = {"role": "assistant", "content": "", "tool_calls": [as_message(call)]}
    assert message["tool_calls"][0]["function"]["arguments"] == {"flag": "true", "deep": '{"a":1}'}
    assert calls_of(json.loads(json.dumps(message)), [TOOL]) == [call]


def test_a_call_in_json_goes_into_the_messages_with_its_types() -> None:
    arguments = {"count": 3, "flag": True, "deep": {"a": [None]}, "text": "3"}
    _, (call,) = parse(call_json(json.dumps(arguments)))
    message = {"role": "assistant", "content": "", "tool_calls": [as_message(call)]}
    assert message["tool_calls"][0]["function"]["arguments"] == arguments
    (again,) = calls_of(json.loads(json.dumps(message)), [TOOL])
    assert (again.name, again.arguments) == ("do", arguments)
    # A template that renders JSON gets typed values of a call in XML as well.
    _, (call,) = parse(render("do", {"flag": "true", "count": "3"}))
    function = {"name": "do", "arguments": {"flag": True, "count": 3}}
    assert as_message(call, typed=True) == {"type": "function", "function": function}
