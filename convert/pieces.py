"""A plan cut into pieces that are read, converted and written by themselves, file after file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwen35_mlx.headers import FP8, ITEM_BYTES
from qwen35_mlx.resolver import Segment, precision
from qwen35_mlx.tensor_table import Transform

from .plan import Entry, OutputTensor, Plan

SLICE_BYTES = 32 * 2**20
# FP8 becomes float32 before it is rounded.
FP8_GROWTH = 4
# Threads that convert a piece each.
WORKERS = 2
# Measured on Linux: Python with its libraries, and what the plan holds for each piece and tensor.
PROGRAM_BYTES, LISTED_BYTES = 50 * 10**6, 1000
# Twelve float32 copies of a chunk of 2**20 weights.
SEARCH_BYTES = 12 * 4 * 2**20


@dataclass(frozen=True)
class Piece:
    """Rows of one source tensor, and the output rows of one entry that are made of them."""

    index: int
    shard: int
    entry: Entry
    segment: Segment
    row: int

    @property
    def regions(self) -> list[tuple[OutputTensor, int, int]]:
        """Each output tensor with the first byte and the number of bytes that are written."""
        rows = self.segment.stop_row - self.segment.start_row
        found = []
        for tensor in self.entry.tensors:
            row_bytes = tensor.nbytes // self.entry.num_rows
            found.append((tensor, self.row * row_bytes, rows * row_bytes))
        return found

    @property
    def output_bytes(self) -> int:
        return sum(nbytes for _, _, nbytes in self.regions)


def cut(plan: Plan) -> list[Piece]:
    """All pieces in the order of the source files, so that each file is needed for a while only.

    A piece comes when the last of its files does: scales may lie in another file than weights.
    """
    rank = {file: i for i, file in enumerate(plan.source.files)}

    def place(piece: Piece) -> tuple[int, ...]:
        segment, tensor = piece.segment, piece.segment.tensor
        last = max(rank[file] for file in segment.files)
        return last, rank[tensor.file], tensor.offset, segment.start_row

    found = [
        piece
        for shard, whole in enumerate(plan.shards)
        for entry in whole.entries
        for piece in entry_pieces(entry, shard)
    ]
    return [replace(piece, index=i) for i, piece in enumerate(sorted(found, key=place))]


def entry_pieces(entry: Entry, shard: int = 0) -> Iterator[Piece]:
    """The pieces of one entry: at most SLICE_BYTES of the source where rows may part."""
    done = 0
    for segment in entry.segments:
        start, stop = segment.start_row, segment.stop_row
        row_bytes = segment.tensor.row_bytes * (FP8_GROWTH if segment.tensor.dtype == FP8 else 1)
        step = max(SLICE_BYTES // max(row_bytes, 1), 1)
        if entry.transform is Transform.CHANNELS_LAST:
            step = stop - start
        for row in range(start, stop, step):
            part = replace(segment, start_row=row, stop_row=min(row + step, stop))
            yield Piece(0, shard, entry, part, done + row - start)
        done += stop - start


def uses(pieces: Sequence[Piece]) -> dict[Path, tuple[int, int]]:
    """Positions of the first and the last piece that need each file, in the order of the first."""
    found: dict[Path, tuple[int, int]] = {}
    for i, piece in enumerate(pieces):
        for file in sorted(piece.segment.files):
            found[file] = (found.get(file, (i,))[0], i)
    return found


def fetched_bytes(pieces: Sequence[Piece], file_bytes: Mapping[str, int]) -> int:
    """The most bytes of source files on disk at once: those in use, and the next one."""
    when = uses(pieces)
    order = list(when)
    most = 0
    for i, file in enumerate(order):
        begin = when[file][0]
        held = {f for f in order[: i + 1] if when[f][1] >= begin} | set(order[i + 1 : i + 2])
        most = max(most, sum(file_bytes[f.name] for f in held))
    return most


def peak_bytes(plan: Plan, pieces: Sequence[Piece]) -> int:
    """Resident memory of the converter: the program, the lists, and a piece in each thread."""
    listed = LISTED_BYTES * (len(pieces) + len(plan.source.tensors))
    return PROGRAM_BYTES + listed + WORKERS * max(map(_held_bytes, pieces), default=0)


def _held_bytes(piece: Piece) -> int:
    """The most that one piece takes while it is converted."""
    segment, entry = piece.segment, piece.entry
    stored, num_weights = segment.nbytes, segment.nbytes // ITEM_BYTES[segment.tensor.dtype]
    # FP8: bytes, float32 in numpy and in MLX, bfloat16.
    held = stored + num_weights * (4 + 4 + 2) if segment.scale else 2 * stored
    if entry.dtype != precision(segment.tensor):
        # The cast, and what looks for numbers out of range.
        held += num_weights * (ITEM_BYTES[entry.dtype] + 3)
    if entry.bits is None:
        return held
    if entry.method == "search":
        held += SEARCH_BYTES + piece.output_bytes
    return held + piece.output_bytes
