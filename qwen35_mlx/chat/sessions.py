"""Conversations on disk: what was said as JSON, pictures beside it, what was read as safetensors.

The first is the conversation. The second only saves reading it again, and holds the ids that it
was made of: where they differ from the prompt, the prompt is read. So one may be older than the
other, and each is replaced as a whole.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..checkpoint.names import OF_EXPERTS
from ..engine.prompt_cache import PromptCache, rope_delta
from ..errors import SessionError
from ..files import locked, replacing, session_home
from ..model.cache import KVCache, Snapshot, restore
from ..model.language import Model
from ..prompt import vision_settings
from ..text.media_parts import IMAGE, VIDEO, media_of, media_parts, text_of
from .saved_pictures import (
    SavedMedia,
    packed,
    pictures_folder,
    reference,
    remove_media,
    shown_in,
    write_media,
)

# A name, or the path of a file.
Session = str | os.PathLike[str]
FORMAT = 1
# Of conversations with pictures, which programs that read only the first would misunderstand.
PICTURES_FORMAT = 2
# Points to go back to that are kept: each has the recurrent state of all layers.
NUM_SAVED_SNAPSHOTS = 3
SAMPLED_ROWS, SAMPLED_COLUMNS = 8, 8


def session_file(session: Session) -> Path:
    """The JSON file of a session; a text without a slash is a name."""
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


def cache_file(file: Path) -> Path:
    """The cache beside a session's JSON file."""
    return file.with_suffix(".safetensors")


def save_conversation(
    session: Session, conversation: Mapping[str, Any], model: Model, cache: PromptCache | None
) -> Path:
    """Write all files, each whole or not at all."""
    file = session_file(session)
    identity = model_identity(model)
    shown = media_of(conversation["messages"])
    version = PICTURES_FORMAT if shown else FORMAT
    content = {"format": version, "saved": time.time(), "model": identity, **conversation}
    content["messages"] = packed(conversation["messages"])
    content["num_tokens"] = len(cache.ids) if cache else 0
    sealed = {"sha256": _digest_of(content), **content}
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # First: nothing names a picture that is not there.
        write_media(pictures_folder(file), shown)
        with replacing(file, 0o600) as temporary:
            text = json.dumps(sealed, ensure_ascii=False, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
        if cache is not None and cache.last_point:
            _save_cache(file, cache, identity)
            remove_media(pictures_folder(file), kept=[*shown, *shown_in(cache.ids)])
    # MLX raises RuntimeError where it cannot write; text may hold surrogates.
    except (OSError, RuntimeError, ValueError) as error:
        raise SessionError(
            "the session cannot be saved", got=error, expected=f"room to write at {file.parent}"
        ) from None
    return file


def load_conversation(
    session: Session, model: Model, tokenizer: Any = None
) -> tuple[dict[str, Any], PromptCache | None, str | None]:
    """The conversation, its cache, and a warning where that has to be read again.

    Raises SessionError if there is no such session, what was said is damaged, or the model does
    not read its pictures.
    """
    file = session_file(session)
    content = read_conversation(file)
    media = SavedMedia(file, *vision_settings(tokenizer))
    content["messages"] = media.unpacked(content["messages"])
    if content["model"] != model_identity(model):
        return content, None, "the session is of another model; it is read again"
    if not cache_file(file).exists():
        return content, None, None
    try:
        return content, _load_cache(cache_file(file), model, media), None
    # Whatever a damaged file leads to: nothing of it is used.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        return content, None, f"the session's cache cannot be used, it is read again: {reason}"


def read_conversation(file: Path) -> dict[str, Any]:
    """What was said, checked."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        checksum = content.pop("sha256")
        known = content["format"]
    except FileNotFoundError:
        raise SessionError(
            f"no session {file.stem}", got=f"no {file}", hint="qwen35-mlx sessions lists them"
        ) from None
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


def _damaged(file: Path, got: str) -> SessionError:
    return SessionError(
        f"the session {file.stem} is damaged",
        got=got,
        expected=f"{file} as it was written",
        hint=f"remove it with: qwen35-mlx sessions --remove {file.stem}",
    )


def model_identity(model: Model) -> str:
    """A digest of the model's names, shapes, types and of a few numbers of each tensor.

    Kept while the model has the same arrays: it takes an operation or more for each of them.
    """
    named = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    # Drafts change no text: the MTP layer may be there or not. Slots of experts always change.
    tensors = sorted(
        (name, array)
        for name, array in named
        if not name.startswith("mtp.") and not (model.experts and OF_EXPERTS in name)
    )
    changes = model.adapter_digest + (model.experts.digest if model.experts else "")
    arrays = hash((changes, *(id(array) for _, array in tensors)))
    known = getattr(model, "_identity", "")
    if not known.startswith(f"{arrays} "):
        known = model._identity = f"{arrays} {_digest_of_weights(tensors, changes)}"
    return known.partition(" ")[2]


def _digest_of_weights(tensors: Sequence[tuple[str, mx.array]], adapter: str) -> str:
    # Samples could miss what one adapter has and another has not.
    digest = hashlib.sha256(adapter.encode())
    samples = []
    for name, array in tensors:
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        # By rows: a stack of experts has more elements than an index of MLX can count.
        rows = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
        step = max(1, rows.shape[0] // SAMPLED_ROWS)
        samples.append(rows[::step][:SAMPLED_ROWS, :SAMPLED_COLUMNS].reshape(-1).view(mx.uint8))
    if samples:
        digest.update(np.array(mx.concatenate(samples)).tobytes())
    return digest.hexdigest()


def _digest_of(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _checksum(arrays: Mapping[str, mx.array], identity: str) -> str:
    digest = hashlib.sha256(identity.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        # As bytes, for numpy has no bfloat16.
        words = mx.contiguous(array).reshape(-1).view(mx.uint8)
        digest.update(np.array(words, copy=False).data)
    return digest.hexdigest()


def _save_cache(session: Path, cache: PromptCache, identity: str) -> None:
    """The last point and the last few before it; keys and values once."""
    end = cache.last_point
    shown = shown_in(cache.ids[:end])
    write_media(pictures_folder(session), shown)
    points = [cache.snapshots[n] for n in sorted(cache.snapshots)[-NUM_SAVED_SNAPSHOTS:]]
    if end not in cache.snapshots:
        points.append(cache.end())
    # Of pictures they have more than 32 bits.
    arrays = {"ids": mx.array(list(cache.ids[:end]), dtype=mx.int64)}
    for layer, entry in enumerate(cache.entries):
        if isinstance(entry, KVCache):
            keys, values = cast(tuple[mx.array, mx.array], (entry.keys, entry.values))
            arrays[f"layers.{layer}.keys"] = keys[..., :end, :]
            arrays[f"layers.{layer}.values"] = values[..., :end, :]
    for point in points:
        for layer, kept in enumerate(point.entries):
            if not isinstance(kept, int):
                for i, array in enumerate(kept):
                    arrays[f"points.{point.num_tokens}.layers.{layer}.{i}"] = array
        if cache.mtp and point.mtp_hidden is not None:
            arrays[f"mtp.{point.num_tokens}.hidden"] = point.mtp_hidden
            arrays[f"mtp.{point.num_tokens}.offset"] = mx.array(point.entries[-1])
    if cache.mtp and (read := cache.mtp.cache.offset):
        keys, values = cast(
            tuple[mx.array, mx.array], (cache.mtp.cache.keys, cache.mtp.cache.values)
        )
        arrays |= {"mtp.keys": keys[..., :read, :], "mtp.values": values[..., :read, :]}
    arrays = {name: mx.contiguous(array) for name, array in arrays.items()}
    metadata = {"format": str(FORMAT), "model": identity, "sha256": _checksum(arrays, identity)}
    if shown:
        metadata["pictures"] = json.dumps([reference(media) for media in shown])
    with replacing(cache_file(session), 0o600) as temporary:
        mx.save_safetensors(str(temporary), arrays, metadata)


def _load_cache(file: Path, model: Model, media: SavedMedia) -> PromptCache:
    """Raises whatever is wrong with the file."""
    arrays, metadata = cast(
        tuple[dict[str, mx.array], dict[str, str]], mx.load(str(file), return_metadata=True)
    )
    identity = model_identity(model)
    if metadata.get("model") != identity or metadata.get("format") != str(FORMAT):
        raise SessionError("it is of another model or format")
    if metadata.get("sha256") != _checksum(arrays, identity):
        raise SessionError("its checksum is another")
    ids = cast(list[int], arrays.pop("ids").tolist())
    shown = [
        media.read(known, VIDEO if "seconds" in known else IMAGE)
        for known in json.loads(metadata.get("pictures", "[]"))
    ]
    # Each id of a picture has one meaning: that of the picture with this digest.
    tokens = {int(t): t for one in shown for span in one.spans for t in span.tokens()}
    ids = [i if i >= 0 else tokens[i] for i in ids]
    cache = PromptCache(model, ids)
    for layer, entry in enumerate(cache.entries):
        if isinstance(entry, KVCache):
            entry.keys = arrays.pop(f"layers.{layer}.keys")
            entry.values = arrays.pop(f"layers.{layer}.values")
            entry.offset = len(cache.ids)
    of_mtp = {name: arrays.pop(name) for name in list(arrays) if name.startswith("mtp.")}
    if cache.mtp and "mtp.keys" in of_mtp:
        keys = of_mtp["mtp.keys"]
        cache.mtp.cache.state = keys, of_mtp["mtp.values"], keys.shape[2]
    for num_tokens in sorted({int(name.split(".")[1]) for name in arrays}):
        kept: list[int | tuple[mx.array, ...]] = []
        for layer, entry in enumerate(cache.entries):
            prefix = f"points.{num_tokens}.layers.{layer}."
            states = tuple(arrays[n] for n in sorted(arrays) if n.startswith(prefix))
            kept.append(num_tokens if isinstance(entry, KVCache) else states)
        if cache.mtp:
            # Of a file without it, the layer begins anew.
            kept.append(int(cast(int, of_mtp.get(f"mtp.{num_tokens}.offset", mx.array(0)).item())))
        point = Snapshot(num_tokens, tuple(kept), rope_delta(ids[:num_tokens]))
        point.mtp_hidden = of_mtp.get(f"mtp.{num_tokens}.hidden")
        cache.snapshots[num_tokens] = point
    restore(cache.all_entries, cache.snapshots[len(cache.ids)])
    if cache.mtp:
        cache.mtp.hidden = cache.snapshots[len(cache.ids)].mtp_hidden
    return cache


@contextmanager
def hold(session: Session) -> Iterator[Path]:
    """Hold a session: a second chat that wants it is refused."""
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
    """A line of the list of sessions."""

    name: str
    saved: float
    num_turns: int
    num_bytes: int
    first_words: str
    problem: str = ""
    num_pictures: int = 0


def list_sessions() -> list[SessionInfo]:
    """Every session with a name, the last saved first."""
    home = session_home()
    found = []
    for file in home.glob("[!.]*.json") if home.is_dir() else ():
        pictures = pictures_folder(file)
        files = [file, cache_file(file), *(pictures.iterdir() if pictures.is_dir() else ())]
        num_bytes = sum(f.stat().st_size for f in files if f.is_file())
        try:
            content = read_conversation(file)
        except SessionError as error:
            problem = str(error).partition("\n")[0]
            found.append(SessionInfo(file.stem, file.stat().st_mtime, 0, num_bytes, "", problem))
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
        raise SessionError(f"no session {file.stem}", hint="qwen35-mlx sessions lists them")
    with hold(session):
        for path in (cache_file(file), file, file.with_name(f".{file.stem}.lock")):
            path.unlink(missing_ok=True)
        remove_media(pictures_folder(file))
