"""Stopped anywhere and started again, a conversion ends with the same bytes as in one go."""

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import assert_nothing_left, write_checkpoint
from everyday import everyday

from qwen35_mlx.convert import convert, journal, shards, tasks, worker
from qwen35_mlx.convert.journal import Journal
from qwen35_mlx.errors import Qwen35Error

ROOT = Path(__file__).resolve().parent.parent
NUM_KILLS = 25
# Reported between two kills, at most; every ten or so are flushed.
MOST_TASKS = 40
PAUSE_S = 0.003
# Small tasks, flushed after each few of them: many moments to be killed in.
SETTINGS = dict(bits=3, group_size=32)
# What a kill leaves in the cache of the system is not lost: no need to wait for the disk.
KNOBS = """
from qwen35_mlx.convert import convert, journal, shards, tasks, worker
plan_module = sys.modules["qwen35_mlx.convert.plan"]
shards.flush = journal.flush = lambda file: None
tasks.SLICE_BYTES, worker.FLUSH_BYTES, plan_module.MAX_SHARD_BYTES = 3000, 8000, 150_000
"""


def make_small(patch: pytest.MonkeyPatch) -> None:
    plan_module = sys.modules["qwen35_mlx.convert.plan"]
    patch.setattr(tasks, "SLICE_BYTES", 3000)
    patch.setattr(worker, "FLUSH_BYTES", 8000)
    patch.setattr(plan_module, "MAX_SHARD_BYTES", 150_000)
    for module in (shards, journal):
        patch.setattr(module, "flush", lambda descriptor: None)


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A source, and the files of its conversion in one go."""
    folder = tmp_path_factory.mktemp("once")
    settings = dict(moe=True, mtp=True, num_shards=3, tokenizer=True, experts="each")
    write_checkpoint(folder / "src", **settings)
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return folder / "src", listing(convert(folder / "src", folder / "whole", **SETTINGS))


@pytest.fixture
def source(tmp_path: Path, once: tuple[Path, dict[str, bytes]]) -> Path:
    return shutil.copytree(once[0], tmp_path / "src")


@pytest.fixture
def expected(once: tuple[Path, dict[str, bytes]]) -> dict[str, bytes]:
    return once[1]


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def work(tmp_path: Path) -> Path:
    return tmp_path / ".out.converting"


@pytest.mark.slow
def test_killed_at_25_random_moments_the_result_is_bit_identical(tmp_path, source, small_tasks):
    calls = []
    out = convert(source, tmp_path / "whole", progress=lambda *c: calls.append(c), **SETTINGS)
    expected = listing(out)
    # So many that even 25 runs do not come to the end.
    assert len(calls) > MOST_TASKS * NUM_KILLS
    script = (
        f"import sys, time\n{KNOBS}\nprint('ready', flush=True)\n"
        f"pause = lambda *call: (print('on', flush=True), time.sleep({PAUSE_S}))\n"
        f"convert(sys.argv[1], sys.argv[2], progress=pause, **{SETTINGS})"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "out")]
    rng = random.Random(5)
    lengths = [0]
    for _ in range(NUM_KILLS):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout and process.stdout.readline() == b"ready\n"
            # By tasks done, not by time, which on a busy machine may not be enough for any.
            for _ in range(rng.randrange(MOST_TASKS)):
                assert process.stdout.readline() == b"on\n"
            time.sleep(rng.uniform(0.0, 2 * PAUSE_S))
            process.kill()
        assert not (tmp_path / "out").exists()
        path = work(tmp_path) / "journal"
        lengths.append(path.stat().st_size if path.exists() else 0)
    # It got on from run to run, and was never back at the start.
    assert len(set(lengths)) > NUM_KILLS // 3
    assert lengths[-1] > 1000
    counts: list[int] = []
    out = convert(source, tmp_path / "out", progress=lambda *c: counts.append(c[0]), **SETTINGS)
    assert counts[0] > 0
    assert listing(out) == expected
    assert_nothing_left(tmp_path, "whole", "out")


@pytest.mark.slow
def test_stopped_at_every_write_the_result_is_bit_identical(
    tmp_path, source, expected, small_tasks, monkeypatch
):
    pwrite, room = os.pwrite, [0]

    def filling(descriptor: int, data: Any, offset: int) -> int:
        room[0] -= len(data)
        if room[0] < 0:
            if len(data) > 1:
                # A full disk takes a part first.
                pwrite(descriptor, memoryview(data)[: len(data) // 2], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", filling)
    num_stops = 0
    rng = random.Random(1)
    while True:
        room[0] = rng.randrange(1000, 60_000)
        try:
            out = convert(source, tmp_path / "out", **SETTINGS)
            break
        except Qwen35Error as error:
            assert "No space left on device" in str(error)
            assert "continues where it stopped" in str(error)
            num_stops += 1
            assert not (tmp_path / "out").exists()
    assert num_stops > 10
    assert listing(out) == expected
    assert_nothing_left(tmp_path, "out")


def mount_tmpfs(folder: Path, nbytes: int) -> bool:
    """A disk of this size at `folder`, if this user may and this system can."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    return bool(shutil.which("mount")) and (
        subprocess.run(command, capture_output=True).returncode == 0
    )


@pytest.mark.slow
def test_a_disk_that_is_full_until_there_is_room_again(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "src", moe=True, mtp=True)
    expected = listing(convert(tmp_path / "src", tmp_path / "whole", **SETTINGS))
    disk = tmp_path / "disk"
    nbytes = sum(map(len, expected.values()))
    if not mount_tmpfs(disk, nbytes * 3 // 5):
        pytest.skip("no right to mount a small disk here")
    try:
        # It says at once that there is no room.
        with pytest.raises(Qwen35Error, match="not enough disk space"):
            convert(tmp_path / "src", disk / "out", **SETTINGS)
        assert list(disk.iterdir()) == []
        monkeypatch.setattr("qwen35_mlx.convert.job._check_space", lambda work, needed_bytes: None)
        monkeypatch.setattr(tasks, "SLICE_BYTES", 3000)
        monkeypatch.setattr(worker, "FLUSH_BYTES", 8000)
        with pytest.raises(Qwen35Error, match=r"(?s)cannot write .*No space left on device"):
            convert(tmp_path / "src", disk / "out", **SETTINGS)
        done = (disk / ".out.converting" / "journal").stat().st_size
        assert done > 100
        with pytest.raises(Qwen35Error, match=r"No space left on device"):
            convert(tmp_path / "src", disk / "out", **SETTINGS)
        subprocess.run(["mount", "-o", f"remount,size={nbytes * 3}", str(disk)], check=True)
        counts = []
        out = convert(
            tmp_path / "src", disk / "out", progress=lambda *c: counts.append(c[0]), **SETTINGS
        )
        assert counts[0] > 0
        assert listing(out) == expected
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def stop_halfway(source: Path, out: Path, **settings: Any) -> None:
    def progress(done: int, total: int, name: str, file: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=progress, **SETTINGS | settings)


@pytest.mark.parametrize(
    ("settings", "got", "expected"),
    everyday(
        [
            (dict(bits=4), "bits=4", "bits=3"),
            (dict(group_size=64), "group_size=64", "group_size=32"),
            (dict(dtype="float16"), "dtype=float16", "dtype=None"),
            (dict(method="search"), "method=search", "method=minmax"),
        ],
        0,
    ),
)
def test_changed_settings_are_refused_with_both_values(
    tmp_path, source, small_tasks, settings, got, expected
):
    stop_halfway(source, tmp_path / "out")
    before = listing(work(tmp_path))
    with pytest.raises(Qwen35Error) as error:
        convert(source, tmp_path / "out", **SETTINGS | settings)
    lines = str(error.value).splitlines()
    assert "was started with other settings" in lines[0]
    assert lines[1].startswith("  got: ") and got in lines[1]
    assert lines[2].startswith("  expected: ") and expected in lines[2]
    assert "to start again" in lines[3]
    assert listing(work(tmp_path)) == before
    assert convert(source, tmp_path / "out", **SETTINGS)


@pytest.mark.slow
def test_a_recipe_that_chooses_differently_is_refused(tmp_path, source, small_tasks):
    def recipe(module: str) -> tuple[int, int]:
        return (bits, 32)

    bits = 3
    stop_halfway(source, tmp_path / "out", recipe=recipe)
    bits = 4
    with pytest.raises(Qwen35Error, match=r"other settings\n  got: plan="):
        convert(source, tmp_path / "out", recipe=recipe, **SETTINGS)


@pytest.mark.parametrize("change", everyday(["a weight", "its header"], 0))
def test_a_source_that_changes_between_start_and_resume_is_refused(
    tmp_path, source, small_tasks, change
):
    stop_halfway(source, tmp_path / "out")
    shard = source / "model-00003-of-00003.safetensors"
    raw = bytearray(shard.read_bytes())
    if change == "a weight":
        raw[-1] ^= 1
    else:
        raw = raw.replace(b'"format": "pt"', b'"format": "xx"')
    shard.write_bytes(raw)
    with pytest.raises(Qwen35Error) as error:
        convert(source, tmp_path / "out", **SETTINGS)
    lines = str(error.value).splitlines()
    assert "the source changed" in lines[0]
    assert all("model-00003-of-00003.safetensors=" in line for line in lines[1:3])
    assert lines[1] != lines[2]


@pytest.mark.slow
def test_what_the_disk_lost_is_converted_again(tmp_path, source, expected, small_tasks):
    stop_halfway(source, tmp_path / "out")
    partial = sorted(work(tmp_path).glob(".*.partial"))
    assert partial
    for path in partial:
        # Power went: blocks that were never written read as zeros.
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 3)
            file.write(bytes(path.stat().st_size // 3))
    assert listing(convert(source, tmp_path / "out", **SETTINGS)) == expected


@pytest.mark.slow
def test_killed_between_the_name_of_a_shard_and_its_line(
    tmp_path, source, expected, small_tasks, monkeypatch
):

    def killed(self: Journal, file: str, digest: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "add_shard", killed)
        convert(source, tmp_path / "out", **SETTINGS)
    assert list(work(tmp_path).glob("model*.safetensors"))
    assert listing(convert(source, tmp_path / "out", **SETTINGS)) == expected


def test_a_journal_ends_at_a_line_that_a_crash_cut_off(tmp_path):
    path = tmp_path / "journal"
    first = Journal(path)
    first.add_tasks([(0, 5), (7, 2**32 - 1)])
    first.add_shard("model.safetensors", "ab" * 32)
    first.close()
    raw = path.read_bytes()
    for length in range(len(raw) + 1):
        path.write_bytes(raw[:length])
        again = Journal(path)
        assert again.tasks.items() <= {0: 5, 7: 2**32 - 1}.items()
        assert len(again.tasks) + len(again.checksums) == raw[:length].count(b"\n")
        again.add_tasks([(3, 4)])
        again.close()
        assert Journal(path).tasks[3] == 4
        assert all(journal.LINE.fullmatch(line) for line in path.read_bytes().splitlines())


@pytest.mark.parametrize("raw", everyday([b"", b"[]", b'{"settings": 1, "files": {}}', b"\xff"], 2))
def test_a_damaged_job_file_is_refused(tmp_path, source, small_tasks, raw):
    stop_halfway(source, tmp_path / "out")
    (work(tmp_path) / "job.json").write_bytes(raw)
    with pytest.raises(Qwen35Error, match=r"job.json is damaged"):
        convert(source, tmp_path / "out", **SETTINGS)


def test_a_line_is_on_the_disk_before_the_next_one(tmp_path, monkeypatch):
    path, flushed = tmp_path / "journal", []
    monkeypatch.setattr(journal, "flush", lambda file: flushed.append(path.read_bytes()))
    kept = Journal(path)
    kept.add_tasks([(0, 7), (1, 9)])
    kept.add_shard("model.safetensors", "0" * 64)
    kept.close()
    lines = path.read_bytes()
    assert flushed == [b"piece 0 7\npiece 1 9\n", lines] and lines.count(b"\n") == 3
