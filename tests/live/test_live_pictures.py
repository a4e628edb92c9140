"""Whole conversations with pictures and videos: ids, positions and logits of the official code."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra `live` is not installed")

from live.reference_processor import reference_processor  # noqa: E402
from PIL import Image  # noqa: E402
from shown import shape, some_shapes, with_videos  # noqa: E402
from transformers import AutoTokenizer, Qwen3_5MoeForConditionalGeneration  # noqa: E402

import qwen35_mlx  # noqa: E402
from qwen35_mlx.convert import convert  # noqa: E402
from qwen35_mlx.engine.prompt_cache import PromptCache  # noqa: E402
from qwen35_mlx.files import read_object  # noqa: E402
from qwen35_mlx.media import settings as media_settings  # noqa: E402
from qwen35_mlx.media.tokens import MediaToken  # noqa: E402
from qwen35_mlx.model.rope import media_positions  # noqa: E402
from qwen35_mlx.prompt import encode_messages, without_media  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("default")]

DEMO = Path(qwen35_mlx.__file__).parent / "demo"
# Of the standard deviation of the logits.
GATE = 6e-4
MAX_VIDEO_PIXELS = 48 * 48 * 64
RED, BLUE, *MORE = [shape("circle", "red"), shape("star", "blue"), *some_shapes(6)]
WIDE = np.tile(RED, (1, 3, 1))


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(pixels: np.ndarray) -> dict[str, Any]:
    return {"type": "image", "image": pixels}


def video(frames: list[np.ndarray], fps: float) -> dict[str, Any]:
    return {"type": "video", "video": frames, "fps": fps}


def said(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
CONVERSATIONS = {
    "one picture": [user(image(RED), text("What is in the picture?"))],
    "between words": [user(text("Before"), image(RED), text("between"), image(WIDE), text("end"))],
    "two turns": [
        user(image(RED), text("What is in the picture?")),
        said("A red circle."),
        user(image(BLUE), image(RED), text("What is in the picture?")),
    ],
    "of a tool": [
        user(text("Look at it.")),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": [image(BLUE), text("seen")]},
    ],
    "of the assistant": [
        user(text("Show me one.")),
        {"role": "assistant", "content": [image(RED), text("Here.")]},
        user(text("Thanks. What is it?")),
    ],
    "video": [user(video(MORE[:4], 2.0), text("What moves?"))],
    "odd video": [user(video(MORE[:5], 1.5), text("What moves?"))],
    "videos and pictures": [
        user(image(RED), video(MORE[:5], 2.0), text("and"), video(MORE[1:5], 1.0)),
        said("Shapes."),
        user(video([BLUE] * 6, 3.0), image(WIDE), text("And now?")),
    ],
}


@pytest.fixture(scope="module")
def official() -> tuple[Any, Any]:
    """The demo and its processor as transformers has them."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = (DEMO / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = with_videos_template(tokenizer.chat_template)
    settings = read_object(DEMO / "preprocessor_config.json")
    names = "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std"
    size = {"shortest_edge": 48 * 48, "longest_edge": MAX_VIDEO_PIXELS}
    videos = {name: settings[name] for name in names} | {"size": size}
    pictures = {name: settings[name] for name in (*names, "size")}
    model = Qwen3_5MoeForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32)
    return model.eval(), reference_processor(pictures, videos, tokenizer)


def with_videos_template(template: str) -> str:
    class Named:
        chat_template = template
        vision = media_settings.VisionSettings(8, 2, 2, (0.5,) * 3, (0.5,) * 3, 1, 1)

    return str(with_videos(Named()).chat_template)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same weights in float32; the transformers' processor keeps a video's outer pair."""
    folder = convert(DEMO, tmp_path_factory.mktemp("demo") / "float32", dtype="float32")
    model, tokenizer = qwen35_mlx.load(folder)
    yield model, with_videos(tokenizer)
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def with_outer_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_settings, "KEEPS_OUTER_PAIR", True)


def official_inputs(processor: Any, messages: list[Any]) -> Any:
    """What the official processor makes of the messages."""
    parts = [p for m in messages if isinstance(m["content"], list) for p in m["content"]]
    pictures = [Image.fromarray(p["image"]) for p in parts if p["type"] == "image"]
    videos = [p for p in parts if p["type"] == "video"]
    shown = [
        {**m, "content": [{"type": p["type"]} if p["type"] != "text" else p for p in m["content"]]}
        if isinstance(m["content"], list)
        else m
        for m in messages
    ]
    prompt = processor.tokenizer.apply_chat_template(
        shown, tokenize=False, add_generation_prompt=True
    )
    options: dict[str, Any] = {"images": pictures} if pictures else {}
    if videos:
        options["videos"] = [np.stack(v["video"]).transpose(0, 3, 1, 2) for v in videos]
        options["video_metadata"] = [
            {"total_num_frames": len(v["video"]), "fps": v["fps"]} for v in videos
        ]
    return processor(text=[prompt], return_tensors="pt", return_mm_token_type_ids=True, **options)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_positions_and_logits_are_those_of_transformers(
    official: Any, ours: Any, name: str
) -> None:
    reference, processor = official
    model, tokenizer = ours
    messages = CONVERSATIONS[name]
    inputs = official_inputs(processor, messages)
    ids = encode_messages(tokenizer, messages, add_generation_prompt=True)
    assert without_media(tokenizer, ids) == inputs["input_ids"][0].tolist()
    types = inputs["mm_token_type_ids"][0].numpy()
    np.testing.assert_array_equal([isinstance(i, MediaToken) for i in ids], types > 0)
    grids = {k: inputs[k] for k in ("image_grid_thw", "video_grid_thw") if k in inputs}
    # It keeps what it found for the last prompt.
    reference.model.rope_deltas = None
    expected, delta = reference.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], **grids
    )
    positions, following = media_positions(ids, 0)
    np.testing.assert_array_equal(positions, expected[:, 0].numpy())
    assert following - len(ids) == delta.item()
    with torch.no_grad():
        logits = reference(**inputs).logits[0, -1].numpy()
    for step_size in (7, None):
        hidden = PromptCache(model).read(ids, step_size=step_size)
        read = np.array(model.head(hidden)[0, -1])
        assert np.abs(read - logits).max() <= GATE * logits.std()
