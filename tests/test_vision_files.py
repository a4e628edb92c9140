"""Towers on disk: beside the index, quantized, incomplete, not described, not supported, absent."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import safetensors_bytes
from fake_hub import REPO, serving
from mlx.utils import tree_flatten
from test_fp8 import quantized

from qwen35_mlx.checkpoint.headers import INDEX_FILE
from qwen35_mlx.convert import convert, mac_models, plan
from qwen35_mlx.errors import CheckpointError, ConfigError
from qwen35_mlx.evaluation.bench import bytes_per_token
from qwen35_mlx.kernels.choice import formats_of
from qwen35_mlx.model.language import Model
from qwen35_mlx.model.loading import load_model

SOURCE = Path(__file__).parent / "golden" / "vision"
TOWER = "vision_tower."
WHOLE = "model.safetensors"
# 12 for each of two blocks, and 9.
NUM_TENSORS = 33
Arrays = dict[str, mx.array]


@pytest.fixture
def converted(converted_golden: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted_golden("vision"), tmp_path / "converted"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SOURCE, tmp_path / "source"))


def held(folder: Path, file: str = WHOLE) -> Arrays:
    arrays = mx.load(str(folder / file))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    return {name: mx.array(array) for name, array in arrays.items()}


def save(folder: Path, arrays: Arrays, file: str = WHOLE) -> None:
    """The file anew; an index would list what it held before."""
    mx.eval(arrays)
    for old in (file, INDEX_FILE):
        (folder / old).unlink(missing_ok=True)
    mx.save_safetensors(str(folder / file), arrays, metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def features(model: Model) -> np.ndarray:
    golden = np.load(SOURCE / "golden.npz")
    assert model.vision_tower is not None
    return np.array(model.vision_tower(mx.array(golden["picture_patches"]), (1, 6, 4)))


def text_logits(model: Model) -> np.ndarray:
    return np.array(model(mx.arange(20)[None]))


def is_right(folder: Path) -> bool:
    """Whether the tower gives what transformers computes."""
    expected = np.load(SOURCE / "golden.npz")["picture_features"]
    return bool(np.abs(features(load_model(folder)[0]) - expected).max() < 2e-5)


def set_aside(folder: Path, file: str, index: bool, prefix: str) -> None:
    """Move the tower into a file that no index lists."""
    arrays = held(folder)
    tower = {n: a for n, a in arrays.items() if n.startswith(prefix)}
    rest = {n: a for n, a in arrays.items() if n not in tower}
    assert len(tower) == NUM_TENSORS
    save(folder, tower, file)
    save(folder, rest)
    if index:
        (folder / WHOLE).unlink()
        shard = "model-00001-of-00001.safetensors"
        save(folder, rest, shard)
        weight_map = dict.fromkeys(rest, shard)
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("index", [False, True], ids=["no index", "index"])
@pytest.mark.parametrize("file", ["vision.safetensors", "model-vision.safetensors"])
def test_a_tower_beside_the_index_is_loaded(converted: Path, file: str, index: bool) -> None:
    set_aside(converted, file, index, TOWER)
    assert is_right(converted)


@pytest.mark.parametrize("index", [False, True], ids=["no index", "index"])
def test_a_source_with_its_tower_beside_the_index_converts(
    source: Path, tmp_path: Path, index: bool
) -> None:
    set_aside(source, "model.vision.safetensors", index, "model.visual.")
    assert is_right(convert(source, tmp_path / "out", dtype="float32"))


def test_a_tower_beside_the_index_comes_from_the_hub(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_aside(source, "vision.safetensors", True, "model.visual.")
    with serving(source, tmp_path / "cache", monkeypatch):
        assert is_right(convert(REPO, tmp_path / "out", dtype="float32"))


def test_a_file_named_after_vision_that_holds_more_than_a_tower_is_left_out(
    converted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(converted, {"projector.weight": mx.zeros((2, 2))}, "my-vision-adapter.safetensors")
    set_aside(converted, "vision.safetensors", True, TOWER)
    with caplog.at_level(logging.WARNING):
        model, _ = load_model(converted)
    assert model.vision_tower is None
    assert "vision.safetensors is not read" in caplog.text
    assert np.isfinite(text_logits(model)).all()


def test_a_folder_without_a_tower_reads_text_whatever_its_config_says(converted: Path) -> None:
    expected = text_logits(load_model(converted)[0])
    save(converted, {n: a for n, a in held(converted).items() if not n.startswith(TOWER)})
    edit_config(converted, lambda c: c["vision_config"].update(hidden_act="relu"))
    model, _ = load_model(converted)
    assert model.vision_tower is None and model.config.vision is None
    assert not any(name.startswith(TOWER) for name, _ in tree_flatten(model.parameters()))
    np.testing.assert_array_equal(text_logits(model), expected)


def test_a_tower_that_config_json_does_not_describe_is_kept_but_not_run(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(source, lambda c: c.pop("vision_config"))
    with caplog.at_level(logging.WARNING):
        out = convert(source, tmp_path / "out", dtype="float32")
    assert "no vision_config" in caplog.text
    assert sum(name.startswith(TOWER) for name in held(out)) == NUM_TENSORS
    assert load_model(out)[0].vision_tower is None


def test_missing_unknown_and_misshapen_tensors_of_a_tower_are_listed(converted: Path) -> None:
    arrays = held(converted)
    del arrays[f"{TOWER}blocks.1.attn.qkv.bias"]
    arrays[f"{TOWER}merger.extra.weight"] = mx.zeros((2, 2))
    arrays[f"{TOWER}pos_embed.weight"] = mx.zeros((36, 24))
    save(converted, arrays)
    with pytest.raises(CheckpointError) as error:
        load_model(converted)
    lines = str(error.value).splitlines()
    for line in (
        "missing  vision_tower.blocks.1.attn.qkv.bias",
        "unknown  vision_tower.merger.extra.weight",
        "shape    vision_tower.pos_embed.weight: [36, 24], expected [25, 24]",
    ):
        assert f"    {line}" in lines


def test_a_patch_embedding_of_torch_in_a_folder_of_mlx_is_turned(converted: Path) -> None:
    name = f"{TOWER}patch_embed.proj.weight"
    arrays = held(converted)
    arrays[name] = arrays[name].moveaxis(-1, 1)
    save(converted, arrays)
    assert is_right(converted)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "vision_config.hidden_act='gelu'"),
        ({"deepstack_visual_indexes": [1]}, r"deepstack_visual_indexes=\[1\]"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ({"window_size": 112}, "window_size=112"),
        ({"num_position_embeddings": 24}, "num_position_embeddings=24"),
        ({"num_heads": 5}, "num_heads does not fit"),
        ({"out_hidden_size": 64}, "out_hidden_size is not the hidden size"),
        ({"depth": None}, "depth is missing"),
        ({"patch_size": [2, 2]}, "patch_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_tower_of_another_computation_is_refused(
    source: Path, change: dict[str, Any], named: str
) -> None:
    edit_config(source, lambda c: c["vision_config"].update(change))
    with pytest.raises(ConfigError, match=named):
        plan(source)


def test_a_key_of_a_tower_without_a_known_meaning_is_reported(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(source, lambda c: c["vision_config"].update(register_tokens=4))
    with caplog.at_level(logging.WARNING):
        plan(source, group_size=32)
    assert "vision_config.register_tokens" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [("mrope_section", [3, 5]), ("mrope_section", "3 3 2"), ("mrope_interleaved", False)],
)
def test_positions_of_another_kind_are_refused(source: Path, key: str, value: object) -> None:
    edit_config(source, lambda c: c["text_config"]["rope_parameters"].update({key: value}))
    with pytest.raises(ConfigError, match=key):
        plan(source)


def quantize_tower(folder: Path, group_size: int = 32, bits: int = 8) -> Arrays:
    """The matrices whose rows are whole groups, packed; returns them multiplied out again."""
    arrays, plain = held(folder), {}
    for name, array in list(arrays.items()):
        fits = array.ndim == 2 and array.shape[-1] % group_size == 0
        if name.startswith(TOWER) and name.endswith(".weight") and fits:
            module = name.removesuffix(".weight")
            packed = mx.quantize(array, group_size, bits)
            for end, part in zip(("weight", "scales", "biases"), packed, strict=True):
                arrays[f"{module}.{end}"] = part
            plain[name] = mx.dequantize(*packed, group_size, bits)
    assert plain
    save(folder, arrays)
    return plain


def test_a_quantized_tower_gives_what_its_weights_multiplied_out_give(
    converted: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(converted, tmp_path / "plain"))
    save(other, held(other) | quantize_tower(converted))
    plain = features(load_model(other)[0])
    packed = features(load_model(converted)[0])
    assert np.abs(packed - plain).max() < 1e-4
    assert not is_right(converted)


def test_a_source_whose_tower_alone_is_quantized_converts(converted: Path, tmp_path: Path) -> None:
    """The text gets its bits, the tower keeps its own."""
    quantize_tower(converted)
    expected = features(load_model(converted)[0])
    out = convert(converted, tmp_path / "out", bits=4, group_size=32)
    model, config = load_model(out)
    np.testing.assert_array_equal(features(model), expected)
    assert config["quantization"]["bits"] == 4
    assert config["quantization"]["vision_tower.merger.linear_fc1"]["bits"] == 8


def test_the_tower_of_an_fp8_source_is_taken_as_it_is(source: Path, tmp_path: Path) -> None:
    tensors = {name: ("F32", np.array(array)) for name, array in held(source).items()}
    for name in [n for n in tensors if n.endswith("mlp.gate_proj.weight")]:
        fp8, scale, _ = quantized(tensors[name][1].shape, (16, 16), [1], "F32")
        tensors |= {name: fp8, f"{name}_scale_inv": scale}
    (source / WHOLE).write_bytes(safetensors_bytes(tensors))
    settings = dict(quant_method="fp8", fmt="e4m3", weight_block_size=[16, 16])
    edit_config(source, lambda c: c.update(quantization_config=settings))
    assert is_right(convert(source, tmp_path / "out", dtype="float32"))


def test_mlx_lm_loads_a_folder_with_a_tower(converted: Path) -> None:
    from mlx_lm.utils import load_model as load_theirs

    theirs, _ = load_theirs(converted)
    ours = text_logits(load_model(converted)[0])
    assert np.abs(np.array(theirs(mx.arange(20)[None])) - ours).max() < 3e-4


def test_the_tower_counts_as_weights_but_not_as_read_for_a_token(
    converted: Path, source: Path
) -> None:
    with_tower, planned = load_model(converted)[0], plan(source, dtype="float32")
    needed = mac_models.running(planned, 128)
    save(converted, {n: a for n, a in held(converted).items() if not n.startswith(TOWER)})
    without = load_model(converted)[0]
    assert bytes_per_token(with_tower, 64) == bytes_per_token(without, 64)
    tower = sum(a.nbytes for _, a in tree_flatten(with_tower.vision_tower.parameters()))
    assert planned.tower_bytes == tower > 0
    assert needed.weights == planned.text_bytes + tower and needed.pictures > 0
    # The text's format decides over kernels, not that of a bf16 tower.
    assert formats_of(with_tower) == formats_of(without)
