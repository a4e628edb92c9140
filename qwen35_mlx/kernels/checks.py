"""Cases of each operation, to compare and to time its tiers at a model's shapes.

A case is built from a member of the family, real or made up, so that the same code serves parity
and timing. B is 1; T tokens, H hidden, E experts, K experts per token.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.quantization import BITS, GROUP_SIZES
from ..family import Member
from .attention_heads import output_gate, qk_norm, qk_norm_rope
from .decode_attention import (
    PACKED_BITS,
    PACKED_GROUP_SIZE,
    Heads,
    Packed,
    decode_attention,
    first_keys,
)
from .delta_step import DeltaInputs, DeltaParameters, Tape, delta_step, kept_delta_step
from .expert_step import expert_down, expert_gate_up
from .grouped_expert_matmul import expert_mlp
from .matrix import MAX_ROWS, arrays_of
from .projection import project
from .router import Routing, route
from .switch import QuantizedSwitchLinear, SwitchGLU, SwitchLinear
from .tiers import MLX, OPS, Tiers
from .verdicts import Format

Arrays = Sequence[mx.array]
Run = Callable[[Tiers, mx.array], Arrays]
# Maximum relative RMS error of a kernel against ops in float32. Errors come from another order of
# sums, and from rounding outputs and intermediate results.
TOLERANCE = {mx.float32: 1e-4, mx.bfloat16: 1e-2, mx.float16: 2e-3}
LAST_POSITION = 262_143
# Length of the cache in an attention step.
CACHED_TOKENS = 16_384
EPS, TAPS = 1e-6, 4


# Unequal head dims and counts, for parity in seconds.
SMALL = Member(
    name="small",
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    width=128,
    linear_num_value_heads=4,
    num_experts=8,
    num_experts_per_tok=2,
    head_dim=32,
    linear_num_key_heads=2,
    linear_key_head_dim=32,
    linear_value_head_dim=64,
    rotary_dim=16,
)


class Setting(NamedTuple):
    """The settings of a case, besides its member."""

    dtype: mx.Dtype = mx.bfloat16
    bits: int = 4
    group_size: int = 64
    num_tokens: int = 1
    seed: int = 0
    padded: bool = False
    # The type of the values, if they are stored in a wider one.
    rounded_to: mx.Dtype | None = None

    def cast(self, x: mx.array) -> mx.array:
        """Convert x to the type of the case."""
        return x.astype(self.rounded_to or self.dtype).astype(self.dtype)

    def normal(self, *shape: int, scale: float = 1.0) -> mx.array:
        """Normally distributed random numbers."""
        return self.cast(mx.random.normal(shape) * scale)

    @classmethod
    def of(cls, form: Format, num_tokens: int) -> "Setting":
        """The setting for weights of a format."""
        return cls(getattr(mx, form.dtype), form.bits, form.group_size, num_tokens)

    @property
    def exact(self) -> "Setting":
        """The same numbers in float32."""
        return self._replace(dtype=mx.float32, rounded_to=self.dtype)


class Case(NamedTuple):
    """A computation to run on each tier of an operation."""

    run: Run
    x: mx.array  # the input that may depend on the last output
    num_bytes: int  # bytes that must be moved, each once


class Check(NamedTuple):
    """An operation and a function that builds its case; dense models have no routed experts."""

    op: str
    build: Callable[[Member, Setting], Case]
    is_prefill: bool = False
    needs_experts: bool = False


def _linear(in_dims: int, out_dims: int, s: Setting, num_experts: int = 0) -> nn.Module:
    """A linear layer or a stack of experts with random weights, quantized if `s.bits`."""
    if not s.bits:
        stack = (num_experts,) if num_experts else ()
        plain = SwitchLinear(1, 1, 1) if num_experts else nn.Linear(1, 1, bias=False)
        plain.weight = s.normal(*stack, out_dims, in_dims, scale=in_dims**-0.5)
        return plain
    # Random codes with unit gain, because quantizing a whole model's weights would take long.
    layer: nn.Module = nn.QuantizedLinear(in_dims, out_dims, False, s.group_size, s.bits)
    rows: tuple[int, ...] = (out_dims,)
    if num_experts:
        layer = QuantizedSwitchLinear(in_dims, out_dims, num_experts, s.group_size, s.bits)
        rows = (min(8, num_experts), out_dims)
    step = math.sqrt(12 / in_dims) / 2**s.bits
    words = (*rows, layer.weight.shape[-1])
    scales = mx.random.uniform(0.5 * step, 1.5 * step, (*rows, layer.scales.shape[-1]))
    for name, part in (
        ("weight", mx.random.randint(-(2**31), 2**31 - 1, words, mx.int32).view(mx.uint32)),
        ("scales", s.cast(scales)),
        ("biases", s.cast(scales * (0.5 - 2 ** (s.bits - 1)))),
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
    return sum(a.nbytes for a in arrays_of([m.parameters() for m in modules]).values())


def _norm(m: Member, s: Setting) -> nn.RMSNorm:
    norm = nn.RMSNorm(m.hidden_size)
    norm.weight = s.normal(m.hidden_size)
    return norm


def _projection(m: Member, s: Setting) -> Case:
    x = s.normal(1, s.num_tokens, m.hidden_size)
    value_dim = m.linear_num_value_heads * m.linear_value_head_dim
    outs = (2 * m.linear_num_key_heads * m.linear_key_head_dim + value_dim, value_dim)
    modules = [_linear(m.hidden_size, out, s) for out in outs]
    plain = s._replace(bits=0)
    modules += [_linear(m.hidden_size, m.linear_num_value_heads, plain) for _ in range(2)]
    norm = _norm(m, s)
    return Case(lambda kernels, x: project(x, modules, kernels, norm=norm), x, _size(*modules))


def _delta_step(m: Member, s: Setting) -> Case:
    T, Hv, Dk, Dv = (
        s.num_tokens,
        m.linear_num_value_heads,
        m.linear_key_head_dim,
        m.linear_value_head_dim,
    )
    channels = 2 * m.linear_num_key_heads * Dk + Hv * Dv
    qkv, z, b, a = (s.normal(1, T, n) for n in (channels, Hv * Dv, Hv, Hv))
    conv_state, state = s.normal(1, TAPS - 1, channels), mx.random.normal((1, Hv, Dv, Dk))
    parameters = DeltaParameters(
        s.normal(channels, TAPS, 1, scale=0.5),
        s.cast(mx.log(mx.random.uniform(1, 16, (Hv,)))),
        s.normal(Hv),
        s.normal(Dv),
        EPS,
    )
    mask = mx.arange(T)[None] > 0 if s.padded else None
    rest = (z, b, a, conv_state, state, parameters)

    def run(kernels: Tiers, qkv: mx.array) -> Arrays:
        inputs = DeltaInputs(qkv, *rest)
        results = delta_step(inputs._replace(mask=mask), None, kernels)
        if not s.padded or T > MAX_ROWS:
            return results
        # Not timed: a pass whose last token is taken back, and another pass after it.
        out, kept = kept_delta_step(inputs, kernels)
        kept = kept._replace(num_accepted=T - 1)
        tape = kept if isinstance(kept, Tape) else None
        before = (tape.conv_state, tape.recurrent_state) if tape else kept.states()
        behind = inputs._replace(conv_state=before[0], recurrent_state=before[1])
        again = delta_step(behind, None, kernels, tape)
        return [*results, out, *kept.states(), *again]

    return Case(run, qkv, 2 * state.nbytes + 2 * conv_state.nbytes + qkv.nbytes + 2 * z.nbytes)


def _qk_norm_rope(m: Member, s: Setting) -> Case:
    """A case at the end of the context, where errors of a GPU's sine of large angles would show."""
    T, D, half = s.num_tokens, m.head_dim, m.rotary_dim // 2
    q_gate, k = (
        s.normal(1, T, m.num_attention_heads * 2 * D),
        s.normal(1, T, m.num_key_value_heads * D),
    )
    q_weight, k_weight = s.normal(D), s.normal(D)
    periods = (1e7 ** (np.arange(half) / half)).astype(np.float32)
    positions = np.arange(LAST_POSITION - T + 1, LAST_POSITION + 1, dtype=np.float32)
    angles = positions[None, :, None] * (1 / periods)
    exact = [mx.array(f(angles.astype(np.float64)).astype(np.float32)) for f in (np.cos, np.sin)]
    # Made once per step, not once per layer.
    tables = [mx.cos(mx.array(angles)), mx.sin(mx.array(angles))]
    freqs, start = mx.array(periods), LAST_POSITION - T + 1

    def run(kernels: Tiers, q_gate: mx.array) -> Arrays:
        tier = kernels.of("qk_norm_rope", T)
        if tier == MLX:
            heads = qk_norm(q_gate, k, q_weight, k_weight, EPS)
            return [
                mx.fast.rope(
                    x, 2 * half, traditional=False, base=None, scale=1.0, offset=start, freqs=freqs
                )
                for x in heads
            ]
        cosines, sines = exact if tier == OPS else tables
        return qk_norm_rope(q_gate, k, q_weight, k_weight, cosines, sines, EPS, kernels)

    return Case(run, q_gate, 2 * (q_gate.nbytes + k.nbytes))


def _attention(m: Member, s: Setting, dim: int, held: Callable[[mx.array], Heads]) -> Case:
    """A case in which keys and values are views of longer buffers, as in a cache."""
    q = s.normal(1, m.num_attention_heads, s.num_tokens, dim)
    buffers = [held(s.normal(1, m.num_key_value_heads, CACHED_TOKENS + 56, dim)) for _ in range(2)]
    k, v = (first_keys(buffer, CACHED_TOKENS) for buffer in buffers)
    mask = None if s.num_tokens == 1 else "causal"
    return Case(
        lambda kernels, q: [decode_attention(q, k, v, dim**-0.5, mask, kernels)],
        q,
        k.nbytes + v.nbytes,
    )


def _decode_attention(m: Member, s: Setting) -> Case:
    return _attention(m, s, m.head_dim, lambda floats: floats)


def _packed_attention(m: Member, s: Setting) -> Case:
    """A case with 8-bit keys and values; the reference has the same codes in float32."""

    def pack(floats: mx.array) -> Packed:
        floats = floats.astype(s.rounded_to or s.dtype)
        codes, *groups = mx.quantize(floats, PACKED_GROUP_SIZE, PACKED_BITS)
        return Packed([codes, *map(s.cast, groups)], PACKED_BITS, PACKED_GROUP_SIZE)

    return _attention(m, s, max(m.head_dim, PACKED_GROUP_SIZE), pack)


def _output_gate(m: Member, s: Setting) -> Case:
    x = s.normal(1, m.num_attention_heads, s.num_tokens, m.head_dim)
    q_gate = s.normal(1, s.num_tokens, m.num_attention_heads * 2 * m.head_dim)
    return Case(lambda kernels, x: [output_gate(x, q_gate, kernels)], x, 3 * x.nbytes)


def _router(m: Member, s: Setting) -> Case:
    logits = 2 * mx.random.normal((s.num_tokens, m.num_experts))
    shared = mx.random.normal((s.num_tokens, 1))

    def run(kernels: Tiers, logits: mx.array) -> Arrays:
        indices, scores, shared_scores = route(logits, shared, m.num_experts_per_tok, kernels)
        # The chosen experts may have any order.
        dense = mx.put_along_axis(mx.zeros_like(logits), indices, scores, axis=-1)
        return [dense, shared_scores]

    return Case(run, logits, logits.nbytes)


def _routed(m: Member, s: Setting, n: int) -> tuple[Routing | None, SwitchGLU | None]:
    """`n` experts of random popularity, as in real texts; None for a dense model."""
    if not m.num_experts:
        return None, None
    logits = mx.random.normal((s.num_tokens, n)) + mx.random.normal((n,))
    routing = route(logits, mx.zeros((s.num_tokens, 1)), m.num_experts_per_tok)
    return routing, _mlp(m, s, n)


def _num_held(m: Member, num_tokens: int) -> int:
    """Number of experts in the stacks of a decode case: enough for the choice, far from all."""
    return min(m.num_experts, 2 * m.num_experts_per_tok * num_tokens)


def _expert_gate_up(m: Member, s: Setting) -> Case:
    x, shared, norm = s.normal(s.num_tokens, m.hidden_size), _mlp(m, s), _norm(m, s)
    held = _num_held(m, s.num_tokens)
    routing, routed = _routed(m, s, held)
    num_bytes = _size(shared.gate_proj, shared.up_proj)
    if routed is not None:
        stacks = _size(routed.gate_proj, routed.up_proj)
        num_bytes += stacks * s.num_tokens * m.num_experts_per_tok // held
    return Case(
        lambda kernels, x: expert_gate_up(x, shared, routing, routed, norm, kernels), x, num_bytes
    )


def _expert_down(m: Member, s: Setting) -> Case:
    residual, hidden = s.normal(s.num_tokens, m.hidden_size), [s.normal(s.num_tokens, m.width)]
    held = _num_held(m, s.num_tokens)
    shared, (routing, routed) = _mlp(m, s), _routed(m, s, held)
    num_bytes = _size(shared.down_proj)
    if routed is not None:
        hidden.append(s.normal(s.num_tokens, m.num_experts_per_tok, m.width))
        num_bytes += _size(routed.down_proj) * s.num_tokens * m.num_experts_per_tok // held
    return Case(
        lambda kernels, residual: [expert_down(hidden, residual, shared, routing, routed, kernels)],
        residual,
        num_bytes,
    )


def _grouped_expert_matmul(m: Member, s: Setting) -> Case:
    x, (routing, routed) = s.normal(s.num_tokens, m.hidden_size), _routed(m, s, m.num_experts)
    assert routing is not None and routed is not None
    indices, scores, _ = routing
    return Case(
        lambda kernels, x: [expert_mlp(x, indices, scores, routed, kernels)],
        x,
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
    # Last of the decode kernels, because few caches are packed.
    Check("packed_attention", _packed_attention),
    Check("chunk_delta_rule", _delta_step, is_prefill=True),
    Check("grouped_expert_matmul", _grouped_expert_matmul, is_prefill=True, needs_experts=True),
)


def num_bytes_needed(check: Check, member: Member, num_tokens: int) -> int:
    """Memory for a case at a member's shapes, and for making it."""
    held = member.num_experts if check.is_prefill else _num_held(member, num_tokens)
    stacks = 3 * held * member.hidden_size * member.width if "expert" in check.op else 0
    dense = 4 * member.hidden_size * (member.width + 4 * member.linear_num_value_heads * 128)
    # A little more than 8 bits a weight, twice while it is put together.
    return 2 * (stacks + dense) * 9 // 8 + 10**9


def parity_settings(check: Check) -> Iterator[Setting]:
    """Every width and type once, group sizes and lengths in turn."""
    tokens = (70, 33, 130) if check.is_prefill else (1, 3, 8)
    for i, bits in enumerate(BITS):
        for j, dtype in enumerate(TOLERANCE):
            num_tokens = tokens[(i + 2 * j) % 3]
            yield Setting(dtype, bits, GROUP_SIZES[(i + j) % 3], num_tokens, i, num_tokens > 1)


def relative_error(got: Arrays, want: Arrays) -> float:
    """The largest relative RMS error of any output; infinite for one that is not finite."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        error = float(mx.sqrt(mx.square(a - b).sum() / mx.maximum(mx.square(b).sum(), 1e-30)))
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
