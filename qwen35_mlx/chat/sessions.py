"""Saved sessions: messages as JSON, pictures and the prompt cache beside it.

The JSON file is the conversation and is replaced as a whole. The cache only avoids a prefill; it is
found by the ids of the prompt, so it may be older than the messages.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Qwen35Error, SessionError, first_line
from ..files import locked, replacing, session_home
from ..model.identity import model_identity
from ..model.language import Model
from ..prompt import vision_settings
from ..text.media_parts import media_of, media_parts, text_of
from .saved_pictures import SavedMedia, packed, pictures_folder, remove_media, write_media

# A name, or the path of a file.
Session = str | os.PathLike[str]
FORMAT = 1
# For conversations with pictures, which programs for the first format would misread.
PICTURES_FORMAT = 2


def session_file(session: Session) -> Path:
    """The JSON file of a session; a string without a slash is a name."""
    text = os.fspath(session)
    if not isinstance(session, str) or os.sep in text:
        path = Path(os.path.expanduser(text))
        is_file_name = path.name not in ("", "..") and not text.endswith(os.sep)
        has_home = not text.startswith("~") or path != Path(text)
        if not is_file_name or not has_home or re.search(r"[\x00-\x1f\x7f]", text):
            raise SessionError("not a session's file", got=repr(text), expected="a file's path")
        return path if path.suffix == ".json" else path.with_name(path.name + ".json")
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise SessionError(
            "not a session's name", got=repr(text), expected="letters, digits, dots, - and _"
        )
    return session_home() / f"{text}.json"


def cache_folder(file: Path) -> Path:
    """The folder of a session's prompt cache."""
    return file.with_suffix(".cache")


def save_conversation(session: Session, conversation: Mapping[str, Any], model: Model) -> Path:
    """Write the messages, whole or not at all, and their pictures."""
    file = session_file(session)
    shown = media_of(conversation["messages"])
    version = PICTURES_FORMAT if shown else FORMAT
    identity = model_identity(model)
    content = {"format": version, "saved": time.time(), "model": identity, **conversation}
    content["messages"] = packed(conversation["messages"])
    sealed = {"sha256": _digest_of(content), **content}
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Before the messages, so that no saved message refers to a missing picture.
        write_media(pictures_folder(file), shown)
        with replacing(file, 0o600) as temporary:
            text = json.dumps(sealed, ensure_ascii=False, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
        remove_media(pictures_folder(file), kept=shown)
        _old_cache(file).unlink(missing_ok=True)
    # Text may hold surrogates.
    except (OSError, ValueError) as error:
        raise SessionError(
            "the session cannot be saved", got=error, expected=f"room to write at {file.parent}"
        ) from None
    return file


def load_conversation(
    session: Session, model: Model, tokenizer: Any = None
) -> tuple[dict[str, Any], str | None]:
    """The conversation, and a warning if it has to be prefilled again.

    Raises SessionError if the session does not exist, is damaged, or has pictures that the model
    does not read.
    """
    file = session_file(session)
    content = read_conversation(file)
    media = SavedMedia(file, *vision_settings(tokenizer))
    content["messages"] = media.unpacked(content["messages"])
    if model.ring is not None:
        # Each Mac holds a part of the cache, and only this one writes files.
        return content, "several Macs store no cache of a session; it is read again"
    if content["model"] != model_identity(model):
        return content, "the session is of another model, or of several Macs; it is read again"
    if _old_cache(file).exists():
        return content, "the session's cache is of an earlier version; it is read again"
    return content, None


def _old_cache(file: Path) -> Path:
    """The cache file of earlier versions."""
    return file.with_suffix(".safetensors")


def read_conversation(file: Path) -> dict[str, Any]:
    """The content of a session's JSON file, checked."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        checksum = content.pop("sha256")
        known = content["format"]
    except FileNotFoundError:
        raise _missing(file) from None
    except OSError as error:
        raise SessionError(f"the session {file.stem} cannot be read", got=error) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from None
    if checksum != _digest_of(content):
        raise _damaged(file, "its checksum is another")
    if known not in (FORMAT, PICTURES_FORMAT):
        raise SessionError(
            f"the session {file.stem} has another format",
            got=known,
            expected=f"{FORMAT} or {PICTURES_FORMAT}",
            hint="use the version of qwen35-mlx that wrote it",
        )
    return dict(content)


def _is_listed(file: Path) -> bool:
    """Whether a file is in the folder of sessions, so that the name alone means it."""
    with suppress(Qwen35Error):
        return file.parent == session_home()
    return False


def _missing(file: Path) -> SessionError:
    if _is_listed(file):
        hint = "qwen35-mlx sessions lists them"
        return SessionError(f"no session {file.stem}", got=f"no {file}", hint=hint)
    return SessionError(
        f"no session at {file}",
        expected="a file that /save or --session wrote",
        hint=f"qwen35-mlx chat --session {shlex.quote(str(file))} begins one",
    )


def _damaged(file: Path, got: str) -> SessionError:
    # The name alone would be that of another session.
    name = file.stem if _is_listed(file) else str(file.absolute())
    return SessionError(
        f"the session {file.stem} is damaged",
        got=got,
        expected=f"{file} as it was written",
        hint=f"remove it with: qwen35-mlx sessions --remove {shlex.quote(name)}",
    )


def _digest_of(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def hold(session: Session) -> Iterator[Path]:
    """Lock a session; raises SessionError if another chat has it open."""
    file = session_file(session)
    held = ExitStack()
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        held.enter_context(locked(file.with_name(f".{file.stem}.lock"), wait=False))
    except BlockingIOError:
        raise SessionError(
            f"the session {file.stem} is open in another chat", hint="leave it, or use another"
        ) from None
    except OSError as error:
        raise SessionError("sessions cannot be stored", got=error) from None
    with held:
        yield file


@dataclass(frozen=True)
class SessionInfo:
    """One entry of the list of sessions."""

    name: str
    saved: float
    num_turns: int
    num_bytes: int
    first_words: str
    problem: str = ""
    num_pictures: int = 0


def list_sessions() -> list[SessionInfo]:
    """Every session in the session folder, the last saved first."""
    home = session_home()
    found = []
    for file in home.glob("[!.]*.json") if home.is_dir() else ():
        folders = pictures_folder(file), cache_folder(file)
        num_bytes = sum(map(_bytes_of, (file, _old_cache(file), *folders)))
        try:
            content = read_conversation(file)
        except SessionError as error:
            # A link to nothing, or one that was removed meanwhile.
            with suppress(FileNotFoundError):
                saved, problem = file.stat().st_mtime, first_line(error)
                found.append(SessionInfo(file.stem, saved, 0, num_bytes, "", problem))
            continue
        asked = [text_of(m["content"]) for m in content["messages"] if m["role"] == "user"]
        first = " ".join(asked[0].split()) if asked else ""
        num_pictures = sum(len(media_parts(m["content"])) for m in content["messages"])
        found.append(
            SessionInfo(file.stem, content["saved"], len(asked), num_bytes, first, "", num_pictures)
        )
    return sorted(found, key=lambda info: -info.saved)


def remove_session(session: Session) -> None:
    """Delete a session, damaged or not."""
    file = session_file(session)
    if not file.exists():
        raise _missing(file)
    with hold(session):
        for path in (_old_cache(file), file, file.with_name(f".{file.stem}.lock")):
            path.unlink(missing_ok=True)
        shutil.rmtree(cache_folder(file), ignore_errors=True)
        remove_media(pictures_folder(file))


def trim_caches(max_bytes: float) -> None:
    """Delete caches of the sessions saved longest ago until the rest fits; messages stay."""
    files: list[Path] = []
    # Without a home folder there are only sessions in other places.
    with suppress(Qwen35Error):
        files = [f for f in session_home().glob("[!.]*.json") if cache_folder(f).is_dir()]
    num_bytes = {file: _bytes_of(cache_folder(file)) for file in files}
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        if sum(num_bytes.values()) <= max_bytes:
            return
        # An open session keeps its cache.
        with suppress(SessionError), hold(file):
            shutil.rmtree(cache_folder(file), ignore_errors=True)
            del num_bytes[file]


def _bytes_of(path: Path) -> int:
    """Size of a file, or of all files in a folder."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
