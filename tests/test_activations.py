"""Activations between layers: the same in memory and on disk."""

import mlx.core as mx
import numpy as np
import pytest

from qwen35_mlx.convert.activations import Activations, load, save

BATCHES = [slice(0, 2), slice(2, 4), slice(4, 6)]


def some(dtype, seed=0):
    return mx.random.normal((5, 3, 8), key=mx.random.key(seed)).astype(dtype)


def parts(rows):
    return (rows[batch] for batch in BATCHES)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("on_disk", [False, True])
def test_texts_and_tokens_are_those_that_were_joined(tmp_path, dtype, on_disk):
    rows = some(dtype)
    found = Activations.joined(parts(rows), tmp_path if on_disk else None)
    assert found.shape == rows.shape and found.dtype == dtype
    for batch in (*BATCHES, slice(None), slice(4, 9)):
        assert found[batch].dtype == dtype
        assert mx.array_equal(found[batch], rows[batch]).item()
    at = np.array([14, 0, 7, 7])
    assert mx.array_equal(found.tokens(at), rows.reshape(15, 8)[mx.array(at)]).item()
    # Nothing is left of a process that is killed.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("saved_from_disk", [False, True])
def test_what_is_saved_is_loaded(tmp_path, dtype, on_disk, saved_from_disk):
    rows = {name: some(dtype, seed) for seed, name in enumerate(("seen", "own"))}
    folder = tmp_path if saved_from_disk else None
    given = {name: Activations.joined(parts(each), folder) for name, each in rows.items()}
    save(tmp_path / "streams.safetensors", given, BATCHES)
    assert [file.name for file in tmp_path.iterdir()] == ["streams.safetensors"]
    stored = mx.load(str(tmp_path / "streams.safetensors"))
    found = load(tmp_path / "streams.safetensors", on_disk)
    assert found.keys() == stored.keys() == rows.keys()
    for name, each in rows.items():
        assert mx.array_equal(stored[name], each).item()
        assert mx.array_equal(found[name][slice(1, 4)], each[1:4]).item()


def test_parts_are_not_held_while_others_are_computed(tmp_path):
    held = []

    def computed():
        for part in parts(some(mx.float32)):
            mx.eval(part)
            before = mx.get_active_memory()
            yield mx.zeros((2, 3, 2**20)) + part[0, 0, 0]
            held.append(mx.get_active_memory() - before)

    Activations.joined(computed(), tmp_path)
    assert max(held) <= 2 * 2 * 3 * 2**22
