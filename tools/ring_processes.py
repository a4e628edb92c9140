"""Starts several processes of one model on this machine, connected by MLX's ring."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# All processes run the given code; rank 0 then runs its `main`, and the others follow it.
PROGRAM = """
import sys
from qwen35_mlx.cli.cluster_command import take_part
names = {}
exec(sys.argv[1], names)
take_part(names["main"])
"""


@contextlib.contextmanager
def ring(
    number: int, code: str, folder: Path, arguments: tuple[str, ...] = (), split: str = ""
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start `number` processes that run `code`, in which `sys.argv[2:]` are `arguments`.

    With `split` each process has some of the layers. Their output is captured, and all are ended
    afterwards. The file of addresses is written to `folder`.
    """
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets]
    file = folder / "ring.json"
    file.write_text(json.dumps(hosts))
    environment = {**os.environ, "MLX_HOSTFILE": str(file), "QWEN35_MLX_RING": str(folder)}
    environment |= {"QWEN35_MLX_SPLIT": split}
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(number):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, code, *arguments],
                    env=environment | {"MLX_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def outputs_of_ring(
    number: int, code: str, folder: Path, *arguments: str, timeout_s: float = 300, split: str = ""
) -> list[str]:
    """The output of each rank; raises if a process fails."""
    with ring(number, code, folder, arguments, split) as processes:
        outputs = [process.communicate(timeout=timeout_s) for process in processes]
        for process, (_, errors) in zip(processes, outputs, strict=True):
            if process.returncode:
                raise RuntimeError(f"exit {process.returncode}: {errors[-2000:]}")
        return [output for output, _ in outputs]
