"""A checkpoint on the hub: its headers by range requests, its shards one after the other."""

import hashlib
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from qwen35_mlx.checkpoint.headers import (
    INDEX_FILE,
    PREFIX_BYTES,
    SourceTensor,
    gather_checked,
    header_length,
    parse_header,
    read_index,
)
from qwen35_mlx.config import read_config
from qwen35_mlx.errors import CheckpointError, Qwen35Error, first_line

from .source import COMPANIONS, Source, open_source

log = logging.getLogger(__name__)
T = TypeVar("T")

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Most headers come with the first request.
FIRST_BYTES = 2**17
HEADER_THREADS = 8
# After the client's own retries; the waits add up to about six minutes.
WAITS_S = (1, 2, 4, 8, 15, 30, 60, 120, 120)
# Where somebody sits and waits.
SHORT_WAITS_S = WAITS_S[:3]
TIMEOUT_S = 30
# Wrong bytes are not the network's mood: they are fetched again this often.
MAX_DOWNLOADS = 3


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it, with its SHA-256, or outside of LFS the name git gives it."""

    name: str
    nbytes: int
    checksum: str
    in_lfs: bool


@dataclass(frozen=True)
class HubSource(Source):
    """A checkpoint on the hub at one commit; `folder` is where its shards go when fetched."""

    repo: str
    commit: str
    listing: Mapping[str, HubFile]

    @property
    def origin(self) -> dict[str, str]:
        return {"source": self.repo, "source_revision": self.commit}

    def fingerprints(self) -> dict[str, str]:
        return {file.name: self.listing[file.name].checksum for file in self.files}

    def companions(self) -> list[Path]:
        # A star stands for slashes too.
        names = {
            name
            for name in self.listing
            for pattern in COMPANIONS
            if fnmatch(name, pattern) and name.count("/") == pattern.count("/")
        }
        return [fetch_small(self.repo, self.commit, name) for name in sorted(names)]


def open_any(
    source: str | Path | Source, revision: str | None = None, fetch_into: Path | None = None
) -> Source:
    """Open a folder, or a hub id such as owner/name at a branch, tag or commit."""
    if isinstance(source, Source):
        return source
    if is_hub_id(source):
        return open_hub(str(source), revision, fetch_into or Path("."))
    if revision:
        raise Qwen35Error("a folder has no revisions", got=f"revision={revision}")
    return open_source(Path(source).expanduser())


def is_hub_id(source: str | Path) -> bool:
    """Whether `source` is no folder but shaped like owner/name."""
    return is_repository(str(source)) and not Path(source).expanduser().exists()


def is_repository(name: str) -> bool:
    """Whether `name` is shaped like owner/name."""
    shaped = HUB_ID.fullmatch(name) and ".." not in name and not name.startswith((".", "-"))
    return bool(shaped)


def open_hub(repo: str, revision: str | None, folder: Path) -> HubSource:
    """Read config.json, the index and all headers of a repository; no weight is fetched."""
    from huggingface_hub import HfApi

    info = retry(repo, lambda: HfApi().model_info(repo, revision=revision, files_metadata=True))
    listing = listing_of(info)
    commit = str(info.sha)
    if "config.json" not in listing:
        raise CheckpointError(f"{repo} is no model: it has no config.json")
    config = read_config(fetch_small(repo, commit, "config.json").parent)
    present = {name for name in listing if fnmatch(name, "*.safetensors") and "/" not in name}
    index = read_index(fetch_small(repo, commit, INDEX_FILE)) if INDEX_FILE in listing else None

    def header(name: str) -> list[SourceTensor]:
        return fetch_header(repo, commit, folder / name, listing[name].nbytes)

    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        tensors = gather_checked(repo, present, index, partial(pool.map, header), strict=True)
    return HubSource(folder, config, tensors, repo, commit, listing)


def listing_of(info: Any) -> dict[str, HubFile]:
    """The files of a repository by their names."""
    return {
        s.rfilename: HubFile(
            s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else s.blob_id or "", bool(s.lfs)
        )
        for s in info.siblings or []
    }


def fetch_header(repo: str, commit: str, file: Path, file_bytes: int) -> list[SourceTensor]:
    """The tensors of a shard from its first bytes."""
    start = fetch_range(repo, commit, file.name, 0, min(FIRST_BYTES, file_bytes))
    header_bytes = header_length(file, start[:PREFIX_BYTES], file_bytes)
    end = PREFIX_BYTES + header_bytes
    if end > len(start):
        start += fetch_range(repo, commit, file.name, len(start), end)
    return parse_header(file, start[PREFIX_BYTES:end], file_bytes)


def fetch_range(repo: str, commit: str, name: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a file of the repository."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(repo, name, revision=commit)
    headers = build_hf_headers() | {
        "Range": f"bytes={start}-{stop - 1}",
        # Compressed, the bytes would be of something else.
        "Accept-Encoding": "identity",
    }

    def get() -> bytes:
        data = bytearray()
        with http_stream_backoff(
            "GET",
            url,
            headers=headers,
            follow_redirects=True,
            timeout=TIMEOUT_S,
            # It cannot try again once bytes came; `retry` can.
            retry_on_exceptions=(),
        ) as response:
            hf_raise_for_status(response)
            # Without ranges the whole shard would come: nothing but the start of it can be used.
            skip = start if response.status_code == 200 else 0
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= stop - start + skip:
                    break
        data = data[skip : skip + stop - start]
        if len(data) < stop - start:
            raise OSError(f"{name}: {len(data)} of {stop - start} bytes came")
        return bytes(data)

    return retry(repo, get)


def fetch_small(repo: str, commit: str, name: str) -> Path:
    """A config, index or tokenizer file, by way of the hub's cache on this machine."""
    from huggingface_hub import hf_hub_download

    return Path(retry(repo, lambda: hf_hub_download(repo, name, revision=commit)))


def retry(
    repo: str,
    get: Callable[[], T],
    waits_s: Sequence[float] = SHORT_WAITS_S,
    stopped: Callable[[], bool] = lambda: False,
    what: str = "get {} from",
) -> T:
    """Call `get` again while the network or the hub fails in ways that pass, with longer waits."""
    waits = iter(waits_s)
    while True:
        try:
            return get()
        except Qwen35Error:
            raise
        # Whatever goes wrong between here and the hub has its own class.
        except Exception as error:
            wait_s = next(waits, None)
            if wait_s is None or stopped() or not _passes(error):
                raise CheckpointError(
                    f"cannot {what.format(repo)} the hub",
                    got=f"{type(error).__name__}: {first_line(error)}",
                    expected="a folder on this machine, or a hub id that it can reach",
                    hint="for a private or gated model log in first: hf auth login; otherwise"
                    " repeat the command: what is done is kept",
                ) from error
            log.warning("%s: %s; again in %s s", repo, first_line(error), wait_s)
            time.sleep(wait_s)


def _passes(error: Exception) -> bool:
    """Whether another try may help: not if the hub says no, or this disk is full."""
    from huggingface_hub import constants

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, OSError):
        network = isinstance(error, ConnectionError | TimeoutError | socket.gaierror)
        # Without a number it is huggingface_hub's own, about a download that came short.
        return (network or error.errno is None) and not constants.HF_HUB_OFFLINE
    return type(error).__module__.startswith(("httpx", "httpcore"))


class Stopped(Exception):
    """The conversion is over: the download under way may end."""


class Fetcher:
    """Fetches the shards of a source in a thread of its own, at most one ahead of the work.

    Each is compared with the checksum that the hub has of it. Shards of an earlier run that are
    whole are used again.
    """

    def __init__(self, source: HubSource, keep: bool = False):
        self.source, self.keep = source, keep
        # What is waited for, in words.
        self.state = ""
        self._here: dict[str, Future[None]] = {}
        self._asked: set[str] = set()
        # How many may be fetched now: the first, and one more for each that is asked for.
        self._allowed = threading.Semaphore()
        self._stopped = False

    def start(self, order: Sequence[str]) -> None:
        """Begin with the first of `order`, the files in the order they will be asked for."""
        self._here = {file: Future() for file in order}
        threading.Thread(target=self._run, name="fetch", daemon=True).start()

    def ready(self, file: str, timeout: float) -> bool:
        """Whether `file` is here after at most `timeout` seconds; raises what stopped it."""
        if file not in self._asked:
            self._asked.add(file)
            self._allowed.release()
        here = self._here[file]
        if not wait([here], timeout).done:
            return False
        here.result()
        return True

    def release(self, file: str) -> None:
        """Nobody needs `file` any more."""
        if not self.keep:
            (self.source.folder / file).unlink(missing_ok=True)

    def stop(self) -> None:
        """Fetch no further."""
        self._stopped = True
        self._allowed.release()

    def _run(self) -> None:
        for name, here in self._here.items():
            self._allowed.acquire()
            if self._stopped:
                return
            try:
                self._fetch(self.source.listing[name])
            # Whatever it is, the one who waits has to hear of it.
            except Exception as error:
                here.set_exception(error)
                return
            here.set_result(None)

    def _fetch(self, file: HubFile) -> None:
        path = self.source.folder / file.name
        for _ in range(MAX_DOWNLOADS):
            if not path.exists():
                self._download(file)
            self.state = f"checking {file.name}"
            if (got := checksum(path, file.in_lfs, self._check)) == file.checksum:
                return
            log.warning("%s has the wrong bytes: fetching it again", file.name)
            path.unlink()
        raise CheckpointError(
            f"{file.name} does not have the checksum that the hub lists",
            got=got,
            expected=file.checksum,
            hint=f"fetched {MAX_DOWNLOADS} times; is something between here and the hub?",
        )

    def _download(self, file: HubFile) -> None:
        from huggingface_hub import hf_hub_download
        from tqdm.auto import tqdm

        fetcher, source = self, self.source

        class Bar(tqdm):
            """What huggingface_hub reports its progress to; the one place to interrupt it."""

            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **kwargs | {"disable": True})
                self.came = kwargs.get("initial") or 0

            def update(self, n: float | None = 1) -> None:
                self.came += n or 0
                fetcher.state = f"fetching {self.came / 1e9:.2f} of {file.nbytes / 1e9:.2f} GB"
                fetcher._check()

        get = partial(
            hf_hub_download, source.repo, file.name, revision=source.commit,
            local_dir=source.folder, tqdm_class=Bar,
        )  # fmt: skip
        retry(source.repo, get, WAITS_S, lambda: self._stopped)

    def _check(self) -> None:
        if self._stopped:
            raise Stopped


def checksum(path: Path, in_lfs: bool, check: Callable[[], None] = lambda: None) -> str:
    """What the hub lists of a file: its SHA-256, or outside of LFS the name git gives it."""
    digest = hashlib.sha256() if in_lfs else hashlib.sha1(usedforsecurity=False)
    if not in_lfs:
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as stream:
        while chunk := stream.read(2**22):
            check()
            digest.update(chunk)
    return digest.hexdigest()
