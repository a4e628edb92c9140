"""Shell completion: what is offered, that it is light, and that one command installs it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from everyday import everyday
from typer.testing import CliRunner

from qwen35_mlx.cli.main import app

CLI = (
    "from qwen35_mlx.cli.main import app; import atexit, sys;"
    "atexit.register(lambda: print(*[m for m in ('mlx', 'numpy', 'rich') if m in sys.modules],"
    " file=sys.stderr)); app(prog_name='qwen35-mlx')"
)


@pytest.fixture
def complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What bash is offered behind a line."""
    monkeypatch.setenv("QWEN35_MLX_SESSIONS", str(tmp_path / "sessions"))
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sessions").mkdir()
    for name in ("notes", "other", "with space", ".hidden"):
        (tmp_path / "sessions" / f"{name}.json").touch()
    folders = [tmp_path / name for name in ("old model", "old", "new")]
    for folder in folders:
        folder.mkdir()
    (tmp_path / "cache").mkdir()
    recorded = json.dumps([*map(str, folders), str(tmp_path / "gone")])
    (tmp_path / "cache" / "converted.json").write_text(recorded)

    def complete(line: str) -> list[str]:
        environment = {
            "_QWEN35_MLX_COMPLETE": "complete_bash",
            "COMP_WORDS": f"qwen35-mlx {line}",
            "COMP_CWORD": str(len(f"{line}x".split())),
        }
        result = CliRunner().invoke(app, [], env=environment, prog_name="qwen35-mlx")
        assert result.exit_code == 0
        return result.stdout.split()

    return complete


def test_commands_options_and_choices_are_offered(complete: Any) -> None:
    assert complete("") == [
        "convert",
        "plan",
        "fidelity",
        "upload",
        "generate",
        "chat",
        "sessions",
        "serve",
        "launch",
        "cluster",
        "train",
        "fuse",
        "evaluate",
        "bench",
        "doctor",
    ]
    assert complete("chat --pre") == ["--preset", "--presence-penalty"]
    assert complete("convert x --bits ") == ["2", "3", "4", "5", "6", "8"]
    assert complete("chat --kernels ") == ["auto", "ops", "mlx", "metal"]
    assert complete("plan x --recipe q") == ["q8", "q6", "q5", "q4", "q3", "q2"]


def test_models_and_sessions_of_this_user_are_offered(complete: Any, tmp_path: Path) -> None:
    # A word with a space would arrive in two.
    assert complete("chat ") == [f"{tmp_path}/new", f"{tmp_path}/old"]
    assert complete(f"generate {tmp_path}/o") == [f"{tmp_path}/old"]
    # Nothing: then the shell completes files.
    assert complete("chat ./") == []
    assert complete("chat --session ") == complete("sessions ") == ["notes", "other"]
    assert complete("sessions --remove n") == ["notes"]


@pytest.mark.parametrize("line", everyday(["chat ", "chat --session ", "convert x --bits "], 1))
def test_completion_imports_no_mlx(complete: Any, line: str) -> None:
    environment = os.environ | {
        "_QWEN35_MLX_COMPLETE": "complete_bash",
        "COMP_WORDS": f"qwen35-mlx {line}",
        "COMP_CWORD": str(len(f"{line}x".split())),
    }
    command = [sys.executable, "-c", CLI]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() and done.stderr.strip() == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_one_command_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shell: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("shellingham.detect_shell", lambda: (shell, f"/bin/{shell}"))
    result = CliRunner().invoke(app, ["--install-completion"], prog_name="qwen35-mlx")
    assert result.exit_code == 0 and f"{shell} completion installed in" in result.stdout
    scripts = [f for f in tmp_path.rglob("*qwen35-mlx*") if f.is_file()]
    assert len(scripts) == 1 and "_QWEN35_MLX_COMPLETE=complete_" in scripts[0].read_text()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_with_the_script(complete: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))
    script = CliRunner().invoke(app, ["--show-completion"], prog_name="qwen35-mlx").stdout
    lines = f"PATH={Path(sys.executable).parent}:$PATH\n{script}\n"
    lines += "COMP_WORDS=(qwen35-mlx chat --session n); COMP_CWORD=3\n"
    lines += "_qwen35_mlx_completion qwen35-mlx; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True)
    assert done.stdout.strip() == "notes", done
