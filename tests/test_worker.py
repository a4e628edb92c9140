"""The worker beside a source whose files come and go."""

from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import write_checkpoint
from everyday import everyday

from qwen35_mlx.convert import convert, plan, tasks, worker
from qwen35_mlx.convert.journal import Journal
from qwen35_mlx.convert.tasks import cut
from qwen35_mlx.convert.transform import Known
from qwen35_mlx.convert.worker import Worker


class Shelf:
    """In place of the Fetcher: a file is ready when asked for the second time."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.state = "fetching"
        self.asked: list[str] = []
        self.released: dict[str, set[int]] = {}
        self.journal: Journal | None = None
        self.is_stopped = False

    def start(self, order: list[str]) -> None:
        self.order = order

    def ready(self, file: str, timeout: float) -> bool:
        self.asked.append(file)
        return self.asked.count(file) > 1

    def release(self, file: str) -> None:
        assert self.journal and file not in self.released
        self.released[file] = set(self.journal.tasks)

    def stop(self) -> None:
        self.is_stopped = True


@pytest.mark.parametrize("in_main", everyday([False, True], 0), ids=["threads", "GPU"])
@pytest.mark.parametrize("flush_bytes", everyday([1, 2**30], 0))
def test_a_file_is_released_once_when_all_of_its_tasks_are_in_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush_bytes: int, in_main: bool
) -> None:
    write_checkpoint(tmp_path / "src", moe=True, num_shards=3)
    monkeypatch.setattr(tasks, "SLICE_BYTES", 50 * 128 * 2)
    monkeypatch.setattr(worker, "FLUSH_BYTES", flush_bytes)
    planned, shelf, states = plan(tmp_path / "src"), Shelf(), []
    todo = cut(planned)
    (tmp_path / "work").mkdir()
    shelf.journal = Journal(tmp_path / "work" / "journal")

    def progress(done: int, total: int, tensor: str, file: str) -> None:
        states.append(tensor)

    work = Worker(planned, todo, tmp_path / "work", shelf.journal, shelf, progress, Known())
    assert work.in_main == (mx.default_device() == mx.Device(mx.gpu))
    work.in_main = in_main
    checksums = work.run()
    assert shelf.order == [file.name for file in planned.source.files]
    assert shelf.released.keys() == set(shelf.order) and shelf.is_stopped
    for file, finished in shelf.released.items():
        needed = {t.index for t in todo if file in {f.name for f in t.segment.files}}
        assert needed <= finished
    # What is waited for is shown in place of the tensor.
    assert states.count("fetching") == 3
    assert checksums.keys() == {"model.safetensors"}
    assert len(mx.load(str(tmp_path / "work" / "model.safetensors"))) > 50
    assert len(checksums["model.safetensors"]) == 64
    whole = convert(tmp_path / "src", tmp_path / "out") / "model.safetensors"
    assert (tmp_path / "work" / "model.safetensors").read_bytes() == whole.read_bytes()

    def read_again(file: Path) -> str:
        raise AssertionError(f"{file} has a checksum already")

    monkeypatch.setattr(worker, "sha256", read_again)
    again = Journal(tmp_path / "work" / "journal")
    assert Worker(planned, [], tmp_path / "work", again, None, None, Known()).run() == checksums
