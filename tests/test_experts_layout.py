"""The layout for experts from disk: where the bytes lie, and that they are the same weights."""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from checkpoints import write_checkpoint

import qwen35_mlx
from qwen35_mlx.checkpoint.headers import read_headers
from qwen35_mlx.convert import convert, mac_models, plan, verify
from qwen35_mlx.convert.mac_models import FromDisk, find_macs, from_disk, from_disk_tps
from qwen35_mlx.convert.plan import OutputTensor, Plan
from qwen35_mlx.convert.report import disk_lines, family_source
from qwen35_mlx.convert.shards import ShardWriter
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.model.loading import load_model

DEMO = Path(qwen35_mlx.__file__).parent / "demo"
STACK = "language_model.model.layers.{}.mlp.switch_mlp.{}_proj.{}"
EXPERT = "language_model.model.layers.{}.mlp.experts.{}.{}_proj.{}"
ORDER = [(proj, end) for proj in ("gate", "up", "down") for end in ("weight", "scales", "biases")]


@pytest.fixture(scope="module")
def folders(converted_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    disk = tmp_path_factory.mktemp("layout") / "disk"
    return converted_demo, convert(DEMO, disk, bits=4, experts_layout="disk")


def test_an_expert_is_one_range_of_the_file_and_experts_begin_at_a_page(folders: Any) -> None:
    stacked, disk = (mx.load(str(folder / "model.safetensors")) for folder in folders)
    places = read_headers(folders[1])
    end = None
    for layer in range(4):
        for expert in range(8):
            for proj, kind in ORDER:
                name = EXPERT.format(layer, expert, proj, kind)
                tensor = places[name]
                assert end is None or tensor.offset == end, name
                assert end is not None or tensor.offset % 16_384 == 0
                end = tensor.offset + tensor.nbytes
                expected = stacked.pop(STACK.format(layer, proj, kind), None)
                if expected is not None:
                    stacked[name] = expected
                whole = stacked[EXPERT.format(layer, 0, proj, kind)]
                assert mx.array_equal(disk.pop(name), whole[expert]).item(), name
    others = {name: array for name, array in stacked.items() if ".experts." not in name}
    assert disk.keys() == others.keys()
    assert all(mx.array_equal(disk[name], array).item() for name, array in others.items())


@pytest.mark.slow
def test_a_folder_for_disk_runs_as_it_is_and_converts_back(folders: Any, tmp_path: Path) -> None:
    stacked, disk = folders
    ids = mx.array([[5, 700, 9, 44, 44, 1000]])
    models = [load_model(folder, mtp=False)[0] for folder in folders]
    assert mx.array_equal(*(model(ids) for model in models)).item()
    assert verify(disk) > 0
    back = convert(disk, tmp_path / "back")
    there = convert(stacked, tmp_path / "there", experts_layout="disk")
    for one, other in ((back, stacked), (there, disk)):
        assert (one / "model.safetensors").read_bytes() == (
            other / "model.safetensors"
        ).read_bytes()
    said = json.loads((disk / "config.json").read_text())["qwen35_mlx"]["settings"]
    assert said["experts_layout"] == "disk"


def test_matrices_of_an_expert_stay_in_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["qwen35_mlx.convert.plan"], "MAX_SHARD_BYTES", 100_000)
    write_checkpoint(tmp_path / "source", moe=True)
    out = convert(tmp_path / "source", tmp_path / "out", bits=4, experts_layout="disk")
    tensors = read_headers(out)
    assert len({tensor.file for tensor in tensors.values()}) > 2
    for layer in range(4):
        names = [EXPERT.format(layer, e, *kind) for e in range(3) for kind in ORDER]
        assert len({tensors[name].file for name in names}) == 1


def test_rows_of_several_experts_are_written_to_where_each_lies(tmp_path: Path) -> None:
    stacks = [
        OutputTensor(f"layers.0.mlp.switch_mlp.{name}.weight", "U32", (3, 2, 2), is_apart=True)
        for name in ("gate_proj", "up_proj")
    ]
    writer = ShardWriter(tmp_path / "x.safetensors", [*stacks, OutputTensor("norm", "F32", (2,))])
    data = bytes(range(48))
    for stack, of in zip(stacks, (data, data[::-1]), strict=True):
        # From the middle of the first expert to that of the last, then the rest.
        for start, stop in ((8, 40), (0, 8), (40, 48)):
            writer.write(stack.name, start, memoryview(of)[start:stop])
        assert writer.read(stack.name, 4, 40) == of[4:44]
    with pytest.raises(RuntimeError, match="too many"):
        writer.write(stacks[0].name, 40, memoryview(data)[:16])
    writer.write("norm", 0, memoryview(bytes(8)))
    writer.missing_bytes = 0
    writer.finish()
    found = mx.load(str(tmp_path / "x.safetensors"))
    order = sorted(read_headers(tmp_path).values(), key=lambda tensor: tensor.offset)
    assert [t.name.removeprefix("layers.0.mlp.experts.") for t in order] == [
        *(f"{e}.{name}.weight" for e in range(3) for name in ("gate_proj", "up_proj")),
        "norm",
    ]
    row = found["layers.0.mlp.experts.1.up_proj.weight"]
    assert bytes(memoryview(row)) == data[::-1][16:32]


def test_a_layout_that_cannot_be_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", moe=False)
    with pytest.raises(Qwen35Error, match="not possible") as error:
        plan(tmp_path / "dense", bits=4, experts_layout="disk")
    assert "a model without experts" in str(error.value)
    with pytest.raises(Qwen35Error, match="'other' is not possible"):
        plan(tmp_path / "dense", bits=4, experts_layout="other")


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan(family_source("Qwen3.5-397B-A17B"), bits=4)


@pytest.mark.slow
def test_experts_of_the_largest_model_that_fit_a_mac_are_counted(planned: Plan) -> None:
    (mac,) = find_macs("M4 Max 128GB")
    found = from_disk(planned, mac, 8192)
    assert found is not None
    # 1,024 x 4,096 weights of 4 bits, and a scale and a bias of 16 for each 64; three matrices.
    assert found.expert_bytes == 3 * 1024 * 4096 * (4 + 0.5) / 8
    assert found.pool_bytes == found.num_slots * found.expert_bytes * 60
    assert 80e9 < found.pool_bytes < mac.gpu_limit_bytes
    assert from_disk(planned, find_macs("M3 Ultra 512GB")[0], 8192) is None
    assert from_disk(planned, find_macs("M1 16GB")[0], 8192) is None
    assert from_disk(plan(family_source("Qwen3.5-27B"), bits=4), mac, 8192) is None


def test_the_speed_to_expect_is_that_of_compute_router_and_disk_in_turn(
    planned: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mac,) = find_macs("M4 Max 128GB")
    monkeypatch.setattr(mac_models, "bytes_per_token", lambda *unused: 8 * 10**9)
    held = FromDisk(num_slots=100, pool_bytes=0, expert_bytes=7_000_000)
    seconds = 8 / (0.46 * mac.gbps) + 60 * 0.00025 + 0.1 * 600 * 0.007 / 5
    assert from_disk_tps(planned, mac, held, 0.1, 5.0, 0) == pytest.approx(1 / seconds)


def test_plan_says_what_a_mac_that_is_too_small_can_do(planned: Plan) -> None:
    lines = disk_lines(planned, find_macs("M4 Max 128GB"))
    assert "7.4 GB/s (assumed)" in lines[-2]
    speeds = [float(cell) for cell in lines[3].split()[-6::2]]
    assert speeds[0] > speeds[1] > speeds[2] > 1
    assert disk_lines(planned, find_macs("M3 Ultra 512GB")) == []


def test_plan_measures_the_disk_of_this_mac(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mac,) = find_macs("M4 Max 128GB")
    monkeypatch.setattr("qwen35_mlx.convert.report.this_mac", lambda: mac)
    monkeypatch.setattr("qwen35_mlx.convert.report.from_disk", lambda *_: FromDisk(5, 10**6, 10**5))
    lines = disk_lines(plan(folders[0]), [mac])
    assert "GB/s (measured)" in lines[-2]
