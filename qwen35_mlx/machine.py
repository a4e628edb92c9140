"""What this machine is: chip, memory, the GPU's share of it, versions. Nothing personal."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from . import __version__

MIB, GIB = 2**20, 2**30
# What macOS and other programs need, a share and no less than this: else it swaps, or stops.
SYSTEM_BYTES, SYSTEM_SHARE = 8 * GIB, 0.1


class Machine(NamedTuple):
    """Sizes in bytes; `gpu_limit_bytes` is None where there is no Metal."""

    chip: str
    os: str
    memory_bytes: int
    gpu_limit_bytes: int | None
    disk_free_bytes: int
    versions: dict[str, str]


def describe() -> Machine:
    """This machine now."""
    info = mx.device_info()
    is_metal = mx.metal.is_available()
    limit = None
    if is_metal:
        # 0 or absent: nobody raised it, and the recommendation is the limit.
        raised = int(sysctl("iogpu.wired_limit_mb") or 0)
        limit = raised * MIB if raised else int(info.get("max_recommended_working_set_size", 0))
    return Machine(
        chip=str(info.get("device_name") or platform.machine()),
        os=operating_system(),
        memory_bytes=int(info.get("memory_size", 0)) or memory_bytes(),
        gpu_limit_bytes=limit,
        disk_free_bytes=shutil.disk_usage(Path.home()).free,
        versions={
            "python": platform.python_version(),
            "qwen35-mlx": __version__,
            **{package: version(package) for package in ("mlx", "mlx-lm")},
        },
    )


def operating_system() -> str:
    """Such as macOS 15.5 or Linux 6.8."""
    if release := platform.mac_ver()[0]:
        return f"macOS {release}"
    return f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"


def memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def highest_limit_bytes(memory_bytes: int) -> int:
    """What the GPU of a Mac may be given with enough left for the system."""
    return memory_bytes - max(SYSTEM_BYTES, int(memory_bytes * SYSTEM_SHARE))


def raise_limit_command(machine: Machine) -> str | None:
    """The line that gives the GPU more memory until the next start; None if it has as much."""
    best = highest_limit_bytes(machine.memory_bytes) // MIB
    if machine.gpu_limit_bytes is None or best <= machine.gpu_limit_bytes // MIB:
        return None
    return f"sudo sysctl iogpu.wired_limit_mb={best}"


def sysctl(name: str) -> str:
    """A value of the kernel's; empty where there is none."""
    try:
        return subprocess.check_output(
            ["sysctl", "-n", name], stderr=subprocess.DEVNULL, text=True, timeout=10
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def summary(machine: Machine) -> dict[str, Any]:
    """For a report: whole gigabytes, no names of users, hosts or folders."""
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
        **rounded,
        "raise_gpu_limit": raise_limit_command(machine),
        "versions": machine.versions,
    }
