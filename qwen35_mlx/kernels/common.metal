// What several kernels share. It stands before the functions of each kernel. Fused operations are
// written as such here and in decode kernels, so that no compiler fuses them in one place only: a
// row has the same bits whatever rows are beside it.

METAL_FUNC float sigmoid(float x) { return 1.0f / (1.0f + metal::precise::exp(-x)); }
METAL_FUNC float silu(float x) { return x * sigmoid(x); }
// log(1 + exp(x)) without overflow; the series keeps what 1 + e would lose.
METAL_FUNC float softplus(float x) {
  float e = metal::precise::exp(-metal::abs(x));
  const float series = metal::fma(-0.5f * e, e, e);
  return metal::max(x, 0.0f) + (e < 1e-3f ? series : metal::precise::log(1.0f + e));
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

// What follows reads a row of weights in chunks of 32 columns, a lane a chunk. MLX packs a row as
// a stream of bits, here read in halves of a word: Apple GPUs address the halves of a register, so
// no value has to be shifted into its place.

// The `count` bits of a half from bit `from` on, as a number times 2^place. CONVERT: by an integer
// conversion, times 2^from still. Else they become the last bits of the mantissa of a power of two,
// which is subtracted; exact, and made of instructions of full rate alone.
template <bool CONVERT> METAL_FUNC float field(ushort half_word, int from, int count, int place) {
  const uint bits = uint(half_word) & (((1u << count) - 1u) << from);
  if (CONVERT) return float(bits) * as_type<float>(uint(127 + place) << 23);
  const uint one = uint(150 + place - from) << 23;
  return as_type<float>(bits | one) - as_type<float>(one);
}

// What a number of `unpack` has to be multiplied by.
template <int BITS, bool CONVERT> METAL_FUNC float unit(int i) {
  return CONVERT ? as_type<float>(uint(127 - i * BITS % 16) << 23) : 1.0f;
}

// Value i of a chunk, of any width; exact.
template <int BITS, bool CONVERT = false>
METAL_FUNC float unpack(thread const ushort* halves, int i) {
  const int bit = i * BITS, from = bit % 16, count = metal::min(BITS, 16 - from);
  const float low = field<CONVERT>(halves[bit / 16], from, count, 0);
  if (count == BITS) return low;
  return low + field<CONVERT>(halves[bit / 16 + 1], 0, BITS - count, CONVERT ? 16 : count);
}

// The halves of a chunk, by loads of 8 bytes, or of 4 where chunks are not aligned to 8.
template <int BITS>
METAL_FUNC void load_halves(const device uint32_t* from, thread ushort* halves) {
  constexpr int width = BITS % 2 == 0 ? 4 : 2;
#pragma unroll
  for (int i = 0; i < 2 * BITS; i += width) {
    auto part = *(const device metal::vec<ushort, width>*)((const device ushort*)from + i);
#pragma unroll
    for (int j = 0; j < width; j++) halves[i + j] = part[j];
  }
}

// Eight numbers.
template <typename T> METAL_FUNC void load8(const device T* from, thread float* x) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    float4 part = float4(*(const device metal::vec<T, 4>*)(from + i));
#pragma unroll
    for (int j = 0; j < 4; j++) x[i + j] = part[j];
  }
}

// N neighbours that a lane has, at once if there are four.
template <int N> METAL_FUNC void load_lane(const device float* from, thread float* values) {
  if constexpr (N == 4) {
    float4 quad = *(const device float4*)from;
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = quad[i];
  } else {
    for (int i = 0; i < N; i++) values[i] = from[i];
  }
}
template <int N> METAL_FUNC void store_lane(device float* to, thread const float* values) {
  if constexpr (N == 4) *(device float4*)to = float4(values[0], values[1], values[2], values[3]);
  else
    for (int i = 0; i < N; i++) to[i] = values[i];
}

// Elements of one row of w: words if quantized, else numbers.
template <int BITS> METAL_FUNC int row_elements(int in) { return BITS > 0 ? in / 32 * BITS : in; }

// What a lane has of ROWS rows of a matrix and of their products with TOKENS rows of x. The rows
// lie `step` apart, none beyond `last`, which is read again instead. w is quantized to BITS in
// groups of GROUP, or dense if BITS is 0.
template <int BITS, int GROUP, int ROWS, int TOKENS, bool CONVERT, typename W, typename S>
struct Rows {
  const device W* w;
  const device S* scales;
  const device S* biases;
  int in, step, last;
  float sums[ROWS][TOKENS];
  ushort halves[ROWS][BITS > 0 ? 2 * BITS : 1];
  float scale[ROWS], bias[ROWS], weights[ROWS][8];

  METAL_FUNC int row(int r) const thread { return metal::min(r * step, last); }

  // Begins a chunk.
  METAL_FUNC void load(int chunk) thread {
    if constexpr (BITS > 0) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        load_halves<BITS>(w + row(r) * row_elements<BITS>(in) + chunk * BITS, halves[r]);
        const int group = row(r) * (in / GROUP) + uint(chunk) / (GROUP / 32);
        scale[r] = float(scales[group]), bias[r] = float(biases[group]);
      }
    }
  }

  // Makes the weights of eight columns, the first of which is `part` of the chunk.
  METAL_FUNC void unpack8(int chunk, int part) thread {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if constexpr (BITS > 0) {
#pragma unroll
        for (int i = 0; i < 8; i++)
          weights[r][i] = metal::fma(unpack<BITS, CONVERT>(halves[r], part + i),
                                     scale[r] * unit<BITS, CONVERT>(part + i), bias[r]);
      } else {
        load8(w + row(r) * in + chunk * 32 + part, weights[r]);
      }
    }
  }

  // Adds their products with eight numbers of row t of x.
  METAL_FUNC void multiply(thread const float* x, int t) thread {
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) sums[r][t] = metal::fma(weights[r][i], x[i], sums[r][t]);
  }
};

template <int BITS, int GROUP, int ROWS, int TOKENS, bool CONVERT, typename W, typename S>
METAL_FUNC Rows<BITS, GROUP, ROWS, TOKENS, CONVERT, W, S> rows_from(
    const device W* w, const device S* scales, const device S* biases, int in, size_t first,
    int step, int last) {
  return {w + first * row_elements<BITS>(in), scales + first * (in / GROUP),
          biases + first * (in / GROUP), in, step, last};
}

// In the place of a second matrix.
struct NoRows {
  METAL_FUNC void load(int) thread {}
  METAL_FUNC void unpack8(int, int) thread {}
  METAL_FUNC void multiply(thread const float*, int) thread {}
};

// A kernel is compiled for 1, 2, 4 or 8 rows of x, and runs for as few as half of them and one.
template <int TOKENS> METAL_FUNC bool has_token(int t, int num_tokens) {
  return t <= TOKENS / 2 || t < num_tokens;
}

// Both matrices' rows times all rows of x, over the chunks of a lane, LANES of which share a row.
// The order in which a row is added up depends on nothing but its length. If NORM, x is times
// norm_weight, and squares[t] is what its own squares add up to.
template <int TOKENS, int LANES, bool NORM, typename A, typename B, typename X, typename N>
METAL_FUNC void multiply_rows(thread A& a, thread B& b, const device X* x,
                              const device N* norm_weight, int in, int num_tokens, int lane,
                              thread float* squares) {
  for (int chunk = lane % LANES; chunk < in / 32; chunk += LANES) {
    a.load(chunk), b.load(chunk);
#pragma unroll
    for (int part = 0; part < 32; part += 8) {
      const int column = chunk * 32 + part;
      float n[8];
      if (NORM) load8(norm_weight + column, n);
      a.unpack8(chunk, part), b.unpack8(chunk, part);
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        if (!has_token<TOKENS>(t, num_tokens)) continue;
        float v[8];
        load8(x + t * in + column, v);
        if (NORM) {
#pragma unroll
          for (int i = 0; i < 8; i++) squares[t] = metal::fma(v[i], v[i], squares[t]), v[i] *= n[i];
        }
        a.multiply(v, t), b.multiply(v, t);
      }
    }
  }
}

// The scale of an RMS norm: the lanes of a row of weights have seen all of x on their way.
template <int LANES> METAL_FUNC float norm_factor(float squares, int in, float eps) {
  return metal::precise::rsqrt(lane_sum<LANES>(squares) / float(in) + eps);
}

// Attention of few queries works on blocks of keys, which grow with their distance from the start:
// few for a long context, many for a short one, and the same for every query that sees them.
struct KeyBlock {
  int first, size;
};
METAL_FUNC KeyBlock key_block(int number) {
  KeyBlock block = {0, 128};
  for (int end = 4096;; end *= 4, block.size *= 2) {
    const int count = (end - block.first) / block.size;
    if (number < count) break;
    number -= count, block.first = end;
  }
  block.first += number * block.size;
  return block;
}
// Blocks of that many keys.
METAL_FUNC int num_key_blocks(int num_keys) {
  int result = 0, first = 0, size = 128;
  for (int end = 4096; first < num_keys; end *= 4, size *= 2) {
    result += (metal::min(end, num_keys) - first + size - 1) / size;
    first = end;
  }
  return result;
}
// Below every score.
METAL_FUNC float least_score() { return -3.4028235e38f; }
