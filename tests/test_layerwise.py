"""A checkpoint run a layer at a time gives the logits of the whole model, in parts of any size."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qwen35_mlx.convert import layerwise
from qwen35_mlx.convert.layerwise import Layerwise, open_checkpoint, run_layer
from qwen35_mlx.model.loading import load_model


@pytest.mark.parametrize(("layer_tokens", "head_tokens"), [(4096, 256), (1, 7), (50, 20)])
def test_logits_beyond_one_part_of_a_text_are_those_of_the_whole_model(
    converted_golden: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    layer_tokens: int,
    head_tokens: int,
) -> None:
    monkeypatch.setattr(layerwise, "LAYER_TOKENS", layer_tokens)
    monkeypatch.setattr(layerwise, "HEAD_TOKENS", head_tokens)
    folder = converted_golden("dense")
    whole, _ = load_model(folder)
    ids = mx.array(np.random.default_rng(0).integers(0, whole.config.vocab_size, (3, 20)))
    runner = Layerwise(open_checkpoint(folder))
    hidden = runner.embed(ids)
    for index in range(whole.config.num_hidden_layers):
        hidden = run_layer(runner.layer(index), hidden)
    expected = whole(ids)
    seen = np.zeros(ids.shape, int)
    for text, start, logits in runner.logits(hidden):
        stop = start + len(logits)
        assert len(logits) <= head_tokens
        seen[text, start:stop] += 1
        assert mx.abs(logits - expected[text, start:stop]).max().item() <= 1e-4
    assert (seen == 1).all()
