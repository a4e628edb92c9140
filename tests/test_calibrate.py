"""A source run through layer by layer: moments, measured KLs, and what convert makes of them."""

import json
from types import SimpleNamespace

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import VOCAB, write_checkpoint
from everyday import everyday
from test_mlx_lm import assert_equal_logits

import qwen35_mlx
from qwen35_mlx.convert import calibrate as module
from qwen35_mlx.convert import convert, plan
from qwen35_mlx.convert.calibrate import calibrate
from qwen35_mlx.convert.fidelity import fidelity
from qwen35_mlx.convert.layerwise import SourceCheckpoint, run_layer
from qwen35_mlx.convert.transform import quantize_rows
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.quant import gptq, quantize
from qwen35_mlx.quant.divergence import kl_divergence
from qwen35_mlx.quant.gptq import feedback_gain
from qwen35_mlx.quant.statistics import Calibration, search_gain

IDS = mx.array(np.random.default_rng(0).integers(VOCAB, size=(4, 49)))
FEW_IDS = IDS[:2, :17]
TRUNK = "language_model.model."


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration") / "src"
    write_checkpoint(folder, moe=True, num_shards=2, vision=True, mtp=True, tokenizer=True)
    return folder


@pytest.fixture(scope="module")
def calibration(source):
    return calibrate(source, IDS, hessians=True, measure=False)


@pytest.mark.slow
def test_the_errors_of_error_feedback_need_no_hessians_afterwards(source, calibration):
    found = calibrate(source, IDS, hessians=True, keep_hessians=False, measure=False)
    assert not found.hessians and calibration.hessians
    assert found.errors == calibration.errors
    assert found.moments.keys() == calibration.moments.keys()


def recorded_inputs(model, module_of):
    """What one module of the whole model is called with, by other means than the code's."""
    parent, name = module_of(model)
    original, calls = parent[name], []

    class Recorder(type(original)):
        def __call__(self, x, *args, **kwargs):
            calls.append((x, args))
            return super().__call__(x, *args, **kwargs)

    original.__class__ = Recorder
    model(IDS)
    return calls


def test_moments_are_those_of_the_whole_model(source, calibration, tmp_path):
    model, _ = qwen35_mlx.load(convert(source, tmp_path / "bf16", dtype="bfloat16"))
    ((x, _),) = recorded_inputs(model, lambda m: (m.layers[1].self_attn, "o_proj"))
    x = np.array(x).reshape(-1, x.shape[-1])
    moments, hessian = calibration.of(f"{TRUNK}layers.1.self_attn.o_proj")
    np.testing.assert_allclose(moments, (x**2).mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(hessian, x.T @ x / len(x), rtol=1e-2, atol=1e-5)
    ((rows, (experts, *_)),) = recorded_inputs(
        model, lambda m: (m.layers[3].mlp.switch_mlp, "down_proj")
    )
    rows, experts = np.array(rows)[:, 0], np.array(experts)
    typical = (rows**2).mean(axis=0)
    for e in range(3):
        own = rows[experts == e]
        expected = ((own**2).sum(axis=0) + 16 * typical) / (len(own) + 16)
        found, _ = calibration.of(f"{TRUNK}layers.3.mlp.switch_mlp.down_proj", e)
        np.testing.assert_allclose(found, expected, rtol=1e-3)
    head, _ = calibration.of("language_model.lm_head")
    assert head.shape == (128,)


@pytest.mark.parametrize("num_layers", everyday([2, 4], 0))
def test_a_measured_kl_is_that_of_the_model_with_one_unit_quantized(
    tmp_path, monkeypatch, num_layers
):
    """Every option of every unit is a run of the model: few tokens."""
    monkeypatch.setattr(checkpoints, "LAYER_TYPES", checkpoints.LAYER_TYPES[:num_layers])
    source, layer = tmp_path / "src", num_layers // 2
    write_checkpoint(source, moe=True, num_shards=2, vision=True, mtp=True, tokenizer=True)
    steps = []
    measured = calibrate(
        source, FEW_IDS, hessians=True, measure=True, progress=lambda *step: steps.append(step)
    )
    # Layers, then units, each of them at each number of bits.
    units = [(done, total) for done, total, step in steps if " at " in step]
    assert {total for _, total in units} == {len(measured.kls)}
    assert [*dict.fromkeys(done for done, _ in units)] == [*range(len(measured.kls))]
    assert {step for _, _, step in steps} >= {f"{unit} at 3 bits" for unit in measured.kls}
    folder = convert(source, tmp_path / "bf16", dtype="bfloat16")
    model, _ = qwen35_mlx.load(folder)
    before = model(FEW_IDS)
    for unit, members in (
        (f"{TRUNK}layers.{layer}.mlp.shared_expert.gate_proj", ("gate_proj", "up_proj")),
        (f"{TRUNK}layers.{layer}.mlp.shared_expert.down_proj", ("down_proj",)),
    ):
        changed, _ = qwen35_mlx.load(folder)
        for name in members:
            linear = changed.layers[layer].mlp.shared_expert[name]
            linear.weight = module.rounded(linear.weight, (3, 64))
        kl = kl_divergence(before, changed(FEW_IDS)).mean().item()
        # As far as search and error feedback go below mx.quantize.
        gain = search_gain(3, 64) * feedback_gain(measured.of(unit)[1])
        assert measured.kls[unit][3, 64] == pytest.approx(kl * gain, rel=1e-3)
        assert 0 < measured.kls[unit][5, 64] < measured.kls[unit][3, 64] / 4
    text = plan(source).text_entries
    quantizable = {e.module for e in text if e.bits and e.role.name == "QUANTIZED"}
    assert set(measured.errors) == quantizable
    assert set(measured.kls) == {m for m in quantizable if not m.endswith("up_proj")}


def test_minmax_ignores_the_calibration(calibration):
    name = f"{TRUNK}layers.0.mlp.switch_mlp.down_proj"
    w = mx.random.normal((3, 128, 128), key=mx.random.key(0))
    tensor = SimpleNamespace(module=name, shape=w.shape, bits=3, group_size=64, method="minmax")
    found = quantize_rows(w.reshape(-1, 128), tensor, 0, calibration)
    for a, b in zip(found, quantize(w.reshape(-1, 128), 3, 64), strict=True):
        assert mx.array_equal(a, b)


def test_experts_that_share_a_hessian_share_its_factor(monkeypatch):
    factors, invert = [], gptq.inverse_factor
    monkeypatch.setattr(
        gptq, "inverse_factor", lambda *given: factors.append(given) or invert(*given)
    )
    rng, name = np.random.default_rng(3), f"{TRUNK}layers.0.mlp.switch_mlp.down_proj"
    w, x = (mx.array(rng.standard_normal((3, 64, 64)).astype(np.float32)) for _ in range(2))
    found = Calibration("", "", "", 0)
    found.moments[f"{TRUNK}layers.0.mlp.switch_mlp.hidden"] = mx.square(x).mean(axis=1)
    found.hessians[f"{TRUNK}layers.0.mlp.switch_mlp.hidden"] = x[0].T @ x[0]
    tensor = SimpleNamespace(module=name, shape=w.shape, bits=3, group_size=64, method="gptq")
    rows = quantize_rows(w.reshape(-1, 64), tensor, 0, found)
    assert len(factors) == 1
    alone = quantize(w[1], 3, 64, "gptq", hessian=x[0].T @ x[0])
    assert all(mx.array_equal(a[64:128], b).item() for a, b in zip(rows, alone, strict=True))


@pytest.mark.slow
def test_each_expert_is_quantized_by_its_own_inputs(calibration):
    rng = np.random.default_rng(3)
    name = f"{TRUNK}layers.0.mlp.switch_mlp.down_proj"
    w = mx.array(rng.standard_normal((3, 128, 128)).astype(np.float32))
    for method in ("search", "gptq"):
        tensor = SimpleNamespace(module=name, shape=w.shape, bits=3, group_size=64, method=method)
        whole = quantize_rows(w.reshape(-1, 128), tensor, 0, calibration)
        for e in range(3):
            moments, hessian = calibration.of(name, e)
            own = dict(hessian=hessian) if method == "gptq" else dict(importance=moments)
            alone = quantize(w[e], 3, 64, method, **own)
            for a, b in zip(whole, alone, strict=True):
                assert mx.array_equal(a[128 * e : 128 * (e + 1)], b)
        # A piece that begins and ends inside of experts.
        part = quantize_rows(w.reshape(-1, 128)[50:300], tensor, 50, calibration)
        same = [mx.array_equal(a, b[50:300]).item() for a, b in zip(part, whole, strict=True)]
        assert all(same)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["search", "gptq"])
def test_calibrated_weights_lie_nearer_and_load_in_mlx_lm(source, calibration, tmp_path, method):
    plain = convert(source, tmp_path / "plain", bits=3)
    ours = convert(source, tmp_path / "ours", bits=3, method=method, calibration=calibration)
    assert_equal_logits(ours)
    other = mx.array(np.random.default_rng(9).integers(VOCAB, size=(4, 33)))
    before, after = (fidelity(source, folder, other) for folder in (plain, ours))
    # A random model: its inputs hardly differ in size, and no token was learnt.
    assert after.tokens.mean_kl < before.tokens.mean_kl
    assert sum(a.alone for a in after.layers) < 0.9 * sum(b.alone for b in before.layers)
    settings = json.loads((ours / "config.json").read_text())["qwen35_mlx"]["settings"]
    assert settings["method"] == method


def test_statistics_of_another_model_and_missing_ones_are_refused(source, calibration, tmp_path):
    write_checkpoint(tmp_path / "dense")
    with pytest.raises(Qwen35Error, match="of another model"):
        convert(tmp_path / "dense", tmp_path / "out", calibration=calibration)
    with pytest.raises(Qwen35Error, match="needs a calibration with Hessians"):
        convert(source, tmp_path / "out", method="gptq")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_idle_model_still_calibrates(tmp_path):
    """Zeros in, zeros out: no expert input, no Hessian, nothing to weigh by."""

    def silence(tensors):
        for name, (dtype, values) in list(tensors.items()):
            if "embed_tokens" in name or "shared_expert.up_proj" in name:
                tensors[name] = dtype, np.zeros_like(values)

    write_checkpoint(tmp_path / "src", moe=True, tokenizer=True, change=silence)
    found = calibrate(tmp_path / "src", IDS[:1, :2], hessians=True, measure=False)
    assert found.kls == {}
    out = convert(
        tmp_path / "src",
        tmp_path / "out",
        recipe=lambda name: (2, 64) if ".layers.1." in name else None,
        method="gptq",
        calibration=found,
    )
    for array in mx.load(str(out / "model.safetensors")).values():
        if array.dtype == mx.bfloat16:
            assert mx.all(mx.isfinite(array)).item()


@pytest.mark.slow
def test_a_single_short_row_is_enough(source):
    found = calibrate(source, IDS[:1, :3], measure=True)
    assert found.num_tokens == 3
    assert all(kl >= 0 for row in found.kls.values() for kl in row.values())


@pytest.mark.slow
def test_inputs_are_kept_of_as_many_texts_as_are_measured(source, monkeypatch):
    monkeypatch.setattr(module, "MEASURED_TOKENS", 2 * IDS.shape[1] + 1)
    seen = []
    checkpoint = SourceCheckpoint(source)
    calibrator = module._Calibrator(
        checkpoint, IDS[:3], False, True, lambda *step: seen.append(step)
    )
    calibrator.collect_all(keep=True)
    assert seen == [(i, 4, f"layer {i}") for i in range(4)]
    assert len(calibrator.layers) == 4
    hidden = calibrator.model.embed(IDS[:2])
    assert len(calibrator.inputs) == 5
    for index, kept in enumerate(calibrator.inputs):
        assert len(kept) == 2
        for ours, expected in zip(kept, hidden, strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-4)
        if index < 4:
            hidden = run_layer(calibrator.layers[index], hidden)
    again = module._Calibrator(checkpoint, IDS[:1], False, True, lambda *step: None)
    again.collect_all(keep=False)
    assert again.layers == [] and len(again.inputs) == 1


@pytest.mark.parametrize("above", [0, 1])
def test_small_models_are_measured_unless_told_otherwise(source, monkeypatch, above):
    limit = SourceCheckpoint(source).num_parameters - above
    monkeypatch.setattr(module, "MEASURED_PARAMETERS", limit)
    steps = []
    monkeypatch.setattr(module._Calibrator, "collect_all", lambda self, keep: steps.append(keep))
    monkeypatch.setattr(module._Calibrator, "measure_all", lambda self: steps.append("measured"))
    calibrate(source, FEW_IDS)
    assert steps == ([False] if above else [True, "measured"])
