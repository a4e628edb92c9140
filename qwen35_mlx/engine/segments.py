"""Saved prompt caches: an append-only folder of segments and points.

A segment file holds keys and values of some tokens of a sequence; a point file holds the recurrent
states at the end of a segment. Names are hashes of all ids up to the end: so equal prefixes are one
file, a prompt finds its segments by its ids, and no file contains the ids.
"""

import hashlib
import os
import re
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, cast

import mlx.core as mx
import numpy as np

from ..errors import SessionError, first_line
from ..files import locked
from ..model.cache import ArraysCache, KVCache, Snapshot, restore
from ..model.identity import model_identity
from ..model.language import Model
from .features import FeatureStore
from .mtp_state import MAX_WAITING
from .prompt_cache import PromptCache, common_prefix
from .segment_file import PIECE_BYTES, read_file, write_file

# A part of every name, so that files of other formats are not found.
FORMAT = 1
NAME_CHARS = 24
FILE_NAME = re.compile(
    r"(?P<parent>[0-9a-f]{24})-(?P<name>[0-9a-f]{24})-(?P<start>\d{1,9})-(?P<stop>\d{1,9})"
    r"\.(?P<kind>keys|states)\.safetensors"
)
MIN_SEGMENT_TOKENS = 16


class Segment(NamedTuple):
    """Some tokens of a sequence, after those of its parent."""

    parent: str
    name: str
    start: int
    stop: int

    def file_name(self, kind: str) -> str:
        """The file of its keys and values ("keys"), or of the states at its end ("states")."""
        return f"{self.parent}-{self.name}-{self.start}-{self.stop}.{kind}.safetensors"


Chain = tuple[Segment, ...]


class Segments:
    """The files of one model in a folder, with LRU eviction.

    One writer at a time. Damaged files are deleted with all files after them and noted in
    `problems`; the model prefills these tokens again.
    """

    def __init__(self, folder: Path, model: Model, max_bytes: float | None = None):
        """`max_bytes`: bound of the folder, except for the sequence that was written last."""
        self.folder, self.model = folder, model
        self.max_bytes = float("inf") if max_bytes is None else max_bytes
        self.problems: list[str] = []
        known = [FORMAT, model_identity(model), model.config.rope]
        self._root = _name("", repr(known).encode())
        # Segments by the name of their parent, and their own.
        self._children: dict[str, dict[str, Segment]] = defaultdict(dict)
        # Size and time of last use, by file name.
        self._bytes: dict[str, int] = {}
        self._used: dict[str, float] = {}
        self._cleared = False
        self._scan()

    def _scan(self) -> None:
        with suppress(OSError):
            for entry in os.scandir(self.folder):
                if not (match := FILE_NAME.fullmatch(entry.name)):
                    continue
                known = entry.stat()
                self._bytes[entry.name], self._used[entry.name] = known.st_size, known.st_mtime
                if match["kind"] == "keys":
                    place = int(match["start"]), int(match["stop"])
                    segment = Segment(match["parent"], match["name"], *place)
                    self._children[segment.parent][segment.name] = segment

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self._bytes.values())

    def read(
        self, ids: Sequence[int], at_least: int = 1, features: FeatureStore | None = None
    ) -> PromptCache | None:
        """The cache of the longest saved prefix of `ids`; None if it has fewer than `at_least`."""
        words = _words(ids)
        while True:
            points = [path for path in self._paths(words) if self._has_point(path[-1])]
            path = max(points, key=lambda path: path[-1].stop, default=None)
            if path is None or path[-1].stop < at_least:
                return None
            if (cache := self._load(path, ids, features)) is not None:
                self._mark_used(path[-1])
                return cache

    def _load(
        self, path: Chain, ids: Sequence[int], features: FeatureStore | None
    ) -> PromptCache | None:
        """The cache at the end of a path; None if a file was damaged, and is deleted now."""
        end = path[-1]
        cache = PromptCache(self.model, ids[: end.stop], features=features)
        kind, segment = "states", end
        try:
            states, known = self._read(end, kind)
            kind = "keys"
            for segment in path:
                self._append(cache, *self._read(segment, kind))
            kind, segment = "states", end
            point = _point(cache, states, int(known["mtp_tokens"]))
        # A damaged file may raise any of these; nothing of it is used.
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            self.problems.append(first_line(error))
            if kind == "states":
                self._unlink(segment.file_name(kind))
            else:
                self._remove(segment)
            return None
        restore(cache.all_entries, point)
        if cache.mtp:
            cache.mtp.hidden = point.mtp_hidden
        cache.snapshots[end.stop] = point
        cache.mark_used(end.stop)
        return cache

    def _read(self, segment: Segment, kind: str) -> tuple[dict[str, mx.array], dict[str, str]]:
        name = segment.file_name(kind)
        arrays, metadata = read_file(self.folder / name)
        if metadata["name"] != name:
            raise ValueError(f"{name} has the data of another file")
        return arrays, metadata

    def _append(
        self, cache: PromptCache, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]
    ) -> None:
        for layer, entry in enumerate(cache.entries):
            if isinstance(entry, KVCache):
                entry.append_rows(_of(arrays, f"layers.{layer}."))
        rows = _of(arrays, "mtp.")
        if cache.mtp and rows:
            held = cache.mtp.cache
            known = held.offset - int(metadata["mtp_start"])
            if known >= 0:
                held.append_rows({name: a[..., known:, :] for name, a in rows.items()})
        # Evaluate, so that the bytes of the file can be freed.
        cache.settle()

    def write(self, cache: PromptCache, num_tokens: int) -> Generator[None]:
        """Append the missing segments of the first `num_tokens` of a cache, which must be a point.

        Yields after every 32 MiB; stopping there loses at most one segment. Ends early if the cache
        changes.
        """
        # With several Macs, the others have parts of the cache. That of mlx-lm is not read back.
        cannot_save = getattr(self.model, "ring", None) or not cache.can_go_back
        if cannot_save or not 0 < num_tokens <= cache.last_point:
            return
        point = cache.snapshots.get(num_tokens) or cache.end()
        if point.num_tokens != num_tokens:
            return
        try:
            self._clear()
            yield from self._write(cache, point)
        # MLX raises RuntimeError if it has no memory.
        except (OSError, RuntimeError) as error:
            raise SessionError(
                "the prompt cache cannot be saved",
                got=error,
                expected=f"room to write at {self.folder}",
                hint="what was saved earlier is kept",
            ) from None

    def _write(self, cache: PromptCache, point: Snapshot) -> Generator[None]:
        ids = list(cache.ids[: point.num_tokens])
        words = _words(ids)
        path = max(self._paths(words), key=lambda path: path[-1].stop, default=())
        # Accessed once: a later access would end a pass in progress.
        entries, mtp = list(enumerate(cache.entries)), cache.mtp and cache.mtp.cache
        kvs = {f"layers.{n}": entry for n, entry in entries if isinstance(entry, KVCache)}
        # The MTP layer has read fewer tokens, by this number.
        mtp_lag = point.num_tokens - cast(int, point.entries[-1]) if mtp else 0

        def rows(start: int, stop: int) -> tuple[dict[str, mx.array], dict[str, str]]:
            places = {name: (kv, start, stop) for name, kv in kvs.items()}
            metadata = {}
            if mtp and stop > mtp_lag:
                # Its number of pending tokens varies, so leave room for them.
                first = max(0, start - mtp_lag - MAX_WAITING)
                places["mtp"] = mtp, first, stop - mtp_lag
                metadata["mtp_start"] = str(first)
            # Copies, because the next append would copy the whole cache while views are alive.
            copies = {
                f"{name}.{part}": mx.contiguous(array)
                for name, (kv, *place) in places.items()
                for part, array in kv.rows(*place).items()
            }
            mx.eval(copies)
            return copies, metadata

        # A killed writer leaves segments without a point. If the tokens were prefilled again in
        # other pieces, their last bits may differ: then these segments are replaced.
        for number, segment in enumerate(path):
            if not self._is_used(segment):
                yield
                if not self._holds(segment, *rows(segment.start, segment.stop)):
                    self._remove(segment)
                    path = path[:number]
                    break
        while (start := path[-1].stop if path else 0) < len(ids):
            # Between two pieces another request may have continued it from an earlier point.
            if common_prefix(cache.ids, ids) < len(ids):
                return
            token_bytes = sum(a.nbytes for kv in kvs.values() for a in kv.rows(0, 1).values())
            most = max(MIN_SEGMENT_TOKENS, PIECE_BYTES // max(token_bytes, 1))
            stop = min(start + most, len(ids))
            parent = path[-1].name if path else self._root
            segment = Segment(parent, _name(parent, words[start:stop]), start, stop)
            yield from self._write_file(segment, "keys", *rows(start, stop))
            self._children[parent][segment.name] = segment
            path = (*path, segment)
            yield
        if not self._has_point(path[-1]):
            states = {
                f"layers.{layer}.{i}": array
                for layer, kept in enumerate(point.entries)
                if not isinstance(kept, int)
                for i, array in enumerate(kept)
            }
            if point.mtp_hidden is not None:
                states["mtp.hidden"] = point.mtp_hidden
            known = {"mtp_tokens": str(point.entries[-1] if mtp else 0)}
            yield from self._write_file(path[-1], "states", states, known)
        self._thin(path)
        self.trim()

    def _holds(
        self, segment: Segment, rows: Mapping[str, mx.array], metadata: Mapping[str, str]
    ) -> bool:
        """Whether the file of a segment has exactly these rows."""
        try:
            arrays, known = self._read(segment, "keys")
        except (ValueError, LookupError, OSError):
            return False
        bits = [
            {name: array.reshape(-1).view(mx.uint8) for name, array in each.items()}
            for each in (arrays, rows)
        ]
        return (
            bits[0].keys() == bits[1].keys()
            and metadata.items() <= known.items()
            and all(mx.array_equal(array, bits[1][name]).item() for name, array in bits[0].items())
        )

    def _is_used(self, segment: Segment) -> bool:
        """Whether there is a point at its end or after it."""
        return any(map(self._has_point, self._behind(segment)))

    def _behind(self, segment: Segment) -> list[Segment]:
        """A segment and all its descendants."""
        behind = [segment]
        for each in behind:
            behind += self._children.get(each.name, {}).values()
        return behind

    def _write_file(
        self,
        segment: Segment,
        kind: str,
        arrays: Mapping[str, mx.array],
        metadata: Mapping[str, str],
    ) -> Generator[None]:
        name = segment.file_name(kind)
        num_bytes = yield from write_file(self.folder / name, arrays, {**metadata, "name": name})
        self._bytes[name], self._used[name] = num_bytes, time.time()

    def _clear(self) -> None:
        """Before the first write: make the folder, and delete temporary files of killed writers."""
        if not self._cleared:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for leftover in self.folder.glob(".*.partial.safetensors"):
                leftover.unlink(missing_ok=True)
            self._cleared = True

    def _thin(self, path: Chain) -> None:
        """Delete points so that distances from the end double; keep points of forks.

        So going back by n tokens prefills at most about n tokens more.
        """
        points = [segment for segment in path if self._has_point(segment)]
        *_, newer = points
        for older, segment in reversed(list(pairwise(points[:-1]))):
            far, near = path[-1].stop - older.stop, path[-1].stop - newer.stop
            if far <= 2 * near and len(self._children[segment.name]) < 2:
                self._unlink(segment.file_name("states"))
            else:
                newer = segment

    def trim(self) -> None:
        """Delete the least recently used ends of sequences until the rest fits."""
        while self.nbytes > self.max_bytes:
            segments = {
                s.name: s for children in self._children.values() for s in children.values()
            }
            ends = [s for s in segments.values() if not self._children.get(s.name)]
            ends.sort(key=lambda s: self._used.get(s.file_name("keys"), 0.0))
            if len(ends) < 2:
                return
            # Also delete its ancestors without a point or other descendants.
            end: Segment | None = ends[0]
            while end and not self._children.get(end.name):
                self._remove(end)
                end = segments.get(end.parent)
                if end and self._has_point(end):
                    break

    def _paths(self, words: np.ndarray) -> Iterator[Chain]:
        """Yield every chain of segments that is a prefix of these ids."""
        paths: list[Chain] = [()]
        while paths:
            path = paths.pop()
            parent, start = (path[-1].name, path[-1].stop) if path else (self._root, 0)
            children = self._children.get(parent, {})
            for stop in {s.stop for s in children.values() if start < s.stop <= len(words)}:
                segment = children.get(_name(parent, words[start:stop]))
                if segment and (segment.start, segment.stop) == (start, stop):
                    paths.append((*path, segment))
                    yield paths[-1]

    def _has_point(self, segment: Segment) -> bool:
        return segment.file_name("states") in self._bytes

    def _mark_used(self, segment: Segment) -> None:
        name = segment.file_name("keys")
        self._used[name] = time.time()
        with suppress(OSError):
            os.utime(self.folder / name)

    def _remove(self, segment: Segment) -> None:
        """Delete a segment with all its descendants, the last ones first."""
        for each in reversed(self._behind(segment)):
            self._unlink(each.file_name("states"))
            self._unlink(each.file_name("keys"))
            del self._children[each.parent][each.name]

    def _unlink(self, name: str) -> None:
        self._bytes.pop(name, None)
        self._used.pop(name, None)
        with suppress(OSError):
            (self.folder / name).unlink()


@contextmanager
def open_folder(folder: Path, model: Model, max_bytes: float) -> Iterator[Segments]:
    """The segments of a folder, which is created if needed and locked against other processes."""
    if getattr(model, "ring", None):
        raise SessionError(
            "the prompt cache of several Macs cannot be saved",
            got=f"--cache-dir {folder}",
            hint="leave --cache-dir out, or run on one Mac",
        )
    held = ExitStack()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        held.enter_context(locked(folder / ".lock", wait=False))
    except BlockingIOError:
        raise SessionError(
            f"{folder} is in use by another process", expected="a folder of its own"
        ) from None
    except OSError as error:
        raise SessionError(f"{folder} cannot be used", got=error) from None
    with held:
        yield Segments(folder, model, max_bytes)


def _point(cache: PromptCache, states: Mapping[str, mx.array], mtp_tokens: int) -> Snapshot:
    """The snapshot at the end of a cache whose keys and values are loaded."""
    kept: list[int | tuple[mx.array, ...]] = []
    for layer, entry in enumerate(cache.entries):
        if isinstance(entry, ArraysCache):
            held = _of(states, f"layers.{layer}.")
            kept.append(tuple(held[str(i)] for i in range(len(entry.cache))))
        else:
            kept.append(len(cache.ids))
            if entry.offset != len(cache.ids):
                raise ValueError("keys and values for a different number of tokens")
    if cache.mtp:
        # If a part of its cache is missing, the MTP layer starts over.
        kept.append(mtp_tokens if cache.mtp.cache.offset >= mtp_tokens else 0)
    point = Snapshot(len(cache.ids), tuple(kept), cache.rope_delta)
    point.mtp_hidden = states.get("mtp.hidden")
    return point


def _of(arrays: Mapping[str, mx.array], prefix: str) -> dict[str, mx.array]:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _words(ids: Sequence[int]) -> np.ndarray:
    # Ids of pictures have more than 32 bits.
    return np.array(ids, dtype="<i8")


def _name(parent: str, words: np.ndarray | bytes) -> str:
    data = words if isinstance(words, bytes) else words.tobytes()
    return hashlib.sha256(parent.encode() + data).hexdigest()[:NAME_CHARS]
