"""A Mac whose GPU is the emulator, for the doctor and the check at first load."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest
from metal.emulator import emulated

from qwen35_mlx.kernels import checks, choice, measure, metal
from qwen35_mlx.kernels.checks import SMALL, Setting

DENSE = SMALL._replace(name="dense", hidden_size=64, num_experts=0, num_experts_per_tok=0)
PREFILL_TOKENS = 40


@contextmanager
def faked_mac(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> Iterator[None]:
    """Few parity cases, one copy of weights, and times that depend on nothing but the operation.

    `seconds` are those of the kernels by operation; what is not named takes 10 us, and every
    operation on MLX 30.
    """
    info = {
        "device_name": "Apple M3 Ultra",
        "memory_size": 256 * 2**30,
        "max_recommended_working_set_size": 192 * 2**30,
    }
    monkeypatch.setattr(mx, "device_info", lambda: info)

    def settings(check: checks.Check) -> list[Setting]:
        return [Setting(mx.float32, num_tokens=PREFILL_TOKENS if check.is_prefill else 2)]

    def timed(cases: list[Any], tiers: Any, runs: int) -> float:
        if "judge" in cases[0].run.__qualname__:
            return 0.0
        return next((seconds.get(op, 10e-6) for op in tiers.kernel_rows), 30e-6)

    monkeypatch.setattr(checks, "parity_settings", settings)
    monkeypatch.setattr(choice, "PREFILL_TOKENS", PREFILL_TOKENS)
    monkeypatch.setattr(measure, "COLD_BYTES", 0)
    monkeypatch.setattr(measure, "seconds", timed)
    metal.clear()
    with emulated(metal_available=True):
        yield
    metal.clear()


def only(monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    """Check these operations alone."""
    monkeypatch.setattr(checks, "CHECKS", [c for c in checks.CHECKS if c.op in ops])


def change_source(monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str) -> None:
    """What `<file>.metal` says from now on."""
    read = metal._read

    def changed(name: str) -> tuple[str, str]:
        functions, body = read(name)
        if name == file:
            assert old in functions + body
            functions, body = functions.replace(old, new), body.replace(old, new)
        return functions, body

    monkeypatch.setattr(metal, "_read", changed)
