"""A server as a process of its own: ours, or mlx-lm's; and single requests to it."""

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

# Also on a machine that does much else.
START_SECONDS, ANSWER_SECONDS = 300, 600


class ServerProcess:
    """A running server; `post` and `get` are one connection each."""

    def __init__(self, process: subprocess.Popen[str], port: int):
        self.process, self.port = process, port
        self.url = f"http://127.0.0.1:{port}"
        self.model = "demo"

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self.process.poll() is None

    def request(
        self, method: str, path: str, data: bytes | None = None, timeout_s: float = ANSWER_SECONDS
    ) -> tuple[int, bytes]:
        """Status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, path, data, {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON of a request that is not streamed; raises if it was refused."""
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
        """Time of all its threads on the CPU: fair where other programs run beside it."""
        file = Path(f"/proc/{self.process.pid}/stat")
        if file.is_file():
            # Behind the name, which may have spaces.
            user, system = file.read_text().rpartition(")")[2].split()[11:13]
            return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        # Elsewhere `ps` shows hundredths.
        command = ["ps", "-o", "time=", "-p", str(self.process.pid)]
        shown = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        minutes, _, seconds = shown.rpartition(":")
        return float(seconds) + 60 * int(minutes or 0)

    def num_files(self) -> int:
        """Open files and sockets, where the system tells."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        return len(list(folder.iterdir())) if folder.is_dir() else 0


def free_port() -> int:
    """A port that nobody uses now."""
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
    """`qwen35-mlx serve`."""
    port = free_port()
    command = [
        *(sys.executable, "-c", "from qwen35_mlx.cli.main import main; main()", "serve"),
        *(str(folder), "--port", str(port), "--model-name", "demo", *options),
    ]
    return running(command, port, "/health")


def mlx_lms(folder: Path) -> contextlib.AbstractContextManager[ServerProcess]:
    """`mlx_lm.server`."""
    port = free_port()
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder)]
    return running([*command, "--port", str(port)], port, "/v1/models")
