"""Tiny random checkpoints in Hugging Face format, written with numpy alone."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

# Unequal head dims and counts; every quantized row is 128 or 256 long, so each group size fits.
HIDDEN, VOCAB, EXPERTS, EXPERT_WIDTH = 128, 96, 3, 128
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
LINEAR_K_HEADS, LINEAR_V_HEADS, LINEAR_K_DIM, LINEAR_V_DIM, TAPS = 2, 4, 16, 32, 4
KEY_DIM, VALUE_DIM = LINEAR_K_HEADS * LINEAR_K_DIM, LINEAR_V_HEADS * LINEAR_V_DIM
SHARED_WIDTH = 128
LAYER_TYPES = ["linear_attention", "full_attention"] * 2

# As stored: dtype as safetensors spells it, and an array of that width (bfloat16 as uint16).
Stored = tuple[str, np.ndarray]
Tensors = dict[str, Stored]


def stored(values: np.ndarray, dtype: str) -> Stored:
    """Round float32 values to `dtype`."""
    if dtype == "BF16":
        bits = np.array(values, dtype=np.float32).view(np.uint32)
        return dtype, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return dtype, values.astype({"F32": np.float32, "F16": np.float16}[dtype])


def as_mlx(tensor: Stored) -> mx.array:
    """The stored tensor as MLX holds it."""
    dtype, values = tensor
    array = mx.array(values)
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def text_config(moe: bool, tied: bool) -> dict[str, Any]:
    width = (
        dict(
            num_experts=EXPERTS,
            num_experts_per_tok=2,
            moe_intermediate_size=EXPERT_WIDTH,
            shared_expert_intermediate_size=SHARED_WIDTH,
        )
        if moe
        else dict(intermediate_size=256)
    )
    return dict(
        model_type="qwen3_5_moe_text" if moe else "qwen3_5_text",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=len(LAYER_TYPES),
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        layer_types=LAYER_TYPES,
        linear_num_key_heads=LINEAR_K_HEADS,
        linear_num_value_heads=LINEAR_V_HEADS,
        linear_key_head_dim=LINEAR_K_DIM,
        linear_value_head_dim=LINEAR_V_DIM,
        linear_conv_kernel_dim=TAPS,
        rms_norm_eps=1e-6,
        max_position_embeddings=512,
        hidden_act="silu",
        tie_word_embeddings=tied,
        rope_parameters=dict(
            rope_type="default",
            rope_theta=10000.0,
            partial_rotary_factor=0.25,
            mrope_section=[2, 1, 1],
            mrope_interleaved=True,
        ),
        **width,
    )


def tensor_shapes(
    *, moe: bool, tied: bool, experts: str, flat: bool, vision: bool, mtp: bool
) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, written out as the official models name them."""
    trunk = "model." if flat else "model.language_model."
    shapes: dict[str, tuple[int, ...]] = {
        f"{trunk}embed_tokens.weight": (VOCAB, HIDDEN),
        f"{trunk}norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for index, kind in enumerate(LAYER_TYPES):
        layer = f"{trunk}layers.{index}."
        shapes[f"{layer}input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (HIDDEN,)
        if kind == "linear_attention":
            linear = f"{layer}linear_attn."
            channels = 2 * KEY_DIM + VALUE_DIM
            shapes[f"{linear}A_log"] = (LINEAR_V_HEADS,)
            shapes[f"{linear}dt_bias"] = (LINEAR_V_HEADS,)
            shapes[f"{linear}conv1d.weight"] = (channels, 1, TAPS)
            shapes[f"{linear}in_proj_qkv.weight"] = (channels, HIDDEN)
            shapes[f"{linear}in_proj_z.weight"] = (VALUE_DIM, HIDDEN)
            shapes[f"{linear}in_proj_a.weight"] = (LINEAR_V_HEADS, HIDDEN)
            shapes[f"{linear}in_proj_b.weight"] = (LINEAR_V_HEADS, HIDDEN)
            shapes[f"{linear}norm.weight"] = (LINEAR_V_DIM,)
            shapes[f"{linear}out_proj.weight"] = (HIDDEN, VALUE_DIM)
        else:
            shapes |= _attention(f"{layer}self_attn.")
        if moe:
            shapes |= _moe(f"{layer}mlp.", experts)
        else:
            shapes |= _dense(f"{layer}mlp.", 256)
    if vision:
        shapes["model.visual.patch_embed.proj.weight"] = (8, 3, 2, 4, 5)
        shapes["model.visual.patch_embed.proj.bias"] = (8,)
        shapes["model.visual.pos_embed.weight"] = (9, 8)
        shapes["model.visual.blocks.0.norm1.weight"] = (8,)
        shapes["model.visual.blocks.0.attn.qkv.weight"] = (24, 8)
    if mtp:
        shapes["mtp.fc.weight"] = (HIDDEN, 2 * HIDDEN)
        norms = "pre_fc_norm_embedding pre_fc_norm_hidden norm layers.0.input_layernorm"
        for norm in (*norms.split(), "layers.0.post_attention_layernorm"):
            shapes[f"mtp.{norm}.weight"] = (HIDDEN,)
        shapes |= _attention("mtp.layers.0.self_attn.")
        # The released models store these one by one even where the trunk is fused.
        shapes |= _moe("mtp.layers.0.mlp.", "each") if moe else _dense("mtp.layers.0.mlp.", 256)
    return shapes


def _attention(prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}q_proj.weight": (2 * HEADS * HEAD_DIM, HIDDEN),
        f"{prefix}k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        f"{prefix}v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        f"{prefix}o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        f"{prefix}q_norm.weight": (HEAD_DIM,),
        f"{prefix}k_norm.weight": (HEAD_DIM,),
    }


def _dense(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (width, HIDDEN),
        f"{prefix}up_proj.weight": (width, HIDDEN),
        f"{prefix}down_proj.weight": (HIDDEN, width),
    }


def _moe(prefix: str, experts: str) -> dict[str, tuple[int, ...]]:
    shapes = {f"{prefix}gate.weight": (EXPERTS, HIDDEN)}
    if experts == "fused":
        shapes[f"{prefix}experts.gate_up_proj"] = (EXPERTS, 2 * EXPERT_WIDTH, HIDDEN)
        shapes[f"{prefix}experts.down_proj"] = (EXPERTS, HIDDEN, EXPERT_WIDTH)
    else:
        for expert in range(EXPERTS):
            shapes |= _dense(f"{prefix}experts.{expert}.", EXPERT_WIDTH)
    shapes |= _dense(f"{prefix}shared_expert.", SHARED_WIDTH)
    shapes[f"{prefix}shared_expert_gate.weight"] = (1, HIDDEN)
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: str, seed: int = 0) -> Tensors:
    """Weights about zero, the same whether experts are fused or not, the trunk nested or not."""
    tensors: Tensors = {}
    for name, shape in shapes.items():
        kept = "F32" if dtype == "BF16" and name.endswith("A_log") else dtype
        layer, _, rest = name.partition(".mlp.experts.")
        if not rest:
            values = _random(name, shape, seed)
        elif rest[0].isdigit():
            expert, matrix, _ = rest.split(".")
            values = _random(f"{layer} {matrix} {expert}", shape, seed)
        else:
            one = (shape[0], shape[1] // (2 if rest == "gate_up_proj" else 1), shape[2])
            matrices = ["gate_proj", "up_proj"] if rest == "gate_up_proj" else ["down_proj"]
            values = np.stack(
                [
                    np.concatenate([_random(f"{layer} {m} {e}", one[1:], seed) for m in matrices])
                    for e in range(shape[0])
                ]
            )
        tensors[name] = stored(values, kept)
    return tensors


def _random(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    return _drawn(name.replace("language_model.", ""), shape, seed)


@functools.lru_cache(maxsize=1024)
def _drawn(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    generator = np.random.default_rng([seed, *name.encode()])
    values = np.asarray(0.1 * generator.standard_normal(shape), np.float32)
    values.flags.writeable = False
    return values


def safetensors_bytes(tensors: Tensors, header: dict[str, Any] | None = None) -> bytes:
    """A safetensors file; `header` replaces entries of the true header."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, values) in tensors.items():
        raw = values.tobytes()
        entries[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    raw_header = json.dumps(entries | (header or {})).encode()
    return len(raw_header).to_bytes(8, "little") + raw_header + data


def write_checkpoint(
    folder: Path,
    *,
    moe: bool = False,
    tied: bool = False,
    experts: str = "fused",
    num_shards: int = 1,
    dtype: str = "BF16",
    flat: bool = False,
    vision: bool = False,
    mtp: bool = False,
    tokenizer: bool = False,
    config: dict[str, Any] | None = None,
    change: Callable[[Tensors], None] | None = None,
) -> Tensors:
    """Write a checkpoint into the new `folder`, and return what its files hold.

    `change` edits the tensors before they are written, `config` the keys of config.json.
    """
    shapes = tensor_shapes(moe=moe, tied=tied, experts=experts, flat=flat, vision=vision, mtp=mtp)
    tensors = random_tensors(shapes, dtype)
    if change:
        change(tensors)
    folder.mkdir(parents=True)
    text = text_config(moe, tied)
    nested = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5_moe" if moe else "qwen3_5",
        "tie_word_embeddings": tied,
        "text_config": text,
    }
    whole = (text if flat else nested) | (config or {})
    (folder / "config.json").write_text(json.dumps(whole))
    if tokenizer:
        write_tokenizer(folder)
    if num_shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return tensors
    # In name order, so that layers are torn apart as in real checkpoints.
    names = sorted(tensors)
    per_shard = math.ceil(len(names) / num_shards)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {n: tensors[n] for n in names[shard * per_shard : (shard + 1) * per_shard]}
        (folder / file).write_bytes(safetensors_bytes(part))
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, the least that transformers loads."""
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"<end>": VOCAB - 1}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def assert_nothing_left(folder: Path, *but: str) -> None:
    """Beside the source `src` there is nothing but these."""
    assert {path.name for path in folder.iterdir()} == {"src", *but}
