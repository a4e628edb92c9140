"""What running takes, against MLX's allocator; the guard and the limits, on faked Macs."""

import platform
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import pytest
from everyday import everyday
from mlx.utils import tree_flatten

import qwen35_mlx
from qwen35_mlx import machine, memory
from qwen35_mlx.config import ModelConfig, VisionConfig
from qwen35_mlx.engine.prefix_store import PrefixStore
from qwen35_mlx.engine.prompt_cache import PromptCache
from qwen35_mlx.errors import MemoryRefused, Qwen35Error
from qwen35_mlx.family import FAMILY, family_config
from qwen35_mlx.kernels.gated_delta_rule import gated_delta_rule
from qwen35_mlx.model.language import Model
from qwen35_mlx.model.loading import load_model

GIB = 2**30
FLAGSHIP = ModelConfig.from_hf(family_config("Qwen3.5-397B-A17B"))
SMALL = dict(
    hidden_size=128, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
    head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32,
    linear_value_head_dim=64, vocab_size=512, tie_word_embeddings=True,
)  # fmt: skip
DENSE = family_config("Qwen3.5-0.8B")
EXPERTS = family_config("Qwen3.5-35B-A3B")


def small(base: dict[str, Any], **changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(base | dict(text_config=base["text_config"] | SMALL | changes))


CONFIGS = {
    "dense": small(DENSE, intermediate_size=384),
    "experts": small(
        EXPERTS, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=96,
        shared_expert_intermediate_size=96,
    ),
    "wide_linear": small(DENSE, intermediate_size=256, num_attention_heads=2,
                         num_key_value_heads=1, linear_key_head_dim=64),
    "quantized_keys": replace(small(DENSE, head_dim=64, intermediate_size=384), kv_bits=(8, 8)),
}  # fmt: skip


def peak_of_a_prefill(config: ModelConfig, context: int, budget: int) -> int:
    """What MLX held at most, weights apart, while a prompt was read; scores within the budget."""
    model = Model(config)
    for layer in model.layers:
        if not layer.is_linear:
            layer.self_attn.max_scores_bytes = budget
    model.eval()
    mx.eval(model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    cache, read = model.make_cache(), 0
    while read < context:
        ids = mx.zeros((1, min(memory.PREFILL_STEP_SIZE, context - read)), mx.int32)
        hidden = model.trunk(ids, cache, last_only=True)
        mx.eval(hidden, [entry.state for entry in cache])
        read += ids.size
    return mx.get_peak_memory() - before


@pytest.mark.parametrize(
    ("name", "context", "limit_bytes"),
    # With scores of all queries at once, then of 64 and of 128.
    everyday(
        [("dense", 512, GIB), ("experts", 512, GIB), ("wide_linear", 512, GIB),
         ("dense", 512, 8 * 2**20), ("experts", 512, 16 * 2**20), ("experts", 1024, 32 * 2**20),
         ("wide_linear", 1500, 8 * 2**20), ("quantized_keys", 512, 8 * 2**20)],
        7,
    ),
)  # fmt: skip
def test_the_count_is_an_upper_bound_of_what_a_prefill_takes(
    compiled: None, name: str, context: int, limit_bytes: int
) -> None:
    config = CONFIGS[name]
    counted = memory.count(config, 0, context, limit_bytes, item_bytes=4)
    peak = peak_of_a_prefill(config, context, memory.scores_budget(limit_bytes))
    # All but what a prefill does not take.
    upper = counted.total - counted.snapshots - counted.program
    assert peak <= upper <= 1.5 * peak


@pytest.mark.parametrize("shape", [(2, 4, 32, 64, 256), (4, 8, 64, 32, 320), (2, 8, 64, 64, 128)])
def test_the_chunked_rule_takes_what_is_counted(shape: tuple[int, ...]) -> None:
    key_heads, value_heads, key_dim, value_dim, tokens = shape
    config = small(
        DENSE, linear_num_key_heads=key_heads, linear_num_value_heads=value_heads,
        linear_key_head_dim=key_dim, linear_value_head_dim=value_dim,
    )  # fmt: skip
    q, k = (mx.random.normal((1, tokens, key_heads, key_dim)) for _ in range(2))
    v = mx.random.normal((1, tokens, value_heads, value_dim))
    g, beta = -mx.ones((1, tokens, value_heads)), mx.full((1, tokens, value_heads), 0.5)
    state = mx.zeros((1, value_heads, value_dim, key_dim))
    mx.eval(q, k, v, g, beta, state)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gated_delta_rule(q, k, v, g, beta, state))
    peak = mx.get_peak_memory() - before
    assert peak <= memory.chunk_rule_bytes(config, tokens) <= 1.5 * peak


def test_the_chunked_rule_of_the_397b() -> None:
    # 743 MB measured at these shapes on a CPU, of 2,048 tokens; 210 of 512.
    assert 1 <= memory.chunk_rule_bytes(FLAGSHIP, 2048) / 743e6 <= 1.3
    assert 1 <= memory.chunk_rule_bytes(FLAGSHIP, 512) / 210e6 <= 1.3


@pytest.mark.slow
def test_states_do_not_keep_the_inputs_of_every_layer_until_the_end_of_a_step() -> None:
    few, many = (
        peak_of_a_prefill(small(DENSE, intermediate_size=128, num_hidden_layers=n,
                                layer_types=["linear_attention"] * n), 512, GIB)
        for n in (4, 12)
    )  # fmt: skip
    config = small(DENSE, num_hidden_layers=8, layer_types=["linear_attention"] * 8)
    window = 512 * config.conv_dim * 4
    # Its new states, and not what the convolution and the last chunk of each layer read.
    assert many - few < 2 * memory.state_bytes(config, 4) + 8 * window / 4


def test_attention_scores_of_the_397b() -> None:
    for context, gigabytes in ((32_768, 4.3), (131_072, 17.2), (262_144, 34.4)):
        scores = memory.scores_bytes(FLAGSHIP, 2048, context)
        assert scores / 1e9 == pytest.approx(gigabytes, abs=0.05)
    # They do not come about: so many queries at a time that they take 1.25 GB.
    counted = memory.count(FLAGSHIP, 0, 262_144)
    assert counted.query_block == 64
    assert 32 * 64 * 262_144 * 2 <= counted.scores == 1_250_000_000
    assert memory.kv_bytes(FLAGSHIP, 1) == 30_720
    assert memory.state_bytes(FLAGSHIP) / 1e6 == pytest.approx(188.7 + 3.3, abs=0.1)


@pytest.mark.parametrize("member", FAMILY, ids=lambda member: member.name)
def test_so_many_queries_at_a_time_as_their_scores_allow(member: Any) -> None:
    config = ModelConfig.from_hf(family_config(member.full_name))
    heads, contexts = config.num_attention_heads, range(1024, 262_145, 1024)
    blocks = [memory.query_block(heads, c, memory.MAX_SCORES_BYTES) for c in contexts]
    assert blocks[0] == 2048 and blocks == sorted(blocks, reverse=True)
    for context, block in zip(contexts, blocks, strict=True):
        assert block % 32 == 0
        assert memory.scores_bytes(config, block, context) <= memory.MAX_SCORES_BYTES
        if block < 2048:
            longer = memory.scores_bytes(config, block + 32, context)
            assert longer > memory.MAX_SCORES_BYTES
        # Counted is the most of any step up to there.
        counted = memory.count(config, 0, context).scores
        met = [memory.scores_bytes(config, b, c) for b, c in zip(blocks, contexts, strict=True)
               if c <= context]  # fmt: skip
        assert max(met) <= counted <= memory.MAX_SCORES_BYTES
    # On a small Mac they may take an eighth of what the GPU has.
    budget = memory.scores_budget(4 * GIB)
    assert budget == GIB / 2
    assert memory.query_block(heads, 262_144, budget) < 2048
    # And never less than 32 queries have.
    assert memory.query_block(heads, 10**9, 1) == 32


def test_the_overhead_adds_up_in_words() -> None:
    hf = family_config("Qwen3.5-397B-A17B")
    for vision in (None, VisionConfig.from_hf(hf, FLAGSHIP.hidden_size)):
        counted = memory.count(replace(FLAGSHIP, vision=vision), 7, 32_768)
        lines = counted.overhead_lines()
        assert sum(lines.values()) == counted.overhead == counted.total - 7
        assert any("scores" in line and "576" in line for line in lines)
        assert any("picture" in line for line in lines) is (vision is not None)


def test_the_longest_context_is_that_to_the_last_byte() -> None:
    steps = [0, 256, *range(1024, 262_144, 1024), 262_144]
    for place in (1, 2, 3, 99, -2, -1):
        total = memory.count(FLAGSHIP, 10**11, steps[place]).total
        assert memory.longest_context(FLAGSHIP, 10**11, total) == steps[place]
        assert memory.longest_context(FLAGSHIP, 10**11, total - 1) == steps[place - 1]
    # Of a model that reads no more than this.
    short = replace(FLAGSHIP, max_position_embeddings=100)
    assert memory.longest_context(short, 0, 10**12) == 100


def test_layers_without_attention_have_no_scores() -> None:
    linear = replace(FLAGSHIP, layer_types=("linear_attention",))
    assert memory.count(linear, 0, 4096).scores == 0
    assert memory.count(linear, 0, 4096).kv_cache == 0


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, list[int]]]:
    """Turns this into a Mac; gives the limits that MLX was told, in order."""

    def become(memory_bytes: int, limit_bytes: int | None = None) -> dict[str, list[int]]:
        limit_bytes = limit_bytes or memory_bytes * 3 // 4
        info = {
            "device_name": "Apple M3 Ultra",
            "memory_size": memory_bytes,
            "max_recommended_working_set_size": limit_bytes,
        }
        told: dict[str, list[int]] = {"wired": [], "cache": []}
        monkeypatch.setattr(mx, "device_info", lambda: info)
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "set_wired_limit", told["wired"].append)
        monkeypatch.setattr(mx, "set_cache_limit", told["cache"].append)
        monkeypatch.setattr(platform, "mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))
        monkeypatch.setattr(subprocess, "check_output", lambda command, **_: "0\n")
        monkeypatch.setattr(memory, "_wired", False)
        return told

    return become


def weights_of(folder: Path) -> int:
    model, _ = load_model(folder)
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(
    mac: Any, converted_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mac(64 * GIB, 1000)
    evaluated: list[Any] = []
    monkeypatch.setattr(mx, "eval", lambda *arrays: evaluated.extend(arrays))
    with pytest.raises(MemoryRefused) as error:
        qwen35_mlx.load(converted_demo)
    assert evaluated == []
    text = str(error.value)
    assert "weights" in text and "KV cache of" in text and "attention scores" in text
    # The limit of the GPU may be raised, to what is needed and no more.
    assert "sudo sysctl iogpu.wired_limit_mb=2048 gives the GPU enough" in text
    assert "--force" in text
    # Nor is there room for the experts of one token beside what must be in memory.
    assert "with experts from disk: too little memory" in text and "for 2 of 8" in text
    assert isinstance(error.value, Qwen35Error)


def test_the_refusal_names_the_longest_context_that_fits(mac: Any) -> None:
    # 174.6 GB on a Mac of 256 GB, whose GPU has 206.2: 262,144 tokens fit, with 190 GB they do not.
    mac(256 * GIB)
    memory.allow(FLAGSHIP, 174_600_000_000, context=262_144)
    weights = 196_000_000_000
    with pytest.raises(MemoryRefused) as error:
        memory.allow(FLAGSHIP, weights, context=262_144)
    longest = int(str(error.value).split("--context ")[1].split()[0])
    assert 32_768 < longest < 262_144
    assert memory.allow(FLAGSHIP, weights, context=longest).context == longest
    with pytest.raises(MemoryRefused):
        memory.allow(FLAGSHIP, weights, context=longest + 1024)
    assert memory.allow(FLAGSHIP, weights, context=262_144, force=True).context == 262_144
    # Without a context 32,768 have to fit, and the rest of the model's is given as far as it fits.
    assert memory.allow(FLAGSHIP, weights).context == longest
    assert memory.allow(FLAGSHIP, 150_000_000_000).context is None


def test_a_model_too_large_for_any_limit_gets_no_command(mac: Any) -> None:
    mac(64 * GIB)
    with pytest.raises(MemoryRefused) as error:
        memory.allow(FLAGSHIP, 190_000_000_000)
    assert "sysctl" not in str(error.value) and "--context" not in str(error.value)
    assert "fewer bits" in str(error.value)


def test_keys_and_values_of_8_bits_where_16_do_not_fit(mac: Any, caplog: Any) -> None:
    mac(256 * GIB)
    choices = memory.kv_choices(FLAGSHIP)
    limit = machine.describe().gpu_limit_bytes
    assert limit is not None
    sixteen, eight = (limit - memory.count(c, 0, 262_144, limit).overhead for c in choices)
    # Half of 9.06 GB and of a layer's that grows, less scales and biases.
    assert (eight - sixteen) / 1e9 == pytest.approx(4.53, abs=0.01)
    assert memory.allow_with_kv(choices, sixteen, context=262_144)[0].kv_bits is None
    assert not caplog.records
    config, allowance = memory.allow_with_kv(choices, sixteen + 1, context=262_144)
    assert config.kv_bits == (8, 8) and allowance.context == 262_144
    assert "8 bits" in caplog.text
    with pytest.raises(MemoryRefused, match=r"KV cache of 262,144 tokens +4\.8\d* GB"):
        memory.allow_with_kv(choices, eight + 1, context=262_144)


@pytest.mark.parametrize("context", [0, 4 * 262_144 + 1])
def test_a_context_that_the_model_cannot_read_is_refused(mac: Any, context: int) -> None:
    mac(512 * GIB)
    with pytest.raises(Qwen35Error, match=r"(?s)does not fit the model.*262,144, or with YaRN 1,0"):
        memory.allow(FLAGSHIP, 10**9, context=context)
    stretched = FLAGSHIP.stretched_to(4 * 262_144)
    with pytest.raises(Qwen35Error, match=r"expected: 1 to 1,048,576$"):
        memory.allow(stretched, 10**9, context=context)
    memory.check_context(FLAGSHIP, 1)
    memory.check_context(FLAGSHIP, 4 * 262_144)


def test_without_metal_the_weights_have_to_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    if mx.metal.is_available():
        pytest.skip("this machine has Metal")
    total = machine.describe().memory_bytes
    # As much as the machine has may be asked for: it can swap.
    assert memory.allow(FLAGSHIP, total).context is None
    with pytest.raises(MemoryRefused, match="memory of this machine"):
        memory.allow(FLAGSHIP, total + 1)
    with pytest.raises(MemoryRefused, match="memory of this machine"):
        memory.allow(FLAGSHIP, total - GIB, context=32_768)
    assert memory.allow(FLAGSHIP, total + 1, force=True).context is None


def test_a_context_given_to_load_bounds_prompt_and_answer(converted_demo: Path) -> None:
    model, tokenizer = qwen35_mlx.load(converted_demo, context=64)
    assert model.config.context_length == 64
    with pytest.raises(Qwen35Error, match="context"):
        qwen35_mlx.generate(model, tokenizer, [1] * 64)
    parts = list(qwen35_mlx.stream_generate(model, tokenizer, [5] * 60, temperature=0))
    assert len(parts) <= 4


@pytest.mark.slow
def test_the_wired_limit_is_set_once_a_process_and_the_pool_is_bounded(
    mac: Any, converted_demo: Path
) -> None:
    told = mac(16 * GIB)
    model, tokenizer = qwen35_mlx.load(converted_demo)
    assert told["wired"] == [12 * GIB]
    assert told["cache"] == [model.allowance.pool_bytes]
    assert memory.POOL_BYTES < model.allowance.pool_bytes < 2 * GIB
    qwen35_mlx.load(converted_demo)
    # Nor do turns change it, or reading ahead after them.
    chat = qwen35_mlx.Chat(model, tokenizer, max_tokens=3)
    for question in ("One?", "Two?"):
        list(chat.send(question))
        chat.read_ahead()
    qwen35_mlx.generate(model, tokenizer, "One", max_tokens=2)
    assert told["wired"] == [12 * GIB]


def test_the_pool_shrinks_where_weights_leave_little(mac: Any) -> None:
    mac(256 * GIB)
    roomy, tight = (memory.allow(FLAGSHIP, n * 10**9) for n in (100, 199))
    counted = memory.count(FLAGSHIP, 0, 32_768)
    assert roomy.pool_bytes == memory.POOL_BYTES + counted.scores + counted.activations
    assert tight.pool_bytes == memory.POOL_BYTES


def test_a_long_answer_empties_the_pool_of_what_it_outgrew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths: list[int] = []
    model = SimpleNamespace(trunk=lambda ids, entries, **options: ids)
    cache = PromptCache(cast(Model, model), [7] * 1000, [])
    monkeypatch.setattr(mx, "clear_cache", lambda: lengths.append(len(cache.ids)))
    for _ in range(2100):
        cache.step(mx.array([5]))
        cache.commit(5)
    assert lengths == [1024, 2048, 3072]


def test_off_metal_no_limit_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(limit: int) -> None:
        raise AssertionError(limit)

    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx, "set_wired_limit", fail)
    monkeypatch.setattr(mx, "set_cache_limit", fail)
    memory.wire(memory.Allowance())


def test_snapshots_get_a_sixteenth_of_memory_and_no_more_than_is_left(mac: Any) -> None:
    nine = ModelConfig.from_hf(family_config("Qwen3.5-9B"))
    mac(16 * GIB)
    assert memory.allow(nine, 5 * 10**9).snapshot_bytes == GIB
    mac(512 * GIB)
    assert memory.allow(nine, 5 * 10**9).snapshot_bytes == 4 * 10**9
    mac(256 * GIB)
    tight = memory.allow(FLAGSHIP, 199_500_000_000).snapshot_bytes
    assert memory.MIN_SNAPSHOTS * memory.state_bytes(FLAGSHIP) <= tight < 2 * 10**9


def test_the_store_takes_what_load_found_to_be_left(scripted: Any) -> None:
    model = scripted([1])
    model.allowance = memory.Allowance(snapshot_bytes=12_345)
    assert PrefixStore(model).memory_bytes == 12_345
    assert PrefixStore(model, 7).memory_bytes == 7
