"""The work of a plan: read a slice, check it, transform it, quantize or cast it, write it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from qwen35_mlx.errors import CheckpointError
from qwen35_mlx.quant import quantize

from .names import Transform
from .plan import Entry, Plan
from .shards import ShardWriter
from .source import Segment, read_rows

SLICE_BYTES = 64 * 2**20
MLX_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}

# Source bytes done, source bytes in all, name of the source tensor.
Progress = Callable[[int, int, str], None]


def stream(plan: Plan, folder: Path, progress: Progress | None = None) -> dict[str, str]:
    """Stream tensors into shards; holds at most one source slice and what is made of it.

    Returns the SHA-256 of each file by name.
    """
    done_bytes, total_bytes = 0, plan.source_bytes
    checksums = {}
    for shard in plan.shards:
        with ShardWriter(folder / shard.file, shard.tensors) as writer:
            for entry in shard.entries:
                for piece in _slices(entry):
                    for tensor, rows in zip(
                        entry.tensors, _convert(entry, piece, plan.method), strict=True
                    ):
                        writer.write(tensor.name, rows)
                    done_bytes += piece.nbytes
                    if progress:
                        progress(done_bytes, total_bytes, piece.tensor.name)
                # Slices of the next tensor have other sizes: freed buffers would pile up.
                mx.clear_cache()
        checksums[shard.file] = writer.sha256
    return checksums


def read_entry(entry: Entry) -> mx.array:
    """The whole tensor of an entry that is not quantized, as it would be written."""
    pieces = []
    for piece in _slices(entry):
        pieces += _convert(entry, piece, None)
        mx.eval(pieces[-1])
    return mx.concatenate(pieces).reshape(entry.shape)


def _slices(entry: Entry) -> Iterator[Segment]:
    """Whole rows of one source tensor, at most SLICE_BYTES of them where rows may part."""
    for segment in entry.segments:
        tensor, start, stop = segment.tensor, segment.start_row, segment.stop_row
        step = max(SLICE_BYTES // max(tensor.row_bytes, 1), 1)
        if entry.transform is Transform.CHANNELS_LAST:
            step = stop - start
        for row in range(start, stop, step):
            yield Segment(tensor, row, min(row + step, stop))


def _convert(entry: Entry, piece: Segment, method: str | None) -> tuple[mx.array, ...]:
    """The output rows of a slice: the weight, or weight, scales and biases."""
    rows = read_rows(piece.tensor, piece.start_row, piece.stop_row)
    _check_finite(rows, piece, "holds values that are not finite")
    if entry.transform is Transform.ADD_ONE:
        # fp32: the sum needs digits that bf16 has no room for, and dtype may be float32.
        rows = rows.astype(mx.float32) + 1
    elif entry.transform is Transform.CHANNELS_LAST:
        rows = mx.contiguous(rows.reshape(piece.tensor.shape).moveaxis(1, -1))
    dtype = MLX_DTYPES[entry.dtype]
    if rows.dtype != dtype:
        rows = rows.astype(dtype)
        _check_finite(rows, piece, f"has values out of the range of {dtype}")
    if entry.bits is None:
        return (rows,)
    assert entry.group_size is not None and method is not None
    return quantize(rows, entry.bits, entry.group_size, method)


def _check_finite(rows: mx.array, piece: Segment, what: str) -> None:
    if not mx.all(mx.isfinite(rows)).item():
        raise CheckpointError(
            f"tensor {piece.tensor.name} {what}",
            got=f"nan or inf in rows {piece.start_row} to {piece.stop_row - 1}",
            expected="finite numbers",
            hint=f"look at {piece.tensor.file.name}: the download may be damaged",
        )
