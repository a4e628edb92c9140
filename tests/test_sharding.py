"""The parts of a model that several processes hold: none is missing, none counts twice."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import mlx.core as mx
import mlx.nn as nn
import pytest
from everyday import everyday
from mlx.utils import tree_flatten

from qwen35_mlx.checkpoint.headers import read_header
from qwen35_mlx.checkpoint.pipeline import Pipeline, divide, read_split
from qwen35_mlx.checkpoint.sharding import LAYERS, Cut, Sharding
from qwen35_mlx.config import ModelConfig
from qwen35_mlx.convert import plan
from qwen35_mlx.convert.mac_models import MACS, find_macs, running, share, tokens_per_second
from qwen35_mlx.convert.report import UNBOUNDED, family_source, mac_lines, unequal_lines
from qwen35_mlx.errors import CheckpointError, Qwen35Error
from qwen35_mlx.kernels.router import Routing
from qwen35_mlx.model import attention, feed_forward, gated_delta_net, loading
from qwen35_mlx.model import shard as shard_module
from qwen35_mlx.model.language import Model
from qwen35_mlx.model.loading import open_model
from qwen35_mlx.model.shard import PIECE_BYTES, OwnExperts, joined, read_cut, shard, taken


def config(moe: bool = False, **changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(checkpoints.text_config(moe, tied=False) | changes)


def shardings(of: ModelConfig, size: int, groups: dict[str, int] | None = None) -> list[Sharding]:
    return [Sharding(of, rank, size, groups or {}) for rank in range(size)]


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_no_row_and_no_column_is_left_to_nobody(moe: bool, size: int) -> None:
    model = Model(config(moe))
    parts = shardings(model.config, size)
    for name, array in tree_flatten(model.parameters()):
        cuts = [part.cut(name) for part in parts]
        if cuts[0] is None:
            assert cuts == [None] * size
            continue
        length = array.shape[cuts[0].axis]
        places = [i for cut in cuts for a, b in cut.places(array.shape) for i in range(a, b)]
        assert set(places) == set(range(length)), name
        is_shared = "k_proj" in name or "v_proj" in name or "qkv" in name or "conv1d" in name
        assert is_shared or len(places) == length, name


def test_embeddings_and_head_are_read_by_rank_0_alone() -> None:
    first, second = shardings(config(), 2)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert first.holds(name) and not second.holds(name)
        assert first.cut(name) is None
    for name in ("language_model.model.norm.weight", f"{LAYERS}0.mlp.down_proj.scales"):
        assert second.holds(name)


def test_what_is_whole_on_every_mac_is_named() -> None:
    assert shardings(config(), 2)[0].note == ""
    odd = Sharding(config(num_attention_heads=6, num_key_value_heads=3), 0, 4, {})
    assert odd.note == "whole on each of 4 Macs: attention (6 heads)"


def test_a_width_is_not_split_inside_of_a_group_of_weights() -> None:
    group = {f"{LAYERS}0.mlp.switch_mlp.down_proj": 128}
    of = config(moe=True, num_experts=4)
    assert shardings(of, 2)[0].splits >= {"experts"}
    narrow = shardings(of, 2, group)[1]
    assert "experts" not in narrow.splits
    assert narrow.experts == (2, 4)


def test_a_number_of_macs_that_divides_nothing_is_refused_with_the_numbers() -> None:
    with pytest.raises(Qwen35Error, match=r"(?s)on 7 Macs.*4 attention heads.*width 256"):
        Sharding(config(), 0, 7, {})


def model_of(of: ModelConfig) -> Model:
    """With one kind of quantized matrices."""
    model = Model(of)
    nn.quantize(model, 32, 8, class_predicate=lambda path, _: path.endswith("q_proj"))
    return model


def part_of(whole: Model, rank: int, size: int) -> Model:
    """A second model with the weights of the first, cut."""
    part = model_of(whole.config)
    part.load_weights(tree_flatten(whole.parameters()))
    group: Any = SimpleNamespace(rank=lambda: rank, size=lambda: size)
    shard(part, group)
    return part


@pytest.mark.parametrize(
    ("size", "moe", "changes"),
    everyday(
        [
            (2, False, {}),
            # Each process has a key head of its own, or half of one.
            (4, True, {"num_experts": 4}),
            (4, False, {"linear_num_key_heads": 4}),
            # Nothing but whole experts can be split.
            (
                4,
                True,
                dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 30)
                | {"num_experts": 4},
            ),
            (4, True, {"num_experts": 4, "moe_intermediate_size": 30}),
            (4, True, {"num_experts": 4, "shared_expert_intermediate_size": 30}),
        ],
        1,
        3,
    ),
)
def test_the_parts_of_a_layer_add_up_to_the_layer(
    size: int, moe: bool, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model_of(config(moe, **changes))
    x, norm = mx.random.normal((1, 5, checkpoints.HIDDEN)), nn.RMSNorm(checkpoints.HIDDEN)
    calls = {
        0: lambda m: m.layers[0].linear_attn(x, norm, None, None),
        1: lambda m: m.layers[1].self_attn(x, norm, "causal", None),
        2: lambda m: m.layers[0].mlp(x, norm),
    }
    wanted = {place: call(whole) - x for place, call in calls.items()}
    for module in (attention, feed_forward, gated_delta_net):
        monkeypatch.setattr(module, "joined", lambda partial, residual, group: partial)
    parts = [part_of(whole, rank, size) for rank in range(size)]
    for place, call in calls.items():
        total = sum(call(part) for part in parts)
        assert mx.abs(total - wanted[place]).max().item() < 1e-4, place


@pytest.mark.parametrize(
    ("size", "shape", "how"),
    [
        (3, (1, 8, 16), "gathered"),
        (3, (8, 1, 16), "gathered"),
        # Many rows, or two processes, whose order of a sum makes no difference.
        (3, (1, 9, 4), "summed"),
        (3, (3, 3, 4), "summed"),
        (2, (1, 1, 16), "summed"),
    ],
)
def test_a_few_rows_of_many_processes_are_summed_in_one_order(
    size: int, shape: tuple[int, ...], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    group: Any = SimpleNamespace(size=lambda: size)

    def gather(x: mx.array, group: Any) -> mx.array:
        calls.append("gathered")
        assert x.shape == (1, *shape)
        return mx.concatenate([x * rank for rank in range(size)])

    def add(x: mx.array, group: Any) -> mx.array:
        calls.append("summed")
        return x * sum(range(size))

    monkeypatch.setattr(mx.distributed, "all_gather", gather)
    monkeypatch.setattr(mx.distributed, "all_sum", add)
    partial = mx.arange(math.prod(shape)).reshape(shape)
    residual = mx.full(shape, 1000)
    expected = residual + partial * sum(range(size))
    assert mx.array_equal(joined(partial, residual, group), expected)
    assert calls == [how]
    assert joined(partial, residual, None) is partial


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_not_of_the_layers_stays_with_rank_0(rank: int) -> None:
    model = model_of(config())
    model.mtp = model.vision_tower = nn.Linear(1, 1)
    group: Any = SimpleNamespace(rank=lambda: rank, size=lambda: 2)
    found = shard(model, group)
    assert isinstance(found, Sharding) and (found.rank, found.local) == (rank, model.config)
    assert (model.mtp is None) == (model.vision_tower is None) == (rank > 0)
    assert ("lm_head" in model.language_model) == (rank == 0)
    assert ("embed_tokens" in model.language_model.model) == (rank == 0)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_experts_of_other_processes_count_nothing(dtype: mx.Dtype) -> None:
    indices = mx.array([[[0, 2, 3, 5]], [[3, 4, 1, 2]]], mx.uint32)
    scores = mx.array([[[1, 2, 3, 4]], [[5, 6, 7, 8]]], dtype)
    routing = Routing(indices, scores, mx.ones((2, 1, 1), dtype))
    own = OwnExperts((2, 4), adds_shared=False)(routing)
    assert (own.indices.dtype, own.scores.dtype) == (mx.uint32, dtype)
    assert own.indices.tolist() == [[[0, 0, 1, 0]], [[1, 0, 0, 0]]]
    assert own.scores.tolist() == [[[0, 2, 3, 0]], [[5, 0, 0, 8]]]
    assert own.shared_scores.tolist() == [[[0]], [[0]]]
    assert OwnExperts(None, adds_shared=True)(routing) == routing


def test_a_part_has_the_memory_of_a_part() -> None:
    whole = model_of(config())
    num_bytes = sum(a.nbytes for _, a in tree_flatten(whole.layers[1].parameters()))
    part = part_of(whole, 1, 2)
    kept = sum(a.nbytes for _, a in tree_flatten(part.layers[1].parameters()))
    assert kept < 0.52 * num_bytes
    assert part.config.num_key_value_heads == 1
    assert "embed_tokens" not in part.language_model.model


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.uint8])
def test_slices_of_a_file_are_those_of_the_array(
    dtype: mx.Dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = 2 * PIECE_BYTES
    shapes = {"columns": (6, 8), "wide": (3, long), "stack": (2, 4, 8), "vector": (8,)}
    arrays = {
        name: (mx.random.uniform(shape=shape) * 250).astype(dtype) for name, shape in shapes.items()
    }
    mx.save_safetensors(str(tmp_path / "a.safetensors"), arrays)
    tensors = {tensor.name: tensor for tensor in read_header(tmp_path / "a.safetensors")}
    cuts = [Cut(-1, 4, ((1, 2),)), Cut(0, 2, ((1, 2),)), Cut(-1, 8, ((0, 1), (4, 8)))]
    # Of 6 short rows, 4 at a time.
    monkeypatch.setattr(shard_module, "MAPPED_BYTES", 4 * 8 * dtype.size + 1)
    for name, array in arrays.items():
        for cut in [c for c in cuts if array.shape[0] % 2 == 0 or c.axis]:
            found = read_cut(tensors[name], cut)
            assert found.dtype == dtype
            assert found.shape == cut.shape(array.shape)
            assert mx.array_equal(found, taken(array, cut)), (name, cut)
    middle = Cut(1, 4, ((2, 3),))
    assert mx.array_equal(read_cut(tensors["stack"], middle), taken(arrays["stack"], middle))


def test_a_file_that_became_shorter_is_an_error_and_no_weights(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    mx.save_safetensors(str(file), {"a": mx.ones((64, 4))})
    (tensor,) = read_header(file)
    with file.open("r+b") as stream:
        stream.truncate(tensor.offset + tensor.nbytes // 2 + 8)
    with pytest.raises(CheckpointError, match="shorter than it was"):
        read_cut(tensor, Cut(0, 2, ((1, 2),)))
    with pytest.raises(CheckpointError, match="shorter than it was"):
        read_cut(tensor, Cut(1, 2, ((1, 2),)))


def test_a_plan_for_several_macs_counts_what_the_first_will_hold(converted_demo: Path) -> None:
    planned = plan(converted_demo)
    part = share(planned, [UNBOUNDED] * 2).parts[0]
    model, _, _ = open_model(converted_demo)
    group: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    shard(model, group)
    held = {name: array.shape for name, array in tree_flatten(model.parameters())}
    assert {t.name: t.shape for e in part.text_entries for t in e.tensors} == {
        name: shape for name, shape in held.items() if not name.startswith(("vision", "mtp"))
    }
    assert running(part, 4096).kv_cache < 0.6 * running(planned, 4096).kv_cache
    lines = mac_lines(planned, MACS[:1], num_macs=2)
    assert "first of 2 such Macs" in lines[-2]


@pytest.mark.parametrize(
    ("size", "rank", "said"),
    [
        (2, 0, []),
        (8, 0, ["whole on each of 8 Macs: attention (4 heads), linear attention (4 value heads)"]),
        (8, 1, []),
    ],
)
def test_rank_0_alone_says_what_is_not_split(
    converted_demo: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    size: int,
    rank: int,
    said: list[str],
) -> None:
    monkeypatch.setattr(loading, "limits", lambda: ([2**40] * size, False))
    group: Any = SimpleNamespace(rank=lambda: rank, size=lambda: size)
    open_model(converted_demo, group=group)
    assert caplog.messages == said


def test_layers_in_other_processes_make_the_hidden_states_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    of = config(num_hidden_layers=3, layer_types=kinds)
    whole, sent = Model(of), list[mx.array]()
    parts = [Model(of) for _ in range(3)]
    for rank, part in enumerate(parts):
        part.load_weights(tree_flatten(whole.parameters()))
        group: Any = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 3)
        shard(part, group, limits=[9 * 10**9, 1, 1], by_layers=True)
    caches = [part.make_cache() for part in parts]

    def send(x: mx.array, to: int, group: Any) -> mx.array:
        sent.append(x)
        if to:
            arguments = dict(embeddings=mx.zeros((1, num_tokens, checkpoints.HIDDEN)))
            parts[to].trunk(None, caches[to], **arguments, last_only=last_only)
        return x

    def received(like: mx.array, source: int, group: Any) -> mx.array:
        assert like.shape == sent[-1].shape
        return sent.pop()

    monkeypatch.setattr(mx.distributed, "send", send)
    monkeypatch.setattr(mx.distributed, "recv_like", received)
    cache = whole.make_cache()
    for num_tokens, last_only in ((12, False), (1, False), (11, True)):
        ids = mx.arange(num_tokens)[None] + 3
        wanted = whole.trunk(ids, cache, last_only=last_only)
        found = parts[0].trunk(ids, caches[0], last_only=last_only)
        assert mx.array_equal(found, wanted)
    assert [len(part.layers) for part in parts] == [1, 1, 1]
    assert [len(held) for held in caches] == [1, 1, 1]


def test_a_share_is_counted_as_it_is_cut() -> None:
    cut = Cut(-1, 8, ((2, 4),))
    assert cut.shape((5, 64)) == (5, 16)
    assert cut.places((5, 4)) == [(1, 2)]
    assert math.prod(cut.shape((5, 4))) == 5


@pytest.mark.parametrize(
    ("names", "split", "fits"),
    [
        # Equal parts would take 115 GB of each.
        ("M3 Ultra 256GB,M3 Ultra 96GB", "44 + 16", True),
        ("M4 Max 128GB,M3 Ultra 512GB", "10 + 50", True),
        ("M3 Ultra 256GB,M4 Max 192GB", "", True),
        # Nothing is a third of 16 key heads.
        ("M4 Max 128GB,M4 Max 128GB,M4 Max 128GB", "19 + 20 + 21", True),
    ],
)
def test_different_macs_get_whole_layers_where_equal_parts_do_not_fit_or_divide(
    names: str, split: str, fits: bool, planned_397b: Any
) -> None:
    macs = [find_macs(name)[0] for name in names.split(",")]
    *rows, how, bound = unequal_lines(planned_397b, macs)
    assert how.removeprefix("the Macs have whole layers, one after the other: ") == (
        split or "each Mac has an equal part of every layer"
    )
    assert all(row.endswith("fits") for row in rows) is fits
    parts = share(planned_397b, [mac.gpu_limit_bytes for mac in macs]).parts
    held = [t.name for part in parts for e in part.entries for t in e.tensors if "layers" in t.name]
    if split:
        # Every layer in one Mac; all else in the first.
        assert len(held) == len(set(held))
        seconds = sum(
            1 / tokens_per_second(p, m.gbps, 32768) for p, m in zip(parts, macs, strict=True)
        )
        assert f": {1 / seconds:,.0f}; each token needs {len(macs)} messages" in bound
        assert parts[0].mtp_bytes > parts[1].mtp_bytes == 0
    else:
        assert "121 messages" in bound


@pytest.fixture(scope="module")
def planned_397b() -> Any:
    return plan(family_source("Qwen3.5-397B-A17B"), bits=4)


def test_shares_of_layers_that_people_give_are_taken_as_they_are() -> None:
    of = config(num_hidden_layers=4, layer_types=["full_attention"] * 4)
    nbytes = {f"{LAYERS}{i}.mlp.up_proj.weight": 10**9 for i in range(4)}
    part = divide(of, 1, read_split("3GB,1GB", 2), nbytes, {}, by_layers=True)
    assert isinstance(part, Pipeline) and part.ends == (3, 4)
    assert part.name_here(f"{LAYERS}3.mlp.up_proj.weight") == f"{LAYERS}0.mlp.up_proj.weight"
    assert isinstance(divide(of, 1, [10**12] * 2, nbytes, {}), Sharding)
    with pytest.raises(Qwen35Error, match="1 parts for 2 Macs"):
        read_split("3GB", 2)
    with pytest.raises(Qwen35Error, match="more Macs than layers"):
        divide(of, 0, [1] * 5, nbytes, {}, by_layers=True)
