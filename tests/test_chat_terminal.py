"""The conversation as a person has it: on a real terminal, and in a pipe."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from screen import CLI, Screen

from qwen35_mlx.cli.local_models import SOURCE

pytestmark = pytest.mark.slow
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
FRANCE, WHO, HOT = "What is the capital of France?", "Who are you?", "What is the opposite of hot?"
PROMPT = r"\n>$"
FIGURES = r"peak memory \d+ MB"
DONE = FIGURES + r"[^>]*\n\n>$"
# Hot enough never to end by itself.
HOT_OPTIONS = ("--temperature", "99", "--top-k", "0", "--top-p", "1", "--seed", "1")
# A model that says what it is told, in a context of the length that follows.
SCRIPTED = """
import sys
sys.path.insert(0, {tests!r})
from conftest import ScriptedModel
import qwen35_mlx.model.loading as weights
load = weights.load
def scripted(name, **options):
    tokenizer = load(name)[1]
    text = {text!r}
    ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    model = ScriptedModel(ids, context_length={context})
    trunk = model.trunk
    def from_the_start(ids, *rest, **options):
        if ids.shape[1] > 1:
            model.num_steps = 0
        return trunk(ids, *rest, **options)
    model.trunk = from_the_start
    model.parameters = dict
    return model, tokenizer
weights.load = scripted
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN35_MLX_SESSIONS", str(tmp_path / "sessions"))
    return tmp_path / "sessions"


@pytest.fixture
def screen() -> Iterator[Callable[..., Screen]]:
    """Opens screens, and closes them whatever happens."""
    with ExitStack() as stack:

        def start(*arguments: object, **options: str) -> Screen:
            return stack.enter_context(closing(Screen(*arguments, **options)))

        yield start


def scripted(text: str, context: int = 4096) -> str:
    code = SCRIPTED.format(tests=str(Path(__file__).parent), text=text, context=context)
    return f"exec({code!r});{CLI}"


def messages(home: Path, name: str = "s") -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads((home / f"{name}.json").read_text())["messages"]
    return found


def test_a_conversation_on_a_terminal(screen: Any, converted_demo: Path) -> None:
    shell = screen("chat", converted_demo, "--temperature", "0", "--preset", "checkpoint")
    assert "Ctrl-C stops an answer" in shell.wait_for(PROMPT)
    shell.type(FRANCE + "\r")
    first = shell.wait_for(DONE)
    assert "Paris" in first and "</think>" not in first and "(thought)" not in first
    # The thought is dim, the answer is not.
    assert re.search(r"\x1b\[2;3m[^\x1b]*\w", shell.written)
    assert not re.search(r"\x1b\[2;3m[^\x1b]*Paris", shell.written)
    shell.type("\x03")
    shell.wait_for(r"stops an answer and keeps it\n\n>$")
    shell.type("/help\r")
    assert "/undo" in shell.wait_for(r"a new line\n\n>$")
    shell.type(WHO + "\r")
    figures = shell.wait_for(DONE)
    read, length = map(int, re.findall(r"prompt (\d+) of (\d+)", figures)[-1])
    assert read < length
    shell.type("/nothing\r")
    shell.wait_for(r"error: no command /nothing\n  hint: /help lists them[^>]*\n\n>$")
    shell.type("\x04")
    assert shell.exit_code() == 0
    assert "Traceback" not in shell.written


def test_several_lines_are_one_message(screen: Any, converted_demo: Path, home: Path) -> None:
    shell = screen("chat", converted_demo, "--session", "s", "--max-tokens", "3")
    shell.wait_for(PROMPT)
    # Ctrl-J, Alt-Enter, a backslash, and a paste.
    shell.type("one\ntwo\x1b\rthree\\\rfour\x1b[200~\nfive\nsix\x1b[201~")
    shell.wait_for(r"> one\n  two\n  three\n  four\n  five\n  six$")
    shell.type("\r")
    shell.wait_for(DONE)
    assert messages(home)[0]["content"] == "one\ntwo\nthree\nfour\nfive\nsix"
    # Back in the history as it was, and editable.
    shell.type("\x1b[A")
    shell.wait_for(r"> one\n  two\n  three\n  four\n  five\n  six$")
    shell.type(" seven\r")
    shell.wait_for(DONE)
    assert messages(home)[2]["content"].endswith("five\nsix seven")


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    screen: Any, converted_demo: Path, home: Path
) -> None:
    shell = screen("chat", converted_demo, "--session", "s", *HOT_OPTIONS)
    shell.wait_for(PROMPT)
    for turn in range(2):
        shell.type(FRANCE + "\r")
        shell.wait_for(r"France\?\n\s*\S+")
        shell.type("\x03")
        shell.wait_for(r"stopped\n\n>$")
        said = messages(home)
        assert len(said) == 2 * turn + 2
        assert said[-1]["role"] == "assistant"
        assert said[-1]["content"] or said[-1]["reasoning_content"]
    shell.type("/exit\r")
    assert shell.exit_code() == 0
    assert "Traceback" not in shell.written


def test_what_is_typed_during_an_answer_is_the_next_message(
    screen: Any, converted_demo: Path
) -> None:
    shell = screen("chat", converted_demo, "--no-think", code=scripted("word " * 400))
    shell.wait_for(PROMPT)
    shell.type("one\r")
    shell.wait_for("word word")
    shell.type("two\r")
    answers = shell.wait_for(r"\n> two\n(word|\s)+prompt [^>]*\n\n>$")
    assert "two" not in answers.partition("\n> two\n")[0]


def test_what_is_typed_while_the_model_loads_is_the_first_message(
    screen: Any, converted_demo: Path
) -> None:
    slowly = (
        "import time, qwen35_mlx.model.loading as w; load = w.load\n"
        "w.load = lambda *a, **k: (time.sleep(2), load(*a, **k))[1]\n"
    )
    shell = screen("chat", converted_demo, "--temperature", "0", code=f"exec({slowly!r});{CLI}")
    shell.wait_for("Loading")
    shell.type(FRANCE + "\r")
    assert "Paris" in shell.wait_for(DONE)


def test_undo_retry_and_edit(screen: Any, converted_demo: Path, home: Path) -> None:
    shell = screen(
        "chat", converted_demo, "--session", "s", "--temperature", "0", "--preset", "checkpoint"
    )
    shell.wait_for(PROMPT)
    for question in (FRANCE, HOT):
        shell.type(question + "\r")
        shell.wait_for(DONE)
    before = messages(home)
    shell.type("/retry\r")
    shell.wait_for(DONE)
    assert messages(home) == before
    shell.type("/undo\r")
    shell.wait_for(r"taken back: What is the opposite of hot\?\n\n>$")
    assert messages(home) == before[:2]
    # The last message comes back to be changed.
    shell.type("/ed")
    shell.wait_for(r"> /ed\n +/edit", stay=True)
    shell.type("\t")
    shell.wait_for("> /edit")
    shell.type("\r")
    shell.wait_for(r"> What is the capital of France\?$")
    shell.type("\x08" * 7 + "Italy?\r")
    assert "Rome" in shell.wait_for(DONE)
    assert [m["content"] for m in messages(home) if m["role"] == "user"] == [
        "What is the capital of Italy?"
    ]
    shell.type("/edit " + FRANCE + "\r")
    assert "Paris" in shell.wait_for(DONE)
    assert messages(home) == before[:2]


def test_commands_that_change_and_show(
    screen: Any, converted_demo: Path, home: Path, tmp_path: Path
) -> None:
    shell = screen("chat", converted_demo, "--temperature", "0", "--preset", "checkpoint")
    shell.wait_for(PROMPT)

    def do(line: str, pattern: str) -> str:
        shell.type(line + "\r")
        return str(shell.wait_for(pattern + r"[^>]*\n\n>$"))

    do("/set temperature 0.6", "temperature 0.6, top_p 0.95")
    do("/set temperature -1", "error: temperature is not usable")
    do("/set temperature hot", "error: not a number")
    do("/set", "error: no such setting")
    do("/set max_tokens -3", "error: not a number")
    do("/set seed -1", "error: not a number")
    do("/set max_tokens", "temperature 0.6")
    do("/think budget -1", "error: not a number")
    do("/set preset coding", "preset coding: temperature 0.6")
    do("/set preset nice", "error: unknown preset")
    do("/set temperature 0", "temperature 0,")
    do("/think off", "")
    do(FRANCE, FIGURES)
    do("/stats", "does not think · preset coding")
    do("/think hide", "")
    hidden = do(FRANCE, FIGURES)
    assert re.search(r"thought: \d+ tokens, \d", hidden) and "The user asks" not in hidden
    do("/think budget 3", "")
    do("/think on", "")
    assert re.search(r"The user asks\n*\n\n?\S", do(FRANCE, FIGURES))
    do("/stats", r"thinks, at most 3\s+tokens[^>]*context: \d+ of 4,096 tokens")
    do("/system Answer briefly.", "system prompt: Answer briefly.")
    file = tmp_path / "a b.txt"
    file.write_text("three ```` ticks\n")
    do(f"/file {file}", r"a b.txt, \d+ tokens, goes with the next message")
    do(f"/file {tmp_path}/none", "error: no file .*none")
    do("/save notes", r"saved: .*")
    do("What is that?", FIGURES)
    saved = messages(home, "notes")
    assert saved[0] == {"role": "system", "content": "Answer briefly."}
    fence = "`" * 5
    expected = f"a b.txt:\n{fence}\nthree ```` ticks\n{fence}\n\nWhat is that?"
    assert saved[-2]["content"] == expected
    do("/clear", "session notes keeps the conversation")
    do("/save other", "saved: ")
    assert messages(home, "notes") == saved and messages(home, "other") == saved[:1]
    do("/load none", "error: no session none")
    do("/load notes", r"session notes: \d turns?,")
    do("/load", "of: (notes, other|other, notes)")
    shell.type("/quit\r")
    assert shell.exit_code() == 0
    assert "Traceback" not in shell.written


def test_a_session_is_taken_up_where_it_was_left(
    screen: Any, converted_demo: Path, home: Path
) -> None:
    options = ("chat", converted_demo, "--session", "s", "--temperature", "0", "--no-think")
    shell = screen(*options)
    shell.wait_for(PROMPT)
    shell.type(FRANCE + "\r")
    shell.wait_for(DONE)
    other = screen(*options)
    assert "open in another chat" in other.wait_for("error: ")
    assert other.exit_code() == 1
    shell.type("\x04")
    assert shell.exit_code() == 0
    shell = screen(*options)
    shell.wait_for(
        r"session s: 1 turn, goes on after: What is the capital of France\?\n[^>]*\n\n>$"
    )
    shell.type(WHO + "\r")
    figures = shell.wait_for(DONE)
    read, length = map(int, re.findall(r"prompt (\d+) of (\d+)", figures)[-1])
    assert read < length - 15


def test_a_resized_window(screen: Any, converted_demo: Path) -> None:
    text = "word " * 30 + "\n\n- " + "item " * 30 + "end"
    shell = screen("chat", converted_demo, "--no-think", code=scripted(text))
    shell.wait_for(PROMPT)
    shell.type("x" * 120)
    shell.wait_for(r"> x{98}\n *x{22}$")
    shell.resize(20, 50)
    shell.wait_for(r"x{48}\n *x{24}$")
    shell.type("\r")
    answer = shell.wait_for("end\nprompt [^>]*\n\n>$")
    assert all(len(line) <= 50 for line in answer.split("\n"))
    assert answer.count("word") == 30 and answer.count("item") == 30
    shell.resize(30, 120)
    shell.type("y\r")
    answer = shell.wait_for("end\nprompt [^>]*\n\n>$")
    assert answer.count("word") == 30 and max(map(len, answer.split("\n"))) > 100
    assert "Traceback" not in shell.written


def test_wide_characters_and_emoji_split_over_tokens(screen: Any, converted_demo: Path) -> None:
    text = "漢字 and 😀😀 or é.\n\n- 한국어\n- 👍 ok\n\n`漢` done"
    shell = screen("chat", converted_demo, "--no-think", code=scripted(text))
    shell.wait_for(PROMPT)
    shell.type("漢字😀\x08\x08字?\r")
    answer = shell.wait_for("done\nprompt ")
    assert "> 漢字?" in answer
    assert "漢字 and 😀😀 or é." in answer and "• 한국어" in answer and "• 👍 ok" in answer
    assert "\ufffd" not in shell.written


def test_a_full_context_is_said_before_and_leaves_a_choice(
    screen: Any, converted_demo: Path
) -> None:
    shell = screen("chat", converted_demo, "--no-think", code=scripted("So it is.", 120))
    shell.wait_for(PROMPT)
    for _ in range(12):
        shell.type("one two three four\r")
        text = shell.wait_for(r"\n>$|change the message\? $|change the message\?$")
        if "change the message" in text:
            break
    assert "longer than the model's context" in text
    # Said a turn earlier, with what to do about it.
    assert re.search(r"context \d+ % full, \d+ tokens left: /trim drops", "\n".join(shell.lines()))
    shell.type("k\r")
    shell.wait_for(r"> one two three four$")
    shell.type("\r")
    shell.wait_for(r"change the message\?")
    shell.type("o\r")
    assert "So it is." in shell.wait_for(r"[1-9] turns? dropped\n[^>]*\n\n>$")
    shell.type("many words " * 60 + "\r")
    shell.wait_for(r"change the message\?")
    shell.type("s\r")
    shell.wait_for(r"error: the prompt is longer[^>]*\n>$")
    assert "Traceback" not in shell.written


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_readable_without_colour(
    screen: Any, converted_demo: Path, environment: dict[str, str]
) -> None:
    shell = screen("chat", converted_demo, "-p", FRANCE, "--temperature", "0", **environment)
    text = shell.wait_for(r"peak\s+memory")
    assert text.index("(thought) ") < text.index("Paris")
    assert shell.exit_code() == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", shell.written)


def test_a_dumb_terminal_has_plain_lines(screen: Any, converted_demo: Path) -> None:
    shell = screen("chat", converted_demo, "--no-think", TERM="dumb", code=scripted("**so** it is"))
    shell.wait_for(PROMPT)
    shell.type("x\n")
    shell.wait_for(r"\*\*so\*\* it is\n")
    assert not ESCAPES.search(shell.written)


@pytest.mark.slow
def test_a_pipe_gets_the_text_alone(converted_demo: Path) -> None:
    code = scripted("# T\n\n**so** it is 😀\n")
    command = [sys.executable, "-c", code, "chat", str(converted_demo), "--no-think"]
    hidden = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    done = subprocess.run(command, input="x?", capture_output=True, text=True, env=hidden)
    assert done.stdout == "# T\n\n**so** it is 😀\n\n" and done.returncode == 0
    assert "tokens read" in done.stderr and not ESCAPES.search(done.stdout + done.stderr)


def test_ctrl_c_while_one_question_is_answered_exits_130(screen: Any, converted_demo: Path) -> None:
    shell = screen("chat", converted_demo, "-p", FRANCE, "-p", FRANCE, *HOT_OPTIONS)
    shell.wait_for(r"France\?\n\s*\S+")
    shell.type("\x03")
    assert shell.exit_code() == 130


def test_a_screenshot_is_completed_dropped_and_seen(
    screen: Any, converted_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "Screenshot at 9.41\u202fAM.png"
    (tmp_path / name).write_bytes((SOURCE / "picture.png").read_bytes())
    shell = screen("chat", converted_demo, "--temperature", "0", "--no-think")
    shell.wait_for(PROMPT)
    shell.type("/image Scr")
    shell.wait_for("AM.png", stay=True)
    shell.type("\t")
    shell.wait_for(r"Screenshot\\ at", stay=True)
    shell.type("\r")
    assert "picture 1: Screenshot at 9.41" in shell.wait_for(r"9 tokens\n\n>$")
    shell.type("What do you see?\r")
    assert "A red star." in shell.wait_for(DONE)
    # As a program between the screen and the terminal hands it over.
    dropped = str(tmp_path / name).replace("\u202f", " ").replace(" ", "\\ ")
    shell.type(f"What is in {dropped} ?\r")
    again = shell.wait_for(DONE)
    assert "picture 1: Screenshot at 9.41" in again and "A red star." in again
