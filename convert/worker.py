"""Runs the tasks of a plan: reads, converts and writes rows, and records them in the journal."""

import time
import zlib
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import mlx.core as mx

from qwen35_mlx.checkpoint.resolver import Segment
from qwen35_mlx.progress import ByteProgress

from .hub import Fetcher
from .journal import Journal
from .plan import Plan
from .shards import ShardWriter, raw_bytes, sha256
from .tasks import WORKERS, Task, uses
from .transform import Known, read_segment, transform

# Maximum output, and time, between two flushes of files and journal: a crash loses this work.
FLUSH_BYTES, FLUSH_SECONDS = 2**30, 20.0


@cache
def threads() -> ThreadPoolExecutor:
    """The threads of all conversions in this process: MLX never frees what a thread allocated."""
    return ThreadPoolExecutor(WORKERS, thread_name_prefix="convert")


@dataclass
class Worker:
    """Runs the tasks that are not in the journal yet.

    Holds WORKERS slices of the source, of at most SLICE_BYTES each, and their output.
    """

    plan: Plan
    tasks: Sequence[Task]
    folder: Path
    journal: Journal
    fetcher: Fetcher | None
    progress: ByteProgress | None
    known: Known

    def __post_init__(self) -> None:
        self.pool = threads()
        # Started tasks in order, with their results.
        self.running: deque[tuple[Task, Future]] = deque()
        self.writers: dict[int, ShardWriter] = {}
        self.hashes: dict[int, Future[str]] = {}
        self.unflushed: list[tuple[Task, int]] = []
        self.unflushed_bytes, self.flushed_at = 0, time.monotonic()
        self.done_bytes, self.total_bytes = 0, self.plan.source_bytes
        # On a GPU, only the main thread converts; on a CPU, each thread does.
        self.in_main = mx.default_device() == mx.Device(mx.gpu)

    def run(self) -> dict[str, str]:
        """Run all tasks; returns the SHA-256 of each shard by file name."""
        try:
            self._run()
        finally:
            self._close()
        return self.journal.checksums

    def _run(self) -> None:
        todo = self._resume()
        # Number of unfinished tasks of each shard, and of each source file.
        self.left_of_shard = Counter(task.shard for task in todo)
        self.left_of_file = Counter(file for task in todo for file in task.segment.files)
        if todo:
            self._report(todo[0].segment)
        for shard in range(len(self.plan.shards)):
            if not self.left_of_shard[shard]:
                self._finish(shard)
        if self.fetcher:
            self.fetcher.start([file.name for file in uses(todo)])
        fetched: set[Path] = set()
        for task in todo:
            if self.fetcher and not task.segment.files <= fetched:
                # Delete the source files that are done before the next one is fetched.
                while self.running:
                    self._complete()
                self._flush()
                self._fetch(task.segment)
                fetched |= task.segment.files
            if len(self.running) > WORKERS:
                self._complete()
            self.running.append((task, self._start(task)))
        while self.running:
            self._complete()
        self._flush()
        self._collect(last=True)

    def _close(self) -> None:
        """Stop all work. The next run repeats the tasks that were not flushed."""
        futures = [*(future for _, future in self.running), *self.hashes.values()]
        wait([future for future in futures if not future.cancel()])
        if self.fetcher:
            self.fetcher.stop()
        for writer in self.writers.values():
            writer.close()
        mx.clear_cache()

    def _resume(self) -> list[Task]:
        """The unfinished tasks, and those whose output on disk is not what the journal says."""
        todo = []
        for task in self.tasks:
            if not self._is_done(task):
                todo.append(task)
                continue
            self.done_bytes += task.segment.nbytes
            if task.shard in self.writers:
                self.writers[task.shard].missing_bytes -= task.output_bytes
        return todo

    def _is_done(self, task: Task) -> bool:
        file = self.plan.shards[task.shard].file
        if file in self.journal.checksums:
            return True
        recorded = self.journal.tasks.get(task.index)
        if recorded is None:
            return False
        if (self.folder / file).exists():
            return True
        crc = 0
        for tensor, start, nbytes in task.outputs():
            crc = zlib.crc32(self._writer(task.shard).read(tensor.name, start, nbytes), crc)
        return crc == recorded

    def _writer(self, shard: int) -> ShardWriter:
        if shard not in self.writers:
            planned = self.plan.shards[shard]
            self.writers[shard] = ShardWriter(self.folder / planned.file, planned.tensors)
        return self.writers[shard]

    def _fetch(self, segment: Segment) -> None:
        assert self.fetcher is not None
        for file in sorted(segment.files):
            while not self.fetcher.ready(file.name, timeout=0.5):
                self._report(segment, self.fetcher.state)

    def _start(self, task: Task) -> Future:
        # Opened in this thread, so that no file is opened twice.
        writer = self._writer(task.shard)
        if self.in_main:
            return self.pool.submit(read_segment, task.segment)
        return self.pool.submit(_convert, writer, task, self.known)

    def _complete(self) -> None:
        task, future = self.running.popleft()
        result = future.result()
        if self.in_main:
            parts = transform(task, result, self.known)
            result = _write(self._writer(task.shard), task, parts)
        self.unflushed.append((task, result))
        self.unflushed_bytes += task.output_bytes
        self.done_bytes += task.segment.nbytes
        self._report(task.segment)
        is_due = time.monotonic() - self.flushed_at > FLUSH_SECONDS
        if self.unflushed_bytes >= FLUSH_BYTES or is_due:
            self._flush()

    def _flush(self) -> None:
        """Flush the data, then the journal; then release source files that no task needs."""
        for shard in sorted({task.shard for task, _ in self.unflushed}):
            self.writers[shard].sync()
        self.journal.add_tasks((task.index, crc) for task, crc in self.unflushed)
        flushed, self.unflushed = self.unflushed, []
        self.unflushed_bytes, self.flushed_at = 0, time.monotonic()
        for task, _ in flushed:
            for file in task.segment.files:
                self.left_of_file[file] -= 1
                if not self.left_of_file[file] and self.fetcher:
                    self.fetcher.release(file.name)
            self.writers[task.shard].missing_bytes -= task.output_bytes
            self.left_of_shard[task.shard] -= 1
            if not self.left_of_shard[task.shard]:
                self._finish(task.shard)
        self._collect(last=False)

    def _finish(self, shard: int) -> None:
        """Start the renaming and hashing of a shard whose tasks are all done."""
        file = self.plan.shards[shard].file
        if file in self.journal.checksums:
            return
        # An earlier run may have been killed between renaming and recording.
        is_named = (self.folder / file).exists()
        finish = partial(sha256, self.folder / file) if is_named else self._writer(shard).finish
        self.hashes[shard] = self.pool.submit(finish)

    def _collect(self, last: bool) -> None:
        """Record the shards that are renamed and hashed; with `last`, wait for all of them."""
        for shard, future in list(self.hashes.items()):
            if last or future.done():
                self.journal.add_shard(self.plan.shards[shard].file, future.result())
                del self.hashes[shard]
                self.writers.pop(shard, None)

    def _report(self, segment: Segment, state: str = "") -> None:
        if self.progress:
            name, file = segment.tensor.name, segment.tensor.file.name
            self.progress(self.done_bytes, self.total_bytes, state or name, file)


def _convert(writer: ShardWriter, task: Task, known: Known) -> int:
    """Read, convert and write a task; returns the CRC-32 of its output."""
    rows = read_segment(task.segment)
    crc = _write(writer, task, transform(task, rows, known))
    # Tasks of the next tensor need buffers of other sizes, so MLX would keep unused ones.
    mx.clear_cache()
    return crc


def _write(writer: ShardWriter, task: Task, parts: Sequence[mx.array]) -> int:
    """Write the output of a task; returns its CRC-32."""
    crc = 0
    for (tensor, start, nbytes), part in zip(task.outputs(), parts, strict=True):
        data = raw_bytes(part)
        if len(data) != nbytes:
            raise RuntimeError(f"{tensor.name}: {len(data)} bytes instead of {nbytes}")
        writer.write(tensor.name, start, data)
        crc = zlib.crc32(data, crc)
    return crc
