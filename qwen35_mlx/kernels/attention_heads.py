"""The operations on attention heads around the softmax: q/k norm, rotation, output gate.

B batch, T tokens, Hq/Hk query/key heads, D head dim, R rotated dims. A head of the query projection
is `[query D | output gate D]`.
"""

from functools import partial

import mlx.core as mx

from .matrix import FLOATS
from .metal import kernel
from .tiers import PORTABLE, Tiers


def qk_norm_rope(
    q_gate: mx.array,
    k: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    cosines: mx.array,
    sines: mx.array,
    eps: float,
    kernels: Tiers = PORTABLE,
) -> tuple[mx.array, mx.array]:
    """q `[B, Hq, T, D]` and k `[B, Hk, T, D]`, normalised, with the first R dims rotated.

    q_gate `[B, T, Hq * 2D]`, k `[B, T, Hk * D]`; cosines and sines `[B or 1, T, R / 2]` fp32.
    """
    num_rows = q_gate.shape[0] * q_gate.shape[1]
    if kernels.runs("qk_norm_rope", num_rows) and q_gate.dtype in FLOATS:
        return qk_norm_rope_kernel(q_gate, k, q_weight, k_weight, cosines, sines, eps=eps)
    q, k = qk_norm(q_gate, k, q_weight, k_weight, eps)
    return rotate(q, cosines, sines), rotate(k, cosines, sines)


def qk_norm(
    q_gate: mx.array, k: mx.array, q_weight: mx.array, k_weight: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """The same without the rotation."""
    # Heads first, then split.
    shape = (*q_gate.shape[:2], -1, q_weight.size)
    q, k = q_gate.reshape(shape)[:, :, 0::2], k.reshape(shape)
    q, k = mx.fast.rms_norm(q, q_weight, eps), mx.fast.rms_norm(k, k_weight, eps)
    return q.swapaxes(1, 2), k.swapaxes(1, 2)


def rotate(x: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    """Rotate x `[B, H, T, D]` by cosines and sines `[B or 1, T, R / 2]`, in fp32."""
    half = cosines.shape[-1]
    cosines, sines = cosines[:, None], sines[:, None]
    first, second, kept = mx.split(x, [half, 2 * half], axis=-1)
    a, b = first.astype(mx.float32), second.astype(mx.float32)
    turned = mx.concatenate([a * cosines - b * sines, b * cosines + a * sines], axis=-1)
    return mx.concatenate([turned.astype(x.dtype), kept], axis=-1)


def qk_norm_rope_kernel(*arrays: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """`qk_norm_rope` in one dispatch, for the same arrays."""
    q_gate, k, q_weight, _, cosines, _ = arrays
    batch, num_tokens, _ = q_gate.shape
    dim = q_weight.size
    num_heads, num_kv_heads = q_gate.shape[-1] // (2 * dim), k.shape[-1] // dim
    names = "q_gate k q_weight k_weight cosines sines eps".split()
    q, k = kernel("qk_norm_rope", tuple(names), ("q_out", "k_out"))(
        inputs=[*arrays, eps],
        template=[
            ("T", q_gate.dtype),
            ("HQ", num_heads),
            ("HK", num_kv_heads),
            ("D", dim),
            ("ROTARY", 2 * cosines.shape[-1]),
        ],
        grid=(32, num_heads + num_kv_heads, batch * num_tokens),
        threadgroup=(32, 1, 1),
        output_shapes=[(batch, num_heads, num_tokens, dim), (batch, num_kv_heads, num_tokens, dim)],
        output_dtypes=[q_gate.dtype] * 2,
    )
    return q, k


def output_gate(x: mx.array, q_gate: mx.array, kernels: Tiers = PORTABLE) -> mx.array:
    """x `[B, Hq, T, D]` times the sigmoid of its gate in q_gate, as `[B, T, Hq * D]`."""
    batch, _, num_tokens, dim = x.shape
    if kernels.runs("output_gate", batch * num_tokens) and x.dtype in FLOATS:
        return output_gate_kernel(x, q_gate)
    gate = q_gate.reshape(batch, num_tokens, -1, dim)[:, :, 1::2].reshape(batch, num_tokens, -1)
    x = x.swapaxes(1, 2).reshape(batch, num_tokens, -1)
    return sigmoid_gated(x, gate) if kernels.on_mlx else x * mx.sigmoid(gate)


@partial(mx.compile, shapeless=True)
def sigmoid_gated(x: mx.array, gate: mx.array) -> mx.array:
    """x times the sigmoid of the gate, in one dispatch."""
    return x * mx.sigmoid(gate)


def output_gate_kernel(x: mx.array, q_gate: mx.array) -> mx.array:
    """`output_gate` in one dispatch."""
    batch, num_heads, num_tokens, dim = x.shape
    (gated,) = kernel("output_gate", ("x", "q_gate"), ("gated",))(
        inputs=[x, q_gate],
        template=[("T", x.dtype), ("HQ", num_heads), ("D", dim)],
        grid=(x.size, 1, 1),
        threadgroup=(min(256, x.size), 1, 1),
        output_shapes=[(batch, num_tokens, num_heads * dim)],
        output_dtypes=[x.dtype],
    )
    return gated
