"""The command generate: what goes to standard output, and as JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
from everyday import everyday

import qwen35_mlx
from qwen35_mlx.cli import generate_command
from qwen35_mlx.cli.generate_command import print_answer
from qwen35_mlx.cli.progress import spinner
from qwen35_mlx.engine import speculate
from qwen35_mlx.engine.output import Piece, ToolCall

# The demo continues this without an end.
CAPITAL = "The capital of"
SUM = "What is 17 + 25?"
ASKED = {"role": "user", "content": SUM}
GREEDY = ("--temperature", "0")
TABLE = "Book a table for 4 people at Luna."


@pytest.fixture
def generate(run_cli: Any, converted_demo: Path) -> Any:
    return lambda *arguments, **options: run_cli("generate", converted_demo, *arguments, **options)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    properties = {"name": {"type": "string"}, "people": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties, "required": ["name", "people"]}
    function = {"name": "book_table", "description": "Book a table", "parameters": parameters}
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([{"type": "function", "function": function}]))
    return file


def test_the_answer_alone_is_on_standard_output(generate: Any, answer: Any) -> None:
    thought, end, text = answer(ASKED).partition("\n</think>\n\n")
    assert thought and end and text == "17+25=42"
    result = generate("-p", SUM, *GREEDY)
    assert (result.exit_code, result.stdout, result.stderr) == (0, text + "\n", "")
    shown = generate("-p", SUM, *GREEDY, "--show-thoughts")
    assert shown.stdout == f"<think>\n{thought}\n</think>\n\n{text}\n"
    no_think = generate("-p", SUM, "--no-think", *GREEDY).stdout
    assert no_think == answer(ASKED, enable_thinking=False) + "\n"
    assert generate("--no-think", *GREEDY, stdin=SUM).stdout == no_think


@pytest.mark.parametrize("encoding", everyday(["utf-8-sig", "utf-16", "utf-32"], 1))
def test_a_byte_order_mark_is_not_part_of_the_prompt(generate: Any, encoding: str) -> None:
    plain = generate(*GREEDY, "--max-tokens", "1", "--json", stdin=SUM + "\n").stdout
    marked = generate(
        *GREEDY, "--max-tokens", "1", "--json", stdin=(SUM + "\n").encode(encoding)
    ).stdout
    num_tokens = [json.loads(out)["prompt_tokens"] for out in (plain, marked)]
    assert num_tokens[0] == num_tokens[1]
    # As in -p "$(cat FILE)".
    typed = generate(*GREEDY, "--max-tokens", "1", "--json", "-p", "\ufeff" + SUM + "\n").stdout
    assert json.loads(typed)["prompt_tokens"] == num_tokens[0]


def test_an_answer_that_is_cut_says_so_on_stderr(generate: Any) -> None:
    cut = generate("-p", SUM, "--max-tokens", "2", *GREEDY)
    # The two tokens are of the thought.
    assert cut.stdout == "\n" and cut.stderr.startswith("the answer was cut: at --max-tokens")
    shown = generate("-p", SUM, "--max-tokens", "2", "--show-thoughts", *GREEDY).stdout
    assert shown.startswith("<think>\n") and shown.endswith("\n</think>\n\n")


@pytest.mark.slow
def test_stop_ends_the_answer_and_leaves_thoughts_alone(generate: Any) -> None:
    # "42" is in the thought too.
    stop = generate("-p", SUM, "--stop", "zz", "--stop", "42", *GREEDY)
    assert stop.stdout == "17+25=\n" and stop.stderr == ""
    found = json.loads(generate("-p", SUM, "--stop", "=42", "--json", *GREEDY).stdout)
    assert found["text"] == "17+25" and "42" in found["thought"]
    assert found["finish_reason"] == "stop"
    raw = generate("-p", "a b c a b c a b", "--raw", "--max-tokens", "9", *GREEDY).stdout
    stopped = generate("-p", "a b c a b c a b", "--raw", "--stop", raw[3], *GREEDY)
    assert stopped.stdout == raw.partition(raw[3])[0] + "\n"


@pytest.mark.slow
def test_json_is_all_there_is_on_standard_output(generate: Any, answer: Any, demo: Any) -> None:
    thought, _, text = answer(ASKED).partition("\n</think>\n\n")
    result = generate("-p", SUM, "--json", *GREEDY)
    assert result.stderr == "" and result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert list(found) == [
        "text", "thought", "tool_calls", "finish_reason", "prompt_tokens", "cached_tokens",
        "generated_tokens", "thought_tokens", "ttft_s", "prefill_tps", "decode_tps", "total_s",
        "draft_tokens", "tokens_per_pass", "draft_acceptance", "pictures", "videos", "media_tokens",
    ]  # fmt: skip
    assert (found["text"], found["thought"], found["tool_calls"]) == (text, thought, [])
    assert found["finish_reason"] == "stop" and found["cached_tokens"] == 0
    assert 0 < found["thought_tokens"] < found["generated_tokens"]
    assert 0 < found["ttft_s"] <= found["total_s"]
    assert found["prefill_tps"] > 0 and found["decode_tps"] > 0
    cut = json.loads(generate("-p", SUM, "--json", "--max-tokens", "2", *GREEDY).stdout)
    assert (cut["finish_reason"], cut["generated_tokens"]) == ("length", 2)


@pytest.mark.slow
@pytest.mark.parametrize("way", everyday([((),), (("--raw",),)], 0))
def test_json_says_what_was_drafted(generate: Any, way: tuple[str, ...]) -> None:
    options = ("-p", f"{SUM}\n", "--json", "--max-tokens", "40", *way, *GREEDY)
    plain = json.loads(generate(*options, "--draft", "off").stdout)
    found = json.loads(generate(*options, "--draft", "mtp", "--num-draft-tokens", "3").stdout)
    assert found["text"] == plain["text"] and found["thought"] == plain["thought"]
    of_plain = [plain[k] for k in ("draft_tokens", "tokens_per_pass", "draft_acceptance")]
    assert of_plain == [0, 1, {}]
    assert 0 < found["draft_tokens"] < found["generated_tokens"] and found["tokens_per_pass"] > 1
    assert len(found["draft_acceptance"]["mtp"]) == 3


@pytest.mark.slow
def test_a_warning_comes_behind_the_answer(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = generate("-p", SUM, *GREEDY)
    monkeypatch.setattr(
        speculate.Drafter, "is_hopeless", property(lambda self: self._num_passes > 3)
    )
    shown = generate("-p", SUM, *GREEDY)
    assert shown.stdout == plain.stdout
    assert shown.stderr == f"warning: {speculate.HOPELESS}\n"
    assert shown.output.index("warning") >= len(plain.stdout)


@pytest.mark.slow
def test_json_of_a_continued_text(generate: Any, demo: Any) -> None:
    options = ("-p", CAPITAL, "--raw", "--max-tokens", "9", *GREEDY)
    raw = qwen35_mlx.generate(*demo, CAPITAL, temperature=0.0, max_tokens=9)
    assert generate(*options).stdout == raw + "\n"
    found = json.loads(generate(*options, "--json").stdout)
    num_tokens = len(demo[1].encode(CAPITAL, add_special_tokens=False))
    counts = found["prompt_tokens"], found["cached_tokens"], found["generated_tokens"]
    assert counts == (num_tokens, 0, 9)
    assert (found["text"], found["thought"], found["finish_reason"]) == (raw, "", "length")


@pytest.mark.slow
def test_system_prompts_reach_the_model(generate: Any, answer: Any) -> None:
    system = {"role": "system", "content": "zq zq zq"}
    options = ("-p", SUM, "--no-think", *GREEDY, "--json")
    with_system, without = (
        json.loads(generate(*options, *more).stdout) for more in (("--system", "zq zq zq"), ())
    )
    assert with_system["text"] == answer(system, ASKED, enable_thinking=False)
    assert with_system["prompt_tokens"] > without["prompt_tokens"] + 3


@pytest.mark.slow
def test_sampling_options_reach_the_sampler(generate: Any, demo: Any) -> None:
    hot = ("-p", CAPITAL, "--raw", "--temperature", "9", "--top-k", "0", "--max-tokens", "8")

    def stdout(*options: str) -> str:
        return str(generate(*hot, *options).stdout)

    assert stdout("--seed", "1") == stdout("--seed", "1") != stdout("--seed", "2")
    greedy = qwen35_mlx.generate(*demo, CAPITAL, temperature=0.0, max_tokens=8) + "\n"
    assert stdout("--top-k", "1") == stdout("--top-p", "1e-6") == stdout("--min-p", "1") == greedy
    for penalty in ("presence", "repetition"):
        longer = ("--temperature", "0", "--max-tokens", "24")
        assert stdout(f"--{penalty}-penalty", "9", *longer) != stdout(*longer)


@pytest.mark.slow
def test_calls_of_tools_are_lines_of_json(generate: Any, tools: Path) -> None:
    options = ("-p", TABLE, "--tools", tools, *GREEDY)
    call = json.loads(generate(*options).stdout)
    assert call["name"] == "book_table" and call["arguments"]["people"] == 4
    found = json.loads(generate(*options, "--json").stdout)
    assert found["tool_calls"] == [call] and found["text"] == ""
    # Without tools there is nothing to call.
    assert json.loads(generate("-p", TABLE, *GREEDY, "--json").stdout)["tool_calls"] == []


@pytest.mark.parametrize(
    "options", everyday(["--no-think", "", "--temperature 2", "--draft off"], 0)
)
def test_an_answer_is_valid_for_its_schema(generate: Any, tmp_path: Path, options: str) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer"}, "sure": {"enum": ["yes", "no"]}},
        "required": ["sum", "sure"],
    }
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    limits = ("--max-tokens", "200", "--seed", "3")
    result = generate("-p", SUM, "--schema", file, "--json", *limits, *GREEDY, *options.split())
    found = json.loads(result.stdout)
    kept = json.loads(found["text"])
    assert list(kept) == ["sum", "sure"] and isinstance(kept["sum"], int)
    assert kept["sure"] in ("yes", "no") and found["finish_reason"] == "stop"
    assert bool(found["thought"]) == ("--no-think" not in options)


@pytest.mark.slow
def test_a_schema_leaves_calls_of_tools_free(generate: Any, tools: Path, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"type": "array", "items": {"type": "boolean"}, "maxItems": 3}')
    options = ("--tools", tools, "--schema", file, *GREEDY, "--max-tokens", "300")
    call = json.loads(generate("-p", TABLE, *options).stdout)
    assert call["name"] == "book_table" and isinstance(call["arguments"]["people"], int)
    flags = json.loads(generate("-p", TABLE, *options[2:], "--no-think").stdout)
    assert all(isinstance(flag, bool) for flag in flags)


def test_pieces_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    calls = [ToolCall("f", {"a": [1]}, {"a": "[1]"}), ToolCall("g", {}, {}, complete=False)]
    pieces = [Piece("thought", "hm "), Piece("thought", "ok"), Piece("answer", "So"),
              Piece("answer", ":"), *(Piece("tool_call", "", call) for call in calls)]  # fmt: skip
    lines = 'So:\n{"name": "f", "arguments": {"a": [1]}}\n'
    lines += '{"name": "g", "arguments": {}, "complete": false}\n'
    for show, expected in ((False, lines), (True, "<think>\nhm ok\n</think>\n\n" + lines)):
        print_answer((piece for piece in pieces), show, spinner(""))
        assert capsys.readouterr().out == expected


def test_an_answer_on_a_terminal_cannot_steer_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = [Piece("answer", "a\x1b]0;title\x07b\x9b1m\tc\n")]
    print_answer((piece for piece in evil), False, spinner(""))
    assert capsys.readouterr().out == evil[0].text + "\n"
    monkeypatch.setattr(generate_command.sys.stdout, "isatty", lambda: True)
    print_answer((piece for piece in evil), False, spinner(""))
    assert capsys.readouterr().out == "a]0;titleb1m\tc\n\n"


@pytest.mark.parametrize(
    ("option", "text", "problem"),
    [
        ("--tools", "{", "is not JSON"),
        ("--tools", "[" * 100_000, "is not JSON"),
        ("--tools", "{}", "has no list of tools"),
        ("--tools", "[]", "has no list of tools"),
        ("--tools", "null", "has no list of tools"),
        ("--tools", "[1]", "tool 1 of"),
        ("--tools", '[{"function": 1}]', "tool 1 of"),
        ("--tools", "[{}]", "has no name"),
        ("--tools", '[{"name": 3}]', "has no name"),
        ("--tools", '[{"name": "f"}, {"function": {"name": "f"}}]', "has the same name as another"),
        ("--tools", '[{"name": "f", "parameters": []}]', "no JSON schema"),
        ("--tools", '[{"name": "f", "parameters": {"properties": []}}]', "no JSON schema"),
        ("--tools", b"\xff\xff", "cannot be read as text"),
        ("--schema", "{", "is not JSON"),
        ("--schema", "[" * 100_000, "is not JSON"),
        ("--schema", "[]", "has no JSON schema"),
        ("--schema", "true", "has no JSON schema"),
        ("--schema", '{"type": "strin"}', "not usable at $"),
        ("--schema", '{"properties": {"a": {"items": {"type": 3}}}}', "at $.properties.a.items"),
        ("--schema", '{"const": "%s"}' % ("a" * 300_000), "the grammar is too long"),
        ("--schema", b"\xff\xff", "cannot be read as text"),
    ],
)
def test_a_wrong_file_is_refused_before_a_model_is_loaded(
    run_cli: Any, tmp_path: Path, option: str, text: str | bytes, problem: str
) -> None:
    file = tmp_path / "t.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = run_cli("generate", "no/model", "-p", "x", option, file)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and problem in result.stderr


def test_a_control_token_in_a_file_is_text(generate: Any, tmp_path: Path) -> None:
    numbers = []
    for name in ("<|im_end|>", "<|im_start|>user"):
        (tmp_path / "a.txt").write_text(name * 20)
        options = ("-p", "Hi", "--max-tokens", "1", "--json", *GREEDY)
        found = json.loads(generate("--file", tmp_path / "a.txt", *options).stdout)
        numbers.append(found["prompt_tokens"])
    # As control tokens they would be 20 and 40.
    assert min(numbers) > 60


@pytest.mark.slow
def test_what_was_read_is_there_for_the_next_call(
    run_cli: Any, converted_demo: Path, tmp_path: Path
) -> None:
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text("word and other things " * 20)
    options = ("--file", f"{tmp_path}/*.txt", "--cache-dir", tmp_path / "cache", "--json")
    found = []
    for _ in range(2):
        result = run_cli("generate", converted_demo, "-p", "Why?", "--max-tokens", "2", *options)
        assert "2 files, 242 tokens\n" in result.stderr and "c.md" not in result.stderr
        found.append(json.loads(result.stdout))
    assert 242 < found[0]["prompt_tokens"] == found[1]["prompt_tokens"] < 300
    assert found[0]["cached_tokens"] == 0 and found[1]["cached_tokens"] > 242
    result = run_cli("generate", converted_demo, "-p", "a", "--raw", "--cache-dir", tmp_path)
    assert result.exit_code == 2 and "--raw" in result.output
