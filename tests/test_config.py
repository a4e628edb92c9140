"""ModelConfig: the whole family is read, and everything else is refused by name."""

import copy
import logging
import math

import pytest

from qwen35_mlx.config import FULL, LINEAR, ModelConfig, next_as_moe, read_config
from qwen35_mlx.errors import ConfigError

# hidden, layers, query and kv heads, dense width or (experts, top k, width), linear v-heads, tied
FAMILY = {
    "0.8B": (1024, 24, 8, 2, 3584, 16, True),
    "2B": (2048, 24, 8, 2, 6144, 16, True),
    "4B": (2560, 32, 16, 4, 9216, 32, True),
    "9B": (4096, 32, 16, 4, 12288, 32, False),
    "27B": (5120, 64, 24, 4, 17408, 48, False),
    "35B-A3B": (2048, 40, 16, 2, (256, 8, 512), 32, False),
    "122B-A10B": (3072, 48, 32, 2, (256, 8, 1024), 64, False),
    "397B-A17B": (4096, 60, 32, 2, (512, 10, 1024), 64, False),
}


def family_config(name: str) -> dict:
    """A config.json as the releases write it, with the keys they carry and we do not use."""
    hidden, layers, heads, kv_heads, width, value_heads, tied = FAMILY[name]
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "layer_types": [LINEAR, LINEAR, LINEAR, FULL] * (layers // 4),
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": 248320,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
    }
    kind = "qwen3_5"
    if isinstance(width, tuple):
        kind = "qwen3_5_moe"
        text["model_type"] = "qwen3_5_moe_text"
        text["num_experts"], text["num_experts_per_tok"], text["moe_intermediate_size"] = width
        text["shared_expert_intermediate_size"] = width[2]
    else:
        text["intermediate_size"] = width
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": kind,
        "text_config": text,
        "vision_config": {"depth": 27},
        "image_token_id": 248056,
        "language_model_only": False,
    }


def flat(config: dict) -> dict:
    """The text-only export of the same model."""
    return copy.deepcopy(config["text_config"])


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("shape", [lambda c: c, flat], ids=["nested", "flat"])
def test_every_family_member_is_read_without_a_warning(name, shape, caplog):
    with caplog.at_level(logging.WARNING):
        config = ModelConfig.from_hf(shape(family_config(name)))
    assert not caplog.records
    hidden, layers, heads, kv_heads, width, value_heads, tied = FAMILY[name]
    assert (config.hidden_size, config.num_hidden_layers) == (hidden, layers)
    assert (config.num_attention_heads, config.num_key_value_heads) == (heads, kv_heads)
    assert config.linear_num_value_heads == value_heads
    assert config.tie_word_embeddings is tied
    assert config.is_moe is isinstance(width, tuple)
    assert config.rope.rotary_dim == 64
    assert config.conv_dim == 2 * 16 * 128 + value_heads * 128
    assert config.layer_types.count(FULL) == layers // 4


def test_qwen3_6_gate_type_and_mlx_export_rope_key_are_read():
    config = family_config("27B")
    config["text_config"]["output_gate_type"] = "swish"
    rope = config["text_config"]["rope_parameters"]
    rope["type"] = rope.pop("rope_type")
    assert ModelConfig.from_hf(config) == ModelConfig.from_hf(family_config("27B"))


def test_layer_types_win_over_the_interval():
    config = family_config("0.8B")
    config["text_config"]["layer_types"] = [FULL, LINEAR] * 12
    assert ModelConfig.from_hf(config).layer_types == (FULL, LINEAR) * 12


def test_the_interval_serves_where_layer_types_are_absent():
    config = family_config("0.8B")
    del config["text_config"]["layer_types"]
    config["text_config"]["full_attention_interval"] = 3
    assert ModelConfig.from_hf(config).layer_types == (LINEAR, LINEAR, FULL) * 8


def test_neither_layer_types_nor_interval_is_an_error():
    config = family_config("0.8B")
    del config["text_config"]["layer_types"], config["text_config"]["full_attention_interval"]
    with pytest.raises(ConfigError, match="full_attention_interval"):
        ModelConfig.from_hf(config)


REQUIRED = """hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim
linear_conv_kernel_dim rms_norm_eps max_position_embeddings vocab_size hidden_act rope_parameters
num_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size""".split()


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key):
    config = family_config("397B-A17B")
    del config["text_config"][key]
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_hf(config)


@pytest.mark.parametrize("key", ["rope_theta", "partial_rotary_factor"])
def test_a_missing_rope_key_is_named(key):
    config = family_config("2B")
    del config["text_config"]["rope_parameters"][key]
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_hf(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("linear_key_head_dim", 96),
        ("linear_value_head_dim", 100),
        ("head_dim", 100),
        ("head_dim", 512),
        ("hidden_act", "gelu"),
        ("output_gate_type", "sigmoid"),
        ("attention_bias", True),
        ("attn_output_gate", False),
        ("norm_topk_prob", False),
        ("mlp_only_layers", [0]),
        ("sliding_window", 4096),
        ("hidden_size", 0),
        ("hidden_size", "1024"),
        ("hidden_size", 10.5),
        ("hidden_size", True),
        ("hidden_size", float("inf")),
        ("hidden_size", 2**31),
        ("rms_norm_eps", float("inf")),
        ("num_key_value_heads", 3),
        ("linear_num_key_heads", 3),
        ("num_experts_per_tok", 513),
        ("layer_types", ["linear_attention"]),
        ("layer_types", ["sliding_attention"] * 60),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.001}),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 2.0}),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": float("inf")}),
    ],
)
def test_what_is_not_run_is_refused_by_name(key, value):
    config = family_config("397B-A17B")
    config["text_config"][key] = value
    name = {"rope_parameters": "rope_type|partial_rotary_factor"}.get(key, key)
    with pytest.raises(ConfigError, match=name) as error:
        ModelConfig.from_hf(config)
    assert "got:" in str(error.value)
    assert "expected:" in str(error.value)


@pytest.mark.parametrize("kind", ["llama", "qwen3_next", "qwen3_moe", None])
def test_another_model_type_is_refused(kind):
    config = family_config("2B") | {"model_type": kind}
    with pytest.raises(ConfigError, match="model_type"):
        ModelConfig.from_hf(config)


def test_a_dense_config_inside_a_moe_one_is_refused():
    config = family_config("2B") | {"model_type": "qwen3_5_moe"}
    with pytest.raises(ConfigError, match=r"text_config\.model_type"):
        ModelConfig.from_hf(config)


@pytest.mark.parametrize("text", ["x", [1]])
def test_a_text_config_that_is_no_object_is_refused(text):
    with pytest.raises(ConfigError, match="text_config is not an object"):
        ModelConfig.from_hf(family_config("2B") | {"text_config": text})


def test_an_unknown_key_is_reported(caplog):
    config = family_config("2B")
    config["text_config"]["new_trick"] = 1
    with caplog.at_level(logging.WARNING):
        ModelConfig.from_hf(config)
    assert "new_trick" in caplog.text


def test_tying_is_true_or_false():
    with pytest.raises(ConfigError, match="tie_word_embeddings='false'"):
        ModelConfig.from_hf(family_config("2B") | {"tie_word_embeddings": "false"})


def test_tying_may_be_said_outside_the_text_config():
    config = family_config("2B")
    del config["text_config"]["tie_word_embeddings"]
    assert not ModelConfig.from_hf(config).tie_word_embeddings
    assert ModelConfig.from_hf(config | {"tie_word_embeddings": True}).tie_word_embeddings


@pytest.mark.parametrize("tied", [False, True])
def test_tying_outside_wins_over_the_text_config(tied):
    """transformers writes its default into text_config, and ties by what stands outside."""
    config = family_config("2B") | {"tie_word_embeddings": tied}
    config["text_config"]["tie_word_embeddings"] = not tied
    assert ModelConfig.from_hf(config).tie_word_embeddings is tied


def test_yarn_stretches_the_context_and_scales_attention():
    config = family_config("397B-A17B")
    config["text_config"]["rope_parameters"] |= {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 262144,
    }
    read = ModelConfig.from_hf(config)
    assert read.context_length == 4 * 262144
    assert read.rope.attention_factor == pytest.approx(1.1386294361)
    config["text_config"]["rope_parameters"]["attention_factor"] = 1.5
    assert ModelConfig.from_hf(config).rope.attention_factor == 1.5


def test_a_longer_context_is_stretched_to_on_request_and_no_further():
    released = ModelConfig.from_hf(family_config("397B-A17B"))
    # Shorter texts would be read less well: as trained, it stays as it is.
    assert released.stretched_to(None) is released.stretched_to(262_144) is released
    longer = released.stretched_to(524_288)
    assert longer.context_length == 524_288 and longer.rope.factor == 2.0
    assert longer.rope.attention_factor == pytest.approx(1.0693147181)
    assert released.stretched_to(300_001).context_length >= 300_001
    assert released.stretched_to(4 * 262_144 + 1) is released
    # What the checkpoint says stays.
    own = family_config("397B-A17B")
    own["text_config"]["rope_parameters"] |= {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 262_144,
    }  # fmt: skip
    own = ModelConfig.from_hf(own)
    assert own.stretched_to(10**6) is own and own.stretched_length == 524_288


@pytest.mark.parametrize("key", ["attention_factor", "beta_fast", "beta_slow"])
def test_a_yarn_key_that_is_no_number_is_refused(key):
    config = family_config("2B")
    rope = {"factor": 4.0, "original_max_position_embeddings": 262144, "rope_type": "yarn"}
    config["text_config"]["rope_parameters"] |= rope | {key: "x"}
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_hf(config)


@pytest.mark.parametrize("key", ["factor", "original_max_position_embeddings"])
def test_yarn_without_its_keys_is_refused(key):
    config = family_config("2B")
    rope = {"factor": 4.0, "original_max_position_embeddings": 262144, "rope_type": "yarn"}
    del rope[key]
    config["text_config"]["rope_parameters"] |= rope
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_hf(config)


def test_a_trained_length_beside_the_rope_parameters_counts_more_than_inside():
    config = family_config("2B")
    config["text_config"]["rope_parameters"] |= YARN | {"original_max_position_embeddings": 64}
    config["text_config"]["original_max_position_embeddings"] = 128
    assert ModelConfig.from_hf(config).rope.original_max_position_embeddings == 128


def test_a_billion_layers_are_refused_before_they_are_listed():
    config = family_config("2B")
    config["text_config"]["num_hidden_layers"] = 10**9
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        ModelConfig.from_hf(config)


def test_a_folder_in_place_of_the_file_is_an_error(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[1]", '"x"', "[" * 100_000])
def test_a_missing_or_damaged_file_is_an_error(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}


@pytest.mark.parametrize(
    ("level", "key", "value"),
    [
        ("text_config", "hidden_size", float("inf")),
        ("text_config", "hidden_size", None),
        ("text_config", "rms_norm_eps", float("nan")),
        ("text_config", "tie_word_embeddings", "false"),
        ("rope_parameters", "factor", None),
        ("rope_parameters", "partial_rotary_factor", float("inf")),
        ("rope_parameters", "attention_factor", "1.2"),
        ("rope_parameters", "attention_factor", -1.0),
        ("rope_parameters", "beta_fast", [32]),
        ("rope_parameters", "beta_slow", -1),
        ("rope_parameters", "mscale", "0.7"),
        ("rope_parameters", "mscale_all_dim", float("inf")),
        ("rope_parameters", "truncate", "false"),
        ("rope_parameters", "truncate", None),
    ],
)
def test_values_of_another_kind_are_refused_by_name(level, key, value):
    """They ended in an OverflowError, in float's own words, or were taken for something else."""
    config = family_config("397B-A17B")
    config["text_config"]["rope_parameters"] |= YARN
    whole = {"text_config": config["text_config"], **config["text_config"]}
    whole[level][key] = value
    with pytest.raises(ConfigError, match=key) as error:
        ModelConfig.from_hf(config)
    assert "got:" in str(error.value)
    assert "expected:" in str(error.value)


def test_a_missing_key_is_told_from_a_null():
    config = family_config("2B")
    config["text_config"]["head_dim"] = None
    with pytest.raises(ConfigError, match="got: null"):
        ModelConfig.from_hf(config)
    del config["text_config"]["head_dim"]
    with pytest.raises(ConfigError, match="got: no such key"):
        ModelConfig.from_hf(config)


def test_a_zero_of_yarn_stands_for_its_default_as_in_the_reference():
    config = family_config("2B")
    rope = config["text_config"]["rope_parameters"]
    rope |= YARN
    plain = ModelConfig.from_hf(config)
    rope |= dict(beta_fast=0, beta_slow=None, mscale=1.0, mscale_all_dim=0.0)
    assert ModelConfig.from_hf(config) == plain


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_act", "gelu", "'silu' or 'swish'"),
        ("output_gate_type", "gelu", "'silu' or 'swish'"),
        ("sliding_window", 4096, "absent"),
        ("decoder_sparse_step", 2, "1"),
    ],
)
def test_a_refused_value_is_told_beside_those_that_are_run(key, value, expected):
    config = family_config("2B")
    config["text_config"][key] = value
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(config)
    lines = str(error.value).splitlines()
    assert lines[1:] == [f"  got: {value!r}", f"  expected: {expected}"]
    assert key in lines[0]


def yarn(**changes: object) -> ModelConfig:
    config = family_config("2B")
    config["text_config"]["rope_parameters"] |= YARN | changes
    return ModelConfig.from_hf(config)


def test_the_defaults_of_yarn_are_those_of_the_reference():
    rope = yarn().rope
    assert (rope.beta_fast, rope.beta_slow, rope.truncate) == (32, 1, True)
    assert yarn(truncate=False).rope.truncate is False


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(factor=1.0), 1.0),
        (dict(factor=0.5), 1.0),
        # One of the two alone does not count.
        (dict(mscale=0.7), 1 + 0.1 * math.log(4)),
        (dict(mscale_all_dim=0.7), 1 + 0.1 * math.log(4)),
        (dict(mscale=2.0, mscale_all_dim=0.5), (1 + 0.2 * math.log(4)) / (1 + 0.05 * math.log(4))),
    ],
)
def test_the_attention_factor_of_yarn(changes, expected):
    assert yarn(**changes).rope.attention_factor == pytest.approx(expected, rel=1e-12)


def test_yarn_never_shortens_the_context():
    assert yarn(original_max_position_embeddings=1024).context_length == 262144
    assert yarn().context_length == 4 * 262144


@pytest.mark.parametrize(("size", "fits"), [(2**31 - 1, True), (2**31, False)])
def test_a_size_is_what_mlx_can_count(size, fits):
    config = family_config("2B")
    config["text_config"]["vocab_size"] = size
    if fits:
        assert ModelConfig.from_hf(config).vocab_size == size
    else:
        with pytest.raises(ConfigError, match="vocab_size=2147483648 is not usable"):
            ModelConfig.from_hf(config)


def test_the_rope_type_of_qwen3_next_is_kept():
    scaling = dict(YARN, type="default")
    found = next_as_moe(dict(model_type="qwen3_next", rope_theta=1e7, rope_scaling=scaling))
    assert found["rope_parameters"]["rope_type"] == "yarn"
    old = next_as_moe(dict(model_type="qwen3_next", rope_scaling={"type": "yarn", "factor": 2.0}))
    assert old["rope_parameters"]["rope_type"] == "yarn"


@pytest.mark.parametrize("scaling", ["yarn", ["yarn"], 4.0])
def test_the_rope_scaling_of_qwen3_next_is_an_object(scaling: object) -> None:
    with pytest.raises(ConfigError, match="rope_scaling is not an object"):
        next_as_moe(dict(model_type="qwen3_next", rope_theta=1e7, rope_scaling=scaling))
