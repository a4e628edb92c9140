"""Answers of a quantized model beside those of its reference."""

import json
import re

import pytest
from typer.testing import CliRunner

import qwen35_mlx
from qwen35_mlx.cli import main as cli
from qwen35_mlx.cli.fidelity_command import runnable
from qwen35_mlx.cli.local_models import SOURCE
from qwen35_mlx.convert.fidelity import Comparison
from qwen35_mlx.convert.mac_models import Mac
from qwen35_mlx.engine.tool_calls import ToolCall
from qwen35_mlx.evaluation import behaviour
from qwen35_mlx.evaluation.behaviour import Answer, Question, answers, figures, questions
from qwen35_mlx.files import locked
from qwen35_mlx.machine import Machine

PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
TIMER = behaviour._tool("set_timer", "Start a timer", {"minutes": {"type": "integer"}})
# One of each kind.
ASKED = [
    Question("Hi."),
    Question("What is 1 + 1?", thinks=True),
    Question("Set a timer.", tools=[TIMER]),
    Question("As JSON.", schema=PERSON),
]
CALL = ToolCall("set_timer", {"minutes": 5}, {})


def answered(text='{"name": "Anna", "age": 7}', calls=(CALL,), tokens=(), thought=10):
    answer = Answer(list(tokens), text, list(calls), thought)
    return [answer] * len(ASKED)


def test_the_same_seed_asks_the_same_of_every_kind():
    asked = questions(9)
    assert asked == questions(9) and asked != questions(9, seed=1)
    assert len(asked) == 36 == 4 * sum(q.thinks for q in asked)
    assert sum(bool(q.tools) for q in asked) == sum(q.schema is not None for q in asked) == 9
    assert not any("{" in q.text for q in asked if q.schema is None)
    # Every tool is wanted once, and offered where it is.
    for question in (q for q in asked if q.tools):
        assert 2 <= len({t["function"]["name"] for t in question.tools}) == len(question.tools)
    weather = next(q for q in asked if "weather" in q.text)
    assert "get_weather" in [t["function"]["name"] for t in weather.tools]


def test_same_tokens_end_at_the_first_difference():
    def shares(own):
        found = figures(ASKED, answered(tokens=range(10)), answered(tokens=own))
        return found["same_tokens"], found["identical_answers"]

    assert shares(range(10)) == (1, 1)
    assert shares([0, 1, 2, 9, 4, 5, 6, 7, 8, 9]) == (0.3, 0)
    # One that ends earlier, and one that goes on.
    assert shares(range(5)) == (0.5, 0)
    assert shares(range(40)) == (0.25, 0)
    assert figures(ASKED, answered(), answered())["same_tokens"] == 1
    # What comes after the compared tokens is not compared.
    long = list(range(behaviour.COMPARED_TOKENS))
    found = figures(ASKED, answered(tokens=[*long, 1]), answered(tokens=[*long, 2, 3]))
    assert found["identical_answers"] == 1


def test_thoughts_are_counted_where_they_are_wanted():
    reference, own = answered(thought=10), answered(thought=15)
    own[0] = Answer(thought_tokens=999)
    found = figures(ASKED, reference, own)
    assert (found["thought_tokens"], found["thought_ratio"], found["cut_thoughts"]) == (15, 1.5, 0)
    assert figures(ASKED, answered(thought=0), own)["thought_ratio"] is None
    endless = answered(thought=behaviour.MAX_THOUGHT_TOKENS)
    assert figures(ASKED, reference, endless)["cut_thoughts"] == 1


@pytest.mark.parametrize(
    ("calls", "valid"),
    [
        ([CALL], 1),
        ([CALL, CALL], 1),
        ([], 0),
        ([CALL._replace(complete=False)], 0),
        ([CALL._replace(name="get_time")], 0),
        ([CALL._replace(arguments={})], 0),
        ([CALL._replace(arguments={"minutes": "five"})], 0),
        ([CALL._replace(arguments={"minutes": True})], 0),
        ([CALL._replace(arguments={"minutes": 5, "hours": 1})], 0),
        ([CALL, CALL._replace(arguments={})], 0),
    ],
)
def test_a_tool_call_is_valid_if_its_tool_could_run(calls, valid):
    found = figures(ASKED, answered(), answered(calls=calls))
    assert (found["valid_tool_calls"], found["valid_json"]) == (valid, 1)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"name": "Anna", "age": 7}', 1),
        ('\n```json\n{"name": "Anna",\n "age": 7}\n```\n', 1),
        ('{"name": "Anna", "age": 7.5}', 0),
        ('{"name": "Anna"}', 0),
        ('{"name": "Anna", "age": 7, "city": "Oslo"}', 0),
        ('{"name": null, "age": 7}', 0),
        ('{"name": "Anna", "age": 7', 0),
        ('Here it is: {"name": "Anna", "age": 7}', 0),
        ("[]", 0),
        ("[" * 100_000, 0),
        ("", 0),
    ],
    ids=range(11),
)
def test_json_is_valid_if_a_program_could_read_it(text, valid):
    found = figures(ASKED, answered(), answered(text=text))
    assert (found["valid_json"], found["valid_tool_calls"]) == (valid, 1)


@pytest.mark.parametrize(
    ("value", "schema", "fits"),
    [
        (["a"], behaviour.TEXTS, True),
        (["a", 1], behaviour.TEXTS, False),
        ("a", behaviour.TEXTS, False),
        (3.5, behaviour.NUMBER, True),
        (True, behaviour.YES_OR_NO, True),
        (1, behaviour.YES_OR_NO, False),
        ("Monday", {"enum": behaviour.DAYS}, True),
        ("Mon", {"enum": behaviour.DAYS}, False),
        ([{"name": "a", "age": 1}], {"type": "array", "items": PERSON}, True),
        ([{"name": "a"}], {"type": "array", "items": PERSON}, False),
    ],
)
def test_values_are_of_their_schemas(value, schema, fits):
    assert behaviour._follows(value, schema) == fits


@pytest.mark.slow
def test_answers_are_the_greedy_ones_with_thoughts_and_calls_apart(demo):
    model, tokenizer = demo
    weather = behaviour._tool("get_weather", "Weather in a city", {"city": {"type": "string"}})
    asked = [
        Question("What is the capital of France?"),
        Question("What is 17 + 4?", thinks=True),
        Question("What is the weather in Oslo?", tools=[weather]),
    ]
    plain, thought, call = answers(model, tokenizer, asked)
    messages = [{"role": "user", "content": asked[0].text}]
    said = qwen35_mlx.generate(model, tokenizer, messages, temperature=0, enable_thinking=False)
    assert plain.text == said and plain.thought_tokens == 0
    assert tokenizer.decode([i for i in plain.tokens if i >= 0]).startswith(said)
    assert plain.tokens[-1] == -1
    assert thought.thought_tokens > 5 and "21" in thought.text and "<think>" not in thought.text
    assert [(c.name, c.arguments) for c in call.calls] == [("get_weather", {"city": "Oslo"})]


def test_the_table_of_answers_fits_a_terminal(monkeypatch):
    row = figures(ASKED, answered(thought=1234), answered(thought=1300, tokens=[1]))
    named = {"name": "Qwen3.5-122B-A10B-3.75bpw-gptq", **row}
    monkeypatch.setattr(Comparison, "rows", lambda self: [named])
    table = Comparison(["x"], [], Mac("M3 Ultra", 96, 819), tasks=[row, row])
    lines = table.task_lines()
    assert max(map(len, lines)) <= 88 and len(lines) == 4
    assert lines[2].split()[1:] == ["0.0%", "0.0%", "100.0%", "100.0%", "1,300", "1.05"]
    cut = row | {"cut_thoughts": 0.25, "thought_ratio": None}
    lines = Comparison(["x"], [], Mac("M3 Ultra", 96, 819), tasks=[cut, row]).task_lines()
    assert lines[1].split()[-1] == "-" and "25% of the thoughts" in lines[-1]


def test_an_original_that_does_not_fit_is_refused_with_its_bytes(monkeypatch):
    small = Machine("", "", 9_000_000, 5_000_000, 0, {})
    monkeypatch.setattr("qwen35_mlx.memory.describe", lambda: small)
    monkeypatch.setattr("qwen35_mlx.machine.describe", lambda: small)
    result = CliRunner().invoke(cli.app, ["fidelity", str(SOURCE), str(SOURCE), "--tasks"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "0.008 GB of weights" in result.stderr and "at most 0.005 GB" in result.stderr


def test_a_reference_of_a_killed_process_goes_and_one_in_use_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path))
    left, used = tmp_path / "reference-left", tmp_path / "reference-used"
    for folder in (left / "model", used / "model"):
        folder.mkdir(parents=True)
    with locked(used), runnable(SOURCE) as converted:
        assert not left.exists() and (converted / "config.json").exists()
    assert list(tmp_path.iterdir()) == [used]


@pytest.mark.slow
def test_fidelity_compares_the_answers_of_several_models(tmp_path, converted_demo, monkeypatch):
    asked = questions(2)
    monkeypatch.setattr(behaviour, "questions", lambda: asked)
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "cache"))
    png = tmp_path / "x.png"
    options = ["--tasks", "--tokens", "16", "--png", str(png)]
    folders = [str(SOURCE), str(converted_demo)]
    result = CliRunner().invoke(cli.app, ["fidelity", *folders, *options])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert 0.3 < found["same_tokens"] <= 1 and found["thought_tokens"] > 5
    own = found["reference_answers"]
    assert own["same_tokens"] == own["thought_ratio"] == 1
    assert re.search(r"\nSRC +100.0% +100.0% ", result.stdout)
    assert png.read_bytes().startswith(b"\x89PNG")
    # The copy of the original in bfloat16 is gone.
    assert list((tmp_path / "cache").iterdir()) == []
