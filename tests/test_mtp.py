"""The MTP layer: its drafts, the forms in which it is stored, and its conversion."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import HIDDEN, Tensors, as_mlx, write_checkpoint
from everyday import everyday
from mlx.utils import tree_flatten

import qwen35_mlx
from qwen35_mlx import memory
from qwen35_mlx.checkpoint.headers import INDEX_FILE
from qwen35_mlx.convert import convert, plan, report
from qwen35_mlx.convert.mac_models import Mac, running
from qwen35_mlx.engine.mtp_state import MTPState
from qwen35_mlx.errors import MemoryRefused
from qwen35_mlx.machine import GIB
from qwen35_mlx.memory import count, kv_capacity
from qwen35_mlx.model.cache import KVCache
from qwen35_mlx.model.language import Model
from qwen35_mlx.model.loading import load_model, loads_mtp, open_model
from qwen35_mlx.model.mtp import MTP
from qwen35_mlx.prompt import encode_messages

KINDS = pytest.mark.parametrize("moe", everyday([False, True], 1), ids=["dense", "moe"])
QUESTIONS = ("What is the capital of France?", "Who are you?")
MAX_DIFFERENCE = 1e-5


def states(seed: int, num_tokens: int = 12) -> tuple[mx.array, mx.array]:
    """States of the trunk and embeddings of the next tokens, `[1, T, H]` each."""
    keys = mx.random.split(mx.random.key(seed))
    return tuple(mx.random.normal((1, num_tokens, HIDDEN), key=key) for key in keys)  # type: ignore[return-value]


def drafts(folder: Path, **settings: Any) -> np.ndarray:
    """Logits of the layer in a folder, on seeded inputs."""
    model, _ = load_model(folder, **settings)
    assert model.mtp is not None
    return np.array(model.head(model.mtp(*states(0))))


def difference(first: Any, second: Any) -> float:
    return float(np.abs(np.array(first) - np.array(second)).max())


class Checkpoints:
    """Small checkpoints with an MTP layer, its experts one by one; converted once each."""

    def __init__(self, root: Path):
        self.root = root
        self.tensors = {
            moe: write_checkpoint(self.source(moe), moe=moe, mtp=True, tokenizer=True)
            for moe in (False, True)
        }

    def source(self, moe: bool) -> Path:
        return self.root / str(moe)

    def converted(self, moe: bool, dtype: str | None = None) -> Path:
        """At 4 bits, or unquantized in `dtype`; only read."""
        out = self.root / f"{moe}-{dtype}"
        return out if out.exists() else convert(self.source(moe), out, dtype=dtype)

    def copy(self, to: Path, moe: bool, dtype: str | None = None) -> Path:
        """A copy to be changed."""
        return Path(shutil.copytree(self.converted(moe, dtype), to))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("mtp"))


@pytest.mark.slow
def test_drafts_of_the_demo_are_what_it_says(demo: tuple[Model, Any]) -> None:
    """Norms shifted once, halves of fc in order, states after the final norm: else it is near 0."""
    model, tokenizer = demo
    taken = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = encode_messages(tokenizer, messages, add_generation_prompt=True)
        settings: Any = dict(temperature=0, max_tokens=24)
        said = [r.token for r in qwen35_mlx.stream_generate(model, tokenizer, prompt, **settings)]
        ids = prompt + said
        hidden, embeddings = model.trunk(mx.array([ids])), model.embed(ids)
        assert model.mtp is not None
        guesses = model.head(model.mtp(hidden[:, :-1], embeddings[:, 1:])).argmax(-1)[0].tolist()
        # Guess t is token t + 2.
        taken += [g == t for g, t in zip(guesses[:-1], ids[2:], strict=True)][-len(said) :]
    assert len(taken) > 15
    assert sum(taken) >= 0.9 * len(taken)


@pytest.mark.parametrize("piece", [1, 5, 12])
def test_read_tokens_and_pieces_leave_the_cache_of_one_call(
    demo: tuple[Model, Any], piece: int
) -> None:
    layer = demo[0].mtp
    assert layer is not None
    shape = 1, 24, demo[0].config.hidden_size
    hidden, embeddings = (mx.random.normal(shape, key=mx.random.key(i)) for i in range(2))
    whole, cut = KVCache(), KVCache()
    expected = layer(hidden, embeddings, whole)
    layer.read(hidden[:, :12], embeddings[:, :12], cut)
    for start in range(12, 24, piece):
        rows = slice(start, start + piece)
        out = layer(hidden[:, rows], embeddings[:, rows], cut)
        assert difference(out, expected[:, rows]) <= MAX_DIFFERENCE
    assert whole.offset == cut.offset == 24
    for one, other in zip(whole.state, cut.state, strict=True):
        assert difference(one, other) <= MAX_DIFFERENCE


def test_the_last_of_several_tokens_alone_and_positions_that_are_given(
    demo: tuple[Model, Any],
) -> None:
    layer = demo[0].mtp
    assert layer is not None
    shape = 1, 7, demo[0].config.hidden_size
    hidden, embeddings = (mx.random.normal(shape, key=mx.random.key(i)) for i in range(2))
    expected, cache = layer(hidden, embeddings), KVCache()
    last = layer(hidden, embeddings, cache, last_only=True)
    assert last.shape == (1, 1, shape[2])
    assert difference(last, expected[:, -1:]) <= MAX_DIFFERENCE
    # Three positions on, told in either way; then a gap, which is no shift.
    positions = mx.arange(7)[None] + 3
    for settings in (dict(positions=positions), dict(rope_delta=3)):
        assert difference(layer(hidden, embeddings, **settings), expected) <= MAX_DIFFERENCE
    gap = mx.where(mx.arange(7) < 3, 0, 40) + positions
    apart = layer(hidden, embeddings, positions=gap)
    assert difference(apart, expected) > 100 * MAX_DIFFERENCE
    read = KVCache()
    layer.read(hidden[:, :6], embeddings[:, :6], read, positions=gap[:, :6])
    last = layer(hidden[:, 6:], embeddings[:, 6:], read, rope_delta=43)
    assert difference(last, apart[:, -1:]) <= MAX_DIFFERENCE


def raw_layer(tensors: Tensors) -> dict[str, mx.array]:
    """The layer as Hugging Face has it: bf16, zero-centred norms, experts one by one."""
    return {name: as_mlx(tensor) for name, tensor in tensors.items() if name.startswith("mtp.")}


def without_layer(folder: Path) -> dict[str, mx.array]:
    """What else a converted folder of one file holds."""
    held = mx.load(str(folder / "model.safetensors"))
    # Their file is written over.
    mx.eval(held)
    return {name: array for name, array in held.items() if not name.startswith("mtp.")}


def forget(folder: Path, *keys: str) -> None:
    """Take keys out of this project's block in config.json; all of it without keys."""
    config = json.loads((folder / "config.json").read_text())
    for key in keys:
        del config["qwen35_mlx"][key]
    if not keys:
        del config["qwen35_mlx"]
    (folder / "config.json").write_text(json.dumps(config))


@KINDS
@pytest.mark.parametrize("place", everyday(["inside", "beside", "in the index"], 0, 1))
def test_a_raw_layer_in_a_folder_of_mlx_gets_its_norms_shifted_once(
    checkpoints: Checkpoints, tmp_path: Path, moe: bool, place: str
) -> None:
    """Inside is what this project wrote before it knew the layer; beside, a copy from the hub."""
    expected = drafts(checkpoints.converted(moe, "bfloat16"))
    out, tensors = checkpoints.copy(tmp_path / "out", moe, "bfloat16"), checkpoints.tensors[moe]
    held, layer, written = without_layer(out), raw_layer(tensors), {"format": "mlx"}
    if place == "inside":
        forget(out, "mtp_norms_shifted")
        mx.save_safetensors(str(out / "model.safetensors"), held | layer, written)
        (out / INDEX_FILE).unlink()
    else:
        mx.save_safetensors(str(out / "model.safetensors"), held, written)
        mx.save_safetensors(str(out / "mtp.safetensors"), layer, {"format": "pt"})
        index = dict.fromkeys(held, "model.safetensors")
        if place == "in the index":
            index |= dict.fromkeys(layer, "mtp.safetensors")
            forget(out)
        (out / INDEX_FILE).write_text(json.dumps({"weight_map": index}))
    assert difference(drafts(out), expected) <= MAX_DIFFERENCE
    # Converted again, it is as if it had been converted from the start.
    again = convert(out, tmp_path / "again", dtype="bfloat16")
    assert difference(drafts(again), expected) <= MAX_DIFFERENCE


@pytest.mark.parametrize("metadata", [{"format": "mlx"}, None], ids=["named", "nameless"])
def test_norms_of_a_layer_that_mlx_wrote_are_not_shifted_again(
    checkpoints: Checkpoints, tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    """A quantized layer beside the folder of another program; stacks of experts tell it as well."""
    out = checkpoints.copy(tmp_path / "out", True)
    expected, rest = drafts(out), without_layer(out)
    held = mx.load(str(checkpoints.converted(True) / "model.safetensors"))
    layer = {name: array for name, array in held.items() if name.startswith("mtp.")}
    mx.save_safetensors(str(out / "model.safetensors"), rest, {"format": "mlx"})
    mx.save_safetensors(str(out / "model-mtp.safetensors"), layer, metadata)
    (out / INDEX_FILE).unlink()
    forget(out)
    assert difference(drafts(out), expected) == 0


def test_a_raw_layer_beside_quantized_weights_is_loaded_on_request_alone(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """It is 13 GB in the 397B, for a run that may not draft at all."""
    out = checkpoints.copy(tmp_path / "out", True)
    layer = raw_layer(checkpoints.tensors[True])
    quantized = open_model(out)[2]
    mx.save_safetensors(str(out / "model.safetensors"), without_layer(out), {"format": "mlx"})
    mx.save_safetensors(str(out / "mtp.safetensors"), layer, {"format": "pt"})
    (out / INDEX_FILE).unlink()
    model, _, num_bytes = open_model(out)
    assert model.mtp is None and model.config.num_mtp_layers == 0
    loaded, _, with_layer = open_model(out, mtp=True)
    assert loaded.config.num_mtp_layers == 1
    arrays = tree_flatten(loaded.parameters())
    assert with_layer - num_bytes == sum(a.nbytes for n, a in arrays if n.startswith("mtp."))
    assert num_bytes < quantized < with_layer
    # The head is of 4 bits here, so the states are compared.
    bf16 = load_model(checkpoints.converted(True, "bfloat16"))[0].mtp
    assert loaded.mtp is not None and bf16 is not None
    assert difference(loaded.mtp(*states(1)), bf16(*states(1))) <= MAX_DIFFERENCE


def test_a_model_may_be_loaded_without_its_layer(checkpoints: Checkpoints) -> None:
    out = checkpoints.converted(False)
    ids = mx.array([[1, 2, 3]])
    with_layer, without = (load_model(out, mtp=wanted)[0] for wanted in (None, False))
    assert with_layer.mtp is not None and without.mtp is None
    assert mx.array_equal(with_layer(ids), without(ids))
    assert not any(name.startswith("mtp.") for name, _ in tree_flatten(without.parameters()))


def test_a_layer_that_does_not_fit_is_left_out_rather_than_the_model_refused(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out, refused = checkpoints.converted(True), []
    limit = open_model(out, mtp=False)[2]
    allow = memory.allow

    def strict(config: Any, weight_bytes: int, **settings: Any) -> Any:
        if weight_bytes > limit:
            refused.append(weight_bytes)
            raise MemoryRefused("the model does not fit this machine")
        return allow(config, weight_bytes, **settings)

    monkeypatch.setattr(memory, "allow", strict)
    assert load_model(out)[0].mtp is None
    assert "the MTP layer does not fit in memory" in caplog.text
    with pytest.raises(MemoryRefused):
        load_model(out, mtp=True)
    assert len(refused) == 2


def test_a_missing_layer_is_said_where_drafts_are_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path / "src", tokenizer=True)
    out = convert(tmp_path / "src", tmp_path / "out")
    caplog.clear()
    assert load_model(out)[0].mtp is None
    assert not caplog.records
    assert load_model(out, mtp=True)[0].mtp is None
    assert [r.message for r in caplog.records] == [
        "the model has no MTP layer that could draft tokens"
    ]


def lose_norm(tensors: Tensors) -> None:
    del tensors["mtp.pre_fc_norm_hidden.weight"]


def lose_expert(tensors: Tensors) -> None:
    del tensors["mtp.layers.0.mlp.experts.1.up_proj.weight"]


def add_layer(tensors: Tensors) -> None:
    tensors["mtp.layers.1.input_layernorm.weight"] = tensors["mtp.norm.weight"]


@pytest.mark.parametrize(
    ("change", "said"),
    everyday(
        [
            (lose_norm, "missing  mtp.pre_fc_norm_hidden.weight"),
            (lose_expert, "missing  mtp.layers.0.mlp.experts.1.up_proj.weight"),
            (add_layer, "unknown  mtp.layers.1.input_layernorm.weight"),
        ],
        1,
    ),
)
def test_a_layer_that_is_not_whole_is_kept_and_named_and_the_text_runs(
    checkpoints: Checkpoints,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Tensors], None],
    said: str,
) -> None:
    tensors = write_checkpoint(tmp_path / "src", moe=True, mtp=True, tokenizer=True, change=change)
    with caplog.at_level(logging.WARNING):
        out = convert(tmp_path / "src", tmp_path / "out")
    assert said in caplog.text and "everything else can" in caplog.text
    held = mx.load(str(out / "model.safetensors"))
    for name, array in raw_layer(tensors).items():
        assert mx.array_equal(held[name], array), name
    ids = mx.array([[1, 2, 3]])
    model, _ = load_model(out)
    assert model.mtp is None
    assert mx.array_equal(model(ids), load_model(checkpoints.converted(True))[0](ids))


@pytest.mark.parametrize("bits", [2, 8])
def test_the_layer_has_4_bits_whatever_the_trunk_has(checkpoints: Checkpoints, bits: int) -> None:
    def recipe(module: str) -> tuple[int, int]:
        return bits, 128

    entries = {e.module: e for e in plan(checkpoints.source(True), recipe=recipe).entries}
    assert entries["mtp.layers.0.self_attn.q_proj"].bits == 4
    assert entries["mtp.layers.0.mlp.switch_mlp.down_proj"].bits == 4
    for kept in ("mtp.fc", "mtp.layers.0.mlp.gate", "mtp.layers.0.mlp.shared_expert_gate"):
        assert entries[kept].bits == 8
    assert {e.group_size for n, e in entries.items() if n[:4] == "mtp." and e.bits} == {128}
    assert entries["mtp.norm"].bits is None
    unquantized = plan(checkpoints.source(True), recipe=lambda module: None).entries
    assert not any(entry.bits for entry in unquantized)


def test_memory_counts_weights_and_cache_of_the_layer(checkpoints: Checkpoints) -> None:
    planned = plan(checkpoints.source(True))
    config = planned.config
    assert config.num_mtp_layers == 1 and planned.mtp_bytes > 0
    in_use = running(planned, 512)
    assert in_use.weights == planned.text_bytes + planned.mtp_bytes
    without = count(load_model(checkpoints.converted(True), mtp=False)[0].config, 0, 512)
    one_layer = 2 * config.num_key_value_heads * config.head_dim * kv_capacity(512) * 2
    assert in_use.kv_cache - without.kv_cache == one_layer


def test_a_plan_says_what_a_load_does_where_memory_is_short(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = checkpoints.converted(False, "float32"), []
    planned = plan(out, dtype="float32")
    without = replace(planned, config=replace(planned.config, num_mtp_layers=0))
    needs = [running(way, 256).total for way in (planned, without)]
    for name in ("default_limit_bytes", "raised_limit_bytes"):
        monkeypatch.setattr(report, name, lambda memory_bytes: memory_bytes)
    machine = memory.describe()
    for limit in (needs[0], needs[0] - 1, needs[1], needs[1] - 1):
        own = machine._replace(gpu_limit_bytes=limit)
        monkeypatch.setattr(memory, "describe", lambda own=own: own)
        mac = Mac("M1", limit / GIB, 0)
        try:
            loaded = load_model(out, context=256)[0]
        except MemoryRefused:
            found = "no"
        else:
            found = "fits" if loaded.mtp else "fits no MTP"
        assert report._fits(mac, planned, 256, memory.AUTO) == found
        seen.append(found)
    assert seen == ["fits", "fits no MTP", "fits no MTP", "no"]


def test_a_file_that_is_only_named_after_the_layer_is_left_alone(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    out = checkpoints.copy(tmp_path / "out", False)
    held = without_layer(out)
    mx.save_safetensors(str(out / "model.safetensors"), held, {"format": "mlx"})
    mx.save_safetensors(str(out / "mtp-notes.safetensors"), {"layers.9.x": mx.zeros((2, 2))})
    index = {"weight_map": dict.fromkeys(held, "model.safetensors")}
    (out / INDEX_FILE).write_text(json.dumps(index))
    assert load_model(out)[0].mtp is None


def test_each_draft_has_the_position_of_its_token(
    demo: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft at another position costs acceptance only, so no text would show it."""
    model, tokenizer = demo
    deltas: list[list[int]] = []
    draft, call = MTPState.draft, MTP.__call__

    def drafting(*given: Any) -> Any:
        deltas.append([])
        return draft(*given)

    def called(*given: Any, rope_delta: int = 0, **options: Any) -> Any:
        if deltas:
            deltas[-1].append(rope_delta)
        return call(*given, rope_delta=rope_delta, **options)

    monkeypatch.setattr(MTPState, "draft", drafting)
    monkeypatch.setattr(MTP, "__call__", called)
    settings: Any = dict(temperature=0, max_tokens=12, draft="mtp", num_draft_tokens=3)
    qwen35_mlx.generate(model, tokenizer, "The capital of France is", **settings)
    drafted = [found[:3] for found in deltas if len(found) >= 3]
    assert drafted and all(len(set(found)) == 1 for found in drafted)


@pytest.mark.parametrize("wanted", [None, True, False])
def test_a_layer_that_is_not_there_is_not_loaded(wanted: bool | None) -> None:
    found: Any = SimpleNamespace(mtp_matches=[], quantizations={})
    assert not loads_mtp(found, wanted)
