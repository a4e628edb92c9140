"""Where the converted demo is kept, that it is made once and whole, and the newest conversion."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qwen35_mlx
from qwen35_mlx.chat import sessions
from qwen35_mlx.cli import completion, local_models
from qwen35_mlx.cli.local_models import (
    MOST_RECORDED,
    cache_home,
    converted_demo,
    newest_conversion,
    record_conversion,
)
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.kernels import verdicts


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("QWEN35_MLX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path


def test_cache_on_macos(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_home() == home / "Library" / "Caches" / "qwen35-mlx"


def test_cache_on_linux(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_home() == home / ".cache" / "qwen35-mlx"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_home() == home / ".cache" / "qwen35-mlx"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert cache_home() == home / "xdg" / "qwen35-mlx"


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_the_variable_overrides_the_place(
    home: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("QWEN35_MLX_CACHE", "~/mine")
    assert cache_home() == home / "mine"


@pytest.fixture
def source(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small stand-in for the demo, and a cache of its own."""
    folder = home / "demo"
    folder.mkdir()
    (folder / "config.json").write_text("1")
    monkeypatch.setattr(local_models, "SOURCE", folder)
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(home / "cache"))
    return folder


class Convert:
    def __init__(self) -> None:
        self.calls: list[tuple[Path, Path]] = []

    def __call__(self, source: Path, out: Path) -> None:
        assert not out.exists()
        self.calls.append((source, out))
        out.mkdir()
        (out / "config.json").write_text((source / "config.json").read_text())


def test_the_demo_is_converted_once(source: Path) -> None:
    convert = Convert()
    first = converted_demo(convert)
    assert first == converted_demo(convert)
    assert convert.calls == [(source, first)]
    assert first.parent == source.parent / "cache"


@pytest.mark.parametrize("change", ["content", "new file", "version"])
def test_a_changed_demo_is_converted_again(
    source: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    convert = Convert()
    first = converted_demo(convert)
    if change == "content":
        (source / "config.json").write_text("2")
    elif change == "new file":
        (source / "more.json").touch()
    else:
        monkeypatch.setattr(local_models, "__version__", qwen35_mlx.__version__ + ".1")
    assert converted_demo(convert) != first
    assert len(convert.calls) == 2


def test_what_the_finder_and_python_leave_behind_is_no_change(source: Path) -> None:
    convert = Convert()
    converted_demo(convert)
    (source / ".DS_Store").touch()
    (source / "__pycache__").mkdir()
    converted_demo(convert)
    assert len(convert.calls) == 1


def test_a_broken_copy_is_replaced(source: Path) -> None:
    convert = Convert()
    (converted_demo(convert) / "config.json").unlink()
    assert (converted_demo(convert) / "config.json").read_text() == "1"
    assert len(convert.calls) == 2


def test_a_failed_conversion_leaves_nothing_behind(source: Path) -> None:
    def fail(source: Path, out: Path) -> None:
        raise Qwen35Error("no space")

    with pytest.raises(Qwen35Error, match="no space"):
        converted_demo(fail)
    converted_demo(Convert())


def test_a_cache_that_cannot_be_written_is_told(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file where a folder should be; permissions would not stop root.
    (source.parent / "file").touch()
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(source.parent / "file" / "cache"))
    with pytest.raises(Qwen35Error, match="cache folder cannot be used") as caught:
        converted_demo(Convert())
    assert "hint: set QWEN35_MLX_CACHE" in str(caught.value)


CONVERT_SLOWLY = """
import sys, time
from pathlib import Path
from qwen35_mlx.cli import local_models

def convert(source, out):
    print("converting", flush=True)
    work = out.with_name("work")
    work.mkdir()
    time.sleep(0.3)
    (work / "config.json").write_text("done")
    work.rename(out)

local_models.SOURCE = Path(sys.argv[1])
folder = local_models.converted_demo(convert)
assert (folder / "config.json").read_text() == "done"
"""


def test_processes_at_once_wait_for_the_first(source: Path) -> None:
    command = [sys.executable, "-c", CONVERT_SLOWLY, str(source)]
    jobs: list[Any] = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    results = [job.communicate(timeout=60) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4, results
    assert "".join(stdout for stdout, _ in results) == "converting\n"


@pytest.fixture
def converted(source: Path) -> list[Path]:
    """Three recorded folders, oldest first."""
    folders = [source.parent / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").touch()
        (folder / "tokenizer.json").touch()
        record_conversion(folder)
    return folders


def test_without_conversions_there_is_no_newest(source: Path) -> None:
    assert newest_conversion() is None


def test_a_folder_without_a_tokenizer_cannot_be_talked_to(converted: list[Path]) -> None:
    (converted[2] / "tokenizer.json").unlink()
    assert newest_conversion() == converted[1]


def test_the_newest_conversion_is_the_one_recorded_last(converted: list[Path]) -> None:
    assert newest_conversion() == converted[2]
    record_conversion(converted[0])
    assert newest_conversion() == converted[0]
    shutil.rmtree(converted[0])
    assert newest_conversion() == converted[2]


@pytest.mark.parametrize("harm", ["gone", "no config", "torn config", "no weights", "lost shard"])
def test_a_folder_that_is_gone_or_broken_is_skipped(converted: list[Path], harm: str) -> None:
    newest = converted[2]
    if harm == "gone":
        shutil.rmtree(newest)
    elif harm == "no config":
        (newest / "config.json").unlink()
    elif harm == "torn config":
        (newest / "config.json").write_text('{"model_type": ')
    elif harm == "no weights":
        (newest / "model.safetensors").unlink()
    else:
        index = {"weight_map": {"x": "model.safetensors", "y": "model-2.safetensors"}}
        (newest / "model.safetensors.index.json").write_text(json.dumps(index))
    assert newest_conversion() == converted[1]


@pytest.mark.parametrize("record", ["", "{}", "[1, null]", "[[]]", "\x00"])
def test_a_broken_record_is_an_empty_one(converted: list[Path], record: str) -> None:
    file = cache_home() / "converted.json"
    file.write_text(record)
    assert newest_conversion() is None
    record_conversion(converted[0])
    assert newest_conversion() == converted[0]


def test_the_record_stays_short(converted: list[Path]) -> None:
    for i in range(MOST_RECORDED + 5):
        record_conversion(converted[0].parent / f"many-{i}")
    assert len(json.loads((cache_home() / "converted.json").read_text())) == MOST_RECORDED


RECORD = """
import sys
from pathlib import Path
from qwen35_mlx.cli.local_models import record_conversion

for i in range(20):
    record_conversion(Path(f"/{sys.argv[1]}-{i}"))
"""


def test_processes_at_once_lose_no_conversion(source: Path) -> None:
    jobs = [subprocess.Popen([sys.executable, "-c", RECORD, name]) for name in "xy"]
    assert [job.wait(timeout=60) for job in jobs] == [0, 0]
    assert len(json.loads((cache_home() / "converted.json").read_text())) == 40


def test_without_a_home_folder_the_demo_is_converted_into_a_scratch_folder(no_home: None) -> None:
    """RuntimeError: Could not determine home directory."""
    calls: list[tuple[Path, Path]] = []

    def convert(source: Path, out: Path) -> None:
        calls.append((source, out))
        out.mkdir()
        (out / "config.json").touch()

    assert converted_demo(convert) == converted_demo(convert) == calls[0][1]
    assert len(calls) == 1
    shutil.rmtree(calls[0][1])


def test_without_a_home_folder_nothing_is_known_of_earlier_runs(
    no_home: None, tmp_path: Path
) -> None:
    assert newest_conversion() is None and verdicts.read() == []
    assert completion.models(None, [], "") == completion.sessions(None, [], "") == []
    sessions.trim_caches(0)
    for write in (lambda: record_conversion(tmp_path), lambda: verdicts.write([])):
        with pytest.raises(Qwen35Error, match=r"home folder is not known(.|\n)*QWEN35_MLX_CACHE"):
            write()
    for read in (sessions.list_sessions, lambda: sessions.session_file("name")):
        with pytest.raises(Qwen35Error, match=r"home folder is not known(.|\n)*QWEN35_MLX_SESS"):
            read()
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(Qwen35Error, match=rf"damaged(.|\n)*--remove {tmp_path}/a.json"):
        sessions.read_conversation(sessions.session_file(tmp_path / "a.json"))


@pytest.mark.slow
@pytest.mark.parametrize("session", [False, True])
def test_the_demo_answers_without_a_home_folder(
    no_home: None, run_cli: Any, tmp_path: Path, session: bool
) -> None:
    options = ("--session", tmp_path / "talk.json") if session else ()
    result = run_cli(
        "chat", "--demo", "-p", "What is the capital of France?", "--no-think", *options
    )
    assert result.exit_code == 0 and "Paris" in result.stdout, result.stderr
    assert (tmp_path / "talk.json").exists() == session
