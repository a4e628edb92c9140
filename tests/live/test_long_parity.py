"""20,000 tokens of a random model, by transformers and by us; stretched by YaRN on request too.

The demo was trained on 4,096 tokens: this says that what lies beyond is computed right.
Needs the extra `live`: pytest -m live.
"""

# T tokens, V vocabulary

import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra `live` is not installed")

from golden import make_golden as golden  # noqa: E402
from test_golden import run_in_pieces  # noqa: E402

from qwen35_mlx.convert import convert  # noqa: E402
from qwen35_mlx.model.loading import load_model  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("default")]

NUM_TOKENS, PIECE, TRAINED = 20_000, 2000, 8_000
MAX_DIFFERENCE = 3e-4
TEXT = dict(
    vocab_size=151,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=64,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=32,
    linear_conv_kernel_dim=4,
    rms_norm_eps=1e-6,
    max_position_embeddings=TRAINED,
    tie_word_embeddings=False,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    intermediate_size=96,
    rope_parameters=dict(rope_type="default", rope_theta=1e6, partial_rotary_factor=0.5),
)


def reference_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """`[T, V]`, read in pieces: the scores of all tokens at once are gigabytes."""
    reference, cache, logits = golden.Reference(model), None, []
    for start in range(0, len(ids), PIECE):
        rows, cache = reference(ids[None, start : start + PIECE], cache)
        logits.append(rows[0])
    return np.concatenate(logits)


@pytest.mark.parametrize("stretched", [False, True], ids=["as trained", "yarn"])
def test_a_long_text_is_read_as_by_the_reference(
    stretched: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain: dict[str, Any] = TEXT if stretched else TEXT | dict(max_position_embeddings=NUM_TOKENS)
    model = golden.build("qwen3_5_text", plain, np.random.default_rng(0))
    golden.save_checkpoint(model, tmp_path / "source", fused_experts=False)
    convert(tmp_path / "source", tmp_path / "out", dtype="float32")
    with caplog.at_level(logging.WARNING):
        ours, _ = load_model(tmp_path / "out", context=NUM_TOKENS)
    assert ("YaRN" in caplog.text) is stretched
    if stretched:
        yarn = dict(
            rope_type="yarn",
            factor=NUM_TOKENS / TRAINED,
            original_max_position_embeddings=TRAINED,
        )
        changed = TEXT | dict(rope_parameters=TEXT["rope_parameters"] | yarn)
        model = golden.build("qwen3_5_text", changed, np.random.default_rng(0))
    ids = np.random.default_rng(1).integers(TEXT["vocab_size"], size=NUM_TOKENS)
    expected = reference_logits(model, ids)
    got = np.array(run_in_pieces(ours, ids, [2048] * 9 + [NUM_TOKENS - 9 * 2048]))
    assert np.abs(got - expected).max() <= MAX_DIFFERENCE * expected.std()
    mx.clear_cache()
