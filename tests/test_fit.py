"""Bits for a budget: the plans of the 397B from headers alone, and small ones that are run."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from conftest import DEMO
from everyday import everyday
from test_config import family_config
from test_mlx_lm import assert_equal_logits, write_source

from qwen35_mlx.checkpoint.tensor_table import Role, expected_shapes
from qwen35_mlx.config import ModelConfig
from qwen35_mlx.convert import convert, plan
from qwen35_mlx.convert import fit as fitting
from qwen35_mlx.convert.fit import fit, fit_mac, quality_settings
from qwen35_mlx.convert.mac_models import bytes_per_token, running
from qwen35_mlx.errors import MemoryRefused, Qwen35Error
from qwen35_mlx.machine import raised_limit_bytes
from qwen35_mlx.memory import kv_capacity
from qwen35_mlx.quant.recipes import RECIPES, recipe
from qwen35_mlx.quant.statistics import Calibration

GIB = 2**30


def write_headers(folder: Path, config: dict) -> Path:
    """A checkpoint of which only the headers are there: the data are a hole in the file."""
    shapes = expected_shapes(ModelConfig.from_hf(config))
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(entries).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        try:
            stream.truncate(8 + len(raw) + end)
        except OSError:
            pytest.skip("this file system has no sparse files")
    return folder


@pytest.fixture(scope="module")
def flagship(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_headers(tmp_path_factory.mktemp("397b") / "src", family_config("397B-A17B"))


@cache
def fitted(flagship: Path, memory_gib: int, context: int = 32768):
    return fit_mac(flagship, memory_gib * GIB, context=context)


@pytest.mark.slow
@pytest.mark.parametrize(("memory_gib", "context"), [(192, 32768), (256, 32768), (192, 262144)])
def test_the_397b_fills_a_mac_to_half_a_percent(flagship, memory_gib, context):
    budget, choices = fitted(flagship, memory_gib, context)
    choice = choices["quality"]
    # By the rules of memory.py, line by line and in all.
    limit = raised_limit_bytes(memory_gib * GIB)
    in_use = running(choice.plan, context, limit)
    assert in_use.total <= limit
    assert budget.weight_bytes == limit - sum(in_use.overhead_lines().values())
    assert 0.995 * budget.weight_bytes <= choice.file_bytes <= budget.weight_bytes
    assert choice.file_bytes > choice.plan.text_bytes + choice.plan.mtp_bytes
    # What the plan says is what its tensors add up to; the MTP layer has 6.6 billion weights.
    loaded = [e for e in choice.plan.entries if e.role is not Role.CARRIED]
    assert choice.plan.loaded_bytes == sum(t.nbytes for e in loaded for t in e.tensors)
    assert choice.plan.mtp_bytes == pytest.approx(4.5 / 8 * 6.6e9, rel=0.01)
    speed = choices["speed"]
    assert bytes_per_token(speed.plan) < bytes_per_token(choice.plan)
    assert choice.predicted_kl < speed.predicted_kl < 1.3 * choice.predicted_kl


@pytest.mark.slow
def test_more_memory_is_better_and_experts_give_first(flagship):
    small, large = (fitted(flagship, gib)[1]["quality"] for gib in (192, 256))
    assert large.predicted_kl < small.predicted_kl / 2
    bits = {e.module: e.bits for e in small.plan.entries}
    layer = "language_model.model.layers.7."
    assert bits[f"{layer}mlp.gate"] == 8
    assert bits[f"{layer}mlp.switch_mlp.gate_proj"] == bits[f"{layer}mlp.switch_mlp.up_proj"] <= 4
    assert bits[f"{layer}self_attn.o_proj"] > bits[f"{layer}mlp.switch_mlp.down_proj"]
    assert bits["language_model.model.layers.0.linear_attn.out_proj"] >= 6


@pytest.mark.slow
def test_a_mac_too_small_is_told_how_much_would_do(flagship):
    with pytest.raises(Qwen35Error, match="smaller than the smallest plan") as error:
        fit_mac(flagship, 96 * GIB)
    least = float(str(error.value).split("at least ")[1].split(" GB")[0])
    choice = fit(flagship, math.ceil(least * 1e9) + 10**6)
    assert choice.file_bytes <= least * 1e9 + 10**6
    with pytest.raises(Qwen35Error, match="smaller than the smallest plan"):
        fit(flagship, int(least * 1e9) - 10**7)


@pytest.mark.slow
def test_recipes_order_the_397b_by_size(flagship):
    sizes = {
        name: plan(flagship, recipe=recipe(name), method="search").text_bytes / 1e9
        for name in RECIPES
    }
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert 185 < sizes["q3"] < 196
    assert 222 < sizes["q4"] < 232


def test_a_context_beyond_the_model_is_refused(tmp_path):
    write_checkpoint(tmp_path / "src", moe=True)
    with pytest.raises(Qwen35Error, match="context does not fit the model"):
        fit_mac(tmp_path / "src", 16 * GIB, context=4 * 512 + 1)


@pytest.mark.parametrize("bits_per_weight", [3.7, 5.0, 7.3])
def test_bits_per_weight_are_met_from_below_and_beat_uniform_bits(tmp_path, bits_per_weight):
    write_checkpoint(tmp_path / "src", moe=True, vision=True, mtp=True)
    choice = fit(tmp_path / "src", bits_per_weight=bits_per_weight)
    assert choice.plan.bits_per_weight <= bits_per_weight
    assert choice.plan.bits_per_weight > 0.97 * bits_per_weight


def test_only_one_may_decide_on_bits(tmp_path):
    with pytest.raises(Qwen35Error, match="more than one argument sets the bits") as error:
        quality_settings(tmp_path, bits=4, memory="64GB")
    assert "bits and fit" in str(error.value)
    with pytest.raises(Qwen35Error, match="no recipe 'q7'"):
        quality_settings(tmp_path, recipe="q7")


def test_measured_kls_move_bits_to_where_they_count(tmp_path):
    write_checkpoint(tmp_path / "src", moe=True)
    planned = plan(tmp_path / "src")
    quantized = [e.module for e in planned.entries if e.role is Role.QUANTIZED]
    last = "language_model.model.layers.3.mlp.switch_mlp.down_proj"
    kls = {m: {(2, 64): 1e-4, (4, 64): 1e-5} for m in quantized}
    kls[last] = {(2, 64): 1.0, (4, 64): 0.1}
    calibration = Calibration("src", planned.layout, "", 100, kls=kls)
    choice = fit(tmp_path / "src", bits_per_weight=4.0, calibration=calibration)
    bits = {unit: option.bits for unit, option in choice.allocation.options.items()}
    assert bits[last] == 8
    assert max(b for unit, b in bits.items() if unit != last) < 8
    other = Calibration("other", "0" * 16, "", 100)
    with pytest.raises(Qwen35Error, match="of another model"):
        fit(tmp_path / "src", bits_per_weight=4.0, calibration=other)


@pytest.mark.slow
@pytest.mark.parametrize("moe", everyday([False, True], 0), ids=["dense", "moe"])
@pytest.mark.parametrize(
    "way", everyday([dict(recipe="q3"), dict(recipe="q2"), dict(bits_per_weight=3.9)], 0)
)
def test_mixed_bits_load_in_mlx_lm_with_equal_logits(tmp_path, moe, way):
    write_source(tmp_path / "source", moe)
    settings, _ = quality_settings(tmp_path / "source", **way)
    out = convert(tmp_path / "source", tmp_path / "converted", **settings)
    block = json.loads((out / "config.json").read_text())["quantization"]
    settings = {(v["bits"], v["group_size"]) for v in block.values() if isinstance(v, dict)}
    assert len(settings) > 1
    assert_equal_logits(out)


@pytest.mark.slow
def test_the_page_adds_up(flagship):
    settings, lines = quality_settings(flagship, memory="256GB", prefer="speed", context=65536)
    assert settings["method"] == "search"
    amounts = [float(line[46:56]) for line in lines if line.startswith("  ") and line[-3:] == " GB"]
    limit, kv, *others, left, weights, spare = amounts
    assert left == pytest.approx(limit - kv - sum(others), abs=0.004)
    assert spare == pytest.approx(left - weights, abs=0.002)
    # 15 layers, and the MTP layer.
    assert kv == pytest.approx(32768 * kv_capacity(65536) / 1e9, abs=0.001)
    (chosen,) = [line for line in lines if line.endswith("<- this plan")]
    assert chosen.startswith("speed")
    # 32 heads, 65,536 keys, two bytes each: 298 queries have as much as is allowed.
    (scores,) = [line for line in lines if "attention scores, 288 queries at a time" in line]
    assert float(scores[46:56]) == pytest.approx(1.25, abs=0.001)
    assert any("bandwidth limit, tok/s (M3 Ultra)" in line for line in lines)


def test_smaller_keys_and_values_are_taken_where_nothing_else_fits(monkeypatch):
    budgets = []

    def strict(source, budget_bytes, **settings):
        budgets.append(budget_bytes)
        if len(budgets) == 1:
            raise MemoryRefused("the budget is smaller than the smallest plan")

    monkeypatch.setattr(fitting, "fit", strict)
    # More than the 4,096 tokens that it was trained for.
    budget, _ = fit_mac(DEMO, 2 * GIB, context=10_000)
    # Two heads of 64 in one layer of four, and in the MTP layer.
    numbers = 2 * 2 * 2 * 64 * kv_capacity(10_000)
    assert budget.needed.kv_cache == numbers * 17 // 16
    assert budgets[0] + numbers * 15 // 16 <= budgets[1]
    budgets.clear()
    with pytest.raises(MemoryRefused):
        fit_mac(DEMO, 2 * GIB, context=10_000, kv_bits="16")


@pytest.mark.parametrize(
    ("points", "error", "kl"),
    [
        # On a line of slope 2, and 1.5.
        ([(0.001, 1e-6), (0.01, 1e-4)], 0.1, 1e-2),
        ([(0.001, 1e-6), (0.01, 1e-4)], 1e-4, 1e-8),
        ([(0.01, 1e-3), (0.0001, 1e-6), (0.001, 0.7)], 0.1, 10**-1.5),
        # No steeper, and no flatter than half.
        ([(0.001, 1e-6), (0.01, 1e-2)], 0.1, 1.0),
        ([(0.001, 1e-6), (0.01, 1e-2)], 1e-4, 1e-8),
        ([(0.001, 1e-3), (0.01, 1e-4)], 0.1, 1e-4 * 10**0.5),
        # One point, or two of about the same error, are no line.
        ([(0.01, 1e-4)], 0.1, 1e-3),
        ([(0.01, 1e-4), (0.01005, 9e-4)], 0.1, 9e-4 * 0.1 / 0.01005),
    ],
)
def test_a_measured_kl_is_extrapolated_to_other_errors(
    points: list[tuple[float, float]], error: float, kl: float
) -> None:
    settings = [(bits, 64) for bits in range(2, 2 + len(points))]
    row = {setting: point[0] for setting, point in zip(settings, points, strict=True)}
    measured = {setting: point[1] for setting, point in zip(settings, points, strict=True)}
    assert fitting._extrapolated(error, row, measured | {(9, 9): 1.0}) == pytest.approx(kl)


def test_without_a_calibration_the_whole_at_4_bits_has_a_published_kl() -> None:
    units: dict[str, list[fitting.Entry]] = {}
    for entry in plan(DEMO).text_entries:
        if entry.bits:
            units.setdefault(fitting.unit_of(entry.module), []).append(entry)
    found = fitting.predicted(units, None)
    assert math.fsum(row[4, 64] for row in found.values()) == pytest.approx(fitting.KL_AT_4_BITS)
