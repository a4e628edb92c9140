"""Small pictures of one shape in one colour, and questions about them.

`python tools/demo/pictures.py` paints the one in the package.
"""

import math
import random
from pathlib import Path

import numpy as np
from split import Sample, assistant, draw

SHIPPED = Path(__file__).parents[2] / "qwen35_mlx" / "demo" / "picture.png"
SHIPPED_SEED = 2
SIDE = 48
GRID = 3  # merged image tokens per side
COLOURS = {
    "red": (214, 40, 40), "green": (46, 160, 67), "blue": (37, 99, 235),
    "yellow": (250, 204, 21), "black": (20, 20, 20), "purple": (147, 51, 190),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "star")
ASK = (
    "What is in the picture?",
    "Which shape and colour do you see?",
    "Describe the picture.",
    "What do you see?",
    "What shape is this and what colour?",
)
ASK_COLOUR = ("What colour is it?", "Which colour does the shape have?", "What color do you see?")
ASK_SHAPE = ("What shape is it?", "Which shape do you see?", "Name the shape.")


def paint(shape: str, colour: str, x: int, y: int, radius: int) -> np.ndarray:
    """`[48, 48, 3]` uint8: the shape around (x, y) on a light ground, edges smoothed."""
    # Imported here, because the tokenizer and the text skills do not need Pillow.
    from PIL import Image, ImageDraw

    scale = 4
    image = Image.new("RGB", (SIDE * scale, SIDE * scale), (245, 245, 240))
    pen = ImageDraw.Draw(image)
    fill, cx, cy, r = COLOURS[colour], x * scale, y * scale, radius * scale

    def ring(num: int, size: float, turn: float) -> list[tuple[float, float]]:
        angles = [2 * math.pi * i / num + turn for i in range(num)]
        return [(cx + size * math.sin(a), cy - size * math.cos(a)) for a in angles]

    if shape == "circle":
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)
    elif shape == "square":
        pen.rectangle((cx - r * 0.85, cy - r * 0.85, cx + r * 0.85, cy + r * 0.85), fill=fill)
    elif shape == "triangle":
        pen.polygon(ring(3, r * 1.1, 0), fill=fill)
    elif shape == "cross":
        pen.rectangle((cx - r, cy - r * 0.3, cx + r, cy + r * 0.3), fill=fill)
        pen.rectangle((cx - r * 0.3, cy - r, cx + r * 0.3, cy + r), fill=fill)
    else:
        outer, inner = ring(5, r * 1.1, 0), ring(5, r * 0.45, math.pi / 5)
        pen.polygon([p for pair in zip(outer, inner, strict=True) for p in pair], fill=fill)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def patches(pictures: list[np.ndarray], patch: int = 8, merge: int = 2) -> np.ndarray:
    """`[n * 36, 3 * 2 * 8 * 8]` float32 as Qwen's image processor orders them, in [-1, 1]."""
    pixels = np.stack(pictures).astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1
    grid = SIDE // patch // merge
    blocks = pixels.reshape(len(pictures), 3, grid, merge, patch, grid, merge, patch)
    blocks = blocks.transpose(0, 2, 5, 3, 6, 1, 4, 7)  # [n, gh, gw, mh, mw, 3, patch, patch]
    flat = np.repeat(blocks[..., None, :, :], 2, axis=-3)  # both frames of a still are equal
    return np.ascontiguousarray(flat).reshape(-1, 3 * 2 * patch * patch)


def picture(rng: random.Random, held_out: bool) -> Sample:
    """A question about a generated picture; the split is by position and size."""

    def place(r: random.Random) -> tuple[str, str, int, int, int]:
        radius = r.randint(9, 17)
        x, y = (r.randint(radius + 3, SIDE - radius - 3) for _ in range(2))
        return r.choice(SHAPES), r.choice(list(COLOURS)), x, y, radius

    drawn = draw(place, rng, held_out)
    shape, colour = drawn[:2]
    turns = [(rng.choice(ASK), f"A {colour} {shape}.")]
    if not held_out and rng.random() < 0.5:
        turns.append((rng.choice(ASK_COLOUR), f"It is {colour}."))
        turns.append((rng.choice(ASK_SHAPE), f"It is a {shape}."))
        rng.shuffle(turns)
    thinking = not held_out and rng.random() < 0.2
    messages = []
    for i, (question, answer) in enumerate(turns):
        text = {"type": "text", "text": question}
        content = [{"type": "image"}, text] if i == 0 else question
        messages += [{"role": "user", "content": content}, assistant(answer)]
    if thinking:
        messages[-1]["reasoning_content"] = "I look at the picture."
    return Sample("picture", messages, f"{colour} {shape}", thinking, picture=drawn)


def shown(sample: Sample) -> Sample:
    """The sample with its picture in the message."""
    messages = []
    for message in sample.messages:
        content = message["content"]
        if isinstance(content, list):
            painted = {"type": "image", "image": paint(*sample.picture)}
            content = [painted if part["type"] == "image" else part for part in content]
        messages.append({**message, "content": content})
    return sample._replace(messages=messages)


def shipped() -> Sample:
    """The picture in the package, one of the held-out ones."""
    return picture(random.Random(SHIPPED_SEED), held_out=True)


if __name__ == "__main__":
    from PIL import Image

    Image.fromarray(paint(*shipped().picture)).save(SHIPPED, optimize=True)
