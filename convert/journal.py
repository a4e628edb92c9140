"""The settings and the progress of a conversion on disk, so that it can resume after any stop."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.files import flush, sync_folder, write_json

from .shards import write_all

JOB_FILE, JOURNAL_FILE = "job.json", "journal"
# The file format calls a task "piece".
LINE = re.compile(rb"piece (\d+) (\d+)|shard (\S+) ([0-9a-f]{64})")


class Journal:
    """Finished tasks with the CRC-32 of their output, and finished shards with their SHA-256.

    The caller flushes the data before it adds them. Reading stops at the first incomplete line.
    """

    def __init__(self, path: Path):
        self.tasks: dict[int, int] = {}
        self.checksums: dict[str, str] = {}
        raw = path.read_bytes() if path.exists() else b""
        valid_bytes = 0
        for line in raw.splitlines(keepends=True):
            match = LINE.fullmatch(line[:-1])
            if not match or not line.endswith(b"\n"):
                break
            piece, crc, shard, digest = match.groups()
            if piece:
                self.tasks[int(piece)] = int(crc)
            else:
                self.checksums[shard.decode()] = digest.decode()
            valid_bytes += len(line)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._file, valid_bytes)
        self._end = valid_bytes

    def add_tasks(self, done: Iterable[tuple[int, int]]) -> None:
        """Record finished tasks: pairs of index and CRC-32."""
        new = dict(done)
        self._add("".join(f"piece {index} {crc}\n" for index, crc in new.items()))
        self.tasks |= new

    def add_shard(self, file: str, digest: str) -> None:
        """Record a shard that has its final name, and its SHA-256."""
        self._add(f"shard {file} {digest}\n")
        self.checksums[file] = digest

    def _add(self, lines: str) -> None:
        data = lines.encode()
        write_all(self._file, data, self._end)
        flush(self._file)
        # Not before the write has succeeded: the next one then overwrites an incomplete line.
        self._end += len(data)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def open_job(work: Path, out: Path, settings: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Start a job in the folder `work`, or check that the job there has these settings and files.

    Raises Qwen35Error if settings or source files differ.
    """
    path = work / JOB_FILE
    if not path.exists():
        write_json(path, {"settings": dict(settings), "files": dict(files)})
        sync_folder(work)
        return
    started = read_job(work)
    restart = f"or remove {work}, which holds the finished part, to start again"
    _refuse_difference(
        f"the conversion to {out} was started with other settings",
        started["settings"], settings, f"repeat the first command, {restart}",
    )  # fmt: skip
    _refuse_difference(
        f"the source changed after the conversion to {out} was started",
        started["files"], files, f"restore the first version, {restart}",
    )  # fmt: skip


def read_job(work: Path) -> dict[str, Any]:
    """The job file of a folder; `{}` if there is none. Raises Qwen35Error if it is damaged."""
    path = work / JOB_FILE
    try:
        job = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(job["settings"], dict) and isinstance(job["files"], dict):
            return dict(job)
        raise ValueError("settings and files are not objects")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Qwen35Error(f"cannot use the work folder {work}", got=error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise Qwen35Error(
            f"{path} is damaged", got=error, hint=f"remove {work} to start again"
        ) from None


def _refuse_difference(
    what: str, started: Mapping[str, Any], now: Mapping[str, Any], hint: str
) -> None:
    keys = [k for k in {**started, **now} if started.get(k) != now.get(k)]
    if keys:
        raise Qwen35Error(
            what,
            got=", ".join(f"{k}={now.get(k)}" for k in keys[:4]),
            expected=", ".join(f"{k}={started.get(k)}" for k in keys[:4]),
            hint=hint,
        )
