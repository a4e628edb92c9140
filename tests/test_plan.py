import importlib
import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import stored, text_config, write_checkpoint

from qwen35_mlx.convert import convert, plan
from qwen35_mlx.convert.plan import PlanRow
from qwen35_mlx.errors import Qwen35Error

# `qwen35_mlx.convert.plan` is the function; the module of that name hides behind it.
plan_module = importlib.import_module("qwen35_mlx.convert.plan")
LAYER = "language_model.model.layers.*."


def rows_of(folder: Path, **settings) -> dict[str, PlanRow]:
    rows = plan(folder, **settings).table()
    assert len({row.name for row in rows}) == len(rows)
    return {row.name: row for row in rows}


def bits_of(folder: Path, **settings) -> dict[str, tuple[int | None, int | None]]:
    return {name: (row.bits, row.group_size) for name, row in rows_of(folder, **settings).items()}


def test_planned_tensors_are_those_that_convert_writes(tmp_path):
    write_checkpoint(tmp_path / "src", moe=True, vision=True, mtp=True)
    for i, settings in enumerate((dict(bits=3, group_size=32), dict(dtype="float16"), {})):
        planned = plan(tmp_path / "src", **settings)
        out = convert(tmp_path / "src", tmp_path / f"out{i}", **settings)
        written = mx.load(str(out / "model.safetensors"))
        tensors = {t.name: t for entry in planned.entries for t in entry.tensors}
        assert tensors.keys() == written.keys()
        for name, array in written.items():
            assert tensors[name].shape == array.shape
            assert tensors[name].nbytes == array.nbytes
        assert planned.output_bytes == sum(a.nbytes for a in written.values())
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {
            "total_size": planned.output_bytes,
            "total_parameters": planned.num_parameters,
        }
        assert planned.source_bytes == sum(t.nbytes for t in planned.source.tensors.values())


def test_a_plan_reads_no_weight(tmp_path):
    write_checkpoint(tmp_path / "src", moe=True)
    before = plan(tmp_path / "src")
    path = tmp_path / "src" / "model.safetensors"
    raw = path.read_bytes()
    header_bytes = 8 + int.from_bytes(raw[:8], "little")
    path.write_bytes(raw[:header_bytes] + b"\xff" * (len(raw) - header_bytes))
    assert plan(tmp_path / "src") == before


def test_bits_per_weight_count_scales_and_biases_but_nothing_carried(tmp_path):
    write_checkpoint(tmp_path / "bare", tied=True)
    write_checkpoint(tmp_path / "laden", tied=True, vision=True, mtp=True)
    bare, laden = plan(tmp_path / "bare"), plan(tmp_path / "laden")
    assert bare.bits_per_weight == 8 * bare.output_bytes / bare.num_parameters
    assert laden.bits_per_weight == bare.bits_per_weight
    assert laden.num_parameters > bare.num_parameters
    assert bare.loaded_bytes == bare.text_bytes == bare.output_bytes == laden.text_bytes
    assert laden.mtp_bytes > bare.mtp_bytes == bare.tower_bytes == 0
    assert laden.loaded_bytes == laden.text_bytes + laden.mtp_bytes + laden.tower_bytes
    # 4 bits and two 16-bit numbers for each group of 64, and a few tensors left whole.
    quantized = [entry for entry in bare.entries if entry.bits]
    assert all(8 * e.output_bytes == 4.5 * e.num_parameters for e in quantized)
    assert 4.5 < bare.bits_per_weight < 5
    assert plan(tmp_path / "bare", dtype="bfloat16").bits_per_weight == pytest.approx(16, abs=0.01)


def test_the_layout_tells_models_apart_by_names_and_shapes_of_the_text_model(tmp_path):
    def shrink(tensors):
        tensors["model.language_model.embed_tokens.weight"] = stored(np.ones((64, 128)), "BF16")

    text = text_config(moe=False, tied=True) | dict(vocab_size=64)
    write_checkpoint(tmp_path / "bare", tied=True)
    write_checkpoint(tmp_path / "laden", tied=True, vision=True, mtp=True, dtype="F16")
    write_checkpoint(tmp_path / "small", tied=True, config=dict(text_config=text), change=shrink)
    write_checkpoint(tmp_path / "untied")
    layouts = [plan(tmp_path / name).layout for name in ("bare", "laden", "small", "untied")]
    assert layouts[0] == layouts[1] == plan(tmp_path / "bare", bits=8).layout
    assert len(set(layouts)) == 3
    # Statistics on disk have it.
    assert all(re.fullmatch("[0-9a-f]{16}", layout) for layout in layouts)


def test_defaults_are_4_bits_and_dtype_alone_means_unquantized(tmp_path):
    write_checkpoint(tmp_path / "src")
    up_proj, in_proj_a = f"{LAYER}mlp.up_proj", f"{LAYER}linear_attn.in_proj_a"
    for settings, bits, dtype in (
        ({}, 4, "BF16"),
        (dict(bits=6), 6, "BF16"),
        (dict(dtype="float16"), None, "F16"),
        (dict(bits=6, dtype="float16"), 6, "F16"),
        (dict(recipe=lambda module: (5, 64), dtype="float16"), 5, "F16"),
    ):
        rows = rows_of(tmp_path / "src", **settings)
        assert (rows[up_proj].bits, rows[up_proj].dtype) == (bits, dtype)
        assert (rows[in_proj_a].bits, rows[in_proj_a].dtype) == (None, dtype)
        assert (plan(tmp_path / "src", **settings).quantization is None) == (bits is None)


def test_routers_have_8_bits_whatever_the_rest_has(tmp_path):
    write_checkpoint(tmp_path / "src", moe=True)
    routers = (f"{LAYER}mlp.gate", f"{LAYER}mlp.shared_expert_gate")
    for settings, expected in (
        (dict(bits=2, group_size=32), (8, 32)),
        (dict(dtype="float32"), (None, None)),
        (dict(recipe=lambda module: (3, 128)), (8, 128)),
        (dict(recipe=lambda module: None), (None, None)),
    ):
        bits = bits_of(tmp_path / "src", **settings)
        assert [bits[router] for router in routers] == [expected, expected]


def test_a_recipe_decides_by_module_and_config_names_the_exceptions(tmp_path):
    write_checkpoint(tmp_path / "src", moe=True)
    asked = []

    def recipe(module):
        asked.append(module)
        if module.endswith("down_proj"):
            return 6, 32
        return None if "self_attn" in module else (4, 64)

    planned = plan(tmp_path / "src", recipe=recipe)
    assert planned.settings["recipe"] == "recipe"
    assert len(asked) == len(set(asked))
    assert not any("norm" in m or "in_proj_a" in m or "mtp" in m for m in asked)
    block = planned.quantization
    assert (block.pop("bits"), block.pop("group_size"), block.pop("mode")) == (4, 64, "affine")
    assert {name.split(".", 4)[-1]: own for name, own in block.items()} == {
        "mlp.gate": {"bits": 8, "group_size": 64},
        "mlp.shared_expert_gate": {"bits": 8, "group_size": 64},
        "mlp.switch_mlp.down_proj": {"bits": 6, "group_size": 32},
        "mlp.shared_expert.down_proj": {"bits": 6, "group_size": 32},
    }
    assert len(block) == 4 * 4


def test_a_recipe_may_choose_the_method_of_a_module_and_its_group_size_alone(tmp_path):
    write_checkpoint(tmp_path / "src")
    choices = {"up_proj": (4, 64, "search"), "down_proj": (4, 32)}
    planned = plan(tmp_path / "src", recipe=lambda m: choices.get(m.rpartition(".")[2], (4, 64)))
    for entry in planned.text_entries:
        is_searched = entry.module.endswith("up_proj")
        if entry.bits:
            assert entry.method == ("search" if is_searched else "minmax")
    overrides = {k: v for k, v in planned.quantization.items() if isinstance(v, dict)}
    assert {name.rpartition(".")[2] for name in overrides} == {"down_proj"}
    assert all(value == {"bits": 4, "group_size": 32} for value in overrides.values())
    with pytest.raises(Qwen35Error, match=r"method='best' is not supported \(for language_model"):
        plan(tmp_path / "src", recipe=lambda module: (4, 64, "best"))


def test_the_table_folds_layers_and_sums_up_what_is_carried(tmp_path):
    write_checkpoint(tmp_path / "src", moe=True, vision=True, mtp=True)
    planned = plan(tmp_path / "src")
    rows = rows_of(tmp_path / "src")
    gate_proj = rows[f"{LAYER}mlp.switch_mlp.gate_proj"]
    assert (gate_proj.count, gate_proj.shape) == (4, (3, 128, 128))
    assert gate_proj.num_parameters == 4 * 3 * 128 * 128
    assert gate_proj.nbytes * 8 == 4.5 * gate_proj.num_parameters
    assert rows[f"{LAYER}linear_attn.A_log"].count == 2
    assert (rows["mtp.*"].shape, rows["mtp.*"].bits) == ((), 4)
    assert rows["mtp.*"].nbytes == planned.mtp_bytes > 0
    coarse = rows_of(tmp_path / "src", bits=3, group_size=32)
    assert (coarse["mtp.*"].bits, coarse["mtp.*"].group_size) == (4, 32)
    assert coarse["mtp.*"].source_dtype == coarse["mtp.*"].dtype == "BF16"
    assert coarse[f"{LAYER}mlp.gate"].bits == 8
    assert coarse[f"{LAYER}linear_attn.A_log"].bits is None
    assert sum(row.nbytes for row in rows.values()) == planned.output_bytes
    assert sum(row.num_parameters for row in rows.values()) == planned.num_parameters


def test_a_head_that_is_tied_is_listed_as_dropped(tmp_path):
    def untie(tensors):
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]

    write_checkpoint(tmp_path / "src", tied=True, change=untie)
    rows = rows_of(tmp_path / "src")
    assert rows["lm_head.weight"].dtype == "dropped"
    assert rows["lm_head.weight"].nbytes == 0
    assert "language_model.lm_head" not in rows


def test_shards_are_filled_to_the_limit_and_modules_stay_whole(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "src", moe=True)
    limit = 60_000
    monkeypatch.setattr(plan_module, "MAX_SHARD_BYTES", limit)
    shards = plan(tmp_path / "src").shards
    assert len(shards) > 3
    assert [s.file for s in shards][:2] == [
        f"model-0000{i}-of-{len(shards):05}.safetensors" for i in (1, 2)
    ]
    filled = [sum(e.output_bytes for e in s.entries) for s in shards]
    assert all(n <= limit for n in filled)
    for n, after in zip(filled, shards[1:], strict=False):
        assert n + after.entries[0].output_bytes > limit
    for shard in shards:
        stems = [t.name.rpartition(".")[0] for t in shard.tensors if t.name.endswith(".scales")]
        names = {t.name for t in shard.tensors}
        assert all({f"{s}.weight", f"{s}.biases"} <= names for s in stems)
    total = sum(filled)
    for limit, num_shards in ((total, 1), (total - 1, 2)):
        monkeypatch.setattr(plan_module, "MAX_SHARD_BYTES", limit)
        assert len(plan(tmp_path / "src").shards) == num_shards
    monkeypatch.setattr(plan_module, "MAX_SHARD_BYTES", 1)
    assert all(len(s.entries) == 1 for s in plan(tmp_path / "src").shards)


def test_every_tensor_of_a_shard_is_aligned(tmp_path):
    odd = {"mtp.a": stored(np.ones(3), "BF16"), "mtp.b": stored(np.ones(2), "F32")}
    write_checkpoint(tmp_path / "src", mtp=True, change=lambda tensors: tensors.update(odd))
    (shard,) = plan(tmp_path / "src").shards
    offset = 0
    for tensor in shard.tensors:
        assert offset % {"U32": 4, "F32": 4, "BF16": 2}[tensor.dtype] == 0
        offset += tensor.nbytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(bits=7), "bits=7 is not supported"),
        (dict(bits=0), "bits=0 is not supported"),
        (dict(bits="4"), "bits='4' is not supported"),
        (dict(group_size=16), "group_size=16 is not supported"),
        (dict(dtype="int8"), "dtype='int8' is not supported"),
        (dict(recipe=lambda module: (9, 64)), r"bits=9 is not supported \(for language_model"),
    ],
)
def test_unusable_settings_are_refused(tmp_path, settings, message):
    write_checkpoint(tmp_path / "src")
    with pytest.raises(Qwen35Error, match=message):
        plan(tmp_path / "src", **settings)


def test_a_group_size_that_does_not_divide_names_the_weights_and_the_sizes_that_do(tmp_path):
    # Golden vectors of the runtime use such widths too: 96 = 3 groups of 32.
    write_checkpoint(tmp_path / "src", moe=True)
    path = tmp_path / "src" / "config.json"
    config = json.loads(path.read_text())
    for key in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        config["text_config"][key] = 96
    path.write_text(json.dumps(config))
    narrow_experts(tmp_path / "src" / "model.safetensors")
    with pytest.raises(Qwen35Error) as error:
        plan(tmp_path / "src", group_size=128)
    lines = str(error.value).splitlines()
    assert lines[0] == "group_size=128 does not divide the inputs of 2 kinds of weights"
    assert f"    {LAYER}mlp.switch_mlp.down_proj: 96 inputs" in lines
    assert f"    {LAYER}mlp.shared_expert.down_proj: 96 inputs" in lines
    assert "  expected: group_size 32" in lines
    assert plan(tmp_path / "src", group_size=32).settings["bits"] == 4
    assert plan(tmp_path / "src", dtype="bfloat16").settings["bits"] is None


def test_the_mtp_layer_has_groups_that_divide_its_rows(tmp_path):
    write_checkpoint(tmp_path / "src", moe=True, mtp=True)
    path = tmp_path / "src" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= dict(moe_intermediate_size=96, shared_expert_intermediate_size=96)
    path.write_text(json.dumps(config))
    narrow_experts(tmp_path / "src" / "model.safetensors")
    groups = {"down_proj": 32}
    planned = plan(
        tmp_path / "src",
        recipe=lambda m: (6, 128 if m.startswith("mtp") else groups.get(m.rpartition(".")[2], 64)),
    )
    found = {e.module: (e.bits, e.group_size) for e in planned.entries if e.bits}
    narrow = {name: kind for name, kind in found.items() if "mtp" in name and "down_proj" in name}
    assert len(narrow) == 2 and set(narrow.values()) == {(4, 32)}
    assert found["mtp.layers.0.mlp.shared_expert.up_proj"] == (4, 128)
    assert found["language_model.model.layers.0.mlp.shared_expert.down_proj"] == (6, 32)


def narrow_experts(path: Path) -> None:
    """Rewrite the header alone, for experts 96 wide; the data no longer mean anything."""
    raw = path.read_bytes()
    header_bytes = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + header_bytes])
    offset = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = entry["shape"]
        if "shared_expert." in name or "experts." in name:
            axis = len(shape) - 1 if "down_proj" in name else len(shape) - 2
            shape[axis] = shape[axis] * 96 // 128
        nbytes = 2 * mx.zeros(shape).size if entry["dtype"] == "BF16" else 4 * shape[0]
        entry["data_offsets"] = [offset, offset := offset + nbytes]
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + bytes(offset))
