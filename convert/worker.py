"""Does the tasks of a plan: reads, converts and writes rows, and records them in the journal."""

import time
import zlib
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from qwen35_mlx.checkpoint.resolver import Segment
from qwen35_mlx.progress import ByteProgress

from .hub import Fetcher
from .journal import Journal
from .plan import Plan
from .shards import ShardWriter, sha256
from .tasks import WORKERS, Task, uses
from .transform import Known, read_segment, transform

# Work that a crash may cost: what was written since files and journal were last flushed.
FLUSH_BYTES, FLUSH_SECONDS = 2**30, 20.0


@cache
def threads() -> ThreadPoolExecutor:
    """The threads of all conversions: MLX never frees what it sets up for a thread."""
    return ThreadPoolExecutor(WORKERS, thread_name_prefix="convert")


@dataclass
class Worker:
    """Does the tasks that the journal does not contain yet.

    Holds WORKERS slices of the source, at most SLICE_BYTES each, and their output.
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
        # Started and not yet written, in order.
        self.running: deque[tuple[Task, Future]] = deque()
        self.writers: dict[int, ShardWriter] = {}
        self.hashes: dict[int, Future[str]] = {}
        self.unflushed: list[tuple[Task, int]] = []
        self.unflushed_bytes, self.flushed_at = 0, time.monotonic()
        self.done_bytes, self.total_bytes = 0, self.plan.source_bytes
        # Kernels of a GPU want one thread; a CPU runs as many as it has cores.
        self.in_main = mx.default_device() == mx.Device(mx.gpu)

    def run(self) -> dict[str, str]:
        """Do all tasks; returns the SHA-256 of each shard by name."""
        try:
            self._run()
        finally:
            self._close()
        return self.journal.checksums

    def _run(self) -> None:
        todo = self._resume()
        # Unfinished tasks of each shard, and of each source file.
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
                # Files of the source that are done are deleted before the next one is fetched.
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
        """Stop the threads; what is written but not flushed is converted again next time."""
        futures = [*(future for _, future in self.running), *self.hashes.values()]
        wait([future for future in futures if not future.cancel()])
        if self.fetcher:
            self.fetcher.stop()
        for writer in self.writers.values():
            writer.close()
        mx.clear_cache()

    def _resume(self) -> list[Task]:
        """The unfinished tasks, with those whose output the disk lost."""
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
        # Opened here: threads must not open one file twice.
        writer = self._writer(task.shard)
        if self.in_main:
            return self.pool.submit(read_segment, task.segment)
        return self.pool.submit(_do, writer, task, self.known)

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
        """Flush the data, then the journal; then release files that no task needs any more."""
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
        """Start to name and hash a shard whose tasks are all done."""
        file = self.plan.shards[shard].file
        if file in self.journal.checksums:
            return
        # A file that has its name already: an earlier run was killed before it was recorded.
        is_named = (self.folder / file).exists()
        finish = partial(sha256, self.folder / file) if is_named else self._writer(shard).finish
        self.hashes[shard] = self.pool.submit(finish)

    def _collect(self, last: bool) -> None:
        """Record the shards that have their name; with `last`, wait for all of them."""
        for shard, future in list(self.hashes.items()):
            if last or future.done():
                self.journal.add_shard(self.plan.shards[shard].file, future.result())
                del self.hashes[shard]
                self.writers.pop(shard, None)

    def _report(self, segment: Segment, state: str = "") -> None:
        if self.progress:
            name, file = segment.tensor.name, segment.tensor.file.name
            self.progress(self.done_bytes, self.total_bytes, state or name, file)


def _do(writer: ShardWriter, task: Task, known: Known) -> int:
    rows = read_segment(task.segment)
    crc = _write(writer, task, transform(task, rows, known))
    # Tasks of the next tensor have other sizes: freed buffers would pile up.
    mx.clear_cache()
    return crc


def _write(writer: ShardWriter, task: Task, parts: Sequence[mx.array]) -> int:
    """Write the output of a task; returns its CRC-32."""
    crc = 0
    for (tensor, start, nbytes), part in zip(task.outputs(), parts, strict=True):
        data = _bytes(part)
        if len(data) != nbytes:
            raise RuntimeError(f"{tensor.name}: {len(data)} bytes instead of {nbytes}")
        writer.write(tensor.name, start, data)
        crc = zlib.crc32(data, crc)
    return crc


def _bytes(part: mx.array) -> memoryview:
    if part.dtype == mx.bfloat16:
        part = part.view(mx.uint16)
    return np.asarray(part).reshape(-1).view(np.uint8).data
