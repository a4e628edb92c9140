"""Which tiers a model gets: stored verdicts in, operations and rows out."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import qwen35_mlx
from qwen35_mlx.config import ModelConfig
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.family import FAMILY, Member, family_config
from qwen35_mlx.kernels import choice, first_load, verdicts
from qwen35_mlx.kernels.switch import QuantizedSwitchLinear
from qwen35_mlx.kernels.tiers import ANY_ROWS, METAL, MLX, OPERATIONS, OPS, PORTABLE, Tiers
from qwen35_mlx.kernels.verdicts import Format, Verdict, member_of, shape_of
from qwen35_mlx.model import loading

CONFIG = ModelConfig.from_hf(family_config("Qwen3.5-35B-A3B")["text_config"])
FORMAT = Format("bfloat16", 4, 64)
FORMATS = dict.fromkeys(OPERATIONS, FORMAT)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("QWEN35_MLX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def with_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))


def verdict(op: str, speedup: float, num_tokens: int = 1, **changes: Any) -> Verdict:
    made = Verdict(
        op,
        shape_of(member_of(CONFIG)),
        *FORMAT,
        num_tokens,
        metal_us=10.0,
        mlx_us=10.0 * speedup,
    )
    return made._replace(**changes)


def all_tokens(op: str, *speedups: float) -> list[Verdict]:
    return [verdict(op, s, n) for s, n in zip(speedups, choice.TOKENS, strict=False)]


def measured(*found: Verdict) -> dict[str, int]:
    chosen = choice.measured(found, CONFIG, FORMATS)
    assert chosen.base == MLX
    return dict(chosen.kernel_rows)


def test_without_a_verdict_everything_runs_on_mlx() -> None:
    assert measured() == {}


def test_a_kernel_is_used_up_to_the_rows_at_which_it_was_faster() -> None:
    assert measured(*all_tokens("projection", 1.5, 1.4, 0.9, 1.4)) == {"projection": 2}
    assert measured(*all_tokens("projection", 1.5, 1.4, 1.3, 1.2)) == {"projection": 8}
    # The last measured number says the same of all that the kernel takes.
    assert measured(*all_tokens("router", 2, 2, 2, 2)) == {"router": ANY_ROWS}
    assert measured(*all_tokens("router", 2)) == {"router": 1}
    # A percent may be noise.
    assert measured(*all_tokens("router", 1.01)) == {}


def test_a_kernel_that_is_not_right_is_not_used_however_fast() -> None:
    assert measured(verdict("router", 5.0, problem="relative error 0.1")) == {}


def test_prefill_is_measured_by_itself() -> None:
    assert measured(verdict("chunk_delta_rule", 1.5)) == {}
    assert measured(verdict("chunk_delta_rule", 1.5, choice.PREFILL_TOKENS)) == {
        "chunk_delta_rule": ANY_ROWS
    }


@pytest.mark.parametrize(
    "changes", [{"bits": 3}, {"group_size": 32}, {"dtype": "float16"}, {"shape": "other"}]
)
def test_a_verdict_on_another_format_or_size_decides_nothing(changes: dict[str, Any]) -> None:
    assert measured(verdict("router", 2.0, **changes)) == {}


def test_every_size_tells_models_apart() -> None:
    base = FAMILY[0]
    unseen = "name", "num_hidden_layers", "tie_word_embeddings", "tower"
    sizes = [n for n in Member._fields if n not in unseen]
    shapes = {shape_of(base._replace(**{n: 7})) for n in sizes} | {shape_of(base)}
    assert len(shapes) == len(sizes) + 1
    assert shape_of(base._replace(name="another", num_hidden_layers=7)) == shape_of(base)


def test_a_models_sizes_are_those_of_its_member_of_the_family() -> None:
    for member in FAMILY:
        config = ModelConfig.from_hf(family_config(member.full_name)["text_config"])
        assert shape_of(member_of(config)) == shape_of(member)


def test_formats_are_those_of_most_weights_that_an_operation_reads(converted_demo: Path) -> None:
    model, _ = loading.load_model(converted_demo)
    formats = choice.formats_of(model)
    assert set(formats) == set(OPERATIONS)
    assert formats["projection"] == formats["expert_down"] == Format("float32", 4, 64)
    for layer in model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp.switch_mlp, name, QuantizedSwitchLinear(256, 64, 8, 32, 3))
    formats = choice.formats_of(model)
    assert formats["projection"].bits == 4
    assert formats["expert_gate_up"][1:] == (3, 32)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\udcff",
        '{"machine": {}}',
        '{"machine": MACHINE}',
        '{"machine": MACHINE, "verdicts": 3}',
        '{"machine": MACHINE, "verdicts": [1]}',
        '{"machine": MACHINE, "verdicts": [{"op": "router"}]}',
        '{"machine": MACHINE, "verdicts": [{"unknown": "router"}]}',
        '{"machine": MACHINE, "verdicts": [VERDICT]}',
    ],
)
def test_damaged_verdicts_are_none(with_metal: None, text: str) -> None:
    path = verdicts.write([verdict("router", 2.0)])
    damaged = json.dumps(verdict("router", 2.0)._asdict() | {"mlx_us": "fast"})
    text = text.replace("MACHINE", json.dumps(verdicts.machine_key())).replace("VERDICT", damaged)
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert verdicts.read() == []


@pytest.mark.parametrize("what", ["chip", "os", "mlx", "kernels"])
def test_verdicts_of_another_machine_or_version_are_none(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = verdicts.write([verdict("router", 2.0)])
    other = verdicts.machine_key() | {what: "another"}
    monkeypatch.setattr(verdicts, "machine_key", lambda: other)
    assert verdicts.read() == []
    # Even if they came under this machine's name, from another cache folder.
    path.rename(verdicts.path())
    assert verdicts.read() == []


def test_verdicts_outlive_an_update_that_does_not_touch_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = verdicts.machine_key()
    monkeypatch.setattr("qwen35_mlx.__version__", "99.0")
    monkeypatch.setattr(verdicts, "MIN_SPEEDUP", 3.0)
    assert verdicts.machine_key() == key


def test_a_change_of_a_launch_or_of_a_kernel_asks_for_new_verdicts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = Path(verdicts.__file__).parent
    folder = shutil.copytree(source, tmp_path / "kernels")
    monkeypatch.setattr(verdicts, "FOLDER", folder)
    before, found = verdicts.machine_key(), set()
    for file in [*folder.glob("*.py"), *folder.glob("*.metal")]:
        verdicts._digest_of_sources.cache_clear()
        text = file.read_bytes()
        file.write_bytes(text + b" ")
        if verdicts.machine_key() != before:
            found.add(file.name)
        file.write_bytes(text)
    verdicts._digest_of_sources.cache_clear()
    launching = {f.name for f in source.glob("*.py") if "= kernel(" in f.read_text()}
    assert launching and found >= {f.name for f in source.glob("*.metal")} | launching
    assert "verdicts.py" not in found and "naive.py" not in found


def test_new_verdicts_stand_beside_the_old_ones() -> None:
    verdicts.write([verdict("router", 2.0), verdict("projection", 2.0)])
    verdicts.write([verdict("router", 0.5), verdict("router", 3.0, 2)])
    assert {(v.op, v.num_tokens, v.speedup) for v in verdicts.read()} == {
        ("router", 1, 0.5),
        ("router", 2, 3.0),
        ("projection", 1, 2.0),
    }


def test_writing_is_whole_or_not_at_all(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = verdicts.write([verdict("router", 2.0)])
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Qwen35Error, match=r"cannot be stored[^$]*QWEN35_MLX_CACHE"):
        verdicts.write([verdict("router", 3.0)])
    assert path.read_bytes() == before
    assert list(cache.iterdir()) == [path]


def test_metal_where_there_is_none_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    with pytest.raises(Qwen35Error, match=r"no Metal on this machine[^$]*kernels='auto'"):
        qwen35_mlx.load("no/such-model", kernels="metal")
    with pytest.raises(Qwen35Error, match="'auto', 'ops', 'mlx', 'metal'"):
        qwen35_mlx.load("no/such-model", kernels="fast")


def test_a_mac_told_to_compute_on_the_cpu_runs_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(sys, "platform", "darwin")
    # Nothing of the model is looked at.
    assert loading.choose("auto", None) == PORTABLE  # type: ignore[arg-type]
    with pytest.raises(Qwen35Error, match="CPU as default device"):
        choice.require("metal")


def test_load_gives_the_choice_to_every_layer(
    converted_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    found = Tiers(MLX, {"router": 2})
    monkeypatch.setattr(first_load, "tiers_of", lambda model: found)
    monkeypatch.setattr(loading, "wire", lambda allowance: None)
    for kernels, router, projection in (
        ("auto", METAL, MLX),
        ("metal", METAL, METAL),
        ("mlx", MLX, MLX),
        ("ops", OPS, OPS),
    ):
        model, _ = qwen35_mlx.load(converted_demo, kernels=kernels)
        modules = [m for m in model.modules() if hasattr(type(m), "kernels")]
        # In each layer, and in that of MTP, which has one more; and the model has its head.
        assert len(modules) == 4 * (len(model.layers) + 1) + 2
        for module in modules:
            assert module.kernels.of("router") == router
            assert module.kernels.of("projection") == projection
