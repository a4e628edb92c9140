"""Random models, each computed by transformers and by us in the same process.

QWEN35_SEED repeats a run; the table at its end shows the seed and the distances of every config.
QWEN35_CONFIGS is the number of configs. Needs the extra `live`: pytest -m live.
"""

# B batch, T tokens, V vocabulary

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra `live` is not installed")

from golden import make_golden as golden  # noqa: E402
from live.random_configs import RandomConfig, draw_config  # noqa: E402
from test_golden import MAX_DIFFERENCE, MAX_KL, PIECES, distances, run_in_pieces  # noqa: E402

from qwen35_mlx.convert import convert  # noqa: E402
from qwen35_mlx.model.language import Model  # noqa: E402
from qwen35_mlx.model.loading import load_model  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("default")]

SEED = int(os.environ.get("QWEN35_SEED") or np.random.SeedSequence().entropy % 10**6)
NUM_CONFIGS = int(os.environ.get("QWEN35_CONFIGS") or 20)
NUM_GREEDY, MIN_GREEDY_COMPARED = 64, 48
# The models are too small for more threads to pay.
torch.set_num_threads(1)
# Two correct implementations may choose differently below these distances between logits.
MIN_TOKEN_MARGIN, MIN_ROUTER_MARGIN = 1e-3, 1e-4
MAX_NOISE, NUM_JITTERED, MAX_REDRAWS = MAX_DIFFERENCE / 8, 6, 12


@dataclass
class Pair:
    """One random model in both implementations, its inputs, and what the reference says."""

    config: RandomConfig
    ours: Model
    ids: np.ndarray
    logits: np.ndarray
    greedy: tuple[np.ndarray, np.ndarray]
    batch: tuple[np.ndarray, ...]
    batch_logits: tuple[np.ndarray, np.ndarray]
    reference_noise: float
    num_redraws: int
    max_difference: float = 0.0
    max_kl: float = 0.0
    num_greedy_compared: int = 0

    def compare(self, ours: mx.array, reference: np.ndarray) -> None:
        """Within the promised distances, and remembered for the table."""
        max_difference, kl = distances(ours, reference)
        self.max_difference = max(self.max_difference, max_difference)
        self.max_kl = max(self.max_kl, kl)
        assert max_difference <= MAX_DIFFERENCE, f"seed {SEED}: {self.config}"
        assert kl <= MAX_KL, f"seed {SEED}: {self.config}"


@dataclass
class Report:
    """The table at the end of the run."""

    pairs: list[Pair] = field(default_factory=list)

    def lines(self) -> list[str]:
        lines = [
            f"QWEN35_SEED={SEED}, {len(self.pairs)} configs",
            "config  max |diff|  KL       reference against itself  redraws  logit std  greedy",
        ]
        for i, pair in enumerate(self.pairs):
            lines.append(
                f"{i:<7} {pair.max_difference:<11.1e} {pair.max_kl:<8.1e} "
                f"{pair.reference_noise:<25.1e} {pair.num_redraws:<8} {pair.logits.std():<10.2f} "
                f"{pair.num_greedy_compared:<7} {pair.config}"
            )
        worst = max(self.pairs, key=lambda pair: pair.max_difference)
        kl = max(pair.max_kl for pair in self.pairs)
        return [*lines, f"largest: {worst.max_difference:.1e}, KL {kl:.1e}"]


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Iterator[Report]:
    report = Report()
    yield report
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        terminal.write_line("")
        for line in report.lines() if report.pairs else []:
            terminal.write_line(line)


@pytest.fixture(scope="module", params=range(NUM_CONFIGS))
def pair(
    request: pytest.FixtureRequest, report: Report, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    # Config i of a seed is the same whether or not the others run.
    rng = np.random.default_rng([SEED, request.param])
    pair = None
    while pair is None:
        # Another config too: of some shapes hardly any input is settled, and a run must end.
        config = draw_config(rng, request.param)
        pair = _draw_pair(config, tmp_path_factory.mktemp("live"), rng)
    report.pairs.append(pair)
    return pair


def _draw_pair(config: RandomConfig, folder: Path, rng: np.random.Generator) -> Pair | None:
    """Random weights in both implementations, or None if they are too touchy to compare."""
    model = golden.build(config.model_type, config.text_config, rng)
    dtype = getattr(torch, config.source_dtype)
    golden.save_checkpoint(
        copy.deepcopy(model).to(dtype),
        folder / "source",
        fused_experts=config.fused_experts,
        max_shard_size=config.max_shard_size,
    )
    convert(folder / "source", folder / "converted", dtype="float32")
    # Only the weights: `model.to(dtype).float()` would round the rotary frequencies too.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return _reference_side(model, config, load_model(folder / "converted")[0], rng)


def _reference_side(
    model: Any, config: RandomConfig, ours: Model, rng: np.random.Generator
) -> Pair | None:
    """Run the reference on random inputs, drawn again where float32 does not settle its answer.

    That is where a router is about to choose otherwise, or where the reference differs from
    itself by MAX_NOISE when its chunks begin one token later, its rows are padded or its weights
    move in their last digit. None after MAX_REDRAWS, when the weights are at fault.
    """
    jittered = [golden.jittered(model, rng) for _ in range(NUM_JITTERED)]
    vocab_size = config.text_config["vocab_size"]
    for num_redraws in range(MAX_REDRAWS):
        reference = golden.Reference(model)
        ids = rng.integers(vocab_size, size=2 * rng.integers(68, 76) + 1)
        logits = reference(ids[None])[0][0]
        width = 2 * rng.integers(32, 37) + 1
        padding = np.append(rng.integers(1, width - 1, size=2), 0)
        batch = rng.integers(vocab_size, size=(3, width)), padding, ids[:9].reshape(3, 3)
        batch_logits = reference.padded_batch(*batch)
        rows = [(ids, logits)]
        for i, n in enumerate(padding):
            row_logits = np.concatenate([batch_logits[0][i, n:], batch_logits[1][i]])
            rows.append((np.concatenate([batch[0][i, n:], batch[2][i]]), row_logits))
        noise = max(_noise(reference, jittered, *row) for row in rows)
        if noise > MAX_NOISE or reference.min_router_margin < MIN_ROUTER_MARGIN:
            continue
        tokens, chosen_from = reference.greedy(ids[:31], NUM_GREEDY)
        text = np.concatenate([ids[:31], tokens[:-1]])
        text_logits = reference(text[None])[0][0]
        text_logits = np.concatenate([text_logits[:30], chosen_from])
        noise = max(noise, _noise(reference, jittered, text, text_logits))
        if noise < MAX_NOISE and reference.min_router_margin > MIN_ROUTER_MARGIN:
            greedy = tokens, chosen_from
            return Pair(config, ours, ids, logits, greedy, batch, batch_logits, noise, num_redraws)
    return None


def _noise(
    reference: golden.Reference,
    jittered: list[golden.Reference],
    ids: np.ndarray,
    logits: np.ndarray,
) -> float:
    first, cache = reference(ids[None, :1])
    rest, _ = reference(ids[None, 1:], cache)
    split = float(np.abs(np.concatenate([first, rest], axis=1)[0] - logits).max())
    moved = max(float(np.abs(other(ids[None])[0][0] - logits).max()) for other in jittered)
    return max(split, moved / golden.JITTER_GAIN)


def test_one_prefill(pair: Pair) -> None:
    pair.compare(pair.ours(mx.array(pair.ids[None]))[0], pair.logits)


@pytest.mark.parametrize("piece", PIECES)
def test_prefill_in_pieces_then_decode(pair: Pair, piece: int) -> None:
    """The reference's single prefill says what every way of cutting it must give."""
    num_pieces = max(2, (len(pair.ids) - 20) // piece)
    pieces = [piece] * num_pieces + [1] * 6
    pair.compare(run_in_pieces(pair.ours, pair.ids, pieces), pair.logits[: sum(pieces)])


def test_left_padded_batch_then_decode(pair: Pair) -> None:
    """Against the reference's batch, and each row against the same row alone."""
    ids, padding, next_ids = pair.batch
    cache = pair.ours.make_cache(padding.tolist())
    logits = pair.ours(mx.array(ids), cache=cache)
    steps = [pair.ours(mx.array(column[:, None]), cache=cache) for column in next_ids.T]
    decoded = mx.concatenate(steps, axis=1)
    pair.compare(decoded, pair.batch_logits[1])
    for row, pads in enumerate(padding):
        pair.compare(logits[row, pads:], pair.batch_logits[0][row, pads:])
        alone = np.concatenate([ids[row, pads:], next_ids[row]])
        together = np.concatenate([np.array(logits[row, pads:]), np.array(decoded[row])])
        pieces = [len(alone) - next_ids.shape[1]] + [1] * next_ids.shape[1]
        pair.compare(run_in_pieces(pair.ours, alone, pieces), together)


def test_greedy_text(pair: Pair) -> None:
    """Our tokens are the reference's, one after the other.

    Where the reference's two best logits are closer than MIN_TOKEN_MARGIN either choice is
    right: such a step is not compared, and its token is the reference's, so that the two texts
    stay the same. At least MIN_GREEDY_COMPARED of the NUM_GREEDY steps must be compared.
    """
    tokens, chosen_from = pair.greedy
    margins = golden.token_margin(chosen_from)
    cache, logits = pair.ours.make_cache(), []
    ids = mx.array(pair.ids[None, :31])
    for token, margin in zip(tokens.tolist(), margins, strict=True):
        logits.append(pair.ours(ids, cache=cache)[:, -1])
        if margin > MIN_TOKEN_MARGIN:
            assert logits[-1].argmax().item() == token, f"seed {SEED}: {pair.config}"
            pair.num_greedy_compared += 1
        ids = mx.array([[token]])
    assert pair.num_greedy_compared >= MIN_GREEDY_COMPARED
    pair.compare(mx.concatenate(logits), chosen_from)
