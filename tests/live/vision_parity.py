"""Random checkpoints with towers in both implementations, prompts with pictures, and readings.

Shared by the live tests and tools/bench_vision.py. Prompts are made of text, pictures and videos;
the official processors have a comparison of their own.
"""

# B batch, T tokens, V vocabulary; h x w grid of tokens of a picture

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra `live` is not installed")

from golden import make_golden as golden  # noqa: E402

from qwen35_mlx.convert import convert  # noqa: E402
from qwen35_mlx.media.pictures import Picture  # noqa: E402
from qwen35_mlx.media.settings import VisionSettings  # noqa: E402
from qwen35_mlx.media.tokens import MediaToken  # noqa: E402
from qwen35_mlx.media.video import Video  # noqa: E402
from qwen35_mlx.model.language import Model  # noqa: E402
from qwen35_mlx.model.loading import load_model  # noqa: E402
from qwen35_mlx.model.rope import media_positions  # noqa: E402

SEED = int(os.environ.get("QWEN35_SEED") or np.random.SeedSequence().entropy % 10**6)
# Of the standard deviation of the logits.
GATE = 6e-4
NUM_STEPS = 12
PIECES = (1, 37, 64)
MIN_ROUTER_MARGIN, MAX_REDRAWS = 1e-4, 20
# The reference compared with itself, whole and in two calls, and with copies whose weights differ
# in the last digit; beyond it the input settles nothing.
MAX_NOISE, NUM_JITTERED = GATE / 4, 3
VOCAB = 97
PICTURE_ID, VIDEO_ID, START_ID, END_ID = 90, 91, 92, 93
NUM_TEXT_IDS = 90
LINEAR, FULL = "linear_attention", "full_attention"


@dataclass
class Prompt:
    """Token ids, with a token for every placeholder, and what is shown."""

    name: str
    ids: list[int]
    shown: list[Any] = field(default_factory=list)

    @property
    def types(self) -> np.ndarray:
        """0 text, 1 picture, 2 video."""
        kinds = {Picture: 1, Video: 2}
        return np.array(
            [kinds[type(i.span.media)] if isinstance(i, MediaToken) else 0 for i in self.ids]
        )

    def reference_inputs(self) -> dict[str, Any]:
        """What the official model takes."""
        placeholders = {1: PICTURE_ID, 2: VIDEO_ID}
        ids = [placeholders.get(t, int(i)) for i, t in zip(self.ids, self.types, strict=True)]
        inputs = {
            "input_ids": torch.tensor([ids]),
            "mm_token_type_ids": torch.tensor(self.types[None], dtype=torch.int32),
        }
        names = {Picture: ("pixel_values", "image_grid_thw")}
        names[Video] = ("pixel_values_videos", "video_grid_thw")
        for kind, (pixels, grid) in names.items():
            if shown := [one for one in self.shown if isinstance(one, kind)]:
                inputs[pixels] = torch.from_numpy(np.concatenate([two_slices(s) for s in shown]))
                inputs[grid] = torch.tensor([one.grid for one in shown])
        return inputs


def two_slices(shown: Any) -> np.ndarray:
    """Patches as the official model takes them: of a picture, each frame twice."""
    patches = shown.patches()
    if isinstance(shown, Video):
        return patches
    slices = patches.reshape(len(patches), 3, 1, -1)
    return np.concatenate([slices, slices], axis=2).reshape(len(patches), -1)


class Maker:
    """Makes prompts out of pieces: a number of text tokens, or what to show."""

    def __init__(self, rng: np.random.Generator, settings: VisionSettings):
        self.rng, self.settings = rng, settings

    def picture(self, height: int, width: int) -> Picture:
        """h x w tokens of noise over a gradient."""
        side = self.settings.factor
        pixels = self._pixels(1, height * side, width * side)[0]
        return Picture("noise", (width * side, height * side), pixels, self.settings)

    def clip(self, num_frames: int, height: int, width: int) -> Video:
        side = self.settings.factor
        frames = self._pixels(num_frames, height * side, width * side)
        seconds = tuple(i / 2 for i in range(num_frames))
        return Video("noise", (width * side, height * side), frames, seconds, self.settings)

    def _pixels(self, num_frames: int, height: int, width: int) -> np.ndarray:
        noise = self.rng.integers(0, 128, (num_frames, height, width, 3))
        ramp = np.linspace(0, 127, height * width * 3).reshape(height, width, 3)
        return (noise + ramp).astype(np.uint8)

    def prompt(self, name: str, *pieces: Any) -> Prompt:
        """Frame groups get text between them, as their times are."""
        ids: list[int] = []
        shown = []
        for piece in pieces:
            if isinstance(piece, int):
                ids += self.rng.integers(NUM_TEXT_IDS, size=piece).tolist()
                continue
            shown.append(piece)
            for span in piece.spans:
                if isinstance(piece, Video):
                    ids += self.rng.integers(NUM_TEXT_IDS, size=3).tolist()
                ids += [START_ID, *span.tokens(), END_ID]
        ids += self.rng.integers(NUM_TEXT_IDS, size=NUM_STEPS).tolist()
        return Prompt(name, ids, shown)

    def prompts(self) -> Iterator[Callable[[], Prompt]]:
        """The eighteen; each call of one draws it anew."""
        picture, clip = self.picture, self.clip
        same = self.picture(2, 3)
        pieces: dict[str, Callable[[], tuple[Any, ...]]] = {
            "text alone": lambda: (40,),
            "one token": lambda: (7, picture(1, 1), 9),
            "odd grid": lambda: (5, picture(3, 5), 6),
            "wide strip": lambda: (4, picture(1, 13), 8),
            "tall strip": lambda: (4, picture(17, 1), 8),
            "as narrow as allowed": lambda: (3, picture(1, 166), 3),
            "picture first": lambda: (picture(4, 3), 12),
            "picture last": lambda: (12, picture(3, 4)),
            "three in a turn": lambda: (5, picture(2, 5), picture(4, 4), 3, picture(6, 2), 9),
            "no text between": lambda: (3, picture(3, 3), picture(3, 3), 4),
            "turned grids": lambda: (3, picture(4, 6), 5, picture(6, 4), 4),
            "the same twice": lambda: (3, same, 4, same, 5),
            "many tokens": lambda: (11, picture(18, 25), 11),
            "two turns": lambda: (8, picture(3, 4), 20, picture(5, 2), 10),
            "even video": lambda: (6, clip(6, 2, 3), 7),
            "odd video": lambda: (6, clip(5, 3, 2), 7),
            "two videos": lambda: (4, clip(2, 4, 3), 5, clip(7, 1, 2), 6),
            "mixed": lambda: (3, picture(2, 4), 4, clip(4, 3, 3), 2, picture(5, 3), clip(3, 2, 2)),
        }
        for name, parts in pieces.items():
            yield lambda name=name, parts=parts: self.prompt(name, *parts())


@dataclass
class Pair:
    """One random checkpoint in both implementations."""

    text: str
    reference: golden.Reference
    jittered: list[golden.Reference]
    ours: Model
    maker: Maker

    def settled(self, draw: Callable[[], Prompt]) -> tuple[Prompt, np.ndarray]:
        """A prompt whose answer float32 settles, and the reference's logits `[T, V]`."""
        for _ in range(MAX_REDRAWS):
            prompt = draw()
            logits = self.reference_logits(prompt)
            calm = self.reference.min_router_margin > MIN_ROUTER_MARGIN
            if calm and self._noise(prompt, logits) < MAX_NOISE * logits.std():
                return prompt, logits
        raise AssertionError(f"no settled prompt {prompt.name!r}: seed {SEED}, {self.text}")

    def _noise(self, prompt: Prompt, logits: np.ndarray) -> float:
        inputs = prompt.reference_inputs()
        start = {k: v[:, :-NUM_STEPS] if k in TOKEN_INPUTS else v for k, v in inputs.items()}
        first, cache = self._call(start)
        rest, _ = self.reference(inputs["input_ids"][:, -NUM_STEPS:], cache)
        split = float(np.abs(np.concatenate([first, rest], axis=1)[0] - logits).max())
        others = [self._call(inputs, of=other)[0][0] for other in self.jittered]
        moved = max(float(np.abs(other - logits).max()) for other in others)
        return max(split, moved / golden.JITTER_GAIN)

    def _call(
        self, inputs: dict[str, Any], cache: Any = None, of: golden.Reference | None = None
    ) -> tuple[np.ndarray, Any]:
        reference = of or self.reference
        # It keeps the delta of the last call.
        reference.model.model.rope_deltas = None
        return reference(cache=cache, **{RENAMED.get(k, k): v for k, v in inputs.items()})

    def reference_logits(self, prompt: Prompt) -> np.ndarray:
        """Of the whole prompt in one call, `[T, V]`."""
        self.reference.min_router_margin = float("inf")
        return self._call(prompt.reference_inputs())[0][0]

    def reference_positions(self, prompt: Prompt) -> np.ndarray:
        """`[3, T]`."""
        inputs = prompt.reference_inputs()
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
        index = self.reference.model.model.get_rope_index
        positions, _ = index(**{name: inputs[name] for name in names if name in inputs})
        return positions[:, 0].numpy()


TOKEN_INPUTS = ("input_ids", "mm_token_type_ids")
RENAMED = {"input_ids": "ids"}


def encode(model: Model, prompt: Prompt) -> dict[bytes, np.ndarray]:
    """Features of all that is shown, by digest."""
    tower = model.vision_tower
    assert tower is not None
    return {s.digest: np.array(tower(mx.array(s.patches()), s.grid)) for s in prompt.shown}


def rows_of(features: dict[bytes, np.ndarray], ids: list[int]) -> mx.array | None:
    """The features of the placeholders in a piece."""
    tokens = [token for token in ids if isinstance(token, MediaToken)]
    rows = [
        features[t.span.media.digest][t.span.index * t.span.height * t.span.width + t.index]
        for t in tokens
    ]
    return mx.array(np.stack(rows)) if rows else None


def read(model: Model, prompt: Prompt, pieces: list[int]) -> np.ndarray:
    """Logits `[T, V]` of a prompt that is read in pieces of these sizes."""
    features, cache = encode(model, prompt), model.make_cache()
    num_read = position = 0
    logits = []
    for size in pieces:
        piece = prompt.ids[num_read : num_read + size]
        rows = rows_of(features, piece)
        if rows is None:
            delta = position - num_read
            hidden = model.trunk(mx.array([piece]), cache, rope_delta=delta)
            position += size
        else:
            positions, position = media_positions(piece, position)
            hidden = model.trunk(
                None,
                cache,
                embeddings=model.embed(piece, rows),
                positions=mx.array(positions)[:, None],
            )
        num_read += size
        logits.append(model.head(hidden)[0])
        mx.eval(logits[-1], [entry.state for entry in cache])
    return np.array(mx.concatenate(logits))


def cut(prompt: Prompt, piece: int | None) -> list[int]:
    """Sizes of pieces: the prompt, whole or cut, then steps of one token."""
    num_prompt = len(prompt.ids) - NUM_STEPS
    size = piece or num_prompt
    sizes = [min(size, num_prompt - at) for at in range(0, num_prompt, size)]
    return sizes + [1] * NUM_STEPS


def over_std(ours: np.ndarray, reference: np.ndarray) -> float:
    """The largest difference in standard deviations of the logits."""
    return float(np.abs(ours - reference).max() / reference.std())


def draw_pair(seed: int, index: int, folder: Path) -> Pair:
    """Checkpoint number `index` of a run; dense and mixture of experts take turns."""
    rng = np.random.default_rng([seed, index])

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    is_moe, head_dim = index % 2 == 1, (64, 72)[index // 2 % 2]
    hidden, num_kv_heads, num_key_heads = pick(32, 48, 64), pick(1, 2), pick(1, 2)
    # Rotated dims and their sections; the last are those of the released models.
    text_dim, rotated, section = pick(
        (64, 0.25, [3, 3, 2]), (32, 0.5, [4, 2, 2]), (48, 0.5, [4, 4, 4]), (64, 1.0, [11, 11, 10])
    )
    dk, dv = pick((8, 16), (32, 16), (16, 32))
    rope = dict(rope_type="default", rope_theta=pick(1e4, 1e7), partial_rotary_factor=rotated)
    text = dict(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_attention_heads=num_kv_heads * pick(2, 3),
        num_key_value_heads=num_kv_heads,
        head_dim=text_dim,
        linear_num_key_heads=num_key_heads,
        linear_num_value_heads=num_key_heads * pick(1, 2),
        linear_key_head_dim=dk,
        linear_value_head_dim=dv,
        max_position_embeddings=4096,
        tie_word_embeddings=pick(True, False),
        layer_types=[LINEAR, FULL] * 2,
        num_hidden_layers=4,
        rope_parameters=rope | dict(mrope_interleaved=True, mrope_section=section),
    )
    if is_moe:
        text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                     shared_expert_intermediate_size=24)  # fmt: skip
    else:
        text["intermediate_size"] = pick(56, 96)
    num_heads, side, patch = pick(1, 2), pick(5, 7, 9), pick(2, 3, 4)
    vision = dict(
        depth=pick(2, 3),
        hidden_size=num_heads * head_dim,
        intermediate_size=pick(100, 200),
        num_heads=num_heads,
        patch_size=patch,
        num_position_embeddings=side**2,
        out_hidden_size=hidden,
    )
    ids = dict(image_token_id=PICTURE_ID, video_token_id=VIDEO_ID, vision_start_token_id=START_ID,
               vision_end_token_id=END_ID)  # fmt: skip
    model = golden.build("qwen3_5_moe" if is_moe else "qwen3_5", text, rng, vision, **ids)
    golden.randomize_tower(model, rng)
    golden.save_checkpoint(model, folder / "source", fused_experts=True)
    converted = convert(folder / "source", folder / "converted", dtype="float32")
    settings = VisionSettings(patch, 2, 2, (0.5,) * 3, (0.5,) * 3, (2 * patch) ** 2, 2**24)
    text_line = f"{'moe' if is_moe else 'dense'} {vision} {text}"
    jittered = [golden.jittered(model, rng) for _ in range(NUM_JITTERED)]
    ours = load_model(converted)[0]
    pair = Pair(text_line, golden.Reference(model), jittered, ours, Maker(rng, settings))
    assert pair.ours.vision_tower is not None
    return pair
