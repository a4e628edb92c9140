"""Pictures and videos of a saved conversation: files beside it, named by their digest.

A message on disk refers to them by digest, and every file is checked against it. So no session can
bring another picture, or any other file of the disk, into a conversation.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np

from ..errors import SessionError
from ..files import replacing, save_arrays
from ..text.media_parts import IMAGE, VIDEO, is_media, media_parts
from ..text.messages import Message

if TYPE_CHECKING:
    from ..media.settings import VisionSettings
    from ..text.media_parts import Media

SUFFIXES = {IMAGE: ".png", VIDEO: ".safetensors"}
SAVED_NAME = re.compile(rf"[0-9a-f]{{64}}({'|'.join(map(re.escape, SUFFIXES.values()))})")
# The only tensor in a video's file.
FRAMES = "frames"
# Fast, because every turn saves. The files are a sixth larger than at the default level.
PNG_LEVEL = 1


def pictures_folder(session: Path) -> Path:
    """The folder of a session's pictures."""
    return session.with_suffix(".pictures")


def reference(media: "Media") -> dict[str, Any]:
    """What the JSON file stores of a picture or video: digest, name, size, times of frames."""
    from ..media.video import Video

    known: dict[str, Any] = {
        "digest": media.digest.hex(),
        "name": media.name,
        "original_size": list(media.original_size),
    }
    if isinstance(media, Video):
        known["seconds"] = list(media.seconds)
    return known


def packed(messages: Sequence[Message]) -> list[Message]:
    """Messages for JSON: each picture and video replaced by its reference."""
    return [_replaced(m, lambda part: reference(part[part["type"]])) for m in messages]


def write_media(folder: Path, media: Iterable["Media"]) -> None:
    """Write the files that do not exist yet, each whole or not at all."""
    from ..media.video import Video

    for one in media:
        suffix = SUFFIXES[VIDEO if isinstance(one, Video) else IMAGE]
        file = folder / f"{one.digest.hex()}{suffix}"
        if file.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if isinstance(one, Video):
            save_arrays(file, {FRAMES: mx.array(one.frames)}, {}, 0o600)
            continue
        from PIL import Image

        with replacing(file, 0o600) as temporary:
            image = Image.fromarray(one.pixels)
            image.save(temporary, format="PNG", compress_level=PNG_LEVEL)


def remove_media(folder: Path, kept: Iterable["Media"] = ()) -> None:
    """Delete all picture files except those in `kept`, and the folder if it is then empty."""
    names = {one.digest.hex() for one in kept}
    if folder.is_dir():
        for file in folder.iterdir():
            if SAVED_NAME.fullmatch(file.name) and file.stem not in names:
                file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


class SavedMedia:
    """Reads the pictures of one session, each file once; raises SessionError."""

    def __init__(self, session: Path, settings: "VisionSettings | None", why_none: str = ""):
        self._session, self._settings, self._why_none = session, settings, why_none
        self._known: dict[str, Media] = {}

    def unpacked(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with the references of `packed` replaced by pictures."""
        return [
            _replaced(m, lambda part: self.read(part.get(part["type"]), part["type"]))
            for m in messages
        ]

    def read(self, known: Any, kind: str) -> "Media":
        """The picture or video of a reference."""
        from ..media.pictures import Picture
        from ..media.video import Video

        try:
            digest, name = str(known["digest"]), str(known["name"])
            width, height = map(int, known["original_size"])
            seconds = tuple(map(float, known["seconds"])) if kind == VIDEO else ()
            if not SAVED_NAME.fullmatch(digest + SUFFIXES[kind]):
                raise ValueError(digest[:80])
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise self._damaged(f"the reference to a picture: {error}") from None
        if digest in self._known:
            return self._known[digest]
        if self._settings is None:
            raise SessionError(
                f"the session {self._session.stem} has pictures, and this model reads none",
                got=self._why_none or None,
                hint="use the model that it was made with",
            )
        file = pictures_folder(self._session) / f"{digest}{SUFFIXES[kind]}"
        try:
            if kind == VIDEO:
                arrays = cast(dict[str, mx.array], mx.load(str(file)))
                frames = np.array(arrays[FRAMES])
                media: Media = Video(name, (width, height), frames, seconds, self._settings)
            else:
                media = Picture(name, (width, height), _pixels(file), self._settings)
            found = media.digest.hex()
        # A damaged file may raise anything.
        except Exception as error:
            raise self._damaged(f"{file.name}: {error}") from None
        if found != digest:
            raise self._damaged(f"{file.name} holds another picture, or is of another model")
        self._known[digest] = media
        return media

    def _damaged(self, got: str) -> SessionError:
        return SessionError(
            f"a picture of the session {self._session.stem} cannot be read",
            got=got.partition("\n")[0],
            expected=f"{pictures_folder(self._session)} as it was written",
        )


def _pixels(file: Path) -> np.ndarray:
    """RGB of a PNG that `write_media` wrote; its size is checked before it is decoded."""
    from PIL import Image

    from ..media.pictures import check_pixels

    with Image.open(file, formats=["PNG"]) as image:
        check_pixels(image.size, file.name)
        if image.mode != "RGB":
            raise ValueError(f"mode {image.mode}")
        return np.array(image)


def _replaced(message: Message, value: Any) -> Message:
    """A copy of a message in which `value(part)` stands for each picture or video."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list | tuple):
        return message
    shown = media_parts(content)
    parts = []
    for part in content:
        if part in shown:
            kind = part["type"]
            parts.append({"type": kind, kind: value(part)})
        elif is_media(part):
            raise SessionError("a message has media in an unknown form", got=part.get("type"))
        else:
            parts.append(part)
    return {**message, "content": parts}
