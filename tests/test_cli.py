"""The command line as a script sees it: what goes where, exit codes, no tracebacks."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from checkpoints import write_checkpoint
from typer.testing import CliRunner

import qwen35_mlx
from qwen35_mlx.cli import main as cli
from qwen35_mlx.quant.affine import BITS, GROUP_SIZES

DEMO = Path(qwen35_mlx.__file__).parent / "demo"
FRANCE = "What is the capital of France?"
ASKED = [{"role": "user", "content": FRANCE}]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, demo: Any, converted_demo: Path) -> Callable[..., Any]:
    """The command in this process; the demo is loaded once for all tests."""
    load = sys.modules["qwen35_mlx.model.loading"].load

    def load_once(name: str, kernels: str = "auto") -> Any:
        is_demo = name == str(converted_demo) and kernels == "auto"
        return demo if is_demo else load(name, kernels=kernels)

    monkeypatch.setattr(sys.modules["qwen35_mlx.model.loading"], "load", load_once)

    def run(*arguments: object, stdin: str | bytes | None = None) -> Any:
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit), result
        return result

    return run


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


def test_help_answers_at_once() -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        job = shell("--help")
        stdout, stderr = job.communicate()
        seconds.append(time.perf_counter() - started)
        assert (job.returncode, stderr) == (0, "")
        assert all(name in stdout for name in ("convert", "plan", "generate", "chat"))
    # Python itself included; the least of three, as other tests may use the processor.
    assert min(seconds) < 0.6


@pytest.mark.parametrize("command", ["convert", "plan", "fidelity", "generate", "chat", "sessions"])
def test_no_name_of_an_option_is_cut_in_a_narrow_help(
    run: Any, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    shown = run(command, "--help").stdout
    parameters = typer.main.get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
    for name in (name for p in parameters for name in p.opts if name.startswith("--")):
        assert name in shown


def test_version_and_no_command(run: Any) -> None:
    assert run("--version").stdout == f"qwen35-mlx {qwen35_mlx.__version__}\n"
    assert run().exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["frobnicate"], "frobnicate"),
        (["generate"], "MODEL"),
        (["convert", "x"], "OUT"),
        (["convert", "x", "y", "--bits", "7"], "7 is not one of 2, 3, 4, 5, 6, 8"),
        (["convert", "x", "y", "--bits", "four"], "--bits"),
        (["plan", "x", "--group-size", "48"], "48 is not one of 32, 64, 128"),
        (["plan", "x", "--bits-per-weight", "inf"], "--bits-per-weight"),
        (["plan", "x", "--dtype", "int8"], "int8 is not one of bfloat16"),
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
    run: Any, arguments: list[str], word: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert word in " ".join(result.stderr.split())


def test_the_choices_are_those_of_the_quantizer() -> None:
    for parameter, choices in (("bits", BITS), ("group_size", GROUP_SIZES)):
        command = typer.main.get_command(cli.app).commands["convert"]  # type: ignore[attr-defined]
        option = next(p for p in command.params if p.name == parameter)
        for value in range(1, 257):
            allowed = value in choices
            try:
                option.process_value(click.Context(command), str(value))
            except Exception:
                assert not allowed
            else:
                assert allowed


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (["plan", "/no/such/folder"], None, ["no checkpoint at /no/such/folder", "hint:"]),
        (["generate", "/no/such/folder", "-p", "hi"], None, ["no model at /no/such/folder"]),
        (["chat", "/no/such/folder", "-p", "hi"], None, ["no model at /no/such/folder"]),
        (["chat", DEMO, "-p", "hi"], None, ["not converted", "hint: run: qwen35-mlx convert"]),
        (["generate", "x", "-p", " \n"], None, ["the prompt is empty", r"' \n'"]),
        (["generate", "x"], "", ["the prompt is empty"]),
        (["generate", "x"], b"caf\xe9", ["standard input is not text", "0xe9"]),
        (["chat", "x"], "\n", ["the prompt is empty", "on standard input"]),
        (["chat", "x", "-p", "hi", "-p", ""], None, ["the prompt is empty"]),
    ],
)
def test_mistakes_exit_1_in_words_on_stderr(
    run: Any, arguments: list[object], stdin: Any, words: list[str]
) -> None:
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr and "\x1b" not in result.stderr
    for word in words:
        assert word in result.stderr


def test_a_prompt_longer_than_the_context_exits_1(run: Any, converted_demo: Path) -> None:
    for command in ("generate", "chat"):
        result = run(command, converted_demo, "-p", "word " * 5000)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "longer than the model's context" in result.stderr
        assert "fewer than 4,096" in result.stderr


def test_plan_prints_a_table_and_writes_nothing(run: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src", moe=True, vision=True)
    result = run("plan", tmp_path / "src", "--bits", "3", "--group-size", "128")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["module", "count", "shape", "source", "becomes", "bpw", "MB"]
    embedding = next(line for line in lines if line.startswith("embed_tokens"))
    assert embedding.split()[1:-1] == ["1", "96x128", "BF16", "3-bit", "g128", "3.25"]
    assert any("bits per weight of the text model" in line for line in lines)
    assert any(line.startswith("while converting: ") for line in lines)
    assert any(line.split()[:5] == ["M2", "Ultra", "192", "GB", "155"] for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_convert_tells_progress_on_stderr_and_the_result_on_stdout(
    run: Any, tmp_path: Path
) -> None:
    out = tmp_path / "[out] put"
    result = run("convert", DEMO, out, "--bits", "4")
    assert result.exit_code == 0
    assert f"written to {out}" in result.stdout
    assert "\nConverting demo …\n" in result.stderr
    assert "MB read in" in result.stderr
    assert f"next: qwen35-mlx chat '{out}'" in result.stderr
    assert json.loads((out / "config.json").read_text())["quantization"]["bits"] == 4


def test_a_folder_in_the_way_is_told_before_hours_of_calibration(run: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = run("convert", "no/source", tmp_path / "out", "--calibrate")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {tmp_path / 'out'} exists already")


def test_verify_reads_everything_again(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("convert", DEMO, out, "--verify")
    assert result.exit_code == 0
    assert "are as they were written" in result.stdout
    result = run("convert", DEMO, out, "--verify")
    assert (result.exit_code, "written to" in result.stdout) == (0, False)
    # All of it is read by this run, none by one before.
    assert re.search(r": [4-9]\.\d MB read in [^,]*\n", result.stderr)
    for name in ("model.safetensors", "tokenizer.json"):
        path = out / name
        raw = bytearray(path.read_bytes())
        raw[-2] ^= 1
        path.write_bytes(raw)
        result = run("convert", DEMO, out, "--verify")
        assert result.exit_code == 1
        assert f"got: {name} has another checksum" in result.stderr
        raw[-2] ^= 1
        path.write_bytes(raw)
    (out / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in run("convert", DEMO, out, "--verify").stderr


@pytest.mark.slow
def test_plan_without_a_source_is_about_this_machine(run: Any) -> None:
    result = run("plan")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    row = next(line for line in lines if line.startswith("Qwen3.5-397B-A17B"))
    assert row.split()[1:3] == ["173.5", "GB,"]


def test_convert_refuses_to_write_over_a_folder(run: Any, tmp_path: Path) -> None:
    result = run("convert", DEMO, tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"error: {tmp_path} exists already\n" in result.stderr


@pytest.fixture
def answer(demo: Any) -> Callable[..., str]:
    """What the demo says to a question, greedily."""

    def answer(*messages: dict[str, str], **options: Any) -> str:
        return qwen35_mlx.generate(*demo, messages or ASKED, temperature=0.0, **options)

    return answer


def test_generate_prints_the_answer_and_nothing_else(
    run: Any, converted_demo: Path, answer: Any
) -> None:
    options = ("--temperature", "0")
    result = run("generate", converted_demo, "-p", FRANCE, *options)
    assert (result.exit_code, result.stdout, result.stderr) == (0, answer() + "\n", "")
    assert "Paris" in result.stdout
    assert run("generate", converted_demo, *options, stdin=FRANCE).stdout == result.stdout
    no_think = run("generate", converted_demo, "-p", FRANCE, "--no-think", *options)
    assert no_think.stdout == answer(enable_thinking=False) + "\n" != result.stdout
    cut = run("generate", converted_demo, "-p", FRANCE, "--max-tokens", "2", *options)
    assert cut.stdout == answer(max_tokens=2) + "\n" != result.stdout
    stop = run("generate", converted_demo, "-p", FRANCE, "--stop", "zz", "--stop", "Par", *options)
    assert stop.stdout == answer().partition("Par")[0] + "\n"


def test_options_reach_the_sampler(run: Any, converted_demo: Path, answer: Any) -> None:
    hot = ("-p", FRANCE, "--temperature", "9", "--top-k", "0", "--max-tokens", "8")

    def said(*options: str) -> str:
        return run("generate", converted_demo, *hot, *options).stdout

    assert said("--seed", "1") == said("--seed", "1") != said("--seed", "2")
    greedy = answer(max_tokens=8) + "\n"
    assert said("--top-k", "1") == said("--top-p", "1e-6") == said("--min-p", "1") == greedy
    for penalty in ("presence", "repetition"):
        option = (f"--{penalty}-penalty", "99", "--temperature", "0", "--max-tokens", "40")
        assert said(*option) != said(*option[2:])


def test_raw_text_and_system_prompts_reach_the_model(
    run: Any, converted_demo: Path, demo: Any, answer: Any
) -> None:
    options = (converted_demo, "-p", FRANCE, "--temperature", "0", "--max-tokens", "9")
    raw = qwen35_mlx.generate(*demo, FRANCE, temperature=0.0, max_tokens=9)
    assert run("generate", *options, "--raw").stdout == raw + "\n" != answer(max_tokens=9) + "\n"
    system = {"role": "system", "content": "zq zq zq"}
    result = run("generate", *options, "--system", system["content"])
    assert result.stdout == answer(system, *ASKED, max_tokens=9) + "\n"


def test_chat_answers_in_turns_and_keeps_figures_off_stdout(
    run: Any, converted_demo: Path, answer: Any
) -> None:
    result = run("chat", converted_demo, "-p", FRANCE, "-p", "Who are you?", "--temperature", "0")
    assert result.exit_code == 0
    thought, _, said = answer().partition("\n</think>\n\n")
    lines = [line for line in result.stdout.splitlines() if line]
    assert lines[:4] == [f"> {FRANCE}", f"(thought) {thought}", said, "> Who are you?"]
    assert "tok/s" not in result.stdout
    assert result.stderr.count("tok/s") == 4
    first, second = result.stderr.splitlines()
    assert re.match(r"prompt (\d+) of \1 tokens read, [\d,]+ tok/s · answer \d+ tokens", first)
    read, length = map(int, re.findall(r"\d+", second)[:2])
    assert read < length


def test_chat_reads_one_question_from_a_pipe(run: Any, converted_demo: Path, answer: Any) -> None:
    result = run("chat", converted_demo, "--no-think", "--temperature", "0", stdin=FRANCE + "\n")
    assert (result.exit_code, result.stdout) == (0, answer(enable_thinking=False) + "\n")
    cut = run("chat", converted_demo, "--max-tokens", "2", stdin=FRANCE)
    assert "cut at the token limit" in cut.stderr


def test_chat_without_a_model_converts_the_demo_once(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "cache"))
    first = run("chat", "-p", FRANCE, "--no-think", "--temperature", "0")
    assert first.exit_code == 0 and "Paris" in first.stdout
    assert "Converting the bundled demo" in first.stderr
    assert "This is the bundled demo" in first.stderr
    again = run("chat", "-p", FRANCE, "--no-think", "--temperature", "0")
    assert again.stdout == first.stdout
    assert "Converting" not in again.stderr


def test_chat_without_a_model_takes_the_newest_conversion(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "cache"))
    for name in ("first", "second"):
        assert run("convert", DEMO, tmp_path / name).exit_code == 0
    ask = ("chat", "-p", FRANCE, "--no-think", "--temperature", "0")
    told = run(*ask)
    assert f"This is {tmp_path / 'second'}, the newest model" in told.stderr
    assert "Paris" in told.stdout
    (tmp_path / "second" / "config.json").unlink()
    assert f"This is {tmp_path / 'first'}, the newest model" in run(*ask).stderr
    assert "This is the bundled demo" in run(*ask, "--demo").stderr
    assert run(*ask, "--demo", tmp_path / "first").exit_code == 2


def test_only_the_demo_is_sampled_as_its_checkpoint_says(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert run(*ask).exit_code == 0
    assert run("convert", DEMO, tmp_path / "own").exit_code == 0
    for more in ((), ("--demo",), ("--demo", "--preset", "instruct")):
        assert run(*ask, *more).exit_code == 0
    assert presets == ["checkpoint", "auto", "checkpoint", "instruct"]


def test_a_conversion_that_cannot_be_recorded_is_still_made(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "file" / "cache"))
    result = run("convert", DEMO, tmp_path / "out")
    assert result.exit_code == 0 and (tmp_path / "out" / "config.json").exists()
    assert "chat without a model will not find this folder" in result.stderr


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


def test_snapshot_memory_without_a_bound(run: Any, converted_demo: Path) -> None:
    asked = ("chat", converted_demo, "-p", FRANCE, "--max-tokens", "1", "--snapshot-memory", "inf")
    assert run(*asked).exit_code == 0


@pytest.mark.slow
def test_output_that_the_locale_cannot_show_is_no_traceback(converted_demo: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    job = shell("chat", converted_demo, "-p", "é", "-p", "ü", "--max-tokens", "1",
                env=environment)  # fmt: skip
    stdout, stderr = job.communicate(timeout=60)
    assert (job.returncode, "Traceback" in stderr) == (0, False)
    assert "> ?" in stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_ctrl_c_in_a_script_exits_130(converted_demo: Path, command: str) -> None:
    # Hot enough never to end by itself.
    hot = ("--temperature", "99", "--top-k", "0", "--top-p", "1")
    job = shell(command, converted_demo, "-p", FRANCE, "-p", FRANCE, *hot)
    assert job.stdout
    job.stdout.read(20)
    job.send_signal(2)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode == 130
    assert "Traceback" not in stderr


def test_the_installed_command_is_this_one() -> None:
    command = shutil.which("qwen35-mlx", path=str(Path(sys.executable).parent))
    assert command is not None
    result = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert result.stdout == f"qwen35-mlx {qwen35_mlx.__version__}\n"


@pytest.mark.parametrize(("has_metal", "examined"), [(True, False), (True, True), (False, False)])
def test_chat_on_a_mac_suggests_the_doctor_once(
    run: Any,
    converted_demo: Path,
    monkeypatch: Any,
    tmp_path: Path,
    has_metal: bool,
    examined: bool,
) -> None:
    import mlx.core as mx

    from qwen35_mlx.kernels import choice

    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path))
    monkeypatch.setattr(mx.metal, "is_available", lambda: has_metal)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    if examined:
        choice.write({"router": {"matched": False, "speedup": {}}})
    result = run("chat", converted_demo, "-p", FRANCE, "--max-tokens", 1)
    assert result.exit_code == 0
    assert ("qwen35-mlx doctor" in result.stderr) == (has_metal and not examined)


def test_an_unknown_choice_of_kernels_is_a_mistake_in_usage(run: Any) -> None:
    result = run("generate", "no/model", "-p", "hi", "--kernels", "fast")
    assert result.exit_code == 2
    assert "auto, ops, metal" in result.stderr


def test_sessions_are_kept_listed_shown_and_removed(
    run: Any, converted_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN35_MLX_SESSIONS", str(tmp_path))
    assert "no sessions yet" in run("sessions").stderr
    asked = ("chat", converted_demo, "--session", "s", "--no-think", "--temperature", "0")
    assert run(*asked, "-p", FRANCE, "--system", "Be brief.").exit_code == 0
    assert run("sessions").stdout.endswith(f"  1 turn: {FRANCE}\n")
    again = run(*asked, "-p", "Who are you?", "--system", "Be kind.")
    assert "session s: 1 turn, goes on after: What is the capital of France?" in again.stderr
    listed = run("sessions").stdout
    assert re.fullmatch(rf"s  [\d-]+ [\d:]+  \d\.\d MB  2 turns: {re.escape(FRANCE)}\n", listed)
    shown = run("sessions", "s").stdout
    # The command line's system prompt is that of the session from then on.
    assert shown.startswith(f"[system]\nBe kind.\n\n[user]\n{FRANCE}\n\n[assistant]\n")
    assert run("sessions", "none").exit_code == 1
    assert run("sessions", "--remove", "s").exit_code == 0
    assert run("sessions").stdout == "" and list(tmp_path.glob("*.json")) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [("--on-loop", "shout"), ("--preset", "wild"), ("--think-budget", "0")],
)
def test_settings_of_a_chat_are_checked_before_a_model_is_loaded(
    run: Any, option: str, value: str
) -> None:
    result = run("chat", "/no/such/folder", "-p", "x", option, value)
    assert result.exit_code == 2 and "Invalid value" in result.stderr
