"""Experts in a model's files: the byte ranges of an expert's matrices, and reading them."""

import fcntl
import os
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache, cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..checkpoint.resolver import Part
from ..errors import CheckpointError

# Threads that stay; they use no MLX. So many requests fill the queue of a Mac's SSD.
READERS = 8
SAMPLED_BYTES = 64
# Type in a file -> the type for numpy, and the type of the same bytes for MLX.
STORED = {
    "U8": (np.uint8, mx.uint8),
    "U32": (np.uint32, mx.uint32),
    "F32": (np.float32, mx.float32),
    "F16": (np.float16, mx.float16),
    "BF16": (np.uint16, mx.bfloat16),
}


@cache
def readers() -> ThreadPoolExecutor:
    """The threads that read files."""
    return ThreadPoolExecutor(READERS, "expert-reader")


class ExpertFile:
    """An open file; raises CheckpointError if it changes."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(error) from None
        self._state = self._look()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def bypass_cache(self) -> None:
        """Bypass the page cache (macOS only), because the pool keeps what is read."""
        if option := getattr(fcntl, "F_NOCACHE", None):
            fcntl.fcntl(self._descriptor, option, 1)

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, from `offset` on."""
        left = list(buffers)
        try:
            while left:
                count = os.preadv(self._descriptor, left, offset)
                if not count:
                    raise self._unreadable(f"the file ends at byte {offset}")
                offset += count
                while left and count >= len(left[0]):
                    count -= len(left.pop(0))
                if count:
                    left[0] = left[0][count:]
            changed = self._look() != self._state
        except OSError as error:
            raise self._unreadable(error) from None
        if changed:
            raise self._unreadable("the file was changed while the model runs")

    def _look(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def _unreadable(self, got: object) -> CheckpointError:
        return CheckpointError(
            f"an expert cannot be read from {self.path.name}",
            got=got,
            expected="the file as it was when the model was loaded",
            hint="load the model again; download or convert it again if that fails",
        )


class Slots:
    """Memory of one array for some experts, `[S, ...]`, and the byte ranges of each expert.

    On the CPU floats are float32, as everywhere in the model.
    """

    def __init__(self, part: Part, num_slots: int, on_cpu: bool):
        stored = part.segments[0].tensor.dtype
        self._stored, kind = STORED[stored]
        self.is_cast = on_cpu and stored in ("BF16", "F16")
        held = np.float32 if self.is_cast else self._stored
        shape = (num_slots, *part.shape[1:])
        # numpy has no bfloat16: it sees integers of the same width, and MLX a view of them.
        self._memory = mx.zeros(shape, getattr(mx, np.dtype(held).name))
        self.array = self._memory if self.is_cast else self._memory.view(kind)
        self.nbytes = int(np.prod(part.shape[1:])) * np.dtype(self._stored).itemsize
        self._segments = part.segments
        self._ends = [*accumulate(segment.nbytes for segment in part.segments)]

    @cached_property
    def _view(self) -> np.ndarray:
        """A writable numpy view of the memory."""
        mx.eval(self._memory, self.array)
        return np.array(self._memory, copy=False)

    def ranges(self, expert: int) -> list[tuple[Path, int, int]]:
        """File, offset and length of the bytes of an expert, in order."""
        at, end, found = expert * self.nbytes, (expert + 1) * self.nbytes, []
        index = bisect_right(self._ends, at)
        while at < end:
            segment = self._segments[index]
            begin = self._ends[index] - segment.nbytes
            length = min(end, self._ends[index]) - at
            tensor = segment.tensor
            offset = tensor.offset + segment.start_row * tensor.row_bytes + at - begin
            found.append((tensor.file, offset, length))
            at, index = at + length, index + 1
        return found

    def buffer(self, slot: int) -> np.ndarray:
        """The buffer into which the bytes of an expert are read."""
        row = self._view[slot]
        return np.empty(row.shape, self._stored) if self.is_cast else row

    def finish(self, slot: int, read: np.ndarray) -> None:
        """Cast a read expert into its slot, if the buffer is not the slot itself."""
        if self.is_cast and self._stored is np.uint16:
            # bfloat16 is the upper half of float32.
            np.left_shift(read, 16, out=self._view[slot].view(np.uint32), dtype=np.uint32)
        elif self.is_cast:
            self._view[slot] = read


class ExpertReader:
    """Reads experts of one layer into slots."""

    def __init__(self, slots: Sequence[Slots], files: dict[Path, ExpertFile]):
        self._slots, self._files = slots, files

    @property
    def expert_bytes(self) -> int:
        """Bytes of an expert in the files."""
        return sum(slots.nbytes for slots in self._slots)

    def sample(self, expert: int) -> bytes:
        """The first bytes of each matrix of an expert."""
        data = bytearray(SAMPLED_BYTES * len(self._slots))
        for i, slots in enumerate(self._slots):
            file, offset, length = slots.ranges(expert)[0]
            start = i * SAMPLED_BYTES
            part = memoryview(data)[start : start + min(length, SAMPLED_BYTES)]
            self._files[file].read(offset, [part])
        return bytes(data)

    def read(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Read experts into slots, given as pairs `(expert, slot)`; returns when all are read."""
        filled, jobs = [], []
        for expert, slot in pairs:
            arrays = [slots.buffer(slot) for slots in self._slots]
            views = [memoryview(cast(Any, array)).cast("B") for array in arrays]
            jobs += [
                partial(self._files[f].read, at, b) for f, at, b in self._ranges(expert, views)
            ]
            filled.append((slot, arrays))
        if len(jobs) == 1:
            jobs[0]()
        else:
            run_all(jobs)
        for slot, arrays in filled:
            for slots, array in zip(self._slots, arrays, strict=True):
                slots.finish(slot, array)

    def _ranges(
        self, expert: int, views: Sequence[memoryview]
    ) -> list[tuple[Path, int, list[memoryview]]]:
        """File, offset and buffers of each read; adjacent ranges are one read."""
        places = []
        for slots, view in zip(self._slots, views, strict=True):
            for file, offset, length in slots.ranges(expert):
                places.append((file, offset, view[:length]))
                view = view[length:]
        reads: list[tuple[Path, int, list[memoryview]]] = []
        end = None
        for file, offset, view in sorted(places, key=lambda place: place[:2]):
            if (file, offset) == end:
                reads[-1][2].append(view)
            else:
                reads.append((file, offset, [view]))
            end = file, offset + len(view)
        return reads


def run_all(jobs: Sequence[partial[None]]) -> None:
    """Run the jobs in the threads; raises an error only after all of them have ended."""
    futures: list[Future[None]] = [readers().submit(job) for job in jobs]
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
