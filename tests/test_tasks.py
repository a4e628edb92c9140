"""Tasks of a plan: how they are cut and ordered, and how long each source file is needed."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import Tensors, safetensors_bytes, write_checkpoint
from test_fp8 import rewrite, write_both

from qwen35_mlx.checkpoint.headers import FP8, read_header
from qwen35_mlx.checkpoint.tensor_table import Transform
from qwen35_mlx.convert import plan, tasks
from qwen35_mlx.convert.tasks import Task, cut, fetched_bytes, peak_bytes, uses


def reading(*names: str) -> list[Any]:
    """Tasks that read these files, each named by a letter."""
    files = (frozenset(map(Path, letters)) for letters in names)
    return [SimpleNamespace(segment=SimpleNamespace(files=group)) for group in files]


def test_a_file_is_needed_from_its_first_task_to_its_last():
    found = uses(reading("a", "a", "ab", "b", "c", "b", "d"))
    assert found == {Path("a"): (0, 2), Path("b"): (2, 5), Path("c"): (4, 4), Path("d"): (6, 6)}
    assert list(found) == [Path(name) for name in "abcd"]


@pytest.mark.parametrize(
    ("names", "peak"),
    [
        # While c is read, b is still needed and d is fetched.
        (("a", "a", "ab", "b", "c", "b", "d"), 1110),
        # While b is read, a is needed by the same task, and c is fetched.
        (("a", "ab", "c"), 111),
        (("a",), 1),
        ((), 0),
    ],
)
def test_the_disk_holds_the_files_in_use_and_the_next_one(names: Iterable[str], peak: int):
    assert fetched_bytes(reading(*names), dict(a=1, b=10, c=100, d=1000)) == peak


def test_tasks_write_every_byte_of_the_output_once(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "src", moe=True, vision=True, mtp=True, experts="each")
    monkeypatch.setattr(tasks, "SLICE_BYTES", 50 * 128 * 2)
    planned = plan(tmp_path / "src", bits=3)
    found = cut(planned)
    assert [task.index for task in found] == list(range(len(found)))
    written: dict[str, list[tuple[int, int]]] = {}
    for task in found:
        assert task.output_bytes == sum(nbytes for _, _, nbytes in task.outputs())
        for tensor, start, nbytes in task.outputs():
            written.setdefault(tensor.name, []).append((start, start + nbytes))
    for tensor in (t for entry in planned.entries for t in entry.tensors):
        ends = [0]
        for start, end in sorted(written.pop(tensor.name)):
            assert start == ends[-1]
            ends.append(end)
        assert ends[-1] == tensor.nbytes
    assert not written


def test_a_task_reads_a_slice_but_whole_rows_and_kernels(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "src", moe=True)
    planned = plan(tmp_path / "src")
    for slice_bytes in (1, 2 * 128 * 7 + 1, 2**25):
        monkeypatch.setattr(tasks, "SLICE_BYTES", slice_bytes)
        for entry in [e for e in planned.entries if len(e.segments) == 1]:
            (segment,), found = entry.segments, list(tasks.entry_tasks(entry, 3))
            # A row of a kernel is a column of what is written.
            is_kernel = entry.transform is Transform.CHANNELS_LAST
            most = entry.num_rows if is_kernel else max(slice_bytes // segment.tensor.row_bytes, 1)
            rows = [task.num_rows for task in found]
            assert rows[:-1] == [most] * (len(rows) - 1) and 0 < rows[-1] <= most
            assert sum(rows) == entry.num_rows and {task.shard for task in found} == {3}


def test_a_task_waits_for_the_last_of_its_files_and_reads_a_quarter_of_fp8(tmp_path, monkeypatch):
    fp8, _ = write_both(tmp_path, (48, 40), experts="each")
    scales: Tensors = {}

    def take_scales(tensors: Tensors) -> None:
        names = [name for name in tensors if name.endswith("_scale_inv")]
        scales.update({name: tensors.pop(name) for name in names})

    rewrite(fp8, take_scales)
    (fp8 / "model.z.safetensors").write_bytes(safetensors_bytes(scales))
    tensors = {tensor.name for tensor in read_header(fp8 / "model.safetensors")}
    weight_map = dict.fromkeys(tensors, "model.safetensors") | dict.fromkeys(
        scales, "model.z.safetensors"
    )
    (fp8 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    monkeypatch.setattr(tasks, "SLICE_BYTES", 40 * 128)
    planned = plan(fp8)
    found = cut(planned)
    rank = {file: i for i, file in enumerate(planned.source.files)}
    last = [max(rank[file] for file in task.segment.files) for task in found]
    assert last == sorted(last)
    # Weights are in the first file, their scales in the second.
    assert set(last) == {0, 1}
    sizes = {t.segment.nbytes for t in found if t.segment.tensor.dtype == FP8}
    # In float32 a slice has four times the bytes.
    assert max(sizes) == 40 * 128 // 4


def held_by(planned: Any, name: str) -> tuple[int, Task]:
    """What the plan counts for each of two threads that convert this module, and the task."""
    task = next(task for task in cut(planned) if name in task.entry.module)
    counted = peak_bytes(planned, [task]) - tasks.PROGRAM_BYTES
    held, rest = divmod(counted - tasks.LISTED_BYTES * (1 + len(planned.source.tensors)), 2)
    assert rest == 0
    return held, task


def test_memory_is_counted_for_each_copy_of_what_is_converted(tmp_path):
    write_checkpoint(tmp_path / "src")
    searched = lambda module: (4, 64, "search")  # noqa: E731
    # Rows of 128 numbers in 2 bytes become 64 bytes of 4 bits, and a scale and a bias of each 64.
    packed = 64 + 2 * 2 * 2
    for settings, copies in (
        (dict(dtype="bfloat16"), 2 * 2 * 128),
        # The cast, and the check for numbers out of range.
        (dict(dtype="float32"), (2 * 2 + 4 + 3) * 128),
        (dict(bits=4), 2 * 2 * 128 + packed),
        (dict(bits=4, dtype="float16"), (2 * 2 + 2 + 3) * 128 + packed),
        (dict(recipe=searched), 2 * 2 * 128 + 2 * packed),
    ):
        held, task = held_by(plan(tmp_path / "src", **settings), "layers.0.mlp.up_proj")
        search = tasks.SEARCH_BYTES if task.entry.method == "search" else 0
        assert held == task.num_rows * copies + search
    # The most of any task.
    planned = plan(tmp_path / "src")
    found = cut(planned)
    listed = tasks.LISTED_BYTES * (len(found) + len(planned.source.tensors))
    most = max(held_by(planned, task.entry.module)[0] for task in found)
    assert peak_bytes(planned, found) == tasks.PROGRAM_BYTES + listed + 2 * most


def test_memory_is_counted_for_what_fp8_becomes(tmp_path):
    fp8, _ = write_both(tmp_path, (48, 40), experts="each")
    held, task = held_by(plan(fp8, bits=4), "shared_expert.up_proj")
    # The bytes, float32 in numpy and in MLX, bfloat16; and what is written.
    assert task.segment.scale and task.entry.dtype == "BF16"
    assert held == task.num_rows * 128 * (1 + 4 + 4 + 2) + task.output_bytes
