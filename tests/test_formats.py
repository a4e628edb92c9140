"""Every kind of folder: what runs, what converts, and hints that never lead in a circle."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import VOCAB, Tensors, stored, write_checkpoint
from everyday import everyday

from qwen35_mlx.convert import convert, plan
from qwen35_mlx.errors import CheckpointError, Qwen35Error
from qwen35_mlx.model.loading import load_model

HF = "model.language_model."
MLX = "language_model.model."
Arrays = dict[str, mx.array]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats") / "hf"
    write_checkpoint(folder, moe=True, vision=True, mtp=True, tokenizer=True)
    return folder


@pytest.fixture(scope="module")
def plain(source: Path) -> Path:
    """In MLX's layout, not quantized."""
    return convert(source, source.with_name("plain"), dtype="float32")


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    """In MLX's layout, 4 bits and routers of 8."""
    return convert(source, source.with_name("packed"), bits=4, group_size=32, dtype="float32")


@pytest.fixture(scope="module")
def expected(plain: Path, packed: Path) -> dict[str, np.ndarray]:
    return {"plain": logits(plain), "packed": logits(packed)}


def logits(folder: Path) -> np.ndarray:
    model, _ = load_model(folder)
    return np.array(model(mx.arange(12)[None] * 5 % VOCAB))


def rewritten(folder: Path, out: Path, change: Callable[[Arrays], Arrays], **config: Any) -> Path:
    """A copy of a folder of one file with other tensors and other keys in config.json."""
    shutil.copytree(folder, out)
    held = mx.load(str(out / "model.safetensors"))
    assert isinstance(held, dict)
    changed = change({name: mx.array(array) for name, array in held.items()})
    mx.eval(changed)
    (out / "model.safetensors").unlink()
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    mx.save_safetensors(str(out / "model.safetensors"), changed)
    old = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(old | config))
    return out


def renamed(rename: Callable[[str], str]) -> Callable[[Arrays], Arrays]:
    return lambda held: {rename(name): array for name, array in held.items()}


def hf_layout(each: bool = False) -> Callable[[Arrays], Arrays]:
    """MLX's tensors as torch would hold them, packed experts fused or one by one."""

    def change(held: Arrays) -> Arrays:
        result: Arrays = {}
        for name, array in held.items():
            new = name.replace(MLX, HF).replace("language_model.lm_head", "lm_head")
            new = new.replace("vision_tower.", "model.visual.")
            if "norm" in name and name.startswith(MLX) and "linear_attn.norm" not in name:
                array = array - 1
            if name.endswith("conv1d.weight") or "patch_embed.proj.weight" in name:
                array = array.moveaxis(-1, 1)
            if "switch_mlp.up_proj" in name:
                continue
            if "switch_mlp" in name and each:
                for kind in ("gate_proj", "up_proj") if "gate_proj" in name else ("down_proj",):
                    part = held[name.replace("gate_proj", kind)]
                    base = new.replace("switch_mlp.gate_proj", f"switch_mlp.{kind}")
                    for i, one in enumerate(part):
                        result[base.replace("switch_mlp", f"experts.{i}")] = one
                continue
            if "switch_mlp.gate_proj" in name:
                array = mx.concatenate([array, held[name.replace("gate", "up")]], axis=1)
                new = new.replace("gate_proj", "gate_up_proj")
            result[new.replace("switch_mlp", "experts")] = array
        return result

    return change


def flat(name: str) -> str:
    """As a text-only export of mlx-lm: no prefix of the whole model."""
    return name.removeprefix("language_model.")


PREFIXES: dict[str, Callable[[str], str]] = {
    "none": flat,
    "hugging face": lambda n: n.replace(MLX, HF).replace("language_model.lm_head", "lm_head"),
    "three times": lambda n: n.replace(MLX, f"{HF}language_model.language_model."),
    "wrapped": lambda n: n if n.startswith(("mtp", "vision")) else f"module._orig_mod.{n}",
    "inside": lambda n: n.replace(".mlp.", "._orig_mod.mlp."),
}


@pytest.mark.parametrize("prefix", everyday(PREFIXES, 1, 3))
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_mlx_folders_load_under_any_unambiguous_prefix(
    request: pytest.FixtureRequest, tmp_path: Path, expected: Any, kind: str, prefix: str
) -> None:
    folder = request.getfixturevalue(kind)
    other = rewritten(folder, tmp_path / "other", renamed(PREFIXES[prefix]))
    np.testing.assert_array_equal(logits(other), expected[kind])


@pytest.mark.parametrize("each", everyday([False, True], 1), ids=["fused", "each"])
def test_quantized_folders_in_the_layout_of_hugging_face_load_and_convert(
    tmp_path: Path, packed: Path, expected: Any, each: bool
) -> None:
    other = rewritten(packed, tmp_path / "other", hf_layout(each))
    assert "model.language_model.norm.weight" in mx.load(str(other / "model.safetensors"))
    np.testing.assert_allclose(logits(other), expected["packed"], atol=1e-5)
    again = convert(other, tmp_path / "again")
    np.testing.assert_allclose(logits(again), expected["packed"], atol=1e-5)


def test_convert_copies_what_is_quantized_bit_for_bit(
    tmp_path: Path, packed: Path, expected: Any
) -> None:
    """The hint of load led to convert, which said that the folder is converted already."""
    other = rewritten(packed, tmp_path / "other", renamed(PREFIXES["three times"]))
    out = convert(other, tmp_path / "out")
    before, after = (mx.load(str(f / "model.safetensors")) for f in (packed, out))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]).item() for name in before)
    blocks = [json.loads((f / "config.json").read_text())["quantization"] for f in (packed, out)]
    assert blocks[0] == blocks[1]
    assert plan(other).bits_per_weight == pytest.approx(plan_of(packed), rel=1e-3)
    assert not any(row.name.endswith(("scales", "biases")) for row in plan(other).table())
    for wish in (dict(bits=8), dict(dtype="float16"), dict(recipe=lambda module: (4, 32))):
        with pytest.raises(Qwen35Error, match="already quantized") as error:
            plan(other, **wish)
        assert "this one runs without a conversion" in str(error.value)
    np.testing.assert_array_equal(logits(other), expected["packed"])


def plan_of(folder: Path) -> float:
    """Bits per weight that config.json and the files say."""
    held = mx.load(str(folder / "model.safetensors"))
    text = {n: a for n, a in held.items() if not n.startswith(("mtp", "vision"))}
    block = json.loads((folder / "config.json").read_text())["quantization"]
    weights = 0
    for name, array in text.items():
        if array.dtype == mx.uint32:
            bits = block.get(name.removesuffix(".weight"), block)["bits"]
            weights += array.size * 32 // bits
        elif not name.endswith((".scales", ".biases")):
            weights += array.size
    return 8 * sum(array.nbytes for array in text.values()) / weights


def test_convert_quantizes_a_plain_mlx_folder_as_it_would_the_original(
    tmp_path: Path, plain: Path, packed: Path
) -> None:
    out = convert(plain, tmp_path / "out", bits=4, group_size=32)
    before, after = (mx.load(str(f / "model.safetensors")) for f in (packed, out))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]).item() for name in before)


@pytest.mark.parametrize(
    "rename",
    everyday(
        [
            lambda n: n.replace(HF, f"{HF}language_model.language_model."),
            lambda n: n.replace("model.visual.", f"{HF}visual."),
            lambda n: f"module.{n}",
            lambda n: f"base_model.model.{n}",
            lambda n: f"_orig_mod.{n}",
            lambda n: n.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
        ],
        *(0, 1, 5),
    ),
    ids=["three times", "vision below", "module", "base_model", "_orig_mod", "fsdp"],
)
def test_prefixes_of_other_programs_convert_to_the_same_bytes(
    tmp_path: Path, source: Path, plain: Path, rename: Callable[[str], str]
) -> None:
    other = rewritten(source, tmp_path / "other", renamed(rename))
    out = convert(other, tmp_path / "out", dtype="float32")
    name = "model.safetensors"
    assert (out / name).read_bytes() == (plain / name).read_bytes()


def test_two_names_for_one_tensor_are_refused(tmp_path: Path, source: Path) -> None:
    def twice(held: Arrays) -> Arrays:
        return held | {"language_model.lm_head.weight": held["lm_head.weight"] + 1}

    other = rewritten(source, tmp_path / "other", twice)
    with pytest.raises(CheckpointError, match=r"(?s)two tensors.*language_model.lm_head.weight"):
        plan(other)


def test_a_vision_tower_under_two_names_is_refused(tmp_path: Path, source: Path) -> None:
    """Both would be written as vision_tower."""

    def twice(held: Arrays) -> Arrays:
        tower = {n: a for n, a in held.items() if n.startswith("model.visual.")}
        return held | {n.replace("model.visual", "vision_tower"): a for n, a in tower.items()}

    other = rewritten(source, tmp_path / "other", twice)
    with pytest.raises(CheckpointError, match=r"twice    vision_tower"):
        plan(other)


def test_unknown_names_are_shown_beside_many_missing_ones(tmp_path: Path, source: Path) -> None:
    other = rewritten(source, tmp_path / "other", renamed(lambda n: n.replace("layers", "blocks")))
    with pytest.raises(CheckpointError, match=r"unknown  model.language_model.blocks") as error:
        plan(other)
    assert "missing  model.language_model.layers" in str(error.value)


def test_norms_are_shifted_once_whatever_the_shard_of_the_convolutions(
    tmp_path: Path, plain: Path, expected: Any
) -> None:
    """A folder of several files is of one layout: that of its convolutions."""
    other = Path(shutil.copytree(plain, tmp_path / "other"))
    held = mx.load(str(other / "model.safetensors"))
    held = {flat(name): mx.array(array) for name, array in held.items()}
    mx.eval(held)
    (other / "model.safetensors").unlink()
    parts = [{n: a for n, a in held.items() if ("conv1d" in n) == i} for i in (True, False)]
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, part in zip(files, parts, strict=True):
        mx.save_safetensors(str(other / file), part)
    weight_map = {n: f for f, part in zip(files, parts, strict=True) for n in part}
    index = other / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(logits(other), expected["plain"])


def add(**tensors: tuple[str, np.ndarray]) -> Callable[[Tensors], None]:
    return lambda held: held.update({k.replace("__", "."): v for k, v in tensors.items()})


Q_PROJ = "model.language_model.layers.1.self_attn.q_proj"
BYTES = ("U8", np.zeros((8, 1), np.uint8))


def gptq(held: Tensors) -> None:
    held[f"{Q_PROJ}.qweight"] = ("I32", np.zeros((16, 256), np.int32))
    held[f"{Q_PROJ}.qzeros"] = ("I32", np.zeros((1, 32), np.int32))
    held[f"{Q_PROJ}.scales"] = stored(np.ones((1, 256)), "F16")
    del held[f"{Q_PROJ}.weight"]


def bnb(held: Tensors) -> None:
    held[f"{Q_PROJ}.weight"] = BYTES
    held[f"{Q_PROJ}.weight.absmax"] = stored(np.ones(4), "F32")
    held[f"{Q_PROJ}.weight.quant_map"] = stored(np.ones(16), "F32")


def compressed(held: Tensors) -> None:
    held[f"{Q_PROJ}.weight_packed"] = ("I32", np.zeros((256, 16), np.int32))
    held[f"{Q_PROJ}.weight_scale"] = stored(np.ones((256, 4)), "BF16")
    del held[f"{Q_PROJ}.weight"]


def fp8(scale: tuple[str, np.ndarray], end: str = "weight_scale_inv") -> Callable[[Tensors], None]:
    def change(held: Tensors) -> None:
        held[f"{Q_PROJ}.weight"] = ("F8_E4M3", np.zeros((256, 128), np.uint8))
        held[f"{Q_PROJ}.{end}"] = scale

    return change


BLOCKS = stored(np.ones((2, 1)), "F32")
FP8_CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128]}
# A change of the tensors, the block in config.json, and what the refusal of convert names.
SOURCES: dict[str, tuple[Any, Any, list[str]]] = {
    "plain": (None, None, []),
    "leftover bitsandbytes": (None, {"quant_method": "bitsandbytes", "load_in_4bit": True}, []),
    "leftover fp8": (None, FP8_CONFIG | {"weight_block_size": None}, []),
    "leftover mode": (None, {"quant_method": "x", "mode": "static"}, []),
    "leftover gptq": (None, {"quant_method": "gptq", "bits": 4, "group_size": 128}, []),
    "leftover awq": (None, {"quant_method": "awq", "bits": 4}, []),
    "leftover compressed": (None, {"quant_method": "compressed-tensors", "format": "x"}, []),
    "leftover of MLX": (None, {"bits": 4, "group_size": 64}, []),
    "no object": (None, "?", []),
    "buffer": (lambda t: t.update({f"{HF}rotary_emb.inv_freq": BLOCKS}), None, []),
    "blocks": (fp8(BLOCKS), FP8_CONFIG, []),
    "blocks of the usual size": (fp8(BLOCKS), {"quant_method": "fp8"}, []),
    "gptq": (gptq, {"quant_method": "gptq"}, ["gptq", "qweight", "bf16 checkpoint"]),
    "gptq without a block": (gptq, None, ["GPTQ or AWQ", "qweight", "bf16 checkpoint"]),
    "bitsandbytes": (bnb, {"quant_method": "bitsandbytes"}, ["bitsandbytes", "absmax"]),
    "compressed": (compressed, {"quant_method": "compressed-tensors"},
                   ["compressed-tensors", "weight_packed"]),
    "a scale a tensor": (fp8(stored(np.ones(1), "F32")), FP8_CONFIG, ["one scale for a whole"]),
    "modelopt": (fp8(stored(np.ones(1), "F32"), "weight_scale"), {"quant_method": "modelopt"},
                 ["modelopt", "weight_scale"]),
    "powers of two": (fp8(("F8_E8M0", np.ones((2, 1), np.uint8))), FP8_CONFIG, ["UE8M0"]),
    "no block size": (fp8(BLOCKS), None, ["without a size of blocks"]),
    "null for blocks": (fp8(BLOCKS), FP8_CONFIG | {"weight_block_size": None},
                        ["without a size of blocks"]),
    "missing": (lambda t: t.pop(f"{HF}norm.weight"), None, [f"missing  {HF}norm.weight"]),
    "own head": (None, None, ["lm_head.weight is not the embedding"]),
    "stale": (None, None, ["does not list", "model-old.safetensors"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES)
def test_hints_of_load_and_convert_never_lead_in_a_circle(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What load refuses as unconverted converts; what convert refuses gets no such hint."""
    change, block, words = SOURCES[kind]
    config = {} if block is None else {"quantization_config": block}
    folder = tmp_path / "src"
    if kind == "own head":
        config["tie_word_embeddings"] = True
    write_checkpoint(folder, config=config, change=change, num_shards=1 + (kind == "stale"))
    if kind == "stale":
        shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-old.safetensors")
    with pytest.raises(Qwen35Error) as refused:
        load_model(folder)
    sent_on = "hint: run: qwen35-mlx convert" in str(refused.value)
    if not words:
        assert sent_on
        convert(folder, tmp_path / "out")
        load_model(tmp_path / "out")
    else:
        assert not sent_on
        with pytest.raises(Qwen35Error) as error:
            convert(folder, tmp_path / "out")
        assert all(word in str(error.value) for word in words), str(error.value)
    if kind.startswith("leftover"):
        assert "says that the weights are quantized" in caplog.text


def test_scales_of_activations_are_left_out_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A static activation scale made block-wise FP8 look like another format."""

    def scaled(held: Tensors) -> None:
        fp8(BLOCKS)(held)
        one = stored(np.ones(()), "F32")
        attention = Q_PROJ.removesuffix(".q_proj")
        held[f"{Q_PROJ}.activation_scale"] = held[f"{Q_PROJ}.input_scale"] = one
        held[f"{attention}.k_scale"] = held[f"{attention}.v_scale"] = one
        held[f"{Q_PROJ}.activation_scale_inv"] = held[f"{attention}.prob_scale"] = one

    for name, change in (("fp8", fp8(BLOCKS)), ("scaled", scaled)):
        config = {"quantization_config": FP8_CONFIG}
        write_checkpoint(tmp_path / name, change=change, config=config)
        convert(tmp_path / name, tmp_path / f"{name}-out")
    files = [tmp_path / f"{name}-out" / "model.safetensors" for name in ("fp8", "scaled")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "q_proj.activation_scale" in caplog.text
