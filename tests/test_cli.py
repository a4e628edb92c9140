"""The command line as a script sees it: what goes where, exit codes, no tracebacks."""

import io
import os
import re
import shutil
import subprocess
import sys
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import typer

import qwen35_mlx
from qwen35_mlx.cli import main as cli
from qwen35_mlx.sampling import SamplingParams

# Before a fixture puts another in its place.
REAL_LOAD = qwen35_mlx.load

DEMO = Path(qwen35_mlx.__file__).parent / "demo"
FRANCE = "What is the capital of France?"
GREEDY = ("--temperature", "0")
ASKED = [{"role": "user", "content": FRANCE}]
GROUP: Any = typer.main.get_command(cli.app)
COMMANDS: dict[str, Any] = GROUP.commands
# Of the ways to choose bits, --bits has the default.
WITHOUT_DEFAULT = {"recipe", "fit", "bits_per_weight", "calibration", "remove"}
# One of the two is needed.
WITHOUT_DEFAULT |= {"hosts", "hostfile"}
WITHOUT_DEFAULT |= set(SamplingParams.__dataclass_fields__)


def shell(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from qwen35_mlx.cli.main import main; main()",
            *map(str, arguments),
        ],
        stdin=options.pop("stdin", subprocess.DEVNULL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_help_answers_at_once(record_property: Any) -> None:
    def seconds(job: subprocess.Popen[str], *names: str) -> float:
        """CPU of a process, which writes these names."""
        before = os.times()
        stdout, stderr = job.communicate()
        after = os.times()
        assert (job.returncode, stderr) == (0, "")
        assert all(name in stdout for name in names)
        used = (after.children_user, after.children_system)
        return sum(used) - before.children_user - before.children_system

    names = ("convert", "plan", "generate", "chat")
    ours = min(seconds(shell("--help"), *names) for _ in range(3))
    # A busy or slow machine takes several times as much for both.
    command = [sys.executable, "-c", "import argparse, asyncio, json, pathlib, typing"]
    bare = min(
        seconds(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        for _ in range(3)
    )
    record_property("CPU of --help", f"{ours:.2f} s (0.12 s at most on a quiet machine)")
    record_property("CPU of Python with a few modules", f"{bare:.2f} s")
    assert ours < max(0.4, 4 * bare)


@pytest.mark.parametrize("name", ["", *COMMANDS])
@pytest.mark.parametrize("width", [60, 80])
def test_help_fits_the_terminal_and_nothing_is_cut(name: str, width: int) -> None:
    command = COMMANDS.get(name, GROUP)
    context = command.make_context(name, [], resilient_parsing=True, terminal_width=width)
    shown = command.get_help(context)
    assert max(map(len, shown.splitlines())) <= width
    if name:
        words = "".join(shown.split())
        for parameter in command.params:
            assert all(option in shown for option in parameter.opts if option.startswith("--"))
            assert parameter.name == "help" or "".join(parameter.help.split()) in words
    if name or width == 80:
        # What may come several times.
        for repeated in ("[ARGS]", "{OUT}", "{COMMAND}"):
            shown = shown.replace(f"{repeated}...", "")
        assert "..." not in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_happens_without_an_option(name: str) -> None:
    """One sentence says it for all of sampling; a flag that is not set changes nothing."""
    for parameter in COMMANDS[name].params:
        is_flag = parameter.default is False or parameter.name == "help"
        if is_flag or parameter.required or parameter.name in WITHOUT_DEFAULT:
            continue
        assert "Default: " in parameter.help or parameter.default is not None, parameter.name


def test_version_and_no_command(run_cli: Any) -> None:
    assert run_cli("--version").stdout == f"qwen35-mlx {qwen35_mlx.__version__}\n"
    assert run_cli().exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["frobnicate"], "frobnicate"),
        (["generate"], "MODEL"),
        (["convert"], "SRC"),
        (["convert", "x", "y", "--bits", "7"], "'7' is not one of '2', '3', '4', '5', '6', '8'"),
        (["convert", "x", "y", "--bits", "four"], "--bits"),
        (["plan", "x", "--group-size", "48"], "'48' is not one of '32', '64', '128'"),
        (["plan", "x", "--bits-per-weight", "inf"], "--bits-per-weight"),
        (["plan", "x", "--dtype", "int8"], "'int8' is not one of 'bfloat16'"),
        (["generate", "x", "-p", "hi", "--temperature", "-1"], "temperature is not usable"),
        (["generate", "x", "-p", "hi", "--temperature", "nan"], "temperature is not usable"),
        (["generate", "x", "-p", "hi", "--top-p", "0"], "top_p is not usable"),
        (["generate", "x", "-p", "hi", "--top-k", "-1"], "top_k is not usable"),
        (["generate", "x", "-p", "hi", "--min-p", "2"], "min_p is not usable"),
        (["generate", "x", "-p", "hi", "--repetition-penalty", "0"], "repetition_penalty is not"),
        (["generate", "x", "-p", "hi", "--presence-penalty", "99"], "presence_penalty is not"),
        (["generate", "x", "-p", "hi", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "x", "-p", "hi", "--seed", "-1"], "--seed"),
        (["generate", "x", "-p", "hi", "--seed", str(2**64)], "--seed"),
        (["chat", "x", "-p", "hi", "--top-p", "0"], "top_p is not usable"),
    ],
)
def test_mistakes_in_usage_exit_2_before_anything_is_loaded(
    run_cli: Any, arguments: list[str], word: str
) -> None:
    result = run_cli(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert word in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (["plan", "/no/such/folder"], None, ["no checkpoint at /no/such/folder", "hint:"]),
        (["generate", "/no/such/folder", "-p", "hi"], None, ["no model at /no/such/folder"]),
        (["chat", "/no/such/folder", "-p", "hi"], None, ["no model at /no/such/folder"]),
        (["chat", DEMO, "-p", "hi"], None, ["not converted", "hint: run: qwen35-mlx convert"]),
        (["generate", "x", "-p", " \n"], None, ["the prompt is empty", r"' \n'"]),
        (["generate", "x"], "", ["the prompt is empty"]),
        (["generate", "x"], b"caf\xe9", ["standard input cannot be read as text", "0xe9"]),
        (["chat", "x"], "\n", ["the prompt is empty", "on standard input"]),
        (["chat", "x", "-p", "hi", "-p", ""], None, ["the prompt is empty"]),
    ],
)
def test_mistakes_exit_1_in_words_on_stderr(
    run_cli: Any, arguments: list[object], stdin: Any, words: list[str]
) -> None:
    result = run_cli(*arguments, stdin=stdin)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr and "\x1b" not in result.stderr
    for word in words:
        assert word in result.stderr


def test_a_prompt_longer_than_the_context_exits_1(run_cli: Any, converted_demo: Path) -> None:
    for command in ("generate", "chat"):
        result = run_cli(command, converted_demo, "-p", "word " * 5000)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "longer than the model's context" in result.stderr
        assert "fewer than 4,096" in result.stderr


def test_chat_answers_in_turns_and_keeps_figures_off_stdout(
    run_cli: Any, converted_demo: Path, answer: Any
) -> None:
    result = run_cli(
        "chat", converted_demo, "-p", FRANCE, "-p", "Who are you?", "--temperature", "0"
    )
    assert result.exit_code == 0
    thought, _, said = answer(*ASKED).partition("\n</think>\n\n")
    lines = [line for line in result.stdout.splitlines() if line]
    assert lines[:4] == [f"> {FRANCE}", f"(thought) {thought}", said, "> Who are you?"]
    assert "tok/s" not in result.stdout
    assert result.stderr.count("tok/s") == 4
    first, second = result.stderr.splitlines()
    assert re.match(r"prompt (\d+) of \1 tokens read, [\d,]+ tok/s · answer \d+ tokens", first)
    read, length = map(int, re.findall(r"\d+", second)[:2])
    assert read < length


@pytest.mark.slow
def test_chat_reads_one_question_from_a_pipe(
    run_cli: Any, converted_demo: Path, answer: Any
) -> None:
    result = run_cli("chat", converted_demo, "--no-think", *GREEDY, stdin=FRANCE + "\n")
    assert (result.exit_code, result.stdout) == (0, answer(*ASKED, enable_thinking=False) + "\n")
    cut = run_cli("chat", converted_demo, "--max-tokens", "2", stdin=FRANCE)
    assert "cut at the token limit" in cut.stderr


def test_chat_without_a_model_converts_the_demo_once(
    run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "cache"))
    first = run_cli("chat", "-p", FRANCE, "--no-think", "--temperature", "0")
    assert first.exit_code == 0 and "Paris" in first.stdout
    assert "Converting the bundled demo" in first.stderr
    assert "This is the bundled demo" in first.stderr
    again = run_cli("chat", "-p", FRANCE, "--no-think", "--temperature", "0")
    assert again.stdout == first.stdout
    assert "Converting" not in again.stderr


@pytest.mark.slow
def test_chat_without_a_model_takes_the_newest_conversion(
    run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "cache"))
    for name in ("first", "second"):
        assert run_cli("convert", DEMO, tmp_path / name).exit_code == 0
    ask = ("chat", "-p", FRANCE, "--no-think", "--temperature", "0")
    told = run_cli(*ask)
    assert f"This is {tmp_path / 'second'}, the newest model" in told.stderr
    assert "Paris" in told.stdout
    (tmp_path / "second" / "config.json").unlink()
    assert f"This is {tmp_path / 'first'}, the newest model" in run_cli(*ask).stderr
    assert "This is the bundled demo" in run_cli(*ask, "--demo").stderr
    assert run_cli(*ask, "--demo", tmp_path / "first").exit_code == 2


@pytest.mark.slow
def test_only_the_demo_is_sampled_as_its_checkpoint_says(
    run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The presets of the family are for models far larger than the demo."""
    from qwen35_mlx.chat import conversation as chat

    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "cache"))
    presets: list[str] = []

    class Noting(chat.Chat):
        def __init__(self, *arguments: Any, preset: str, **options: Any):
            presets.append(preset)
            super().__init__(*arguments, preset=preset, **options)

    monkeypatch.setattr(chat, "Chat", Noting)
    ask = ("chat", "-p", FRANCE, "--no-think", "--max-tokens", 1)
    assert run_cli(*ask).exit_code == 0
    assert run_cli("convert", DEMO, tmp_path / "own").exit_code == 0
    for more in ((), ("--demo",), ("--demo", "--preset", "instruct")):
        assert run_cli(*ask, *more).exit_code == 0
    assert presets == ["checkpoint", "auto", "checkpoint", "instruct"]


@pytest.mark.slow
def test_a_closed_pipe_is_no_error_to_talk_about(converted_demo: Path) -> None:
    """`| head -1`: the reader leaves, the writer falls silent."""
    for command in (["generate", converted_demo, "-p", FRANCE], ["plan", DEMO]):
        job = shell(*command)
        assert job.stdout and job.stderr
        job.stdout.close()
        assert job.stderr.read() == ""
        assert job.wait(timeout=60) == 1
        job.stderr.close()


@pytest.mark.slow
def test_no_library_remarks_on_a_prompt_that_is_too_long(converted_demo: Path) -> None:
    job = shell("chat", converted_demo, "-p", "word " * 5000)
    stdout, stderr = job.communicate(timeout=60)
    assert (job.returncode, stdout) == (1, "") and stderr.startswith("error: the prompt is longer")


def test_snapshot_memory_without_a_bound(run_cli: Any, converted_demo: Path) -> None:
    asked = ("chat", converted_demo, "-p", FRANCE, "--max-tokens", "1", "--snapshot-memory", "inf")
    assert run_cli(*asked).exit_code == 0


@pytest.mark.slow
def test_output_that_the_locale_cannot_show_is_no_traceback(converted_demo: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    job = shell("chat", converted_demo, "-p", "é", "-p", "ü", "--max-tokens", "1",
                env=environment)  # fmt: skip
    stdout, stderr = job.communicate(timeout=60)
    assert (job.returncode, "Traceback" in stderr) == (0, False)
    assert "> ?" in stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [["generate", "--show-thoughts"], ["chat", "-p", FRANCE]])
def test_ctrl_c_in_a_script_exits_130(converted_demo: Path, command: list[str]) -> None:
    # Hot enough never to end by itself.
    hot = ("--temperature", "99", "--top-k", "0", "--top-p", "1")
    job = shell(*command, converted_demo, "-p", FRANCE, *hot)
    assert job.stdout
    job.stdout.read(20)
    job.send_signal(2)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode == 130
    assert "Traceback" not in stderr


def test_the_installed_command_is_this_one() -> None:
    command = shutil.which("qwen35-mlx", path=str(Path(sys.executable).parent))
    assert command is not None
    for start in ([command], [sys.executable, "-m", "qwen35_mlx"]):
        result = subprocess.run([*start, "--version"], capture_output=True, text=True)
        assert result.stdout == f"qwen35-mlx {qwen35_mlx.__version__}\n"


def test_chat_and_generate_check_a_models_kernels_alike(
    run_cli: Any, converted_demo: Path, monkeypatch: Any
) -> None:
    """Both by what load does: neither has a rule of its own."""
    from qwen35_mlx.kernels import choice, first_load
    from qwen35_mlx.kernels.tiers import Tiers

    checked = []

    def tiers_of(model: Any) -> Tiers:
        checked.append(model)
        return Tiers()

    monkeypatch.setattr(choice, "unavailable", lambda: None)
    monkeypatch.setattr(first_load, "tiers_of", tiers_of)
    # Loaded again, not taken from other tests.
    monkeypatch.setattr("qwen35_mlx.model.loading.load", REAL_LOAD)
    for command in ("chat", "generate"):
        result = run_cli(command, converted_demo, "-p", FRANCE, "--max-tokens", 1)
        assert result.exit_code == 0
    assert len(checked) == 2


def test_an_unknown_choice_of_kernels_is_a_mistake_in_usage(run_cli: Any) -> None:
    result = run_cli("generate", "no/model", "-p", "hi", "--kernels", "fast")
    assert result.exit_code == 2
    assert "'auto', 'ops', 'mlx', 'metal'" in result.stderr


@pytest.mark.slow
def test_sessions_are_kept_listed_shown_and_removed(
    run_cli: Any, converted_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN35_MLX_SESSIONS", str(tmp_path))
    assert "no sessions yet" in run_cli("sessions").stderr
    asked = ("chat", converted_demo, "--session", "s", "--no-think", "--temperature", "0")
    assert run_cli(*asked, "-p", FRANCE, "--system", "Be brief.").exit_code == 0
    assert run_cli("sessions").stdout.endswith(f"  1 turn: {FRANCE}\n")
    again = run_cli(*asked, "-p", "Who are you?", "--system", "Be kind.")
    assert "session s: 1 turn, goes on after: What is the capital of France?" in again.stderr
    listed = run_cli("sessions").stdout
    assert re.fullmatch(rf"s  [\d-]+ [\d:]+  \d\.\d MB  2 turns: {re.escape(FRANCE)}\n", listed)
    shown = run_cli("sessions", "s").stdout
    # The command line's system prompt is that of the session from then on.
    assert shown.startswith(f"[system]\nBe kind.\n\n[user]\n{FRANCE}\n\n[assistant]\n")
    assert run_cli("sessions", "none").exit_code == 1
    assert run_cli("sessions", "--remove", "s").exit_code == 0
    assert run_cli("sessions").stdout == "" and list(tmp_path.glob("*.json")) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [("--on-loop", "shout"), ("--preset", "wild"), ("--think-budget", "0")],
)
def test_settings_of_a_chat_are_checked_before_a_model_is_loaded(
    run_cli: Any, option: str, value: str
) -> None:
    result = run_cli("chat", "/no/such/folder", "-p", "x", option, value)
    assert result.exit_code == 2 and "Invalid value" in result.stderr


def test_characters_that_a_terminal_does_not_have_are_question_marks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), "ascii") for _ in range(2)]
    monkeypatch.setattr(cli.sys, "stdout", streams[0])
    monkeypatch.setattr(cli.sys, "stderr", streams[1])
    monkeypatch.setattr(cli, "app", lambda: [stream.write("é") for stream in streams])
    cli.main()
    for stream in streams:
        stream.flush()
        assert stream.buffer.getvalue() == b"?"  # type: ignore[attr-defined]
    # What is no file of Python's is left alone.
    monkeypatch.setattr(cli.sys, "stdout", None)
    cli.main()


def test_a_terminal_of_no_columns_shows_everything() -> None:
    """rich printed nothing, and the command succeeded."""
    code = "from qwen35_mlx.cli.main import main; main()"
    program = [sys.executable, "-c", code, "plan", "Qwen3.5-0.8B"]
    shown = subprocess.run(program, env=os.environ | {"COLUMNS": "0"}, capture_output=True)
    assert shown.returncode == 0 and b"embed_tokens" in shown.stdout


@pytest.mark.parametrize(
    "arguments, word",
    [
        (("--api-key", "two words"), "no client can send this key"),
        (("--api-key", "ключ"), "no client can send this key"),
        (("--allow-host", "http://studio.local"), "without http:// and a port"),
        (("--allow-host", "studio.local:8080"), "without http:// and a port"),
        (("--host", "192.0.2.1", "--api-key", "k"), "no address of this machine"),
    ],
)
def test_a_server_that_nobody_could_ask_is_not_started(
    run_cli: Any, arguments: tuple[str, ...], word: str
) -> None:
    result = run_cli("serve", "absent", "--port", "0", *arguments)
    assert (result.exit_code, result.stdout) == (1, "") and word in result.stderr


def test_launch_takes_an_address_without_a_scheme_and_names_what_refuses(
    run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def urlopen(request: Any, timeout: float) -> Any:
        asked.append(request.full_url)
        raise HTTPError(request.full_url, 404, "", Message(), None)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    result = run_cli("launch", "claude", "--url", "localhost:9/")
    assert asked == ["http://localhost:9/v1/models"]
    assert "hint: another program may run there; --url names the server" in result.stderr
