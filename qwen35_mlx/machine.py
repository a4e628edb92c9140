"""This machine: chip, memory, the GPU's memory limit, versions. Nothing personal."""

import fcntl
import os
import platform
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from . import __version__
from .errors import Qwen35Error

MIB, GIB = 2**20, 2**30
# Memory for macOS and other programs: a share, at least this much. With less, the Mac swaps.
SYSTEM_BYTES, SYSTEM_SHARE = 8 * GIB, 0.1

# Memory bandwidth in 10^9 bytes per second; of chips with two variants, the slower one.
CHIP_GBPS = {
    "M1": 68, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800,
    "M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800,
    "M3": 100, "M3 Pro": 150, "M3 Max": 300, "M3 Ultra": 819,
    "M4": 120, "M4 Pro": 273, "M4 Max": 410,
    "M5": 153, "M5 Pro": 307, "M5 Max": 460,
}  # fmt: skip
# The faster variants, by memory in GiB: sizes that the slower variant does not have.
FASTER_GBPS = {
    (chip, memory): gbps
    for chip, gbps in {"M3 Max": 400, "M4 Max": 546, "M5 Max": 614}.items()
    for memory in (48, 64, 128)
}


class Machine(NamedTuple):
    """Sizes in bytes; `gpu_limit_bytes` is None where there is no Metal."""

    chip: str
    os: str
    memory_bytes: int
    gpu_limit_bytes: int | None
    disk_free_bytes: int
    versions: dict[str, str]

    @property
    def limit_bytes(self) -> int:
        """What MLX may use: the GPU's limit, or all memory without Metal."""
        return self.gpu_limit_bytes or self.memory_bytes

    @property
    def gbps(self) -> float:
        """Bandwidth of its memory in 10^9 bytes a second; 0 for an unknown chip."""
        return bandwidth_gbps(self.chip, round(self.memory_bytes / GIB)) or 0


def describe() -> Machine:
    """This machine now."""
    import mlx.core as mx

    info = mx.device_info()
    memory, limit = int(info.get("memory_size", 0)) or memory_bytes(), None
    if mx.metal.is_available():
        # 0 or absent: the limit was not raised, and the recommended size is the limit.
        raised = sysctl("iogpu.wired_limit_mb")
        limit = min(int(raised) * MIB if raised.isdecimal() else 0, memory)
        limit = limit or int(info.get("max_recommended_working_set_size", 0)) or None
    # Services and containers may have none.
    home = os.path.expanduser("~")
    versions = {"python": platform.python_version(), "qwen35-mlx": __version__}
    versions["mlx"] = version("mlx")
    with suppress(PackageNotFoundError):
        versions["mlx-lm"] = version("mlx-lm")
    return Machine(
        chip=str(info.get("device_name") or platform.machine()),
        os=operating_system(),
        memory_bytes=memory,
        gpu_limit_bytes=limit,
        disk_free_bytes=shutil.disk_usage(home if os.path.isdir(home) else "/").free,
        versions=versions,
    )


def bandwidth_gbps(chip: str, memory_gib: float | None = None) -> float | None:
    """Memory bandwidth of a Mac with this chip, in 10^9 bytes per second; None if unknown."""
    chip = chip.removeprefix("Apple ")
    faster = None if memory_gib is None else FASTER_GBPS.get((chip, round(memory_gib)))
    return faster or CHIP_GBPS.get(chip)


def disk_gbps(file: Path, num_pieces: int = 64, piece_bytes: int = 2**22) -> float:
    """Measured read speed of pieces all over a file, in 10^9 bytes per second.

    On macOS it bypasses the page cache.
    """
    descriptor = os.open(file, os.O_RDONLY)
    try:
        if option := getattr(fcntl, "F_NOCACHE", None):
            fcntl.fcntl(descriptor, option, 1)
        offsets = [i * file.stat().st_size // num_pieces for i in range(num_pieces)]
        started = time.perf_counter()
        with ThreadPoolExecutor(8) as threads:
            read = list(threads.map(lambda at: os.pread(descriptor, piece_bytes, at), offsets))
        return sum(map(len, read)) / 1e9 / (time.perf_counter() - started)
    finally:
        os.close(descriptor)


def operating_system() -> str:
    """Name and version, such as macOS 15.5 or Linux 6.8."""
    if release := platform.mac_ver()[0]:
        return f"macOS {release}"
    return f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"


def memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def parse_memory(text: str) -> int:
    """`192GB`, `192 GiB` or `192` -> bytes; a Mac's GB are 2**30 bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gi?b?)?", text.strip().lower())
    if not match or float(match[1]) <= 0:
        raise Qwen35Error("not a size of memory", got=repr(text), expected="such as 192GB")
    return int(float(match[1]) * GIB)


def default_limit_bytes(memory_bytes: int) -> int:
    """The default GPU limit of macOS: three quarters of memory, two thirds up to 36 GB."""
    return memory_bytes * 2 // 3 if memory_bytes <= 36 * GIB else memory_bytes * 3 // 4


def raised_limit_bytes(memory_bytes: int) -> int:
    """The highest GPU limit that leaves enough memory for the system."""
    left = memory_bytes - max(SYSTEM_BYTES, int(memory_bytes * SYSTEM_SHARE))
    return max(left, default_limit_bytes(memory_bytes))


def wired_limit_mb(needed_bytes: int) -> int:
    """The value of `iogpu.wired_limit_mb` for `needed_bytes`, in whole GiB."""
    return -(-needed_bytes // GIB) * 1024


def raise_limit_command(machine: Machine, needed_bytes: int | None = None) -> str | None:
    """The shell command that raises the GPU limit to `needed_bytes`, or as far as is safe.

    None if the limit is high enough, or if `needed_bytes` would leave the system too little.
    """
    most = raised_limit_bytes(machine.memory_bytes) // MIB
    wanted = most if needed_bytes is None else -(-needed_bytes // MIB)
    if machine.gpu_limit_bytes is None or not machine.gpu_limit_bytes // MIB < wanted <= most:
        return None
    if needed_bytes is not None:
        wanted = min(wired_limit_mb(needed_bytes), most)
    return f"sudo sysctl iogpu.wired_limit_mb={wanted}"


def sysctl(name: str) -> str:
    """A kernel setting; empty if it does not exist."""
    try:
        return subprocess.check_output(
            ["sysctl", "-n", name], stderr=subprocess.DEVNULL, text=True, timeout=10
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def summary(machine: Machine) -> dict[str, Any]:
    """The machine for a report: rounded sizes, no names of users, hosts or folders."""
    gb = {
        "memory_gb": machine.memory_bytes,
        "gpu_limit_gb": machine.gpu_limit_bytes,
        "disk_free_gb": machine.disk_free_bytes,
    }
    rounded = {k: None if v is None else round(v / 1e9, 1) for k, v in gb.items()}
    return {
        "chip": machine.chip,
        "os": machine.os,
        "metal": machine.gpu_limit_bytes is not None,
        "bandwidth_gb_per_s": machine.gbps or None,
        **rounded,
        "raise_gpu_limit": raise_limit_command(machine),
        "versions": machine.versions,
    }
