"""Pictures in the chat and in generate: attached, told, kept, refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from everyday import everyday
from PIL import Image, ImageGrab
from prompt_toolkit.document import Document

from qwen35_mlx.chat.conversation import Chat
from qwen35_mlx.cli import attachments, chat_view
from qwen35_mlx.cli.chat_view import ChatView
from qwen35_mlx.cli.line_input import EditingReader
from qwen35_mlx.cli.local_models import SOURCE
from qwen35_mlx.cli.media_input import page_numbers
from qwen35_mlx.errors import ContextFull, Qwen35Error
from qwen35_mlx.media import fetch
from qwen35_mlx.text.media_parts import media_of, text_of

STAR = SOURCE / "picture.png"
SEEN = "What is in the picture?"


class Typist:
    """Types lines, and then nothing more."""

    def __init__(self, *lines: str):
        self.lines = list(lines)
        self.drafts: list[str] = []

    def read(self, default: str = "") -> str:
        self.drafts.append(default)
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def ask(self, question: str) -> str:
        return self.read(question)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A red star and a blue square, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWEN35_MLX_SESSIONS", str(tmp_path / "sessions"))
    (tmp_path / "star.png").write_bytes(STAR.read_bytes())
    square = Image.new("RGB", (48, 48), (245, 245, 240))
    square.paste((37, 99, 235), (14, 14, 34, 34))
    square.save(tmp_path / "my square.png")
    return tmp_path


@pytest.fixture
def talk(
    folder: Path, demo: Any, consoles: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Types lines into a chat with the demo; its answers, stderr and drafts are attributes."""
    _, err = consoles()

    def talk(*lines: str, chat: Chat | None = None, **options: Any) -> Any:
        chat = chat or Chat(
            *demo, enable_thinking=False, max_tokens=12, sampling={"temperature": 0.0}
        )
        typist = Typist(*lines)
        monkeypatch.setattr(chat_view, "open_reader", lambda *arguments: typist)
        ChatView(chat, **options).run()
        said = [[text_of(m["content"]) for m in chat.messages if m["role"] == role]
                for role in ("user", "assistant")]  # fmt: skip
        shown = [[each.name for each in media_of([m])]
                 for m in chat.messages if m["role"] == "user"]  # fmt: skip
        return SimpleNamespace(
            chat=chat, asked=said[0], answers=said[1], shown=shown, err=err.getvalue(),
            drafts=typist.drafts,
        )  # fmt: skip

    return talk


def test_a_picture_goes_with_the_next_message_and_no_other(talk: Any) -> None:
    done = talk("/image star.png", SEEN, "What is the capital of France?")
    assert done.answers == ["A red star.", "The capital of France is Paris."]
    assert done.shown == [["star.png"], []]
    assert "picture 1: star.png, 48x48, 9 tokens\n" in done.err


@pytest.mark.parametrize(
    "line",
    everyday(
        [
            "{0}/star.png What is in the picture?",
            "What is in the picture? '{0}/star.png' ",
            "What is in file://{0}/star.png the picture?",
            "./star.png What is in the picture?",
        ],
        0,
    ),
)
def test_a_dropped_picture_is_attached_wherever_it_is(talk: Any, folder: Path, line: str) -> None:
    done = talk(line.format(folder))
    assert (done.asked, done.answers, done.shown) == ([SEEN], ["A red star."], [["star.png"]])


@pytest.mark.slow
def test_a_dropped_file_alone_waits_for_its_question(talk: Any, folder: Path) -> None:
    done = talk(f"{folder}/star.png ", SEEN)
    assert (done.asked, done.answers) == ([SEEN], ["A red star."])


@pytest.mark.slow
def test_several_pictures_are_numbered_and_each_is_shown(talk: Any, folder: Path) -> None:
    done = talk(r"/image star.png my\ square.png", "'./my square.png' What do you see?")
    assert done.shown == [["star.png", "my square.png", "my square.png"]]
    for i, name in enumerate(done.shown[0], 1):
        assert f"picture {i}: {name}, 48x48, 9 tokens\n" in done.err
    assert done.chat.stats.pictures_encoded == 2


def test_the_list_of_pictures_can_be_seen_and_dropped(talk: Any) -> None:
    done = talk("/image", "/image star.png", "/image", "/image clear", "Who are you?")
    assert done.err.count("picture 1: star.png, 48x48, 9 tokens\n") == 2
    assert done.err.count("no picture is attached\n") == 2
    assert done.shown == [[]]


def test_a_path_that_is_not_there_is_reported_and_not_sent(talk: Any) -> None:
    line = "/no/star.png What is it?"
    done = talk(line, "Who are you?")
    assert done.asked == ["Who are you?"]
    assert "error: no file /no/star.png\n" in done.err
    # To be corrected; unchanged it is meant as text.
    assert done.drafts[1] == line
    assert talk(line, line, chat=done.chat).asked[-1] == line


@pytest.mark.parametrize("line", everyday(["/etc/hosts", "/no/such/notes.py", "/tmp"], 0))
def test_a_path_of_no_picture_is_an_unknown_command_as_before(talk: Any, line: str) -> None:
    done = talk(line)
    assert f"error: no command {line}\n" in done.err and done.asked == []


@pytest.mark.slow
def test_retry_edit_and_undo_keep_pictures(talk: Any) -> None:
    done = talk("/image star.png", "What do you see?", "/retry", f"/edit {SEEN}")
    assert (done.asked, done.shown) == ([SEEN], [["star.png"]])
    assert done.answers == ["A red star."]
    done = talk("Who are you?", "/undo", "/retry", chat=done.chat)
    assert (done.asked, done.shown) == ([SEEN], [["star.png"]])


def test_a_model_without_a_tower_refuses_once_and_chats_on(talk: Any, demo: Any) -> None:
    model, tokenizer = demo
    blind = copy.copy(tokenizer)
    blind.vision, blind.no_vision = None, "the model's folder has no vision tower"
    chat = Chat(model, blind, enable_thinking=False, sampling={"temperature": 0.0})
    done = talk("/image star.png", "./star.png what", "What is the capital of France?", chat=chat)
    assert done.answers == ["The capital of France is Paris."]
    refusal = "error: this model reads no pictures and no videos\n  got: the model's folder has no"
    assert done.err.count(refusal) == 2


@pytest.mark.parametrize(
    "line", everyday(["/image nope.png", "/image star.png bad.png", "./bad.png what"], 1)
)
def test_one_file_that_cannot_be_read_attaches_none(talk: Any, folder: Path, line: str) -> None:
    (folder / "bad.png").write_bytes(STAR.read_bytes()[:60])
    done = talk(line, "Who are you?")
    assert done.shown == [[]] and "error: " in done.err and "picture 1" not in done.err


def test_urls_are_fetched_only_where_that_was_allowed(
    talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def fake(url: str) -> bytes:
        fetched.append(url)
        return STAR.read_bytes()

    monkeypatch.setattr(fetch, "fetch", fake)
    lines = ("/image https://a.b/c/x.png?d=1 star.png", "See https://a.b/c.png")
    done = talk(*lines)
    assert fetched == [] and done.shown == [[]]
    assert "error: URLs are not fetched\n" in done.err and "--allow-url" in done.err
    done = talk(*lines, allow_url=True)
    assert fetched == ["https://a.b/c/x.png?d=1"]
    assert done.shown == [["x.png", "star.png"]]


def test_the_clipboard_is_attached_or_explained(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    contents: list[Any] = [
        None, NotImplementedError("wl-paste or xclip is required"), ChildProcessError("xclip: x"),
        ["star.png", "my square.png"], Image.open(STAR),
    ]  # fmt: skip

    def grab() -> Any:
        content = contents.pop(0)
        if isinstance(content, Exception):
            raise content
        return content

    monkeypatch.setattr(ImageGrab, "grabclipboard", grab)
    done = talk(*["/paste"] * 5, "What do you see?")
    assert "holds no picture" in done.err and "install wl-clipboard" in done.err
    assert "got: xclip: x" in done.err
    assert done.shown == [["star.png", "my square.png", "clipboard"]]


@pytest.mark.parametrize("answer", everyday(["y", "n", ""], 0, 1))
def test_many_tokens_are_attached_only_after_a_question(
    talk: Any, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(attachments, "MANY_TOKENS", 17)
    # The first has 9 tokens, both have 18; more are not asked for again.
    lines = ["/image star.png", "/image star.png", answer]
    done = talk(*lines, *(["/image star.png"] if answer == "y" else []), "What do you see?")
    assert "18 tokens of pictures" in done.drafts[2]
    assert len(done.shown[0]) == (3 if answer == "y" else 1)


def test_tokens_of_a_picture_can_be_limited(talk: Any) -> None:
    done = talk("/set image-tokens 4", "/image star.png", "/set image_tokens", "/image star.png",
                "/set image-tokens few", "/image clear")  # fmt: skip
    assert "pictures of at most 4 tokens" in done.err
    assert "picture 1: star.png, 48x48, 4 tokens\n" in done.err
    assert "picture 2: star.png, 48x48, 9 tokens\n" in done.err
    assert "error: not a number" in done.err


@pytest.mark.slow
def test_pages_of_a_pdf_become_pictures(talk: Any, folder: Path) -> None:
    pdfium = pytest.importorskip("pypdfium2")
    document = pdfium.PdfDocument.new()
    for _ in range(12):
        document.new_page(200, 200)
    document.save(folder / "a 1.pdf")
    done = talk("/pdf a\\ 1.pdf 2, 4-5", "/pdf a 1.pdf 13", "/pdf a 1.pdf x", "What do you see?")
    assert done.shown == [[f"a 1.pdf page {n}" for n in (2, 4, 5)]]
    assert "has no page 13" in done.err and "error: no file" in done.err
    done = talk("'./a 1.pdf'", "What do you see?")
    assert len(done.shown[0]) == 12
    assert "picture 1: a 1.pdf page 1, " in done.err and "… and 11 more, 108 tokens" in done.err


@pytest.mark.parametrize("text", ["x", "1-", "-3", "1,,2", "1-2-3", "1-\u00b2", "\u00b2", "3-1"])
def test_what_are_no_pages_is_refused(text: str) -> None:
    with pytest.raises(Qwen35Error, match="not pages"):
        page_numbers(text)


def test_pages_are_ranges_and_numbers() -> None:
    assert page_numbers("1-3, 7,9-9") == [1, 2, 3, 7, 9]
    assert len(page_numbers("1-99999999999") or ()) == 10_000


def test_a_file_name_cannot_steer_the_terminal(talk: Any, folder: Path) -> None:
    (folder / "\x1b[2Jx.png").write_bytes(STAR.read_bytes())
    done = talk("/image \x1b[2Jx.png", "/image")
    assert done.err.count("picture 1: [2Jx.png, ") == 2 and "\x1b" not in done.err


@pytest.mark.slow
def test_a_full_context_keeps_the_pictures(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = [ContextFull(100, 100)]
    send = Chat.send

    def refuse_once(chat: Chat, *message: Any, **media: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return send(chat, *message, **media)

    monkeypatch.setattr(Chat, "send", refuse_once)
    done = talk("./star.png What is in the picture?", "k", SEEN)
    assert (done.answers, done.shown) == (["A red star."], [["star.png"]])
    assert done.drafts[2] == SEEN


@pytest.mark.slow
def test_sessions_tell_of_pictures(talk: Any, run_cli: Any, consoles: Any) -> None:
    done = talk("/image star.png", SEEN, "/save s")
    out, _ = consoles()
    run_cli("sessions")
    run_cli("sessions", "s")
    assert "1 turn, 1 picture: " + SEEN in out.getvalue()
    assert f"(image: star.png, 48x48)\n{SEEN}\n" in out.getvalue()
    again = talk("/load s", "/retry")
    assert again.answers == done.answers == ["A red star."]


@pytest.fixture
def generate(folder: Path, run_cli: Any, converted_demo: Path) -> Callable[..., Any]:
    return lambda *arguments, **options: run_cli(
        "generate", converted_demo, *arguments, "--temperature", "0", **options
    )


@pytest.mark.slow
def test_generate_answers_about_a_file_and_counts_it(generate: Any) -> None:
    found = json.loads(generate("--image", "star.png", "-p", SEEN, "--json").stdout)
    assert found["text"] == "A red star."
    assert (found["pictures"], found["videos"], found["media_tokens"]) == (1, 0, 9)
    plain = json.loads(generate("-p", SEEN, "--json").stdout)
    assert (plain["pictures"], plain["media_tokens"]) == (0, 0)
    # The placeholders, and a token on either side of them.
    assert found["prompt_tokens"] == plain["prompt_tokens"] + 11


@pytest.mark.slow
def test_generate_reads_a_picture_from_standard_input(generate: Any) -> None:
    result = generate("--image", "-", "-p", SEEN, stdin=STAR.read_bytes())
    assert result.stdout == "A red star.\n"
    assert result.stderr == "picture 1: standard input, 48x48, 9 tokens\n"
    empty = generate("--image", "-", "-p", SEEN, stdin=b"")
    assert empty.exit_code == 1 and empty.stderr.startswith("error: standard input is empty\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    everyday(
        [
            (("--image", "none.png"), "no file none.png"),
            (("--video", "star.png"), "video"),
            (("--pdf", "star.png"), "star.png"),
            (("--pdf", "star.png", "--pages", "x"), "not pages"),
            (("--image", "https://a.b/c.png"), "URLs are not fetched"),
            (("--image", "."), "folder"),
            (("--image", "/dev/zero"), "/dev/zero"),
        ],
        *range(2),
    ),
)
def test_generate_refuses_what_it_cannot_show(
    generate: Any, arguments: tuple[str, ...], message: str
) -> None:
    result = generate(*arguments, "-p", SEEN)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and message in result.stderr


def test_a_missing_picture_is_named_before_the_model_loads(run_cli: Any, folder: Path) -> None:
    for command in (("generate", "/no/model"), ("chat", "/no/model")):
        result = run_cli(*command, "--image", "none.png", "-p", "hi")
        assert result.exit_code == 1 and "no file none.png" in result.stderr


@pytest.mark.parametrize("given", everyday(["-p", "stdin"], 1))
def test_a_path_in_a_given_prompt_stays_text(generate: Any, given: str) -> None:
    """Prompts of scripts may hold the words of others: no file is opened on their behalf."""
    text = "./star.png What is in the picture?"
    options = ["-p", text] if given == "-p" else []
    result = generate(*options, "--json", "--max-tokens", "4", stdin=None if options else text)
    assert json.loads(result.stdout)["pictures"] == 0


def test_chat_asks_about_the_shipped_picture(run_cli: Any, converted_demo: Path) -> None:
    result = run_cli("chat", converted_demo, "--image", STAR, "-p", "What do you see?",
                     "--temperature", "0", "--no-think", "--preset", "checkpoint")  # fmt: skip
    assert result.stdout == "A red star.\n"


def test_the_shipped_picture_is_painted_from_its_seed() -> None:
    import numpy as np
    import pictures

    sample = pictures.shipped()
    assert (np.asarray(Image.open(STAR)) == pictures.paint(*sample.picture)).all()
    assert sample.expected == "red star" and STAR.resolve() == pictures.SHIPPED


def test_tab_completes_paths_as_a_shell_reads_them(folder: Path) -> None:
    (folder / "it's.jpg").touch()
    reader = EditingReader({"/image": (), "/set": ("seed",)}, folder / "history")

    def completed(text: str) -> list[str]:
        found = reader._session.completer.get_completions(Document(text), None)
        return [text + each.text for each in found]

    assert completed("/image my") == ["/image my\\ square.png"]
    assert completed("/pdf star.png my\\ s") == ["/pdf star.png my\\ square.png"]
    assert completed("/image 'my s") == ["/image 'my square.png"]
    assert completed("/image 'star.png' it") == ["/image 'star.png' it\\'s.jpg"]
    assert completed("/image my\\") == completed("See my") == []
