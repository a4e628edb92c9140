"""Layers trained one after another: what comes out, what a stop costs, and what is refused."""

import functools
import json
from dataclasses import replace
from itertools import pairwise

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import VOCAB, write_checkpoint
from test_mlx_lm import assert_equal_logits

import qwen35_mlx
from qwen35_mlx.convert import convert
from qwen35_mlx.convert import distill as module
from qwen35_mlx.convert.activations import Activations
from qwen35_mlx.convert.calibrate import calibrate
from qwen35_mlx.convert.calibration_text import overlap
from qwen35_mlx.convert.distilled import (
    MIN_EXPERT_TOKENS,
    REPORT_FILE,
    Distillation,
    distillation_lines,
    histogram,
    left_of,
)
from qwen35_mlx.convert.fidelity import fidelity
from qwen35_mlx.convert.fit import fit
from qwen35_mlx.convert.layerwise import TRUNK
from qwen35_mlx.convert.modules import GLU
from qwen35_mlx.errors import MemoryRefused, Qwen35Error
from qwen35_mlx.model.language import Model
from qwen35_mlx.quant.latent import Schedule
from qwen35_mlx.quant.statistics import unit_of

IDS = mx.array(np.random.default_rng(0).integers(VOCAB, size=(8, 33)))
SCHEDULE = Schedule(epochs=2, rate=0.04)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Gives folder and calibration of a dense model, or of one with experts."""

    @functools.cache
    def source(moe):
        folder = tmp_path_factory.mktemp("distill") / ("moe" if moe else "dense")
        write_checkpoint(folder, moe=moe, vision=moe, mtp=True, tokenizer=True)
        return folder, calibrate(folder, IDS, hessians=True, measure=False)

    return source


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Several steps and trained experts, with few tokens."""
    monkeypatch.setattr(module, "BATCH_TOKENS", 33)
    monkeypatch.setattr(module, "MIN_EXPERT_TOKENS", 16)
    monkeypatch.setattr(module, "EXPERT_STEPS", 4)


def distilled(sources, moe, out, finish_tokens=0, bits=3, dtype=None, **distillation):
    source, calibration = sources(moe)
    return convert(
        source,
        out,
        bits=bits,
        group_size=32,
        dtype=dtype,
        method="distill",
        calibration=calibration,
        distillation=Distillation(IDS, finish_tokens, SCHEDULE, **distillation),
    )


def weights(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= mx.load(str(file))
    return found


def equal_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]).item() for name in a)


@pytest.fixture(scope="module")
def experts_distilled(sources, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH_TOKENS", 33)
        patch.setattr(module, "MIN_EXPERT_TOKENS", 16)
        patch.setattr(module, "EXPERT_STEPS", 4)
        return distilled(sources, True, tmp_path_factory.mktemp("out") / "moe", 264)


def test_every_part_learns_and_the_report_says_how_much(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "LAYER_TYPES", checkpoints.LAYER_TYPES[:2])
    write_checkpoint(tmp_path / "src", moe=True, tokenizer=True)
    ids, quantize_rows, has_hessian = IDS[:4, :11], module.quantize_rows, {}

    def kept(rows, entry, start, statistics):
        has_hessian[entry.module] = statistics.of(entry.module)[1] is not None
        return quantize_rows(rows, entry, start, statistics)

    students = []

    def model_of(config):
        students.append(config)
        return Model(config)

    monkeypatch.setattr(module, "quantize_rows", kept)
    monkeypatch.setattr(module, "Model", model_of)
    options = dict(bits=3, group_size=128)
    options["calibration"] = calibrate(tmp_path / "src", ids, hessians=True, measure=False)
    plain = convert(tmp_path / "src", tmp_path / "gptq", method="gptq", **options)
    steps = []
    options["distillation"] = Distillation(
        ids, 33, Schedule(epochs=2, rate=0.04), progress=lambda *step: steps.append(step)
    )
    out = convert(tmp_path / "src", tmp_path / "out", method="distill", **options)
    # All but the embedding have inputs.
    assert [name for name, is_there in has_hessian.items() if not is_there] == [
        f"{TRUNK}embed_tokens"
    ]
    rows = json.loads((out / REPORT_FILE).read_text())
    assert [row["name"] for row in rows] == "embedding head layer-000 layer-001 whole".split()
    for row in rows[1:]:
        assert all(0 < after <= before < 0.5 for before, after in row["losses"].values())
    for row in rows[2:4]:
        assert set(row["losses"]) == {"attention", "router", "experts", "shared expert"}
        assert sum(row["expert_tokens"]) == 2 * ids.size
        # Relative to what the experts give: 3 bits lose a tenth of it or more.
        before, after = row["losses"]["experts"]
        assert before > 0.1 and after < 0.7 * before
        experts = {path for path in row["left"] if "switch_mlp" in path}
        assert {row["left"][path] for path in experts} == {round(after / before, 4)}
        assert len(experts) == 3 and len(row["left"]) > 8
    # The last pass needs the text part alone.
    assert (students[-1].vision, students[-1].num_mtp_layers) == (None, 0)
    # Of all modules together nothing is said of each.
    assert rows[-1]["left"] == {}
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    assert steps[-1] == (2, 2, "done") and {total for _, total, _ in steps} == {2}
    kls = [fidelity(tmp_path / "src", f, ids).tokens.mean_kl for f in (plain, out)]
    assert kls[1] < 0.8 * kls[0]


@pytest.mark.slow
def test_the_output_has_the_layout_of_gptq_and_is_nearer_to_the_source(
    sources, experts_distilled, tmp_path
):
    source, calibration = sources(True)
    options = dict(bits=3, group_size=32, method="gptq", calibration=calibration)
    plain = convert(source, tmp_path / "gptq", **options)
    before, after = weights(plain), weights(experts_distilled)
    assert {n: (a.shape, a.dtype) for n, a in before.items()} == {
        n: (a.shape, a.dtype) for n, a in after.items()
    }
    changed = {name for name in before if not mx.array_equal(before[name], after[name]).item()}
    assert any("switch_mlp" in name for name in changed)
    # The MTP layer and the tower are none of the layers that are trained.
    assert all(name.startswith("language_model.") for name in changed)
    kls = [fidelity(source, folder, IDS).tokens.mean_kl for folder in (plain, experts_distilled)]
    assert kls[1] < 0.9 * kls[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_scales_have_the_type_that_is_asked_for(sources, tmp_path, dtype):
    found = weights(distilled(sources, False, tmp_path / "out", dtype=dtype))
    trained = [a for n, a in found.items() if n.endswith(".scales") and "layers" in n]
    assert trained and {a.dtype for a in trained} == {getattr(mx, dtype)}


@pytest.mark.slow
def test_the_output_loads_in_mlx_lm_with_equal_logits(experts_distilled):
    assert_equal_logits(experts_distilled)


@pytest.mark.slow
def test_the_report_has_each_layer_and_all_tokens_of_experts(experts_distilled):
    rows = json.loads((experts_distilled / REPORT_FILE).read_text())
    layers = [row for row in rows if row["name"].startswith("layer-")]
    config = json.loads((experts_distilled / "config.json").read_text())
    text = config["text_config"]
    assert len(layers) == text["num_hidden_layers"]
    for row in layers:
        assert sum(row["expert_tokens"]) == IDS.size * text["num_experts_per_tok"]
        assert 0 <= row["flips"] < 1
        assert all(after <= before for before, after in row["losses"].values())
    assert rows[-1]["name"] == "whole"
    lines = distillation_lines(experts_distilled)
    assert sum("router misses" in line for line in lines) == len(layers)


@pytest.mark.slow
def test_a_later_fit_gives_bytes_to_what_training_helped_least(sources, experts_distilled):
    source, calibration = sources(True)
    left = left_of(experts_distilled)
    experts = [name for name in left if "switch_mlp" in name]
    assert experts and all(0 < share <= 1 for share in left.values())
    options = dict(bits_per_weight=5.0, calibration=calibration)
    before = fit(source, method="distill", **options)
    told = replace(calibration, left=dict.fromkeys(experts, 0.01))
    options["calibration"] = told
    after = fit(source, method="distill", **options)

    def expert_bits(found):
        return sum(found.allocation.options[unit_of(name)].bits for name in experts)

    assert expert_bits(after) < expert_bits(before)
    assert after.plan.output_bytes <= before.plan.output_bytes * 1.01
    # Other methods do not train.
    assert expert_bits(fit(source, method="gptq", **options)) == expert_bits(before)


@pytest.mark.slow
def test_experts_with_few_tokens_keep_what_error_feedback_gave_them(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MIN_EXPERT_TOKENS", IDS.size + 1)
    found = []
    for steps in (4, 12):
        monkeypatch.setattr(module, "EXPERT_STEPS", steps)
        found.append(weights(distilled(sources, True, tmp_path / str(steps))))
    names = [name for name in found[0] if "switch_mlp" in name]
    assert names and all(mx.array_equal(found[0][n], found[1][n]).item() for n in names)


@pytest.mark.slow
def test_error_feedback_is_for_the_inputs_that_the_quantized_layers_give(
    sources, tmp_path, monkeypatch
):
    """Layer 1's, from a quantized layer 0: those of the converted model, not of the source."""
    quantize_rows, moments = module.quantize_rows, {}

    def kept(rows, entry, start, statistics):
        moments[entry.module] = statistics.of(entry.module)
        return quantize_rows(rows, entry, start, statistics)

    monkeypatch.setattr(module, "quantize_rows", kept)
    out = distilled(sources, False, tmp_path / "out", bits=2)
    # One that is on the way of no other part of its layer.
    name = f"{TRUNK}layers.1.self_attn.q_proj"
    second, hessian = moments[name]
    model, _ = qwen35_mlx.load(out)
    layers = model.language_model.model
    x = layers.layers[0](layers.embed_tokens(IDS), None, None, None)
    x = np.array(layers.layers[1].input_layernorm(x)).reshape(IDS.size, -1)
    np.testing.assert_allclose(second, (x**2).mean(axis=0), rtol=0.02, atol=1e-3)
    np.testing.assert_allclose(hessian, x.T @ x / len(x), rtol=0.02, atol=0.02)
    of_source, _ = sources(False)[1].of(name)
    assert np.abs(np.array(of_source) - np.array(second)).max() > 0.02


@pytest.mark.slow
def test_no_calibration_is_needed(sources, tmp_path):
    source, _ = sources(True)
    with_one = distilled(sources, True, tmp_path / "with")
    without = distilled(lambda moe: (source, None), True, tmp_path / "without")
    assert overlap(without, IDS) == 1
    names = [name for name in weights(without) if name.startswith("language_model.")]
    a, b = weights(with_one), weights(without)
    assert names and all(mx.array_equal(a[name], b[name]).item() for name in names)


@pytest.mark.slow
def test_a_layer_holds_one_copy_of_its_experts_and_runs_few_tokens_at_once(
    sources, tmp_path, monkeypatch
):
    train, run, parts, tokens = module._Distiller._train, module.expert_mlp, [], []

    def watched(self, part, teacher, student, *rest, **named):
        if part in ("attention", "router", "shared expert"):
            parts.append(part)
            pairs = ((root.mlp.switch_mlp[n].weight for root in (teacher, student)) for n in GLU)
            assert all(a is b for a, b in pairs)
        train(self, part, teacher, student, *rest, **named)

    def counted(x, *rest):
        tokens.append(len(x))
        return run(x, *rest)

    monkeypatch.setattr(module._Distiller, "_train", watched)
    monkeypatch.setattr(module, "expert_mlp", counted)
    distilled(sources, True, tmp_path / "out")
    assert set(parts) == {"attention", "router", "shared expert"}
    assert tokens and max(tokens) <= 33


@pytest.mark.slow
def test_halves_of_layers_are_trained_from_the_quantized_stream_and_from_the_sources(
    sources, tmp_path, monkeypatch
):
    made, half_loss = [], module.half_loss

    def noted(half, x, out, batches):
        made.append((x, out))
        return half_loss(half, x, out, batches)

    monkeypatch.setattr(module, "half_loss", noted)
    distilled(sources, False, tmp_path / "out")
    own, seen = made[::2], made[1::2]
    assert len(own) == 8
    for (x, out), (source_x, same) in zip(own, seen, strict=True):
        every = slice(None)
        assert out is same and not mx.array_equal(x[every], source_x[every]).item()
    # What the source's half gives is what its next half reads.
    for (_, out), (source_x, _) in pairwise(seen):
        assert source_x is out


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True])
def test_activations_on_disk_give_the_same_bits(sources, tmp_path, moe, monkeypatch):
    joined, folders = Activations.joined, []

    def noted(parts, folder):
        folders.append(folder)
        return joined(parts, folder)

    monkeypatch.setattr(Activations, "joined", noted)
    inside = distilled(sources, moe, tmp_path / "memory", 66)
    assert set(folders) == {None}
    folders.clear()
    outside = distilled(sources, moe, tmp_path / "disk", 66, activations_bytes=1)
    assert None not in folders
    assert equal_weights(inside, outside)
    assert (inside / REPORT_FILE).read_text() == (outside / REPORT_FILE).read_text()


class Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(("moe", "at"), [(False, 5), (True, 1), (True, 60)])
def test_a_stopped_distillation_goes_on_bit_for_bit(sources, tmp_path, monkeypatch, moe, at):
    if not moe:
        # A step for each part.
        monkeypatch.setattr(module, "BATCH_TOKENS", IDS.size)
    calls = []

    def stop(done, total, step):
        calls.append(step)
        if len(calls) == at:
            raise Stop

    whole = distilled(sources, moe, tmp_path / "whole", 66)
    with pytest.raises(Stop):
        distilled(sources, moe, tmp_path / "stopped", 66, progress=stop)
    assert not (tmp_path / "stopped").exists()
    assert equal_weights(distilled(sources, moe, tmp_path / "stopped", 66), whole)
    assert not list(tmp_path.glob(".*converting"))


@pytest.mark.slow
def test_other_settings_do_not_go_on_with_a_stopped_distillation(sources, tmp_path):
    def stop(done, total, step):
        raise Stop

    with pytest.raises(Stop):
        distilled(sources, False, tmp_path / "out", progress=stop)
    with pytest.raises(Qwen35Error, match="other settings"):
        distilled(sources, False, tmp_path / "out", finish_tokens=33)


@pytest.mark.slow
def test_the_command_needs_no_calibration(sources, tmp_path, run_cli, monkeypatch):
    monkeypatch.setattr("qwen35_mlx.convert.calibration_text.encode", lambda *given: IDS[:4])
    options = ("--bits", 3, "--group-size", 32, "--method", "distill")
    text = ("--calibration-text", tmp_path / "text.txt")
    result = run_cli("convert", sources(False)[0], tmp_path / "out", *options, *text)
    assert result.exit_code == 0, result.output
    assert "loss before and after training" in result.output
    assert not list(tmp_path.glob("*.calibration.safetensors"))


def test_a_distillation_goes_with_its_method(sources, tmp_path):
    source, calibration = sources(False)
    options = dict(bits=3, calibration=calibration)
    with pytest.raises(Qwen35Error, match="need each other"):
        convert(source, tmp_path / "out", method="distill", **options)
    with pytest.raises(Qwen35Error, match="need each other"):
        convert(source, tmp_path / "out", method="gptq", distillation=Distillation(IDS), **options)
    assert not list(tmp_path.iterdir())


def test_a_pass_over_the_whole_model_is_refused_where_it_does_not_fit(
    sources, tmp_path, monkeypatch
):
    monkeypatch.setattr("qwen35_mlx.convert.job.memory_bytes", lambda: 10**6)
    with pytest.raises(MemoryRefused, match="does not fit in memory") as refused:
        distilled(sources, False, tmp_path / "out", finish_tokens=33)
    assert "--finish-tokens" in str(refused.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("counts", "advice"), [([10] * 20, "13 times"), ([500] * 20, None)])
def test_a_longer_text_is_advised_where_experts_saw_few_tokens(tmp_path, counts, advice):
    row = dict(name="layer-000", losses={"router": (0.2, 0.1)}, expert_tokens=counts, flips=0.1)
    (tmp_path / REPORT_FILE).write_text(json.dumps([row]))
    text = "\n".join(distillation_lines(tmp_path))
    assert "router misses 10.0%" in text
    assert ("as long would" in text) == (advice is not None) and (advice or "") in text


def test_the_histogram_counts_every_expert_once():
    counts = [0, 3, 127, 128, 300, 300, 600]
    assert MIN_EXPERT_TOKENS == 128
    assert histogram(counts) == "3 below 128, 1 from 128, 2 from 256, 1 from 512"
