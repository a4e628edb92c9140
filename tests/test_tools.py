"""Tool calls out of a stream: however it is cut, the same calls and no XML in the text."""

import json
import random
import re
from typing import Any

import pytest

from qwen35_mlx.engine.output import Piece
from qwen35_mlx.engine.tool_calls import ToolCallParser, as_message, calls_of, coerce

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


def run(parts: list[str]) -> tuple[str, list[Any]]:
    parser = ToolCallParser([TOOL])
    pieces: list[Piece] = []
    for part in parts:
        pieces += parser.feed(part)
    pieces += parser.finish()
    return "".join(p.text for p in pieces), [p.call for p in pieces if p.call]


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
    return re.sub(call, "", text, flags=re.DOTALL), calls


def test_a_thousand_streams_cut_at_random_tokens(demo: Any) -> None:
    tokenizer = demo[1]
    random_ = random.Random(0)
    num_calls = num_cut = 0
    for _ in range(1000):
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
        detokenizer, parts, run_length = tokenizer.detokenizer, [""], 1
        for token in ids:
            detokenizer.add_token(token)
            parts[-1] += detokenizer.last_segment
            run_length -= 1
            if run_length == 0:
                parts.append("")
                run_length = random_.choice([1, 1, 1, 2, 5, 40])
        detokenizer.finalize()
        parts.append(detokenizer.last_segment)
        assert "".join(parts) == text
        got = run(parts)
        assert got == run([text]) == run(list(text))
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
    assert num_calls > 800 and num_cut > 100


def test_the_text_around_calls_is_shown_at_once_and_without_their_line_ends() -> None:
    parser = ToolCallParser([TOOL])
    assert [p.text for p in parser.feed("Let me look: ")] == ["Let me look:"]
    assert parser.feed("\n\n<tool") == []
    assert parser.feed("_call>\n<function=do>\n<parameter=text>\nx") == []
    assert parser.feed("\n</parameter>\n</function>\n") == []
    (piece,) = parser.feed("</tool_call>")
    assert piece.call and piece.call.arguments == {"text": "x"} and piece.text == ""
    assert parser.feed("\n") == []
    assert [p.text for p in parser.feed("Then")] == ["Then"]
    assert parser.finish() == []


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
    ],
)  # fmt: skip
def test_what_is_cut_or_spoilt_is_not_run(
    text: str, name: str, arguments: dict[str, str], complete: bool
) -> None:
    shown, (call,) = run([text])
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
        ("unknown", "3", "3"),
    ],
)  # fmt: skip
def test_values_have_the_type_of_the_schema(name: str, raw: str, value: Any) -> None:
    _, (call,) = run([render("do", {name: raw})])
    got = call.arguments[name]
    assert got == value and type(got) is type(value)


def test_schemas_with_references_and_enums() -> None:
    root = {"$defs": {"n": {"type": "integer"}, "me": {"$ref": "#/$defs/me"}}}
    assert coerce("3", {"$ref": "#/$defs/n"}, root) == 3
    assert coerce("3", {"$ref": "#/$defs/me"}, root) == "3"
    assert coerce("3", {"$ref": "#/$defs/none"}, root) == "3"
    assert coerce("2", {"enum": [1, 2]}, {}) == 2
    assert coerce("2", {"enum": ["1", "2"]}, {}) == "2"


def test_a_call_goes_into_the_messages_as_it_was_said() -> None:
    _, (call,) = run([render("do", {"flag": "true", "deep": '{"a":1}'})])
    message = {"role": "assistant", "content": "", "tool_calls": [as_message(call)]}
    assert message["tool_calls"][0]["function"]["arguments"] == {"flag": "true", "deep": '{"a":1}'}
    assert calls_of(json.loads(json.dumps(message)), [TOOL]) == [call]
