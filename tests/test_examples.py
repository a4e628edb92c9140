"""The examples of README.md, run as they stand there, with the demo as their model."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_adapters import random_adapter

import qwen35_mlx
from qwen35_mlx.chat import conversation
from qwen35_mlx.checkpoint.adapter import write_adapter
from qwen35_mlx.sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[str]:
    return BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.fixture
def home(converted_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with all that the examples name."""
    demo = ROOT / "qwen35_mlx" / "demo"
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "Qwen3.5-0.8B").symlink_to(demo)
    shutil.copy(demo / "picture.png", tmp_path / "shot.png")
    write_adapter(tmp_path / "adapters", random_adapter(converted_demo, size=3.0))
    monkeypatch.setenv("QWEN35_MLX_SESSIONS", str(tmp_path / "sessions"))
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def test_every_public_name_is_in_an_example() -> None:
    text = "\n".join(blocks())
    missing = [
        name for name in qwen35_mlx.__all__ if not re.search(rf"\bqwen35_mlx\.{name}\(", text)
    ]
    assert missing == []
    for part in ("tools=", "images=", "schema=", "chat.save(", "read_adapter("):
        assert part in text, part


@pytest.mark.slow
def test_the_examples_run_and_print_what_they_promise(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is drawn by chance may wander on until the demo's context is full.
    likeliest = SamplingParams(temperature=0.0)
    monkeypatch.setattr(conversation, "preset_params", lambda *_: likeliest)
    names: dict[str, Any] = {}
    printed = []
    for number, block in enumerate(blocks()):
        exec(compile(block, f"README.md, example {number + 1}", "exec"), names)
        printed.append(capsys.readouterr().out)
    text = "\n".join(printed)
    assert "Paris" in text and "red star" in text and "cold" in text
    assert re.search(r'"city": ?"(Paris|Rome)", ?"sure": ?(true|false)', text)
    assert (home / "sessions").is_dir() and len(names["later"].messages) == 5
    vectors = names["vectors"]
    assert float((vectors * vectors).sum(axis=1).min()) == pytest.approx(1, abs=1e-4)
    assert names["model"].adapter_digest == "" and names["tuned"].adapter_digest
