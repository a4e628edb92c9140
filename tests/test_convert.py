import hashlib
import importlib
import json
import shutil
import tracemalloc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import (
    EXPERT_WIDTH,
    EXPERTS,
    Tensors,
    as_mlx,
    assert_nothing_left,
    safetensors_bytes,
    stored,
    write_checkpoint,
)
from everyday import everyday

from qwen35_mlx.convert import convert, tasks
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.quant import quantize
from qwen35_mlx.quant.affine import BITS, GROUP_SIZES

plan_module = importlib.import_module("qwen35_mlx.convert.plan")
TRUNK, OUTPUT = "model.language_model.", "language_model.model."
SHIFTED = ("input_layernorm.weight", "post_attention_layernorm.weight", "q_norm.weight",
           "k_norm.weight", f"{OUTPUT}norm.weight", "mtp.norm.weight",
           "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight")  # fmt: skip
WHOLE = (*SHIFTED, "norm.weight", "layernorm.weight", "conv1d.weight", "in_proj_a.weight",
         "in_proj_b.weight", "A_log", "dt_bias")  # fmt: skip
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def expected_output(
    tensors: Tensors,
    *,
    bits: int | None = 4,
    group_size: int = 64,
    dtype: str | None = None,
    method: str = "minmax",
) -> dict[str, mx.array]:
    """The conversion of whole tensors, one after the other, as simply as it can be said."""
    output = {}
    for name, w in whole_weights(tensors).items():
        if name.startswith("vision_tower."):
            output[name] = w
            continue
        if name.endswith(SHIFTED):
            w = (w.astype(mx.float32) + 1).astype(w.dtype if dtype is None else DTYPES[dtype])
        if dtype is not None and not (name.endswith("A_log") and w.dtype == mx.float32):
            w = w.astype(DTYPES[dtype])
        if bits is None or name.endswith(WHOLE):
            output[name] = w
            continue
        router = name.endswith(("mlp.gate.weight", "shared_expert_gate.weight", "mtp.fc.weight"))
        own_bits = 8 if router else 4 if name.startswith("mtp.") else bits
        parts = quantize(w, own_bits, group_size, method)
        for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
            output[name.removesuffix("weight") + part] = array
    return output


def whole_weights(tensors: Tensors) -> dict[str, mx.array]:
    """Every tensor under its output name and in its output layout, values untouched."""
    weights = {}
    for name, tensor in tensors.items():
        w = as_mlx(tensor)
        name = name.replace(TRUNK, OUTPUT).replace("model.visual.", "vision_tower.")
        if name.startswith("lm_head."):
            name = f"language_model.{name}"
        if name.endswith("conv1d.weight"):
            w = w.transpose(0, 2, 1)
        if name == "vision_tower.patch_embed.proj.weight":
            w = w.transpose(0, 2, 3, 4, 1)
        if name.endswith("experts.gate_up_proj"):
            name = name.replace("experts.gate_up_proj", "switch_mlp.{}_proj.weight")
            weights[name.format("gate")] = w[:, :EXPERT_WIDTH]
            weights[name.format("up")] = w[:, EXPERT_WIDTH:]
        elif name.endswith("experts.down_proj"):
            weights[name.replace("experts.down_proj", "switch_mlp.down_proj.weight")] = w
        else:
            weights[name] = w
    # The MTP layer's experts are stored one by one.
    for first in [n for n in weights if ".experts.0." in n]:
        apart = [weights.pop(first.replace("experts.0.", f"experts.{e}.")) for e in range(EXPERTS)]
        weights[first.replace("experts.0.", "switch_mlp.")] = mx.stack(apart)
    return weights


def load(folder: Path) -> dict[str, mx.array]:
    weights = {}
    for file in sorted(folder.glob("model*.safetensors")):
        weights |= mx.load(str(file))
    return weights


def assert_same(got: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        assert got[name].shape == array.shape, name
        assert mx.array_equal(got[name], array), name


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> tuple[Path, Tensors]:
    """A fused bf16 MoE with vision and MTP; tests only read it."""
    folder = tmp_path_factory.mktemp("moe") / "src"
    return folder, write_checkpoint(folder, moe=True, vision=True, mtp=True, tokenizer=True)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", everyday(BITS, 1))
def test_output_equals_quantizing_whole_tensors(tmp_path, monkeypatch, moe, bits, group_size):
    source, tensors = moe
    # Slices of 50 rows, and a shorter one at the end of each expert.
    monkeypatch.setattr(tasks, "SLICE_BYTES", 50 * 128 * 2)
    out = convert(source, tmp_path / "out", bits=bits, group_size=group_size)
    assert_same(load(out), expected_output(tensors, bits=bits, group_size=group_size))


@pytest.mark.slow
def test_searching_in_slices_equals_searching_in_whole_tensors(tmp_path, monkeypatch, moe):
    source, tensors = moe
    monkeypatch.setattr(tasks, "SLICE_BYTES", 50 * 128 * 2)
    out = convert(source, tmp_path / "out", bits=3, method="search")
    assert_same(load(out), expected_output(tensors, bits=3, method="search"))
    plain = load(convert(source, tmp_path / "plain", bits=3))
    assert any(not mx.array_equal(a, plain[name]).item() for name, a in load(out).items())


@pytest.mark.parametrize("stored_dtype", everyday(["F32", "F16", "BF16"], 2))
def test_output_dtype_is_the_chosen_one_or_that_of_the_source(tmp_path, stored_dtype):
    source = tmp_path / "src"
    tensors = write_checkpoint(source, dtype=stored_dtype, vision=True, mtp=True)
    for bits in (None, 6):
        for dtype in (None, *DTYPES):
            settings = dict(bits=bits or (4 if dtype is None else None), dtype=dtype)
            out = convert(source, tmp_path / f"{bits}{dtype}", **settings)
            assert_same(load(out), expected_output(tensors, **settings))


@pytest.mark.slow
def test_fused_and_separate_experts_give_the_same_file(tmp_path):
    for form in ("fused", "each"):
        write_checkpoint(tmp_path / form, moe=True, experts=form)
    for i, settings in enumerate((dict(bits=3), dict(dtype="bfloat16"))):
        files = [
            (convert(tmp_path / form, tmp_path / f"{form}{i}", **settings) / "model.safetensors")
            for form in ("fused", "each")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_one_file_and_many_shards_give_the_same_file(tmp_path):
    for num_shards in (1, 2, 7):
        write_checkpoint(tmp_path / f"src{num_shards}", moe=True, mtp=True, num_shards=num_shards)
        convert(tmp_path / f"src{num_shards}", tmp_path / f"out{num_shards}")
    one, two, seven = ((tmp_path / f"out{n}" / "model.safetensors").read_bytes() for n in (1, 2, 7))
    assert one == two == seven


@pytest.mark.slow
def test_experts_strewn_over_shards_give_the_same_file(tmp_path):
    write_checkpoint(tmp_path / "fused", moe=True)
    tensors = write_checkpoint(tmp_path / "src", moe=True, experts="each")
    expected = convert(tmp_path / "fused", tmp_path / "out") / "model.safetensors"
    (tmp_path / "src" / "model.safetensors").unlink()
    for seed in range(3):
        files = [f"model-{i:05}-of-00006.safetensors" for i in range(1, 7)]
        names = list(tensors)
        np.random.default_rng(seed).shuffle(names)
        for i, file in enumerate(files):
            part = {name: tensors[name] for name in names[i::6]}
            (tmp_path / "src" / file).write_bytes(safetensors_bytes(part))
        weight_map = {name: files[i % 6] for i, name in enumerate(names)}
        index = tmp_path / "src" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        got = convert(tmp_path / "src", tmp_path / f"out{seed}") / "model.safetensors"
        assert got.read_bytes() == expected.read_bytes()


@pytest.mark.slow
def test_mtp_experts_that_are_fused_give_the_same_file(tmp_path):
    """Qwen3.5 stores them one by one, Qwen3.6 as one stack."""

    def fuse(tensors: Tensors) -> None:
        prefix = "mtp.layers.0.mlp.experts."
        apart = {n: tensors.pop(n)[1] for n in list(tensors) if n.startswith(prefix)}
        gate, up, down = (
            np.stack([apart[f"{prefix}{e}.{kind}_proj.weight"] for e in range(EXPERTS)])
            for kind in ("gate", "up", "down")
        )
        tensors[f"{prefix}gate_up_proj"] = "BF16", np.concatenate([gate, up], axis=1)
        tensors[f"{prefix}down_proj"] = "BF16", down

    write_checkpoint(tmp_path / "apart", moe=True, mtp=True)
    write_checkpoint(tmp_path / "fused", moe=True, mtp=True, change=fuse)
    files = [
        convert(tmp_path / form, tmp_path / f"{form}-2bit", bits=2) / "model.safetensors"
        for form in ("apart", "fused")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_text_only_and_whole_checkpoints_give_the_same_file(tmp_path):
    for kind in (False, True):
        write_checkpoint(tmp_path / f"src{kind}", moe=kind, flat=False)
        write_checkpoint(tmp_path / f"flat{kind}", moe=kind, flat=True)
        nested = convert(tmp_path / f"src{kind}", tmp_path / f"out_src{kind}")
        flat = convert(tmp_path / f"flat{kind}", tmp_path / f"out_flat{kind}")
        files = [folder / "model.safetensors" for folder in (nested, flat)]
        assert files[0].read_bytes() == files[1].read_bytes()
        model_type = "qwen3_5_moe" if kind else "qwen3_5"
        for folder in (nested, flat):
            config = json.loads((folder / "config.json").read_text())
            assert config["model_type"] == model_type
            assert config["tie_word_embeddings"] is False
            assert config["text_config"]["model_type"] == f"{model_type}_text"


def test_norms_are_shifted_once_when_the_conv_is_in_another_shard(tmp_path):
    tensors = write_checkpoint(tmp_path / "src", num_shards=9)
    index = json.loads((tmp_path / "src" / "model.safetensors.index.json").read_text())
    where = index["weight_map"]
    conv = {file for name, file in where.items() if "conv1d" in name}
    apart = [n for n in where if n.endswith("norm.weight") and where[n] not in conv]
    assert f"{TRUNK}norm.weight" in apart
    assert any(n.endswith("q_norm.weight") for n in apart)
    written = load(convert(tmp_path / "src", tmp_path / "out"))
    for name in (n for n in tensors if n.endswith("norm.weight")):
        shift = 0 if "linear_attn.norm" in name else 1
        w = as_mlx(tensors[name]).astype(mx.float32) + shift
        assert mx.array_equal(written[name.replace(TRUNK, OUTPUT)], w.astype(mx.bfloat16)), name


# The smaller is less than a row of many tensors; the patch embedding always has to stay whole.
@pytest.mark.slow
@pytest.mark.parametrize("slice_bytes", everyday([1900, 200], 0))
def test_the_vision_tower_is_carried_in_source_precision(tmp_path, monkeypatch, moe, slice_bytes):
    source, tensors = moe
    monkeypatch.setattr(tasks, "SLICE_BYTES", slice_bytes)
    written = load(convert(source, tmp_path / "out", bits=2, dtype="float16"))
    carried = [n for n in tensors if n.startswith("model.visual.")]
    assert len(carried) >= 5
    for name in carried:
        array = written[name.replace("model.visual.", "vision_tower.")]
        original = as_mlx(tensors[name])
        assert array.dtype == mx.bfloat16
        if name.endswith("patch_embed.proj.weight"):
            assert array.shape == (8, 2, 4, 5, 3)
            array = array.moveaxis(-1, 1)
        assert mx.array_equal(array, original), name


def test_a_tied_checkpoint_may_store_its_head_and_the_output_has_none(tmp_path):
    def untie(tensors):
        tensors["lm_head.weight"] = tensors[f"{TRUNK}embed_tokens.weight"]

    tensors = write_checkpoint(tmp_path / "without", tied=True)
    write_checkpoint(tmp_path / "with", tied=True, change=untie)
    outs = [convert(tmp_path / kind, tmp_path / f"out_{kind}") for kind in ("without", "with")]
    for out in outs:
        assert_same(load(out), expected_output(tensors))
        config = json.loads((out / "config.json").read_text())
        assert config["tie_word_embeddings"] is True
        assert config["text_config"]["tie_word_embeddings"] is True


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_head_that_is_not_the_embedding_is_not_dropped_in_silence(tmp_path, dtype):
    """transformers keeps both where they differ, whatever the config says."""

    def add_head(tensors: Tensors) -> None:
        _, embedding = tensors[f"{TRUNK}embed_tokens.weight"]
        values = np.array(as_mlx(("BF16", embedding)).astype(mx.float32))
        values[-1, -1] += 1
        tensors["lm_head.weight"] = stored(values, dtype)

    write_checkpoint(tmp_path / "src", tied=True, change=add_head)
    with pytest.raises(Qwen35Error, match=r"lm_head.weight is not the embedding"):
        convert(tmp_path / "src", tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_many_output_shards_hold_what_one_would(tmp_path, monkeypatch, moe):
    source, tensors = moe
    monkeypatch.setattr(plan_module, "MAX_SHARD_BYTES", 100_000)
    out = convert(source, tmp_path / "out")
    assert_same(load(out), expected_output(tensors))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3
    assert files[-1] == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    for file in files:
        listed = {name for name, where in index["weight_map"].items() if where == file}
        assert listed == mx.load(str(out / file)).keys()
    checksums = json.loads((out / "config.json").read_text())["qwen35_mlx"]["sha256"]
    others = {path.name for path in out.iterdir()} - {"config.json"}
    assert {"model.safetensors.index.json", "tokenizer.json", *files} <= others
    assert checksums == {
        file: hashlib.sha256((out / file).read_bytes()).hexdigest() for file in others
    }


def test_progress_counts_every_source_byte_once(tmp_path, moe):
    source, tensors = moe
    calls = []
    convert(source, tmp_path / "out", progress=lambda *call: calls.append(call))
    total = sum(values.nbytes for _, values in tensors.values())
    done = [call[0] for call in calls]
    assert done == sorted(set(done))
    assert (done[0], done[-1]) == (0, total)
    assert {call[1] for call in calls} == {total}
    assert {call[2] for call in calls} == tensors.keys()
    assert {call[3] for call in calls} == {"model.safetensors"}


def test_memory_is_bounded_by_a_slice(tmp_path, monkeypatch):
    # 16 MB in one tensor, slices of 256 kB.
    wide = stored(np.full((128, 2**16), 0.5, dtype=np.float32), "BF16")
    write_checkpoint(tmp_path / "src", change=lambda t: t.update({"mtp.wide": wide}))
    monkeypatch.setattr(tasks, "SLICE_BYTES", 2**18)
    tracemalloc.start()
    mx.reset_peak_memory()
    before_bytes = mx.get_active_memory()
    try:
        convert(tmp_path / "src", tmp_path / "out", dtype="float32")
        numpy_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert numpy_bytes < 8 * 2**18
    assert mx.get_peak_memory() - before_bytes < 8 * 2**18


@pytest.mark.slow
def test_mlx_lm_loads_the_output_and_holds_our_weights(tmp_path, moe):
    import mlx_lm
    from mlx.utils import tree_flatten

    write_checkpoint(tmp_path / "dense", tied=True, flat=True, tokenizer=True)
    for source, settings in (
        (moe[0], dict(bits=3, group_size=32)),
        (moe[0], dict(dtype="float32")),
        (tmp_path / "dense", dict(bits=4)),
        (tmp_path / "dense", dict(recipe=lambda m: None if "mlp" in m else (6, 32))),
    ):
        out = convert(source, tmp_path / "out", **settings)
        model, _ = mlx_lm.load(str(out))
        ours = {n: a for n, a in load(out).items() if not n.startswith(("mtp.", "vision_tower."))}
        assert_same(dict(tree_flatten(model.parameters())), ours)
        assert mx.all(mx.isfinite(model(mx.array([[1, 2, 3]])))).item()
        shutil.rmtree(out)


def put(name: str, row: int, value: float):
    def change(tensors: Tensors) -> None:
        dtype, values = tensors[name]
        flat = values.reshape(-1, values.shape[-1])
        flat[row, -1] = stored(np.array([value]), dtype)[1][0]

    return change


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_a_weight_that_is_not_finite_is_named_in_every_precision(tmp_path, dtype, value):
    name = f"{TRUNK}layers.2.input_layernorm.weight"
    write_checkpoint(tmp_path / "src", dtype=dtype, change=put(name, 0, value))
    with pytest.raises(Qwen35Error, match=f"tensor {name} has values that are not finite"):
        convert(tmp_path / "src", tmp_path / "out")


@pytest.mark.parametrize("value", everyday([float("nan"), float("inf"), float("-inf")], 0))
@pytest.mark.parametrize(
    ("name", "row"),
    [
        (f"{TRUNK}layers.3.mlp.experts.down_proj", -1),
        (f"{TRUNK}layers.0.mlp.experts.gate_up_proj", 300),
        (f"{TRUNK}layers.2.input_layernorm.weight", 0),
        ("mtp.layers.0.mlp.experts.2.up_proj.weight", 5),
        ("model.visual.patch_embed.proj.weight", 9),
    ],
)
def test_a_weight_that_is_not_finite_is_named(tmp_path, name, row, value):
    write_checkpoint(
        tmp_path / "src", moe=True, vision=True, mtp=True, change=put(name, row, value)
    )
    with pytest.raises(Qwen35Error, match=f"tensor {name} has values that are not finite"):
        convert(tmp_path / "src", tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_weights_too_far_apart_for_a_scale_are_named(tmp_path):
    name = f"{TRUNK}layers.0.mlp.up_proj.weight"
    write_checkpoint(tmp_path / "src", change=put(name, 7, 3.3e38))
    with pytest.raises(Qwen35Error, match=f"{name} cannot be quantized: the range of a group"):
        convert(tmp_path / "src", tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_a_weight_too_large_for_float16_is_named(tmp_path):
    name = f"{TRUNK}layers.0.mlp.up_proj.weight"
    write_checkpoint(tmp_path / "src", change=put(name, 7, 1e5))
    with pytest.raises(Qwen35Error, match=f"{name} has values outside the range of .*float16"):
        convert(tmp_path / "src", tmp_path / "out", bits=4, dtype="float16")
    assert_nothing_left(tmp_path)
    assert convert(tmp_path / "src", tmp_path / "out", bits=4)
