"""Rows of a call of a decode kernel against calls with each of them alone, bit by bit."""

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np
from metal.draw import HEADS, NUM_EXPERTS, Draw, chunk_range

from qwen35_mlx.kernels.attention_heads import output_gate_kernel, qk_norm_rope_kernel
from qwen35_mlx.kernels.decode_attention import Heads, Packed, decode_attention_kernel
from qwen35_mlx.kernels.delta_step import DeltaInputs, delta_step_kernel
from qwen35_mlx.kernels.expert_step import Routing, expert_down_kernel, expert_gate_up_kernel
from qwen35_mlx.kernels.matrix import matrix
from qwen35_mlx.kernels.projection import project_kernel
from qwen35_mlx.kernels.router import route_kernel

Arrays = Sequence[mx.array]
# A kernel as a function of arrays to arrays, the rows of all of them along the first axis.
Case = tuple[str, Callable[..., Arrays], Arrays]


def cases(number: int) -> Iterator[Case]:
    """One of each decode kernel, of 2 to 8 rows."""
    draw = Draw(number, 2 + number % 7)
    rows = draw.num_tokens
    forms = draw.formats(4)
    width = draw.width(forms, chunk_range(number))
    x, norm = draw.normal(rows, width), draw.norm(width)
    weights = [matrix(draw.linear(draw.integer(32, 60), width, form)[0]) for form in forms]
    yield "projection", lambda x: project_kernel(x, weights, mx.float32, norm), [x]

    def with_residual(x: mx.array, residual: mx.array) -> Arrays:
        return project_kernel(x, weights[:1], mx.float32, norm, residual)

    yield "projection", with_residual, [x, draw.normal(rows, weights[0].out_dims)]

    out = draw.integer(32, 60)
    routing = draw.routing()
    shared = [matrix(draw.linear(out, width, form)[0]) for form in forms[:2]]
    routed = [matrix(draw.linear(out, width, form, NUM_EXPERTS)[0]) for form in forms[2:]]

    def gate_up(x: mx.array, *chosen: mx.array) -> Arrays:
        return expert_gate_up_kernel(x, shared, Routing(*chosen), routed, norm)

    yield "expert_gate_up", gate_up, [x, *routing]

    def down(residual: mx.array, a: mx.array, b: mx.array, *chosen: mx.array) -> Arrays:
        return [expert_down_kernel([a, b], residual, shared[0], Routing(*chosen), routed[:1])]

    per_token = routing.indices.shape[1]
    hidden = [draw.normal(rows, width), draw.normal(rows, per_token, width)]
    yield "expert_down", down, [draw.normal(rows, out), *hidden, *routing]

    def router(logits: mx.array, shared_logits: mx.array) -> Arrays:
        return route_kernel(logits, shared_logits, 4)

    yield "router", router, [draw.normal(rows, 70), draw.normal(rows, 1)]

    heads, key_heads, dim, rotary = HEADS[number % len(HEADS)]
    angles = draw.normal(rows, 1, rotary // 2, dtype=mx.float32, scale=100.0)
    q_weight, k_weight = draw.normal(dim), draw.normal(dim)
    q_gate = draw.normal(rows, 1, heads * 2 * dim)

    def rope(q_gate: mx.array, k: mx.array, cosines: mx.array, sines: mx.array) -> Arrays:
        return qk_norm_rope_kernel(q_gate, k, q_weight, k_weight, cosines, sines, eps=1e-6)

    k = draw.normal(rows, 1, key_heads * dim)
    yield "qk_norm_rope", rope, [q_gate, k, mx.cos(angles), mx.sin(angles)]
    yield (
        "output_gate",
        lambda x, gate: [output_gate_kernel(x, gate)],
        [draw.normal(rows, heads, 1, dim), q_gate],
    )

    def attention(*arrays: mx.array) -> Arrays:
        return [decode_attention_kernel(*arrays, 0.1)]

    yield "decode_attention", attention, draw.attention(rows, 1, draw.integer(1, 150))

    def packed_attention(q: mx.array, *parts: mx.array) -> Arrays:
        k, v = (Packed(parts[i : i + 3], 8, 64) for i in (0, 3))
        return [decode_attention_kernel(q, k, v, 0.1)]

    q, *held = draw.packed_attention(rows, 1, draw.integer(1, 150))
    yield "packed_attention", packed_attention, [q, *(a for x in held for a in x.parts)]

    *arrays, parameters, mask = draw.delta(rows, 1)
    arrays += [] if mask is None else [mask]

    def delta(*a: mx.array) -> Arrays:
        return delta_step_kernel(DeltaInputs(*a[:6], parameters, *a[6:]))

    yield "delta_step", delta, arrays


def bits(array: mx.array) -> bytes:
    """As they are in memory."""
    return np.array(mx.contiguous(array).view(mx.uint8)).tobytes()


def different_rows(run: Callable[..., Arrays], inputs: Arrays) -> int:
    """How many rows of any output are other numbers when the row is alone."""
    together = run(*inputs)
    count = 0
    for row in range(len(inputs[0])):
        alone = run(*(a[row : row + 1] for a in inputs))
        pairs = zip(together, alone, strict=True)
        count += any(bits(a[row : row + 1]) != bits(b) for a, b in pairs)
    return count


def different_tokens(number: int) -> tuple[int, int]:
    """Tokens of delta_step that are other numbers when they come one by one; of how many."""
    draw = Draw(number)
    num_tokens = 2 + number % 7
    *inputs, conv_state, state, parameters, mask = draw.delta(2, num_tokens)
    out, *together = delta_step_kernel(DeltaInputs(*inputs, conv_state, state, parameters, mask))
    alone, count = [conv_state, state], 0
    for t in range(num_tokens):
        token = [a[:, t : t + 1] for a in inputs]
        token_mask = None if mask is None else mask[:, t : t + 1]
        y, *alone = delta_step_kernel(DeltaInputs(*token, *alone, parameters, token_mask))
        count += bits(y) != bits(out[:, t : t + 1])
    count += any(bits(a) != bits(b) for a, b in zip(together, alone, strict=True))
    return count, num_tokens + 1


def different_queries(number: int, packed: bool = False) -> tuple[int, int]:
    """Queries of decode_attention that are other numbers when they come one by one; of how many.

    Alone, a query's keys end with its own, in a buffer of another length.
    """
    draw = Draw(number)
    num_tokens = 2 + number % 7
    # The last ones lie on both sides of the end of a block at times.
    length = 128 + number % num_tokens if number % 2 else draw.integer(num_tokens, 300)
    make = draw.packed_attention if packed else draw.attention
    q, k, v = make(1, num_tokens, length)
    together, count = decode_attention_kernel(q, k, v, 0.1), 0
    for t in range(num_tokens):
        end = length - num_tokens + t + 1
        keys, values = (shortened(a, end, number % 5) for a in (k, v))
        alone = decode_attention_kernel(q[:, :, t : t + 1], keys, values, 0.1)
        count += bits(alone) != bits(together[:, :, t : t + 1])
    return count, num_tokens


def shortened(heads: Heads, end: int, room: int) -> Heads:
    """The first keys, as views of buffers with that much room."""
    if isinstance(heads, Packed):
        return heads._replace(parts=[shortened(part, end, room) for part in heads.parts])
    return mx.pad(heads[:, :, :end], [(0, 0), (0, 0), (0, room), (0, 0)])[:, :, :end]


def compare(numbers: Sequence[int]) -> dict[str, int]:
    """Rows compared, and rows that differ, over all decode kernels; inside `emulated()`."""
    compared = different = 0
    for number in numbers:
        for _, run, inputs in cases(number):
            compared += len(inputs[0])
            different += different_rows(run, inputs)
        queries = [different_queries(number, packed) for packed in (False, True)]
        for wrong, tokens in (different_tokens(number), *queries):
            compared, different = compared + tokens, different + wrong
    return {"compared": compared, "different": different}
