"""The work of a plan: read a piece, check it, transform it, quantize or cast it, write it."""

import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from qwen35_mlx.errors import CheckpointError, Qwen35Error
from qwen35_mlx.headers import FP8
from qwen35_mlx.quant.affine import largest_bits
from qwen35_mlx.quant.calibrate import Calibration
from qwen35_mlx.resolver import Segment
from qwen35_mlx.tensor_table import Transform

from .calibrated import quantize_rows
from .fp8 import dequantize_fp8, float32, scale_rows
from .hub import Fetcher
from .journal import Journal
from .pieces import WORKERS, Piece, entry_pieces, uses
from .plan import Entry, Plan
from .shards import ShardWriter, sha256
from .source import as_mlx, read_rows

MLX_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
# Magnitude bits of a stored number, and the least that is not finite.
NOT_FINITE = {
    "F32": (0x7FFFFFFF, 0x7F800000),
    "F16": (0x7FFF, 0x7C00),
    "BF16": (0x7FFF, 0x7F80),
    FP8: (0x7F, 0x7F),
}
# Work that a crash may cost: what was written since files and journal were last flushed.
FLUSH_BYTES, FLUSH_SECONDS = 2**30, 20.0

# Source bytes done, source bytes in all, source tensor or what is waited for, source file.
Progress = Callable[[int, int, str, str], None]


@cache
def threads() -> ThreadPoolExecutor:
    """The threads of all conversions: MLX never frees what it sets up for a thread."""
    return ThreadPoolExecutor(WORKERS, thread_name_prefix="convert")


@dataclass
class Stream:
    """Converts what the journal does not name yet.

    Holds WORKERS pieces of the source, at most SLICE_BYTES each, and what is made of them.
    """

    plan: Plan
    pieces: Sequence[Piece]
    folder: Path
    journal: Journal
    fetcher: Fetcher | None
    progress: Progress | None
    calibration: Calibration | None

    def __post_init__(self) -> None:
        self.pool = threads()
        # Started and not yet written, in order.
        self.running: deque[tuple[Piece, Future]] = deque()
        self.writers: dict[int, ShardWriter] = {}
        self.hashes: dict[int, Future[str]] = {}
        self.unflushed: list[tuple[Piece, int]] = []
        self.unflushed_bytes, self.flushed_at = 0, time.monotonic()
        self.done_bytes, self.total_bytes = 0, self.plan.source_bytes
        # Kernels of a GPU want one thread; a CPU runs as many as it has cores.
        self.in_main = mx.default_device() == mx.Device(mx.gpu)

    def run(self) -> dict[str, str]:
        """Do it; returns the SHA-256 of each shard by name."""
        try:
            self._run()
        finally:
            self._close()
        return self.journal.checksums

    def _run(self) -> None:
        todo = self._resume()
        # Pieces that a shard waits for, and that need a file.
        self.waiting = Counter(piece.shard for piece in todo)
        self.needed = Counter(file for piece in todo for file in piece.segment.files)
        if todo:
            self._tell(todo[0].segment)
        for shard in range(len(self.plan.shards)):
            if not self.waiting[shard]:
                self._finish(shard)
        if self.fetcher:
            self.fetcher.start([file.name for file in uses(todo)])
        here: set[Path] = set()
        for piece in todo:
            if self.fetcher and not piece.segment.files <= here:
                # A file of the source may go before the next one comes.
                while self.running:
                    self._complete()
                self._flush()
                self._wait(piece)
                here |= piece.segment.files
            if len(self.running) > WORKERS:
                self._complete()
            self.running.append((piece, self._start(piece)))
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

    def _resume(self) -> list[Piece]:
        """The pieces still to be done. What the journal names but the disk lost is among them."""
        todo = []
        for piece in self.pieces:
            file = self.plan.shards[piece.shard].file
            if file in self.journal.checksums:
                self.done_bytes += piece.segment.nbytes
                continue
            crc = self.journal.pieces.get(piece.index)
            if crc is not None and ((self.folder / file).exists() or self._written(piece) == crc):
                self.done_bytes += piece.segment.nbytes
                if piece.shard in self.writers:
                    self.writers[piece.shard].missing_bytes -= piece.output_bytes
            else:
                todo.append(piece)
        return todo

    def _written(self, piece: Piece) -> int:
        """The checksum of what lies where this piece goes."""
        crc = 0
        for tensor, start, nbytes in piece.regions:
            crc = zlib.crc32(self._writer(piece.shard).read(tensor.name, start, nbytes), crc)
        return crc

    def _writer(self, shard: int) -> ShardWriter:
        if shard not in self.writers:
            planned = self.plan.shards[shard]
            self.writers[shard] = ShardWriter(self.folder / planned.file, planned.tensors)
        return self.writers[shard]

    def _wait(self, piece: Piece) -> None:
        assert self.fetcher is not None
        for file in sorted(piece.segment.files):
            while not self.fetcher.ready(file.name, timeout=0.5):
                self._tell(piece.segment, self.fetcher.state)

    def _start(self, piece: Piece) -> Future:
        writer = self._writer(piece.shard)
        if self.in_main:
            return self.pool.submit(_read, piece.segment)
        return self.pool.submit(_whole, writer, piece, self.calibration)

    def _complete(self) -> None:
        piece, future = self.running.popleft()
        result = future.result()
        if self.in_main:
            parts = _convert(piece, result, self.calibration)
            result = _write(self._writer(piece.shard), piece, parts)
        self.unflushed.append((piece, result))
        self.unflushed_bytes += piece.output_bytes
        self.done_bytes += piece.segment.nbytes
        self._tell(piece.segment)
        late = time.monotonic() - self.flushed_at > FLUSH_SECONDS
        if self.unflushed_bytes >= FLUSH_BYTES or late:
            self._flush()

    def _flush(self) -> None:
        """First the data, then the journal; then files that nobody needs any more may go."""
        for shard in sorted({piece.shard for piece, _ in self.unflushed}):
            self.writers[shard].sync()
        self.journal.add_pieces((piece.index, crc) for piece, crc in self.unflushed)
        flushed, self.unflushed = self.unflushed, []
        self.unflushed_bytes, self.flushed_at = 0, time.monotonic()
        for piece, _ in flushed:
            for file in piece.segment.files:
                self.needed[file] -= 1
                if not self.needed[file] and self.fetcher:
                    self.fetcher.release(file.name)
            writer = self.writers[piece.shard]
            writer.missing_bytes -= piece.output_bytes
            self.waiting[piece.shard] -= 1
            if not self.waiting[piece.shard]:
                self._finish(piece.shard)
        self._collect(last=False)

    def _finish(self, shard: int) -> None:
        """Name a shard of which all pieces are done."""
        file = self.plan.shards[shard].file
        if file in self.journal.checksums:
            return
        if (self.folder / file).exists():
            # Stopped between the new name and the journal.
            self.hashes[shard] = self.pool.submit(sha256, self.folder / file)
        else:
            self.hashes[shard] = self.pool.submit(self._writer(shard).finish)

    def _collect(self, last: bool) -> None:
        for shard, future in list(self.hashes.items()):
            if last or future.done():
                self.journal.add_shard(self.plan.shards[shard].file, future.result())
                del self.hashes[shard]
                self.writers.pop(shard, None)

    def _tell(self, segment: Segment, waiting: str = "") -> None:
        if self.progress:
            name, file = segment.tensor.name, segment.tensor.file.name
            self.progress(self.done_bytes, self.total_bytes, waiting or name, file)


def read_entry(entry: Entry) -> mx.array:
    """The whole tensor of an entry that is not quantized, as it would be written."""
    parts: list[mx.array] = []
    for piece in entry_pieces(entry):
        parts += _convert(piece, _read(piece.segment))
    return mx.concatenate(parts).reshape(entry.shape)


def _whole(writer: ShardWriter, piece: Piece, calibration: Calibration | None) -> int:
    crc = _write(writer, piece, _convert(piece, _read(piece.segment), calibration))
    # Pieces of the next tensor have other sizes: freed buffers would pile up.
    mx.clear_cache()
    return crc


def _read(segment: Segment) -> np.ndarray:
    """The rows of a segment as stored, or FP8 times its scales in float32."""
    rows = read_rows(segment.tensor, segment.start_row, segment.stop_row)
    _check_finite(rows, segment.tensor.dtype, segment)
    if segment.scale is None or segment.block is None:
        return rows
    at = scale_rows(segment)
    scales = read_rows(segment.scale, int(at[0]), int(at[-1]) + 1)
    _check_finite(scales, segment.scale.dtype, segment)
    factors = float32(scales, segment.scale.dtype)[at - at[0]]
    return dequantize_fp8(rows, factors, segment.block[1])


def _convert(
    piece: Piece, rows: np.ndarray, calibration: Calibration | None = None
) -> list[mx.array]:
    """The output rows of a piece: the weight, or weight, scales and biases."""
    entry, segment = piece.entry, piece.segment
    if segment.tensor.dtype not in NOT_FINITE:
        # Quantized already: bytes that nothing is known of.
        return [mx.array(rows)]
    if segment.scale is None:
        x = as_mlx(rows, segment.tensor.dtype)
    else:
        x = mx.array(rows).astype(mx.bfloat16)
    if entry.transform is Transform.ADD_ONE:
        # fp32: the sum needs digits that bf16 has no room for, and dtype may be float32.
        x = x.astype(mx.float32) + 1
    elif entry.transform is Transform.CHANNELS_LAST:
        x = x.reshape(segment.tensor.shape).moveaxis(1, -1)
    dtype = MLX_DTYPES[entry.dtype]
    if x.dtype != dtype:
        x = x.astype(dtype)
        if not mx.all(mx.isfinite(x)).item():
            raise _unusable(segment, f"has values out of the range of {dtype}")
    if entry.method is None:
        parts = [x]
    else:
        try:
            parts = list(quantize_rows(x, entry, piece.row, calibration))
        except Qwen35Error as error:
            raise CheckpointError(f"{segment.tensor.name} cannot be quantized: {error}") from error
    parts = [mx.contiguous(part) for part in parts]
    mx.eval(parts)
    return parts


def _write(writer: ShardWriter, piece: Piece, parts: Sequence[mx.array]) -> int:
    """Write what came of a piece; returns its CRC-32."""
    crc = 0
    for (tensor, start, nbytes), part in zip(piece.regions, parts, strict=True):
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


def _check_finite(rows: np.ndarray, dtype: str, segment: Segment) -> None:
    if dtype not in NOT_FINITE:
        return
    mask, limit = NOT_FINITE[dtype]
    if largest_bits(rows.view(f"<u{rows.itemsize}"), mask) >= limit:
        raise _unusable(segment, "holds values that are not finite")


def _unusable(segment: Segment, what: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {segment.tensor.name} {what}",
        got=f"nan or inf in rows {segment.start_row} to {segment.stop_row - 1}",
        expected="finite numbers",
        hint=f"look at {segment.tensor.file.name}: the download may be damaged",
    )
