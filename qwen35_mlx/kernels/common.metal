// What several kernels share. It stands before the functions of each kernel.

METAL_FUNC float sigmoid(float x) { return 1.0f / (1.0f + metal::precise::exp(-x)); }
METAL_FUNC float silu(float x) { return x * sigmoid(x); }
// log(1 + exp(x)) without overflow; the series keeps what 1 + e would lose.
METAL_FUNC float softplus(float x) {
  float e = metal::precise::exp(-metal::abs(x));
  return metal::max(x, 0.0f) + (e < 1e-3f ? e - 0.5f * e * e : metal::precise::log(1.0f + e));
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

// Sum over LANES neighbours, a power of two; all of them get it.
template <int LANES> METAL_FUNC float lane_sum(float v) {
  if (LANES == 32) return simd_sum(v);
  for (ushort mask = LANES / 2; mask > 0; mask /= 2) v += simd_shuffle_xor(v, mask);
  return v;
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

// Eight numbers by loads of 16 bytes.
METAL_FUNC void load8(const device float* from, thread float* x) {
  float4 a = *(const device float4*)from, b = *(const device float4*)(from + 4);
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = a[i], x[i + 4] = b[i];
}
METAL_FUNC void load8(const device bfloat16_t* from, thread float* x) {
  uint4 pairs = *(const device uint4*)from;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    // The upper half of a float.
    x[2 * i] = as_type<float>(pairs[i] << 16);
    x[2 * i + 1] = as_type<float>(pairs[i] & 0xffff0000u);
  }
}
METAL_FUNC void load8(const device half* from, thread float* x) {
  uint4 pairs = *(const device uint4*)from;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    half2 pair = as_type<half2>(pairs[i]);
    x[2 * i] = float(pair.x), x[2 * i + 1] = float(pair.y);
  }
}

// Elements of one row of w: words if quantized, else numbers.
template <int BITS> METAL_FUNC int row_elements(int in) { return BITS > 0 ? in / 32 * BITS : in; }

// acc[r][t] += factor[t] * (row r of w) . (row t of x), over the chunk of 32 columns that a lane
// has. Row 0 is where w, scales and biases point; ROWS rows lie `step` apart, none beyond `last`,
// which is read again instead. w is quantized to BITS in groups of GROUP, or dense if BITS is 0.
// If NORM, x is times norm_weight, and squares[t] is what its own squares add up to.
template <int BITS, int GROUP, int ROWS, int TOKENS, bool NORM, typename W, typename S, typename X,
          typename N>
METAL_FUNC void dot_chunk(const device W* w, const device S* scales, const device S* biases,
                          const device X* x, const device N* norm_weight, int in, int chunk,
                          int step, int last, thread const float* factor, thread float* acc,
                          thread float* squares) {
  uint words[ROWS][BITS > 0 ? BITS : 1];
  float partial[ROWS][TOKENS] = {}, total[TOKENS] = {};
  float scale[ROWS], bias[ROWS];
  int at[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    at[r] = metal::min(r * step, last);
    scale[r] = 1.0f, bias[r] = 0.0f;
    if constexpr (BITS > 0) {
      load_words<BITS>(w + at[r] * row_elements<BITS>(in) + chunk * BITS, words[r]);
      const int group = at[r] * (in / GROUP) + chunk / (GROUP / 32);
      scale[r] = float(scales[group]), bias[r] = float(biases[group]);
    }
  }
#pragma unroll
  for (int part = 0; part < 32; part += 8) {
    float q[ROWS][8], n[8];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if constexpr (BITS > 0) {
#pragma unroll
        for (int i = 0; i < 8; i++) q[r][i] = unpack<BITS>(words[r], part + i);
      } else {
        load8(w + at[r] * in + chunk * 32 + part, q[r]);
      }
    }
    if (NORM) load8(norm_weight + chunk * 32 + part, n);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      float v[8];
      load8(x + t * in + chunk * 32 + part, v);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (NORM) squares[t] = metal::fma(v[i], v[i], squares[t]), v[i] *= n[i];
        if (BITS > 0) total[t] += v[i];
#pragma unroll
        for (int r = 0; r < ROWS; r++) partial[r][t] = metal::fma(q[r][i], v[i], partial[r][t]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
      acc[r * TOKENS + t] += factor[t] * metal::fma(scale[r], partial[r][t], bias[r] * total[t]);
}

// The same over all chunks of a lane's share of its rows, the first of which is `row` of w.
template <int BITS, int GROUP, int ROWS, int TOKENS, int LANES, bool NORM, typename W, typename S,
          typename X, typename N>
METAL_FUNC void dot_rows(const device W* w, const device S* scales, const device S* biases,
                         const device X* x, const device N* norm_weight, int in, size_t row,
                         int last, int lane, thread const float* factor, thread float* acc,
                         thread float* squares) {
  w += row * row_elements<BITS>(in), scales += row * (in / GROUP), biases += row * (in / GROUP);
  for (int chunk = lane % LANES; chunk < in / 32; chunk += LANES)
    dot_chunk<BITS, GROUP, ROWS, TOKENS, NORM>(w, scales, biases, x, norm_weight, in, chunk,
                                               32 / LANES, last, factor, acc, squares);
}
