"""Damaged pictures and videos: refused or opened, within limits; and the fuzzer notices more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
TOOL = Path(__file__).resolve().parent.parent / "tools" / "fuzz_media.py"


# In a process of its own: the memory of the one that forks counts too.
OUTCOMES = """
import json, signal, sys, time
sys.path.insert(0, sys.argv[1])
import fuzz_media

def compute():
    while True:
        pass

jobs = [
    lambda: True,
    lambda: False,
    lambda: 1 / 0,
    lambda: signal.raise_signal(signal.SIGTRAP),
    lambda: len(b"1" * 2**30),
]
found = [fuzz_media.outcome(job) for job in jobs]
fuzz_media.MAX_CPU_SECONDS = 1
found.append(fuzz_media.outcome(compute))
fuzz_media.MAX_WAIT_SECONDS = 1
found.append(fuzz_media.outcome(lambda: time.sleep(9)))
print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def decoders():
    pytest.importorskip("av")
    pytest.importorskip("pi_heif")


def test_damaged_files_neither_crash_nor_hang(tmp_path):
    result = subprocess.run(
        [sys.executable, TOOL, "200", "1"], cwd=tmp_path, capture_output=True, text=True
    )
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["fuzz_failures"] == 0, result.stdout
    assert summary["files"] == 200
    # Else the damage is so great that the decoders are never reached.
    assert 20 < summary["opened"] < 180


def test_the_fuzzer_notices_what_it_is_for():
    result = subprocess.run(
        [sys.executable, "-c", OUTCOMES, TOOL.parent], capture_output=True, text=True, check=True
    )
    good, bad, error, crash, large, slow, hanging = json.loads(result.stdout)
    assert (good, bad) == (True, False)
    assert "ZeroDivisionError" in error
    assert crash.startswith("crashed") and large.startswith("took 1")
    assert slow.startswith("too slow") and hanging.startswith("hangs")
