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
from qwen35_mlx.convert import plan, tasks
from qwen35_mlx.convert.tasks import cut, fetched_bytes, uses


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
