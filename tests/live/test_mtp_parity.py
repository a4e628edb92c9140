"""The MTP layer of random models, computed by transformers and by us.

QWEN35_SEED repeats a run. Needs the extra `live`: pytest -m live.
"""

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra `live` is not installed")

from live.mtp_reference import MAX_DIFFERENCE, MtpPair, draw_mtp_pair  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("default")]

SEED = int(os.environ.get("QWEN35_SEED") or np.random.SeedSequence().entropy % 10**6)
NUM_CONFIGS = 10


@pytest.fixture(scope="module", params=range(NUM_CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MtpPair:
    return draw_mtp_pair(SEED, request.param, tmp_path_factory.mktemp("mtp"))


@pytest.mark.parametrize(("num_read", "piece"), [(0, None), (20, None), (0, 7), (9, 1)])
def test_logits_and_chained_drafts_are_those_of_transformers(
    pair: MtpPair, num_read: int, piece: int | None
) -> None:
    """At once, behind a prompt that is read for its keys and values alone, and in pieces."""
    assert pair.logits.std() > 0.5
    difference = pair.difference(num_read, piece)
    assert difference <= MAX_DIFFERENCE, f"seed {SEED}: {pair.config}"
