"""Bits, group size and mode of quantized weights: the files decide, config.json may be wrong."""

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.convert  # noqa: F401
import numpy as np
import pytest
from checkpoints import VOCAB, text_config, write_checkpoint
from everyday import everyday
from mlx_lm.models import qwen3_next
from mlx_lm.utils import load_model as load_theirs
from mlx_lm.utils import quantize_model, save_config, save_model

from qwen35_mlx.checkpoint.formats import is_named_by_mlx
from qwen35_mlx.checkpoint.headers import SourceTensor
from qwen35_mlx.checkpoint.quantization import (
    BITS,
    GROUP_SIZES,
    MODES,
    Claims,
    Quantization,
    infer,
    quantization_block,
)
from qwen35_mlx.convert import convert
from qwen35_mlx.convert.layerwise import Layerwise, open_checkpoint, run_layer
from qwen35_mlx.errors import CheckpointError, ConfigError
from qwen35_mlx.model.loading import load_model

# A function of the same name hides the module.
RECIPES = sys.modules["mlx_lm.convert"]
IDS = mx.arange(12)[None] * 5 % VOCAB
QWEN3_NEXT = dict(
    model_type="qwen3_next", vocab_size=VOCAB, hidden_size=128, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=256,
    linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=16,
    linear_value_head_dim=64, linear_conv_kernel_dim=4, num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=64, shared_expert_intermediate_size=64, decoder_sparse_step=1,
    mlp_only_layers=[], norm_topk_prob=True, full_attention_interval=4, rope_theta=1e6,
    partial_rotary_factor=0.25, rope_scaling=None, max_position_embeddings=512, rms_norm_eps=1e-6,
    tie_word_embeddings=False, hidden_act="silu", attention_bias=False,
)  # fmt: skip


def logits(folder: Path) -> np.ndarray:
    return np.array(load_model(folder)[0](IDS))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantization")
    for name, moe in (("dense", False), ("moe", True)):
        text = text_config(moe, tied=not moe) | {"full_attention_interval": 2}
        write_checkpoint(folder / name, moe=moe, tied=not moe, config={"text_config": text})
    return folder


def written_by_mlx_lm(kind: str, sources: Path, out: Path, how: dict[str, Any]) -> np.ndarray:
    """Write what mlx-lm's convert would write; returns its logits."""
    if kind == "next":
        mx.random.seed(0)
        config = copy.deepcopy(QWEN3_NEXT)
        model = qwen3_next.Model(qwen3_next.ModelArgs.from_dict(config))
    else:
        model, config = load_theirs(sources / kind)
    model.set_dtype(mx.float32)
    if how:
        recipe = how.get("recipe")
        predicate = recipe and RECIPES.mixed_quant_predicate_builder(recipe, model, None)
        model, config = quantize_model(
            model, config, how.get("group_size"), how.get("bits"),
            mode=how.get("mode", "affine"), quant_predicate=predicate,
        )  # fmt: skip
    save_model(out, model)
    save_config(config, out / "config.json")
    return np.array(model(IDS))


WAYS: list[dict[str, Any]] = [
    {},
    *({"recipe": recipe} for recipe in RECIPES.QUANT_RECIPES),
    *({"mode": mode} for mode in MODES),
    {"bits": 3, "group_size": 128},
    {"bits": 1, "group_size": 32},
]


@pytest.mark.parametrize(
    "how", everyday(WAYS, 0, 5), ids=lambda how: "-".join(map(str, how.values())) or "plain"
)
@pytest.mark.parametrize("kind", ["dense", "moe", "next"])
def test_what_mlx_lm_quantizes_has_its_logits_here(
    tmp_path: Path, sources: Path, kind: str, how: dict[str, Any]
) -> None:
    """Its recipes write group_size null; Qwen3-Next has fused projections of other names."""
    expected = written_by_mlx_lm(kind, sources, tmp_path / "out", how)
    np.testing.assert_allclose(logits(tmp_path / "out"), expected, atol=1e-3)
    assert expected.std() > 0.3


@pytest.mark.parametrize("mode", everyday(MODES, 0))
def test_a_qwen3_next_folder_of_mlx_lm_is_split_without_quantizing_it_again(
    tmp_path: Path, sources: Path, mode: str
) -> None:
    """convert called it converted already, load called it not converted."""
    expected = written_by_mlx_lm("next", sources, tmp_path / "next", {"mode": mode})
    out = convert(tmp_path / "next", tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_moe"
    theirs, _ = load_theirs(out)
    for model in (load_model(out)[0], theirs):
        np.testing.assert_allclose(np.array(model(IDS)), expected, atol=1e-3)
    names = mx.load(str(out / "model.safetensors")).keys()
    assert "language_model.model.layers.0.linear_attn.in_proj_qkv.scales" in names


@pytest.mark.slow
def test_a_plain_qwen3_next_folder_of_mlx_lm_is_quantized_by_convert(
    tmp_path: Path, sources: Path
) -> None:
    expected = written_by_mlx_lm("next", sources, tmp_path / "next", {})
    plain = convert(tmp_path / "next", tmp_path / "plain", dtype="float32")
    np.testing.assert_allclose(logits(plain), expected, atol=1e-3)
    packed = convert(tmp_path / "next", tmp_path / "packed", bits=8, group_size=32)
    assert 0 < np.abs(logits(packed) - expected).mean() < 0.05


def test_fidelity_reads_a_qwen3_next_folder_layer_by_layer(tmp_path: Path, sources: Path) -> None:
    expected = written_by_mlx_lm("next", sources, tmp_path / "next", {"bits": 8})
    checkpoint = open_checkpoint(tmp_path / "next")
    runner = Layerwise(checkpoint)
    hidden = runner.embed(IDS)
    for index in range(4):
        hidden = run_layer(runner.layer(index), hidden)
    ((_, _, found),) = runner.logits(hidden)
    np.testing.assert_allclose(np.array(found), expected[0], atol=1e-3)
    assert 8 < checkpoint.bits_per_weight < 10


@pytest.fixture(scope="module")
def mixed(sources: Path) -> Path:
    """3 bits by default, 6 in groups of 32 for the down projections."""

    def recipe(module: str) -> tuple[int, int]:
        return (6, 32) if "down_proj" in module else (3, 64)

    return convert(sources / "moe", sources / "mixed", recipe=recipe, bits=3)


Edit = Callable[[dict[str, Any]], Any]


def with_config(mixed: Path, out: Path, edit: Edit) -> Path:
    shutil.copytree(mixed, out)
    config = json.loads((out / "config.json").read_text())
    edit(config)
    (out / "config.json").write_text(json.dumps(config))
    return out


def each_block(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Edit:
    def edit(config: dict[str, Any]) -> None:
        config["quantization"] = config["quantization_config"] = change(config["quantization"])

    return edit


def entries(change: Callable[[str, Any], Any]) -> Edit:
    """Change the entries of modules."""
    return each_block(
        lambda block: {k: change(k, v) if isinstance(v, dict) else v for k, v in block.items()}
    )


AGREES: dict[str, Edit] = {
    "as it is": lambda c: None,
    "one name of the block": lambda c: c.pop("quantization"),
    "the other name": lambda c: c.pop("quantization_config"),
    "floats": entries(lambda k, v: {key: float(n) for key, n in v.items()}),
    "nulls": entries(lambda k, v: v | {"mode": None}),
    "group_size null": each_block(lambda b: b | {"group_size": None, "mode": None}),
    "without a prefix": each_block(
        lambda b: {k.removeprefix("language_model."): v for k, v in b.items()}
    ),
    "without both": each_block(
        lambda b: {k.removeprefix("language_model.model."): v for k, v in b.items()}
    ),
    "as hugging face": each_block(
        lambda b: {k.replace("language_model.model", "model.language_model"): v
                   for k, v in b.items()}
    ),
    "modules that are not there": each_block(
        lambda b: b | {"model.layers.99.x": {"bits": 4}, "visual.y": False, "z": None}
    ),
}  # fmt: skip
CONTRADICTS: dict[str, Edit] = {
    "true": entries(lambda k, v: True),
    "false": entries(lambda k, v: False),
    "no entries": each_block(lambda b: {k: v for k, v in b.items() if not isinstance(v, dict)}),
    "no default": each_block(lambda b: {k: v for k, v in b.items() if isinstance(v, dict)}),
    "no block": lambda c: [c.pop(k) for k in ("quantization", "quantization_config")],
    "other bits": entries(lambda k, v: v | {"bits": 4}),
    "bits that are none": each_block(lambda b: b | {"bits": 7}),
    "text": each_block(lambda b: b | {"bits": "3"}),
    "division by zero": each_block(lambda b: b | {"group_size": 0}),
    "other mode": each_block(lambda b: b | {"mode": "mxfp4"}),
    "a list": lambda c: c.update(quantization=[3], quantization_config=None),
}


@pytest.mark.parametrize("name", everyday(AGREES, *range(0, len(AGREES), 2)))
def test_every_spelling_of_the_quantization_block_loads(
    tmp_path: Path, mixed: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An entry with a null, or under another prefix, was no usable setting."""
    out = with_config(mixed, tmp_path / "out", AGREES[name])
    np.testing.assert_array_equal(logits(out), logits(mixed))
    assert caplog.text == ""


@pytest.mark.parametrize("name", everyday(CONTRADICTS, *range(0, len(CONTRADICTS), 2)))
def test_files_decide_where_config_says_otherwise_and_a_warning_tells(
    tmp_path: Path, mixed: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = with_config(mixed, tmp_path / "out", CONTRADICTS[name])
    np.testing.assert_array_equal(logits(out), logits(mixed))
    assert "config.json" in caplog.text


@pytest.mark.parametrize(
    "edit",
    [each_block(lambda b: b | {"mode": "exl3"}), entries(lambda k, v: v | {"mode": ["affine"]})],
)
def test_a_mode_that_mlx_does_not_have_is_refused(tmp_path: Path, mixed: Path, edit: Edit) -> None:
    """The same shapes could hold anything."""
    out = with_config(mixed, tmp_path / "out", edit)
    with pytest.raises(ConfigError, match=r"quantization mode .* is not supported"):
        load_model(out)


HEAD = "language_model.lm_head"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {f"{HEAD}.weight": t[f"{HEAD}.weight"][:, :11]}, "packing  .*lm_head.weight"),
        (lambda t: {f"{HEAD}.scales": t[f"{HEAD}.scales"][:, :1], f"{HEAD}.biases": None},
         "packing  .*lm_head.weight"),
        (lambda t: {f"{HEAD}.biases": None}, "packing  .*lm_head.weight"),
        (lambda t: {f"{HEAD}.biases": t[f"{HEAD}.biases"][:, :1]},
         r"shape    .*biases: \[96, 1\], expected \[96, 2\]"),
        (lambda t: {f"{HEAD}.scales": t[f"{HEAD}.scales"].astype(mx.float32)},
         "dtype    .*biases: BF16, expected F32"),
        (lambda t: {f"{HEAD}.weight": t[f"{HEAD}.weight"][:95]},
         r"shape    .*weight: \[95, 12\], expected \[96, 12\]"),
        (lambda t: {f"{HEAD}.weight": t[f"{HEAD}.weight"].astype(mx.int32)},
         "dtype    .*weight: I32, expected U32"),
    ],
)  # fmt: skip
def test_shapes_that_no_quantization_has_are_refused(
    tmp_path: Path, mixed: Path, change: Callable[[Any], dict[str, Any]], message: str
) -> None:
    out = Path(shutil.copytree(mixed, tmp_path / "out"))
    held = mx.load(str(out / "model.safetensors"))
    held = {name: mx.array(array) for name, array in held.items()}
    held = {k: v for k, v in (held | change(held)).items() if v is not None}
    mx.eval(held)
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (out / name).unlink()
    mx.save_safetensors(str(out / "model.safetensors"), held)
    with pytest.raises(CheckpointError, match=message):
        load_model(out)


def test_every_format_of_mlx_is_inferred_from_its_shapes() -> None:
    def tensor(array: mx.array) -> SourceTensor:
        kinds = {mx.uint32: "U32", mx.uint8: "U8", mx.float32: "F32"}
        return SourceTensor("x", kinds[array.dtype], array.shape, Path("x"), 0, array.nbytes)

    found = set()
    for mode, (all_bits, group_sizes) in MODES.items():
        for bits in all_bits:
            for group_size in group_sizes:
                parts = mx.quantize(mx.ones((4, 384)), group_size, bits, mode=mode)
                weight, scales, *biases = map(tensor, parts)
                inferred = infer(384, weight, scales, biases[0] if biases else None)
                assert inferred == Quantization(bits, group_size, mode)
                found.add(inferred)
    assert len(found) == (1 + len(BITS)) * len(GROUP_SIZES) + 3


def test_warnings_name_the_tensor_and_count_the_others(caplog: pytest.LogCaptureFixture) -> None:
    found = Quantization(4, 64)
    block = {"group_size": 64, "bits": 4, "a.b": {"bits": 8, "group_size": 32}, "a.c": False}
    claims = Claims({"quantization": block})
    claims.compare(("x.first", "other"), found)
    claims.warn()
    assert caplog.text == ""
    # By either name; the first is the one that is shown.
    claims.compare(("x.second", "a.b"), found)
    claims.compare(("a.c", "y"), found)
    claims.warn()
    assert [record.getMessage() for record in caplog.records] == [
        "config.json says otherwise of 2 quantized tensors, the files count: "
        f"x.second (bits=8, group_size=32; the files: {found.as_config()})"
    ]
    assert claims.differences[1] == f"a.c (quantized=False; the files: {found.as_config()})"
    assert claims.num_quantized == 3


def test_a_config_without_a_block_is_named_only_if_something_is_quantized(
    caplog: pytest.LogCaptureFixture,
) -> None:
    claims = Claims({})
    claims.warn()
    assert caplog.text == ""
    claims.compare(("a",), Quantization(4, 64))
    claims.warn()
    (record,) = caplog.records
    assert record.getMessage().startswith("config.json does not say how the weights are quantized")


def test_a_tensor_is_named_once_in_a_warning(
    tmp_path: Path, mixed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = with_config(mixed, tmp_path / "out", each_block(lambda b: b | {"group_size": 128}))
    load_model(out)
    assert "quantized tensors, the files count: embed_tokens (group_size=128; " in caplog.text


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_a_block_is_found_beside_or_inside_the_text_part(key: str) -> None:
    block, other = {"bits": 4}, {"bits": 8}
    assert quantization_block({key: block}) == quantization_block({"text_config": {key: block}})
    assert quantization_block({key: block, "text_config": {key: other}}) == block
    for nothing in ({}, None, 3, []):
        assert quantization_block({key: nothing, "text_config": {key: block}}) == block
        assert quantization_block({key: nothing, "text_config": nothing}) == {}


def test_names_that_mlx_alone_uses() -> None:
    layer = "model.layers.0."
    for name in (
        f"language_model.{layer}input_layernorm.weight", "language_model.lm_head.weight",
        "vision_tower.pos_embed.weight", f"{layer}mlp.switch_mlp.up_proj.weight",
    ):  # fmt: skip
        assert is_named_by_mlx(["lm_head.weight", name])
    for name in (f"{layer}mlp.up_proj.weight", "model.language_model.norm.weight", "visual.x"):
        assert not is_named_by_mlx([name])
