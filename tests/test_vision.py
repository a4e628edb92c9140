"""The vision tower and the positions of its tokens: golden features and logits, cuts, limits."""

# T tokens, N patches, H hidden size; F frame groups

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday

from qwen35_mlx import memory
from qwen35_mlx.config import ModelConfig, VisionConfig
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.kernels.attention_heads import qk_norm, rotate
from qwen35_mlx.kernels.tiers import Tiers
from qwen35_mlx.model import attention, vision
from qwen35_mlx.model.language import Model
from qwen35_mlx.model.loading import load_model
from qwen35_mlx.model.rope import frequency_axes, media_positions
from qwen35_mlx.model.vision import VisionTower

GOLDEN = Path(__file__).parent / "golden" / "vision" / "golden.npz"
PICTURE_ID, VIDEO_ID = 50, 51
MAX_DIFFERENCE = 3e-4


@dataclass(frozen=True)
class Grid:
    """A span of `height` x `width` tokens, without the picture."""

    height: int
    width: int


class Token(int):
    """A placeholder as `media.tokens` makes it."""

    span: Grid
    index: int


def tokens(height: int, width: int) -> list[int]:
    span, found = Grid(height, width), []
    for index in range(height * width):
        token = Token(-2 - index)
        token.span, token.index = span, index
        found.append(token)
    return found


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN))


@pytest.fixture(scope="module")
def model(converted_golden: Callable[[str], Path]) -> Model:
    return load_model(converted_golden("vision"))[0]


@pytest.fixture(scope="module")
def tower(model: Model) -> VisionTower:
    assert model.vision_tower is not None
    return model.vision_tower


@pytest.fixture(scope="module")
def ids(golden: dict[str, np.ndarray]) -> list[int]:
    """The golden prompt with a token for each placeholder."""
    shown = iter([*tokens(3, 2), *tokens(1, 3), *tokens(1, 3)])
    return [next(shown) if i in (PICTURE_ID, VIDEO_ID) else i for i in golden["ids"].tolist()]


def encoded(tower: VisionTower, golden: dict[str, np.ndarray], name: str) -> np.ndarray:
    grid = tuple(golden[f"{name}_grid"].tolist())
    return np.array(tower(mx.array(golden[f"{name}_patches"]), grid))


@pytest.mark.parametrize("name", ["picture", "video"])
def test_features_are_those_of_transformers(
    tower: VisionTower, golden: dict[str, np.ndarray], name: str
) -> None:
    difference = np.abs(encoded(tower, golden, name) - golden[f"{name}_features"])
    assert difference.max() < 2e-5


def test_one_slice_of_a_picture_gives_what_two_equal_ones_give(
    tower: VisionTower, golden: dict[str, np.ndarray]
) -> None:
    patches = golden["picture_patches"].reshape(-1, 3, 2, 4)
    once = tower(mx.array(patches[:, :, 0].reshape(len(patches), -1)), (1, 6, 4))
    assert np.abs(np.array(once) - golden["picture_features"]).max() < 2e-5


def read(
    model: Model, ids: list[int], features: mx.array, pieces: list[int], explicit: bool = False
) -> np.ndarray:
    """Logits of a prompt in pieces; text by its delta, or by positions too if `explicit`."""
    cache = model.make_cache()
    at = position = seen = 0
    logits = []
    for size in pieces:
        piece = ids[at : at + size]
        num_shown = sum(isinstance(i, Token) for i in piece)
        if num_shown or explicit:
            positions, position = media_positions(piece, position)
            rows = features[seen : seen + num_shown] if num_shown else None
            given: dict[str, Any] = {"positions": mx.array(positions)[:, None]}
            hidden = model.trunk(None, cache, embeddings=model.embed(piece, rows), **given)
        else:
            hidden = model.trunk(mx.array([piece]), cache, rope_delta=position - at)
            position += size
        at, seen = at + size, seen + num_shown
        logits.append(np.array(model.head(hidden)[0]))
    return np.concatenate(logits)


@pytest.mark.parametrize("piece", everyday([38, 1, 5, 13], 0, 2))
def test_logits_are_those_of_transformers(
    model: Model, golden: dict[str, np.ndarray], ids: list[int], piece: int
) -> None:
    features = np.concatenate([golden["picture_features"], golden["video_features"]])
    sizes = [min(piece, len(ids) - at) for at in range(0, len(ids), piece)]
    logits = read(model, ids, mx.array(features), sizes)
    assert np.abs(logits - golden["logits"]).max() < MAX_DIFFERENCE


def test_positions_are_those_of_transformers_wherever_the_prompt_is_cut(
    golden: dict[str, np.ndarray], ids: list[int]
) -> None:
    for cut in range(len(ids) + 1):
        first, start = media_positions(ids[:cut], 0)
        rest, end = media_positions(ids[cut:], start)
        both = np.concatenate([first, rest], axis=1)
        np.testing.assert_array_equal(both, golden["positions"], f"cut at {cut}")
        assert end == golden["positions"].max() + 1


def test_text_goes_on_behind_the_longer_side_of_a_picture() -> None:
    positions, end = media_positions([1] * 5 + tokens(2, 3) + [1, 1], 0)
    assert positions.tolist() == [
        [0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 8, 9],
        [0, 1, 2, 3, 4, 5, 5, 5, 6, 6, 6, 8, 9],
        [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9],
    ]
    assert end == 10


def test_rows_and_columns_turn_every_third_frequency() -> None:
    axes = frequency_axes(32, (11, 11, 10))
    assert [i for i, axis in enumerate(axes) if axis == 1] == list(range(1, 32, 3))
    assert [i for i, axis in enumerate(axes) if axis == 2] == list(range(2, 30, 3))
    # More than there are frequencies, as in small models with the default.
    assert frequency_axes(4, (11, 11, 10)).tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("fused", [False, True], ids=["by offset", "by tables"])
def test_a_delta_is_as_good_as_positions(
    model: Model, ids: list[int], monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    """Behind a picture, on the path of text and on that of the fused kernel."""
    features, pieces = mx.random.normal((12, 32), key=mx.random.key(1)), [13, 5, 20]
    expected = read(model, ids, features, pieces, explicit=True)
    if fused:
        # The kernel itself needs Metal; what it is given does not.
        monkeypatch.setattr(Tiers, "runs", lambda self, op, num_rows: op == "qk_norm_rope")
        monkeypatch.setattr(attention, "qk_norm_rope", qk_norm_rope_on_ops)
    logits = read(model, ids, features, pieces)
    assert np.abs(logits - expected).max() < 1e-4


def qk_norm_rope_on_ops(*arguments: Any) -> tuple[mx.array, mx.array]:
    q_gate, k, q_weight, k_weight, cosines, sines, eps, _ = arguments
    q, k = qk_norm(q_gate, k, q_weight, k_weight, eps)
    return rotate(q, cosines, sines), rotate(k, cosines, sines)


def test_each_row_of_a_batch_has_its_own_delta(model: Model) -> None:
    ids, deltas = mx.array([[3, 1, 4], [1, 5, 9]]), [-2, -7]
    padding = [1, 0]
    cache = model.make_cache(padding)
    model.trunk(mx.array([[0, 2, 7], [8, 2, 8]]), cache)
    together = model.trunk(ids, cache, rope_delta=mx.array(deltas))
    for row, (before, delta) in enumerate(zip([[2, 7], [8, 2, 8]], deltas, strict=True)):
        alone = model.make_cache()
        model.trunk(mx.array([before]), alone)
        expected = model.trunk(ids[row : row + 1], alone, rope_delta=delta)
        assert mx.abs(together[row] - expected[0]).max().item() < 1e-4


@pytest.mark.parametrize("num_features", [None, 5, 7])
def test_features_that_are_not_as_many_as_their_tokens_are_refused(
    model: Model, num_features: int | None
) -> None:
    features = None if num_features is None else mx.zeros((num_features, 32))
    with pytest.raises(Qwen35Error, match="features do not match") as error:
        model.embed([4, *tokens(2, 3), 5], features)
    assert f"6 tokens and {num_features or 0} features" in str(error.value)


def test_features_take_the_places_of_their_tokens(model: Model) -> None:
    features = mx.random.normal((2, 32))
    embedded = model.embed([4, *tokens(1, 2), 5], features)
    text = model.embed([4, 5])
    assert mx.array_equal(embedded[0, 1:3], features).item()
    assert mx.array_equal(embedded[0, ::3], text[0]).item()


def test_a_frame_group_does_not_see_another(
    tower: VisionTower, golden: dict[str, np.ndarray]
) -> None:
    patches = golden["video_patches"].copy()
    patches[12:] = 0
    changed = np.array(tower(mx.array(patches), (2, 2, 6)))
    before = encoded(tower, golden, "video")
    assert np.array_equal(changed[:3], before[:3])
    assert np.abs(changed[3:] - before[3:]).max() > 0.1


@pytest.mark.parametrize("kind", ["picture", "video"])
def test_blocks_of_queries_and_rows_give_the_features_of_the_whole(
    tower: VisionTower,
    golden: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    calls = []
    attend = vision.attend
    monkeypatch.setattr(vision, "VISION_CHUNK_BYTES", 7 * 40 * 4)
    monkeypatch.setattr(vision, "attend", lambda *a: calls.append(a[-1]) or attend(*a))
    chunked = encoded(tower, golden, kind)
    assert calls == [7 * 40 * 4] * 2
    assert np.abs(chunked - golden[f"{kind}_features"]).max() < 2e-5


@pytest.mark.parametrize("kind", ["picture", "video"])
def test_attention_of_all_queries_at_once_gives_the_same(
    tower: VisionTower, golden: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As on a GPU, where MLX makes no scores."""
    monkeypatch.setattr(vision, "makes_no_scores", lambda head_dim: True)
    monkeypatch.setattr(vision, "attend", None)
    difference = np.abs(encoded(tower, golden, kind) - golden[f"{kind}_features"])
    assert difference.max() < 2e-5


@pytest.mark.slow
def test_a_tower_in_bfloat16_computes_in_bfloat16(
    converted_golden: Callable[[str], Path], golden: dict[str, np.ndarray]
) -> None:
    """As on a GPU; positions and rotation in float32 would make everything float32."""
    tower = load_model(converted_golden("vision"))[0].vision_tower
    assert tower is not None
    tower.set_dtype(mx.bfloat16)
    features = tower(mx.array(golden["picture_patches"]), (1, 6, 4))
    assert features.dtype == mx.bfloat16
    difference = np.array(features.astype(mx.float32)) - golden["picture_features"]
    assert np.abs(difference).std() < 0.02 * golden["picture_features"].std()


@pytest.mark.parametrize(
    ("num_patches", "width", "grid"),
    [(24, 12, (1, 6, 5)), (23, 12, (1, 6, 4)), (15, 12, (1, 5, 3)), (24, 13, (1, 6, 4))],
)
def test_patches_that_do_not_fit_are_refused(
    tower: VisionTower, num_patches: int, width: int, grid: tuple[int, int, int]
) -> None:
    with pytest.raises(Qwen35Error, match="patches do not fit"):
        tower(mx.zeros((num_patches, width)), grid)


def test_positions_of_a_grid_reach_from_corner_to_corner() -> None:
    config = small_tower(hidden_size=8, num_heads=1)
    taps, weights = vision.interpolation(4, 6, config)
    # In block order: the second is right of the first, the last is in the lower right corner.
    assert (taps[0][0], taps[3][0] >= taps[0][0]) == (0, True)
    assert weights[0][0] == 1 and weights[1:, 0].max() == 0
    last = taps[:, -1][weights[:, -1] > 0]
    assert set(last) == {config.num_position_embeddings - 1}
    assert np.allclose(weights.sum(axis=0), 1)


def small_tower(**sizes: Any) -> VisionConfig:
    return VisionConfig(**{  # type: ignore[arg-type]
        "depth": 2, "hidden_size": 96, "intermediate_size": 256, "num_heads": 2, "in_channels": 3,
        "patch_size": 8, "temporal_patch_size": 2, "spatial_merge_size": 2,
        "num_position_embeddings": 49, "out_hidden_size": 64,
    } | sizes)  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "side"),
    everyday([({}, 32), ({"num_heads": 1, "intermediate_size": 800}, 48), ({}, 20), ({}, 48)], 0),
)
def test_the_count_is_an_upper_bound_of_what_a_picture_takes(
    monkeypatch: pytest.MonkeyPatch, sizes: dict[str, Any], side: int
) -> None:
    for module in (memory, vision):
        monkeypatch.setattr(module, "VISION_CHUNK_BYTES", 2**20)
    config = small_tower(**sizes)
    tower = VisionTower(config)
    mx.eval(tower.parameters())
    pixels = np.random.default_rng(0).standard_normal((side**2, 192)).astype(np.float32)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(tower(mx.array(pixels), (1, side, side)))
    # The patches as they come are numpy's.
    peak = mx.get_peak_memory() - before + pixels.nbytes
    text = text_config(vision=config)
    counted = memory.tower_bytes(text, side**2 // 4, item_bytes=4)
    assert peak <= counted <= 2 * peak


def text_config(**more: Any) -> ModelConfig:
    return replace(ModelConfig.from_hf(checkpoints.text_config(moe=False, tied=True)), **more)


def test_a_model_that_sees_is_counted_with_pictures_and_one_that_does_not_without() -> None:
    sees = small_tower(hidden_size=1152, num_heads=16, intermediate_size=4304, patch_size=16)
    blind, seeing = (memory.count(text_config(vision=v), 7, 512) for v in (None, sees))
    assert blind.pictures == blind.features == 0
    assert not any("picture" in line for line in blind.overhead_lines())
    assert seeing.pictures > 0 and seeing.features == memory.MAX_FEATURES_BYTES
    assert seeing.total - blind.total == seeing.pictures + seeing.features
    assert sum(seeing.overhead_lines().values()) == seeing.overhead
    small_mac = memory.features_budget(text_config(vision=sees), 4 * 2**30)
    assert small_mac == 2**27
