"""Attachments of the next message: text files, pictures, videos and pages of PDFs."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import Qwen35Error
from ..files import MAX_TEXT_BYTES, read_text
from ..memory import kv_bytes
from . import terminal
from .media_input import (
    MANY_TOKENS,
    MAX_LINES,
    clipboard,
    described,
    is_url,
    is_video,
    num_tokens,
    open_media,
    picture_settings,
)
from .progress import duration, spinner
from .typed_paths import find_file, shell_words, split_media, typed_documents, typed_files

if TYPE_CHECKING:
    from ..chat.conversation import Chat
    from .chat_view import ChatView

# Shorter texts take no time, and are no measure of speed.
FEW_TOKENS = 500
WITH_PAGES = re.compile(r"(.+?)\s+(\d[\d, -]*)", re.DOTALL)


class Attachments:
    """Texts, pictures and videos of a message; `ask` asks the user, if there is one."""

    def __init__(self, chat: "Chat", allow_url: bool = False):
        self.texts: list[str] = []
        self.media: list[Any] = []
        # Maximum tokens of a picture; None: the model's limit.
        self.image_tokens: int | None = None
        self._chat, self._allow_url = chat, allow_url

    def clear(self) -> None:
        """Remove all attachments."""
        self.texts, self.media = [], []

    def options(self) -> dict[str, Any]:
        """The options for `Chat.send`."""
        videos = [each for each in self.media if is_video(each)]
        images = [each for each in self.media if not is_video(each)]
        return ({"images": images} if images else {}) | ({"videos": videos} if videos else {})

    def counts(self) -> dict[str, int]:
        """Numbers of pictures and videos, and of their tokens."""
        videos = sum(map(is_video, self.media))
        pictures = len(self.media) - videos
        return {"pictures": pictures, "videos": videos, "media_tokens": num_tokens(self.media)}

    def add(
        self,
        sources: Sequence[tuple[str, Any]],
        ask: Callable[[str], str] | None = None,
        pages: str | None = None,
    ) -> None:
        """Open all sources, pairs of a kind and a path or picture; if one fails, attach none."""
        settings = picture_settings(self._chat.tokenizer, self.image_tokens)
        opened: list[Any] = []
        with spinner("opening …"):
            for kind, source in sources:
                opened += open_media(kind, source, settings, allow_url=self._allow_url, pages=pages)
        media = [*self.media, *opened]
        many = num_tokens(media)
        if many > MANY_TOKENS >= num_tokens(self.media):
            what = f"{many:,} tokens of pictures take long to read"
            if ask is None:
                terminal.note(f"warning: {what}")
            elif ask(f"{what}. Attach them? (y/n) ") != "y":
                raise Qwen35Error("nothing was attached", hint="/set image_tokens N limits them")
        num_known, self.media = len(self.media), media
        for line in described(media, num_known):
            terminal.note(line)

    def add_texts(self, texts: Mapping[str, str]) -> None:
        """Put texts before the next message, and print their number of tokens."""
        tokenizer, config = self._chat.tokenizer, self._chat.model.config
        counts = {
            name: len(tokenizer.encode(text, add_special_tokens=False))
            for name, text in texts.items()
        }
        num_tokens = sum(counts.values())
        if num_tokens >= config.context_length:
            raise Qwen35Error(
                "the files do not fit the context",
                got=f"{num_tokens:,} tokens",
                expected=f"fewer than {config.context_length:,}",
            )
        for name, text in texts.items():
            fence = "```"
            while fence in text:
                fence += "`"
            self.texts.append(f"{name}:\n{fence}\n{text.rstrip()}\n{fence}")
        for name, count in list(counts.items())[:MAX_LINES]:
            terminal.note(f"{name}, {count:,} tokens, goes with the next message")
        facts = [f"{terminal.count(len(counts), 'file')}, {num_tokens:,} tokens"]
        if num_tokens >= FEW_TOKENS:
            facts.append(f"{kv_bytes(config, num_tokens) / 1e6:,.1f} MB of memory")
            if (stats := self._chat.stats).prefilled_tokens >= FEW_TOKENS:
                facts.append(f"about {duration(num_tokens / stats.prefill_tps)} to read")
        if len(counts) + len(facts) > 2:
            terminal.note(" · ".join(facts))

    def add_named(self, text: str, ask: Callable[[str], str] | None) -> str:
        """Attach the files that a message names; returns the rest of the message."""
        rest, found, missing = split_media(text)
        if missing:
            raise Qwen35Error(
                f"no file {missing[0]}",
                expected="the path of a picture, a video or a PDF",
                hint="the same message again is sent as text",
            )
        if not found:
            return text
        self.add([(kind, path) for path, kind in found], ask)
        return rest


def attach_files(view: "ChatView", rest: str) -> None:
    """Read text files, and put them before the next message."""
    if not rest:
        raise Qwen35Error("which file?", expected="/file PATH")
    view.attached.add_texts(read_documents(rest))


def read_documents(typed: str) -> dict[str, str]:
    """Texts by name, from the files, folders and patterns in a line; also of PDFs.

    A file that is named must be a text. In folders and patterns, other files are skipped.
    """
    named, found = typed_documents(typed)
    texts: dict[Path, str] = {}
    num_other = 0
    for path in dict.fromkeys([*named, *found]):
        try:
            texts[path] = _document_text(path)
        except Qwen35Error:
            if path in named:
                raise
            num_other += 1
        if sum(map(len, texts.values())) > MAX_TEXT_BYTES:
            raise Qwen35Error(
                "the files are too large", expected=f"at most {MAX_TEXT_BYTES:,} characters"
            )
    if num_other:
        terminal.note(f"left out: {terminal.count(num_other, 'file')} that cannot be read as text")
    if not texts:
        raise Qwen35Error(f"no text in {typed}", expected="at least one text file")
    folder = os.path.commonpath([path.absolute().parent for path in texts])
    return {os.path.relpath(path.absolute(), folder): text for path, text in texts.items()}


def _document_text(path: Path) -> str:
    # Devices and pipes may never end.
    if not path.is_file():
        raise Qwen35Error(f"{path} is no file", expected="a text file")
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise Qwen35Error(f"{path} is too large", expected=f"at most {MAX_TEXT_BYTES:,} bytes")
    if path.suffix.lower() == ".pdf":
        from ..media.documents import pdf_text

        return pdf_text(path)
    return read_text(path)


def attach_pdf(view: "ChatView", rest: str) -> None:
    """Attach the pages of a PDF, or some of them."""
    match = None if find_file(rest) else WITH_PAGES.fullmatch(rest)
    attach(view, match[1] if match else rest, "pdf", match[2] if match else None)


def paste(view: "ChatView", rest: str) -> None:
    """Attach the picture in the clipboard."""
    view.attached.add(clipboard(), view.ask)


def attach(
    view: "ChatView", rest: str, kind: Literal["image", "video", "pdf"], pages: str | None = None
) -> None:
    """Attach files of a kind, list what is attached, or drop it."""
    attached = view.attached
    if rest == "clear":
        attached.media = []
    if rest in ("", "clear"):
        for line in described(attached.media) or ["no picture is attached"]:
            terminal.note(line)
        return
    sources: list[Any] = []
    words = shell_words(rest)
    if any(map(is_url, words)):
        for word in words:
            sources += [word] if is_url(word) else typed_files(word)
    else:
        sources += typed_files(rest)
    attached.add([(kind, source) for source in sources], view.ask, pages)
