import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from checkpoints import assert_nothing_left, write_checkpoint, write_tokenizer

from qwen35_mlx.config import RopeConfig
from qwen35_mlx.convert import convert, job, plan
from qwen35_mlx.convert.transform import NOTHING, Known
from qwen35_mlx.errors import Qwen35Error

OUTPUT = "language_model.model."


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_config_says_what_mlx_lm_would_guess_and_what_we_did(tmp_path):
    source = tmp_path / "src"
    write_checkpoint(source, moe=True, config={"_name_or_path": str(source)})
    before = json.loads((source / "config.json").read_text())
    out = convert(source, tmp_path / "out", bits=3, group_size=32)
    config = json.loads((out / "config.json").read_text())
    text = config["text_config"]
    assert text["full_attention_interval"] == 2
    assert text["rope_parameters"] == before["text_config"]["rope_parameters"]
    assert config["quantization"] == config["quantization_config"]
    routers = {n: own for n, own in config["quantization"].items() if isinstance(own, dict)}
    assert config["quantization"] == {"group_size": 32, "bits": 3, "mode": "affine", **routers}
    assert set(routers) == {
        f"{OUTPUT}layers.{i}.mlp.{gate}"
        for i in range(4)
        for gate in ("gate", "shared_expert_gate")
    }
    assert all(own == {"group_size": 32, "bits": 8} for own in routers.values())
    facts = config["qwen35_mlx"]
    assert facts["format_version"] == 1
    assert facts["norms_shifted"] is True
    assert facts["source"] == "src"
    assert facts["settings"] == {
        "bits": 3, "group_size": 32, "dtype": None, "recipe": None, "method": "minmax"
    }  # fmt: skip
    assert str(tmp_path) not in (out / "config.json").read_text()


@pytest.mark.parametrize(
    ("settings", "method"),
    [(dict(method="search"), "search"), ({}, "minmax"), (dict(dtype="float16"), None)],
)
def test_config_names_the_method_if_anything_was_quantized(tmp_path, settings, method):
    write_checkpoint(tmp_path / "src")
    config = job.output_config(plan(tmp_path / "src", **settings), {})
    assert config["qwen35_mlx"]["settings"]["method"] == method


@pytest.mark.parametrize(
    ("method", "message"),
    [("gptq", "needs a calibration with Hessians"), ("best", "expected: minmax, search, gptq")],
)
def test_methods_that_weights_alone_cannot_feed_are_refused(tmp_path, method, message):
    write_checkpoint(tmp_path / "src")
    with pytest.raises(Qwen35Error, match=f"(?s)method='{method}'.*{message}"):
        convert(tmp_path / "src", tmp_path / "out", method=method)
    assert_nothing_left(tmp_path)


def test_a_flat_config_may_have_an_empty_text_config(tmp_path):
    write_checkpoint(tmp_path / "src", flat=True, config={"text_config": None})
    config = job.output_config(plan(tmp_path / "src"), {})
    assert config["text_config"]["hidden_size"] == 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not a JSON object"),
        ('{"qwen35_mlx": null}', "has no checksums"),
        ('{"qwen35_mlx": []}', "has no checksums"),
        ('{"qwen35_mlx": {"sha256": {}}}', "has no checksums"),
        ('{"qwen35_mlx": {"sha256": ["model.safetensors"]}}', "has no checksums"),
    ],
)
def test_a_folder_without_checksums_cannot_be_verified(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Qwen35Error, match=message):
        job.verify(tmp_path)


def test_the_plan_keeps_the_config_of_the_source(tmp_path):
    write_checkpoint(tmp_path / "src")
    planned = plan(tmp_path / "src")
    before = json.dumps(planned.source.config)
    assert json.dumps(job.output_config(planned, {})) != before
    assert json.dumps(planned.source.config) == before


@pytest.mark.parametrize(
    ("kinds", "stated", "interval"),
    [("LLLF", None, 4), ("LFLF", 4, 2), ("FFFF", None, 1), ("LLLL", None, 5), ("LFFL", 2, None)],
)
def test_layer_types_decide_the_interval(caplog, kinds, stated, interval):
    layer_types = tuple({"L": "linear_attention", "F": "full_attention"}[k] for k in kinds)
    model = SimpleNamespace(layer_types=layer_types, rope=RopeConfig(1e4, 8))
    text = {"rope_parameters": {"type": "default"}, "partial_rotary_factor": 0.25}
    if stated:
        text["full_attention_interval"] = stated
    job._complete_text_config(text, model)
    assert text.get("full_attention_interval") == interval
    assert ("no interval" in caplog.text) == (interval is None)
    assert text["rope_parameters"]["partial_rotary_factor"] == 0.25
    assert text["rope_parameters"]["rope_type"] == "default"


def test_a_hub_cache_names_repository_and_revision(tmp_path):
    folder = tmp_path / "models--Qwen--Qwen3.5-2B" / "snapshots" / "0123abc"
    write_checkpoint(folder)
    out = convert(folder, tmp_path / "out")
    facts = json.loads((out / "config.json").read_text())["qwen35_mlx"]
    assert (facts["source"], facts["source_revision"]) == ("Qwen/Qwen3.5-2B", "0123abc")


def test_tokenizer_template_and_licence_come_along_and_nothing_else(tmp_path):
    write_checkpoint(tmp_path / "src", tokenizer=True)
    for name in ("LICENSE", "LICENSE.md", "generation_config.json", "merges.txt"):
        (tmp_path / "src" / name).write_text(name)
    for name in ("README.md", "modeling_custom.py", "training_args.bin", ".env"):
        (tmp_path / "src" / name).write_text(name)
    (tmp_path / "src" / "vocab.json").mkdir()
    out = convert(tmp_path / "src", tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {
        "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "LICENSE", "LICENSE.md",
        "generation_config.json", "merges.txt",
    }  # fmt: skip
    for name in ("LICENSE.md", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (tmp_path / "src" / name).read_bytes()


def test_a_source_without_tokenizer_is_converted_with_a_warning(tmp_path, caplog):
    write_checkpoint(tmp_path / "src")
    with caplog.at_level(logging.WARNING):
        convert(tmp_path / "src", tmp_path / "out")
    assert "no tokenizer.json" in caplog.text


def truncate(source: Path) -> None:
    path = source / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def lengthen_header(source: Path) -> None:
    path = source / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes((len(raw) + 1).to_bytes(8, "little") + raw[8:])


def overlap(source: Path) -> None:
    path = source / "model.safetensors"
    raw = path.read_bytes()
    header_bytes = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + header_bytes])
    begin, end = header["lm_head.weight"]["data_offsets"]
    header["lm_head.weight"]["data_offsets"] = [begin - 2, end - 2]
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + header_bytes :])


def remove_weights(source: Path) -> None:
    (source / "model.safetensors").unlink()


def index_elsewhere(source: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../x.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def other_model(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


def other_size(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 512
    (source / "config.json").write_text(json.dumps(config))


def no_config(source: Path) -> None:
    (source / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is truncated"),
        (lengthen_header, "header is longer than the file"),
        (overlap, r"lm_head.weight overlaps"),
        (remove_weights, "no weights in"),
        (index_elsewhere, "outside the folder"),
        (other_model, "is not a Qwen3.5 model"),
        (other_size, "(?s)12 tensors are wrong.*mlp.down_proj.weight"),
        (no_config, r"no config.json in"),
    ],
)
def test_a_damaged_source_leaves_nothing_behind(tmp_path, damage, message):
    write_checkpoint(tmp_path / "src")
    damage(tmp_path / "src")
    with pytest.raises(Qwen35Error, match=message):
        convert(tmp_path / "src", tmp_path / "out")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda p: p.symlink_to("nowhere")])
def test_an_existing_output_is_not_touched(tmp_path, make):
    write_checkpoint(tmp_path / "src")
    make(tmp_path / "out")
    before = os.lstat(tmp_path / "out")
    calls = []
    with pytest.raises(Qwen35Error, match="out exists already"):
        convert(tmp_path / "src", tmp_path / "out", progress=lambda *call: calls.append(call))
    assert not calls
    assert os.lstat(tmp_path / "out") == before
    assert_nothing_left(tmp_path, "out")


@pytest.mark.parametrize("out", ["src/config.json/out", "a" * 244])
def test_an_output_where_none_can_be_is_refused(tmp_path, out):
    """The second fits as a name, but not with what the hidden folder beside it is called."""
    write_checkpoint(tmp_path / "src")
    with pytest.raises(Qwen35Error, match=r"cannot use the work folder .*\.converting"):
        convert(tmp_path / "src", tmp_path / out)
    assert_nothing_left(tmp_path)


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    write_checkpoint(tmp_path / "src")

    def progress(done, total, name, file):
        (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(Qwen35Error, match="out exists already"):
        convert(tmp_path / "src", tmp_path / "out", progress=progress)
    assert list((tmp_path / "out").iterdir()) == []
    assert_nothing_left(tmp_path, "out", ".out.converting")
    (tmp_path / "out").rmdir()
    # All the work is still there.
    assert convert(tmp_path / "src", tmp_path / "out")
    assert_nothing_left(tmp_path, "out")


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    write_checkpoint(tmp_path / "src")
    seen = []

    def progress(done, total, name, file):
        seen.append({path.name for path in tmp_path.iterdir()})
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "src", tmp_path / "out", progress=progress)
    assert seen[-1] == {"src", ".out.converting"}
    assert_nothing_left(tmp_path)


def test_a_disk_without_room_is_refused_before_the_work(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "src")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    calls = []
    with pytest.raises(Qwen35Error, match=r"(?s)not enough disk space.*got: 0.00 GB free"):
        convert(tmp_path / "src", tmp_path / "out", progress=lambda *call: calls.append(call))
    assert not calls
    assert_nothing_left(tmp_path)


def test_a_disk_that_fills_up_meanwhile_is_a_clear_error(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "src")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Qwen35Error, match=r"(?s)cannot write .*No space left on device"):
        convert(tmp_path / "src", tmp_path / "out")
    assert_nothing_left(tmp_path)


@pytest.mark.slow
def test_what_a_killed_job_left_is_removed(tmp_path):
    write_checkpoint(tmp_path / "src")
    kill = (
        "import os, sys; from qwen35_mlx.convert import convert\n"
        "convert(sys.argv[1], sys.argv[2], progress=lambda *call: os._exit(9))"
    )
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", kill, str(tmp_path / "src"), str(tmp_path / "out")]
    assert subprocess.run(command, cwd=root).returncode == 9
    assert_nothing_left(tmp_path, ".out.converting")
    outs = [convert(tmp_path / "src", tmp_path / name) for name in ("out", "again")]
    assert listing(outs[0]) == listing(outs[1])
    assert_nothing_left(tmp_path, "out", "again")


def test_two_jobs_do_not_write_the_same_output(tmp_path):
    write_checkpoint(tmp_path / "src")
    messages = []

    def progress(done, total, name, file):
        if not messages:
            with pytest.raises(Qwen35Error) as error:
                convert(tmp_path / "src", tmp_path / "out")
            messages.append(str(error.value))

    out = convert(tmp_path / "src", tmp_path / "out", progress=progress)
    assert "another conversion to" in messages[0]
    assert listing(out) == listing(convert(tmp_path / "src", tmp_path / "again"))
    assert_nothing_left(tmp_path, "out", "again")


def test_output_folders_are_made_and_relative_paths_are_taken(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "src")
    write_tokenizer(tmp_path / "src")
    monkeypatch.chdir(tmp_path / "src")
    out = convert(".", "../models/tiny")
    assert out.samefile(tmp_path / "models" / "tiny")
    assert json.loads((out / "config.json").read_text())["qwen35_mlx"]["source"] == "src"


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_is_spelled_out_and_what_mlx_lm_would_truncate_is_named(caplog, truncate):
    rope = RopeConfig(
        1e4, 8, factor=4.0, original_max_position_embeddings=64, attention_factor=1.2,
        beta_fast=30.0, beta_slow=2.0, truncate=truncate,
    )  # fmt: skip
    text = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}
    job._complete_text_config(text, SimpleNamespace(layer_types=("full_attention",), rope=rope))
    found = text["rope_parameters"]
    assert found.pop("mscale") == pytest.approx(0.2 / (0.1 * math.log(4)))
    assert found == {
        "rope_type": "yarn",
        "factor": 4.0,
        "partial_rotary_factor": None,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.2,
        "mscale_all_dim": 0,
        "beta_fast": 30.0,
        "beta_slow": 2.0,
    }
    assert ("YaRN without truncation" in caplog.text) == (not truncate)


def test_what_decides_the_bytes_of_an_output_is_kept_under_its_name(tmp_path):
    write_checkpoint(tmp_path / "src")
    planned = plan(tmp_path / "src", bits=3)
    found = job._settings(planned, [], None, NOTHING)
    assert found.keys() - planned.source.origin.keys() - planned.settings.keys() == {
        "plan", "version", "mlx", "device"
    }  # fmt: skip
    assert found["device"] == str(mx.default_device()) and len(found["plan"]) == 16
    calibration = SimpleNamespace(digest="d")
    more = job._settings(planned, [], "v1", Known(calibration))
    assert (more["revision"], more["calibration"]) == ("v1", "d")
    assert more["plan"] == found["plan"] != job._settings(planned, [1], None, NOTHING)["plan"]
