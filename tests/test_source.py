import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import as_mlx, random_tensors, safetensors_bytes, write_checkpoint

from qwen35_mlx.checkpoint import headers
from qwen35_mlx.checkpoint.headers import read_header
from qwen35_mlx.convert.source import as_mlx as to_mlx
from qwen35_mlx.convert.source import open_source, read_rows
from qwen35_mlx.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SHAPES = {"vector": (7,), "matrix": (6, 5), "cube": (3, 4, 5), "scalar": ()}


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def file_of(tmp_path: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file with exactly this header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_rows_are_read_bit_for_bit(tmp_path, dtype):
    tensors = random_tensors(SHAPES, dtype)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(tensors))
    for tensor in read_header(path):
        whole = as_mlx(tensors[tensor.name])
        rows = whole.reshape(-1, SHAPES[tensor.name][-1] if SHAPES[tensor.name] else 1)
        assert tensor.shape == SHAPES[tensor.name]
        assert tensor.num_rows == rows.shape[0]
        for start in range(tensor.num_rows):
            for stop in range(start + 1, tensor.num_rows + 1):
                read = to_mlx(read_rows(tensor, start, stop), tensor.dtype)
                assert read.dtype == whole.dtype
                assert mx.array_equal(read, rows[start:stop])


# Bytes of an element of each type, by the documentation of safetensors.
ELEMENT_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2,
    "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ELEMENT_BYTES)
def test_a_header_of_every_type_is_read(tmp_path, dtype):
    nbytes = 6 * ELEMENT_BYTES[dtype]
    header = {"x": entry(dtype, (2, 3), (0, nbytes))}
    (tensor,) = read_header(file_of(tmp_path, header, bytes(nbytes)))
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == (dtype, (2, 3), nbytes)


def test_reading_rows_touches_only_their_bytes(tmp_path):
    # A file of 4 TB that takes no space: a map or a whole read of it would fail.
    shape = (1_000_000, 1024, 1024)
    nbytes = 4 * 1_000_000 * 1024 * 1024
    path = file_of(tmp_path, {"huge": entry(shape=shape, offsets=(0, nbytes))})
    header_bytes = path.stat().st_size
    try:
        os.truncate(path, header_bytes + nbytes)
    except OSError:
        pytest.skip("this file system has no sparse files")
    with path.open("r+b") as stream:
        stream.seek(header_bytes + 777_777_777 * 4096)
        stream.write(np.arange(2048, dtype=np.float32).tobytes())
    (tensor,) = read_header(path)
    read = read_rows(tensor, 777_777_777, 777_777_779)
    assert np.array_equal(read.reshape(-1), np.arange(2048, dtype=np.float32))


def test_a_file_cut_short_after_its_header_was_read_is_reported(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(random_tensors({"w": (8, 8)}, "F32")))
    (tensor,) = read_header(path)
    os.truncate(path, path.stat().st_size - 1)
    assert read_rows(tensor, 0, 7).shape == (7, 8)
    with pytest.raises(CheckpointError, match=r"ends inside tensor w"):
        read_rows(tensor, 7, 8)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_rows(tensor, 0, 1)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"w": entry(shape=(3,), offsets=(0, 12))}, 11, "truncated: tensor w ends after the file"),
        ({"w": entry(), "v": entry(offsets=(4, 12))}, 12, "tensor v overlaps w"),
        ({"w": entry(), "v": entry()}, 8, "overlaps"),
        ({"w": entry(offsets=(4, 12))}, 12, "tensor w leaves a gap after the header"),
        ({"w": entry()}, 9, "bytes after the last tensor"),
        ({"w": entry(shape=(3,))}, 8, "length of tensor w"),
        ({"w": entry(offsets=(8, 0))}, 8, "length of tensor w"),
        ({"w": entry(offsets=(-8, 0))}, 8, "data_offsets of tensor w"),
        ({"w": entry(offsets=(0, 8, 9))}, 8, "data_offsets of tensor w"),
        ({"w": entry(shape=(-2,))}, 8, "shape of tensor w"),
        ({"w": entry(shape=(2.0,))}, 8, "shape of tensor w"),
        ({"w": entry(shape=(True, 2))}, 8, "shape of tensor w"),
        ({"w": entry(shape=(2**70,))}, 8, "length of tensor w"),
        ({"w": entry(dtype="F4")}, 8, "dtype of tensor w"),
        ({"w": entry(dtype=["F32"])}, 8, "dtype of tensor w"),
        ({"w": {"dtype": "F32"}}, 8, "entry of tensor w"),
        ({"w": 1}, 8, "entry of tensor w"),
        ({"__metadata__": 1}, 0, "__metadata__ is not an object"),
        ([], 0, "header is not an object"),
        (b'{"w": 1', 0, "header is not JSON"),
        (b"\xff\xfe", 0, "header is not JSON"),
        (b"[" * 100_000, 0, "header is not JSON"),
        (b'{"w": 1, "w": 2}', 0, "'w' appears twice"),
        ({"\x1b[31mw": entry()}, 8, r"name of a tensor\n  got: '\\x1b\[31mw'"),
        ({"\ud800": entry()}, 8, "name of a tensor"),
    ],
)
def test_a_damaged_header_is_refused_with_the_file_and_the_tensor(tmp_path, header, data, message):
    path = file_of(tmp_path, header, bytes(data))
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(path)
    assert "model.safetensors" in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_file_that_mlx_saved_without_metadata_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), {"w": mx.ones((2, 3)), "v": mx.ones((3,), dtype=mx.bfloat16)})
    assert b'"__metadata__":null' in path.read_bytes()
    assert {t.name: t.shape for t in read_header(path)} == {"w": (2, 3), "v": (3,)}


@pytest.mark.parametrize("raw", [b"", b"1234567", (2**63).to_bytes(8, "little") + b"{}"])
def test_a_header_longer_than_the_file_is_refused(tmp_path, raw):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="header is longer than the file"):
        read_header(path)


def test_an_overlong_header_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(headers, "HEADER_LIMIT_BYTES", 10)
    with pytest.raises(CheckpointError, match="header is too long"):
        read_header(file_of(tmp_path, {"w": entry()}, bytes(8)))


def test_dtypes_that_are_no_weights_are_listed(tmp_path):
    header = {"ids": entry("I64", (1,), (0, 8)), "mask": entry("U8", (8,), (8, 16))}
    listed = read_header(file_of(tmp_path, header, bytes(16)))
    assert [(t.name, t.dtype, t.shape) for t in listed] == [
        ("ids", "I64", (1,)),
        ("mask", "U8", (8,)),
    ]


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_shards_with_and_without_an_index_hold_the_same(tmp_path):
    tensors = write_checkpoint(tmp_path / "src", num_shards=3)
    with_index = open_source(tmp_path / "src").tensors
    (tmp_path / "src" / INDEX).unlink()
    # What macOS writes beside each file on an exFAT drive.
    (tmp_path / "src" / "._model-00001-of-00003.safetensors").write_bytes(b"\0\5\x16\7")
    assert open_source(tmp_path / "src").tensors == with_index
    assert with_index.keys() == tensors.keys()
    assert {t.file.name for t in with_index.values()} == {
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    }


def test_a_file_linked_from_a_hub_cache_is_read(tmp_path):
    write_checkpoint(tmp_path / "src")
    blob = tmp_path / "blob"
    (tmp_path / "src" / "model.safetensors").rename(blob)
    (tmp_path / "src" / "model.safetensors").symlink_to(blob)
    assert open_source(tmp_path / "src").tensors


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "a/b.safetensors", "/etc/x.safetensors", "a\\b.safetensors",
             "x.bin", "..safetensors", "", 7, None],
)  # fmt: skip
def test_an_index_naming_anything_but_a_file_of_the_folder_is_refused(tmp_path, file):
    write_checkpoint(tmp_path / "src", num_shards=2)
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes({}))
    edit_index(tmp_path / "src", lambda index: index["weight_map"].update(other=file))
    with pytest.raises(CheckpointError, match="outside the folder or of another kind"):
        open_source(tmp_path / "src")


def test_a_shard_whose_name_is_too_long_for_a_file_is_missing(tmp_path):
    write_checkpoint(tmp_path / "src", num_shards=2)
    edit_index(tmp_path / "src", lambda i: i["weight_map"].update(w="a" * 300 + ".safetensors"))
    with pytest.raises(CheckpointError, match=r"aaa.safetensors named in .*index"):
        open_source(tmp_path / "src")


def test_a_missing_shard_is_named(tmp_path):
    write_checkpoint(tmp_path / "src", num_shards=3)
    (tmp_path / "src" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors named in .*index"):
        open_source(tmp_path / "src")


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    write_checkpoint(tmp_path / "src", num_shards=2)
    file = "model-00001-of-00002.safetensors"
    edit_index(tmp_path / "src", lambda index: index["weight_map"].update(ghost=file))
    with pytest.raises(CheckpointError, match=f"ghost, not in {file}"):
        open_source(tmp_path / "src")


def test_a_tensor_in_the_wrong_shard_is_named(tmp_path):
    write_checkpoint(tmp_path / "src", num_shards=2)
    moved = {"lm_head.weight": "model-00002-of-00002.safetensors"}
    edit_index(tmp_path / "src", lambda index: index["weight_map"].update(moved))
    with pytest.raises(CheckpointError, match=r"lm_head.weight, not in model-00002"):
        open_source(tmp_path / "src")


def test_a_tensor_stored_twice_is_refused(tmp_path):
    tensors = write_checkpoint(tmp_path / "src", num_shards=2)
    last = tmp_path / "src" / "model-00002-of-00002.safetensors"
    names = {t.name for t in read_header(last)} | {"lm_head.weight"}
    last.write_bytes(safetensors_bytes({n: tensors[n] for n in sorted(names)}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is stored twice"):
        open_source(tmp_path / "src")


@pytest.mark.parametrize("stale", ["model.safetensors", "model-00009-of-00009.safetensors"])
def test_weights_that_the_index_does_not_list_are_refused(tmp_path, stale):
    write_checkpoint(tmp_path / "src", num_shards=2)
    (tmp_path / "src" / stale).write_bytes(safetensors_bytes({}))
    with pytest.raises(CheckpointError, match=f"(?s)does not list.*{stale}"):
        open_source(tmp_path / "src")


def test_a_tensor_that_the_index_does_not_list_is_refused(tmp_path):
    write_checkpoint(tmp_path / "src", num_shards=2)
    edit_index(tmp_path / "src", lambda index: index["weight_map"].pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"(?s)does not list.*lm_head.weight"):
        open_source(tmp_path / "src")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_a_damaged_index_is_refused(tmp_path, text):
    write_checkpoint(tmp_path / "src", num_shards=2)
    (tmp_path / "src" / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX):
        open_source(tmp_path / "src")


def test_a_folder_without_weights_is_refused(tmp_path):
    write_checkpoint(tmp_path / "src")
    (tmp_path / "src" / "model.safetensors").rename(tmp_path / "src" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no weights in"):
        open_source(tmp_path / "src")


def test_a_source_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name, got in (("absent", "no such folder"), ("file", "a file")):
        with pytest.raises(CheckpointError, match=f"no checkpoint at .*{name}\n  got: {got}"):
            open_source(tmp_path / name)
