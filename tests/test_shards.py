import hashlib
import json

import mlx.core as mx
import pytest

from qwen35_mlx.convert.plan import OutputTensor
from qwen35_mlx.convert.shards import ShardWriter

ARRAYS = {
    "a": mx.arange(24, dtype=mx.uint32).reshape(6, 4),
    "b": mx.random.normal((6, 5), key=mx.random.key(0)).astype(mx.bfloat16),
    "c": mx.random.normal((3, 2, 2), key=mx.random.key(1)).astype(mx.float16),
    "d": mx.random.normal((7,), key=mx.random.key(2)),
    "empty": mx.zeros((0, 4)),
}
CODES = {mx.uint32: "U32", mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32"}
TENSORS = [OutputTensor(name, CODES[a.dtype], a.shape) for name, a in ARRAYS.items()]


def write_all(writer: ShardWriter) -> None:
    """All arrays, the first two in alternating pieces."""
    for start, stop in ((0, 1), (1, 5), (5, 6)):
        writer.write("a", ARRAYS["a"][start:stop])
        writer.write("b", ARRAYS["b"][start:stop])
    writer.write("d", ARRAYS["d"])
    writer.write("c", ARRAYS["c"])


def test_pieces_in_any_order_read_back_bit_for_bit(tmp_path):
    path = tmp_path / "model.safetensors"
    with ShardWriter(path, TENSORS) as writer:
        write_all(writer)
        assert not path.exists()
    loaded, metadata = mx.load(str(path), return_metadata=True)
    assert metadata == {"format": "mlx"}
    assert loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype
        assert mx.array_equal(loaded[name], array), name
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(tmp_path.iterdir()) == [path]


def test_data_begin_at_a_multiple_of_8(tmp_path):
    for extra in range(8):
        path = tmp_path / f"{extra}.safetensors"
        name = "x" * (1 + extra)
        with ShardWriter(path, [OutputTensor(name, "F32", (2,))]) as writer:
            writer.write(name, mx.ones(2))
        raw = path.read_bytes()
        header_bytes = int.from_bytes(raw[:8], "little")
        assert (8 + header_bytes) % 8 == 0
        assert json.loads(raw[8 : 8 + header_bytes])[name]["data_offsets"] == [0, 8]


def test_a_strided_piece_is_written_in_its_logical_order(tmp_path):
    path = tmp_path / "model.safetensors"
    array = mx.arange(6, dtype=mx.float32).reshape(2, 3).T
    with ShardWriter(path, [OutputTensor("t", "F32", (3, 2))]) as writer:
        writer.write("t", array)
    assert mx.array_equal(mx.load(str(path))["t"], array)


@pytest.mark.parametrize("spoil", ["lacks", "exceeds", "raises"])
def test_a_file_gets_its_name_only_when_every_byte_is_there(tmp_path, spoil):
    path = tmp_path / "model.safetensors"
    error = {"lacks": "did not come", "exceeds": "bytes too many", "raises": "stop"}[spoil]
    with pytest.raises(RuntimeError, match=error), ShardWriter(path, TENSORS) as writer:
        if spoil == "lacks":
            writer.write("a", ARRAYS["a"])
        else:
            write_all(writer)
            if spoil == "exceeds":
                writer.write("a", ARRAYS["a"][:1])
            raise RuntimeError("stop")
    assert not path.exists()
    assert writer.sha256 == ""
