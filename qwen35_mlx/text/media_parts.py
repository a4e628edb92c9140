"""Pictures and videos in messages of OpenAI's and Hugging Face's form: found and opened.

A source is opened once, when the message comes in. From then on the message holds a `Picture` or a
`Video`, so a later change of the file does not change the conversation.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import PromptError

if TYPE_CHECKING:
    from ..media.pictures import Picture
    from ..media.settings import VisionSettings
    from ..media.video import Video

    Media = Picture | Video

Part = dict[str, Any]
# Type of a part -> kind of media, and the key of its source. URLs open no local file: clients of a
# server send them too.
IMAGE, VIDEO = "image", "video"
FORMS = {
    "image": (IMAGE, "image"),
    "video": (VIDEO, "video"),
    "image_url": (IMAGE, "image_url"),
    "input_image": (IMAGE, "image_url"),
    "video_url": (VIDEO, "video_url"),
}
WEB = ("http://", "https://")


def text_of(content: Any) -> str:
    """The text of a message's content: its text parts, concatenated."""
    if not isinstance(content, list | tuple):
        return content if isinstance(content, str) else ""
    texts = (part.get("text") for part in content if isinstance(part, Mapping))
    return "".join(text for text in texts if isinstance(text, str))


def media_parts(content: Any) -> list[Part]:
    """The parts of an opened message that hold a picture or a video."""
    parts = content if isinstance(content, list | tuple) else ()
    return [part for part in parts if isinstance(part, dict) and part.get("type") in (IMAGE, VIDEO)]


def media_of(messages: Iterable[Any]) -> "list[Media]":
    """Pictures and videos of opened messages, in their order."""
    contents = (m.get("content") for m in messages if isinstance(m, Mapping))
    return [part[part["type"]] for content in contents for part in media_parts(content)]


def is_media(part: Any) -> bool:
    """Whether a part of a message's content is a picture or video, opened or not."""
    return isinstance(part, Mapping) and _form(part) != ("", "")


def source_parts(
    images: Sequence[Any] | None = None, videos: Sequence[Any] | None = None
) -> list[Part]:
    """Unopened parts for the pictures and videos that a caller gives with a text."""
    parts: list[Part] = []
    for kind, sources in ((IMAGE, images), (VIDEO, videos)):
        # Strings and arrays are sequences too.
        if not isinstance(sources, list | tuple | None):
            raise PromptError(
                f"{kind}s is not usable", got=repr(sources)[:80], expected=f"a list of {kind}s"
            )
        parts += [{"type": kind, kind: source} for source in sources or ()]
    return parts


def opened(
    messages: Sequence[Any],
    settings: "VisionSettings | None",
    *,
    why_none: str = "",
    allow_url: bool = False,
) -> Sequence[Any]:
    """The messages with each source opened; the same object if there is nothing to open.

    Without settings every picture is refused, with the reason `why_none`.
    """
    changed = list(messages)
    for i, message in enumerate(changed):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list | tuple) and any(map(is_media, content)):
            parts = [
                _opened(part, settings, why_none, allow_url) if is_media(part) else part
                for part in content
            ]
            changed[i] = {**message, "content": parts}
    return changed if any(a is not b for a, b in zip(changed, messages, strict=True)) else messages


def _opened(part: Part, settings: "VisionSettings | None", why_none: str, allow_url: bool) -> Part:
    kind, key = _form(part)
    if settings is None:
        raise PromptError(
            "this model reads no pictures and no videos",
            got=f"{'an' if kind == IMAGE else 'a'} {kind} in a message; {why_none}".rstrip("; "),
            expected="text",
        )
    source = part.get(key)
    if source is None:
        source = part.get("path")
    if source is None and "url" in part:
        key, source = "url", part["url"]
    source = _fetched(source, key, kind, allow_url)
    # Imported here: most programs see no picture.
    if kind == IMAGE:
        from ..media.pictures import open_picture

        return {"type": IMAGE, IMAGE: open_picture(source, settings)}
    from ..media.video import open_video

    options = {"fps": part["fps"]} if part.get("fps") is not None else {}
    return {"type": VIDEO, VIDEO: open_video(source, settings, **options)}


def _fetched(source: Any, key: str, kind: str, allow_url: bool) -> Any:
    """The source, checked; a web address is fetched if `allow_url`, else refused."""
    if isinstance(source, Mapping):
        source = source.get("url")
    if source is None:
        raise PromptError(f"a part of type {kind} has no {kind}", expected=f'{{"{kind}": …}}')
    if isinstance(source, str) and source.lower().startswith(WEB):
        if not allow_url:
            raise PromptError(
                f"the {kind} is on the web, and nothing is fetched for a message",
                got=source[:200],
                expected="a data: URL, a path or the picture itself",
                hint="allow_url=True fetches what you trust",
            )
        from ..media.fetch import fetch

        return fetch(source)
    if key.endswith("url") and not (isinstance(source, str) and source.startswith("data:")):
        raise PromptError(
            f"{key} of a message is not usable",
            got=repr(source)[:80],
            expected="a data: URL",
            hint=f'a local file goes into {{"type": "{kind}", "{kind}": PATH}}',
        )
    return source


def _form(part: Mapping[str, Any]) -> tuple[str, str]:
    """Kind and source key of a part, by its type, or else by its keys; empty if it is no media."""
    kind = part.get("type")
    if isinstance(kind, str) and kind in FORMS:
        return FORMS[kind]
    # As templates do: a part with such a key is media, whatever its type is.
    return next((form for key, form in FORMS.items() if key in part), ("", ""))


def part_for_template(part: Any) -> Any:
    """A part as a template may see it: the type of a picture, without its content."""
    return {"type": _form(part)[0]} if is_media(part) else part
