"""Damaged pictures and videos: refused or opened, within limits; and the fuzzer notices more."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
TOOL = Path(__file__).resolve().parent.parent / "tools" / "fuzz_media.py"


@pytest.fixture
def fuzz_media():
    pytest.importorskip("av")
    pytest.importorskip("pi_heif")
    import fuzz_media

    return fuzz_media


def test_damaged_files_neither_crash_nor_hang(fuzz_media, tmp_path):
    result = subprocess.run(
        [sys.executable, TOOL, "200", "1"], cwd=tmp_path, capture_output=True, text=True
    )
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["fuzz_failures"] == 0, result.stdout
    assert summary["files"] == 200
    # Else the damage is so great that the decoders are never reached.
    assert 20 < summary["opened"] < 180


def test_the_fuzzer_notices_what_it_is_for(fuzz_media, monkeypatch):
    assert fuzz_media.outcome(lambda: True) is True
    assert fuzz_media.outcome(lambda: False) is False
    assert "ZeroDivisionError" in fuzz_media.outcome(lambda: 1 / 0)
    assert fuzz_media.outcome(lambda: signal.raise_signal(signal.SIGTRAP)).startswith("crashed")
    assert fuzz_media.outcome(lambda: len(b"\1" * 2**30)).startswith("took ")

    def compute() -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz_media, "MAX_CPU_SECONDS", 1)
    assert fuzz_media.outcome(compute).startswith("too slow")
    monkeypatch.setattr(fuzz_media, "MAX_WAIT_SECONDS", 1)
    assert fuzz_media.outcome(lambda: time.sleep(9)).startswith("hangs")
