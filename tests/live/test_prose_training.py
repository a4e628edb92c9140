"""A checkpoint that tools/prose writes: this package computes what the training forward did."""

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qwen35_mlx
from qwen35_mlx.convert import convert

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.live
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "prose"))
from pretrain import HERE, Batch, Forward, build, save, spread, text_config, train_tokenizer  # noqa: E402


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_written_checkpoint_loads_and_gives_the_trained_logits(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "model"
    template = (HERE / "chat_template.jinja").read_text()
    tokenizer = train_tokenizer(["some words"], 300, source, template)
    ends = (tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>"))
    text = text_config(kind, *ends)
    model = build(text, seed=0)
    with torch.no_grad():
        # Some matrices start at zero, which would hide what is before them.
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())
    save(model, text, source)
    ids = torch.arange(1, 33)[None]
    batch = Batch(ids, ids, torch.arange(32).expand(3, 1, 32), torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        forward = Forward(model, torch.nn.Module(), torch.float32)
        expected = forward.logits(forward.hidden(batch)[1]).numpy()
    convert(source, tmp_path / "out", dtype="float32")
    loaded: Any = qwen35_mlx.load(tmp_path / "out")[0]
    found = np.array(loaded(mx.array(ids.numpy())).astype(mx.float32))
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_windows_of_texts_do_not_overlap() -> None:
    ids = list(range(256 * 10 + 100))
    windows = spread(ids, 4)
    assert windows.shape == (4, 256) and windows.unique().numel() == 4 * 256
