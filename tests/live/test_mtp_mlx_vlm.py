"""The MTP layer of a folder that we converted, as mlx-vlm loads and runs it."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_checkpoint

from qwen35_mlx.convert import convert
from qwen35_mlx.model.cache import KVCache
from qwen35_mlx.model.loading import load_model

# Its own Python is slow to import, so only where it is asked for.
mtp_split = pytest.importorskip(
    "mlx_vlm.speculative.drafters.mtp_split", reason="mlx-vlm is not installed"
)

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("default")]
NUM_TOKENS, NUM_DRAFTS = 24, 4


def both(folder: Path) -> tuple[Any, Any]:
    """Our model and mlx-vlm's drafter, which reads the same files, in float32."""
    drafter = mtp_split.detect_mtp_splitter(folder).load(folder)
    drafter.set_dtype(mx.float32)
    ours, _ = load_model(folder)
    return ours, drafter


@pytest.mark.parametrize(
    "settings", [dict(bits=4), dict(bits=3, group_size=32), dict(dtype="bfloat16")], ids=str
)
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_drafts_are_equal(tmp_path: Path, moe: bool, settings: dict[str, Any]) -> None:
    write_checkpoint(tmp_path / "src", moe=moe, mtp=True, tokenizer=True)
    ours, drafter = both(convert(tmp_path / "src", tmp_path / "out", **settings))
    vocab = ours.config.vocab_size
    ids = np.random.default_rng(0).integers(vocab, size=NUM_TOKENS).tolist()
    hidden, embeddings = ours.trunk(mx.array([ids])), ours.embed(ids)
    caches = KVCache(), drafter.make_cache()
    out = ours.mtp(hidden[:, :-1], embeddings[:, 1:], caches[0])
    places = mx.arange(NUM_TOKENS - 1)[None]
    theirs = drafter._forward_hidden(embeddings[:, 1:], hidden[:, :-1], caches[1], places)
    for step in range(NUM_DRAFTS):
        # bf16 norms are rounded once more by them than by us.
        assert np.abs(np.array(out - theirs)).max() <= 3e-4 * np.abs(np.array(out)).max()
        drafts = [int(ours.head(state[:, -1]).argmax().item()) for state in (out, theirs)]
        assert drafts[0] == drafts[1]
        embedding = ours.embed(drafts[:1])
        place = mx.array([[NUM_TOKENS - 1 + step]])
        theirs = drafter._forward_hidden(embedding, theirs[:, -1:], caches[1], place)
        out = ours.mtp(out[:, -1:], embedding, caches[0])
