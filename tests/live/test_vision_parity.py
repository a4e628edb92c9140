"""Logits with pictures and videos against transformers, and mistakes that must not pass.

QWEN35_SEED repeats a run; QWEN35_VISION_CONFIGS is the number of checkpoints.
"""

# B batch, T tokens, V vocabulary

import os
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra `live` is not installed")

from live import vision_parity as parity
from live.vision_parity import GATE, NUM_STEPS, PIECES, SEED, Pair, over_std

from qwen35_mlx.engine.prompt_cache import PromptCache
from qwen35_mlx.model import rope, vision
from qwen35_mlx.model.rope import media_positions

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("default")]

NUM_CONFIGS = int(os.environ.get("QWEN35_VISION_CONFIGS") or 4)
torch = parity.torch


@pytest.fixture(scope="module", params=range(NUM_CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return parity.draw_pair(SEED, request.param, tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return parity.draw_pair(SEED, 0, tmp_path_factory.mktemp("dense"))


def test_logits_and_positions_of_every_prompt(pair: Pair) -> None:
    """Whole, in pieces that end inside pictures, and in steps."""
    for draw in pair.maker.prompts():
        prompt, expected = pair.settled(draw)
        positions, _ = media_positions(prompt.ids, 0)
        np.testing.assert_array_equal(positions, pair.reference_positions(prompt), prompt.name)
        for piece in (None, *PIECES):
            ours = parity.read(pair.ours, prompt, parity.cut(prompt, piece))
            distance = over_std(ours, expected)
            assert distance <= GATE, f"{prompt.name} by {piece}, seed {SEED}: {pair.text}"


@pytest.mark.parametrize("step_size", [1, 37, None])
def test_a_prompt_cache_reads_and_steps_as_the_reference(pair: Pair, step_size: int | None) -> None:
    """The sequence of a conversation: it keeps positions and features itself."""
    prompt, expected = mixed(pair)
    cache, num_prompt = PromptCache(pair.ours), len(prompt.ids) - NUM_STEPS
    hidden = cache.read(prompt.ids[:num_prompt], step_size=step_size)
    assert hidden is not None
    logits = [pair.ours.head(hidden)[0]]
    for token in prompt.ids[num_prompt:]:
        logits.append(pair.ours.head(cache.step(mx.array([token])))[0])
        cache.commit(token)
    distance = over_std(np.array(mx.concatenate(logits)), expected[-NUM_STEPS - 1 :])
    assert distance <= GATE, f"seed {SEED}: {pair.text}"


def test_rows_of_a_padded_batch_with_pictures(pair: Pair) -> None:
    maker, model = pair.maker, pair.ours
    prompts = [
        pair.settled(lambda: maker.prompt("short", 3, maker.picture(2, 3), 4)),
        pair.settled(lambda: maker.prompt("long", 9, maker.clip(4, 2, 2), 3)),
        pair.settled(lambda: maker.prompt("text", 30)),
    ]
    starts = [len(prompt.ids) - NUM_STEPS for prompt, _ in prompts]
    padding = [max(starts) - n for n in starts]
    cache = model.make_cache(padding)
    rows, positions, deltas = [], [], []
    for (prompt, _), start, pads in zip(prompts, starts, padding, strict=True):
        ids = [0] * pads + prompt.ids[:start]
        rows.append(model.embed(ids, parity.rows_of(parity.encode(model, prompt), ids)))
        real, position = media_positions(ids[pads:], 0)
        positions.append(np.concatenate([np.zeros((3, pads), np.int32), real], axis=1))
        deltas.append(position - start)
    hidden = model.trunk(
        None,
        cache,
        embeddings=mx.concatenate(rows),
        positions=mx.array(np.stack(positions, axis=1)),
    )
    logits = [np.array(model.head(hidden))]
    for step in range(NUM_STEPS):
        ids = mx.array([[int(p.ids[n + step])] for (p, _), n in zip(prompts, starts, strict=True)])
        hidden = model.trunk(ids, cache, rope_delta=mx.array(deltas))
        logits.append(np.array(model.head(hidden)))
    together = np.concatenate(logits, axis=1)
    for row, ((_, expected), pads) in enumerate(zip(prompts, padding, strict=True)):
        assert over_std(together[row, pads:], expected) <= GATE, f"seed {SEED}: {pair.text}"


def test_a_second_turn_with_a_picture_against_the_reference_with_a_cache(pair: Pair) -> None:
    """Its own positions for new pictures behind a cache are wrong: they are given."""
    maker = pair.maker

    def draw() -> parity.Prompt:
        return maker.prompt("turns", 5, maker.picture(3, 4), 9, maker.picture(4, 2), 6)

    prompt, whole = pair.settled(draw)
    border = 5 + 14 + 7
    positions = torch.from_numpy(media_positions(prompt.ids, 0)[0].astype(np.int64))[:, None]
    counted = torch.arange(len(prompt.ids))[None, None]
    four_rows = torch.cat([counted, positions])
    inputs, logits, cache = prompt.reference_inputs(), [], None
    first, second = (shown.grid[1] * shown.grid[2] for shown in prompt.shown)
    for turn, (tokens, patches) in enumerate(
        [(slice(0, border), slice(0, first)), (slice(border, None), slice(first, first + second))]
    ):
        given = {name: inputs[name][:, tokens] for name in parity.TOKEN_INPUTS}
        given["pixel_values"] = inputs["pixel_values"][patches]
        given["image_grid_thw"] = inputs["image_grid_thw"][turn : turn + 1]
        out, cache = pair._call(given | {"position_ids": four_rows[:, :, tokens]}, cache)
        logits.append(out[0])
    both = np.concatenate(logits)
    assert over_std(both, whole) <= GATE
    pieces = [border, len(prompt.ids) - border]
    assert over_std(parity.read(pair.ours, prompt, pieces), both) <= GATE


# What an implementation can get wrong, done to ours. Each changes a module or a function.
Patch = Callable[[pytest.MonkeyPatch], None]


def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Patch:
    """The attribute as `make` returns it from the right one."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def _one_dimensional(ids: list[int], start: int) -> tuple[np.ndarray, int]:
    return np.tile(np.arange(start, start + len(ids)), (3, 1)), start + len(ids)


def _swapped(right: Any) -> Any:
    def positions(ids: list[int], start: int) -> tuple[np.ndarray, int]:
        found, end = right(ids, start)
        return found[[0, 2, 1]], end

    return positions


def _time_counts_groups(right: Any) -> Any:
    def positions(ids: list[int], start: int) -> tuple[np.ndarray, int]:
        found, end = right(ids, start)
        found[0] += [getattr(getattr(token, "span", None), "index", 0) for token in ids]
        return found, end

    return positions


def _longer_side_not_added(right: Any) -> Any:
    """What follows a picture goes on at its number of tokens: the delta is lost."""

    def positions(ids: list[int], start: int) -> tuple[np.ndarray, int]:
        return right(ids, start)[0], start + len(ids)

    return positions


def _sectioned(num_frequencies: int, section: tuple[int, int, int]) -> np.ndarray:
    return np.repeat([0, 1, 2], section)[:num_frequencies].astype(np.int32)


def _across_groups(right: Any) -> Any:
    def call(self: Any, x: mx.array, tables: tuple[mx.array, mx.array]) -> mx.array:
        wide = [mx.tile(table, (x.shape[0], 1)) for table in tables]
        return right(self, x.reshape(1, -1, x.shape[-1]), tuple(wide)).reshape(x.shape)

    return call


def _corners_not_aligned(right: Any) -> Any:
    def call(height: int, width: int, config: Any) -> tuple[np.ndarray, np.ndarray]:
        taps, weights = right(height, width, config)
        order = vision.block_order(height, width, config.spatial_merge_size)
        side = config.grid_size

        def axis(n: int) -> np.ndarray:
            return np.clip((np.arange(n) + 0.5) * side / n - 0.5, 0, side - 1)

        row, column = axis(height)[order // width], axis(width)[order % width]
        top, left = np.floor(row).astype(int), np.floor(column).astype(int)
        bottom, right_ = np.minimum(top + 1, side - 1), np.minimum(left + 1, side - 1)
        a, b = row - top, column - left
        taps = [top * side + left, top * side + right_, bottom * side + left]
        weights = [(1 - a) * (1 - b), (1 - a) * b, a * (1 - b), a * b]
        return np.stack([*taps, bottom * side + right_]), np.stack(weights).astype(np.float32)

    return call


def _tower_input(change: Callable[[mx.array, tuple[int, int, int]], Any]) -> Patch:
    """Other patches or another grid reach the tower."""

    def make(right: Any) -> Any:
        return lambda self, patches, grid: right(self, *change(patches, grid))

    return replaced(vision.VisionTower, "__call__", make)


def _channels_reversed(patches: mx.array, grid: Any) -> Any:
    return patches.reshape(len(patches), 3, -1)[:, ::-1].reshape(patches.shape), grid


def _without_bias(right: Any) -> Any:
    return lambda self, patches: right(self, patches) - self.proj.bias


def _one_slice(right: Any) -> Any:
    def call(self: Any, patches: mx.array) -> mx.array:
        weight = self.proj.weight.transpose(0, 4, 1, 2, 3)[:, :, :1]
        pixels = patches.reshape(len(patches), 3, -1, *weight.shape[3:])[:, :, :1]
        rows = pixels.reshape(len(patches), -1)
        return rows @ weight.reshape(len(weight), -1).T + self.proj.bias

    return call


def _rotated_by_columns_first(right: Any) -> Any:
    def call(height: int, width: int, config: Any) -> mx.array:
        return mx.concatenate(mx.split(right(height, width, config), 2, axis=1)[::-1], axis=1)

    return call


def _norm_after_the_join(right: Any) -> Any:
    def call(self: Any, x: mx.array) -> mx.array:
        joined = x.reshape(-1, self._width)
        wide = mx.tile(self.norm.weight, 4), mx.tile(self.norm.bias, 4)
        joined = mx.fast.layer_norm(joined, *wide, 1e-6)
        return self.linear_fc2(nn.gelu(self.linear_fc1(joined)))

    return call


def _exact_gelu(right: Any) -> Any:
    return lambda self, x: self.linear_fc2(nn.gelu(self.linear_fc1(x)))


def _tanh_gelu(right: Any) -> Any:
    def call(self: Any, x: mx.array) -> mx.array:
        x = self.norm(x).reshape(-1, self._width)
        return self.linear_fc2(nn.gelu_approx(self.linear_fc1(x)))

    return call


def _features_of_the_first(right: Any) -> Any:
    """Every picture is answered from the features of the first, as far as they go."""

    def call(features: dict[bytes, np.ndarray], ids: list[int]) -> mx.array | None:
        first = next(iter(features.values()))
        return right({d: np.resize(first, f.shape) for d, f in features.items()}, ids)

    return call


MISTAKES: dict[str, Patch] = {
    "positions of one dimension": replaced(parity, "media_positions", lambda _: _one_dimensional),
    "rows and columns swapped": replaced(parity, "media_positions", _swapped),
    "time counts frame groups": replaced(parity, "media_positions", _time_counts_groups),
    "delta lost": replaced(parity, "media_positions", _longer_side_not_added),
    "attention across frame groups": replaced(vision.VisionAttention, "__call__", _across_groups),
    "corners not aligned": replaced(vision, "interpolation", _corners_not_aligned),
    "patches in raster order": replaced(
        vision, "block_order", lambda _: lambda h, w, merge: np.arange(h * w)
    ),
    "one temporal slice": replaced(vision.PatchEmbed, "__call__", _one_slice),
    "no bias of patches": replaced(vision.PatchEmbed, "__call__", _without_bias),
    "blue, green, red": _tower_input(_channels_reversed),
    "grid turned": _tower_input(lambda x, grid: (x, (grid[0], grid[2], grid[1]))),
    "pixels in bfloat16": _tower_input(
        lambda x, grid: (x.astype(mx.bfloat16).astype(mx.float32), grid)
    ),
    "exact GELU in the blocks": replaced(vision.VisionMLP, "__call__", _exact_gelu),
    "tanh GELU in the merger": replaced(vision.PatchMerger, "__call__", _tanh_gelu),
    "norm after the join": replaced(vision.PatchMerger, "__call__", _norm_after_the_join),
    "columns before rows in the tower": replaced(
        vision, "rotary_angles", _rotated_by_columns_first
    ),
    "features of another picture": replaced(parity, "rows_of", _features_of_the_first),
}


def mistaken(pair: Pair, mistake: Patch, prompt: parity.Prompt) -> np.ndarray:
    """Our logits of a prompt with a mistake, read in pieces of 37."""
    with pytest.MonkeyPatch.context() as patch:
        mistake(patch)
        return parity.read(pair.ours, prompt, parity.cut(prompt, 37))


def interleaved_wrongly(pair: Pair, prompt: parity.Prompt) -> np.ndarray:
    """Sections one after the other: it is decided when the model is made."""
    config = pair.ours.config
    right, wrong = (
        [mx.array(axes(config.rope.rotary_dim // 2, config.rope.mrope_section))]
        for axes in (rope.frequency_axes, _sectioned)
    )
    ropes = [layer.self_attn.rope for layer in pair.ours.layers if not layer.is_linear]
    try:
        for one in ropes:
            one._axes = wrong[0]
        return parity.read(pair.ours, prompt, parity.cut(prompt, 37))
    finally:
        for one in ropes:
            one._axes = right[0]


def mixed(pair: Pair) -> tuple[parity.Prompt, np.ndarray]:
    *_, draw = pair.maker.prompts()
    return pair.settled(draw)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_exceeds_the_gate(dense: Pair, name: str) -> None:
    prompt, expected = mixed(dense)
    assert over_std(parity.read(dense.ours, prompt, parity.cut(prompt, 37)), expected) <= GATE
    assert over_std(mistaken(dense, MISTAKES[name], prompt), expected) > GATE


def test_sections_one_after_the_other_exceed_the_gate(dense: Pair) -> None:
    prompt, expected = mixed(dense)
    assert over_std(interleaved_wrongly(dense, prompt), expected) > GATE


def test_the_outer_pair_of_a_video_counts(dense: Pair) -> None:
    """With two tokens more, what follows is another text: one of the two wrappers is wrong."""
    prompt, expected = dense.settled(
        lambda: dense.maker.prompt("video", 6, dense.maker.clip(4, 2, 3), 7)
    )
    inner = prompt.ids[6 : -7 - NUM_STEPS]
    wrapped = [
        *prompt.ids[:6],
        parity.START_ID,
        *inner,
        parity.END_ID,
        *prompt.ids[len(inner) + 6 :],
    ]
    other = parity.Prompt("wrapped", wrapped, prompt.shown)
    ours = parity.read(dense.ours, other, parity.cut(other, None))
    assert over_std(ours[-NUM_STEPS:], expected[-NUM_STEPS:]) > GATE
