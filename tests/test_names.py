import numpy as np
import pytest
from checkpoints import LAYER_TYPES, stored, write_checkpoint

from qwen35_mlx.checkpoint.names import fold
from qwen35_mlx.checkpoint.resolver import resolve
from qwen35_mlx.checkpoint.tensor_table import Role, Transform
from qwen35_mlx.convert import plan
from qwen35_mlx.convert.source import open_source
from qwen35_mlx.errors import CheckpointError, ConfigError

TRUNK = "model.language_model."


def matches(folder):
    source = open_source(folder)
    return resolve(source.config, source.tensors).matches


def test_output_names_are_in_layer_order_and_unique(tmp_path):
    blocks = {
        f"model.visual.blocks.{i}.attn.proj.bias": stored(np.ones(8), "F32") for i in (10, 2, 11, 3)
    }
    write_checkpoint(
        tmp_path / "src", moe=True, vision=True, mtp=True, change=lambda t: t.update(blocks)
    )
    names = [match.name for match in matches(tmp_path / "src")]
    assert len(set(names)) == len(names)
    assert names[0] == "language_model.model.embed_tokens.weight"
    layers = [int(n.split(".")[3]) for n in names if n.startswith("language_model.model.layers.")]
    assert layers == sorted(layers)
    assert set(layers) == set(range(len(LAYER_TYPES)))
    head = names.index("language_model.lm_head.weight")
    assert names[head - 1] == "language_model.model.norm.weight"
    carried = names[head + 1 :]
    assert all(n.startswith(("mtp.", "vision_tower.")) for n in carried)
    assert [n.split(".")[2] for n in carried if "attn.proj.bias" in n] == ["2", "3", "10", "11"]


@pytest.mark.parametrize("experts", ["fused", "each"])
def test_segments_cover_every_source_row_exactly_once(tmp_path, experts):
    write_checkpoint(tmp_path / "src", moe=True, experts=experts, vision=True, mtp=True)
    covered: dict[str, list[tuple[int, int]]] = {}
    for match in matches(tmp_path / "src"):
        for segment in match.segments:
            rows = (segment.start_row, segment.stop_row)
            covered.setdefault(segment.tensor.name, []).append(rows)
    tensors = open_source(tmp_path / "src").tensors
    assert covered.keys() == tensors.keys()
    for name, parts in covered.items():
        ends = [0]
        for start, stop in sorted(parts):
            assert start == ends[-1]
            ends.append(stop)
        assert ends[-1] == tensors[name].num_rows


def test_only_zero_centred_norms_are_shifted(tmp_path):
    write_checkpoint(tmp_path / "src", moe=True, vision=True, mtp=True)
    found = matches(tmp_path / "src")
    shifted = {fold(m.name).removeprefix("language_model.model.") for m in found
               if m.transform is Transform.ADD_ONE}  # fmt: skip
    assert shifted == {
        "norm.weight",
        "mtp.norm.weight",
        "mtp.pre_fc_norm_embedding.weight",
        "mtp.pre_fc_norm_hidden.weight",
        "mtp.layers.*.input_layernorm.weight",
        "mtp.layers.*.post_attention_layernorm.weight",
        "mtp.layers.*.self_attn.q_norm.weight",
        "mtp.layers.*.self_attn.k_norm.weight",
        "layers.*.input_layernorm.weight",
        "layers.*.post_attention_layernorm.weight",
        "layers.*.self_attn.q_norm.weight",
        "layers.*.self_attn.k_norm.weight",
    }
    never_quantized = {fold(m.name).removeprefix("language_model.model.layers.*.") for m in found
                       if m.row.role in (Role.PLAIN, Role.DECAY)}  # fmt: skip
    assert {"linear_attn.norm.weight", "linear_attn.in_proj_a.weight", "linear_attn.A_log",
            "linear_attn.in_proj_b.weight", "linear_attn.dt_bias"} < never_quantized  # fmt: skip


def test_missing_unknown_and_misshapen_tensors_are_listed_together(tmp_path):
    def change(tensors):
        del tensors[f"{TRUNK}layers.1.self_attn.k_norm.weight"]
        for layer in (0, 2):
            del tensors[f"{TRUNK}layers.{layer}.linear_attn.A_log"]
        del tensors[f"{TRUNK}layers.3.mlp.experts.2.up_proj.weight"]
        tensors[f"{TRUNK}layers.0.mlp.gate.bias"] = stored(np.zeros(3), "F32")
        tensors[f"{TRUNK}layers.7.mlp.gate.weight"] = stored(np.zeros((3, 128)), "F32")
        tensors["lm_head.weight"] = stored(np.zeros((96, 64)), "F32")
        tensors[f"{TRUNK}norm.weight"] = ("I64", np.zeros(128, dtype=np.int64))

    write_checkpoint(tmp_path / "src", moe=True, experts="each", change=change)
    with pytest.raises(CheckpointError) as error:
        plan(tmp_path / "src")
    message = str(error.value)
    assert "8 tensors are wrong" in message
    lines = {line.strip() for line in message.splitlines() if line.startswith("    ")}
    assert lines == {
        f"missing  {TRUNK}layers.1.self_attn.k_norm.weight",
        f"missing  {TRUNK}layers.*.linear_attn.A_log (2 tensors)",
        f"missing  {TRUNK}layers.3.mlp.experts.2.up_proj.weight",
        f"unknown  {TRUNK}layers.0.mlp.gate.bias",
        f"unknown  {TRUNK}layers.7.mlp.gate.weight",
        "shape    lm_head.weight: [96, 64], expected [96, 128]",
        f"dtype    {TRUNK}norm.weight: I64, expected F32, F16, BF16",
    }


def test_a_list_of_many_problems_stays_short(tmp_path):
    write_checkpoint(tmp_path / "src", change=lambda t: t.update({
        f"model.extra_{i}": stored(np.zeros(1), "F32") for i in range(50)
    }))  # fmt: skip
    with pytest.raises(CheckpointError, match="and 30 more kinds") as error:
        plan(tmp_path / "src")
    assert len(str(error.value).splitlines()) < 28


def test_a_conv_that_is_transposed_already_is_misshapen_not_guessed(tmp_path):
    def change(tensors):
        name = f"{TRUNK}layers.0.linear_attn.conv1d.weight"
        dtype, values = tensors[name]
        tensors[name] = (dtype, values.transpose(0, 2, 1))

    write_checkpoint(tmp_path / "src", change=change)
    with pytest.raises(
        CheckpointError, match=r"conv1d.weight: \[192, 4, 1\], expected \[192, 1, 4\]"
    ):
        plan(tmp_path / "src")


def test_experts_of_different_dtypes_are_refused(tmp_path):
    def change(tensors):
        name = f"{TRUNK}layers.0.mlp.experts.1.up_proj.weight"
        tensors[name] = stored(np.zeros((128, 128)), "F32")

    write_checkpoint(tmp_path / "src", moe=True, experts="each", change=change)
    with pytest.raises(CheckpointError, match=r"experts.1.up_proj.weight: F32, expected BF16"):
        plan(tmp_path / "src")


def test_both_forms_of_the_same_experts_are_refused(tmp_path):
    def change(tensors):
        name = f"{TRUNK}layers.0.mlp.experts.1.up_proj.weight"
        tensors[name] = stored(np.zeros((128, 128)), "BF16")

    write_checkpoint(tmp_path / "src", moe=True, change=change)
    with pytest.raises(CheckpointError, match=r"unknown  .*experts.1.up_proj.weight"):
        plan(tmp_path / "src")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen3_moe"}, "is not a Qwen3.5 model"),
        ({"model_type": "qwen3_next"}, "text_config.model_type does not match"),
    ],
)
def test_sources_of_another_model_are_refused(tmp_path, config, message):
    write_checkpoint(tmp_path / "src", config=config)
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path / "src")


def test_folding_keeps_numbers_that_are_no_path_component():
    assert fold("a.12.b1.experts.3") == "a.*.b1.experts.*"
