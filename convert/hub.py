"""A checkpoint on the hub: headers by range requests, shards downloaded one after the other."""

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
# The first request for a header reads this number of bytes; most headers are shorter.
FIRST_BYTES = 2**17
HEADER_THREADS = 8
# Waits between attempts, after the client's own retries; about six minutes in total.
WAITS_S = (1, 2, 4, 8, 15, 30, 60, 120, 120)
# For requests that a user waits for.
SHORT_WAITS_S = WAITS_S[:3]
TIMEOUT_S = 30
# Maximum number of downloads of a file whose checksum is wrong.
MAX_DOWNLOADS = 3


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it. The checksum is its SHA-256 in LFS, otherwise git's SHA-1."""

    name: str
    nbytes: int
    checksum: str
    in_lfs: bool


@dataclass(frozen=True)
class HubSource(Source):
    """A checkpoint on the hub at one commit; its shards are downloaded into `folder`."""

    repo: str
    commit: str
    listing: Mapping[str, HubFile]

    @property
    def origin(self) -> dict[str, str]:
        return {"source": self.repo, "source_revision": self.commit}

    def fingerprints(self) -> dict[str, str]:
        return {file.name: self.listing[file.name].checksum for file in self.files}

    def companions(self) -> list[Path]:
        # The star of fnmatch also matches slashes.
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
    """Open a folder, or a hub id OWNER/NAME at a branch, tag or commit; a Source is returned as is.

    Downloads of shards go to `fetch_into`. Raises Qwen35Error if the source cannot be read.
    """
    if isinstance(source, Source):
        return source
    if is_hub_id(source):
        return open_hub(str(source), revision, fetch_into or Path("."))
    if revision:
        raise Qwen35Error("a folder has no revisions", got=f"revision={revision}")
    return open_source(Path(source).expanduser())


def is_hub_id(source: str | Path) -> bool:
    """Whether `source` has the form OWNER/NAME and does not exist as a path."""
    return is_repository(str(source)) and not Path(source).expanduser().exists()


def is_repository(name: str) -> bool:
    """Whether `name` has the form OWNER/NAME."""
    return bool(HUB_ID.fullmatch(name)) and ".." not in name and name[0] not in ".-"


def open_hub(repo: str, revision: str | None, folder: Path) -> HubSource:
    """Read config.json, the index and all headers of a repository, but no weights.

    Raises ConfigError or CheckpointError.
    """
    from huggingface_hub import HfApi

    info = retry(repo, lambda: HfApi().model_info(repo, revision=revision, files_metadata=True))
    listing = listing_of(info)
    commit = str(info.sha)
    if "config.json" not in listing:
        raise CheckpointError(f"{repo} is not a model: it has no config.json")
    config = read_config(fetch_small(repo, commit, "config.json").parent)
    present = {name for name in listing if fnmatch(name, "*.safetensors") and "/" not in name}
    index = read_index(fetch_small(repo, commit, INDEX_FILE)) if INDEX_FILE in listing else None

    def header(name: str) -> list[SourceTensor]:
        return fetch_header(repo, commit, folder / name, listing[name].nbytes)

    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        tensors = gather_checked(repo, present, index, partial(pool.map, header), strict=True)
    return HubSource(folder, config, tensors, repo, commit, listing)


def listing_of(info: Any) -> dict[str, HubFile]:
    """The files of a repository by name, from the hub's `model_info`."""
    return {
        s.rfilename: HubFile(
            s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else s.blob_id or "", bool(s.lfs)
        )
        for s in info.siblings or []
    }


def fetch_header(repo: str, commit: str, file: Path, file_bytes: int) -> list[SourceTensor]:
    """Read the tensors in the header of a shard of `file_bytes` bytes."""
    start = fetch_range(repo, commit, file.name, 0, min(FIRST_BYTES, file_bytes))
    header_bytes = header_length(file, start[:PREFIX_BYTES], file_bytes)
    end = PREFIX_BYTES + header_bytes
    if end > len(start):
        start += fetch_range(repo, commit, file.name, len(start), end)
    return parse_header(file, start[PREFIX_BYTES:end], file_bytes)


def fetch_range(repo: str, commit: str, name: str, start: int, stop: int) -> bytes:
    """Download bytes `start` to `stop` of a file of the repository."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(repo, name, revision=commit)
    headers = build_hf_headers() | {
        "Range": f"bytes={start}-{stop - 1}",
        # Ranges of compressed data would be useless.
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
            # After the first bytes it cannot retry; `retry` can.
            retry_on_exceptions=(),
        ) as response:
            hf_raise_for_status(response)
            # Status 200: a server without range requests sends the file from its start.
            skip = start if response.status_code == 200 else 0
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= stop - start + skip:
                    break
        data = data[skip : skip + stop - start]
        if len(data) < stop - start:
            raise OSError(f"{name}: received {len(data)} of {stop - start} bytes")
        return bytes(data)

    return retry(repo, get)


def fetch_small(repo: str, commit: str, name: str) -> Path:
    """Download a config, index or tokenizer file through the hub's local cache."""
    from huggingface_hub import hf_hub_download

    return Path(retry(repo, lambda: hf_hub_download(repo, name, revision=commit)))


def retry(
    repo: str,
    get: Callable[[], T],
    waits_s: Sequence[float] = SHORT_WAITS_S,
    stopped: Callable[[], bool] = lambda: False,
    what: str = "get {} from",
) -> T:
    """Call `get`; repeat it after temporary errors of the network or the hub, with longer waits.

    Raises CheckpointError after the last wait, for other errors, and once `stopped`. Qwen35Error
    passes. `what`: the action for the message, with a place for the repository.
    """
    waits = iter(waits_s)
    while True:
        try:
            return get()
        except Qwen35Error:
            raise
        # The libraries below raise many classes of errors.
        except Exception as error:
            wait_s = next(waits, None)
            if wait_s is None or stopped() or not _is_temporary(error):
                raise CheckpointError(
                    f"cannot {what.format(repo)} the hub",
                    got=f"{type(error).__name__}: {first_line(error)}",
                    expected="an existing folder, or a hub id that can be reached",
                    hint="for a private or gated model, log in first: hf auth login; otherwise"
                    " repeat the command, which continues where it stopped",
                ) from error
            log.warning("%s: %s; next attempt in %s s", repo, first_line(error), wait_s)
            time.sleep(wait_s)


def _is_temporary(error: Exception) -> bool:
    """Whether another attempt may succeed: not if the hub refuses, or the disk is full."""
    from huggingface_hub import constants

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, OSError):
        network = isinstance(error, ConnectionError | TimeoutError | socket.gaierror)
        # Without errno: an error of huggingface_hub about an incomplete download.
        return (network or error.errno is None) and not constants.HF_HUB_OFFLINE
    return type(error).__module__.startswith(("httpx", "httpcore"))


class Stopped(Exception):
    """Interrupts the current download, because the conversion has ended."""


class Fetcher:
    """Downloads the shards of a source in its own thread, at most one ahead of the conversion.

    The checksum of each file is compared with the hub's. Complete shards of an earlier run are
    used again. `keep`: keep the files when they are released.
    """

    def __init__(self, source: HubSource, keep: bool = False):
        self.source, self.keep = source, keep
        # Text for the progress bar.
        self.state = ""
        self._downloads: dict[str, Future[None]] = {}
        self._requested: set[str] = set()
        # Number of files that may be downloaded: one more than were requested.
        self._allowed = threading.Semaphore()
        self._stopped = False

    def start(self, order: Sequence[str]) -> None:
        """Start the first download; `order`: the files in the order of their use."""
        self._downloads = {file: Future() for file in order}
        threading.Thread(target=self._run, name="fetch", daemon=True).start()

    def ready(self, file: str, timeout: float) -> bool:
        """Wait for `file`, at most `timeout` seconds; returns whether it is complete.

        Raises the error of its download.
        """
        if file not in self._requested:
            self._requested.add(file)
            self._allowed.release()
        download = self._downloads[file]
        if not wait([download], timeout).done:
            return False
        download.result()
        return True

    def release(self, file: str) -> None:
        """Delete `file`, which is no longer needed, unless files are kept."""
        if not self.keep:
            (self.source.folder / file).unlink(missing_ok=True)

    def stop(self) -> None:
        """Stop the downloads."""
        self._stopped = True
        self._allowed.release()

    def _run(self) -> None:
        for name, download in self._downloads.items():
            self._allowed.acquire()
            if self._stopped:
                return
            try:
                self._fetch(self.source.listing[name])
            # Raised again in the thread that waits for the file.
            except Exception as error:
                download.set_exception(error)
                return
            download.set_result(None)

    def _fetch(self, file: HubFile) -> None:
        path = self.source.folder / file.name
        for _ in range(MAX_DOWNLOADS):
            if not path.exists():
                self._download(file)
            self.state = f"checking {file.name}"
            if (got := checksum(path, file.in_lfs, self._check)) == file.checksum:
                return
            log.warning("%s has a wrong checksum: downloading it again", file.name)
            path.unlink()
        raise CheckpointError(
            f"{file.name} does not have the checksum that the hub lists",
            got=got,
            expected=file.checksum,
            hint=f"downloaded {MAX_DOWNLOADS} times; check the proxy or mirror that you use",
        )

    def _download(self, file: HubFile) -> None:
        from huggingface_hub import hf_hub_download
        from tqdm.auto import tqdm

        fetcher, source = self, self.source

        class Bar(tqdm):
            """Gets the progress of huggingface_hub; the only place that can interrupt it."""

            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **kwargs | {"disable": True})
                self.num_bytes = kwargs.get("initial") or 0

            def update(self, n: float | None = 1) -> None:
                self.num_bytes += n or 0
                gb = f"{self.num_bytes / 1e9:.2f} of {file.nbytes / 1e9:.2f} GB"
                fetcher.state = f"downloading {gb}"
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
    """The checksum as in HubFile; calls `check` between blocks, which may raise."""
    digest = hashlib.sha256() if in_lfs else hashlib.sha1(usedforsecurity=False)
    if not in_lfs:
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as stream:
        while chunk := stream.read(2**22):
            check()
            digest.update(chunk)
    return digest.hexdigest()
