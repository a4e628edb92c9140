"""What the doctor runs: each operation as kernel and as ops, small and at the family's shapes.

A case is built from a member of the family, real or made up, so that the same lines serve for
parity and for timing. B is 1; T tokens, H hidden, E experts, K experts per token.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..family import Member
from ..quantization import BITS, GROUP_SIZES
from .attention_heads import output_gate, qk_norm_rope
from .decode_attention import decode_attention
from .delta_step import DeltaParameters, delta_step
from .expert_step import expert_down, expert_gate_up
from .gated_delta_rule import gated_delta_rule
from .grouped_expert_matmul import expert_mlp
from .metal import KernelSet
from .projection import project
from .router import Routing, route
from .switch import QuantizedSwitchLinear, SwitchGLU

Arrays = Sequence[mx.array]
Run = Callable[[KernelSet], Arrays]
# Relative RMS error of a kernel against ops. In bfloat16 most of it is the rounding of ops, which
# is coarser still on a CPU; a kernel that is wrong is wrong in float32 too.
TOLERANCE = {mx.float32: 1e-4, mx.bfloat16: 4e-2, mx.float16: 1e-2}
LAST_POSITION = 262_143
PREFILL_TOKENS = 2048
# What an attention step looks back on.
CACHED_TOKENS = 16_384
EPS, TAPS = 1e-6, 4


# Unequal head dims and counts, for parity in seconds.
SMALL = Member(
    name="small",
    hidden_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    width=128,
    linear_num_value_heads=4,
    num_experts=8,
    per_token=2,
    head_dim=32,
    num_key_heads=2,
    key_head_dim=32,
    value_head_dim=64,
    rotary_dim=16,
)


class Setting(NamedTuple):
    """What a case is built with besides its member."""

    dtype: mx.Dtype = mx.bfloat16
    bits: int = 4
    group_size: int = 64
    num_tokens: int = 1
    seed: int = 0

    def normal(self, *shape: int, scale: float = 1.0) -> mx.array:
        """Random numbers."""
        return (mx.random.normal(shape) * scale).astype(self.dtype)


class Case(NamedTuple):
    """Something to run with and without the kernel of an operation."""

    run: Run
    num_bytes: int  # that must be moved, each once


class Check(NamedTuple):
    """An operation, and how to build a case of it; dense models have no experts to route to."""

    op: str
    build: Callable[[Member, Setting], Case]
    is_prefill: bool = False
    needs_experts: bool = False


def _linear(in_dims: int, out_dims: int, s: Setting, num_experts: int = 0) -> nn.Module:
    """A linear layer or a stack of experts with random weights, quantized if `s.bits`."""
    if not s.bits:
        plain = nn.Linear(in_dims, out_dims, bias=False)
        plain.weight = s.normal(out_dims, in_dims, scale=in_dims**-0.5)
        return plain
    # Random codes of unit gain: a whole model's weights would take long to quantize.
    layer: nn.Module = nn.QuantizedLinear(in_dims, out_dims, False, s.group_size, s.bits)
    rows: tuple[int, ...] = (out_dims,)
    if num_experts:
        layer = QuantizedSwitchLinear(in_dims, out_dims, num_experts, False, s.group_size, s.bits)
        rows = (min(8, num_experts), out_dims)
    step = math.sqrt(12 / in_dims) / 2**s.bits
    words = (*rows, layer.weight.shape[-1])
    scales = mx.random.uniform(0.5 * step, 1.5 * step, (*rows, layer.scales.shape[-1]))
    for name, part in (
        ("weight", mx.random.randint(-(2**31), 2**31 - 1, words, mx.int32).view(mx.uint32)),
        ("scales", scales.astype(s.dtype)),
        ("biases", (scales * (0.5 - 2 ** (s.bits - 1))).astype(s.dtype)),
    ):
        # Large stacks repeat eight experts.
        setattr(layer, name, part[mx.arange(num_experts) % 8] if num_experts else part)
    return layer


def _mlp(m: Member, s: Setting, num_experts: int = 0) -> SwitchGLU:
    """A feed-forward layer, or routed experts."""
    mlp, dims = SwitchGLU(1, 1, 1), (m.hidden_size, m.width)
    for name, shape in (("gate_proj", dims), ("up_proj", dims), ("down_proj", dims[::-1])):
        setattr(mlp, name, _linear(*shape, s, num_experts))
    return mlp


def _size(*modules: nn.Module) -> int:
    flat: Any = tree_flatten([m.parameters() for m in modules])
    return sum(array.nbytes for _, array in flat)


def _projection(m: Member, s: Setting) -> Case:
    x = s.normal(1, s.num_tokens, m.hidden_size)
    value_dim = m.linear_num_value_heads * m.value_head_dim
    outs = (2 * m.num_key_heads * m.key_head_dim + value_dim, value_dim)
    modules = [_linear(m.hidden_size, out, s) for out in outs]
    plain = s._replace(bits=0)
    modules += [_linear(m.hidden_size, m.linear_num_value_heads, plain) for _ in range(2)]
    return Case(lambda kernels: project(x, modules, kernels), _size(*modules))


def _delta_step(m: Member, s: Setting) -> Case:
    T, Hv, Dk, Dv = s.num_tokens, m.linear_num_value_heads, m.key_head_dim, m.value_head_dim
    channels = 2 * m.num_key_heads * Dk + Hv * Dv
    qkv, z, b, a = (s.normal(1, T, n) for n in (channels, Hv * Dv, Hv, Hv))
    conv_state, state = s.normal(1, TAPS - 1, channels), mx.random.normal((1, Hv, Dv, Dk))
    parameters = DeltaParameters(
        s.normal(channels, TAPS, 1, scale=0.5),
        mx.log(mx.random.uniform(1, 16, (Hv,))).astype(s.dtype),
        s.normal(Hv),
        s.normal(Dv),
        EPS,
    )
    mask = mx.arange(T)[None] > 0 if T > 1 else None
    inputs = (qkv, z, b, a, conv_state, state, parameters, mask, None)
    return Case(
        lambda kernels: delta_step(*inputs, kernels),
        2 * state.nbytes + 2 * conv_state.nbytes + qkv.nbytes + 2 * z.nbytes,
    )


def _qk_norm_rope(m: Member, s: Setting) -> Case:
    """At the end of the context, where a GPU's sine of a large angle would show."""
    T, D, half = s.num_tokens, m.head_dim, m.rotary_dim // 2
    q_gate, k = s.normal(1, T, m.num_heads * 2 * D), s.normal(1, T, m.num_kv_heads * D)
    q_weight, k_weight = s.normal(D), s.normal(D)
    frequencies = (1e7 ** (-np.arange(half) / half)).astype(np.float32)
    positions = np.arange(LAST_POSITION - T + 1, LAST_POSITION + 1, dtype=np.float32)
    angles = positions[None, :, None] * frequencies

    def run(kernels: KernelSet) -> Arrays:
        if kernels:
            cosines, sines = mx.cos(mx.array(angles)), mx.sin(mx.array(angles))
        else:
            exact = angles.astype(np.float64)
            cosines, sines = (mx.array(f(exact).astype(np.float32)) for f in (np.cos, np.sin))
        return qk_norm_rope(q_gate, k, q_weight, k_weight, cosines, sines, EPS, kernels)

    return Case(run, 2 * (q_gate.nbytes + k.nbytes))


def _decode_attention(m: Member, s: Setting) -> Case:
    """Keys and values are views of longer buffers, as in a cache."""
    T, D = s.num_tokens, m.head_dim
    q = s.normal(1, m.num_heads, T, D)
    buffers = [s.normal(1, m.num_kv_heads, CACHED_TOKENS + 56, D) for _ in range(2)]
    k, v = (buffer[:, :, :CACHED_TOKENS] for buffer in buffers)
    mask = None if T == 1 else "causal"
    return Case(
        lambda kernels: [decode_attention(q, k, v, D**-0.5, mask, kernels)],
        k.nbytes + v.nbytes,
    )


def _output_gate(m: Member, s: Setting) -> Case:
    x = s.normal(1, m.num_heads, s.num_tokens, m.head_dim)
    q_gate = s.normal(1, s.num_tokens, m.num_heads * 2 * m.head_dim)
    return Case(lambda kernels: [output_gate(x, q_gate, kernels)], 3 * x.nbytes)


def _router(m: Member, s: Setting) -> Case:
    logits = 2 * mx.random.normal((s.num_tokens, m.num_experts))
    shared = mx.random.normal((s.num_tokens, 1))

    def run(kernels: KernelSet) -> Arrays:
        indices, scores, shared_scores = route(logits, shared, m.per_token, kernels)
        # The order of the chosen is free.
        dense = mx.put_along_axis(mx.zeros_like(logits), indices, scores, axis=-1)
        return [dense, shared_scores]

    return Case(run, logits.nbytes)


def _routed(m: Member, s: Setting) -> tuple[Routing | None, SwitchGLU | None]:
    """Experts of random popularity, as in real texts; none of a dense model."""
    if not m.num_experts:
        return None, None
    logits = mx.random.normal((s.num_tokens, m.num_experts)) + mx.random.normal((m.num_experts,))
    routing = route(logits, mx.zeros((s.num_tokens, 1)), m.per_token)
    return routing, _mlp(m, s, m.num_experts)


def _expert_gate_up(m: Member, s: Setting) -> Case:
    x, shared, (routing, routed) = s.normal(s.num_tokens, m.hidden_size), _mlp(m, s), _routed(m, s)
    num_bytes = _size(shared.gate_proj, shared.up_proj)
    if routed is not None:
        stacks = _size(routed.gate_proj, routed.up_proj)
        num_bytes += stacks * s.num_tokens * m.per_token // m.num_experts
    norm = nn.RMSNorm(m.hidden_size)
    norm.weight = s.normal(m.hidden_size)
    return Case(
        lambda kernels: expert_gate_up(x, shared, routing, routed, norm, kernels), num_bytes
    )


def _expert_down(m: Member, s: Setting) -> Case:
    residual, hidden = s.normal(s.num_tokens, m.hidden_size), [s.normal(s.num_tokens, m.width)]
    shared, (routing, routed) = _mlp(m, s), _routed(m, s)
    num_bytes = _size(shared.down_proj)
    if routed is not None:
        hidden.append(s.normal(s.num_tokens, m.per_token, m.width))
        num_bytes += _size(routed.down_proj) * s.num_tokens * m.per_token // m.num_experts
    return Case(
        lambda kernels: [expert_down(hidden, residual, shared, routing, routed, kernels)],
        num_bytes,
    )


def _chunk_delta_rule(m: Member, s: Setting) -> Case:
    T, Hv, Dk, Dv = s.num_tokens, m.linear_num_value_heads, m.key_head_dim, m.value_head_dim
    q, k = (mx.random.normal((1, T, m.num_key_heads, Dk)) for _ in range(2))
    q, k = (x * mx.rsqrt((x * x).sum(axis=-1, keepdims=True)) for x in (q, k))
    q, v = q * Dk**-0.5, s.normal(1, T, Hv, Dv)
    g, beta = -mx.abs(mx.random.normal((1, T, Hv))), mx.random.uniform(shape=(1, T, Hv))
    state = mx.random.normal((1, Hv, Dv, Dk))
    inputs = (q, k, v, g, beta, state)
    num_bytes = sum(x.nbytes for x in inputs) + state.nbytes + v.size * 4
    return Case(lambda kernels: gated_delta_rule(*inputs, kernels), num_bytes)


def _grouped_expert_matmul(m: Member, s: Setting) -> Case:
    x, (routing, routed) = s.normal(s.num_tokens, m.hidden_size), _routed(m, s)
    assert routing is not None and routed is not None
    indices, scores, _ = routing
    return Case(
        lambda kernels: [expert_mlp(x, indices, scores, routed, kernels)],
        _size(routed) + 2 * x.nbytes,
    )


CHECKS = (
    Check("projection", _projection),
    Check("delta_step", _delta_step),
    Check("qk_norm_rope", _qk_norm_rope),
    Check("decode_attention", _decode_attention),
    Check("output_gate", _output_gate),
    Check("router", _router, needs_experts=True),
    Check("expert_gate_up", _expert_gate_up),
    Check("expert_down", _expert_down),
    Check("chunk_delta_rule", _chunk_delta_rule, is_prefill=True),
    Check("grouped_expert_matmul", _grouped_expert_matmul, is_prefill=True, needs_experts=True),
)


def num_bytes_needed(check: Check, member: Member) -> int:
    """Memory for a case at a member's shapes, and for making it."""
    stacks = (
        3 * member.num_experts * member.hidden_size * member.width if "expert" in check.op else 0
    )
    dense = 4 * member.hidden_size * (member.width + 4 * member.linear_num_value_heads * 128)
    # A little more than 4 bits a weight, twice while it is put together.
    return 2 * (stacks + dense) * 5 // 8 + 10**9


def parity_settings(check: Check) -> Iterator[Setting]:
    """Every width and type once, group sizes and lengths in turn."""
    tokens = (70, 33, 130) if check.is_prefill else (1, 3, 8)
    for i, bits in enumerate(BITS):
        for j, dtype in enumerate(TOLERANCE):
            yield Setting(dtype, bits, GROUP_SIZES[(i + j) % 3], tokens[(i + 2 * j) % 3], i)


def relative_error(got: Arrays, want: Arrays) -> float:
    """The largest relative RMS error of any output; infinite for one that is not finite."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        error = float(mx.sqrt(mx.square(a - b).sum() / mx.maximum(mx.square(b).sum(), 1e-30)))
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
