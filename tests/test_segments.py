"""What was read, on disk: equal to the last bit, only appended to, never used when damaged."""

import copy
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import VOCAB, write_checkpoint
from everyday import everyday
from rollback import bits, held, step

from qwen35_mlx.convert import convert
from qwen35_mlx.engine import segment_file, segments
from qwen35_mlx.engine.prefix_store import PrefixStore
from qwen35_mlx.engine.prompt_cache import PromptCache
from qwen35_mlx.engine.rows import RowBatch
from qwen35_mlx.engine.segments import Segments, open_folder
from qwen35_mlx.errors import SessionError
from qwen35_mlx.memory import kv_choices
from qwen35_mlx.model.cache import KVCache
from qwen35_mlx.model.loading import load_model

IDS = [int(i) for i in np.random.default_rng(0).integers(VOCAB, size=400)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("segments")
    write_checkpoint(folder / "src", moe=False, mtp=True)
    converted = convert(folder / "src", folder / "out", dtype="float32")
    return load_model(converted, mtp=True)[0]


def write(disk: Segments, cache: PromptCache, num_tokens: int | None = None) -> None:
    for _ in disk.write(cache, len(cache.ids) if num_tokens is None else num_tokens):
        pass


def read_cache(model: Any, ids: list[int], marks: tuple[int, ...] = ()) -> PromptCache:
    cache = PromptCache(model)
    cache.feeds_mtp = True
    cache.read(ids, marks=marks)
    return cache


def files(folder: Path, kind: str = "*") -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob(f"*.{kind}.safetensors")}


def drafts(cache: PromptCache) -> list[int]:
    def draw(logits: mx.array, place: int) -> mx.array:
        return mx.argmax(logits, axis=-1)

    return [int(t.item()) for t in cache.drafts(mx.array([7]), 3, draw)]


def test_what_comes_back_is_equal_to_the_last_bit_and_drafts_the_same(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "PIECE_BYTES", 60_000)
    cache = read_cache(model, IDS[:150])
    disk = Segments(tmp_path, model)
    write(disk, cache)
    # One by one, so that several tokens wait for the MTP layer.
    for token in IDS[150:155]:
        step(cache, token)
    write(disk, cache)
    cache.read(IDS[155:300])
    write(disk, cache)
    assert len(files(tmp_path, "keys")) > 3
    loaded = Segments(tmp_path, model).read(IDS)
    assert loaded is not None and loaded.ids == IDS[:300]
    loaded.feeds_mtp = True
    assert held(loaded) == held(cache)
    assert cache.mtp and loaded.mtp and cache.mtp.cache.offset == loaded.mtp.cache.offset > 290
    kept = cache.mtp.cache.offset
    for name in ("keys", "values"):
        ours, theirs = (bits(getattr(c.mtp.cache, name)[..., :kept, :]) for c in (cache, loaded))
        assert ours == theirs
    assert drafts(loaded) == drafts(cache) != []
    assert step(loaded, 9) == step(cache, 9)


def test_a_turn_appends_its_own_tokens_and_one_state(model: Any, tmp_path: Path) -> None:
    disk = Segments(tmp_path, model)
    cache = read_cache(model, IDS[:200])
    write(disk, cache)
    before, state_bytes = files(tmp_path), cache.end().nbytes
    kvs = [entry for entry in cache.all_entries if isinstance(entry, KVCache)]
    token_bytes = sum(a.nbytes for entry in kvs for a in entry.rows(0, 1).values())
    cache.read(IDS[200:])
    write(disk, cache)
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    new_bytes = sum(len(after[name]) for name in after.keys() - before.keys())
    assert new_bytes <= 1.1 * 200 * token_bytes + state_bytes + 4096
    write(disk, cache)
    assert files(tmp_path) == after


def test_the_half_files_of_a_killed_writer_are_removed(model: Any, tmp_path: Path) -> None:
    half, other = tmp_path / ".a.partial.safetensors", tmp_path / "other.safetensors"
    for file in (half, other):
        file.write_bytes(b"half")
    write(Segments(tmp_path, model), read_cache(model, IDS[:10]))
    assert not half.exists() and other.read_bytes() == b"half"


def test_a_file_is_safetensors_that_other_programs_read(model: Any, tmp_path: Path) -> None:
    write(Segments(tmp_path, model), read_cache(model, IDS[:10]))
    for name in files(tmp_path):
        arrays, known = mx.load(str(tmp_path / name), return_metadata=True)
        assert known["name"] == name and len(arrays) > 1


def test_a_flipped_bit_in_any_file_is_found_and_the_rest_is_used(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "PIECE_BYTES", 60_000)
    cache = read_cache(model, IDS[:100])
    disk, reference = Segments(tmp_path, model), {0: PromptCache(model)}
    for end in (100, 200, 300):
        cache.read(IDS[len(cache.ids) : end])
        cache.snapshot()
        write(disk, cache)
        reference[end] = cache.fork(end)
    whole = files(tmp_path)
    for number, name in enumerate(sorted(whole)):
        data = bytearray(whole[name])
        # In the header, in the tensors, in the checksum.
        data[(3, len(data) // 2, -5)[number % 3]] ^= 1 << number % 8
        (tmp_path / name).write_bytes(data)
        found = Segments(tmp_path, model)
        loaded = found.read(IDS) or reference[0]
        assert len(loaded.ids) in (0, 100, 200, 300) and loaded.ids == IDS[: len(loaded.ids)]
        if loaded.ids:
            assert held(loaded) == held(reference[len(loaded.ids)])
        start = int(name.split("-")[2])
        # Before the damage all is there; behind it nothing is, unless a fork has it.
        assert start // 100 * 100 <= len(loaded.ids) < 300 or name.endswith("states.safetensors")
        assert len(found.problems) == 1 or len(loaded.ids) == 300
        assert (tmp_path / name).exists() is (len(loaded.ids) == 300)
        if name.endswith("states.safetensors"):
            # The keys and values up to there are of use all the same.
            assert files(tmp_path).keys() >= whole.keys() - {name}
        for each, content in whole.items():
            (tmp_path / each).write_bytes(content)


def test_a_file_under_the_name_of_another_is_not_used(model: Any, tmp_path: Path) -> None:
    disk = Segments(tmp_path, model)
    for ids in (IDS[:50], IDS[50:100]):
        write(disk, read_cache(model, ids))
    (name, _), (_, other) = sorted(files(tmp_path, "states").items())
    (tmp_path / name).write_bytes(other)
    disk = Segments(tmp_path, model)
    found = [disk.read(ids) for ids in (IDS[:50], IDS[50:100])]
    assert found.count(None) == 1 and "another" in disk.problems[0]


def test_what_is_stopped_between_pieces_goes_on_there(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "PIECE_BYTES", 60_000)
    monkeypatch.setattr(segment_file, "PIECE_BYTES", 20_000)
    cache = read_cache(model, IDS)
    num_starts = 0
    known: dict[str, bytes] = {}
    while Segments(tmp_path, model).read(IDS) is None:
        num_starts += 1
        pieces = Segments(tmp_path, model).write(cache, len(IDS))
        for _ in range(14):
            next(pieces, None)
        pieces.close()
        now = files(tmp_path)
        assert {name: now[name] for name in known} == known and len(now) > len(known)
        known = now
    assert num_starts > 2
    loaded = Segments(tmp_path, model).read(IDS)
    assert loaded is not None and held(loaded) == held(cache)


def test_what_a_killed_writer_left_is_replaced_where_the_new_reading_has_other_bits(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "PIECE_BYTES", 60_000)
    pieces = Segments(tmp_path, model).write(read_cache(model, IDS), len(IDS))
    for _ in range(3):
        next(pieces)
    pieces.close()
    left = files(tmp_path)
    assert len(left) == 3
    # Its first segment is equal; of the second a bit differs, as after another order of sums.
    cache = read_cache(model, IDS)
    kv = next(entry for entry in cache.entries if isinstance(entry, KVCache))
    assert any(f"-{start}-" in name for name in left for start in range(40, 70))
    kv.keys[0, 0, 70, 0] = kv.keys[0, 0, 70, 0] * (1 + 2**-20)  # type: ignore[index]
    write(Segments(tmp_path, model), cache)
    loaded = Segments(tmp_path, model).read(IDS)
    assert loaded is not None and held(loaded) == held(cache)
    now = files(tmp_path)
    assert sum(now[name] != data for name, data in left.items()) == 1


@pytest.mark.slow
def test_a_cache_that_goes_elsewhere_meanwhile_is_not_mixed(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "PIECE_BYTES", 60_000)
    cache = read_cache(model, IDS, marks=(100,))
    disk = Segments(tmp_path, model)
    pieces = disk.write(cache, len(IDS))
    next(pieces)
    cache.rewind(100)
    cache.read(IDS[:200])
    assert list(pieces) == [] and disk.read(IDS) is None
    write(disk, cache)
    loaded = disk.read([*IDS[:100], *IDS[:200]])
    assert loaded is not None and held(loaded) == held(cache)


@pytest.mark.parametrize("num_written", everyday([0, 1, 2], 1))
def test_a_full_disk_loses_nothing_that_was_there(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_written: int
) -> None:
    disk = Segments(tmp_path, model)
    cache = read_cache(model, IDS[:60])
    write(disk, cache)
    before, saved = files(tmp_path), held(cache)
    real, count = segment_file.replacing, 0

    @contextmanager
    def full(file: Path, mode: int) -> Iterator[Path]:
        nonlocal count
        with real(file, mode) as temporary:
            yield temporary
            count += 1
            if count > num_written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache.read(IDS[60:])
    with monkeypatch.context() as patch:
        patch.setattr(segment_file, "replacing", full)
        patch.setattr(segments, "PIECE_BYTES", 150_000)
        with pytest.raises(SessionError, match="No space left"):
            write(disk, cache)
    assert before.items() <= files(tmp_path).items()
    assert not list(tmp_path.glob(".*"))
    loaded = Segments(tmp_path, model).read(IDS)
    assert loaded is not None and held(loaded) == saved
    write(disk, cache)
    loaded = Segments(tmp_path, model).read(IDS)
    assert loaded is not None and held(loaded) == held(cache)


@pytest.mark.slow
def test_what_was_of_no_use_for_the_longest_time_goes_first(model: Any, tmp_path: Path) -> None:
    texts = [[*IDS[:100], number, *IDS[100:150]] for number in range(4)]
    disk = Segments(tmp_path, model)
    for number, text in enumerate(texts[:3]):
        cache = read_cache(model, text, marks=(100,))
        write(disk, cache, 100)
        write(disk, cache)
        for name in files(tmp_path):
            if f"-{len(text)}." in name and disk._used[name] > 1000:
                disk._used[name] = float(number)
    # The beginning that all share is there once.
    assert len(files(tmp_path, "keys")) == 4
    assert disk.read(texts[0]) is not None
    disk.max_bytes = disk.nbytes
    write(disk, read_cache(model, texts[3], marks=(100,)))
    lengths = [len(found.ids) for text in texts if (found := disk.read(text))]
    assert lengths == [151, 100, 151, 151] and disk.nbytes <= disk.max_bytes
    assert sum(map(len, files(tmp_path).values())) == disk.nbytes


@pytest.mark.slow
def test_points_far_from_the_end_become_rare(model: Any, tmp_path: Path) -> None:
    disk, cache = Segments(tmp_path, model), read_cache(model, IDS[:16])
    for end in range(20, 400, 4):
        cache.read(IDS[len(cache.ids) : end])
        write(disk, cache)
    points = sorted(int(name.split("-")[3].split(".")[0]) for name in files(tmp_path, "states"))
    assert points[0] == 20 and points[-2:] == [392, 396] and len(points) <= 14
    # Going back by so much reads at most as much again.
    for back in (1, 10, 50, 150):
        assert max(p for p in points if p <= 396 - back) >= 396 - 2 * back - 4


def test_a_folder_is_used_by_one_process_at_a_time(model: Any, tmp_path: Path) -> None:
    with (
        open_folder(tmp_path / "new", model, 1e9),
        pytest.raises(SessionError, match="in use by another process"),
        open_folder(tmp_path / "new", model, 1e9),
    ):
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(SessionError, match="cannot be used"),
        open_folder(tmp_path / "file" / "x", model, 1e9),
    ):
        pass


def test_a_folder_for_what_several_macs_read_is_refused(model: Any, tmp_path: Path) -> None:
    """Each has a part: nothing would ever be written there."""
    shared = copy.copy(model)
    shared.ring = object()
    with pytest.raises(SessionError, match="several Macs"), open_folder(tmp_path, shared, 10**6):
        pass


def test_a_store_takes_from_the_disk_what_memory_does_not_have(model: Any, tmp_path: Path) -> None:
    first = PrefixStore(model, disk=Segments(tmp_path, model))
    cache = first.take(IDS)
    cache.read(IDS, marks=[100])
    cache.release()
    first.save_later(cache)
    while not first.is_saved:
        first.save_piece()
    again = PrefixStore(model, disk=Segments(tmp_path, model))
    assert len(again.take([*IDS[:200], 1, 2, 3]).ids) == 100
    assert len(again.take([*IDS, 1, 2, 3]).ids) == len(IDS)
    # Once it is in memory, the disk is not asked.
    for file in tmp_path.iterdir():
        file.unlink()
    assert len(again.take([*IDS, 1, 2, 3]).ids) == len(IDS)


def test_the_end_of_a_row_in_a_batch_is_no_point_for_others(model: Any, tmp_path: Path) -> None:
    """Its recurrent states are in the batch: its own are those from before."""
    store = PrefixStore(model, disk=Segments(tmp_path, model))
    rows = [store.take(IDS[at : at + 50], owner=store) for at in (0, 50)]
    for row, at in zip(rows, (0, 50), strict=True):
        row.read(IDS[at : at + 50], marks=[40 + at // 5])
    batch = RowBatch(model, mx.default_stream(mx.default_device()))
    batch.put(rows)
    for token in IDS[100:105]:
        mx.eval(batch.step(mx.array([token, token])))
        for row in rows:
            row.commit(token)
    longer = [*rows[0].ids, 1, 2]
    assert len(store.take(longer).ids) == 40
    # An earlier answer of the same conversation waits to be written.
    store.save_later(rows[0])
    while not store.is_saved:
        store.save_piece()
    found = Segments(tmp_path, model).read(longer)
    assert found is not None and len(found.ids) == 40
    batch.clear()
    assert len(store.take(longer).ids) == 55
    # One that failed never gives the states back: from a point on they are the row's own.
    batch.put(rows)
    assert rows[1].rewind(52) == 50
    rows[1].read([1, 2, 3])
    assert rows[1].last_point == 53


def test_quantized_keys_and_values_come_back_and_are_not_those_of_other_bits(
    demo: Any, tmp_path: Path
) -> None:
    model = demo[0]
    packed = copy.copy(model)
    packed.config = kv_choices(model.config, "k8v4")[0]
    cache = PromptCache(packed)
    cache.feeds_mtp = True
    cache.read(IDS[:70])
    write(Segments(tmp_path, packed), cache)
    assert Segments(tmp_path, model).read(IDS) is None
    loaded = Segments(tmp_path, packed).read(IDS)
    assert loaded is not None and loaded.mtp and cache.mtp
    pairs = zip(cache.all_entries, loaded.all_entries, strict=True)
    for mine, theirs in ((a, b) for a, b in pairs if isinstance(a, KVCache)):
        rows = [entry.rows(0, entry.offset) for entry in (mine, theirs) if entry.bits == (8, 4)]
        assert {n: bits(a) for n, a in rows[0].items()} == {n: bits(a) for n, a in rows[1].items()}
    assert step(loaded, 9) == step(cache, 9)
