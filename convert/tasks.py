"""Cuts a plan into independent tasks, ordered by source file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwen35_mlx.checkpoint.headers import FP8, ITEM_BYTES
from qwen35_mlx.checkpoint.resolver import Segment, precision
from qwen35_mlx.checkpoint.tensor_table import Transform

from .plan import Entry, OutputTensor, Plan

# Maximum bytes that a task reads.
SLICE_BYTES = 32 * 2**20
# FP8 is converted to float32.
FP8_GROWTH = 4
# Number of threads; each runs one task at a time.
WORKERS = 2
# Measured on Linux: memory of Python with its libraries, and of each task and tensor in the plan.
PROGRAM_BYTES, LISTED_BYTES = 50 * 10**6, 1000
# Memory of the method "search": twelve float32 copies of 2**20 weights.
SEARCH_BYTES = 12 * 4 * 2**20


@dataclass(frozen=True)
class Task:
    """Converts rows of one source tensor to rows of an entry's output tensors, from `row` on."""

    index: int
    shard: int
    entry: Entry
    segment: Segment
    row: int

    @property
    def num_rows(self) -> int:
        return self.segment.stop_row - self.segment.start_row

    @property
    def output_bytes(self) -> int:
        return self.entry.output_bytes // self.entry.num_rows * self.num_rows

    def outputs(self) -> list[tuple[OutputTensor, int, int]]:
        """Each output tensor, with the first byte and the number of bytes to write."""
        row_bytes = [(t, t.nbytes // self.entry.num_rows) for t in self.entry.tensors]
        return [(t, self.row * nbytes, self.num_rows * nbytes) for t, nbytes in row_bytes]


def cut(plan: Plan) -> list[Task]:
    """All tasks of a plan, ordered so that each source file is used for a short time.

    The key is the last file of a task: scales and weights may be in different files.
    """
    rank = {file: i for i, file in enumerate(plan.source.files)}

    def order(task: Task) -> tuple[int, ...]:
        segment, tensor = task.segment, task.segment.tensor
        last = max(rank[file] for file in segment.files)
        return last, rank[tensor.file], tensor.offset, segment.start_row

    tasks = [
        task
        for index, shard in enumerate(plan.shards)
        for entry in shard.entries
        for task in entry_tasks(entry, index)
    ]
    return [replace(task, index=i) for i, task in enumerate(sorted(tasks, key=order))]


def entry_tasks(entry: Entry, shard: int = 0) -> Iterator[Task]:
    """The tasks of one entry. Each reads at most SLICE_BYTES, unless it needs all rows at once."""
    done = 0
    for segment in entry.segments:
        start, stop = segment.start_row, segment.stop_row
        row_bytes = segment.tensor.row_bytes * (FP8_GROWTH if segment.tensor.dtype == FP8 else 1)
        step = max(SLICE_BYTES // max(row_bytes, 1), 1)
        if entry.transform is Transform.CHANNELS_LAST:
            step = stop - start
        for row in range(start, stop, step):
            part = replace(segment, start_row=row, stop_row=min(row + step, stop))
            yield Task(0, shard, entry, part, done + row - start)
        done += stop - start


def uses(tasks: Sequence[Task]) -> dict[Path, tuple[int, int]]:
    """The indices of the first and the last task that need each file, sorted by the first."""
    first: dict[Path, int] = {}
    last: dict[Path, int] = {}
    for i, task in enumerate(tasks):
        for file in sorted(task.segment.files):
            first.setdefault(file, i)
            last[file] = i
    return {file: (first[file], last[file]) for file in first}


def fetched_bytes(tasks: Sequence[Task], file_bytes: Mapping[str, int]) -> int:
    """Peak bytes of downloaded source files on disk: the files in use, and the next one."""
    periods = list(uses(tasks).items())
    peak = 0
    for i, (_, (now, _)) in enumerate(periods):
        on_disk = [file for file, (_, last) in periods[: i + 1] if last >= now]
        on_disk += [file for file, _ in periods[i + 1 : i + 2]]
        peak = max(peak, sum(file_bytes[file.name] for file in on_disk))
    return peak


def peak_bytes(plan: Plan, tasks: Sequence[Task]) -> int:
    """Peak memory of a conversion: the program, its lists, and one task in each thread."""
    listed = LISTED_BYTES * (len(tasks) + len(plan.source.tensors))
    return PROGRAM_BYTES + listed + WORKERS * max(map(_held_bytes, tasks))


def _held_bytes(task: Task) -> int:
    """Peak memory of a task."""
    segment, entry = task.segment, task.entry
    stored, num_weights = segment.nbytes, segment.nbytes // ITEM_BYTES[segment.tensor.dtype]
    # FP8: bytes, float32 in numpy and in MLX, bfloat16.
    held = stored + num_weights * (4 + 4 + 2) if segment.scale else 2 * stored
    if entry.dtype != precision(segment.tensor):
        # The cast, and the check for values outside of the range.
        held += num_weights * (ITEM_BYTES[entry.dtype] + 3)
    if entry.bits is None:
        return held
    if entry.method == "search":
        held += SEARCH_BYTES + task.output_bytes
    return held + task.output_bytes
