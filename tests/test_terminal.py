"""What a person sees: a real terminal for the chat, consoles of several kinds for the rest."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import write_checkpoint
from rich.console import Console

from qwen35_mlx import terminal
from qwen35_mlx.chat import TurnStats
from qwen35_mlx.convert import plan
from qwen35_mlx.convert.plan import PlanRow
from qwen35_mlx.errors import PromptError, Qwen35Error
from qwen35_mlx.prompt import Piece

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
FRANCE = "What is the capital of France?"
# The child must own the terminal for Ctrl-C to reach it.
COMMAND = (
    "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "from qwen35_mlx.cli import main; main()"
)


class Screen:
    """`qwen35-mlx` in a terminal of 80 columns; `shown` is all it wrote."""

    def __init__(self, *arguments: object, **environment: str):
        self.shown, self._from = "", 0
        self._fd, child = pty.openpty()
        termios.tcsetwinsize(child, (24, 80))
        hidden = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "INPUTRC")
        inherited = {k: v for k, v in os.environ.items() if k not in hidden}
        self.job = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *map(str, arguments)],
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            env=inherited | {"TERM": "xterm-256color", "INPUTRC": os.devnull} | environment,
        )
        os.close(child)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str, again: str = "") -> str:
        """What was shown since the last call, without escapes, once `pattern` is in it.

        Types `again` now, and every second until the pattern is there.
        """
        typed, limit = 0.0, time.monotonic() + 60
        while True:
            if again and time.monotonic() - typed > 1:
                typed = time.monotonic()
                self.type(again)
            text = ESCAPES.sub("", self.shown[self._from :]).replace("\r", "")
            if re.search(pattern, text):
                self._from = len(self.shown)
                return text
            assert time.monotonic() < limit, f"no {pattern!r} in {text!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                self.shown += os.read(self._fd, 65536).decode(errors="replace")

    def exit_code(self) -> int:
        return self.job.wait(timeout=60)

    def close(self) -> None:
        self.job.kill()
        self.job.wait()
        os.close(self._fd)


@pytest.fixture
def screen() -> Iterator[Callable[..., Screen]]:
    """Opens screens, and closes them whatever happens."""
    with ExitStack() as stack:

        def start(*arguments: object, **environment: str) -> Screen:
            return stack.enter_context(closing(Screen(*arguments, **environment)))

        yield start


def test_a_conversation_on_a_terminal(screen: Any, converted_demo: Path) -> None:
    shell = screen("chat", converted_demo, "--temperature", "0")
    assert "Ctrl-C stops an answer" in shell.wait_for(r"> $")
    shell.type(FRANCE + "\n")
    first = shell.wait_for(r"peak memory \d+ MB\s+> $")
    assert "Paris" in first and "</think>" not in first and "(thought)" not in first
    # The thought is dim, the answer is not.
    assert re.search(r"\x1b\[2;3m[^\x1b]*\w", shell.shown)
    assert not re.search(r"\x1b\[2;3m[^\x1b]*Paris", shell.shown)
    # input() loses an interrupt in the instant in which it begins to wait.
    shell.wait_for(r"keeps what was said\s+> $", again="\x03")
    shell.type("/help\n")
    shell.wait_for(r"keeps what was said\s+> $")
    shell.type("Who are you?\n")
    figures = shell.wait_for(r"prompt (\d+) of (\d+) tokens read[^>]*> $")
    read, length = map(int, re.findall(r"prompt (\d+) of (\d+)", figures)[-1])
    assert read < length
    shell.type("\x04")
    assert shell.exit_code() == 0
    assert "Traceback" not in shell.shown


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(screen: Any, converted_demo: Path) -> None:
    # Hot enough never to end by itself.
    hot = ("--temperature", "99", "--top-k", "0", "--top-p", "1", "--seed", "1")
    shell = screen("chat", converted_demo, *hot)
    shell.wait_for(r"> $")
    for _ in range(2):
        shell.type(FRANCE + "\n")
        shell.wait_for(r"France\?\n\s*\S+")
        shell.type("\x03")
        shell.wait_for(r"stopped\s+> $")
    shell.type("/exit\n")
    assert shell.exit_code() == 0
    assert "Traceback" not in shell.shown


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_thoughts_are_told_apart_without_colour(
    screen: Any, converted_demo: Path, environment: dict[str, str]
) -> None:
    shell = screen("chat", converted_demo, "-p", FRANCE, "--temperature", "0", **environment)
    text = shell.wait_for(r"peak memory")
    assert text.index("(thought) ") < text.index("Paris")
    assert shell.exit_code() == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", shell.shown)


def test_ctrl_c_while_one_question_is_answered_exits_130(screen: Any, converted_demo: Path) -> None:
    shell = screen("chat", converted_demo, "-p", FRANCE, "-p", FRANCE, "--temperature", "99",
                    "--top-k", "0", "--top-p", "1")  # fmt: skip
    shell.wait_for(r"France\?\n\s*\S+")
    shell.type("\x03")
    assert shell.exit_code() == 130


@pytest.fixture
def consoles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[io.StringIO, io.StringIO]]:
    """Replace both consoles by ones that write to memory."""
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    def replace(**options: Any) -> tuple[io.StringIO, io.StringIO]:
        files = io.StringIO(), io.StringIO()
        for name, file in zip(("out", "err"), files, strict=True):
            own: Console = getattr(terminal, name)
            console = Console(
                file=file, highlight=False, soft_wrap=True, emoji=own._emoji, **options
            )
            monkeypatch.setattr(terminal, name, console)
        return files

    return replace


class FakeChat:
    """Yields pieces as a model would say them."""

    def __init__(self, *pieces: Piece, error: Exception | None = None):
        self.pieces, self.error = pieces, error
        self.stats = TurnStats(40, 12, 100.0, 7, 50.0, 12.3456, "length")
        self.asked: list[str] = []

    def send(self, text: str) -> Iterator[Piece]:
        self.asked.append(text)
        yield from self.pieces
        if self.error:
            raise self.error


def talk(chat: FakeChat, prompts: Sequence[str]) -> None:
    terminal.ChatSession(chat).run(prompts)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 7, 99])
def test_answers_are_shown_as_they_are(consoles: Any, size: int) -> None:
    text = "[bold]no[/] :smile: [x] \\[y]\n\n\tindented\n  trailing  \n"
    pieces = [Piece("answer", text[i : i + size]) for i in range(0, len(text), size)]
    out, err = consoles()
    talk(FakeChat(*pieces), ["[red]?[/]"])
    assert out.getvalue().expandtabs() == text.expandtabs() + "\n"
    assert "prompt 12 of 40 tokens read, 100 tok/s · answer 7 tokens, 50.0 tok/s" in err.getvalue()
    assert "peak memory 12.35 GB" in err.getvalue()
    assert "cut at the token limit" in err.getvalue()


def test_an_answer_cannot_steer_the_terminal(consoles: Any) -> None:
    out, _ = consoles(force_terminal=True, color_system="truecolor")
    evil = "a\x1b]0;title\x07b\x1b[2Jc\x9b1md\re\x08f"
    talk(FakeChat(Piece("thought", evil), Piece("answer", evil)), ["?"])
    shown = ESCAPES.sub("", out.getvalue())
    assert shown == "a]0;titleb[2Jc1mdef\n\na]0;titleb[2Jc1mdef\n"


def test_paragraphs_of_a_thought_stay_apart(consoles: Any) -> None:
    out, _ = consoles()
    thought = [Piece("thought", t) for t in ("one", "\n\n", "two")]
    talk(FakeChat(*thought, Piece("answer", "Blue.")), ["?"])
    assert out.getvalue() == "(thought) one\n\ntwo\n\nBlue.\n"


def test_a_refused_prompt_does_not_end_the_chat(
    consoles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err = consoles()
    lines: Iterator[Any] = iter(
        ["  first ", "", UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad"), "second", EOFError()]
    )

    def read(prompt: str) -> str:
        assert prompt == "> "
        line = next(lines)
        if isinstance(line, Exception):
            raise line
        return str(line)

    monkeypatch.setattr("builtins.input", read)
    chat = FakeChat(error=PromptError("the prompt is too long", hint="shorten it"))
    talk(chat, [])
    assert chat.asked == ["first", "second"]
    assert err.getvalue().count("error: the prompt is too long\n  hint: shorten it") == 2
    assert "can't decode" in err.getvalue()


def test_one_question_that_is_refused_is_an_error(consoles: Any) -> None:
    consoles()
    with pytest.raises(PromptError):
        talk(FakeChat(error=PromptError("no")), ["?"])


def test_errors_show_brackets_and_colons(consoles: Any) -> None:
    _, err = consoles(width=30)
    long = "[4bit] :x: " + "path/" * 20
    terminal.print_error(Qwen35Error("no model", got=long))
    assert err.getvalue() == f"error: no model\n  got: {long}\n"


# The widest rows of the 397B model.
LAYERS = "language_model.model.layers.*.mlp."
WIDE = [
    PlanRow(LAYERS + "switch_mlp.down_proj", (512, 4096, 1024), "quantized", "keep", "F8_E4M3",
            "BF16", 4, 64, 60, 1, 72_477_573_120),
    PlanRow(LAYERS + "shared_expert.down_proj", (4096, 1024), "quantized", "keep", "F8_E4M3",
            "BF16", 4, 64, 60, 1, 141_557_760),
    PlanRow("vision_tower.*", (), "carried", "", "BF16", "BF16", count=333, nbytes=912_345_678),
    PlanRow("model.language_model.old", (3,), "dropped", "keep", "BF16", ""),
]  # fmt: skip


def fake_plan() -> Any:
    return SimpleNamespace(
        table=lambda: WIDE,
        num_parameters=10**9,
        bits_per_weight=4.5,
        output_bytes=10**9,
        shards=[1],
        source_bytes=10**9,
    )


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        (dict(width=80, force_terminal=True), 5),
        (dict(width=120, force_terminal=True), 7),
        (dict(width=40), 7),
    ],
    ids=["narrow terminal", "wide terminal", "pipe"],
)
def test_nothing_in_a_plan_is_cut(consoles: Any, options: dict[str, Any], columns: int) -> None:
    out, _ = consoles(**options)
    terminal.print_plan(fake_plan())
    lines = out.getvalue().splitlines()[:-1]
    assert "…" not in out.getvalue()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 5
    assert len(lines[0].split()) == columns
    assert len(lines[0]) <= (80 if columns == 5 else 120)
    assert lines[1].split()[:3] == ["layers.*.mlp.switch_mlp.down_proj", "60", "512x4096x1024"]
    words = lines[1].split()
    assert words[-1] == "72,478"
    assert words[-3:-1] == ["4-bit", "g64"] if columns == 5 else words[-4:-2] == ["4-bit", "g64"]
    assert lines[4].split()[5 - columns - 2 :][0] == "dropped" and lines[4].endswith(" 0.00")


def test_a_real_plan_is_shown_whole(consoles: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src", moe=True, vision=True, mtp=True)
    planned = plan(tmp_path / "src")
    out, _ = consoles()
    terminal.print_plan(planned)
    lines = out.getvalue().splitlines()
    assert len(lines) == len(planned.table()) + 2
    megabytes = sum(float(line.split()[-1]) for line in lines[1:-1])
    assert megabytes == pytest.approx(planned.output_bytes / 1e6, abs=0.005 * len(lines))
    assert f"{planned.bits_per_weight:.3f} bits per weight" in lines[-1]


def test_progress_is_two_lines_in_a_log(consoles: Any) -> None:
    out, err = consoles()
    with terminal.byte_progress("Converting [x]") as progress:
        for done in range(0, 101):
            progress(done * 10**6, 100 * 10**6, "language_model.model.norm.weight", "a.safetensors")
    first, last = err.getvalue().splitlines()
    assert first == "Converting [x] …"
    assert re.fullmatch(r"Converting \[x\]: 100\.0 MB read in \d+\.\d s", last)
    assert out.getvalue() == ""


def test_a_long_job_tells_a_log_every_half_minute(
    consoles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err = consoles()
    now = 1000.0
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: now)
    file = "model-00003-of-00094.safetensors"
    with terminal.byte_progress("Converting") as progress:
        for done in range(100, 201):
            progress(done * 10**9, 200 * 10**9, f"tensor {done}", file)
            now += 10
        now += 20
    lines = err.getvalue().splitlines()
    # Every third call of the hundred, and the first and last line.
    assert len(lines) == 33 + 2
    assert lines[1] == (
        "Converting: 103.00 of 200.00 GB, 51 %, 100.0 MB/s, 16 min left; "
        "model-00003-of-00094.safetensors: tensor 103"
    )
    assert lines[-1] == "Converting: 100,000.0 MB read in 17 min, 100,000.0 MB before"


def test_progress_on_a_terminal_fits_its_line(consoles: Any) -> None:
    out, err = consoles(width=80, force_terminal=True, legacy_windows=False)
    tensor = "language_model.model.layers.17.linear_attn.in_proj_qkv.weight"
    with terminal.byte_progress("Converting [x]") as progress:
        progress(2 * 10**9, 7 * 10**9, tensor, "model-00003-of-00094.safetensors")
        time.sleep(0.3)
    lines = [ESCAPES.sub("", line) for line in re.split(r"[\r\n]", err.getvalue())]
    middle = next(line for line in lines if "layers.17" in line)
    assert middle.startswith("Converting [x] ━") and "2.0/7.0 GB" in middle
    assert re.search(r"\d\d?:\d\d", middle) or "-:--" in middle
    assert all(len(line) <= 80 for line in lines)
    assert out.getvalue() == ""


def test_a_failure_leaves_the_spinner_and_the_error_readable(consoles: Any) -> None:
    _, err = consoles(force_terminal=True, width=80)
    with pytest.raises(Qwen35Error), terminal.loading("[odd] name"):
        time.sleep(0.2)
        raise Qwen35Error("no model")
    assert "Loading [odd] name" in ESCAPES.sub("", err.getvalue())
    # The cursor is shown again.
    assert err.getvalue().rstrip().endswith("\x1b[2K") or "\x1b[?25h" in err.getvalue()
