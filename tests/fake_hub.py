"""A hub on this machine: what huggingface_hub asks for, and faults on request."""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

REPO = "Qwen/Tiny"
CHUNK_BYTES = 2**16


class FakeHub:
    """Serves the files of `folder` as repository Qwen/Tiny at one commit.

    `faults` are taken one for each GET of a shard: "cut" closes the connection halfway, a number is
    a status, "wrong" changes a byte, "slow" waits; None is none. `served` counts bytes by name.
    What is sent becomes files of `folder` when it is committed; `upload_faults` are taken one for
    each PUT of an object and POST of a commit: "cut" or a status. `received` are bytes by object.
    """

    def __init__(self, folder: Path, commit: str = "c" * 40):
        self.folder, self.commit = folder, commit
        self.faults: list[Any] = []
        self.upload_faults: list[Any] = []
        self.objects: dict[str, bytes] = {}
        self.received: dict[str, int] = {}
        self.created: list[dict[str, Any]] = []
        self.commits: list[list[str]] = []
        self.served: dict[str, int] = {}
        self.num_faults = 0
        self.hides_checksums = False
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def listing(self) -> dict[str, Any]:
        siblings = []
        for path in sorted(p for p in self.folder.iterdir() if p.is_file()):
            entry: dict[str, Any] = {"rfilename": path.name, "size": path.stat().st_size}
            entry["blobId"] = blob_id(path) if path.stat().st_size < 10**8 else "0" * 40
            if is_large(path.name) and not self.hides_checksums:
                digest = "0" * 64
                if path.stat().st_size < 10**8:
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                size = path.stat().st_size
                entry["lfs"] = {"sha256": digest, "size": size, "pointerSize": 134}
            siblings.append(entry)
        return {"id": REPO, "sha": self.commit, "siblings": siblings}

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Or each answer takes 40 ms: its body waits for the receipt of its head.
            disable_nagle_algorithm = True

            def log_message(self, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def upload_fault(self) -> Any:
                with hub.lock:
                    fault = hub.upload_faults.pop(0) if hub.upload_faults else None
                hub.num_faults += fault is not None
                return fault

            def do_PUT(self) -> None:
                name = self.path.rpartition("/")[2]
                size = int(self.headers["Content-Length"])
                fault = self.upload_fault()
                data = self.rfile.read(size // 2 if fault == "cut" else size)
                with hub.lock:
                    hub.received[name] = hub.received.get(name, 0) + len(data)
                if fault == "cut":
                    self.close_connection = True
                    return self.connection.close()
                if fault:
                    return self.refuse(fault)
                hub.objects[name] = data
                self.send(b"{}", "application/json")

            def do_POST(self) -> None:
                raw, path = self.body(), self.path.partition("?")[0]
                if path == "/api/repos/create":
                    hub.created.append(json.loads(raw))
                    return self.send_json({"url": f"{hub.url}/{REPO}"})
                if path == "/api/validate-yaml":
                    return self.send_json({"errors": [], "warnings": []})
                if path.endswith("/info/lfs/objects/batch"):
                    return self.send_json(
                        {"objects": [*map(self.action, json.loads(raw)["objects"])]}
                    )
                if "/preupload/" in path:
                    files = [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(raw)["files"]
                    ]
                    return self.send_json({"files": files})
                if fault := self.upload_fault():
                    return self.refuse(fault)
                self.commit([json.loads(line) for line in raw.splitlines()])

            def action(self, wanted: dict[str, Any]) -> dict[str, Any]:
                if wanted["oid"] in hub.objects:
                    return wanted
                upload = {"href": f"{hub.url}/objects/{wanted['oid']}"}
                return wanted | {"actions": {"upload": upload}}

            def commit(self, lines: list[dict[str, Any]]) -> None:
                hub.folder.mkdir(exist_ok=True)
                values = [line["value"] for line in lines if line["key"] != "header"]
                for value in values:
                    data = (
                        base64.b64decode(value["content"])
                        if "content" in value
                        else hub.objects[value["oid"]]
                    )
                    (hub.folder / value["path"]).write_bytes(data)
                hub.commits.append([value["path"] for value in values])
                self.send_json({"commitUrl": f"{hub.url}/{REPO}/commit/c", "commitOid": hub.commit})

            def send_json(self, value: Any) -> None:
                self.send(json.dumps(value).encode(), "application/json")

            def answer(self, body: bool) -> None:
                path = self.path.partition("?")[0]
                if path.startswith(f"/api/models/{REPO}"):
                    revision = path.partition("/revision/")[2]
                    if revision not in ("", "main", "v1", hub.commit):
                        return self.refuse(404, "RevisionNotFound")
                    return self.send(json.dumps(hub.listing()).encode(), "application/json")
                prefix, _, rest = path.partition("/resolve/")
                file = hub.folder / rest.partition("/")[2]
                if prefix != f"/{REPO}":
                    return self.refuse(404, "RepoNotFound")
                if not file.is_file():
                    return self.refuse(404, "EntryNotFound")
                self.serve(file, body)

            def refuse(self, status: int, code: str = "") -> None:
                self.send_response(status)
                if code:
                    self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def send(self, raw: bytes, kind: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def serve(self, file: Path, body: bool) -> None:
                total = file.stat().st_size
                start, stop = 0, total
                ranged = self.headers.get("Range")
                if ranged:
                    first, _, last = ranged.removeprefix("bytes=").partition("-")
                    start, stop = int(first), min(int(last) + 1 if last else total, total)
                fault = None
                if body and file.suffix == ".safetensors":
                    with hub.lock:
                        fault = hub.faults.pop(0) if hub.faults else None
                        hub.num_faults += fault is not None
                if isinstance(fault, int):
                    return self.refuse(fault)
                self.send_response(206 if ranged else 200)
                self.send_header("X-Repo-Commit", hub.commit)
                etag = blob_id(file) if total < 10**8 else "0" * 40
                self.send_header("ETag", f'"{etag}"')
                self.send_header("Accept-Ranges", "bytes")
                if ranged:
                    self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
                self.send_header("Content-Length", str(stop - start))
                self.end_headers()
                if body:
                    self.pour(file, start, stop, fault)

            def pour(self, file: Path, start: int, stop: int, fault: Any) -> None:
                with file.open("rb") as stream:
                    stream.seek(start)
                    left = (stop - start) // 2 if fault == "cut" else stop - start
                    while left:
                        chunk = bytearray(stream.read(min(CHUNK_BYTES, left)))
                        left -= len(chunk)
                        if fault == "wrong" and not left:
                            chunk[-1] ^= 1
                        if fault == "slow":
                            time.sleep(0.05)
                        self.wfile.write(chunk)
                        with hub.lock:
                            hub.served[file.name] = hub.served.get(file.name, 0) + len(chunk)
                if fault == "cut":
                    self.close_connection = True
                    self.wfile.flush()
                    self.connection.close()

        return Handler


def is_large(name: str) -> bool:
    """Whether the hub keeps the file in LFS."""
    return name.endswith(".safetensors")


def blob_id(path: Path) -> str:
    """As git names the object."""
    raw = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


@contextmanager
def serving(folder: Path, cache: Path, patch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that huggingface_hub in this process takes for the real one, without a wait."""
    from huggingface_hub import constants

    from qwen35_mlx.convert import hub as hub_module

    hub = FakeHub(folder)
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(hub_module, "WAITS_S", (0.01, 0.02, 0.04))
    patch.setattr(hub_module, "SHORT_WAITS_S", (0.01, 0.02, 0.04))
    # huggingface_hub's own back-off takes seconds.
    patch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05)))
    try:
        yield hub
    finally:
        hub.close()
