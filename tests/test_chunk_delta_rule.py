"""The chunked delta rule's kernels, run by the emulator, against the naive rule in fp32."""

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday
from metal import errors
from metal.emulator import Log, emulated

from qwen35_mlx.kernels import metal
from qwen35_mlx.kernels.chunk_delta_rule import chunk_delta_rule, is_eligible
from qwen35_mlx.kernels.gated_delta_rule import gated_delta_rule
from qwen35_mlx.kernels.naive import naive_gated_delta_rule
from qwen35_mlx.kernels.tiers import with_kernels

CASES_EACH = 14
FLOATS = (mx.float32, mx.bfloat16, mx.float16)
# Hk, Hv, Dk, Dv and the type: of q, k, v, g and beta, or of v alone.
SPECIALISATIONS = [
    (1, 2, 16, 8, mx.float32, False),
    (2, 2, 32, 64, mx.float32, False),
    (2, 4, 32, 24, mx.bfloat16, False),
    (1, 3, 48, 32, mx.float16, False),
    (1, 1, 64, 32, mx.float32, False),
    (1, 2, 64, 128, mx.bfloat16, True),
    (3, 3, 64, 16, mx.float16, True),
    (1, 2, 128, 32, mx.float32, False),
    (1, 1, 128, 64, mx.bfloat16, False),
    (1, 1, 128, 128, mx.bfloat16, True),
    (2, 6, 16, 32, mx.float16, False),
    (1, 4, 32, 32, mx.float32, False),
    (1, 2, 24, 40, mx.bfloat16, True),
    (1, 1, 32, 128, mx.float32, False),
    (2, 2, 64, 8, mx.bfloat16, False),
]


@pytest.fixture(scope="module")
def log():
    metal.clear()
    with emulated(metal_available=True) as log:
        yield log
    metal.clear()


def inputs(rng, batch, num_tokens, Hk, Hv, Dk, Dv, decay=1.0):
    def normal(*size):
        return rng.standard_normal(size, dtype=np.float32)

    q, k = normal(batch, num_tokens, Hk, Dk), normal(batch, num_tokens, Hk, Dk)
    q /= np.linalg.norm(q, axis=-1, keepdims=True) * Dk**0.5
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = normal(batch, num_tokens, Hv, Dv)
    g = -decay * np.abs(normal(batch, num_tokens, Hv))
    beta = rng.random((batch, num_tokens, Hv), dtype=np.float32)
    return [mx.array(x) for x in (q, k, v, g, beta, normal(batch, Hv, Dv, Dk))]


def assert_close(ours, truth, tolerance=1e-5):
    for a, b in zip(ours, truth, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype == mx.float32
        a, b = np.array(a), np.array(b)
        error = np.sqrt(np.mean((a - b) ** 2))
        assert error <= tolerance * np.sqrt(np.mean(b**2))


@pytest.mark.parametrize("spec", everyday([(spec,) for spec in SPECIALISATIONS], 0), ids=str)
def test_random_cases(log: Log, spec) -> None:
    *heads, dtype, only_v = spec
    rng = np.random.default_rng(sum(heads))
    for case in range(CASES_EACH):
        batch = int(rng.integers(1, 3))
        # A few long ones; larger heads take the emulator longer.
        longest = 140 if case % 7 == 0 else 70 if case % 2 else 20
        num_tokens = int(rng.integers(1, longest + 1))
        *values, state = inputs(rng, batch, num_tokens, *heads, decay=float(rng.choice([0.05, 1])))
        if case % 3 == 0:
            # Padding on either side leaves the state as it is.
            mask = mx.array(rng.random((batch, num_tokens)) > 0.3)[..., None]
            values[3], values[4] = mx.where(mask, values[3], 0), mx.where(mask, values[4], 0)
        if case % 4 == 0:
            state = mx.zeros_like(state)
        typed = [x.astype(dtype) if not only_v or i == 2 else x for i, x in enumerate(values)]
        assert is_eligible(*typed[:3])
        assert_close(chunk_delta_rule(*typed, state), naive_gated_delta_rule(*typed, state))


def test_there_are_at_least_200_cases() -> None:
    assert len(SPECIALISATIONS) * CASES_EACH >= 200


def test_repeated_keys_with_full_strength_lose_no_digits(log: Log) -> None:
    q, k, v, g, _, state = inputs(np.random.default_rng(5), 1, 130, 1, 1, 32, 24, decay=1e-3)
    k = mx.broadcast_to(k[:, :1], k.shape)
    values = (q, k, v, g, mx.full(g.shape, 0.9999), state)
    assert_close(chunk_delta_rule(*values), naive_gated_delta_rule(*values))


@pytest.mark.parametrize("decay", [0.0, 30.0, 1000.0])
def test_no_decay_and_total_decay_are_finite(log: Log, decay: float) -> None:
    values = inputs(np.random.default_rng(7), 2, 70, 1, 1, 32, 24, decay=decay)
    assert_close(chunk_delta_rule(*values), naive_gated_delta_rule(*values))


def test_pieces_with_the_state_carried_equal_the_whole(log: Log) -> None:
    """A piece of one token is for the step, not for these kernels."""
    *values, state = inputs(np.random.default_rng(3), 2, 100, 1, 2, 32, 16)
    whole = naive_gated_delta_rule(*values, state)
    outputs, start = [], 0
    for length in (65, 1, 2, 32):
        piece = (x[:, start : start + length] for x in values)
        before = log.num_dispatches
        out, state = gated_delta_rule(*piece, state, with_kernels(["chunk_delta_rule"]))
        assert log.num_dispatches - before == (0 if length == 1 else 2)
        outputs.append(out)
        start += length
    assert_close((mx.concatenate(outputs, axis=1), state), whole)


def test_heads_the_kernels_cannot_run_go_to_ops(log: Log) -> None:
    for heads in ((1, 1, 20, 8), (1, 1, 32, 12), (1, 1, 136, 8)):
        values = inputs(np.random.default_rng(1), 1, 9, *heads)
        before = log.num_dispatches
        ours = gated_delta_rule(*values, with_kernels(["chunk_delta_rule"]))
        assert log.num_dispatches == before
        assert_close(ours, naive_gated_delta_rule(*values))


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "barrier", "key_head_dim"),
    [("chunk_delta_prepare", n, 64) for n in range(6)]
    + [("chunk_delta_scan", n, 64 if n else 32) for n in range(5)],
)
def test_each_barrier_is_missed_when_it_is_gone(
    log: Log, monkeypatch: pytest.MonkeyPatch, name: str, barrier: int, key_head_dim: int
) -> None:
    """The cases above would notice a kernel that only works in one order of threads."""
    read = metal._read
    functions, body = read(name)
    parts = body.split(BARRIER)
    body = BARRIER.join([*parts[:barrier], parts[barrier] + ";" + parts[barrier + 1]])
    body = BARRIER.join([body, *parts[barrier + 2 :]])
    assert body.count(BARRIER) == len(parts) - 2
    monkeypatch.setattr(metal, "_read", lambda n: (functions, body) if n == name else read(n))
    metal.clear()
    values = inputs(np.random.default_rng(0), 1, 70, 1, 1, key_head_dim, 16)
    with pytest.raises((errors.RaceError, errors.UninitializedError)):
        chunk_delta_rule(*values)
    metal.clear()


def test_macs_and_memory_of_real_heads(log: Log) -> None:
    """A step a chunk of 64 tokens, each block of the triangles once, 20 KB a threadgroup."""
    values = inputs(np.random.default_rng(2), 1, 128, 1, 1, 128, 128)
    chunk_delta_rule(*values)
    prepare, scan = log.launches[-2:]
    block, chunks = 512, 2
    # 36 blocks of k k^T and q k^T; the inverse takes a column of n + 1 blocks (n² + 3n) / 2.
    inverse = sum((n * n + 3 * n) // 2 for n in range(8))
    assert prepare.num_matrix_macs == chunks * block * (2 * 36 * 16 + inverse)
    # q S, k S and the new state; the triangles of inverse and scores.
    assert scan.num_matrix_macs == chunks * block * 16 * (3 * 8 * 16 + 2 * 36)
    assert max(prepare.threadgroup_bytes, scan.threadgroup_bytes) <= 20 * 1024
    # The state is read once and written once.
    assert scan.traffic["state"].read_bytes == scan.traffic["state"].buffer_bytes
    assert scan.traffic["new_state"].written_bytes == scan.traffic["state"].buffer_bytes
