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

// An 8x8 matrix of a simdgroup: a lane holds two neighbours of a row.
using Fragment = metal::simdgroup_matrix<float, 8, 8>;
METAL_FUNC uint fragment_row(uint lane) { return (lane / 4 & 4) + (lane / 2) % 4; }
METAL_FUNC uint fragment_column(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
// The block [row, column] of a lower triangle of blocks, row by row.
METAL_FUNC uint triangle(uint row, uint column) { return row * (row + 1) / 2 + column; }

// `height` rows of a panel of `width` columns to threadgroup memory, zeros behind the last row.
template <int width, int stride, typename T>
METAL_FUNC void stage(threadgroup float* panel, const device T* from, uint row_stride, uint rows,
                      uint height, uint thread_index, uint num_threads) {
  constexpr uint quads = width / 4;
  for (uint i = thread_index; i < height * quads; i += num_threads) {
    uint row = i / quads, column = i % quads * 4;
    float4 values = 0;
    if (row < rows) {
      auto quad = *(const device metal::vec<T, 4>*)(from + row * row_stride + column);
      values = float4(quad);
    }
    *(threadgroup float4*)(panel + row * stride + column) = values;
  }
}

// Value i of the bit stream in which MLX packs a row: of any width, across words.
template <int BITS> METAL_FUNC float unpack(thread const uint* words, int i) {
  const int bit = i * BITS, word = bit / 32, shift = bit % 32;
  uint v = words[word] >> shift;
  if (shift + BITS > 32) v |= words[word + 1] << (32 - shift);
  return float(v & ((1u << BITS) - 1u));
}

// The BITS words of one chunk, by the widest loads that are aligned.
template <int BITS> METAL_FUNC void load_words(const device uint32_t* from, thread uint* words) {
  constexpr int wide = BITS % 4 == 0 ? 4 : BITS % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < BITS; i += wide) {
    if (wide == 4) {
      uint4 v = *(const device uint4*)(from + i);
      words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
    } else if (wide == 2) {
      uint2 v = *(const device uint2*)(from + i);
      words[i] = v.x, words[i + 1] = v.y;
    } else {
      words[i] = from[i];
    }
  }
}
