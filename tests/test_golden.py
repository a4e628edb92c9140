"""Parity with the reference, from golden files: no torch, no transformers.

tests/golden/make_golden.py says what the files hold and makes them.
"""

# B batch, T tokens, V vocabulary

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday

from qwen35_mlx.config import RopeConfig
from qwen35_mlx.kernels.attention_heads import rotate
from qwen35_mlx.kernels.delta_step import l2_norm
from qwen35_mlx.kernels.gated_delta_rule import chunk_gated_delta_rule, gated_delta_rule
from qwen35_mlx.kernels.naive import naive_gated_delta_rule
from qwen35_mlx.model.language import Model
from qwen35_mlx.model.loading import load_model
from qwen35_mlx.model.rope import PartialRope

GOLDEN = Path(__file__).parent / "golden"
CASES = ("dense", "moe", "yarn", "next")
PIECES = (1, 3, 63, 64, 65)
MAX_DIFFERENCE, MAX_KL = 3e-4, 1e-9


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, converted_golden: Callable[[str], Path]
) -> tuple[Model, dict[str, np.ndarray]]:
    """A golden checkpoint, converted and loaded, and what the reference computed from it."""
    model, _ = load_model(converted_golden(request.param))
    with np.load(GOLDEN / request.param / "golden.npz", allow_pickle=False) as file:
        return model, dict(file)


def assert_same(logits: mx.array, reference: np.ndarray) -> None:
    """What the project promises: see `distances`."""
    max_difference, kl = distances(logits, reference)
    assert max_difference <= MAX_DIFFERENCE
    assert kl <= MAX_KL


def distances(logits: mx.array, reference: np.ndarray) -> tuple[float, float]:
    """The largest difference, and KL(reference || ours) in nats, the mean over positions."""
    ours = np.array(logits)
    assert ours.shape == reference.shape
    p, q = log_softmax(reference), log_softmax(ours)
    kl = (np.exp(p) * (p - q)).sum(axis=-1).mean()
    return float(np.abs(ours - reference).max()), float(kl)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, so that a KL of 1e-9 is not rounding."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def run_in_pieces(model: Model, ids: np.ndarray, pieces: list[int]) -> mx.array:
    """Logits `[sum(pieces), V]` of ids `[T]`, read through one cache, piece after piece."""
    cache, start, logits = model.make_cache(), 0, []
    for length in pieces:
        logits.append(model(mx.array(ids[None, start : start + length]), cache=cache)[0])
        start += length
    return mx.concatenate(logits)


def test_one_prefill(case: tuple[Model, dict[str, np.ndarray]]) -> None:
    model, golden = case
    assert_same(model(mx.array(golden["ids"][None]))[0], golden["prefill_logits"])


@pytest.mark.parametrize("piece", everyday(PIECES, 1))
def test_prefill_in_pieces_then_decode(
    case: tuple[Model, dict[str, np.ndarray]], piece: int
) -> None:
    """Two pieces and more, and the rest token by token: the states pass from one to the next."""
    model, golden = case
    num_pieces = max(2, golden["num_prompt_tokens"] // piece)
    num_decoded = min(5, len(golden["ids"]) - num_pieces * piece)
    pieces = [piece] * num_pieces + [1] * num_decoded
    assert num_decoded > 3
    assert_same(
        run_in_pieces(model, golden["ids"], pieces), golden["prefill_logits"][: sum(pieces)]
    )


def test_decode_after_a_prefill(case: tuple[Model, dict[str, np.ndarray]]) -> None:
    model, golden = case
    prompt = int(golden["num_prompt_tokens"])
    decoded = golden["decode_logits"]
    logits = run_in_pieces(model, golden["ids"], [prompt] + [1] * (len(decoded) - 1))
    assert_same(logits[prompt - 1 :], decoded)


@pytest.mark.slow
def test_greedy_text(case: tuple[Model, dict[str, np.ndarray]]) -> None:
    model, golden = case
    prompt, expected = np.split(golden["ids"], [int(golden["num_prompt_tokens"])])
    cache, ids, tokens = model.make_cache(), mx.array(prompt[None]), []
    for _ in expected:
        ids = model(ids, cache=cache)[:, -1].argmax(axis=-1, keepdims=True)
        tokens.append(ids.item())
    assert tokens == expected.tolist()


def test_left_padded_batch_then_decode(case: tuple[Model, dict[str, np.ndarray]]) -> None:
    model, golden = case
    padding = golden["left_padding"].tolist()
    ids = mx.array(golden["batch_ids"])
    cache = model.make_cache(padding)
    logits = model(ids, cache=cache)
    rows = [row[pads:] for row, pads in zip(logits, padding, strict=True)]
    assert_same(mx.concatenate(rows), golden["batch_logits"])
    steps = mx.array(golden["batch_next_ids"])
    logits = mx.concatenate([model(steps[:, i : i + 1], cache=cache) for i in range(2)], axis=1)
    assert_same(logits, golden["batch_next_logits"])


def load_ops() -> dict[str, mx.array]:
    with np.load(GOLDEN / "golden_ops.npz", allow_pickle=False) as file:
        return {name: mx.array(array) for name, array in file.items()}


@pytest.mark.parametrize("form", [naive_gated_delta_rule, gated_delta_rule, chunk_gated_delta_rule])
def test_gated_delta_rule(form: object) -> None:
    """Every form of the op against both of the reference's, from a state that is not zero."""
    golden = load_ops()
    q = l2_norm(golden["q"]) * golden["q"].shape[-1] ** -0.5
    k = l2_norm(golden["k"])
    assert callable(form)
    out, state = form(q, k, *(golden[n] for n in ("v", "g", "beta", "initial_state")))
    for reference in ("recurrent", "chunk"):
        assert mx.abs(out - golden[f"{reference}_out"]).max().item() < 1e-5
        assert mx.abs(state - golden[f"{reference}_final_state"]).max().item() < 1e-5


@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_rope_turns_as_the_reference_at_the_last_positions(kind: str) -> None:
    """Angles are float32 products: a frequency off by its last bit shows at long contexts only."""
    golden = load_ops()
    yarn = dict(
        factor=4.0,
        original_max_position_embeddings=262_144,
        attention_factor=0.1 * np.log(4.0) + 1,
    )
    rope = PartialRope(RopeConfig(theta=1e7, rotary_dim=64, **(yarn if kind == "yarn" else {})))
    expected = golden[f"rope_{kind}_out"]
    x, positions = golden["rope_x"][None, None], golden["rope_positions"]
    at_once = rotate(x, *rope.tables(positions[None]))[0, 0]
    one_by_one = [
        rope(x[:, :, i : i + 1], position)[0, 0] for i, position in enumerate(positions.tolist())
    ]
    # 1e-4: YaRN's frequencies pass through their inverse on the way, which may cost a last bit.
    for ours in (at_once, mx.concatenate(one_by_one)):
        assert mx.abs(ours - expected).max().item() < 1e-4
