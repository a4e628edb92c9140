"""KL, agreement and perplexity against numpy; two folders compared layer by layer."""

import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import VOCAB, write_checkpoint

import qwen35_mlx
from qwen35_mlx.convert import convert, layerwise, plan
from qwen35_mlx.convert.fidelity import Comparison, compare, fidelity, plot, report_lines
from qwen35_mlx.convert.layerwise import Layerwise, open_checkpoint, run_layer, watched
from qwen35_mlx.convert.mac_models import Mac, bytes_per_token
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.quant.divergence import Divergence, kl_divergence

IDS = mx.array(np.random.default_rng(0).integers(VOCAB, size=(3, 21)))


def test_figures_are_those_of_numpy():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 40, 9)).astype(np.float32) * 3
    following = rng.integers(-1, 9, size=40)
    p, q = (np.exp(x.astype(np.float64)) for x in (a, b))
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    kl = (p * np.log(p / q)).sum(axis=1)
    np.testing.assert_allclose(kl_divergence(mx.array(a), mx.array(b)), kl, rtol=1e-4)
    result = Divergence()
    for part in (slice(0, 13), slice(13, 40)):
        result.add(mx.array(a[part]), mx.array(b[part]), mx.array(following[part]))
    assert result.num_tokens == 40
    assert result.mean_kl == pytest.approx(kl.mean(), rel=1e-5)
    assert result.p99_kl == pytest.approx(np.percentile(kl, 99), rel=1e-4)
    assert result.top1_agreement == (a.argmax(axis=1) == b.argmax(axis=1)).mean()
    known = following >= 0
    for found, x in zip(result.perplexities, (p, q), strict=True):
        chosen = x[np.flatnonzero(known), following[known]]
        assert found == pytest.approx(np.exp(-np.log(chosen).mean()), rel=1e-4)


def test_kl_has_a_direction():
    a, b = mx.array([[0.0, 0.0]]), mx.array([[5.0, 0.0]])
    assert kl_divergence(a, b).item() == pytest.approx(1.8134, abs=1e-3)
    assert kl_divergence(b, a).item() == pytest.approx(0.6529, abs=1e-3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("fidelity")
    write_checkpoint(root / "src", moe=True, num_shards=2, vision=True, mtp=True, tokenizer=True)
    convert(root / "src", root / "bf16", dtype="bfloat16")
    for bits in (3, 6):
        convert(root / "src", root / f"q{bits}", bits=bits)
    return root


@pytest.mark.parametrize("name", ["src", "bf16", "q3"])
def test_layer_by_layer_gives_the_logits_of_the_whole(folders, name):
    run = Layerwise(open_checkpoint(folders / name))
    hidden = run.embed(IDS)
    for index in range(run.config.num_hidden_layers):
        hidden = run_layer(run.layer(index), hidden)
    logits = mx.stack([part for _, _, part in run.logits(hidden)])
    model, _ = qwen35_mlx.load(folders / ("bf16" if name == "src" else name))
    assert mx.abs(logits - model(IDS)).max().item() < 1e-4
    assert logits.std().item() > 0.3


@pytest.mark.slow
def test_figures_do_not_depend_on_how_many_tokens_go_through_at_once(folders, monkeypatch):
    whole = fidelity(folders / "src", folders / "q3", IDS)
    monkeypatch.setattr(layerwise, "HEAD_TOKENS", 8)
    monkeypatch.setattr(layerwise, "LAYER_TOKENS", 43)
    run = Layerwise(open_checkpoint(folders / "q3"))
    hidden = run.embed(IDS)
    parts = [(text, start, len(logits)) for text, start, logits in run.logits(hidden)]
    assert parts == [
        (text, start, n) for text in range(3) for start, n in ((0, 8), (8, 8), (16, 5))
    ]
    split = fidelity(folders / "src", folders / "q3", IDS)
    assert split.tokens.num_tokens == 63
    figures = split.as_dict()
    for key, value in whole.as_dict().items():
        assert figures[key] == pytest.approx(value, rel=1e-3), key
    # One prediction of each text has nothing to be compared with.
    assert sum(map(len, split.tokens.quantized_losses)) == 60


def test_tied_embeddings_serve_as_the_head(tmp_path):
    write_checkpoint(tmp_path / "src", tied=True, tokenizer=True)
    out = convert(tmp_path / "src", tmp_path / "q4", bits=4)
    report = fidelity(tmp_path / "src", out, IDS)
    assert 0 < report.tokens.mean_kl < 1
    model, _ = qwen35_mlx.load(out)
    run = Layerwise(open_checkpoint(out))
    hidden = run.embed(IDS)
    for index in range(4):
        hidden = run_layer(run.layer(index), hidden)
    assert mx.abs(next(run.logits(hidden))[2] - model(IDS)[0]).max().item() < 1e-4


def test_one_layer_is_read_at_a_time(folders, monkeypatch):
    checkpoint = open_checkpoint(folders / "src")
    read, asked = type(checkpoint).read, []

    def recorded(self, prefix):
        found = read(self, prefix)
        asked.append((prefix, set(found)))
        return found

    monkeypatch.setattr(type(checkpoint), "read", recorded)
    run = Layerwise(checkpoint)
    run.layer(2)
    assert not any(".layers." in name for _, names in asked[:-1] for name in names)
    _, names = asked[-1]
    assert names and all(name.startswith("language_model.model.layers.2.") for name in names)


@pytest.mark.slow
def test_more_bits_are_nearer_in_every_figure(folders):
    coarse, fine = (fidelity(folders / "src", folders / f"q{bits}", IDS) for bits in (3, 6))
    same = fidelity(folders / "src", folders / "bf16", IDS)
    assert 10 * fine.tokens.mean_kl < coarse.tokens.mean_kl
    assert fine.tokens.p99_kl < coarse.tokens.p99_kl
    assert fine.tokens.top1_agreement >= coarse.tokens.top1_agreement
    assert same.tokens.mean_kl < 1e-6
    for near, far in zip(fine.layers, coarse.layers, strict=True):
        assert 0 < 4 * near.alone < far.alone
    # Error of earlier layers is not counted as a layer's own.
    assert coarse.layers[-1].accumulated > coarse.layers[-1].alone
    assert coarse.layers[0].alone < 1
    figures = coarse.as_dict()
    assert figures["reference_bits_per_weight"] == pytest.approx(16, abs=0.01)
    assert 3.5 < figures["quantized_bits_per_weight"] < 4
    assert json.loads(json.dumps(figures)) == figures
    text = "\n".join(report_lines(coarse))
    assert f"{figures['mean_kl_nats']:.5f}" in text


def test_bits_per_weight_are_those_of_the_plan(folders):
    from qwen35_mlx.convert import plan

    checkpoint = open_checkpoint(folders / "q3")
    assert checkpoint.bits_per_weight == pytest.approx(
        plan(folders / "src", bits=3).bits_per_weight
    )


def test_folders_of_two_models_are_refused(folders, tmp_path):
    write_checkpoint(tmp_path / "dense")
    with pytest.raises(Qwen35Error, match="different models") as error:
        fidelity(folders / "src", tmp_path / "dense", IDS)
    assert "num_experts 3 and 0" in str(error.value)
    with pytest.raises(Qwen35Error, match="no checkpoint at"):
        fidelity(folders / "src", tmp_path / "nothing", IDS)


@pytest.mark.slow
def test_a_plot_is_a_png_or_says_what_is_missing(folders, tmp_path, monkeypatch):
    report = fidelity(folders / "src", folders / "q3", IDS[:1])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(Qwen35Error, match="needs matplotlib"):
            plot(report, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
    pytest.importorskip("matplotlib")
    plot(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")
    with pytest.raises(Qwen35Error, match="cannot write"):
        plot(report, tmp_path / "no" / "a.png")


@pytest.mark.slow
def test_several_outputs_are_compared_as_each_alone(folders):
    names = ["q6", "bf16", "q3"]
    reports = compare(folders / "src", [folders / name for name in names], IDS)
    for name, found in zip(names, reports, strict=True):
        assert found.as_dict() == fidelity(folders / "src", folders / name, IDS).as_dict()
    mac = Mac("M3 Ultra", 96, 819)
    comparison = Comparison(names, reports, mac)
    rows = {row["name"]: row for row in comparison.rows()}
    assert list(rows) == ["q3", "q6", "bf16"]
    for bits in (3, 6):
        planned = plan(folders / "src", bits=bits)
        limit = 819e9 / bytes_per_token(planned, 32_768)
        assert rows[f"q{bits}"]["bandwidth_limit_tps"] == pytest.approx(limit, rel=1e-6)
    page = "\n".join(comparison.lines())
    assert f"{rows['q3']['mean_kl_nats']:.5f}" in page
    assert "M3 Ultra 96 GB can run at most" in page
    assert 60 < comparison.room_gb < 0.8 * 96 * 1.0737


@pytest.mark.slow
def test_the_plot_of_several_outputs_shows_them_and_the_mac(folders, tmp_path):
    pytest.importorskip("matplotlib")
    reports = compare(folders / "src", [folders / "q3", folders / "q6"], IDS)
    for gbps in (819, 0):
        Comparison(["q3", "q6"], reports, Mac("M3 Ultra", 96, gbps)).plot(tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_module_that_was_passed_by_is_noticed(folders):
    run = Layerwise(open_checkpoint(folders / "src"))
    layer = run.layer(0)
    missed = pytest.raises(RuntimeError, match=r"not called: .*linear_attn.out_proj")
    with missed, watched(layer, lambda *call: None):
        layer.mlp(mx.zeros((1, 2, 128)), layer.post_attention_layernorm)


@pytest.mark.slow
def test_the_error_of_a_layer_is_the_distance_over_what_the_layer_adds(folders):
    report = fidelity(folders / "src", folders / "q3", IDS)
    runs = [Layerwise(open_checkpoint(folders / name)) for name in ("src", "q3")]
    before, own = (run.embed(IDS) for run in runs)
    for index, found in enumerate(report.layers):
        layer, quantized = (run.layer(index) for run in runs)
        after = run_layer(layer, before)
        alone, own = run_layer(quantized, before), run_layer(quantized, own)
        joined = [np.array(mx.concatenate(x, axis=0)) for x in (before, after, alone, own)]
        added = np.linalg.norm(joined[1] - joined[0])
        assert found.alone == pytest.approx(np.linalg.norm(joined[2] - joined[1]) / added, rel=1e-3)
        accumulated = np.linalg.norm(joined[3] - joined[1]) / added
        assert found.accumulated == pytest.approx(accumulated, rel=1e-3)
        assert (found.index, found.kind) == (index, runs[0].config.layer_types[index])
        before = after


def test_steps_are_told_with_their_number(folders):
    seen = []
    fidelity(folders / "src", folders / "q3", IDS[:1, :2], progress=lambda *step: seen.append(step))
    assert seen == [(i, 4, f"layer {i}") for i in range(4)]


def test_a_head_that_is_no_copy_of_the_embedding_is_not_compared(tmp_path):
    write_checkpoint(tmp_path / "src", tied=True)
    out = convert(tmp_path / "src", tmp_path / "out", dtype="bfloat16")
    tensors = mx.load(str(out / "model.safetensors"))
    (embedding,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    head = embedding.replace("model.embed_tokens", "lm_head")
    (out / "model.safetensors.index.json").unlink()
    for factor in (1, 2):
        changed = tensors | {head: factor * tensors[embedding]}
        mx.save_safetensors(str(tmp_path / "changed.safetensors"), changed, {"format": "mlx"})
        (tmp_path / "changed.safetensors").replace(out / "model.safetensors")
        if factor == 1:
            open_checkpoint(out)
    with pytest.raises(Qwen35Error, match="lm_head"):
        open_checkpoint(out)


def test_a_checkpoint_that_lacks_a_tensor_names_it(folders, monkeypatch):
    checkpoint = open_checkpoint(folders / "src")
    read = type(checkpoint).read
    left_out = "language_model.model.layers.1.self_attn.o_proj.weight"
    monkeypatch.setattr(
        type(checkpoint),
        "read",
        lambda self, prefix: {k: v for k, v in read(self, prefix).items() if k != left_out},
    )
    run = Layerwise(checkpoint)
    run.layer(0)
    with pytest.raises(Qwen35Error, match=f"lacks tensors\n  got: {left_out}$"):
        run.layer(1)
