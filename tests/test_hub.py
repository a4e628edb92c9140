"""From the hub shard by shard: the same bytes as from a folder, whatever the network does."""

import hashlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import Tensors, write_checkpoint
from everyday import everyday
from fake_hub import REPO, FakeHub, serving

from qwen35_mlx.convert import convert, hub, job, plan
from qwen35_mlx.convert.tasks import cut
from qwen35_mlx.errors import CheckpointError, Qwen35Error

SETTINGS = dict(bits=3, group_size=32)
NUM_SHARDS = 5
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    write_checkpoint(
        folder, moe=True, mtp=True, experts="each", num_shards=NUM_SHARDS, tokenizer=True
    )
    return folder


@pytest.fixture
def fake(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(source, tmp_path / "cache", monkeypatch) as server:
        yield server


def listing(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "config.json"}


def test_the_same_bytes_as_from_a_folder(tmp_path, source, fake):
    local = convert(source, tmp_path / "local", **SETTINGS)
    out = convert(REPO, tmp_path / "out", **SETTINGS)
    assert listing(out) == listing(local)
    assert f'"source": "{REPO}"' in (out / "config.json").read_text()
    assert f'"source_revision": "{fake.commit}"' in (out / "config.json").read_text()
    assert not job.work_folder(out).exists()


@pytest.mark.parametrize(
    "faults",
    everyday(
        [
            ["cut", None, "cut", "cut", 500, "cut"],
            [429, 429, None, 503, 500, 429],
            ["wrong", None, "wrong", None, "wrong"],
            ["slow", "cut", 500, "wrong", 429, None, "slow", "cut", "wrong"],
        ],
        3,
    ),
)
def test_faults_of_the_network_change_nothing(tmp_path, source, fake, faults, caplog):
    local = convert(source, tmp_path / "local", **SETTINGS)
    planned = plan(REPO)
    fake.faults = list(faults)
    with caplog.at_level(logging.ERROR):
        out = convert(REPO, tmp_path / "out", **SETTINGS)
    assert not fake.faults and fake.num_faults == len([f for f in faults if f])
    assert listing(out) == listing(local)
    assert planned.source_bytes == plan(source).source_bytes


@pytest.mark.parametrize("own", [False, True])
def test_a_head_of_its_own_is_seen_before_anything_is_fetched(tmp_path, monkeypatch, own):
    def add_head(tensors: Tensors) -> None:
        dtype, values = tensors["model.language_model.embed_tokens.weight"]
        tensors["lm_head.weight"] = dtype, values[::-1].copy() if own else values

    source, out = tmp_path / "tied", tmp_path / "out"
    write_checkpoint(source, tied=True, num_shards=2, tokenizer=True, change=add_head)
    with serving(source, tmp_path / "cache", monkeypatch):
        if own:
            with pytest.raises(CheckpointError, match=r"lm_head.weight is not the embedding"):
                convert(REPO, out, **SETTINGS)
            assert not job.work_folder(out).exists()
        else:
            assert listing(convert(REPO, out, **SETTINGS)) == listing(
                convert(source, tmp_path / "local", **SETTINGS)
            )


def test_only_two_shards_lie_on_disk_and_none_stays(tmp_path, source, fake):
    seen: list[set[str]] = []

    def progress(done, total, tensor, file):
        folder = job.work_folder(tmp_path / "out") / "source"
        deadline = time.monotonic() + 30
        while True:
            found = {p.name for p in folder.glob("*.safetensors")}
            # The second comes while the first is converted, however slowly.
            if len(found) != 1 or max(map(len, seen)) == 2 or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        seen.append(found)

    planned = plan(REPO)
    convert(REPO, tmp_path / "out", progress=progress, **SETTINGS)
    assert max(map(len, seen)) == 2
    assert len(set().union(*seen)) == NUM_SHARDS
    needed = job.source_disk_bytes(planned.source, job.cut(planned), keep_source=False)
    sizes = sorted(p.stat().st_size for p in source.glob("*.safetensors"))
    assert sizes[0] < needed <= sum(sizes[-2:])


@pytest.mark.slow
def test_the_source_is_kept_on_request(tmp_path, source, fake):
    convert(REPO, tmp_path / "out", keep_source=True, **SETTINGS)
    shards = list(source.glob("*.safetensors"))
    assert len(shards) == NUM_SHARDS
    for path in shards:
        assert (tmp_path / "out-source" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_bytes_that_stay_wrong_are_an_error_and_the_next_run_goes_on(tmp_path, source, fake):
    local = convert(source, tmp_path / "local", **SETTINGS)
    plan(REPO)
    headers = NUM_SHARDS
    fake.faults = [None] * headers + [None, None] + ["wrong"] * 3
    with pytest.raises(CheckpointError) as error:
        convert(REPO, tmp_path / "out", **SETTINGS)
    lines = str(error.value).splitlines()
    assert "does not have the checksum that the hub lists" in lines[0]
    assert lines[1].startswith("  got: ") and lines[1].split()[1] != lines[2].split()[1]
    done: list[int] = []
    fake.served.clear()
    out = convert(REPO, tmp_path / "out", progress=lambda *c: done.append(c[0]), **SETTINGS)
    assert done[0] > 0
    # What was converted is not fetched again, but for its header.
    first = "model-00001-of-00005.safetensors"
    assert fake.served[first] <= (source / first).stat().st_size
    assert listing(out) == listing(local)


@pytest.mark.slow
def test_a_network_that_is_gone_is_an_error_and_the_next_run_goes_on(
    tmp_path, source, fake, monkeypatch
):
    local = convert(source, tmp_path / "local", **SETTINGS)
    fake.faults = [None] * (NUM_SHARDS + 2) + [500] * 200
    with pytest.raises(CheckpointError, match=r"(?s)cannot get Qwen/Tiny.*continues where"):
        convert(REPO, tmp_path / "out", **SETTINGS)
    fake.faults = []
    # Meanwhile the branch moved on; the job is of the commit it was started at.
    assert listing(convert(REPO, tmp_path / "out", **SETTINGS)) == listing(local)


def test_headers_alone_are_fetched_for_a_plan(source, fake, monkeypatch):
    monkeypatch.setattr(hub, "FIRST_BYTES", 100)
    planned = plan(REPO, **SETTINGS)
    local = plan(source, **SETTINGS)
    assert [s.tensors for s in planned.shards] == [s.tensors for s in local.shards]
    for path in source.glob("*.safetensors"):
        raw = path.read_bytes()
        assert fake.served[path.name] == max(8 + int.from_bytes(raw[:8], "little"), 100)


def test_disk_for_two_shards_is_asked_for_before_the_start(tmp_path, source, fake, monkeypatch):
    planned = plan(REPO, **SETTINGS)
    shards = job.source_disk_bytes(planned.source, job.cut(planned), keep_source=False)
    usage = shutil.disk_usage(tmp_path)
    free = planned.output_bytes + job.SPARE_BYTES + shards // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    fake.served.clear()
    with pytest.raises(Qwen35Error, match="not enough disk space"):
        convert(REPO, tmp_path / "out", **SETTINGS)
    assert not job.work_folder(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("repo", "revision", "message"),
    [
        ("Qwen/Other", None, "cannot get Qwen/Other from the hub"),
        (REPO, "v9", "cannot get Qwen/Tiny from the hub"),
        ("no/such/folder", None, "no checkpoint at"),
        ("./nothing", None, "no checkpoint at"),
        ("../nothing", None, "no checkpoint at"),
    ],
)
def test_what_the_hub_does_not_have_is_a_clear_error(fake, repo, revision, message):
    with pytest.raises(Qwen35Error, match=message):
        plan(repo, revision=revision)


@pytest.mark.slow
def test_a_revision_is_part_of_the_job(tmp_path, source, fake):
    def stop(done, total, tensor, file):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(REPO, tmp_path / "out", revision="v1", progress=stop, **SETTINGS)
    with pytest.raises(Qwen35Error, match=r"(?s)revision=None.*revision=v1"):
        convert(REPO, tmp_path / "out", **SETTINGS)
    assert convert(REPO, tmp_path / "out", revision="v1", **SETTINGS)


def test_a_folder_has_no_revision(source):
    with pytest.raises(Qwen35Error, match="a folder has no revisions"):
        plan(source, revision="main")


@pytest.mark.slow
def test_small_files_without_lfs_are_checked_as_git_does(tmp_path, source, fake):
    local = convert(source, tmp_path / "local", **SETTINGS)
    fake.hides_checksums = True
    plan(REPO)
    fake.faults = [None] * NUM_SHARDS + ["wrong"]
    assert listing(convert(REPO, tmp_path / "out", **SETTINGS)) == listing(local)
    assert not fake.faults


@pytest.mark.parametrize("name", ["../x.safetensors", "a/b.safetensors"])
def test_an_index_of_the_hub_names_no_file_elsewhere(tmp_path, source, fake, name):
    path = source / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00002-of-00005.safetensors", name))
    with pytest.raises(CheckpointError, match="outside the folder"):
        convert(REPO, tmp_path / "out", **SETTINGS)
    assert os.listdir(tmp_path) and not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("prefix", "message"),
    [((200_000_000).to_bytes(8, "little"), "header is too long"),
     ((2**63).to_bytes(8, "little"), "header is longer than the file")],
)  # fmt: skip
def test_a_header_of_hundreds_of_megabytes_is_refused_unfetched(source, fake, prefix, message):
    path = source / "model-00002-of-00005.safetensors"
    with path.open("r+b") as stream:
        stream.write(prefix)
        stream.truncate(300_000_000)
    with pytest.raises(CheckpointError, match=message):
        plan(REPO)
    assert fake.served[path.name] <= hub.FIRST_BYTES


@pytest.mark.slow
def test_the_command_line_asks_the_hub_that_the_environment_names(tmp_path, source):
    server = FakeHub(source)
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    script = "from qwen35_mlx.cli.main import main; main()"
    try:
        for arguments in (["plan", REPO], ["convert", REPO, str(tmp_path / "out"), "--verify"]):
            command = [sys.executable, "-c", script, *arguments]
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
    finally:
        server.close()
    assert "GB for downloaded shards" in done.stderr
    assert "verified: all checksums match" in done.stdout
    assert listing(tmp_path / "out") == listing(convert(source, tmp_path / "local"))


def test_a_repository_without_config_is_no_model(source, fake):
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=f"{REPO} is not a model: it has no config.json"):
        plan(REPO)


def with_status(status: int | None) -> Exception:
    error = RuntimeError("of the hub")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


def of_module(name: str) -> Exception:
    return type("ReadError", (Exception,), {"__module__": name})("late")


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        *((with_status(status), True) for status in (408, 425, 429, 500, 503)),
        *((with_status(status), False) for status in (400, 401, 403, 404, 409, 426, 428, 430, 499)),
        (ConnectionResetError(104, "reset"), True),
        (TimeoutError(110, "late"), True),
        (socket.gaierror(-3, "no such host"), True),
        (OSError("came short"), True),
        (OSError(28, "no space left"), False),
        (of_module("httpx"), True),
        (of_module("httpcore._exceptions"), True),
        (of_module("nothttpx"), False),
        (ValueError("of ours"), False),
        (with_status(None), False),
    ],
    ids=repr,
)
def test_what_may_pass_is_tried_again(error: Exception, passes: bool) -> None:
    assert hub._is_temporary(error) == passes


def test_off_line_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not hub._is_temporary(ConnectionError())
    assert not hub._is_temporary(OSError("off line"))


def test_tries_end_with_the_waits_when_stopped_and_at_errors_of_ours(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(hub.time, "sleep", waited.append)
    errors: list[Exception] = []

    def get() -> str:
        if errors:
            raise errors.pop()
        return "here"

    errors += [ConnectionError("cut off\nand more")] * 2
    assert hub.retry("a/b", get, (1, 2)) == "here" and waited == [1, 2]
    assert "a/b: cut off; next attempt in 2 s" in caplog.text and "more" not in caplog.text
    errors += [ConnectionError("cut off")] * 3
    with pytest.raises(CheckpointError, match=r"cannot get a/b from the hub\n  got: ConnectionErr"):
        hub.retry("a/b", get, (1, 2))
    errors[:] = [ConnectionError("cut off")]
    with pytest.raises(CheckpointError):
        hub.retry("a/b", get, (1, 2), lambda: True)
    errors += [CheckpointError("of ours")]
    with pytest.raises(CheckpointError, match=r"^of ours$"):
        hub.retry("a/b", get, (1, 2))
    assert waited == [1, 2, 1, 2]


def test_the_fetcher_tells_how_far_it_is_and_stops_amid_a_file(monkeypatch, tmp_path) -> None:
    listing = {"a": hub.HubFile("a", 4 * 10**9, "0" * 64, True)}
    fetcher = hub.Fetcher(SimpleNamespace(repo="a/b", commit="c", folder=tmp_path, listing=listing))
    states = []

    def download(repo, name, *, revision, local_dir, tqdm_class):
        assert (repo, name, revision, local_dir) == ("a/b", "a", "c", tmp_path)
        bar = tqdm_class(total=4, initial=10**9)
        for amount in (10**9, None):
            bar.update(amount)
            states.append(fetcher.state)
        fetcher.stop()
        bar.update(10**9)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    fetcher.start(["a"])
    with pytest.raises(CheckpointError, match="Stopped"):
        fetcher.ready("a", 10)
    assert states == ["downloading 2.00 of 4.00 GB"] * 2


def test_a_file_that_is_checked_is_left_when_the_work_is_over(tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 5)
    fetcher = hub.Fetcher(SimpleNamespace(folder=tmp_path))
    path = tmp_path / "a"
    assert hub.checksum(path, True, fetcher._check) == hashlib.sha256(b"xxxxx").hexdigest()
    in_git = hashlib.sha1(b"blob 5\0xxxxx").hexdigest()
    assert hub.checksum(path, False, fetcher._check) == in_git
    fetcher.release("a")
    assert not path.exists()
    path.write_bytes(b"x" * 5)
    kept = hub.Fetcher(SimpleNamespace(folder=tmp_path), keep=True)
    kept.release("a")
    assert path.exists()
    fetcher.stop()
    with pytest.raises(hub.Stopped):
        hub.checksum(path, True, fetcher._check)


def test_a_source_that_is_kept_needs_disk_for_all_of_it(tmp_path, source, fake) -> None:
    planned = plan(REPO)
    sizes = [file.nbytes for name, file in planned.source.listing.items() if "model-0000" in name]
    assert len(sizes) == NUM_SHARDS
    tasks = cut(planned)
    assert job.source_disk_bytes(planned.source, tasks, True) == sum(sizes)
    assert max(sizes) < job.source_disk_bytes(planned.source, tasks, False) < sum(sizes)
