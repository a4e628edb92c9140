"""Sessions on disk: they go on without a prefill, and survive whatever happens to the files."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday
from shown import with_videos

from qwen35_mlx import Chat, load
from qwen35_mlx.chat import sessions
from qwen35_mlx.chat.sessions import (
    cache_folder,
    hold,
    list_sessions,
    read_conversation,
    remove_session,
    save_conversation,
    session_file,
    trim_caches,
)
from qwen35_mlx.errors import SessionError
from qwen35_mlx.media.video import open_video
from qwen35_mlx.model import identity

FRANCE, WHO, HOT = "What is the capital of France?", "Who are you?", "What is the opposite of hot?"
GREEDY = {"temperature": 0.0}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN35_MLX_SESSIONS", str(tmp_path / "sessions"))
    return tmp_path / "sessions"


def new_chat(demo: Any, **options: Any) -> Chat:
    return Chat(*demo, max_tokens=10, sampling=GREEDY, **options)


def ask(chat: Chat, text: str) -> str:
    return "".join(piece.text for piece in chat.send(text) if piece.kind == "answer")


def test_a_session_goes_on_without_a_prefill(demo: Any) -> None:
    chat = new_chat(demo, system="Answer briefly.")
    for question in (FRANCE, WHO):
        ask(chat, question)
        chat.read_ahead()
        chat.save("one")
    resumed = new_chat(demo)
    assert resumed.load("one") is None
    assert resumed.messages == chat.messages and resumed.system == "Answer briefly."
    for each in (chat, resumed):
        each.read_ahead()
    assert resumed._read_ahead_tokens == 0
    answers = [ask(each, HOT) for each in (chat, resumed)]
    assert answers[0] == answers[1]
    assert resumed.stats.prefilled_tokens == chat.stats.prefilled_tokens
    message = len(chat.tokenizer.encode(HOT))
    assert resumed.stats.prefilled_tokens <= message + 10
    # Back to the turn before the one that was saved.
    resumed.undo()
    list(resumed.regenerate())
    assert resumed.stats.prefilled_tokens <= 12


@pytest.mark.slow
def test_a_session_left_right_behind_an_answer_reads_no_more_than_that(demo: Any) -> None:
    chat = new_chat(demo)
    ask(chat, FRANCE)
    chat.save("one")
    resumed = new_chat(demo)
    assert resumed.load("one") is None
    for each in (chat, resumed):
        ask(each, WHO)
    assert resumed.stats.prefilled_tokens == chat.stats.prefilled_tokens
    assert resumed.stats.prefilled_tokens < resumed.stats.prompt_tokens


def damage_cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def damage_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def damage_empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("kind", everyday(["keys", "states"], 0))
@pytest.mark.parametrize("damage", everyday([damage_bit, damage_cut, damage_empty], 0))
def test_a_damaged_cache_is_read_again_with_a_warning(
    demo: Any, damage: Callable[[Path], None], kind: str
) -> None:
    chat = new_chat(demo)
    ask(chat, FRANCE)
    folder = cache_folder(chat.save("one"))
    (damaged,) = folder.glob(f"*.{kind}.*")
    damage(damaged)
    resumed = new_chat(demo)
    warning = resumed.load("one")
    assert warning and "read again" in warning
    assert ask(resumed, HOT) == ask(chat, HOT)
    assert resumed.stats.prefilled_tokens == resumed.stats.prompt_tokens
    # Saved again it is whole again.
    resumed.save("one")
    again = new_chat(demo)
    assert again.load("one") is None
    ask(again, WHO)
    assert again.stats.prefilled_tokens < again.stats.prompt_tokens


@pytest.mark.parametrize("damage", [damage_bit, damage_cut, damage_empty])
def test_damaged_words_are_refused(demo: Any, damage: Callable[[Path], None]) -> None:
    chat = new_chat(demo)
    chat.messages.append({"role": "user", "content": "word " * 1000})
    file = chat.save("one")
    damage(file)
    other = new_chat(demo)
    before = list(other.messages)
    with pytest.raises(SessionError, match="damaged"):
        other.load("one")
    assert other.messages == before
    # A link to nothing hid the whole list.
    (file.parent / "gone.json").symlink_to("nowhere")
    assert list_sessions()[0].problem and len(list_sessions()) == 1
    (file.parent / "gone.json").unlink()
    remove_session("one")
    assert list_sessions() == []


def test_the_model_is_not_digested_at_every_saved_turn(
    demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    digested: list[Any] = []
    digest = identity._digest_of_weights
    monkeypatch.setattr(
        identity, "_digest_of_weights", lambda *given: digested.append(1) or digest(*given)
    )
    monkeypatch.setattr(demo[0], "_identity", "", raising=False)
    chat = new_chat(demo)
    ask(chat, FRANCE)
    for _ in range(3):
        chat.save("one")
    assert new_chat(demo).load("one") is None
    assert len(digested) == 1


def test_a_session_of_another_model_keeps_only_the_words(demo: Any) -> None:
    chat = new_chat(demo)
    ask(chat, FRANCE)
    chat.save("one")
    model, _ = demo
    weight = model.language_model.model.norm.weight
    was = mx.array(weight)
    try:
        model.language_model.model.norm.weight = was * 1.5
        resumed = new_chat(demo)
        assert "another model" in (resumed.load("one") or "")
        assert resumed.messages == chat.messages
        ask(resumed, HOT)
        assert resumed.stats.prefilled_tokens == resumed.stats.prompt_tokens
    finally:
        model.language_model.model.norm.weight = was


@pytest.mark.parametrize(
    "changes", everyday([dict(kv_bits=8), dict(context=10_000), dict(kv_bits="k8v4")], 0)
)
def test_a_session_is_of_the_cache_that_made_it(
    converted_demo: Path, demo: Any, changes: dict[str, Any]
) -> None:
    """Keys and values of other bits, or turned by YaRN, are not taken for one's own."""
    other = load(converted_demo, **changes)
    chat = new_chat(other)
    ask(chat, "What is the capital of France?")
    chat.save("one")
    resumed = new_chat(other)
    assert resumed.load("one") is None
    ask(chat, "Who are you?")
    ask(resumed, "Who are you?")
    assert resumed.stats.prefilled_tokens == chat.stats.prefilled_tokens
    assert resumed.messages == chat.messages
    assert "another model" in (new_chat(demo).load("one") or "")


@pytest.mark.slow
def test_a_cache_of_other_words_is_of_no_harm(demo: Any) -> None:
    chat, other = new_chat(demo), new_chat(demo)
    ask(chat, FRANCE)
    ask(other, WHO)
    chat.save("one")
    other.save("two")
    folders = [cache_folder(session_file(name)) for name in ("one", "two")]
    shutil.rmtree(folders[0])
    folders[1].replace(folders[0])
    resumed = new_chat(demo)
    assert resumed.load("one") is None
    assert ask(resumed, HOT) == ask(chat, HOT)


@pytest.mark.parametrize(
    "use", [remove_session, lambda file: read_conversation(session_file(file))]
)
def test_a_path_without_a_session_is_not_looked_for_in_the_list(
    tmp_path: Path, home: Path, use: Callable[[Path], object]
) -> None:
    """The hint was `sessions`, which lists the names in the session folder."""
    file = tmp_path / "talk.json"
    with pytest.raises(SessionError, match=rf"no session at {file}\n(.|\n)*--session {file} "):
        use(file)
    for named in ("talk", home / "talk.json"):
        with pytest.raises(SessionError, match=r"no session talk\n(.|\n)*sessions lists"):
            use(named)


def test_names_paths_and_permissions(demo: Any, tmp_path: Path, home: Path) -> None:
    chat = new_chat(demo)
    with pytest.raises(SessionError, match="no session none"):
        chat.load("none")
    for name in ("", ".hidden", "a b", "..", "a\\b"):
        with pytest.raises(SessionError, match="not a session's name"):
            chat.save(name)
    assert chat.save("plain.name") == home / "plain.name.json"
    assert chat.save(tmp_path / "file") == tmp_path / "file.json"
    assert chat.save(str(tmp_path / "sub" / "file.json")) == tmp_path / "sub" / "file.json"
    assert (home / "plain.name.json").stat().st_mode & 0o077 == 0
    (tmp_path / "blocked").write_text("")
    with pytest.raises(SessionError, match="cannot be saved"):
        chat.save(tmp_path / "blocked" / "file")


def test_a_video_that_does_not_fit_the_disk_is_an_error_of_the_session(
    demo: Any, tmp_path: Path, full_disk: Any
) -> None:
    """MLX raises RuntimeError, which ended the chat."""
    frames = [np.full((64, 64, 3), 40 * i, np.uint8) for i in range(4)]
    video = open_video(frames, with_videos(demo[1]).vision)
    part = {"type": "video", "video": video}
    content = {"messages": [{"role": "user", "content": [part]}]}
    with full_disk(), pytest.raises(SessionError, match=r"cannot be saved\n.*bytes are needed"):
        save_conversation(tmp_path / "new" / "a.json", content, demo[0])
    assert [path for path in (tmp_path / "new").rglob("*") if path.is_file()] == []


def test_sessions_are_listed_and_removed(demo: Any) -> None:
    chat = new_chat(demo)
    ask(chat, FRANCE)
    chat.save("old")
    ask(chat, WHO)
    chat.save("new")
    new, old = list_sessions()
    assert (new.name, old.name) == ("new", "old")
    assert (new.num_turns, old.num_turns) == (2, 1)
    assert new.first_words == FRANCE and new.num_bytes > 100_000
    remove_session("new")
    assert [info.name for info in list_sessions()] == ["old"]
    with pytest.raises(SessionError, match="no session new"):
        remove_session("new")


def test_a_session_is_open_once(demo: Any) -> None:
    with hold("one"):
        with pytest.raises(SessionError, match="open in another chat"), hold("one"):
            pass
        with hold("two"):
            pass
    with hold("one"):
        pass


@pytest.mark.slow
def test_the_oldest_sessions_give_up_what_they_have_read_and_no_words(demo: Any) -> None:
    for number, name in enumerate(("old", "open", "new")):
        chat = new_chat(demo)
        ask(chat, FRANCE)
        file = chat.save(name)
        os.utime(file, (number, number))
    most = sum(info.num_bytes for info in list_sessions()) * 0.4
    with hold("open"):
        trim_caches(most)
    kept = [name for name in ("old", "open", "new") if cache_folder(session_file(name)).exists()]
    assert kept == ["open"]
    resumed = new_chat(demo)
    assert resumed.load("old") is None and len(resumed.messages) == 2


@pytest.mark.slow
def test_a_session_of_an_earlier_version_keeps_the_words(demo: Any) -> None:
    chat = new_chat(demo)
    ask(chat, FRANCE)
    file = chat.save("one", with_cache=False)
    old = file.with_suffix(".safetensors")
    old.write_bytes(b"what an earlier version has read")
    resumed = new_chat(demo)
    assert "earlier version" in (resumed.load("one") or "")
    assert resumed.messages == chat.messages and ask(resumed, HOT) == ask(chat, HOT)
    resumed.save("one")
    assert not old.exists() and new_chat(demo).load("one") is None


def test_unicode_that_cannot_be_written_loses_nothing(demo: Any) -> None:
    chat = new_chat(demo)
    ask(chat, FRANCE)
    chat.save("one")
    chat.messages.append({"role": "user", "content": "\udce9"})
    with pytest.raises(SessionError, match="cannot be saved"):
        chat.save("one")
    resumed = new_chat(demo)
    assert resumed.load("one") is None and resumed.messages == chat.messages[:2]


@pytest.mark.slow
def test_what_was_read_of_a_stopped_prompt_is_not_read_again_after_a_restart(
    demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen35_mlx.engine.prompt_cache.PREFILL_STEP_SIZE", 16)
    document = "word and other things " * 20
    chat = new_chat(demo)
    ask(chat, FRANCE)
    chat.save("one", with_cache=False)
    layer, num_calls = type(chat.model.layers[0]).__call__, 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        # In the midst of a piece, between two layers.
        if num_calls == 4 * 5 + 2:
            raise KeyboardInterrupt
        return layer(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(chat.model.layers[0]), "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(chat, document)
    num_read = len(chat._cache.ids)  # type: ignore[union-attr]
    assert num_read >= 5 * 15 and len(chat.messages) == 2
    chat.start_reading_ahead()
    chat.stop_reading_ahead(wait_for_end=True)
    resumed = new_chat(demo)
    assert resumed.load("one") is None and resumed.messages == chat.messages
    for each in (chat, resumed):
        ask(each, document)
        assert each.stats.prefilled_tokens == each.stats.prompt_tokens - num_read
    assert resumed.messages == chat.messages


@pytest.mark.slow
def test_turns_are_appended_in_the_background_and_stop_for_the_next(
    demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen35_mlx.engine.segments.PIECE_BYTES", 40_000)
    chat = new_chat(demo)
    folder = cache_folder(chat.save("one"))
    known: set[str] = set()
    for question in (FRANCE, HOT):
        ask(chat, question)
        chat.save("one", with_cache=False)
        assert {file.name for file in folder.glob("*")} == known
        chat.start_reading_ahead()
        chat.stop_reading_ahead(wait_for_end=True)
        names = {file.name for file in folder.glob("*")}
        assert known < names
        known = names
    resumed = new_chat(demo)
    assert resumed.load("one") is None
    for each in (chat, resumed):
        each.read_ahead()
    assert resumed._read_ahead_tokens == 0
    # It ends at a piece's end once the user has said something.
    ask(chat, "word and other things " * 20)
    chat._work_ahead(lambda: True)
    assert {file.name for file in folder.glob("*")} == known


NUM_KILLS = int(os.environ.get("QWEN35_NUM_KILLS", "3" if sys.platform == "darwin" else "10"))


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_no_whole_turn(converted_demo: Path, tmp_path: Path) -> None:
    from bench_context_disk import kill_savers

    found = kill_savers(converted_demo, tmp_path / "sessions", NUM_KILLS)
    assert found["kills"] == NUM_KILLS and found["kills_lost"] == 0
    # Some were killed in the middle of a write, and turns were saved in between.
    assert found["turns"] > 0 and found["kills_in_a_write"] > 0
    assert len(list((tmp_path / "sessions" / "one.cache").glob(".*"))) <= 1


def test_a_folder_that_cannot_be_made_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QWEN35_MLX_SESSIONS", str(tmp_path / "file" / "sessions"))
    with pytest.raises(SessionError, match="cannot be stored"), hold("one"):
        pass


def test_the_hint_of_a_damaged_session_removes_that_one(demo, home, tmp_path):
    """It named the one of the same name among the user's sessions."""
    file = tmp_path / "my files" / "one.json"
    file.parent.mkdir()
    file.write_text("{}")
    home.mkdir()
    (home / "one.json").write_text("{}")
    for damaged, name in ((file, shlex.quote(str(file))), (home / "one.json", "one")):
        with pytest.raises(SessionError) as error:
            read_conversation(damaged)
        assert str(error.value).endswith(f"qwen35-mlx sessions --remove {name}")


def test_saved_sessions_keep_their_checksum() -> None:
    """Another one would call every earlier session changed."""
    content = {"messages": [{"role": "user", "content": "é\ud83d 日本"}], "a": None}
    assert sessions._digest_of(content).startswith("523c5941566969ea824ac87c")
