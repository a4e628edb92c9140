"""Adapters: exchanged with mlx-lm, refused where they do not fit, fused, never mixed in a cache."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from checkpoints import VOCAB, text_config, write_checkpoint
from everyday import everyday
from mlx.utils import tree_flatten

import qwen35_mlx
from qwen35_mlx.chat.sessions import load_conversation, save_conversation
from qwen35_mlx.checkpoint.adapter import (
    CONFIG_FILE,
    DORA,
    LORA,
    WEIGHTS_FILE,
    Adapter,
    Change,
    read_adapter,
    write_adapter,
)
from qwen35_mlx.convert import convert
from qwen35_mlx.convert.fidelity import fidelity, open_with
from qwen35_mlx.engine.prompt_cache import PromptCache
from qwen35_mlx.engine.segments import Segments
from qwen35_mlx.errors import CheckpointError, ConfigError, Qwen35Error
from qwen35_mlx.kernels.tiers import use, with_kernels
from qwen35_mlx.model.adapters import DEFAULT_KEYS, EXPERT_KEYS, add_new, changes_of
from qwen35_mlx.model.identity import model_identity
from qwen35_mlx.model.loading import open_model

IDS = mx.array(np.random.default_rng(0).integers(VOCAB, size=(2, 37)))
MAX_DIFFERENCE = 1e-4
O_PROJ = "language_model.model.layers.1.self_attn.o_proj"


def write_source(folder: Path, moe: bool = True, dtype: str = "BF16") -> Path:
    text = text_config(moe, tied=False) | {"full_attention_interval": 2}
    write_checkpoint(
        folder, moe=moe, vision=True, mtp=True, tokenizer=True, dtype=dtype,
        config={"text_config": text},
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources and their conversions in 4 bits, by `moe` and `dense`."""
    home = tmp_path_factory.mktemp("adapters")
    for name, moe in (("moe", True), ("dense", False)):
        write_source(home / name, moe)
        convert(home / name, home / f"{name}-4bit", bits=4)
    return home


def random_adapter(
    folder: Path, kind: str = LORA, seed: int = 0, keys: Any = None, size: float = 0.03
) -> Adapter:
    """One that changes the model in `folder` a lot."""
    mx.random.seed(seed)
    model, _, _ = open_model(folder)
    keys = keys or DEFAULT_KEYS + (EXPERT_KEYS if kind == LORA else ())
    settings = dict(rank=3, scale=2.0, dropout=0.0)
    add_new(model, keys, kind=kind, num_layers=len(model.layers), **settings)
    changes = {}
    for name, change in changes_of(model).items():
        b, m = size * mx.random.normal(change.lora_b.shape), change.magnitudes
        if m is not None:
            m = m * mx.random.uniform(0.9, 1.1, m.shape)
        changes[name] = Change(change.lora_a, b, change.scale, m)
    config = {
        "fine_tune_type": kind,
        "num_layers": len(model.layers),
        "lora_parameters": {**settings, "keys": list(keys)},
    }
    return Adapter(changes, config)


def difference(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kind", everyday([("moe", LORA), ("dense", DORA), ("dense", LORA), ("moe", DORA)], 1)
)
def test_mlx_lm_computes_the_same_with_an_adapter_of_ours(sources, tmp_path, name, kind):
    folder = sources / f"{name}-4bit"
    write_adapter(tmp_path, random_adapter(folder, kind))
    ours, _ = qwen35_mlx.load(folder, adapter=tmp_path)
    theirs, _ = mlx_lm.load(str(folder), adapter_path=str(tmp_path))
    theirs.set_dtype(mx.float32)
    found = ours(IDS)
    assert difference(found, theirs(IDS)) <= MAX_DIFFERENCE
    plain, _ = qwen35_mlx.load(folder)
    assert difference(found, plain(IDS)) > 0.05


@pytest.mark.parametrize("name, kind", everyday([("moe", LORA), ("dense", DORA)], 0))
def test_an_adapter_of_mlx_lm_is_loaded_and_written_back(sources, tmp_path, name, kind):
    """With keys left out, it changes every matrix of the last layers: gates too."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    folder = sources / f"{name}-4bit"
    theirs, _ = mlx_lm.load(str(folder))
    theirs.set_dtype(mx.float32)
    theirs.freeze()
    parameters = dict(rank=2, scale=3.0, dropout=0.0)
    mx.random.seed(1)
    linear_to_lora_layers(theirs, 2, parameters, use_dora=kind == DORA)
    arrays = {
        path: 0.03 * mx.random.normal(array.shape) if path.endswith("lora_b") else array
        for path, array in tree_flatten(theirs.trainable_parameters())
    }
    theirs.load_weights([*arrays.items()], strict=False)
    mx.save_safetensors(str(tmp_path / WEIGHTS_FILE), arrays)
    config = dict(fine_tune_type=kind, num_layers=2, lora_parameters=parameters)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    ours, _ = qwen35_mlx.load(folder, adapter=tmp_path)
    expected = theirs(IDS)
    assert difference(ours(IDS), expected) <= MAX_DIFFERENCE
    write_adapter(tmp_path / "back", read_adapter(tmp_path))
    again, _ = mlx_lm.load(str(folder), adapter_path=str(tmp_path / "back"))
    again.set_dtype(mx.float32)
    assert difference(again(IDS), expected) <= 1e-6


def test_an_adapter_decodes_as_it_reads(sources, tmp_path):
    write_adapter(tmp_path, random_adapter(sources / "moe-4bit"))
    model, _ = qwen35_mlx.load(sources / "moe-4bit", adapter=tmp_path)
    cache = model.make_cache()
    parts = [model(IDS[:1, :33], cache)]
    parts += [model(IDS[:1, i : i + 1], cache) for i in range(33, 37)]
    assert difference(mx.concatenate(parts, axis=1), model(IDS[:1])) <= 3e-4


def test_kernels_leave_changed_matrices_to_mlx(sources, tmp_path):
    """A kernel that reads the weights would leave out the change, or find none."""
    from qwen35_mlx.kernels.matrix import matrices

    write_adapter(tmp_path, random_adapter(sources / "moe-4bit", keys=["self_attn.o_proj"]))
    model, _ = qwen35_mlx.load(sources / "moe-4bit", adapter=tmp_path)
    use(model, with_kernels(base="ops"))
    attention = model.layers[1].self_attn
    assert matrices([attention.o_proj]) is None
    assert matrices([attention.q_proj, attention.k_proj]) is not None


def refused(sources: Path, tmp_path: Path, adapter: Adapter, error: type[Qwen35Error]) -> str:
    write_adapter(tmp_path, adapter)
    with pytest.raises(error) as raised:
        qwen35_mlx.load(sources / "dense-4bit", adapter=tmp_path)
    return str(raised.value)


def test_an_adapter_of_another_model_is_refused(sources, tmp_path):
    adapter = random_adapter(sources / "dense-4bit")
    change = adapter.changes[O_PROJ]
    wide = Change(mx.zeros((256, 3)), change.lora_b, 1.0)
    found = refused(sources, tmp_path, Adapter({O_PROJ: wide}, adapter.settings), CheckpointError)
    assert "layers.1.self_attn.o_proj: [128, 128], not [128, 256]" in found
    other = Adapter({O_PROJ.replace(".1.", ".9."): change}, adapter.settings)
    assert "layers.9.self_attn.o_proj: no such matrix" in refused(
        sources, tmp_path, other, CheckpointError
    )
    of_experts = random_adapter(sources / "moe-4bit")
    assert "switch_mlp" in refused(sources, tmp_path, of_experts, CheckpointError)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"fine_tune_type": "full"}, "lora or dora"),
        ({"fine_tune_type": LORA, "lora_parameters": {"alpha": 16}}, '"scale": 20.0'),
        ({"fine_tune_type": DORA, "lora_parameters": {"scale": 1.0}}, "lora_a, lora_b, m"),
    ],
)
def test_settings_that_would_compute_something_else_are_refused(
    sources, tmp_path, settings, expected
):
    adapter = random_adapter(sources / "dense-4bit", keys=["self_attn.o_proj"])
    error = CheckpointError if settings["fine_tune_type"] == DORA else ConfigError
    assert expected in refused(sources, tmp_path, Adapter(adapter.changes, settings), error)


@pytest.mark.parametrize("name", ["vision_tower.blocks.0.attn.qkv", "mtp.fc", "os.path"])
def test_an_adapter_touches_neither_tower_nor_mtp_layer(sources, tmp_path, name):
    adapter = random_adapter(sources / "dense-4bit", keys=["self_attn.o_proj"])
    change = adapter.changes[O_PROJ]
    found = refused(sources, tmp_path, Adapter({name: change}, adapter.settings), CheckpointError)
    assert "of the text model" in found


def test_a_missing_or_damaged_adapter_is_said_before_the_model_is_read(sources, tmp_path):
    with pytest.raises(CheckpointError, match="no adapter_config"):
        qwen35_mlx.load(sources / "dense-4bit", adapter=tmp_path)
    write_adapter(tmp_path, random_adapter(sources / "dense-4bit"))
    (tmp_path / WEIGHTS_FILE).write_bytes(b"\x10" * 40)
    with pytest.raises(CheckpointError, match="cannot be read"):
        qwen35_mlx.load(sources / "dense-4bit", adapter=tmp_path)


def test_two_adapters_never_share_a_cache_entry(sources, tmp_path):
    """The second differs in one number that no sample of the weights would show, or in scale."""
    adapter = random_adapter(sources / "dense-4bit", keys=["self_attn.o_proj"])
    change = adapter.changes[O_PROJ]
    b = change.lora_b
    other_b = Change(change.lora_a, b.at[2, 127].add(1.0), change.scale)
    other_scale = dict(adapter.settings, lora_parameters={"scale": 1.0})
    variants = {
        "one": adapter,
        "number": Adapter({**adapter.changes, O_PROJ: other_b}, adapter.settings),
        "scale": Adapter(adapter.changes, other_scale),
    }
    models = {"plain": qwen35_mlx.load(sources / "dense-4bit")[0]}
    for name, each in variants.items():
        write_adapter(tmp_path / name, each)
        models[name] = qwen35_mlx.load(sources / "dense-4bit", adapter=tmp_path / name)[0]
    assert len({model_identity(model) for model in models.values()}) == 4
    ids = IDS[0].tolist()
    cache = PromptCache(models["one"])
    cache.read(ids, marks=[len(ids)])
    conversation: dict[str, Any] = {"messages": []}
    save_conversation(tmp_path / "s.json", conversation, models["one"])
    list(Segments(tmp_path / "read", models["one"]).write(cache, len(ids)))
    same = qwen35_mlx.load(sources / "dense-4bit", adapter=tmp_path / "one")[0]
    assert Segments(tmp_path / "read", same).read(ids) is not None
    for name in ("plain", "number", "scale"):
        _, warning = load_conversation(tmp_path / "s.json", models[name])
        assert "another model" in str(warning)
        assert Segments(tmp_path / "read", models[name]).read(ids) is None


def test_a_model_takes_one_adapter_for_life(sources, tmp_path):
    from qwen35_mlx.model.adapters import attach_to_model

    write_adapter(tmp_path, random_adapter(sources / "dense-4bit"))
    model, _ = qwen35_mlx.load(sources / "dense-4bit", adapter=tmp_path)
    with pytest.raises(Qwen35Error, match="one adapter a model"):
        attach_to_model(model, read_adapter(tmp_path))


@pytest.mark.parametrize(
    "name, kind, dtype",
    everyday(
        [
            ("moe", LORA, "float32"),
            ("dense", DORA, "float32"),
            ("moe", LORA, "bfloat16"),
            ("dense", DORA, "bfloat16"),
        ],
        0,
    ),
)
def test_weights_with_a_fused_adapter_equal_weights_beside_it(sources, tmp_path, name, kind, dtype):
    """From a source with experts fused and norms to shift; in bfloat16 but for its rounding."""
    convert(sources / name, tmp_path / "plain", dtype=dtype)
    adapter = random_adapter(tmp_path / "plain", kind)
    fused = convert(sources / name, tmp_path / "fused", dtype=dtype, adapter=adapter)
    write_adapter(tmp_path / "adapter", adapter)
    beside, _ = qwen35_mlx.load(tmp_path / "plain", adapter=tmp_path / "adapter")
    within, _ = qwen35_mlx.load(fused)
    spread = float(beside(IDS).std())
    found = difference(beside(IDS), within(IDS)) / spread
    assert found <= (1e-4 if dtype == "float32" else 0.08)
    plain, _ = qwen35_mlx.load(tmp_path / "plain")
    assert difference(plain(IDS), within(IDS)) / spread > 0.2
    # All that an adapter does not change is the same to the bit.
    before, after = (mx.load(str(f / "model.safetensors")) for f in (tmp_path / "plain", fused))
    assert before.keys() == after.keys()
    changed = {name for name in before if not mx.array_equal(before[name], after[name]).item()}
    assert changed == {f"{module}.weight" for module in adapter.changes}
    assert sum(n.startswith("mtp.") for n in after) > 10
    assert sum(n.startswith("vision_tower.") for n in after) == 5


def test_a_change_is_added_to_the_rows_of_a_slice(tmp_path):
    """Of a stack, slices begin and end within an expert."""
    rng = np.random.default_rng(0)
    a, b, w = (rng.standard_normal(s).astype("f4") for s in ((3, 2, 5), (3, 4, 2), (12, 5)))
    whole = w + 0.5 * (b @ a).reshape(12, 5)
    change = Change(mx.array(a), mx.array(b), 0.5)
    for start, stop in ((0, 12), (3, 9), (4, 8), (5, 6), (11, 12)):
        found = change.of_rows(mx.array(w[start:stop]), start)
        np.testing.assert_allclose(found, whole[start:stop], rtol=1e-5, atol=1e-5)


def test_an_adapter_cannot_be_fused_into_weights_of_few_bits(sources, tmp_path):
    adapter = random_adapter(sources / "dense-4bit")
    with pytest.raises(Qwen35Error, match="rounding would remove most of the adapter"):
        convert(sources / "dense-4bit", tmp_path / "fused", adapter=adapter)
    assert not (tmp_path / "fused").exists()


def test_a_conversion_is_not_resumed_with_another_adapter(sources, tmp_path, monkeypatch):
    from qwen35_mlx.convert import job

    first, second = (random_adapter(sources / "dense-4bit", seed=seed) for seed in (0, 1))
    with monkeypatch.context() as patch:
        patch.setattr(job, "output_config", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(sources / "dense", tmp_path / "out", bits=4, adapter=first)
    with pytest.raises(Qwen35Error, match="adapter="):
        convert(sources / "dense", tmp_path / "out", bits=4, adapter=second)
    convert(sources / "dense", tmp_path / "out", bits=4, adapter=first)


@pytest.mark.slow
def test_fidelity_gives_the_adapter_to_the_side_that_lacks_it(sources, tmp_path):
    adapter = random_adapter(sources / "moe-4bit")
    fused = convert(sources / "moe", tmp_path / "fused", dtype="bfloat16", adapter=adapter)
    sides = [open_with(folder, adapter) for folder in (sources / "moe", fused)]
    assert [side.adapter is None for side in sides] == [False, True]
    found = fidelity(*sides, IDS).tokens.mean_kl
    assert found < fidelity(sources / "moe", fused, IDS).tokens.mean_kl / 20


@pytest.mark.slow
def test_commands_take_an_adapter(run_cli, converted_demo, tmp_path):
    write_adapter(tmp_path / "a", random_adapter(converted_demo, size=3.0))
    prompt = ("-p", "What is the capital of France?", "--temperature", "0", "--max-tokens", "30")
    plain = run_cli("generate", converted_demo, *prompt)
    changed = run_cli("generate", converted_demo, "--adapter-path", tmp_path / "a", *prompt)
    assert plain.exit_code == changed.exit_code == 0
    assert "Paris" in plain.stdout and changed.stdout != plain.stdout
    missing = run_cli("chat", converted_demo, "--adapter-path", tmp_path, *prompt[:2])
    assert missing.exit_code == 1 and "has no adapter" in missing.stderr


@pytest.mark.slow
def test_fuse_makes_a_model_that_needs_no_adapter(run_cli, converted_demo, tmp_path):
    from conftest import DEMO

    write_adapter(tmp_path / "a", random_adapter(converted_demo))
    path = ("--adapter-path", tmp_path / "a")
    made = run_cli("fuse", DEMO, tmp_path / "out", *path, "--bits", "8")
    assert made.exit_code == 0, made.stderr
    assert made.stdout
    again = run_cli("fuse", DEMO, tmp_path / "out", *path)
    assert again.exit_code == 1 and "exists already" in again.stderr
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. " * 20)
    report = run_cli("fidelity", DEMO, tmp_path / "out", *path, "--text", text)
    figures = json.loads(report.stdout.splitlines()[-1])
    assert figures["mean_kl_nats"] < 0.02
