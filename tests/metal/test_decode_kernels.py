"""Every decode kernel against its naive form, from its very source, over random cases.

A test is one specialisation of a kernel, drawn by its number; the cases in it are random sizes and
numbers. Everyday one case of each kernel runs, the slow tests run 300.
"""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from metal.draw import HEADS, NUM_EXPERTS, Draw, chunk_range
from metal.emulator import emulated

from qwen35_mlx.kernels import metal, naive, projection
from qwen35_mlx.kernels.attention_heads import output_gate_kernel, qk_norm_rope_kernel
from qwen35_mlx.kernels.delta_step import DeltaInputs, DeltaParameters, delta_step_kernel
from qwen35_mlx.kernels.expert_step import Routing, expert_down_kernel, expert_gate_up_kernel
from qwen35_mlx.kernels.matrix import matrix
from qwen35_mlx.kernels.router import route_kernel

# Largest relative RMS error; the 16-bit types round only what is returned.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}


def deal(specialisations: int, cases: int, everyday: int = 0):
    """One case of one specialisation, and as slow tests that many cases of each."""
    slow = [pytest.param(n, cases, marks=pytest.mark.slow) for n in range(specialisations)]
    return pytest.mark.parametrize(("number", "cases"), [(everyday, 1), *slow])


@pytest.fixture(scope="module", autouse=True)
def log():
    with emulated() as log:
        metal.clear()
        yield log
    metal.clear()


def assert_close(got: mx.array, want: mx.array, tolerance: float) -> None:
    assert got.shape == want.shape
    a, b = np.array(got.astype(mx.float32)), np.array(want.astype(mx.float32))
    assert np.isfinite(a).all()
    assert np.sqrt(np.mean((a - b) ** 2)) <= tolerance * np.sqrt(np.mean(b**2))


@deal(20, 15, everyday=2)
def test_projection(number, cases, monkeypatch):
    draw = Draw(number)
    # Both numbers of rows in a simdgroup, and both ways to make a float.
    monkeypatch.setattr(projection, "FEW_ROWS", 1 if number % 5 < 3 else 1000)
    monkeypatch.setattr("qwen35_mlx.kernels.matrix.CONVERT", number % 7 == 3)
    forms = draw.formats(1 + number % 4)
    for case in range(cases):
        width = draw.width(forms, chunk_range(number))
        x = draw.normal(draw.num_tokens, width)
        norm = draw.norm(width)
        # The smallest of 8 elements at least, from one row on.
        outs = [draw.integer(max(1, -(-8 * group // width)), 45) for _, group in forms]
        pairs = [draw.linear(out, width, form) for out, form in zip(outs, forms, strict=True)]
        weights = [matrix(layer) for layer, _ in pairs]
        # Asked for, or the widest of what takes part.
        dtype = mx.float32 if case % 2 else None
        residual = draw.normal(draw.num_tokens, outs[0]) if len(outs) == 1 and case % 3 else None
        got = projection.project_kernel(x, weights, dtype, norm, residual)
        truth = x if norm is None else naive.naive_rms_norm(x, norm.weight, norm.eps)
        widest = mx.result_type(draw.normal(1), draw.normal(1, dtype=draw.weight_dtype))
        for a, b in zip(got, naive.naive_project(truth, [w for _, w in pairs]), strict=True):
            assert a.dtype == (dtype or widest)
            b = b if residual is None else b + residual.astype(mx.float32)
            assert_close(a, b, TOLERANCE[a.dtype])


@deal(20, 15, everyday=2)
def test_expert_gate_up(number, cases, monkeypatch):
    monkeypatch.setattr("qwen35_mlx.kernels.matrix.CONVERT", number % 7 == 3)
    draw = Draw(number)
    forms = draw.formats(4)
    for _ in range(cases):
        routing = draw.routing()
        width = draw.width(forms, chunk_range(number))
        x = draw.normal(draw.num_tokens, width)
        inner, shared_inner = draw.integer(8, 40), draw.integer(8, 40)
        routed = [draw.linear(inner, width, form, NUM_EXPERTS) for form in forms[:2]]
        shared = [draw.linear(shared_inner, width, form) for form in forms[2:]]
        has_routing = number % 5 != 4
        norm = draw.norm(width, every=2)
        got = expert_gate_up_kernel(
            x,
            [matrix(layer) for layer, _ in shared],
            routing if has_routing else None,
            [matrix(layer) for layer, _ in routed] if has_routing else [],
            norm,
        )
        x = x if norm is None else naive.naive_rms_norm(x, norm.weight, norm.eps)
        want = [naive.naive_gate_up(x, *(w for _, w in shared))]
        if has_routing:
            gate, up = (w for _, w in routed)
            want.append(
                mx.stack(
                    [
                        mx.concatenate(
                            [naive.naive_gate_up(row[None], gate[e], up[e]) for e in chosen]
                        )
                        for row, chosen in zip(x, routing.indices.tolist(), strict=True)
                    ]
                )
            )
        for a, b in zip(got, want, strict=True):
            assert_close(a, b, TOLERANCE[a.dtype])


@deal(20, 15, everyday=2)
def test_expert_down(number, cases, monkeypatch):
    monkeypatch.setattr("qwen35_mlx.kernels.matrix.CONVERT", number % 7 == 3)
    draw = Draw(number)
    forms = draw.formats(2)
    for _ in range(cases):
        routing = draw.routing()
        low, high = chunk_range(number)
        inner = draw.width(forms[:1], (low, high))
        # Narrower than the routed ones, or as wide.
        shared_inner = draw.width(forms[1:], (1, max(high, 4)))
        shared_inner = min(shared_inner, inner) if inner % forms[1][1] == 0 else shared_inner
        width = draw.integer(8, 60)
        routed, dense = draw.linear(width, inner, forms[0], NUM_EXPERTS)
        shared, shared_dense = draw.linear(width, shared_inner, forms[1])
        residual = draw.normal(draw.num_tokens, width)
        hidden = [
            draw.normal(draw.num_tokens, shared_inner),
            draw.normal(draw.num_tokens, routing.indices.shape[1], inner),
        ]
        has_routing = number % 5 != 4
        got = expert_down_kernel(
            hidden if has_routing else hidden[:1],
            residual,
            matrix(shared),
            routing if has_routing else None,
            [matrix(routed)] if has_routing else [],
        )
        want = naive.naive_project(hidden[0], [shared_dense])[0]
        if has_routing:
            rows = []
            for t in range(draw.num_tokens):
                row = routing.shared_scores[t] * want[t]
                for slot, expert in enumerate(routing.indices[t].tolist()):
                    product = dense[expert] @ hidden[1][t, slot].astype(mx.float32)
                    row = row + routing.scores[t, slot] * product
                rows.append(row)
            want = mx.stack(rows)
        assert_close(got, residual.astype(mx.float32) + want, TOLERANCE[draw.dtype])


@deal(24, 13, everyday=10)
def test_delta_step(number, cases):
    draw = Draw(number)
    num_tokens = 1 if number % 2 else draw.integer(2, 8)
    for _ in range(cases):
        arguments = draw.delta(draw.integer(1, 3), num_tokens)
        out, conv_state, state = delta_step_kernel(DeltaInputs(*arguments))
        want_out, want_conv_state, want_state = naive.naive_delta_step(*arguments)
        assert out.dtype == conv_state.dtype == draw.dtype
        assert_close(out, want_out, TOLERANCE[draw.dtype])
        assert mx.array_equal(conv_state.astype(mx.float32), want_conv_state)
        assert_close(state, want_state, 1e-5)


@deal(11, 28, everyday=7)
def test_router(number, cases):
    draw = Draw(number)
    num_experts = [4, 31, 33, 60, 64, 128, 256, 512, 512, 512, 1024][number]
    per_token = min(num_experts, [1, 2, 8, 10, 4, 8, 32, 10, 10, 10, 7][number])
    for _ in range(cases):
        rows = draw.integer(1, 8)
        logits, shared = draw.normal(rows, num_experts, scale=3), draw.normal(rows, 1)
        indices, scores, shared_scores = route_kernel(logits, shared, per_token)
        want = naive.naive_route(logits, shared, per_token)
        # In bf16 many are equal: any of them is right, each only once.
        chosen, right = (mx.take_along_axis(logits, i, axis=-1) for i in (indices, want[0]))
        assert mx.array_equal(chosen, right)
        assert all(len(set(row)) == per_token for row in indices.tolist())
        assert_close(scores, want[1], 1e-5)
        assert_close(shared_scores, want[2], 1e-5)


def test_router_takes_experts_that_exist_whatever_the_logits_are():
    logits = mx.full((3, 40), mx.nan)
    logits[1] = -mx.inf
    logits[2, 5:] = 0.0
    indices, _, _ = route_kernel(logits, mx.zeros((3, 1)), 8)
    for row in indices.tolist():
        assert len(set(row)) == 8
        assert max(row) < 40
    assert indices[2].tolist() == list(range(5, 13))


@deal(10, 30, everyday=2)
def test_qk_norm_rope(number, cases):
    draw = Draw(number)
    num_heads, num_kv_heads, dim, rotary = HEADS[number % len(HEADS)]
    num_tokens = 1 if number % 2 else draw.integer(2, 5)
    frequencies = mx.array(1e7 ** -(np.arange(0, rotary, 2) / rotary).astype(np.float32))
    for case in range(cases):
        batch = draw.integer(1, 3)
        q_gate = draw.normal(batch, num_tokens, num_heads * 2 * dim)
        k = draw.normal(batch, num_tokens, num_kv_heads * dim)
        weights = draw.normal(dim), draw.normal(dim)
        # One table for all rows, or positions of their own, up to the last of the context.
        tables = 1 if case % 2 else batch
        positions = mx.array(draw.rng.integers(0, 262144, (tables, num_tokens)))
        angles = positions[..., None].astype(mx.float32) * frequencies
        q_out, k_out = qk_norm_rope_kernel(
            q_gate, k, *weights, mx.cos(angles), mx.sin(angles), eps=1e-6
        )
        heads = q_gate.reshape(batch, num_tokens, num_heads, 2, dim)[..., 0, :]
        kv_heads = k.reshape(batch, num_tokens, num_kv_heads, dim)
        for got, x, weight in ((q_out, heads, weights[0]), (k_out, kv_heads, weights[1])):
            for b, h in itertools.product(range(batch), range(x.shape[2])):
                want = naive.naive_qk_norm_rope(
                    x[b, :, h], weight, positions[b % tables], frequencies, 1e-6
                )
                assert_close(got[b, h], want, TOLERANCE[draw.dtype])


@deal(10, 30, everyday=2)
def test_output_gate(number, cases):
    draw = Draw(number)
    num_heads, _, dim, _ = HEADS[number % len(HEADS)]
    num_tokens = 1 if number % 2 else draw.integer(2, 4)
    for _ in range(cases):
        batch = draw.integer(1, 2)
        x = draw.normal(batch, num_heads, num_tokens, dim)
        q_gate = draw.normal(batch, num_tokens, num_heads * 2 * dim, scale=3)
        gate = q_gate.reshape(batch, num_tokens, num_heads, 2, dim)[..., 1, :]
        want = naive.naive_output_gate(x, gate.swapaxes(1, 2)).swapaxes(1, 2)
        assert_close(
            output_gate_kernel(x, q_gate),
            want.reshape(batch, num_tokens, -1),
            TOLERANCE[draw.dtype],
        )


def test_weights_and_states_are_read_once(log):
    draw = Draw(3)
    rows, width = 8, 512
    x = draw.normal(rows, width)
    layers = [draw.linear(out, width, form)[0] for out, form in ((48, (4, 64)), (16, (3, 32)))]
    projection.project_kernel(x, [matrix(layer) for layer in layers], mx.float32)
    traffic = log.launches[-1].traffic
    for i, layer in enumerate(layers):
        assert traffic[f"m{i}_w"].read_bytes == layer.weight.nbytes
        neighbours = layer.group_size // 32
        assert traffic[f"m{i}_scales"].read_bytes == layer.scales.nbytes * neighbours
        assert traffic[f"m{i}_biases"].read_bytes == layer.biases.nbytes * neighbours

    # 2 of 6 experts, and the shared one for all tokens at once.
    routing = Routing(*(mx.array(v) for v in ([[4, 1]], [[0.5, 0.5]], [[1.0]])))
    gate, up = (draw.linear(40, width, (4, 64), 6)[0] for _ in range(2))
    shared = [draw.linear(40, width, (8, 64))[0] for _ in range(2)]
    expert_gate_up_kernel(x[:1], [matrix(m) for m in shared], routing, [matrix(gate), matrix(up)])
    traffic = log.launches[-1].traffic
    for name in ("gate", "up"):
        assert traffic[f"{name}_w"].read_bytes == gate.weight.nbytes * 2 // 6
        assert traffic[f"shared_{name}_w"].read_bytes == shared[0].weight.nbytes

    down, shared_down = draw.linear(32, 128, (5, 32), 6)[0], draw.linear(32, 64, (6, 32))[0]
    hidden = [draw.normal(1, 64), draw.normal(1, 2, 128)]
    expert_down_kernel(hidden, draw.normal(1, 32), matrix(shared_down), routing, [matrix(down)])
    traffic = log.launches[-1].traffic
    assert traffic["down_w"].read_bytes == down.weight.nbytes * 2 // 6
    assert traffic["shared_w"].read_bytes == shared_down.weight.nbytes

    state = draw.normal(2, 4, 32, 64, dtype=mx.float32)
    parameters = DeltaParameters(
        draw.normal(384, 4, 1), *(draw.normal(n) for n in (4, 4, 32)), 1e-6
    )
    arrays = [draw.normal(2, 3, n) for n in (384, 128, 4, 4, 384)]
    delta_step_kernel(DeltaInputs(*arrays, state, parameters))
    traffic = log.launches[-1].traffic
    assert traffic["state"].read_bytes == traffic["new_state"].written_bytes == state.nbytes
    assert traffic["new_conv_state"].written_bytes == 2 * 3 * 384 * draw.dtype.size
