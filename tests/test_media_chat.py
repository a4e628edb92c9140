"""Conversations about pictures: what is kept, taken back, said again and saved."""

import copy
import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shown import ASK, fresh_logits, noise, png, shape, some_shapes, user, with_videos

from qwen35_mlx import Chat
from qwen35_mlx.chat.saved_pictures import pictures_folder, remove_media
from qwen35_mlx.chat.sessions import (
    cache_folder,
    list_sessions,
    remove_session,
    session_file,
)
from qwen35_mlx.engine.segments import Segments
from qwen35_mlx.errors import ContextFull, MediaError, PromptError, SessionError
from qwen35_mlx.text.media_parts import text_of

RED, BLUE = shape("circle", "red"), shape("star", "blue")
COLOUR = "What colour is it?"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN35_MLX_SESSIONS", str(tmp_path / "sessions"))
    return tmp_path / "sessions"


def new_chat(demo: Any, **options: Any) -> Chat:
    options = {
        "enable_thinking": False,
        "max_tokens": 12,
        "sampling": {"temperature": 0.0},
    } | options
    return Chat(*demo, **options)


def said(turn: Any) -> str:
    return "".join(piece.text for piece in turn)


def test_a_picture_is_named_read_once_and_stays_in_the_conversation(demo: Any) -> None:
    chat = new_chat(demo)
    assert said(chat.send(ASK, images=[RED])) == "A red circle."
    assert chat.stats.pictures_encoded == 1
    assert chat.stats.prefilled_tokens == chat.stats.prompt_tokens
    chat.read_ahead()
    assert said(chat.send(COLOUR)) == "It is red."
    assert chat.stats.pictures_encoded == 0
    message = len(chat.tokenizer.encode(COLOUR))
    assert chat.stats.prefilled_tokens <= message + 10


@pytest.mark.slow
def test_edit_retry_and_undo_keep_the_pictures(demo: Any) -> None:
    chat = new_chat(demo)
    said(chat.send(ASK, images=[RED]))
    shown = chat.last_media()
    assert said(chat.edit(COLOUR)) == "It is red."
    assert chat.last_media() == shown and chat.last_message() == COLOUR
    assert said(chat.regenerate()) == "It is red."
    assert chat.undo() == COLOUR and chat.messages == []
    assert said(chat.send(COLOUR)) == "It is red."
    assert chat.last_media() == shown
    assert chat.prefixes.features.num_encoded == 1
    assert said(chat.edit(COLOUR, images=[BLUE])) == "It is blue."
    assert said(chat.edit("Who are you?", images=[])) and chat.last_media() == []
    # Another text is another message, and so is the same one with its pictures named.
    said(chat.edit(ASK, images=[RED]))
    for text, images in ((COLOUR, None), (ASK, [])):
        chat.undo()
        said(chat.send(text, images=images))
        assert chat.last_media() == []
        chat.edit(ASK, images=[RED])
    # A new conversation does not know what was undone in the last one.
    said(chat.edit(ASK, images=[RED]))
    text = chat.undo()
    chat.restart()
    said(chat.send(text))
    assert chat.last_media() == []


@pytest.mark.slow
def test_edit_replaces_pictures_and_videos_each_for_themselves(demo: Any) -> None:
    tokenizer = with_videos(demo[1])
    chat = new_chat((demo[0], tokenizer), max_tokens=1)
    chat.send(ASK)
    said(chat.send(ASK, images=[RED, BLUE], videos=[[RED] * 4]))
    kinds = [type(one).__name__ for one in chat.last_media()]
    assert kinds == ["Picture", "Picture", "Video"]
    said(chat.edit(ASK, images=[BLUE]))
    assert sorted(type(one).__name__ for one in chat.last_media()) == ["Picture", "Video"]
    said(chat.edit(ASK, videos=[]))
    assert [type(one).__name__ for one in chat.last_media()] == ["Picture"]


@pytest.mark.slow
def test_what_cannot_be_opened_changes_nothing(demo: Any) -> None:
    chat = new_chat(demo)
    said(chat.send(ASK, images=[RED]))
    before, ids = list(chat.messages), list(chat._cache.ids)  # type: ignore[union-attr]
    for call in (chat.send, chat.edit):
        with pytest.raises(MediaError, match="is not there"):
            call("And this?", images=[BLUE, "/no/such/file.png"])
    wide = noise(chat.tokenizer, 65, 64)
    with pytest.raises(ContextFull, match="longer than the model's context"):
        said(chat.send("And this?", images=[wide]))
    blind = copy.copy(chat.tokenizer)
    blind.vision, blind.no_vision = None, "the model's folder has no vision tower"
    chat.tokenizer, seeing = blind, chat.tokenizer
    with pytest.raises(PromptError, match="reads no pictures"):
        chat.send("And this?", images=[BLUE])
    chat.tokenizer = seeing
    assert chat.messages == before and list(chat._cache.ids) == ids  # type: ignore[union-attr]
    assert said(chat.send(COLOUR)) == "It is red."


@pytest.mark.slow
def test_pictures_in_messages_and_tool_results(demo: Any) -> None:
    chat = new_chat(
        demo, messages=[user(ASK, RED), {"role": "assistant", "content": "A red circle."}]
    )
    assert said(chat.send(COLOUR)) == "It is red."
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    messages = [{"role": "user", "content": "Look."},
                {"role": "assistant", "content": "", "tool_calls": [call]}]  # fmt: skip
    chat = new_chat(demo, messages=messages, tools=[tool], max_tokens=3)
    parts = [{"type": "image", "image": BLUE}, {"type": "text", "text": "seen"}]
    with pytest.raises(MediaError, match="is not there"):
        chat.answer_tools([[{"type": "image", "image": "/no/such.png"}]])
    said(chat.answer_tools([parts]))
    assert chat.stats.pictures_encoded == 1
    assert [text_of(m["content"]) for m in chat.messages[:3]] == ["Look.", "", "seen"]
    # Anything else is JSON, as before.
    chat = new_chat(demo, messages=messages, tools=[tool], max_tokens=3)
    said(chat.answer_tools([[{"text": "no picture"}]]))
    assert chat.messages[2]["content"] == '[{"text": "no picture"}]'


@pytest.mark.slow
def test_old_turns_are_dropped_with_their_pictures(demo: Any) -> None:
    model = copy.copy(demo[0])
    model.config = replace(model.config, context_limit=100)
    chat = new_chat((model, demo[1]), max_tokens=1)
    for pixels in some_shapes(3):
        said(chat.send(ASK, images=[pixels]))
    assert chat.drop_oldest() == 2
    assert len(chat.messages) == 2
    said(chat.send(COLOUR))
    assert chat.stats.pictures_encoded == 0


@pytest.mark.slow
def test_a_session_goes_on_without_reading_and_encoding(demo: Any, home: Path) -> None:
    chat = new_chat((demo[0], with_videos(demo[1])), system="Be brief.")
    said(chat.send(ASK, images=[RED]))
    chat.save("seen")
    said(chat.send("And this?", images=[BLUE], videos=[some_shapes(3)]))
    chat.read_ahead()
    chat.save("seen")
    files = sorted(f.suffix for f in pictures_folder(session_file("seen")).iterdir())
    assert files == [".png", ".png", ".safetensors"]
    resumed = new_chat((demo[0], chat.tokenizer))
    assert resumed.load("seen") is None
    assert resumed.messages == chat.messages
    assert [one.describe() for one in resumed.last_media()] == [
        one.describe() for one in chat.last_media()
    ]
    resumed.read_ahead()
    assert resumed._read_ahead_tokens == 0
    cache = resumed._cache
    assert cache is not None and cache.features is resumed.prefixes.features
    answers = [said(each.send(COLOUR)) for each in (chat, resumed)]
    assert answers[0] == answers[1]
    assert resumed.stats.prefilled_tokens == chat.stats.prefilled_tokens <= 16
    assert resumed.prefixes.features.num_encoded == 0
    # Back to a point of the file, behind a picture.
    ids = list(cache.ids)
    disk = Segments(cache_folder(session_file("seen")), chat.model)
    cache = disk.read(ids[:-30])
    assert cache is not None and any(token < 0 for token in cache.ids)
    point = len(cache.ids)
    read = np.array(chat.model.head(cache.read(ids[point:]))[0, -1])
    np.testing.assert_allclose(read, fresh_logits(chat.model, ids), atol=3e-4)
    info = list_sessions()[0]
    assert info.first_words == ASK and info.num_turns == 2
    assert info.num_bytes > sum(f.stat().st_size for f in home.glob("seen.*") if f.is_file())
    remove_session("seen")
    assert list_sessions() == [] and list(home.iterdir()) == []


def test_pictures_that_no_one_names_any_more_are_removed(demo: Any) -> None:
    chat = new_chat(demo, max_tokens=1)
    said(chat.send(ASK, images=[RED]))
    chat.save("s")
    folder = pictures_folder(session_file("s"))
    said(chat.edit(ASK, images=[BLUE]))
    chat.save("s", with_cache=False)
    resumed = new_chat(demo)
    assert resumed.load("s") is None and resumed.messages == chat.messages
    assert [f.stem for f in folder.iterdir()] == [chat.last_media()[0].digest.hex()]
    (folder / "other.txt").write_text("not ours")
    remove_session("s")
    assert [f.name for f in folder.iterdir()] == ["other.txt"]


def test_pictures_of_a_session_are_for_its_owner_alone(demo: Any) -> None:
    chat = new_chat(demo, max_tokens=1)
    said(chat.send(ASK, images=[RED]))
    chat.save("s")
    folder = pictures_folder(session_file("s"))
    (file,) = folder.iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, file)] == [0o700, 0o600]
    remove_media(folder)
    assert not folder.exists()
    remove_media(folder)


def test_a_session_reads_no_file_but_its_own_pictures(demo: Any, tmp_path: Path) -> None:
    from qwen35_mlx.chat import sessions

    chat = new_chat(demo, max_tokens=1)
    said(chat.send(ASK, images=[RED]))
    chat.save("s")
    file = session_file("s")
    (picture,) = pictures_folder(file).iterdir()
    outside = tmp_path / f"{picture.stem}.png"
    outside.write_bytes(picture.read_bytes())
    good = json.loads(file.read_text())

    def load_with(part: Any) -> None:
        content = json.loads(json.dumps(good))
        del content["sha256"]
        content["messages"][0]["content"][0] = part
        sealed = {"sha256": sessions._digest_of(content), **content}
        file.write_text(json.dumps(sealed))
        new_chat(demo).load("s")

    part = good["messages"][0]["content"][0]
    load_with(part)
    reference = part["image"]
    for image in (
        str(outside),
        {**reference, "digest": f"../{picture.stem}"},
        {**reference, "digest": str(outside.with_suffix(""))},
        {**reference, "digest": "0" * 64},
        {**reference, "original_size": "big"},
        None,
    ):
        with pytest.raises(SessionError, match="a picture of the session s cannot be read"):
            load_with({"type": "image", "image": image})
    with pytest.raises(SessionError, match="in an unknown form"):
        load_with({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}})
    # Another picture under its name, and no picture at all.
    for data in (png(BLUE), b"", picture.read_bytes()[:60]):
        picture.write_bytes(data)
        with pytest.raises(SessionError, match="a picture of the session s cannot be read"):
            load_with(part)


def test_a_session_with_pictures_needs_a_model_that_sees(demo: Any) -> None:
    chat = new_chat(demo, max_tokens=1)
    said(chat.send(ASK, images=[RED]))
    chat.save("s")
    blind = copy.copy(chat.tokenizer)
    blind.vision, blind.no_vision = None, "the model's folder has no vision tower"
    other = new_chat((demo[0], blind), max_tokens=1)
    said(other.send("Who are you?"))
    before = list(other.messages)
    with pytest.raises(SessionError, match="this model reads none"):
        other.load("s")
    assert other.messages == before


def test_sessions_of_text_stay_what_they_were(demo: Any) -> None:
    """Programs that know no pictures read them, and their files are read here."""
    chat = new_chat(demo)
    said(chat.send("Who are you?"))
    chat.save("s")
    file = session_file("s")
    assert json.loads(file.read_text())["format"] == 1
    assert not pictures_folder(file).exists()
    resumed = new_chat(demo)
    assert resumed.load("s") is None
    assert resumed._cache is not None and len(resumed._cache.ids) > 0
    said(chat.send(ASK, images=[RED]))
    chat.save("s", with_cache=False)
    assert json.loads(file.read_text())["format"] == 2
