"""Files are replaced whole, through links, and nothing but a file is replaced."""

import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import Any

import pytest

from qwen35_mlx import files
from qwen35_mlx.cli import chat_commands, cluster_command, generate_command, media_input
from qwen35_mlx.convert import calibration_text
from qwen35_mlx.errors import ConfigError, Qwen35Error
from qwen35_mlx.files import locked, replacing, write_file, write_json
from qwen35_mlx.training.examples import read_examples


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_file(file, b"old")
    with pytest.raises(ZeroDivisionError), replacing(file) as temporary:
        temporary.write_bytes(b"new, half")
        raise ZeroDivisionError
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]
    # A leftover of a killed writer is written over.
    temporary.write_bytes(b"x" * 100)
    write_file(file, b"new")
    assert file.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.json"]


def test_the_temporary_file_has_the_suffix_and_the_mode_from_the_beginning(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.safetensors", 0o600) as temporary:
        assert temporary.suffix == ".safetensors" and temporary.parent == tmp_path
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_file(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"


def test_neither_a_folder_nor_a_device_is_replaced(tmp_path: Path) -> None:
    """Root could: a plot written to /dev/null left a plain file there."""
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (pipe, folder):
        with pytest.raises(OSError, match="not a regular file"):
            write_file(path, b"new")
    assert pipe.is_fifo() and folder.is_dir()
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_names_that_are_no_unicode_are_kept(tmp_path: Path) -> None:
    names = ["a", "\udcff", "漢"]
    write_json(tmp_path / "a.json", names)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == names


def test_a_lock_is_held_against_others_and_ends(tmp_path: Path) -> None:
    for path in (tmp_path / "lock", tmp_path):
        with locked(path, wait=False), pytest.raises(BlockingIOError), locked(path, wait=False):
            pass
        with locked(path, wait=False):
            pass


@pytest.mark.parametrize("works", [None, True, False], ids=["Linux", "macOS", "network drive"])
def test_the_cache_of_a_drive_is_emptied_where_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool | None
) -> None:
    calls: list[object] = []

    def fcntl(descriptor: int, command: int) -> None:
        calls.append(command)
        if not works:
            raise OSError

    monkeypatch.delattr(files.fcntl, "F_FULLFSYNC", raising=False)
    if works is not None:
        monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", fcntl)
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: calls.append("fsync"))
    files.flush(3)
    assert calls == {None: ["fsync"], True: [51], False: [51, "fsync"]}[works]


def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, steps = tmp_path / "a.json", []

    def fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        steps.append(("folder" if is_folder else "file", file.exists()))

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.delattr(files.fcntl, "F_FULLFSYNC", raising=False)
    write_file(file, b"{}")
    assert steps == [("file", False), ("folder", True)]


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="a system without /dev/fd")
def test_a_written_file_leaves_no_descriptor_open(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"1")
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        write_file(tmp_path / "a", b"2")
    assert len(os.listdir("/dev/fd")) == before


def test_a_file_that_cannot_be_read_is_not_called_wrong_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read\n.*Is a directory"):
        files.read_object(tmp_path)


def test_a_place_that_cannot_be_written_is_refused_and_another_stays_clean(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Qwen35Error, match="cannot write"):
        files.require_writable(tmp_path / "file" / "x.json")
    files.require_writable(tmp_path / "new" / "x.json")
    assert list((tmp_path / "new").iterdir()) == []


class Endless:
    """A stream like /dev/zero, which notices a reader without a bound."""

    num_read = 0

    def read(self, count: int | None = -1) -> Any:
        assert count is not None and count >= 0, "all of an endless stream is read"
        self.num_read += count
        assert self.num_read < 2**31, "an endless stream is read on and on"
        # As long as so many bytes, without their memory.
        return range(count)


class EndlessFile(PosixPath):
    """Its path."""

    @contextmanager
    def open(self, *mode: Any, **options: Any) -> Iterator[Any]:
        yield Endless()


ENDLESS = EndlessFile("/dev/zero")


@pytest.mark.parametrize(
    "read",
    [
        lambda: media_input.open_media("image", "-", None),
        lambda: chat_commands.read_prompts([]),
        lambda: generate_command.read_tools(ENDLESS),
        lambda: cluster_command.read_hosts(None, ENDLESS),
        lambda: cluster_command.launched("{}", 1, ["generate"], True, None),
        lambda: calibration_text.read_text(ENDLESS),
        lambda: read_examples(ENDLESS, None, max_tokens=9),
        lambda: files.read_object(ENDLESS),
    ],
)
def test_a_stream_without_end_is_refused(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[], object]
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Endless(), isatty=lambda: False))
    with pytest.raises(Qwen35Error, match="too large"):
        read()
