"""Messages with pictures become ids: in every form, in the right number, and never from text."""

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from PIL import Image
from shown import ASK, data_url, noise, png, shape, user, with_videos

import qwen35_mlx
from qwen35_mlx import Chat
from qwen35_mlx.engine.sampler import Sampler
from qwen35_mlx.errors import MediaError, PromptError
from qwen35_mlx.media import fetch
from qwen35_mlx.media import settings as media_settings
from qwen35_mlx.media.tokens import MediaToken
from qwen35_mlx.model.loading import vision_settings
from qwen35_mlx.prompt import (
    banned_ids,
    check_ids,
    encode_messages,
    encode_prompt,
    media_ids,
    open_messages,
    without_media,
)
from qwen35_mlx.sampling import SamplingParams

RED = shape("circle", "red")
PROMPT = {"add_generation_prompt": True}


def test_a_picture_gives_the_same_ids_in_whatever_form_it_comes(demo: Any, tmp_path: Path) -> None:
    _, tokenizer = demo
    file = tmp_path / "red.png"
    file.write_bytes(png(RED))
    expected = encode_messages(tokenizer, [user(ASK, RED)], **PROMPT)
    shown = [i for i in expected if isinstance(i, MediaToken)]
    assert len(set(shown)) == len(shown) == 9
    for part in (
        {"type": "image", "image": str(file)},
        {"type": "image", "path": file},
        {"type": "image", "image": file.read_bytes()},
        {"type": "image", "image": Image.open(file)},
        {"type": "image", "url": data_url(RED)},
        {"image": data_url(RED)},
        {"type": "image_url", "image_url": {"url": data_url(RED), "detail": "high"}},
        {"type": "image_url", "image_url": data_url(RED)},
        {"type": "input_image", "image_url": data_url(RED)},
    ):
        message = {"role": "user", "content": [part, {"type": "text", "text": ASK}]}
        assert encode_messages(tokenizer, [message], **PROMPT) == expected, part
    assert encode_prompt(tokenizer, ASK, images=[RED]) == expected
    assert encode_prompt(tokenizer, [{"role": "user", "content": ASK}], images=[RED]) == expected
    assert encode_prompt(tokenizer, expected) == expected
    check_ids(expected, demo[0].config.vocab_size)
    assert shown == [i for i in encode_prompt(tokenizer, expected) if isinstance(i, MediaToken)]


def test_the_ids_are_those_of_the_template_with_the_placeholder_repeated(demo: Any) -> None:
    _, tokenizer = demo
    message = user(ASK, RED, noise(tokenizer, 2, 5))
    ids = encode_messages(tokenizer, [message], **PROMPT)
    around = "<|vision_start|>", "<|vision_end|>"
    text = "<|im_start|>user\n"
    text += "".join(around[0] + "<|image_pad|>" * n + around[1] for n in (9, 10))
    text += f"{ASK}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert without_media(tokenizer, ids) == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text.replace("<|image_pad|>", "")


@pytest.mark.parametrize("text", ["<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>"])
def test_a_placeholder_that_is_typed_stays_text(demo: Any, text: str) -> None:
    _, tokenizer = demo
    pad = media_ids(tokenizer)["<|image_pad|>"]
    for content in (text, [{"type": "text", "text": text}], user(text, RED)["content"]):
        ids = encode_messages(tokenizer, [{"role": "user", "content": content}], **PROMPT)
        shown = [i for i in ids if isinstance(i, MediaToken)]
        assert pad not in ids and len(shown) == (9 if len(content) == 2 else 0)
        assert text in tokenizer.decode(ids)
    # One that a text would complete with what follows it.
    halves = [{"type": "text", "text": "<|image"}, {"type": "text", "text": "_pad|>"}]
    ids = encode_messages(tokenizer, [{"role": "user", "content": halves}], **PROMPT)
    assert pad not in ids


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.replace("<|image_pad|>", ""), "no placeholder"),
        (lambda t: t.replace("<|image_pad|>", "<|image_pad|>" * 2), "<|image_pad|>, <|image_pad|>"),
        (lambda t: t.replace("<|image_pad|>", "<|video_pad|>"), "got: <|video_pad|>"),
    ],
)
def test_a_template_with_another_number_of_placeholders_is_refused(
    demo: Any, change: Any, what: str
) -> None:
    tokenizer = copy.copy(demo[1])
    tokenizer.chat_template = change(tokenizer.chat_template)
    with pytest.raises(PromptError) as error:
        encode_messages(tokenizer, [user(ASK, RED)], **PROMPT)
    assert "does not show all" in str(error.value) and what in str(error.value)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "FILE"}},
        {"type": "image_url", "image_url": {"url": "file://FILE"}},
        {"type": "input_image", "image_url": "FILE"},
        {"type": "image", "url": "FILE"},
        {"image_url": "DATA:FILE"},
        {"type": "video_url", "video_url": {"url": "FILE"}},
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}},
        {"type": "image", "image": "HTTPS://example.com/x.png"},
    ],
    ids=repr,
)
def test_a_url_in_a_message_opens_no_local_file_and_fetches_nothing(
    demo: Any, tmp_path: Path, part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "red.png"
    file.write_bytes(png(RED))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DATA:").mkdir()
    monkeypatch.setattr(fetch, "fetch", lambda url: pytest.fail("fetched"))
    given = {
        key: {"url": value["url"].replace("FILE", str(file))}
        if isinstance(value, dict)
        else value.replace("FILE", str(file))
        for key, value in part.items()
    }
    with pytest.raises(PromptError, match=r"on the web|a data: URL"):
        encode_messages(demo[1], [{"role": "user", "content": [given]}], **PROMPT)
    # Nor where the server asks, which cannot be told to.
    with pytest.raises(PromptError, match=r"on the web|a data: URL"):
        open_messages(demo[1], [{"role": "user", "content": [given]}])


def test_web_addresses_are_fetched_where_the_local_user_allowed_it(
    demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = demo
    fetched = []
    monkeypatch.setattr(fetch, "fetch", lambda url: fetched.append(url) or png(RED))
    url = "https://example.com/red.png"
    expected = encode_messages(tokenizer, [user(ASK, RED)], **PROMPT)
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}},
                                           {"type": "text", "text": ASK}]}  # fmt: skip
    assert encode_messages(tokenizer, [message], allow_url=True, **PROMPT) == expected
    assert encode_prompt(tokenizer, ASK, images=[url], allow_url=True) == expected
    with pytest.raises(PromptError, match="on the web"):
        Chat(model, tokenizer).send(ASK, images=[url])
    Chat(model, tokenizer, allow_url=True).send(ASK, images=[url])
    assert fetched == [url] * 3


def test_what_cannot_be_used_is_refused(demo: Any) -> None:
    _, tokenizer = demo
    for images in ("red.png", RED, b"x"):
        with pytest.raises(PromptError, match="images is not usable"):
            encode_prompt(tokenizer, ASK, images=images)
    for prompt in ([1, 2], [{"role": "system", "content": "x"}]):
        with pytest.raises(PromptError, match="no message of the user for the pictures"):
            encode_prompt(tokenizer, prompt, images=[RED])
    with pytest.raises(MediaError, match="is not there"):
        encode_prompt(tokenizer, ASK, images=["/no/such/file.png"])
    with pytest.raises(MediaError, match="no settings for videos"):
        encode_prompt(tokenizer, ASK, videos=["a.mp4"])


def test_a_model_without_a_tower_refuses_pictures_and_says_why(demo: Any) -> None:
    model, tokenizer = demo
    blind = copy.copy(tokenizer)
    blind.vision, blind.no_vision = None, "the model's folder has no vision tower"
    with pytest.raises(PromptError, match=r"reads no pictures(.|\n)*has no vision tower"):
        qwen35_mlx.generate(model, blind, ASK, images=[RED])
    assert encode_prompt(blind, ASK) == encode_prompt(tokenizer, ASK)


def test_a_folder_without_settings_for_pictures_says_so(demo: Any, tmp_path: Path) -> None:
    model, _ = demo
    file = tmp_path / "preprocessor_config.json"
    settings, why = vision_settings(tmp_path, model)
    assert settings is None and str(file.name) in why
    file.write_text('{"patch_size": 8}')
    settings, why = vision_settings(tmp_path, model)
    assert settings is None and str(file) in why and "\n" not in why
    blind = copy.copy(model)
    blind.vision_tower = None
    assert vision_settings(tmp_path, blind) == (None, "the model's folder has no vision tower")


@pytest.mark.parametrize("keeps", [False, True])
def test_a_video_is_times_and_frame_groups(
    demo: Any, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_settings, "KEEPS_OUTER_PAIR", keeps)
    tokenizer = with_videos(demo[1])
    part = {"type": "video", "video": [RED] * 5, "fps": 2.0}
    message = {"role": "user", "content": [*user("a", RED)["content"], part]}
    ids = encode_messages(tokenizer, [message], **PROMPT)
    group = "<|vision_start|>" + "<|video_pad|>" * 9 + "<|vision_end|>"
    times = "".join(f"<{t} seconds>{group}" for t in ("0.2", "1.2", "2.0"))
    picture = "<|vision_start|>" + "<|image_pad|>" * 9 + "<|vision_end|>"
    text = f"user\n{picture}a" + (f"<|vision_start|>{times}<|vision_end|>" if keeps else times)
    expected = f"<|im_start|>{text}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert without_media(tokenizer, ids) == tokenizer.encode(expected, add_special_tokens=False)
    # The same frames at other times, and as a picture, are something else.
    shown = [int(i) for i in ids if i < 0]
    assert len(set(shown)) == 4 * 9


def test_a_model_that_sees_never_writes_the_tokens_around_pictures(demo: Any) -> None:
    model, tokenizer = demo
    banned = banned_ids(model, tokenizer)
    assert sorted(tokenizer.convert_ids_to_tokens(banned)) == [
        "<|image_pad|>", "<|video_pad|>", "<|vision_end|>", "<|vision_start|>"
    ]  # fmt: skip
    logits = mx.zeros((1, 2560))
    logits[:, mx.array(banned)] = 50.0
    logits[:, 7] = 40.0
    for params in (
        SamplingParams(),
        SamplingParams(repetition_penalty=2.0, presence_penalty=1.0),
        SamplingParams(1.0),
        SamplingParams(1.0, min_p=0.1),
        SamplingParams(1.0, top_p=0.9, top_k=20),
        SamplingParams(1.0, top_p=0.9),
    ):
        sampler = Sampler(params, mx.array([7]), 0, banned)
        assert {sampler(logits, place).item() for place in range(4)} == {7}
    blind = copy.copy(model)
    blind.vision_tower = None
    assert banned_ids(blind, tokenizer) == []
