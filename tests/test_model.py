"""The whole model against itself: padding, pieces and positions must not change a logit."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from everyday import everyday
from mlx.utils import tree_flatten, tree_map

from qwen35_mlx.config import FULL, LINEAR, ModelConfig
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.model.cache import ArraysCache, KVCache
from qwen35_mlx.model.language import Model
from qwen35_mlx.model.rope import PartialRope

VOCAB = 97


def config(moe: bool, layer_types=(LINEAR, FULL, LINEAR), tied=False, yarn=False) -> ModelConfig:
    text = {
        "model_type": "qwen3_5_moe_text" if moe else "qwen3_5_text",
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "num_hidden_layers": len(layer_types),
        "layer_types": list(layer_types),
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "hidden_act": "silu",
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "intermediate_size": 64,
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    }
    if moe:
        text |= {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 16,
        }
    if yarn:
        text["rope_parameters"] |= {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    return ModelConfig.from_hf(text)


def random_model(cfg: ModelConfig, seed: int = 0) -> Model:
    model = Model(cfg)
    rng = np.random.default_rng(seed)

    def draw(value: mx.array) -> mx.array:
        spread = 0.3 if value.ndim == 1 else value.shape[-1] ** -0.5
        noise = rng.standard_normal(value.shape).astype(np.float32) * spread
        return mx.array(noise + (1.0 if value.ndim == 1 else 0.0))

    model.update(tree_map(draw, model.parameters()))
    return model


def tokens(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, VOCAB, shape))


def difference(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return mx.abs(a - b).max().item()


KINDS = {
    "dense": dict(moe=False),
    "moe": dict(moe=True),
    "tied": dict(moe=False, tied=True),
    "linear only": dict(moe=True, layer_types=(LINEAR, LINEAR)),
    "full only, yarn": dict(moe=False, layer_types=(FULL, FULL), yarn=True),
}


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(request) -> Model:
    return random_model(config(**KINDS[request.param]))


@pytest.mark.parametrize(
    "pieces", everyday([((1, 3, 63, 64, 65),), ((64, 1, 1, 5),), ((2,) * 6,)], 0)
)
def test_pieces_equal_the_whole(model, pieces):
    ids = tokens(2, sum(pieces))
    whole = model(ids)
    assert whole.std().item() > 0.3
    cache, start = model.make_cache(), 0
    for size in pieces:
        logits = model(ids[:, start : start + size], cache)
        # One token in these texts has rounding errors a hundred times those of the others.
        assert difference(logits, whole[:, start : start + size]) <= 3e-4
        start += size


@pytest.mark.parametrize("lengths", everyday([((70, 3, 41),), ((1, 9, 64),)], 1))
def test_left_padded_rows_equal_each_row_alone(model, lengths):
    width = max(lengths)
    rows = [tokens(1, n, seed=n) for n in lengths]
    padding = [width - n for n in lengths]
    batch = mx.concatenate(
        [mx.pad(r, [(0, 0), (p, 0)]) for r, p in zip(rows, padding, strict=True)]
    )
    cache = model.make_cache(left_padding=padding)
    logits = model(batch, cache)
    without_cache = model(batch, left_padding=padding)
    following = tokens(len(lengths), 1, seed=99)
    decoded = model(following, cache)
    for i, row in enumerate(rows):
        alone_cache = model.make_cache()
        alone = model(row, alone_cache)
        assert difference(logits[i : i + 1, padding[i] :], alone) <= 1e-4
        assert difference(without_cache[i : i + 1, padding[i] :], alone) <= 1e-4
        assert difference(decoded[i : i + 1], model(following[i : i + 1], alone_cache)) <= 1e-4


def test_a_pad_longer_than_the_first_piece_leaves_no_trace(model):
    """The first piece of a row is nothing but padding: conv and state must stay empty."""
    row = tokens(1, 6)
    batch = mx.concatenate([mx.pad(row, [(0, 0), (10, 0)]), tokens(1, 16, seed=1)])
    cache = model.make_cache([10, 0])
    pieces = [model(batch[:, :7], cache), model(batch[:, 7:], cache)]
    logits = mx.concatenate(pieces, axis=1)[:1, 10:]
    assert difference(logits, model(row)) <= 1e-4


def test_rows_padded_on_the_right_keep_their_own_state():
    """mlx-lm's batched prefill pads on the right and tells the cache each row's length."""
    model = random_model(config(moe=True))
    short, long = tokens(1, 5), tokens(1, 9, seed=1)
    batch = mx.concatenate([mx.pad(short, [(0, 0), (0, 4)]), long])
    cache = model.make_cache([0, 0])
    for entry in cache:
        entry.prepare(lengths=[5, 9], right_padding=[4, 0])
    model(batch, cache)
    for entry in cache:
        entry.finalize()
    following = tokens(2, 1, seed=2)
    logits = model(following, cache)
    for i, row in enumerate((short, long)):
        alone = model.make_cache()
        model(row, alone)
        assert difference(logits[i : i + 1], model(following[i : i + 1], alone)) <= 1e-4


def test_explicit_positions_equal_those_of_the_cache(model):
    ids = tokens(2, 11)
    positions = mx.broadcast_to(mx.arange(11), (2, 11))
    assert difference(model.trunk(ids), model.trunk(ids, positions=positions)) <= 1e-4


def test_angles_are_tabled_for_explicit_positions_alone_and_once_for_all_layers(monkeypatch):
    model, calls = random_model(config(moe=False, layer_types=(FULL, LINEAR, FULL))), []
    tables = PartialRope.tables
    monkeypatch.setattr(PartialRope, "tables", lambda *a: calls.append(a) or tables(*a))
    model(tokens(1, 11), model.make_cache())
    assert calls == []
    model.trunk(tokens(1, 11), positions=mx.arange(11)[None])
    assert len(calls) == 1


def test_shifted_positions_matter_where_there_is_attention():
    model = random_model(config(moe=False))
    ids = tokens(1, 11)
    stretched = 3 * mx.arange(11)[None]
    assert difference(model.trunk(ids), model.trunk(ids, positions=stretched)) > 1e-2


def test_the_last_token_alone_is_the_last_of_all(model):
    ids = tokens(2, 70)
    one, all_of_them = model.make_cache(), model.make_cache()
    last = model.trunk(ids, one, last_only=True)
    assert difference(last, model.trunk(ids, all_of_them)[:, -1:]) <= 1e-5
    following = tokens(2, 1, seed=1)
    assert difference(model(following, one), model(following, all_of_them)) == 0


def test_embeddings_stand_in_for_ids(model):
    ids = tokens(1, 5)
    embeddings = model.language_model.model.embed_tokens(ids)
    assert difference(model(ids), model(ids, input_embeddings=embeddings)) == 0


def test_no_token_sees_a_later_one(model):
    ids = tokens(1, 70)
    changed = mx.concatenate([ids[:, :65], (ids[:, 65:] + 1) % VOCAB], axis=1)
    assert difference(model(ids)[:, :65], model(changed)[:, :65]) <= 1e-5


def test_cache_entries_follow_the_layers():
    model = Model(config(moe=True))
    assert [type(c) for c in model.make_cache()] == [ArraysCache, KVCache, ArraysCache]


@pytest.mark.parametrize("padding", [[], [-1, 0]])
def test_unusable_padding_is_refused(padding):
    with pytest.raises(Qwen35Error, match="left_padding"):
        Model(config(moe=False)).make_cache(padding)


def test_padding_beside_a_cache_is_refused():
    model = Model(config(moe=False))
    with pytest.raises(Qwen35Error, match="left_padding"):
        model(tokens(1, 2), model.make_cache(), left_padding=[0])


def test_mlx_lm_quantizers_leave_gates_and_keep_the_router_at_8_bits():
    model = Model(config(moe=True))
    model.update(tree_map(lambda x: x, model.parameters()))
    kept = {}
    predicate = model.quant_predicate
    for path, module in model.named_modules():
        if hasattr(module, "to_quantized"):
            kept[path.rpartition(".")[2]] = predicate(path, module)
    assert kept["in_proj_a"] is kept["in_proj_b"] is False
    assert kept["gate"]["bits"] == kept["shared_expert_gate"]["bits"] == 8
    assert kept["in_proj_qkv"] is kept["lm_head"] is True


def test_half_precision_weights_give_half_precision_logits_and_fp32_state():
    model = random_model(config(moe=True))
    model.set_dtype(mx.bfloat16)
    cache = model.make_cache()
    assert model(tokens(1, 5), cache).dtype == mx.bfloat16
    assert model(tokens(1, 1), cache).dtype == mx.bfloat16
    assert cache[0][1].dtype == mx.float32
    assert cache[0][0].dtype == cache[1].keys.dtype == mx.bfloat16


def test_parameters_have_the_names_on_disk():
    names = {k for k, _ in tree_flatten(Model(config(moe=True)).parameters())}
    layer = "language_model.model.layers.0."
    for name in ("linear_attn.A_log", "linear_attn.conv1d.weight", "mlp.gate.weight"):
        assert layer + name in names
    assert "language_model.lm_head.weight" in names
    assert not any("rope" in n or n.rpartition(".")[2].startswith("_") for n in names)
    assert isinstance(Model(config(moe=True)), nn.Module)
