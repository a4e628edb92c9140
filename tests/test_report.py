"""Plans of the real sizes, from headers alone, and what they say of Macs."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from checkpoints import write_checkpoint
from everyday import everyday
from fake_hub import REPO, FakeHub, serving

from qwen35_mlx.cli.local_models import SOURCE
from qwen35_mlx.convert import job, mac_models, plan
from qwen35_mlx.convert import report as page
from qwen35_mlx.convert.mac_models import MACS, Mac, find_macs
from qwen35_mlx.convert.report import family_source
from qwen35_mlx.convert.tasks import cut, peak_bytes
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.family import FAMILY
from qwen35_mlx.machine import GIB, default_limit_bytes, describe, raised_limit_bytes
from qwen35_mlx.quant.recipes import recipe

ROOT = Path(__file__).resolve().parent.parent
# Qwen3.5-397B-A17B
REAL = dict(
    HIDDEN=4096, VOCAB=248_320, EXPERTS=512, EXPERT_WIDTH=1024, SHARED_WIDTH=1024, HEADS=32,
    KV_HEADS=2, HEAD_DIM=256, LINEAR_K_HEADS=16, LINEAR_V_HEADS=64, LINEAR_K_DIM=128,
    LINEAR_V_DIM=128, KEY_DIM=2048, VALUE_DIM=8192,
    LAYER_TYPES=(["linear_attention"] * 3 + ["full_attention"]) * 15,
)  # fmt: skip
SHARD_BYTES = 9 * 10**9


def write_sparse(folder: Path, patch: pytest.MonkeyPatch, num_layers: int = 60) -> None:
    """The 397B with its true names and shapes, in shards that hold nothing but headers."""
    folder.mkdir()
    with patch.context() as real:
        for name, value in REAL.items():
            real.setattr(checkpoints, name, value)
        real.setattr(checkpoints, "LAYER_TYPES", REAL["LAYER_TYPES"][:num_layers])
        shapes = checkpoints.tensor_shapes(
            moe=True, tied=False, experts="fused", flat=False, vision=True, mtp=True
        )
        text = checkpoints.text_config(moe=True, tied=False)
    text |= dict(num_experts_per_tok=10, max_position_embeddings=262_144)
    config = dict(model_type="qwen3_5_moe", tie_word_embeddings=False, text_config=text)
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, Any]] = [{}]
    filled = 0
    for name, shape in sorted(shapes.items()):
        nbytes = 2 * math.prod(shape)
        if filled + nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            filled = 0
        entry = dict(dtype="BF16", shape=list(shape), data_offsets=[filled, filled + nbytes])
        shards[-1][name] = entry
        filled += nbytes
    weight_map = {}
    for i, header in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        raw = json.dumps(header).encode()
        end = max(entry["data_offsets"][1] for entry in header.values())
        with (folder / file).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            try:
                stream.truncate(8 + len(raw) + end)
            except OSError:
                pytest.skip("this file system has no sparse files")
        weight_map |= dict.fromkeys(header, file)
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    write_sparse(tmp_path / "src", monkeypatch)
    with serving(tmp_path / "src", tmp_path / "cache", monkeypatch) as hub:
        yield hub


def experts_3(module: str) -> tuple[int, int]:
    return (3 if "switch_mlp" in module else 4), 64


@pytest.mark.slow
def test_the_397b_is_planned_from_a_few_megabytes(real: FakeHub) -> None:
    planned = plan(REPO, bits=4)
    assert sum(real.served.values()) < 4 * 10**6 + len(real.served) * 2**17
    text = planned.text_entries
    # What llama.cpp prints, and the sizes of published conversions.
    assert sum(e.num_parameters for e in text) / 1e9 == pytest.approx(396.35, abs=0.02)
    assert sum(e.output_bytes for e in text) / 1e9 == pytest.approx(222.9, abs=0.2)
    assert planned.source_bytes / 1e9 == pytest.approx(806, abs=2)
    mixed = plan(planned.source, recipe=experts_3)
    assert mixed.text_bytes / 1e9 == pytest.approx(174.6, abs=0.2)
    assert mac_models.bytes_per_token(mixed) / 1e9 == pytest.approx(8.62, abs=0.15)
    assert mac_models.tokens_per_second(mixed, 819) == pytest.approx(94, abs=2)

    tasks = cut(mixed)
    assert peak_bytes(mixed, tasks) < 10**9
    fetched = job.source_disk_bytes(planned.source, tasks, keep_source=False)
    assert SHARD_BYTES < fetched <= 3 * SHARD_BYTES
    lines = page.mac_lines(mixed, MACS)
    ultra = next(line for line in lines if line.startswith("M2 Ultra") and "192 GB" in line)
    *fits, bound = re.split(" {2,}", ultra)[3:]
    assert [cell[:2] for cell in fits] == ["N="] * 4
    # As `load` does: 8 bits of keys first, then without the layer.
    assert [cell.partition(" ")[2] for cell in fits] == ["", "", "no MTP", "kv8 no MTP"]
    assert bound == f"{mac_models.tokens_per_second(mixed, 800, 8192):.0f}"
    assert next(line for line in lines if "128 GB" in line).split()[-1] == "-"
    largest = next(line for line in lines if "512 GB" in line)
    assert largest.split().count("fits") == 4


@pytest.mark.slow
def test_a_picture_of_the_plan(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_checkpoint(tmp_path / "src", moe=True)
    page.draw(plan(tmp_path / "src"), tmp_path / "plan.png")
    raw = (tmp_path / "plan.png").read_bytes()
    assert raw.startswith(b"\x89PNG") and len(raw) > 20_000


def test_without_matplotlib_the_picture_says_what_to_install(tmp_path, monkeypatch) -> None:
    write_checkpoint(tmp_path / "src")
    for name in ("matplotlib", "matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"qwen35-mlx\[plot\]"):
        page.draw(plan(tmp_path / "src"), tmp_path / "plan.png")


@pytest.mark.parametrize(
    ("name", "billions", "tower_millions"),
    everyday([("0.8B", 0.75, 100.6), ("2B", 1.88, 331.4), ("27B", 26.9, 460.7),
              ("35B-A3B", 34.7, 446.6), ("122B-A10B", 122.1, 451.3), ("397B-A17B", 396.35, 456.0)],
             0, 3),
)  # fmt: skip
def test_sizes_of_the_family(name: str, billions: float, tower_millions: float) -> None:
    planned = plan(family_source(f"Qwen3.5-{name}"))
    text = sum(entry.num_parameters for entry in planned.text_entries)
    assert text / 1e9 == pytest.approx(billions, rel=0.012)
    tower = sum(e.num_parameters for e in planned.entries if e.module.startswith("vision_tower."))
    assert tower / 1e6 == pytest.approx(tower_millions, abs=0.1)


def test_without_a_tower_the_page_says_that_it_reads_text_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src")
    assert page.picture_lines(plan(tmp_path / "src")) == [
        "no vision tower: the model reads text only"
    ]


def test_tokens_of_pictures_follow_the_settings_of_the_source(tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    shutil.copytree(SOURCE, demo)
    assert all(" 9 tokens" in line for line in page.picture_lines(plan(demo))[3:])
    settings = json.loads((demo / "preprocessor_config.json").read_text())
    settings["size"]["longest_edge"] = 4 * settings["size"]["longest_edge"]
    (demo / "preprocessor_config.json").write_text(json.dumps(settings))
    assert " 36 tokens" in page.picture_lines(plan(demo))[3]
    (demo / "preprocessor_config.json").write_text("{}")
    assert page.picture_lines(plan(demo))[0].startswith("pictures cannot be read: ")


@pytest.mark.slow
def test_what_fits_this_machine_names_every_model() -> None:
    lines = page.family_lines(192 * GIB, "a Mac with M2 Ultra")
    assert lines[0] == "192 GB of memory: a Mac with M2 Ultra"
    cells = {line.split()[0]: line for line in lines if line.startswith("Qwen")}
    assert list(cells) == [member.full_name for member in FAMILY]
    # 3.7 GB of the MTP layer are left out for it.
    assert "178.2 GB, 256k* kv8 no MTP" in cells["Qwen3.5-397B-A17B"]
    assert "227.7 GB, no" in cells["Qwen3.5-397B-A17B"]
    assert "16.4 GB, 256k" in cells["Qwen3.5-27B"]


@pytest.mark.slow
def test_fit_without_a_source_finds_a_recipe_for_every_model(monkeypatch) -> None:
    monkeypatch.setattr(page, "FAMILY", [FAMILY[0], *FAMILY[-2:]])
    lines = page.fitting_lines(192 * GIB, "a Mac", None)
    assert lines[0] == "192 GB of memory: a Mac, with a context of 32,768 tokens"
    found = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("Qwen")}
    assert list(found) == [member.full_name for member in page.FAMILY]
    assert found["Qwen3.5-0.8B"][0] == "unquantized"
    assert found["Qwen3.5-122B-A10B"][:2] == ["--recipe", "q8"]
    assert found["Qwen3.5-397B-A17B"][:2] == ["--recipe", "q2*"]
    # What is shown is what the guard would count, and the next recipe does not fit.
    planned = plan(family_source("Qwen3.5-397B-A17B"), recipe=recipe("q2"))
    needed = mac_models.running(planned, 32_768, default_limit_bytes(192 * GIB)).total
    assert found["Qwen3.5-397B-A17B"][-2:] == [f"{needed / 1e9:.1f}", "GB"]
    more = plan(planned.source, recipe=recipe("q3"))
    assert more.text_bytes > raised_limit_bytes(192 * GIB)
    small = page.fitting_lines(8 * GIB, "a Mac", 8192)
    assert next(line for line in small if "397B" in line).split()[1:] == ["no", "recipe"]


@pytest.mark.slow
def test_the_disk_line_counts_output_spare_and_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sparse(tmp_path / "src", monkeypatch, num_layers=8)
    with serving(tmp_path / "src", tmp_path / "cache", monkeypatch):
        check_the_disk_line(tmp_path)


def check_the_disk_line(tmp_path: Path) -> None:
    planned = plan(REPO, bits=4)
    line = page.conversion_lines(planned)[1]
    whole, output, shards = (float(n.replace(",", "")) for n in re.findall(r"[\d,]+\.\d", line))
    assert output == pytest.approx(planned.output_bytes / 1e9, abs=0.051)
    fetched = job.source_disk_bytes(planned.source, cut(planned), keep_source=False)
    assert shards == pytest.approx(fetched / 1e9, abs=0.051)
    assert whole == pytest.approx(
        (planned.output_bytes + fetched + job.SPARE_BYTES) / 1e9, abs=0.051
    )
    write_checkpoint(tmp_path / "local")
    local = plan(tmp_path / "local")
    expected = f"{(local.output_bytes + job.SPARE_BYTES) / 1e9:.1f} GB for the output"
    assert expected in page.conversion_lines(local)[1]


def test_the_page_names_contexts_scores_and_an_upper_bound() -> None:
    planned = plan(family_source("Qwen3.5-397B-A17B"), bits=4)
    lines = page.mac_lines(planned, find_macs("M3 Ultra 256GB"))
    assert lines[0].split("  ")[-1] == "bandwidth limit, tok/s"
    assert "at 8k" in lines[0] and "at 256k" in lines[0]
    # All queries of a step at 8k; then fewer at a time, so that they stay within 1.25 GB.
    scores = re.findall(r"\d\.\d", lines[2])
    assert scores == ["1.1", f"{1.25:.1f}", f"{1.25:.1f}", f"{1.25:.1f}"]
    assert lines[3].split()[-4:] == ["2,048", "576", "128", "64"]
    assert any("upper bound" in line and "no program reaches" in line for line in lines)
    assert len([line for line in lines if "M3 Ultra" in line]) == 1
    own = page.mac_lines(planned, find_macs("M3 Ultra 256GB"), 100_000)
    assert "at 100,000" in own[0] and "at 8k" not in own[0]
    with pytest.raises(Qwen35Error, match="context does not fit"):
        page.mac_lines(planned, [], 5_000_000)


@pytest.mark.parametrize(
    "name", everyday(["Qwen3.5-397B-A17B", "qwen3.5-397b-a17b", "Qwen/Qwen3.5-397B-A17B"], 1)
)
def test_a_released_model_is_found_by_name_without_a_network(name: str) -> None:
    source = page.find_source(name)
    assert not isinstance(source, str)
    # The MTP layer has 6.6 billions of them.
    assert plan(source).num_parameters / 1e9 == pytest.approx(403.4, abs=0.1)


def test_unknown_names_are_told_the_known_ones(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(Qwen35Error, match=r"is not a folder or a released model") as error:
        page.find_source("Qwen3.5-28B")
    assert all(member.full_name in str(error.value) for member in FAMILY)
    # Other repositories and revisions are the hub's; a folder of the name comes first.
    assert page.find_source("Qwen/Qwen3.5-27B-FP8") == "Qwen/Qwen3.5-27B-FP8"
    assert page.find_source("Qwen/Qwen3.5-27B", "main") == "Qwen/Qwen3.5-27B"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen3.5-27B").mkdir()
    assert page.find_source("Qwen3.5-27B") == "Qwen3.5-27B"


def test_macs_are_found_by_memory_chip_or_both() -> None:
    assert {mac.chip for mac in find_macs("192GB")} == {"M2 Ultra"}
    assert [mac.memory_gib for mac in find_macs("m3 ultra")] == [96, 256, 512]
    assert find_macs("M3 Ultra 256 GB") == [Mac("M3 Ultra", 256, 819)]
    # Not in the table: by what is known of the chip.
    assert find_macs("M4 Pro 48GB") == [Mac("M4 Pro", 48, 273)]
    assert find_macs("24GB") == [Mac("", 24, 0)]
    for wrong in ("", "M9 Ultra", "Intel", "256 parsecs", "M3 Ultra lots"):
        with pytest.raises(Qwen35Error, match=r"unknown Mac|not a size"):
            find_macs(wrong)


@pytest.mark.parametrize(
    ("brand", "memory_gib", "gbps"),
    [("Apple M3 Max", 128, 400), ("Apple M3 Max", 36, 300), ("Apple M4 Max", 64, 546),
     ("Apple M2 Ultra", 192, 800), ("Apple M9", 64, 0)],
)  # fmt: skip
def test_this_mac_is_known_by_chip_and_memory(monkeypatch, brand, memory_gib, gbps) -> None:
    here = describe()._replace(chip=brand, memory_bytes=memory_gib * GIB)
    for limit, expected in (
        (3 * GIB, Mac(brand.removeprefix("Apple "), memory_gib, gbps)),
        (None, None),
    ):
        machine = here._replace(gpu_limit_bytes=limit)
        monkeypatch.setattr(mac_models, "describe", lambda machine=machine: machine)
        assert mac_models.this_mac() == expected


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("settings", [dict(bits=4), dict(bits=8), dict(dtype="float32")])
def test_peak_memory_is_within_a_tenth_of_the_plan(tmp_path, settings) -> None:
    vocab = 275_000
    text = checkpoints.text_config(moe=False, tied=False) | dict(vocab_size=vocab)
    # Two tensors of 70 MB, so that each thread has whole slices.
    wide = ("BF16", np.full((vocab, checkpoints.HIDDEN), 0x3F80, dtype=np.uint16))
    names = ("model.language_model.embed_tokens.weight", "lm_head.weight")
    write_checkpoint(
        tmp_path / "src",
        config=dict(text_config=text),
        change=lambda tensors: tensors.update(dict.fromkeys(names, wide)),
    )
    planned = plan(tmp_path / "src", **settings)
    expected = peak_bytes(planned, cut(planned))
    script = (
        "import sys; from qwen35_mlx.convert import convert\n"
        f"convert(sys.argv[1], sys.argv[2], **{settings})\n"
        "print(next(s for s in open('/proc/self/status') if s.startswith('VmHWM')).split()[1])"
    )
    peaks: list[int] = []
    # The most is needed when both threads are at their most at once: not in every run.
    while len(peaks) < 6 and max(peaks, default=0) < 0.9 * expected:
        out = tmp_path / f"out{len(peaks)}"
        command = [sys.executable, "-c", script, str(tmp_path / "src"), str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) * 1024)
    assert max(peaks) == pytest.approx(expected, rel=0.1)
