// Attention of up to 8 new tokens over the keys and values of one block; decode_attention_combine
// puts the blocks together.
//
// q [B, HK * GROUP, num_tokens, D]; k, v [B, HK, length, D], views with any strides of heads and
// tokens; if PACKED, in bytes, four a word, with scales and biases of groups of 64. sums [B, HK, blocks, rows, D] and extremes [B, HK, blocks, rows, 2], the largest score
// and the sum of weights; row t * GROUP + h is query head h of token t. A threadgroup has ROWS of
// them and reads each key and value of its block once.

// A key of a fragment of k has eight dims in each of four lanes, so that a lane reads 16 bytes: the
// dims of fragment j of 32 are not neighbours. q has the same ones, in the same places.
METAL_FUNC int fragment_dim(uint place, int j) { return int(place / 2 * 8 + place % 2) + 2 * j; }

// Eight numbers of a row, x * group[0] + group[1] if they are packed; zeros behind the last row.
template <typename T> METAL_FUNC void load8_or_zeros(const device T* from, bool valid, float2,
                                                     thread float* x) {
  if (valid) load8(from, x);
  else
    for (int i = 0; i < 8; i++) x[i] = 0.0f;
}
METAL_FUNC void load8_or_zeros(const device uint32_t* from, bool valid, float2 group,
                               thread float* x) {
  metal::vec<ushort, 4> part = 0;
  if (valid) part = *(const device metal::vec<ushort, 4>*)from;
  const ushort halves[4] = {part[0], part[1], part[2], part[3]};
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = metal::fma(unpack<8>(halves, i), group[0], group[1]);
}

METAL_FUNC Fragment fragment_of(float a, float b) {
  Fragment f;
  f.thread_elements()[0] = a, f.thread_elements()[1] = b;
  return f;
}

// The rows of a threadgroup, and zeros behind the last one.
template <typename T, int GROUP> struct Queries {
  const device T* from;
  int64_t head_stride, token_stride, dim_stride;
  int first, count;

  METAL_FUNC T at(int row, int dim) const thread {
    if (row >= count) return T(0.0f);
    const int place = first + row;
    return from[place % GROUP * head_stride + place / GROUP * token_stride + dim * dim_stride];
  }
};

// body
constexpr int SIMDGROUPS = D / 32, TILE = 8 * SIMDGROUPS, ROW_FRAGMENTS = ROWS / 8;
constexpr int STRIDE = TILE + 4, GROUPS = PACKED ? D / 64 : 1, PER_ELEMENT = PACKED ? 4 : 1;
threadgroup float scores[ROWS * STRIDE];
threadgroup float factors[ROWS];
// Pairs of a fragment lie side by side.
threadgroup metal::vec<T, 2> q_pairs[STAGED ? ROWS * D / 2 : 1];
// Scale and bias of each group of a tile's values, which two simdgroups share.
threadgroup float2 value_groups[PACKED ? TILE * GROUPS : 1];

const int lane = int(thread_index_in_simdgroup), simdgroup = int(simdgroup_index_in_threadgroup);
const int own_row = int(fragment_row(lane)), own_column = int(fragment_column(lane));
const int num_tokens = q_shape[2], length = k_shape[2], num_rows = num_tokens * GROUP;
const int num_blocks = num_key_blocks(length), num_passes = (num_rows + ROWS - 1) / ROWS;
// The longest blocks first, so that none is left at the end; passes of a block side by side.
const int block = num_blocks - 1 - int(threadgroup_position_in_grid.y) / num_passes;
const int first_row = int(threadgroup_position_in_grid.y) % num_passes * ROWS;
const int rows = metal::min(ROWS, num_rows - first_row);
const int head = int(threadgroup_position_in_grid.z) % HK;
const int batch = int(threadgroup_position_in_grid.z) / HK;
const KeyBlock bounds = key_block(block);
const int start = bounds.first, end = metal::min(start + bounds.size, length);
auto keys = k + batch * k_strides[0] + head * k_strides[1] + own_column * 4 / PER_ELEMENT;
auto values = v + batch * v_strides[0] + head * v_strides[1] +
              (simdgroup * 32 + own_column * 4) / PER_ELEMENT;
auto key_scales = k_scales + batch * k_scales_strides[0] + head * k_scales_strides[1];
auto key_biases = k_biases + batch * k_biases_strides[0] + head * k_biases_strides[1];
auto value_scales = v_scales + batch * v_scales_strides[0] + head * v_scales_strides[1];
auto value_biases = v_biases + batch * v_biases_strides[0] + head * v_biases_strides[1];
const Queries<T, GROUP> queries = {q + batch * q_strides[0] + head * GROUP * q_strides[1],
                                   q_strides[1], q_strides[2], q_strides[3], first_row, rows};

if (STAGED) {
  for (int i = simdgroup; i < D / 8 * ROW_FRAGMENTS; i += SIMDGROUPS) {
    const int j = i / ROW_FRAGMENTS, row = i % ROW_FRAGMENTS * 8 + own_column;
    const int dim = j / 4 * 32 + fragment_dim(own_row, j % 4);
    q_pairs[i * 32 + lane] = metal::vec<T, 2>(queries.at(row, dim), queries.at(row + 1, dim));
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Of rows simdgroup, simdgroup + SIMDGROUPS, ..., the same in all lanes.
constexpr int OWN_ROWS = (ROWS + SIMDGROUPS - 1) / SIMDGROUPS;
float largest[OWN_ROWS], totals[OWN_ROWS];
for (int i = 0; i < OWN_ROWS; i++) largest[i] = least_score(), totals[i] = 0.0f;

Fragment o[ROW_FRAGMENTS][4];
#pragma unroll
for (int r = 0; r < ROW_FRAGMENTS; r++)
#pragma unroll
  for (int c = 0; c < 4; c++) o[r][c] = Fragment(0.0f);

for (int tile = start; tile < end; tile += TILE) {
  // Scores of eight keys a simdgroup, transposed.
  Fragment s[ROW_FRAGMENTS];
#pragma unroll
  for (int r = 0; r < ROW_FRAGMENTS; r++) s[r] = Fragment(0.0f);
  const int key = tile + simdgroup * 8 + own_row;
  float2 group = 0.0f;
#pragma unroll
  for (int part = 0; part < D; part += 32) {
    if (PACKED && part % 64 == 0 && key < end)
      group = float2(float(key_scales[key * k_scales_strides[2] + part / 64]),
                     float(key_biases[key * k_biases_strides[2] + part / 64]));
    float x[8];
    load8_or_zeros(keys + key * k_strides[2] + part / PER_ELEMENT, key < end, group, x);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const Fragment k_fragment = fragment_of(x[2 * j], x[2 * j + 1]);
#pragma unroll
      for (int r = 0; r < ROW_FRAGMENTS; r++) {
        Fragment q_fragment;
        if (STAGED) {
          const auto pair = q_pairs[((part / 8 + j) * ROW_FRAGMENTS + r) * 32 + lane];
          q_fragment = fragment_of(float(pair[0]), float(pair[1]));
        } else {
          const int row = r * 8 + own_column, dim = part + fragment_dim(own_row, j);
          q_fragment = fragment_of(float(queries.at(row, dim)), float(queries.at(row + 1, dim)));
        }
        simdgroup_multiply_accumulate(s[r], k_fragment, q_fragment, s[r]);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int r = 0; r < ROW_FRAGMENTS; r++) {
    const int at = (r * 8 + own_column) * STRIDE + simdgroup * 8 + own_row;
    scores[at] = s[r].thread_elements()[0] * scale;
    scores[at + STRIDE] = s[r].thread_elements()[1] * scale;
  }
  const int own_group = int(thread_index_in_threadgroup), group_key = tile + own_group / GROUPS;
  if (PACKED && own_group < TILE * GROUPS && group_key < end)
    value_groups[own_group] =
        float2(float(value_scales[group_key * v_scales_strides[2] + own_group % GROUPS]),
               float(value_biases[group_key * v_biases_strides[2] + own_group % GROUPS]));
  threadgroup_barrier(mem_flags::mem_threadgroup);

#pragma unroll
  for (int n = 0; n < OWN_ROWS; n++) {
    const int row = simdgroup + n * SIMDGROUPS;
    if (row >= ROWS) continue;
    // A token sees itself and what is before it.
    const int visible =
        metal::min(end, length - num_tokens + (first_row + row) / GROUP + 1) - tile;
    threadgroup float* weights = scores + row * STRIDE;
    const float before = largest[n];
    float most = before, sum = 0.0f;
    for (int i = lane; i < metal::min(TILE, visible); i += 32) most = metal::max(most, weights[i]);
    most = simd_max(most);
    for (int i = lane; i < TILE; i += 32) {
      const float weight = i < visible ? metal::precise::exp(weights[i] - most) : 0.0f;
      weights[i] = weight, sum += weight;
    }
    const float factor = metal::precise::exp(before - most);
    largest[n] = most, totals[n] = metal::fma(totals[n], factor, simd_sum(sum));
    if (lane == 0) factors[row] = factor;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 32 dims a simdgroup.
#pragma unroll
  for (int r = 0; r < ROW_FRAGMENTS; r++) {
    const float factor = factors[r * 8 + own_row];
#pragma unroll
    for (int c = 0; c < 4; c++)
      o[r][c] = fragment_of(o[r][c].thread_elements()[0] * factor,
                            o[r][c].thread_elements()[1] * factor);
  }
#pragma unroll
  for (int part = 0; part < TILE; part += 8) {
    const int key = tile + part + own_row;
    float2 group = 0.0f;
    if (PACKED && key < end) group = value_groups[(part + own_row) * GROUPS + simdgroup / 2];
    float x[8];
    load8_or_zeros(values + key * v_strides[2], key < end, group, x);
#pragma unroll
    for (int r = 0; r < ROW_FRAGMENTS; r++) {
      const int at = (r * 8 + own_row) * STRIDE + part + own_column;
      const Fragment weights = fragment_of(scores[at], scores[at + 1]);
#pragma unroll
      for (int c = 0; c < 4; c++)
        simdgroup_multiply_accumulate(o[r][c], weights, fragment_of(x[2 * c], x[2 * c + 1]),
                                      o[r][c]);
    }
  }
}

const size_t place = (size_t(batch * HK + head) * num_blocks + block) * num_rows + first_row;
#pragma unroll
for (int r = 0; r < ROW_FRAGMENTS; r++) {
  const int row = r * 8 + own_row;
  if (row >= rows) continue;
  device float* to = sums + (place + row) * D + simdgroup * 32 + own_column * 4;
  float x[8];
#pragma unroll
  for (int c = 0; c < 4; c++)
    x[2 * c] = o[r][c].thread_elements()[0], x[2 * c + 1] = o[r][c].thread_elements()[1];
  store_lane<4>(to, x), store_lane<4>(to + 4, x + 4);
}
for (int n = 0; n < OWN_ROWS; n++) {
  const int row = simdgroup + n * SIMDGROUPS;
  if (row >= rows || lane > 0) continue;
  extremes[(place + row) * 2] = largest[n];
  extremes[(place + row) * 2 + 1] = totals[n];
}
