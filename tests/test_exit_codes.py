"""No mistake ends in a traceback: exit 1 with an error, 2 with the usage, 130 after Ctrl-C."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from everyday import everyday

from qwen35_mlx.cli.local_models import SOURCE

CLI = (sys.executable, "-c", "from qwen35_mlx.cli.main import main; main()")
ODD_PATHS = [
    "", ".", "..", "/", "/dev/null", "~nosuchuser/x", "~nosuchuser", "\0", "a\0b", "\udcff",
    "x" * 300, "x" * 5000, "x/" * 3000, "none", "a/b", "{folder}", "{binary}", "{text}/x", "{json}",
    "a\nb", "https://huggingface.co/a/b", "-", "\ud800",
]  # fmt: skip
QUICK = [
    "generate PATH -p hi",
    "generate DEMO -p hi --max-tokens 1 --tools PATH",
    "sessions PATH",
    "convert SOURCE --recipe PATH",
    "plan SOURCE --fit PATH",
]
SLOW = [
    "generate DEMO -p hi --max-tokens 1 --image PATH",
    "chat PATH -p hi",
    "sessions --remove PATH",
    "convert SOURCE out --calibration PATH",
    "plan SOURCE --fit 24GB --calibration PATH",
    "generate DEMO -p hi --max-tokens 1 --video PATH",
    "generate DEMO -p hi --max-tokens 1 --pdf PATH",
    "chat DEMO -p hi --max-tokens 1 --image PATH",
    "chat DEMO -p hi --max-tokens 1 --session PATH",
    "convert PATH",
    "convert PATH out",
    "convert SOURCE PATH",
    "convert SOURCE PATH --verify",
    "convert SOURCE out --calibrate --calibration-text PATH",
    "convert SOURCE out --calibrate --calibration PATH --calibration-text {text}",
    "plan PATH",
    "plan SOURCE --png PATH",
    "fidelity PATH SOURCE --text {text}",
    "fidelity SOURCE PATH --text {text}",
    "fidelity SOURCE SOURCE --tokens 4 --text PATH",
    "fidelity SOURCE SOURCE --tokens 4 --text {text} --png PATH",
]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Odd files and folders; nothing else is written to, and no hub is asked."""
    monkeypatch.setenv("QWEN35_MLX_SESSIONS", str(tmp_path / "sessions"))
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    here = tmp_path / "here"
    files = {name: tmp_path / name for name in ("folder", "binary", "text", "json")}
    here.mkdir()
    files["folder"].mkdir()
    files["binary"].write_bytes(bytes(range(256)) * 9)
    files["text"].write_text("The capital of France is Paris.")
    files["json"].write_text('{"a": [1, {"b": null}]}')
    monkeypatch.chdir(here)
    return files


@pytest.mark.parametrize("call", [*QUICK, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW)])
def test_no_path_leads_to_a_traceback(
    run_cli: Any, converted_demo: Path, files: dict[str, Path], call: str
) -> None:
    for odd in ODD_PATHS:
        words = {"PATH": odd, "DEMO": str(converted_demo), "SOURCE": str(SOURCE)}
        result = run_cli(*(words.get(w, w).format_map(files) for w in call.split()))
        case = f"{call} with {odd[:20]!r}: {result.output}"
        assert result.exit_code in (0, 1, 2), case
        if result.exit_code == 1:
            assert "error: " in result.stderr and "Traceback" not in result.stderr, case
        if result.exit_code == 2:
            assert result.stderr.startswith("Usage: "), case
        for made in Path().iterdir():
            shutil.rmtree(made) if made.is_dir() else made.unlink()


@pytest.mark.parametrize("name", ["QWEN35_MLX_SESSIONS", "QWEN35_MLX_CACHE"])
def test_a_home_folder_of_nobody_in_a_variable_is_no_traceback(
    run_cli: Any, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "~nosuchuser/x")
    assert run_cli("sessions").exit_code == 0


@pytest.mark.parametrize(
    "error", everyday([RuntimeError, MemoryError, OSError, KeyboardInterrupt], 0, 3)
)
def test_failures_of_the_machine_are_errors_in_a_line(
    run_cli: Any, converted_demo: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error("[metal] no memory")

    monkeypatch.setattr("qwen35_mlx.chat.conversation.Chat.send", fail)
    for command in ("generate", "chat"):
        result = run_cli(command, converted_demo, "-p", "hi")
        assert result.exit_code == (130 if error is KeyboardInterrupt else 1)
        assert result.stdout == ""
        if error is not KeyboardInterrupt:
            assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("call", ["generate DEMO -p hi", "chat DEMO -p hi", "plan SOURCE", "--help",
                                  "chat DEMO", "sessions", "convert"])  # fmt: skip
def test_a_closed_stream_is_no_traceback(
    converted_demo: Path, files: dict[str, Path], call: str, closed: tuple[int, ...]
) -> None:
    words = {"DEMO": str(converted_demo), "SOURCE": str(SOURCE)}
    redirected = " ".join(f"{stream}>&-" for stream in closed)
    job = [*CLI, *(words.get(w, w) for w in call.split())]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirected}', "sh", *job],
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode in (0, 1, 2) and b"Traceback" not in done.stderr, done


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("call", ["generate DEMO -p hi", "chat DEMO -p hi", "plan SOURCE"])
def test_a_full_disk_behind_standard_output_is_an_error(
    converted_demo: Path, files: dict[str, Path], call: str
) -> None:
    words = {"DEMO": str(converted_demo), "SOURCE": str(SOURCE)}
    with open("/dev/full", "w") as full:
        job = [*CLI, *(words.get(w, w) for w in call.split())]
        done = subprocess.run(job, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1, done
    assert "No space left" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_another_locale_is_no_traceback(
    converted_demo: Path, files: dict[str, Path], encoding: str
) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    for call in (["sessions"], ["generate", converted_demo, "-p", "漢字 é 😀", "--max-tokens", "3"],
                 ["generate", converted_demo, "-p", b"\xff", "--json"],
                 ["chat", converted_demo, "-p", "é", "-p", "ü", "--max-tokens", "1"]):  # fmt: skip
        done = subprocess.run([*CLI, *call], env=environment, capture_output=True)
        assert done.returncode in (0, 1) and b"Traceback" not in done.stderr, done
