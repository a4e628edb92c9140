"""What the chat shows, and that no command and no failure ends it."""

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from everyday import everyday

from qwen35_mlx.chat.conversation import Chat, TurnStats
from qwen35_mlx.cli import chat_view
from qwen35_mlx.cli.chat_view import ChatView
from qwen35_mlx.cli.command import shown_warnings
from qwen35_mlx.cli.slash_commands import COMMANDS
from qwen35_mlx.engine.output import Piece, ToolCall
from qwen35_mlx.errors import ContextFull, PromptError, SessionError

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class FakeChat:
    """Yields pieces as a model would say them."""

    def __init__(self, *pieces: Piece, error: Exception | None = None):
        self.pieces, self.error = pieces, error
        self.stats = TurnStats(40, 12, 100.0, 7, 50.0, 12.3456, "length")
        self.asked: list[str] = []
        self.model = SimpleNamespace(config=SimpleNamespace(context_length=4096))

    def num_context_tokens(self) -> int:
        return 47

    def start_reading_ahead(self) -> None:
        pass

    def stop_reading_ahead(self) -> None:
        pass

    def send(self, text: str, progress: Any = None) -> Iterator[Piece]:
        self.asked.append(text)
        yield from self.pieces
        if self.error:
            raise self.error


def speak(chat: FakeChat, prompts: Sequence[str], **options: Any) -> None:
    ChatView(chat, **options).run(prompts)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 7, 99])
def test_answers_are_shown_as_they_are(consoles: Any, size: int) -> None:
    text = "[bold]no[/] :smile: [x] \\[y]\n\n\tindented\n  trailing  \n"
    pieces = [Piece("answer", text[i : i + size]) for i in range(0, len(text), size)]
    out, err = consoles()
    speak(FakeChat(*pieces), ["[red]?[/]"])
    assert out.getvalue().expandtabs() == text.expandtabs() + "\n"
    assert "prompt 12 of 40 tokens read, 100 tok/s · answer 7 tokens, 50.0 tok/s" in err.getvalue()
    assert "peak memory 12.35 GB" in err.getvalue()
    assert "cut at the token limit" in err.getvalue()


@pytest.mark.parametrize("markdown", [True, False])
def test_an_answer_cannot_steer_the_terminal(consoles: Any, markdown: bool) -> None:
    out, _ = consoles(force_terminal=True, color_system="truecolor")
    evil = "a\x1b]0;title\x07b\x1b[2Jc\x9b1md\re\x08f"
    speak(FakeChat(Piece("thought", evil), Piece("answer", evil)), ["?"], markdown=markdown)
    shown = ESCAPES.sub("", out.getvalue())
    assert shown == "a]0;titleb[2Jc1mdef\n\na]0;titleb[2Jc1mdef\n"


def test_paragraphs_of_a_thought_stay_apart(consoles: Any) -> None:
    out, _ = consoles()
    thought = [Piece("thought", t) for t in ("one", "\n\n", "two")]
    speak(FakeChat(*thought, Piece("answer", "Blue.")), ["?"])
    assert out.getvalue() == "(thought) one\n\ntwo\n\nBlue.\n"


def test_tool_calls_are_told_apart(consoles: Any) -> None:
    out, err = consoles()
    calls = [ToolCall("do", {"a": [1]}, {"a": "[1]"}), ToolCall("cut", {}, {}, complete=False)]
    speak(FakeChat(Piece("answer", "Now."), *(Piece("tool_call", "", c) for c in calls)), ["?"])
    assert "do(a=[1])\ncut() (cut: not run)\n" in err.getvalue()
    assert out.getvalue().strip() == "Now."


def test_a_refused_prompt_does_not_end_the_chat(
    consoles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err = consoles()
    lines: Iterator[Any] = iter(
        ["  first ", "", UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad"), "second", EOFError()]
    )

    def read(prompt: str) -> str:
        assert prompt == "> "
        line = next(lines)
        if isinstance(line, Exception):
            raise line
        return str(line)

    monkeypatch.setattr("builtins.input", read)
    chat = FakeChat(error=PromptError("the prompt is too long", hint="shorten it"))
    speak(chat, [])
    assert chat.asked == ["first", "second"]
    assert err.getvalue().count("error: the prompt is too long\n  hint: shorten it") == 2
    assert "can't decode" in err.getvalue()


def test_one_question_that_is_refused_is_an_error(consoles: Any) -> None:
    consoles()
    with pytest.raises(PromptError):
        speak(FakeChat(error=PromptError("no")), ["?"])


class Typist:
    """Types lines, and then nothing more; an exception is raised in place of its line."""

    def __init__(self, *lines: str | BaseException):
        self.lines = list(lines)
        self.drafts: list[str] = []

    def read(self, default: str = "") -> str:
        self.drafts.append(default)
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    def ask(self, question: str) -> str:
        return self.read()


@pytest.fixture
def talk(
    demo: Any, consoles: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Chat, str]]:
    """A chat with the demo in which lines are typed; returns it with what was on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWEN35_MLX_SESSIONS", str(tmp_path / "sessions"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "rescued"))
    (tmp_path / "rescued").mkdir()
    _, err = consoles()

    def talk(
        *lines: Any, chat: Chat | None = None, autosave: bool = False, **options: Any
    ) -> tuple[Chat, str]:
        chat = chat or Chat(*demo, enable_thinking=False, max_tokens=4)
        typist = Typist(*lines)
        monkeypatch.setattr(chat_view, "open_reader", lambda *arguments: typist)
        ChatView(chat, autosave=autosave).run(**options)
        assert typist.lines == []
        return chat, err.getvalue()

    return talk


def asked(chat: Chat) -> list[str]:
    return [m["content"] for m in chat.messages if m["role"] == "user"]


def rescued(tmp_path: Path) -> list[str]:
    """Messages of the user in the one file that was rescued."""
    [file] = (tmp_path / "rescued").glob("*/*.json")
    return asked_in(file)


def asked_in(file: Path) -> list[str]:
    """Messages of the user in a saved conversation."""
    return [m["content"] for m in json.loads(file.read_text())["messages"] if m["role"] == "user"]


ODD = (
    "", "/", "..", ".", "a/..", "a/b/", "~nosuchuser/x", "~", '"abc', "'tis", "\\", "\0", "/x\0y",
    "\ud800", "/dev/zero", "x" * 300, "x" * 5000, "a\nb", "/a\nb", "-1", "nan", "1e400",
    "budget", "budget x", "seed 99999999999999999999999", "top_k 1e9", "temperature\t",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    everyday([name for name in COMMANDS if name != "/exit"], 3, 10, 15),
)
def test_no_argument_of_a_command_ends_the_chat(talk: Any, name: str) -> None:
    lines = [f"{name} {odd}" for odd in ODD]
    chat, err = talk("first", *lines, "/clear", "/set preset checkpoint", "/set seed", "last")
    assert asked(chat) == ["last"] and "Traceback" not in err


@pytest.mark.parametrize(
    "error",
    everyday(
        [ValueError, RuntimeError, KeyError, MemoryError, RecursionError, OSError, EOFError],
        0,
        3,
        6,
    ),
)
def test_no_exception_of_a_command_ends_the_chat(
    talk: Any, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(view: Any, rest: str) -> None:
        raise error("of\nno use")

    monkeypatch.setitem(COMMANDS, "/stats", COMMANDS["/stats"]._replace(run=fail))
    chat, err = talk("one", "/stats", "two")
    assert asked(chat) == ["one", "two"]
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert error.__name__ in line


def test_no_exception_of_a_turn_ends_the_chat(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    send = Chat.send
    answers = iter([send, None, send])

    def fail_once(chat: Chat, *message: Any) -> Any:
        if answer := next(answers):
            return answer(chat, *message)
        raise RuntimeError("[metal] out of memory")

    monkeypatch.setattr(Chat, "send", fail_once)
    chat, err = talk("one", "two", "three")
    assert asked(chat) == ["one", "three"]
    assert "error: RuntimeError: [metal] out of memory\n" in err


@pytest.mark.parametrize("method", everyday(["start_reading_ahead", "stop_reading_ahead"], 0))
def test_a_failure_while_reading_ahead_ends_no_chat(
    talk: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(chat: Chat) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Chat, method, fail)
    chat, err = talk("one", "two")
    assert asked(chat) == ["one", "two"]
    assert err.count("error: RuntimeError: no memory\n") == 3


def test_one_failure_of_the_keyboard_ends_no_chat(talk: Any) -> None:
    chat, err = talk("one", RuntimeError("no cursor"), "two", OSError(5, "I/O"), "three")
    assert asked(chat) == ["one", "two", "three"]
    assert "error: RuntimeError: no cursor\n" in err and "error: I/O\n" in err


def test_a_conversation_outlives_the_end_of_the_terminal(talk: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="I/O"):
        talk("one", "two", OSError(5, "I/O"), OSError(5, "I/O"))
    assert rescued(tmp_path) == ["one", "two"]


def test_a_conversation_without_a_turn_is_not_rescued(talk: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="I/O"):
        talk(OSError(5, "I/O"), OSError(5, "I/O"))
    assert list((tmp_path / "rescued").iterdir()) == []


def test_a_session_that_cannot_be_saved_at_the_end_is_rescued(
    talk: Any, demo: Any, tmp_path: Path
) -> None:
    class Full(Chat):
        def save(self, session: Any, **options: Any) -> Path:
            if session == "s" and len(self.messages) > 2:
                raise SessionError("the session cannot be saved", got="no space left")
            return super().save(session, **options)

    chat = Full(*demo, enable_thinking=False, max_tokens=4)
    with pytest.raises(SessionError, match="cannot be saved"):
        talk("one", "two", chat=chat, session="s")
    assert rescued(tmp_path) == ["one", "two"]


def test_ctrl_c_anywhere_ends_no_chat(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted: list[str] = []

    def interrupt_once(name: str) -> None:
        real = getattr(Chat, name)

        def method(chat: Chat, *arguments: Any, **options: Any) -> Any:
            # The second call: the first turn is over.
            interrupted.append(name)
            if interrupted.count(name) == 2:
                raise KeyboardInterrupt
            return real(chat, *arguments, **options)

        monkeypatch.setattr(Chat, name, method)

    for name in ("send", "save", "start_reading_ahead", "stop_reading_ahead", "restart", "undo"):
        interrupt_once(name)
    lines = [
        "one",
        KeyboardInterrupt(),
        "/undo",
        "two",
        "three",
        "/undo",
        "/clear",
        "four",
        "/undo",
    ]
    chat, _ = talk(*lines, "/clear", "last", session="s")
    assert asked(chat) == ["last"]
    assert {"send", "save", "restart", "undo"} <= set(interrupted)


@pytest.mark.parametrize(
    "answer", everyday(["k", EOFError(), KeyboardInterrupt(), "o", "s"], 2, 3, 4)
)
def test_a_full_context_asks_and_keeps_the_message(
    talk: Any, demo: Any, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    refusals = iter([None, ContextFull(100, 100), None, None])
    send = Chat.send

    def refuse_once(chat: Chat, *message: Any) -> Any:
        if error := next(refusals):
            raise error
        return send(chat, *message)

    monkeypatch.setattr(Chat, "send", refuse_once)
    chat = Chat(*demo, enable_thinking=False, max_tokens=4)
    typist = Typist("one", "two", answer, "three")
    monkeypatch.setattr(chat_view, "open_reader", lambda *arguments: typist)
    ChatView(chat).run()
    if answer in ("o", "s"):
        assert asked(chat) == ["two", "three"] and typist.drafts[-2:] == ["", ""]
    else:
        # What was typed is there again, to be changed.
        assert asked(chat) == ["one", "three"] and typist.drafts[3] == "two"


def test_a_chat_without_a_home_folder_is_refused_only_named_sessions(
    talk: Any, no_home: None, tmp_path: Path
) -> None:
    chat, err = talk("one", "/save name", f"/save {tmp_path}/talk", "two")
    assert asked(chat) == ["one", "two"] and "set QWEN35_MLX_SESSIONS" in err
    assert asked_in(tmp_path / "talk.json") == ["one", "two"]


def test_files_go_with_the_next_message(talk: Any, tmp_path: Path) -> None:
    texts = {
        "plain.txt": b"zebra\n",
        "bom.txt": b"\xef\xbb\xbfzebra\n",
        "utf16.txt": "zebra\n".encode("utf-16"),
        "utf32 be.txt": b"\0\0\xfe\xff" + "zebra\n".encode("utf-32-be"),
        "windows.txt": b"zebra\r\n",
    }
    for name, data in texts.items():
        (tmp_path / name).write_bytes(data)
    chat, err = talk("/file plain.txt bom.txt utf16.txt", r"/file utf32\ be.txt ",
                     "/file windows.txt", "What?")  # fmt: skip
    files = [f"{name}:\n```\nzebra\n```" for name in texts]
    assert asked(chat) == ["\n\n".join([*files, "What?"])]
    assert err.count("goes with the next message") == len(texts)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"caf\xe9", "0xe9"), (b"a\0b", "NUL"), (b"\x7fELF\xff", "0xff"), (b"\xff\xfe\xff", "utf-16")],
)
def test_a_file_that_is_no_text_goes_with_no_message(
    talk: Any, tmp_path: Path, data: bytes, reason: str
) -> None:
    (tmp_path / "good.txt").write_text("zebra")
    (tmp_path / "x").write_bytes(data)
    chat, err = talk("/file good.txt x", "What?")
    assert asked(chat) == ["What?"]
    assert "error: x cannot be read as text" in err and reason in err


@pytest.mark.slow
def test_folders_and_patterns_of_files_are_counted_before_they_are_sent(
    talk: Any, tmp_path: Path
) -> None:
    for name in (
        "src/a.py",
        "src/sub/b.py",
        "src/sub/c.txt",
        "src/.git/d.py",
        "src/__pycache__/e.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "src/picture.bin").write_bytes(b"\0\xff")
    chat, err = talk("/file 'src/**/*.py'", "What?")
    blocks = [f"{name}:\n```\nsrc/{name}\n```" for name in ("a.py", "sub/b.py")]
    assert asked(chat) == ["\n\n".join([*blocks, "What?"])]
    assert re.search(r"^2 files, \d+ tokens$", err, re.MULTILINE)
    chat, err = talk("/file src", "/file none*", "/file src/.git/*", "What?")
    assert [name in asked(chat)[0] for name in ("b.py:", "c.txt:", "d.py", "e.py")] == [
        True, True, True, False
    ]  # fmt: skip
    assert "left out: 1 file that cannot be read as text" in err
    assert "error: no file in none*" in err


def test_files_longer_than_the_context_are_refused_with_the_count(
    talk: Any, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("word " * 5000)
    chat, err = talk("/file long.txt", "What?")
    assert asked(chat) == ["What?"]
    assert re.search(r"do not fit the context\n  got: [\d,]+ tokens\n  expected: fewer than", err)


def test_every_conversation_is_saved_where_that_is_asked_for(talk: Any, tmp_path: Path) -> None:
    _, err = talk("one", "two", "/clear", "three", autosave=True)
    first, second = re.findall(r"^saved as session (\S+)$", err, re.MULTILINE)
    files = [json.loads((tmp_path / "sessions" / f"{s}.json").read_text()) for s in (first, second)]
    asked_for = [[m["content"] for m in f["messages"] if m["role"] == "user"] for f in files]
    assert asked_for == [["one", "two"], ["three"]]


def test_a_pipe_or_a_device_is_not_read_as_a_file(talk: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    chat, err = talk("/file pipe", "/file /dev/zero", "What?")
    assert asked(chat) == ["What?"] and err.count(" is no file\n") == 2


def test_save_and_load_take_dropped_paths(talk: Any, tmp_path: Path) -> None:
    chat, _ = talk("one", r"/save chats/my\ chat.json", "/clear", "two", "/clear",
                     "/load 'chats/my chat.json'", "three")  # fmt: skip
    assert asked(chat) == ["one", "three"]
    saved = json.loads((tmp_path / "chats" / "my chat.json").read_text())
    assert [m["content"] for m in saved["messages"][::2]] == ["one", "three"]


def test_help_lists_every_command_and_fits_a_terminal(talk: Any) -> None:
    _, err = talk("/help")
    lines = err.splitlines()[1:]
    assert [line.split()[0] for line in lines[: len(COMMANDS)]] == list(COMMANDS)
    assert all(len(line) <= 100 for line in lines)
    assert all(command.help and command.help[0].islower() for command in COMMANDS.values())


def test_commands_of_a_few_words_change_the_chat(talk: Any) -> None:
    chat, err = talk(
        "/system  Be brief.", "/think budget 7", "/set  temperature  0.5", "/set max_tokens 3",
        "/set on_loop off", "/set preset coding", "/quit",
    )  # fmt: skip
    assert (chat.system, chat.think_budget, chat.max_tokens) == ("Be brief.", 7, 3)
    assert (chat.sampling["temperature"], chat.on_loop, chat.preset) == (0.5, "off", "coding")
    assert "preset coding: temperature 0.5" in err


def test_stats_show_the_context_the_settings_and_the_snapshots(talk: Any) -> None:
    chat, err = talk("one", "/stats", "/exit")
    used, length = chat.num_context_tokens(), chat.model.config.context_length
    assert f"context: {used:,} of {length:,} tokens, {100 * used // length} % full" in err
    # Reading ahead may have made another one since.
    assert (
        1 <= int(err.partition("snapshots: ")[2].partition(",")[0]) <= chat.prefixes.num_snapshots
    )
    assert "does not think · preset checkpoint: temperature " in err


def test_drafts_are_set_and_their_figures_are_shown(talk: Any) -> None:
    chat, err = talk(
        "/set draft mtp", "/set num_draft_tokens 2", "/set max_tokens 12", "/set temperature 0",
        "What is the capital of France?", "/stats", "/exit",
    )  # fmt: skip
    assert (chat.draft, chat.num_draft_tokens) == ("mtp", 2)
    share = chat.drafter.stats.acceptance("mtp")[0]
    per_pass = chat.drafter.stats.tokens_per_pass
    assert f"{per_pass:.2f} tokens a pass · mtp {share:.0%}" in err
    assert "drafts: mtp of 2 tokens" in err and per_pass > 1
    chat, err = talk("/set draft off", "/set num_draft_tokens 2", "/set draft eagle", "/exit")
    assert "error: drafts are off" in err and "error: unknown kind of drafts" in err
    assert (chat.draft, chat.num_draft_tokens) == ("off", None)


def test_a_warning_of_the_engine_does_not_break_an_answer(consoles: Any) -> None:
    class Warns(FakeChat):
        def send(self, text: str, progress: Any = None) -> Iterator[Piece]:
            yield Piece("answer", "be")
            logging.getLogger("qwen35_mlx.engine").warning("drafts are wrong")
            yield Piece("answer", "fore")

    out, err = consoles()
    with shown_warnings():
        speak(Warns(), ["?"])
        logging.getLogger("qwen35_mlx.model").warning("at once")
    logging.getLogger("qwen35_mlx.model").warning("not of this command")
    assert out.getvalue() == "before\n"
    lines = err.getvalue().splitlines()
    assert lines[0] == "warning: drafts are wrong" and lines[1].startswith("prompt ")
    assert lines[-1] == "warning: at once"


@pytest.mark.parametrize("line", ["/set temperature warm", "/set max_tokens -5", "/think budget x"])
def test_a_setting_that_is_no_number_changes_nothing(talk: Any, line: str) -> None:
    chat, err = talk("/set temperature 0.5", line, "/exit")
    assert "not a number" in err
    assert chat.sampling["temperature"] == 0.5
    assert chat.max_tokens == 4 and chat.think_budget is None
