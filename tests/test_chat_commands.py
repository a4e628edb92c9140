"""The commands of the chat, and the line of figures under an answer."""

import re
from pathlib import Path
from typing import Any

import pytest
import test_chat_view
from test_chat_view import FakeChat, Typist, asked, speak

from qwen35_mlx.chat.conversation import Chat, TurnStats
from qwen35_mlx.cli import chat_view
from qwen35_mlx.cli.chat_view import ChatView
from qwen35_mlx.engine.output import Piece

talk = test_chat_view.talk


def test_retry_and_edit_answer_again_and_undo_takes_back(talk: Any) -> None:
    chat, err = talk("one", "two", "/retry", "/edit  three  ", "/undo", "four", "/undo", "/exit")
    assert asked(chat) == ["one"]
    assert "taken back: three\n" in err and "taken back: four\n" in err
    assert err.count("prompt ") == 5


@pytest.mark.slow
def test_edit_puts_the_last_message_into_the_editor(
    talk: Any, demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(*demo, enable_thinking=False, max_tokens=4)
    typist = Typist("one", "two", "/edit", "changed", "three", "/edit", KeyboardInterrupt(), "four")
    monkeypatch.setattr(chat_view, "open_reader", lambda *arguments: typist)
    ChatView(chat).run()
    # Ctrl-C leaves the last message as it is.
    assert asked(chat) == ["one", "changed", "three", "four"]
    assert typist.drafts[3] == "two" and typist.drafts[6] == "three"
    assert [draft for i, draft in enumerate(typist.drafts) if i not in (3, 6)] == [""] * 7


def test_edit_needs_a_text_where_nothing_can_be_edited(
    consoles: Any, demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err = consoles()
    lines = iter(["one", "/edit", "two", "/edit three"])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    chat = Chat(*demo, enable_thinking=False, max_tokens=4)
    ChatView(chat).run()
    assert asked(chat) == ["one", "three"]
    assert "error: there is no editor here\n  hint: /edit TEXT" in err.getvalue()


def test_commands_without_what_they_need_say_so(talk: Any, tmp_path: Path) -> None:
    chat, err = talk(
        "/file", "/think", "/think maybe", "/set", "/set warmth 3", "/save", "/load", "/what x",
        "/set on_loop never", "/set preset none", "/file none.txt", "/exit",
    )  # fmt: skip
    errors = [line.removeprefix("error: ") for line in err.splitlines() if "error: " in line]
    assert errors[:8] == [
        "which file?", "/think what?", "/think what?", "no such setting", "no such setting",
        "save as what?", "load what?", "no command /what",
    ]  # fmt: skip
    assert errors[8:10] == ["unknown on_loop", "unknown preset"]
    assert errors[10:] == ["no file none.txt"]
    assert "  expected: on, off, hide or budget N\n" in err
    assert "  expected: /load NAME, of: none\n" in err
    assert (chat.on_loop, chat.messages) == (None, [])


def test_a_file_of_more_than_the_most_is_refused_and_fences_are_longer_than_those_inside(
    talk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen35_mlx.cli.attachments.MAX_TEXT_BYTES", 12)
    (tmp_path / "most.md").write_text("```\na\n````\n")
    (tmp_path / "more.md").write_text("x" * 13)
    chat, err = talk("/file most.md", "/file more.md", "What?", "/file most.md", "/clear", "Why?")
    assert asked(chat) == ["Why?"]
    assert "error: more.md is too large\n  expected: at most 12 bytes\n" in err
    assert err.count("most.md, ") == 2
    chat, _ = talk("/file most.md", "What?")
    assert asked(chat) == ["most.md:\n`````\n```\na\n````\n`````\n\nWhat?"]


def test_what_a_command_does_not_take_is_refused(talk: Any) -> None:
    """/undo 2 took one turn back, and /clear x dropped them all."""
    chat, err = talk("one", "/undo 2", "/clear x", "/retry y", "/think on 5", "/claer")
    assert asked(chat) == ["one"] and chat.enable_thinking is False
    for name in ("/undo", "/clear", "/retry"):
        assert f"error: {name} takes nothing behind it\n" in err
    assert "/think what?\n  got: 'on 5'" in err and "hint: did you mean /clear?; " in err


def test_a_setting_is_read_as_it_was_meant_and_told(talk: Any) -> None:
    chat, err = talk(
        *("/set temperature 0,7", "/set seed 99999999999999999999", "/set preset coding"),
        *("/set preset", "/set max_tokens 1,000", "/set seed 5"),
    )
    # A comma for the point made 7 of 0,7; a seed that cannot be spoiled every turn after it.
    assert chat.sampling.get("temperature") is None and "not a number\n  got: '0,7'" in err
    assert "error: seed is not usable\n  got: 99999999999999999999\n" in err
    assert chat.preset == "auto" and (chat.max_tokens, chat.sampling["seed"]) == (1000, 5)
    assert err.splitlines()[-1].endswith(" · answers of at most 1,000 tokens · seed 5")


def test_thinking_is_switched_and_told(talk: Any) -> None:
    for line, thinks, hides, budget in (
        ("/think on", True, False, None),
        ("/think off", False, False, None),
        ("/think hide", True, True, None),
        ("/think budget 1,200", False, False, 1200),
        ("/think budget 0", False, False, None),
    ):
        chat, err = talk(line, "/exit")
        told = err.splitlines()[-1]
        assert told.startswith("thinks" if thinks else "does not think")
        assert told.endswith(" · thoughts hidden") == hides
        assert (", at most 1,200 tokens" in told) == (budget == 1200)
        assert (chat.thinks(), chat.think_budget) == (thinks, budget)


def test_a_hidden_thought_is_a_line(consoles: Any) -> None:
    out, err = consoles()
    chat = FakeChat(Piece("thought", "one"), Piece("thought", "two"), Piece("answer", "Blue."))
    chat.stats.thought_tokens = 5
    view = ChatView(chat)  # type: ignore[arg-type]
    view.hide_thoughts = True
    view.run(["?"])
    assert out.getvalue() == "Blue.\n"
    assert re.search(r"^thought: 5 tokens, 0\.0 s$", err.getvalue(), re.MULTILINE)


@pytest.mark.parametrize(
    ("reason", "generated", "used", "told"),
    [
        ("stop", 7, 47, ""),
        ("loop", 7, 47, " · stopped: it repeated itself"),
        ("length", 7, 47, " · cut at the token limit"),
        ("length", 4056, 47, " · cut: the context is full"),
        ("stop", 7, 3276, ""),
        ("stop", 7, 3277, "context 80 % full, 819 tokens left: /trim drops the oldest turns"),
        ("stop", 7, 4200, "context 102 % full, 0 tokens left: /trim drops the oldest turns"),
    ],
)
def test_figures_tell_why_an_answer_ended_and_that_the_context_is_nearly_full(
    consoles: Any, monkeypatch: pytest.MonkeyPatch, reason: str, generated: int, used: int,
    told: str,
) -> None:  # fmt: skip
    _, err = consoles()
    chat = FakeChat()
    chat.stats = TurnStats(40, 12, 100.0, generated, 50.0, 0.25, reason)
    monkeypatch.setattr(chat, "num_context_tokens", lambda: used)
    ChatView(chat).show_figures()  # type: ignore[arg-type]
    assert "peak memory 250 MB" in err.getvalue()
    assert (told in err.getvalue()) and ("context" in err.getvalue()) == ("context" in told)


def test_several_questions_are_shown_before_their_answers(consoles: Any) -> None:
    out, _ = consoles()
    speak(FakeChat(Piece("answer", "Yes.")), ["One?", "[b]Two?"])
    assert out.getvalue() == "> One?\nYes.\n> [b]Two?\nYes.\n"


def test_a_session_is_told_saved_and_left(talk: Any) -> None:
    chat, err = talk(
        *("one", "/stats", "/save s", "two", "/clear", "three", "/load s", "/clear", "/load s"),
        "/trim",
    )
    # It was dropped without a word.
    assert err.count("error: this conversation is not saved\n  hint: /save NAME keeps it") == 1
    assert "· session not saved\n" in err and "saved: " in err
    assert "session s keeps the conversation; the new one is not saved yet" in err
    assert "session s: 2 turns, goes on after: two" in err
    assert err.splitlines()[-1] == "1 turn dropped"
    again, err = talk(session="s")
    assert asked(again) == ["two"] == asked(chat)
    _, err = talk("/load none", "/load", session="s")
    assert "of: s\n" in err


def test_a_system_prompt_alone_is_no_unsaved_conversation(talk: Any, demo: Any) -> None:
    talk("one", "/save s")
    chat, err = talk("/load s", chat=Chat(*demo, system="Be brief.", max_tokens=2))
    assert "not saved" not in err and asked(chat) == ["one"]
