// What several kernels share: affine dequantization in MLX's layout, sums over a simdgroup.
// Included before the functions of each kernel.

constexpr constant int LANES = 32;

METAL_FUNC float sigmoid(float x) { return 1.0f / (1.0f + metal::precise::exp(-x)); }
METAL_FUNC float silu(float x) { return x * sigmoid(x); }
// log(1 + exp(x)) without overflow.
METAL_FUNC float softplus(float x) {
  float e = metal::precise::exp(-metal::abs(x));
  // log(1 + e) loses small e; its series does not.
  return metal::max(x, 0.0f) + (e < 1e-3f ? e * (1.0f - 0.5f * e) : metal::precise::log(1.0f + e));
}
