// Rows times the matrices of their experts, for rows sorted by expert: tiles of up to 64 rows of
// one expert by 128 rows of weights, multiplied in blocks of eight rows as far as there are rows.
//
// GATED: x [N, K] through gate (w) and up [E, M, K], 64 columns each, to silu(gate) * up [R, M].
// Else: x [R, K] through down (w) [E, M, K], 128 columns, times their score, to [R, M] in the
// order of tokens. order [R]: the place of each sorted row among tokens x PER_TOKEN experts.
// row_ends, tile_ends [E]: running sums. A threadgroup (tile, columns) of four simdgroups.

// 32 weights of a row, in the type of the activations; stores of four.
template <int BITS, typename T, typename W>
METAL_FUNC void dequantize_32(threadgroup metal::vec<T, 4>* to, const device W* from, float scale,
                              float bias) {
  ushort halves[BITS == 0 ? 1 : 2 * BITS];
  if constexpr (BITS > 0) load_halves<BITS>(from, halves);
#pragma unroll
  for (uint i = 0; i < 32; i += 4) {
    metal::vec<T, 4> quad;
    metal::vec<W, 4> dense;
    if constexpr (BITS == 0) dense = *(const device metal::vec<W, 4>*)(from + i);
#pragma unroll
    for (uint e = 0; e < 4; e++) {
      if constexpr (BITS == 0) quad[e] = T(float(dense[e]));
      else quad[e] = T(metal::fma(unpack<BITS>(halves, i + e), scale, bias));
    }
    to[i / 4] = quad;
  }
}

// body
constexpr uint ROWS = 64, COLUMNS = 128, DEPTH = 32, STRIDE = DEPTH + 16 / sizeof(T);
constexpr uint OUT_COLUMNS = GATED ? COLUMNS / 2 : COLUMNS;
// As vectors, so that they are aligned.
threadgroup metal::vec<T, 4> x_quads[ROWS * STRIDE / 4];
threadgroup metal::vec<T, 4> w_quads[COLUMNS * STRIDE / 4];
threadgroup T* x_panel = (threadgroup T*)x_quads;
threadgroup T* w_panel = (threadgroup T*)w_quads;

const uint num_experts = w_shape[0], out_dims = w_shape[1], in_dims = x_shape[1];
const uint tile = threadgroup_position_in_grid.x;
uint expert = 0, above = num_experts;
while (expert < above) {
  const uint middle = (expert + above) / 2;
  if (uint(tile_ends[middle]) > tile) above = middle;
  else expert = middle + 1;
}
// The grid has room for the most tiles there can be.
if (expert == num_experts) return;
uint first = 0, first_tile = 0;
if (expert > 0) {
  first = row_ends[expert - 1];
  first_tile = tile_ends[expert - 1];
}
first += (tile - first_tile) * ROWS;
const uint rows = metal::min(ROWS, uint(row_ends[expert]) - first);
const uint num_blocks = (rows + 7) / 8;

const uint thread_index = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint column = threadgroup_position_in_grid.y * OUT_COLUMNS;

// Of x a thread brings 8 elements of two rows, of the weights a row of 32.
const uint x_row = thread_index / 4, x_column = thread_index % 4 * 8;
const device T* x_from[2];
#pragma unroll
for (uint half = 0; half < 2; half++) {
  size_t source = first + metal::min(x_row + half * 32, rows - 1);
  if (GATED) source = order[source] / PER_TOKEN;
  x_from[half] = x + source * in_dims + x_column;
}
const bool is_up = GATED && thread_index >= OUT_COLUMNS;
const uint w_row = column + thread_index % OUT_COLUMNS;
const bool has_w = w_row < out_dims;
const size_t w_place = size_t(expert) * out_dims + w_row;
auto w_from = (is_up ? up : w) + w_place * (BITS == 0 ? in_dims : in_dims / 32 * BITS);
auto scales_from = (is_up ? up_scales : scales) + w_place * (in_dims / GROUP);
auto biases_from = (is_up ? up_biases : biases) + w_place * (in_dims / GROUP);

Fragment sums[ROWS / 8][4];
#pragma unroll
for (uint i = 0; i < ROWS / 8; i++)
#pragma unroll
  for (uint n = 0; n < 4; n++) sums[i][n] = Fragment(0.0f);

for (uint d = 0; d < in_dims; d += DEPTH) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (uint half = 0; half < 2; half++) {
    const uint row = x_row + half * 32;
    if (row >= num_blocks * 8) continue;
    auto to = x_quads + (row * STRIDE + x_column) / 4;
    // Rows behind the last one are the last one again, and go nowhere.
    to[0] = *(const device metal::vec<T, 4>*)(x_from[half] + d);
    to[1] = *(const device metal::vec<T, 4>*)(x_from[half] + d + 4);
  }
  auto to = w_quads + thread_index * STRIDE / 4;
  if (has_w) {
    float scale = 0, bias = 0;
    if (BITS > 0) {
      scale = float(scales_from[d / GROUP]);
      bias = float(biases_from[d / GROUP]);
    }
    dequantize_32<BITS, T>(to, w_from + d / 32 * (BITS == 0 ? 32 : BITS), scale, bias);
  } else {
    for (uint i = 0; i < 8; i++) to[i] = metal::vec<T, 4>(T(0));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint e = 0; e < DEPTH; e += 8) {
    metal::simdgroup_matrix<T, 8, 8> left, right[4];
#pragma unroll
    for (uint n = 0; n < 4; n++) {
      const uint row = GATED ? n / 2 * 64 + simd * 16 + n % 2 * 8 : simd * 32 + n * 8;
      simdgroup_load(right[n], w_panel + row * STRIDE + e, STRIDE, ulong2(0), true);
    }
#pragma unroll
    for (uint i = 0; i < ROWS / 8; i++) {
      if (i >= num_blocks) continue;
      simdgroup_load(left, x_panel + i * 8 * STRIDE + e, STRIDE);
#pragma unroll
      for (uint n = 0; n < 4; n++)
        simdgroup_multiply_accumulate(sums[i][n], left, right[n], sums[i][n]);
    }
  }
}

#pragma unroll
for (uint i = 0; i < ROWS / 8; i++) {
  const uint row = i * 8 + fragment_row(lane);
  if (row >= rows) continue;
  size_t target = first + row;
  float score = 1;
  if (!GATED) {
    target = order[target];
    score = float(scores[target]);
  }
#pragma unroll
  for (uint n = 0; n < (GATED ? 2 : 4); n++) {
    const uint out_column = column + simd * (OUT_COLUMNS / 4) + n * 8 + fragment_column(lane);
    if (out_column >= out_dims) continue;
#pragma unroll
    for (uint e = 0; e < 2; e++) {
      const float sum = sums[i][n].thread_elements()[e];
      const float value =
          GATED ? silu(sum) * sums[i][n % 2 + 2].thread_elements()[e] : score * sum;
      out[target * out_dims + out_column + e] = T(value);
    }
  }
}
