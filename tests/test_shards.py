import hashlib
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_checkpoint

from qwen35_mlx.convert import convert, plan
from qwen35_mlx.convert.plan import OutputTensor
from qwen35_mlx.convert.shards import ShardWriter, text_header_bytes

ARRAYS = {
    "a": mx.arange(24, dtype=mx.uint32).reshape(6, 4),
    "b": mx.random.normal((6, 5), key=mx.random.key(0)).astype(mx.bfloat16),
    "c": mx.random.normal((3, 2, 2), key=mx.random.key(1)).astype(mx.float16),
    "d": mx.random.normal((7,), key=mx.random.key(2)),
    "empty": mx.zeros((0, 4)),
}
CODES = {mx.uint32: "U32", mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32"}
TENSORS = [OutputTensor(name, CODES[a.dtype], a.shape) for name, a in ARRAYS.items()]
DATA = {
    name: np.array(mx.view(array, mx.uint8) if array.size else array).tobytes()
    for name, array in ARRAYS.items()
}
# Name, first byte and length of each piece: two bytes at a time.
PIECES = [(name, start, 2) for name, data in DATA.items() for start in range(0, len(data), 2)]


def write(writer: ShardWriter, pieces: list[tuple[str, int, int]]) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda p: writer.write(p[0], p[1], memoryview(DATA[p[0]])[p[1] : p[1] + p[2]]),
                pieces,
            )
        )
    writer.missing_bytes -= sum(length for _, _, length in pieces)


def shuffled() -> list[tuple[str, int, int]]:
    pieces = list(PIECES)
    random.Random(3).shuffle(pieces)
    return pieces


def assert_whole(path: Path, digest: str) -> None:
    loaded, metadata = mx.load(str(path), return_metadata=True)
    assert metadata == {"format": "mlx"}
    assert loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype
        assert mx.array_equal(loaded[name], array), name
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(path.parent.iterdir()) == [path]


def test_pieces_in_any_order_read_back_bit_for_bit(tmp_path):
    path = tmp_path / "model.safetensors"
    writer = ShardWriter(path, TENSORS)
    write(writer, shuffled())
    assert not path.exists()
    assert_whole(path, writer.finish())


def test_a_file_left_half_done_is_gone_on_with(tmp_path):
    path, pieces = tmp_path / "model.safetensors", shuffled()
    first = ShardWriter(path, TENSORS)
    write(first, pieces[:50])
    first.close()
    second = ShardWriter(path, TENSORS)
    name, start, length = pieces[0]
    assert second.read(name, start, length) == DATA[name][start : start + length]
    second.missing_bytes -= 100
    write(second, pieces[50:])
    assert_whole(path, second.finish())


def test_a_half_done_file_of_another_plan_is_begun_anew(tmp_path):
    path = tmp_path / "model.safetensors"
    other = ShardWriter(path, [OutputTensor("z", "F32", (400,))])
    other.write("z", 0, memoryview(b"\xff" * 1600))
    other.close()
    writer = ShardWriter(path, TENSORS)
    assert writer.read("a", 0, 8) == bytes(8)
    write(writer, PIECES)
    assert_whole(path, writer.finish())


def test_data_begin_at_a_multiple_of_8(tmp_path):
    for extra in range(8):
        path = tmp_path / f"{extra}.safetensors"
        name = "x" * (1 + extra)
        writer = ShardWriter(path, [OutputTensor(name, "F32", (2,))])
        writer.write(name, 0, memoryview(bytes(8)))
        writer.missing_bytes -= 8
        writer.finish()
        raw = path.read_bytes()
        header_bytes = int.from_bytes(raw[:8], "little")
        assert (8 + header_bytes) % 8 == 0
        assert json.loads(raw[8 : 8 + header_bytes])[name]["data_offsets"] == [0, 8]


def test_a_file_gets_its_name_only_when_every_byte_is_there(tmp_path):
    path = tmp_path / "model.safetensors"
    writer = ShardWriter(path, TENSORS)
    write(writer, PIECES[1:])
    with pytest.raises(RuntimeError, match="2 bytes are missing"):
        writer.finish()
    with pytest.raises(RuntimeError, match="a: 2 bytes too many"):
        writer.write("a", len(DATA["a"]) - 2, memoryview(bytes(4)))
    with pytest.raises(RuntimeError, match="a: 1 bytes too many"):
        writer.write("a", len(DATA["a"]) - 1, memoryview(bytes(2)))
    assert not path.exists()
    write(writer, PIECES[:1])
    assert_whole(path, writer.finish())


def test_headers_count_where_they_name_any_of_what_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["qwen35_mlx.convert.plan"], "MAX_SHARD_BYTES", 100_000)
    write_checkpoint(tmp_path / "src", vision=True)
    planned = plan(tmp_path / "src")
    header_bytes = []
    for file in convert(tmp_path / "src", tmp_path / "out").glob("*.safetensors"):
        raw = file.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header_bytes.append(end if b"language_model." in raw[:end] else 0)
    assert 0 in header_bytes
    assert text_header_bytes(planned) == sum(header_bytes)
