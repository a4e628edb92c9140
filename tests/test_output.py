"""Tokens into thought, answer and calls: the same however they are cut, and nothing lost."""

import random
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from everyday import everyday
from fake_tokenizer import TAGS, FakeTokenizer

from qwen35_mlx.engine.output import OutputParser, Piece, ToolCall, held_back

TOOL = {"function": {"name": "lookup", "parameters": {"properties": {"n": {"type": "integer"}}}}}
XML = "<function=lookup>\n<parameter=city>\nOslo\n</parameter>\n</function>"
CALL = f"<tool_call>\n{XML}\n</tool_call>"
JSON = '<tool_call>\n{"name": "lookup", "arguments": {"city": "Oslo"}}\n</tool_call>'


def pieces_of(tokenizer: Any, tokens: Iterable[int], **options: Any) -> list[Piece]:
    parser = OutputParser(tokenizer, **options)
    pieces = [piece for token in tokens for piece in parser.feed(token)]
    return pieces + parser.finish()


def joined(pieces: Sequence[Piece]) -> tuple[str, str, list[ToolCall]]:
    """Thought, answer and calls."""
    thought, answer = (
        "".join(p.text for p in pieces if p.kind == kind) for kind in ("thought", "answer")
    )
    return thought, answer, [p.call for p in pieces if p.call]


def parse(text: str, tags: tuple[str, ...] = TAGS, **options: Any) -> tuple[str, str, list[Any]]:
    """Thought, answer and calls, however the text is cut."""
    tokenizer = FakeTokenizer(tags)
    first, *others = (joined(pieces_of(tokenizer, t, **options)) for t in tokenizer.ways(text))
    for other in others:
        assert other == first
    return first


def run_calls(calls: Sequence[ToolCall]) -> list[tuple[str, dict[str, Any]]]:
    return [(call.name, call.arguments) for call in calls if call.complete]


@pytest.mark.parametrize("tags", [TAGS, (), TAGS[:2]], ids=["tokens", "spelled", "mixed"])
@pytest.mark.parametrize(
    ("text", "thinking", "thought", "answer"),
    [
        ("one\n\ntwo\n</think>\n\nBlue.", True, "one\n\ntwo", "Blue."),
        ("</think>\n\nBlue.", True, "", "Blue."),
        ("\n</think>\n\nBlue.", True, "", "Blue."),
        ("never done <thi\n", True, "never done <thi", ""),
        ("Blue.\n", False, "", "Blue.\n"),
        ("a < b, </think> and <think> are tags", False, "", "a < b, </think> and <think> are tags"),
        ("<think>\nhm\n</think>\n\nBlue.", False, "hm", "Blue."),
        ("\n<think>hm</think>Blue.", False, "hm", "Blue."),
        (" \n\n<think>hm</think>\n \nBlue.", False, "hm", "  \nBlue."),
        ("x</thin</think>y</think>", True, "x</thin", "y</think>"),
        ("<think>twice</think>ok", True, "<think>twice", "ok"),
        ("<tool_call> is text", False, "", "<tool_call> is text"),
        ("    return x\n", False, "", "    return x\n"),
        ("", True, "", ""),
    ],
)
def test_thought_and_answer(
    tags: tuple[str, ...], text: str, thinking: bool, thought: str, answer: str
) -> None:
    assert parse(text, tags, thinking=thinking) == (thought, answer, [])


def test_a_tag_spelled_by_other_tokens_is_text() -> None:
    tokenizer = FakeTokenizer()
    spelled = tokenizer.spell
    thought = [*spelled("Cut at </think> here.\n"), *tokenizer.encode("</think>\n\nYes")]
    assert joined(pieces_of(tokenizer, thought, thinking=True)) == (
        "Cut at </think> here.", "Yes", []
    )  # fmt: skip
    for text in ("Say <tool_call> and </tool_call>.", "<think> opens a thought.", CALL[:11]):
        assert joined(pieces_of(tokenizer, spelled(text), tools=[TOOL])) == ("", text, [])
    # In a call, it closes none.
    tokens = [*tokenizer.encode(CALL[:-12]), *spelled("</tool_call>"), *spelled(" and")]
    assert run_calls(joined(pieces_of(tokenizer, tokens, tools=[TOOL]))[2]) == []


def test_text_is_shown_as_soon_as_nothing_can_claim_it() -> None:
    tokenizer = FakeTokenizer()

    def shown(text: str, **options: Any) -> list[str]:
        """What each character brings forth."""
        parser = OutputParser(tokenizer, **options)
        tokens = tokenizer.encode(text)
        return ["".join(p.text for p in parser.feed(token)) for token in tokens]

    # The end of a thought is one token: its text is not waited for.
    assert shown("a <b\n\nc", thinking=True) == ["a", " ", "<", "b", "", "", "\n\nc"]
    assert shown("\nab\n") == ["", "a", "b", "\n"]
    assert shown("a \nb", tools=[TOOL]) == ["a", "", "", " \nb"]
    # A call without a tag begins a line and names a tool.
    assert shown("a <f", tools=[TOOL]) == ["a", "", " <", "f"]
    assert shown("a\n<fux", tools=[TOOL]) == ["a", "", "", "", "", "\n<fux"]
    opening = "<function=lookup>"
    assert shown(f"{opening}\n x", tools=[TOOL]) == [""] * 19 + [f"{opening}\n x"]
    assert shown("one END two", stop=["END"])[:7] == ["o", "n", "e", " ", "", "", ""]
    assert shown("EEN", stop=["END"]) == ["", "E", ""]
    # A call that cannot be one any more, in a thought.
    assert shown("a <tool_call>\nb", thinking=True, tools=[TOOL])[-1] == "<tool_call>\nb"


def test_the_text_around_calls_loses_its_line_ends() -> None:
    text = f"Let me look:\n\n{CALL}\n{CALL}\n\n Done.\n"
    assert parse(text, tools=[TOOL])[1] == "Let me look:\n\nDone.\n"
    for call in (CALL, JSON, f"\n{XML}\n"):
        assert parse(f"I look.{call}OK", tools=[TOOL])[1] == "I look.\n\nOK"
        assert parse(f"hm</think>\n\n{call}OK", thinking=True, tools=[TOOL])[1] == "OK"


def test_without_tools_a_call_is_text() -> None:
    for text in (CALL, XML, JSON, "</tool_call>"):
        assert parse(text) == ("", text, [])
        assert parse(text, thinking=True) == (text, "", [])


def test_without_splitting_all_is_text() -> None:
    text = f"\n<think>\nx\n</think>\n\n {CALL}\n"
    assert parse(text, tools=[TOOL], thinking=True, split=False) == ("", text, [])


@pytest.mark.parametrize("split", [True, False])
def test_stop_strings_against_a_search_by_character(split: bool) -> None:
    chance = random.Random(0)
    tokenizer, num_stopped = FakeTokenizer(), 0
    for _ in range(1000):
        text = "".join(chance.choices("abc", k=12))
        stops = ["".join(chance.choices("abc", k=chance.randint(1, 5))) for _ in range(3)]
        tokens = tokenizer.encode(text, lambda: chance.choice([1, 1, 3, 6]))
        parser = OutputParser(tokenizer, stop=[*stops, ""], split=split)
        pieces = [piece for token in tokens for piece in parser.feed(token)] + parser.finish()
        assert "".join(p.text for p in pieces) == before_stop(text, stops), (text, stops)
        assert parser.stopped == any(stop in text for stop in stops)
        num_stopped += parser.stopped
    assert 250 < num_stopped < 950


def before_stop(text: str, stops: list[str]) -> str:
    """What comes before the stop string that is complete first, found a character at a time."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


def test_stop_strings_count_in_the_answer_and_not_in_thoughts_and_calls() -> None:
    text = f"a END\n</think>\n\nb\n{CALL.replace('Oslo', 'END')}\nc END d"
    thought, answer, calls = parse(text, thinking=True, tools=[TOOL], stop=["END"])
    assert (thought, answer) == ("a END", "b\n\nc ")
    assert run_calls(calls) == [("lookup", {"city": "END"})]
    assert parse("<think>x END y", split=False, stop=["END"])[1] == "<think>x "
    assert parse("<think>x", split=False, stop=["</think>", "<think>"])[1] == ""


@pytest.mark.parametrize("stop", ["\n", "\n\n", "\n\nb"])
def test_the_line_ends_behind_a_thought_or_a_call_are_no_stop_string(stop: str) -> None:
    text = "a\n</think>\n\nb"
    assert parse(f"{text}\n\nb", thinking=True, stop=[stop]) == ("a", "b", [])
    assert parse("\n\nb\n\nb", stop=[stop])[1] == "b"
    for call in (CALL, JSON, XML):
        assert parse(f"{call}\n\nb\n\nb", tools=[TOOL], stop=[stop])[1] == "b"


def test_a_call_without_a_tag_in_a_block_of_code_is_text() -> None:
    for fence in ("```", "~~~xml", "  ```xml"):
        text = f"So it looks:\n\n{fence}\n{XML}\n{fence.strip('xml ')}\nSee?"
        assert parse(text, tools=[TOOL]) == ("", text, [])
        assert parse(f"{fence}\n<function=loo", tools=[TOOL])[1] == f"{fence}\n<function=loo"
        assert parse(f"{text}\n{CALL}", tools=[TOOL])[1] == text
        # Behind it, or in text that only names the fence, it is one.
        for before in (text, f"Of {fence} and", f"x\n</think>\n\n{text}"):
            thinking = "</think>" in before
            calls = parse(f"{before}\n{XML}", tools=[TOOL], thinking=thinking)[2]
            assert run_calls(calls) == ONE
    # A fence of a thought is none of the answer.
    text = f"Or\n```\nx\n</think>\n\n{XML}"
    assert run_calls(parse(text, tools=[TOOL], thinking=True)[2]) == ONE


@pytest.mark.parametrize("split", [True, False])
def test_half_a_character_is_never_shown(split: bool) -> None:
    text = "👩‍👩‍👧 漢字 🇩🇪 é"
    tokenizer = FakeTokenizer()
    tokens = tokenizer.encode(text)
    for count in range(len(tokens) + 1):
        answer = joined(pieces_of(tokenizer, tokens[:count], split=split))[1]
        assert text.startswith(answer) and len(text) - len(answer) <= len(tokens) - count + 1
    # What is put behind it completes it neither.
    parser = OutputParser(tokenizer, thinking=True)
    pieces = [p for token in tokens[:-1] for p in parser.feed(token)]
    pieces += parser.insert(tokenizer.encode("\n</think>\n\n")) + parser.feed(
        tokenizer.spell("a")[0]
    )
    assert joined(pieces) == (text[:-1], "a", [])
    # Nor does a tag.
    cut = [*tokens[:-1], *tokenizer.encode("</think>a")]
    assert joined(pieces_of(tokenizer, cut, thinking=True)) == (text[:-1], "a", [])


ONE = [("lookup", {"city": "Oslo"})]


@pytest.mark.parametrize(
    ("text", "answer", "calls"),
    [
        (XML, "", ONE),
        (f"{XML}\n</tool_call>", "", ONE),
        (f"{XML}\n</tool_call>\n</tool_call>\nOk </tool_call>", "Ok </tool_call>", ONE),
        (f"Let me look.\n\n{XML}\n</tool_call>", "Let me look.", ONE),
        (f"{XML}\n{XML}", "", ONE * 2),
        (f"{XML}{XML}\n\nDone.", "Done.", ONE * 2),
        (f"{XML}\n{CALL}\n{XML}", "", ONE * 3),
        ("<function=lookup></function>", "", [("lookup", {})]),
        ("<function=lookup>\n</function>\n", "", [("lookup", {})]),
        # No call: a mention, an unknown tool, not at the start of a line.
        ("I thought of <function=lookup> but no.", None, []),
        (f"Like {XML}", None, []),
        (f"  {XML}", None, []),
        (f"See:\n{XML.replace('lookup', 'other')}\n\n!", None, []),
        ("<function=lookup> is one.\n<function=lookup>\nis as well.", None, []),
        ("a\n<function=look", "a", []),
        ("a\n<func", None, []),
        ("a\n<", None, []),
    ],
)
def test_a_call_without_a_tag(text: str, answer: str | None, calls: list[Any]) -> None:
    got = parse(text, tools=[TOOL])
    assert got[1] == (text if answer is None else answer) and run_calls(got[2]) == calls


TALK = "I should call lookup."


@pytest.mark.parametrize("call", [CALL, JSON, XML, f"{XML}\n</tool_call>", CALL[:-13], JSON[:-12]])
def test_a_call_in_a_thought_that_never_closes_is_one(call: str) -> None:
    for between in ("\n\n", "\n"):
        text = f"{TALK}{between}{call}"
        for end in ("", "\n", "\n\n"):
            thought, answer, calls = parse(text + end, thinking=True, tools=[TOOL])
            assert (thought, answer, run_calls(calls)) == (TALK, "", ONE)
        thought, _, calls = parse(f"{text}\n{CALL}", thinking=True, tools=[TOOL])
        assert (thought, run_calls(calls)) == (TALK, ONE * 2)
        # The model opened the thought.
        assert run_calls(parse(f"<think>\n{text}", tools=[TOOL])[2]) == ONE


@pytest.mark.parametrize("call", [CALL, JSON, XML, CALL[:-13], CALL[:60], JSON[:30], "<tool_call>"])
def test_a_call_in_a_thought_that_closes_is_talk(call: str) -> None:
    text = f"{TALK}\n\n{call}"
    for end in ("", "\n", f"\n{CALL}\n", "\nI wonder.\n"):
        got = parse(f"{text}{end}</think>\n\n42.", thinking=True, tools=[TOOL])
        assert got == ((text + end).rstrip("\n"), "42.", [])
    got = parse(f"{text}\n</think>\n\n{CALL}", thinking=True, tools=[TOOL])
    assert (got[0], run_calls(got[2])) == (text, ONE)


@pytest.mark.parametrize("call", [CALL, JSON, XML, f"{CALL}\n{JSON}", CALL[:-13], JSON[:-12]])
def test_a_call_in_a_thought_that_no_answer_follows_is_one(call: str) -> None:
    for end in ("</think>", "\n</think>", "\n</think>\n\n"):
        thought, answer, calls = parse(f"{TALK}\n{call}{end}", thinking=True, tools=[TOOL])
        assert (thought, answer) == (TALK, "") and run_calls(calls) == ONE * call.count("lookup")
    other = f"{TALK}\n{CALL.replace('lookup', 'other')}"
    for said in (other, f"{TALK}\n{CALL[:60]}", f"{CALL} No."):
        got = parse(f"{said}\n</think>\n\n", thinking=True, tools=[TOOL])
        assert got == (said, "", [])


def test_a_thought_that_goes_on_behind_a_call_has_talked() -> None:
    text = f"{TALK}\n{CALL}\nIt is not time for it yet"
    assert parse(text, thinking=True, tools=[TOOL]) == (text, "", [])
    thought, _, calls = parse(f"{text}\n{CALL}", thinking=True, tools=[TOOL])
    assert thought == text and run_calls(calls) == ONE
    other = f"{TALK}\n{CALL.replace('lookup', 'other')}"
    assert parse(other, thinking=True, tools=[TOOL]) == (other, "", [])


@pytest.mark.parametrize("cut", ["<tool_call>", CALL[:25], CALL[:60], JSON[:40], XML[:-5]])
def test_a_call_in_a_thought_that_is_cut_is_not_run(cut: str) -> None:
    thought, _, calls = parse(f"{TALK}\n{cut}", thinking=True, tools=[TOOL])
    assert thought == TALK and [call.complete for call in calls] == [False]
    thought, _, calls = parse(f"{TALK}\n{CALL}\n{cut}", thinking=True, tools=[TOOL])
    assert thought == TALK and run_calls(calls) == ONE


WORD = re.compile(r"w\d\d")
NO_TEXT = re.compile(r"</?think>|\s|\ufffd")
ATOMS = [
    *TAGS, "<function=lookup>", "<function=other>", "</function>", "<parameter=city>",
    "</parameter>", '{"name": "lookup", "arguments": {"city": "', '"}}', "{", "}", '"', "[", "'",
    "\\", "\n", "\n\n", " ", "\n", " ", "<", "\ufffd", "é", "漢", "😀",
]  # fmt: skip
WHOLE = [f"\n{CALL}", CALL, JSON, f"\n{XML}\n", f"\n{XML}\n</tool_call>", "\n</think>\n\n"]


@pytest.mark.parametrize("tools", everyday([[TOOL], []], 0), ids=["tools", "none"])
@pytest.mark.parametrize("thinking", everyday([True, False], 0))
def test_random_output_loses_and_doubles_no_text(tools: list[Any], thinking: bool) -> None:
    chance = random.Random(7)
    num_calls = num_talk = 0
    for seed in range(200):
        parts = chance.choices([*ATOMS, *WHOLE * 2], k=chance.randint(1, 25))
        text = "".join(f"{part}w{i:02}" if chance.random() < 0.6 else part
                       for i, part in enumerate(parts))  # fmt: skip
        tokenizer = FakeTokenizer()
        first, *others = (
            joined(pieces_of(tokenizer, tokens, tools=tools, thinking=thinking))
            for tokens in tokenizer.ways(text, seed, count=3)
        )
        assert all(other == first for other in others), text
        thought, answer, calls = first
        shown = WORD.findall(thought) + WORD.findall(answer)
        assert len(set(shown)) == len(shown)
        words = WORD.findall(text)
        assert [word for word in words if word in shown] == shown, text
        lost = set(words) - set(shown)
        if not calls:
            assert NO_TEXT.sub("", thought + answer) == NO_TEXT.sub("", text)
        for word, before in zip(words, ["", *words], strict=False):
            if word in lost and before not in lost:
                # It is in a call.
                between = text[text.find(before) : text.find(word)]
                assert "<tool_call>" in between or "<function=lookup>" in between, text
        num_calls += len(run_calls(calls))
        num_talk += CALL in thought
    assert (num_calls > 25) == bool(tools) and num_talk > 1


def test_a_thousand_tags_in_a_value_take_time_in_proportion() -> None:
    def seconds(count: int) -> float:
        tokenizer = FakeTokenizer()
        value = "</tool_call>" * count
        tokens = tokenizer.encode(CALL.replace("Oslo", value))
        started = time.process_time()
        (call,) = joined(pieces_of(tokenizer, tokens, tools=[TOOL]))[2]
        assert call.raw_arguments == {"city": value} and call.complete
        return time.process_time() - started

    # Quadratic, it were 64 times as long; a bound that noise does not reach.
    assert seconds(16_000) < 24 * max(seconds(2_000), 0.005)


@pytest.mark.parametrize(
    ("text", "markers", "size"),
    [("abc", ["cd"], 1), ("abc", ["bcd", "cx"], 2), ("aa", ["aaa"], 2), ("abc", ["abc"], 0),
     ("abc", [], 0), ("", ["a"], 0)],
)  # fmt: skip
def test_held_back(text: str, markers: list[str], size: int) -> None:
    assert held_back(text, markers) == size


def test_a_call_without_a_tag_may_name_any_of_several_tools() -> None:
    tools = [{"function": {"name": name, "parameters": {}}} for name in ("a.b", "c", "d")]
    for name in ("a.b", "c", "d"):
        call = f"Look:\n<function={name}>\n<parameter=n>\n1\n</parameter>\n</function>"
        assert [n for n, _ in run_calls(parse(call, tools=tools)[2])] == [name]
    # A dot is no pattern, and an unknown tool no call.
    for name in ("axb", "e"):
        assert parse(f"<function={name}>\n</function>", tools=tools)[2] == []
