"""Pictures, videos and PDFs from files, standard input, URLs and the clipboard."""

from collections.abc import Sequence
from typing import Any

from ..errors import Qwen35Error
from ..files import read_stdin
from . import terminal
from .typed_paths import find_file, media_kind

# More tokens take minutes to prefill.
MANY_TOKENS = 50_000
MAX_PAGES = 10_000
# More items are summarised in one line.
MAX_LINES = 8


def picture_settings(tokenizer: Any, image_tokens: int | None = None) -> Any:
    """The model's picture settings, with at most `image_tokens` each; raises if it reads none."""
    from ..prompt import vision_settings

    settings, why_none = vision_settings(tokenizer)
    if settings is None:
        raise Qwen35Error("this model reads no pictures and no videos", got=why_none)
    return settings if image_tokens is None else settings.with_tokens(image_tokens)


def check_sources(sources: Sequence[str], allow_url: bool) -> None:
    """Refuse sources that cannot be opened, before a model is loaded."""
    for source in sources:
        if is_url(source):
            _check_url(source, allow_url)
        elif source != "-" and find_file(source) is None:
            raise Qwen35Error(f"no file {source}", expected="a picture, a video or a PDF")


def open_media(
    kind: str, source: Any, settings: Any, *, allow_url: bool = False, pages: str | None = None
) -> list[Any]:
    """The picture, the video, or the pages of the PDF at a path or URL; `-` is standard input."""
    name = "clipboard"
    if isinstance(source, str):
        source, name = _opened(source, allow_url)
    # Imported here, because Pillow takes a while.
    if kind == "pdf":
        from ..media.documents import open_pdf

        return open_pdf(source, settings, page_numbers(pages), name)
    if kind == "video":
        from ..media.video import open_video

        return [open_video(source, settings, name=name)]
    from ..media.pictures import open_picture

    return [open_picture(source, settings, name)]


def page_numbers(text: str | None) -> list[int] | None:
    """Pages such as 1-3,7; None for all."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.replace(" ", "").split(","):
        first, dash, last = part.partition("-")
        is_range = first.isdecimal() and (last.isdecimal() if dash else True)
        if not is_range or int(first) > int(last or first):
            raise Qwen35Error("not pages", got=repr(text), expected="numbers such as 1-3,7")
        pages = range(int(first), int(last or first) + 1)
        # Bounded, because a list of more takes memory, and no document has as many.
        numbers += pages[:MAX_PAGES]
    return numbers


def _opened(source: str, allow_url: bool) -> tuple[Any, str]:
    """A path, or bytes and their name."""
    if source == "-":
        from ..media.pictures import MAX_FILE_BYTES

        data = read_stdin(MAX_FILE_BYTES)
        if not data:
            raise Qwen35Error("standard input is empty", expected="a picture, a video or a PDF")
        return data, "standard input"
    if is_url(source):
        _check_url(source, allow_url)
        from ..media.fetch import fetch

        return fetch(source), source.partition("?")[0].rpartition("/")[2] or source
    return find_file(source) or source, ""


def _check_url(source: str, allow_url: bool) -> None:
    if not allow_url:
        raise Qwen35Error("URLs are not fetched", got=source, hint="--allow-url allows it")


def is_url(source: str) -> bool:
    """Whether a source is a web address."""
    return source.lower().startswith(("http://", "https://"))


def clipboard() -> list[tuple[str, Any]]:
    """The picture or the copied files in the clipboard, each with its kind."""
    from PIL import ImageGrab

    try:
        content = ImageGrab.grabclipboard()
    except NotImplementedError:
        raise Qwen35Error(
            "the clipboard cannot be read here", hint="install wl-clipboard, or xclip for X11"
        ) from None
    except Exception as error:
        raise Qwen35Error("the clipboard cannot be read", got=error) from None
    if isinstance(content, list):
        return [(media_kind(name) or "image", name) for name in content]
    if content is None:
        raise Qwen35Error("the clipboard holds no picture", hint="/image PATH takes a file")
    return [("image", content)]


def is_video(media: Any) -> bool:
    """Whether it is a video."""
    return hasattr(media, "frames")


def num_tokens(media: Sequence[Any]) -> int:
    """Tokens of all media."""
    return sum(each.num_tokens for each in media)


def described(media: Sequence[Any], num_known: int = 0) -> list[str]:
    """A line for each except the first `num_known`; many are summarised."""
    counts, lines = {"picture": 0, "video": 0}, []
    for each in media:
        noun = "video" if is_video(each) else "picture"
        counts[noun] += 1
        lines.append(f"{noun} {counts[noun]}: {each.describe()}".translate(terminal.CONTROL))
    new = lines[num_known:]
    if len(new) <= MAX_LINES:
        return new
    tokens = num_tokens(media[num_known:])
    return [new[0], f"… and {len(new) - 1} more, {tokens:,} tokens in all"]
