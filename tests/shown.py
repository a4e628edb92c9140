"""Pictures for tests with the demo, which knows coloured shapes; a tokenizer that knows videos."""

import base64
import copy
import io
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from pictures import COLOURS, SHAPES, paint
from PIL import Image

from qwen35_mlx.media.pictures import Picture
from qwen35_mlx.model.language import Model
from qwen35_mlx.model.rope import media_positions

ASK = "What is in the picture?"
DIRECT = {"enable_thinking": False, "temperature": 0.0}


def shape(kind: str = "circle", colour: str = "red") -> np.ndarray:
    """A shape in the middle."""
    return paint(kind, colour, 24, 24, 14)


def some_shapes(num: int) -> list[np.ndarray]:
    """Different ones."""
    kinds = [(s, c) for c in COLOURS for s in SHAPES]
    return [shape(*kind) for kind in kinds[:num]]


def png(pixels: np.ndarray) -> bytes:
    """As a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_url(pixels: np.ndarray) -> str:
    """As OpenAI's API takes it."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def user(text: str, *pixels: Any) -> dict[str, Any]:
    """A message with pictures."""
    parts = [{"type": "image", "image": p} for p in pixels]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def noise(tokenizer: Any, height: int, width: int, seed: int = 0) -> Picture:
    """A picture of h x w tokens."""
    side = tokenizer.vision.factor
    size = (height * side, width * side, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return Picture("noise", (width * side, height * side), pixels, tokenizer.vision)


def with_videos(tokenizer: Any) -> Any:
    """The demo's template and settings say nothing of videos; its tower can read them."""
    changed = copy.copy(tokenizer)
    image = "{%- if 'image' in item"
    assert image in tokenizer.chat_template
    changed.chat_template = tokenizer.chat_template.replace(
        image,
        "{%- if item.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
        "{%- elif 'image' in item",
        1,
    )
    changed.vision = replace(
        tokenizer.vision, video_min_pixels=48 * 48, video_max_pixels=48 * 48 * 64
    )
    return changed


def fresh_logits(model: Model, ids: list[int]) -> np.ndarray:
    """Behind a prompt that is read at once, without any of the engine's caches."""
    tokens = [i for i in ids if i < 0]
    media = list({id(t.span.media): t.span.media for t in tokens}.values())  # type: ignore[attr-defined]
    positions, _ = media_positions(ids, 0)
    features = None
    if media:
        rows = []
        encoded = {id(one): model.vision_tower(mx.array(one.patches()), one.grid) for one in media}
        for t in tokens:
            span = t.span  # type: ignore[attr-defined]
            place = span.index * span.height * span.width + t.index  # type: ignore[attr-defined]
            rows.append(encoded[id(span.media)][place])
        features = mx.stack(rows)
    hidden = model.trunk(
        None,
        model.make_cache(),
        embeddings=model.embed(ids, features),
        positions=mx.array(positions)[:, None],
        last_only=True,
    )
    return np.array(model.head(hidden)[0, -1].astype(mx.float32))
