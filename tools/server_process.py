"""A server of this package or of mlx-lm as a process, and single requests to it."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Long enough for a busy machine.
START_SECONDS, ANSWER_SECONDS = 300, 600


class ServerProcess:
    """A running server; each request opens a connection."""

    def __init__(self, process: subprocess.Popen[str], port: int):
        self.process, self.port = process, port
        self.url = f"http://127.0.0.1:{port}"
        self.model = "demo"

    @property
    def is_running(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def request(
        self, method: str, path: str, data: bytes | None = None, timeout_s: float = ANSWER_SECONDS
    ) -> tuple[int, bytes]:
        """Send a request; returns status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, path, data, {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Post a request and return the JSON of its answer; raises if it was refused."""
        status, data = self.request("POST", path, json.dumps(body).encode())
        if status != 200:
            raise RuntimeError(f"{path}: {status} {data[:300]!r}")
        value: dict[str, Any] = json.loads(data)
        return value

    def memory_bytes(self) -> int:
        """Resident memory."""
        shown = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(self.process.pid)], capture_output=True, text=True
        )
        return int(shown.stdout or 0) * 1024

    def cpu_seconds(self) -> float:
        """CPU time of all its threads, which other programs on the machine do not change."""
        file = Path(f"/proc/{self.process.pid}/stat")
        if file.is_file():
            # The fields after the name, which may have spaces.
            user, system = file.read_text().rpartition(")")[2].split()[11:13]
            return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        # On other systems `ps` shows hundredths of a second.
        command = ["ps", "-o", "time=", "-p", str(self.process.pid)]
        shown = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        minutes, _, seconds = shown.rpartition(":")
        return float(seconds) + 60 * int(minutes or 0)

    def num_files(self) -> int:
        """Number of open files and sockets; 0 if the system does not show them."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        return len(list(folder.iterdir())) if folder.is_dir() else 0


def free_port() -> int:
    """A port that is not in use now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(command: list[str], port: int, ready_path: str) -> Iterator[ServerProcess]:
    """Start a server and wait until it answers; it is ended afterwards."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, env=os.environ
    )
    server = ServerProcess(process, port)
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                if server.request("GET", ready_path, timeout_s=5)[0] == 200:
                    break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{' '.join(command)} did not start")
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        if process.poll() is None:
            process.kill()
            process.wait()


def ours(folder: Path, *options: str) -> contextlib.AbstractContextManager[ServerProcess]:
    """Run `qwen35-mlx serve`."""
    port = free_port()
    command = [
        *(sys.executable, "-c", "from qwen35_mlx.cli.main import main; main()", "serve"),
        *(str(folder), "--port", str(port), "--model-name", "demo", *options),
    ]
    return running(command, port, "/health")


def mlx_lms(folder: Path) -> contextlib.AbstractContextManager[ServerProcess]:
    """Run `mlx_lm.server`."""
    port = free_port()
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder)]
    return running([*command, "--port", str(port)], port, "/v1/models")
