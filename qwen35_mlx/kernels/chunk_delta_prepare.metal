// What the chunks of the delta rule need and the state does not change, for all chunks at once:
// the cumulated log decay, the inverse of the unit lower triangular system, the causal scores.
//
// q, k [B, T, HK, DK]; g, beta [B, T, HV]. cumulative [B, HV, N, 64, 2]; inverse and scores
// [B, HV, N, 36, 64]: the 8x8 blocks of the lower triangle as the lanes of a simdgroup hold them.
// A threadgroup of four simdgroups a chunk, value head and sequence.

// a + b as a sum and what its rounding lost: differences of long sums keep their digits.
METAL_FUNC float2 exact_sum(float2 a, float2 b) {
  const float sum = a.x + b.x, part = sum - a.x;
  return float2(sum, (a.x - (sum - part)) + (b.x - part) + (a.y + b.y));
}

// body
constexpr uint C = 64, BLOCKS = 8, THREADS = 128;
constexpr uint PANEL = DK % 32 == 0 ? 32 : DK % 16 == 0 ? 16 : 8, STRIDE = PANEL + 4;
constexpr uint SYSTEM_STRIDE = C + 4;
constexpr uint SHARED = 2 * C * STRIDE > C * SYSTEM_STRIDE ? 2 * C * STRIDE : C * SYSTEM_STRIDE;
// As vectors, so that they are aligned.
threadgroup float4 shared_quads[SHARED / 4];
threadgroup float* shared = (threadgroup float*)shared_quads;
threadgroup float2 decays[C];
threadgroup float strengths[C];

const uint thread_index = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint chunk = threadgroup_position_in_grid.x, head = threadgroup_position_in_grid.y;
const uint batch = threadgroup_position_in_grid.z;
const uint num_tokens = q_shape[1], num_chunks = threadgroups_per_grid.x;
const uint start = chunk * C, rows = metal::min(C, num_tokens - start);
const uint num_blocks = (rows + 7) / 8;
const size_t place = (size_t(batch) * HV + head) * num_chunks + chunk;

if (simd == 0) {
  float2 total = 0;
  for (uint t = lane; t < C; t += 32) {
    float2 own = 0;
    if (t < rows) own.x = float(g[(size_t(batch) * num_tokens + start + t) * HV + head]);
    for (ushort step = 1; step < 32; step *= 2) {
      float2 before;
      before.x = metal::simd_shuffle_up(own.x, step);
      before.y = metal::simd_shuffle_up(own.y, step);
      if (lane >= step) own = exact_sum(before, own);
    }
    own = exact_sum(total, own);
    decays[t] = own;
    ((device float2*)cumulative)[place * C + t] = own;
    total.x = metal::simd_broadcast(own.x, ushort(31));
    total.y = metal::simd_broadcast(own.y, ushort(31));
  }
} else if (simd < 3) {
  uint t = thread_index - 32;
  strengths[t] =
      t < rows ? float(beta[(size_t(batch) * num_tokens + start + t) * HV + head]) : 0.0f;
}

// Simdgroup s owns block rows s and 7 - s of k k^T and q k^T: nine blocks of the triangle each.
Fragment keys[12], queries[12];
#pragma unroll
for (uint n = 0; n < 12; n++) keys[n] = queries[n] = Fragment(0.0f);
const uint low = simd, high = 7 - simd;
threadgroup float* k_panel = shared;
threadgroup float* q_panel = shared + C * STRIDE;
const size_t first = ((size_t(batch) * num_tokens + start) * HK + head / (HV / HK)) * DK;
for (uint d = 0; d < DK; d += PANEL) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  stage<PANEL, STRIDE>(k_panel, k + first + d, HK * DK, rows, C, thread_index, THREADS);
  stage<PANEL, STRIDE>(q_panel, q + first + d, HK * DK, rows, C, thread_index, THREADS);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint e = 0; e < PANEL; e += 8) {
    Fragment k_low, k_high, q_low, q_high, across;
    simdgroup_load(k_low, k_panel + low * 8 * STRIDE + e, STRIDE);
    simdgroup_load(k_high, k_panel + high * 8 * STRIDE + e, STRIDE);
    simdgroup_load(q_low, q_panel + low * 8 * STRIDE + e, STRIDE);
    simdgroup_load(q_high, q_panel + high * 8 * STRIDE + e, STRIDE);
#pragma unroll
    for (uint c = 0; c < BLOCKS; c++) {
      if (c > high || c >= num_blocks) continue;
      simdgroup_load(across, k_panel + c * 8 * STRIDE + e, STRIDE, ulong2(0), true);
      if (high < num_blocks) {
        simdgroup_multiply_accumulate(keys[4 + c], k_high, across, keys[4 + c]);
        simdgroup_multiply_accumulate(queries[4 + c], q_high, across, queries[4 + c]);
      }
      if (c < 4 && c <= low) {
        simdgroup_multiply_accumulate(keys[c % 4], k_low, across, keys[c % 4]);
        simdgroup_multiply_accumulate(queries[c % 4], q_low, across, queries[c % 4]);
      }
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// The system's lower part, negated, takes the place of the panels.
threadgroup float* system = shared;
#pragma unroll
for (uint n = 0; n < 12; n++) {
  const uint r = n < 4 ? low : high, c = n < 4 ? n : n - 4;
  if (c > r) continue;
  const uint i = r * 8 + fragment_row(lane);
  float2 score;
#pragma unroll
  for (uint e = 0; e < 2; e++) {
    const uint j = c * 8 + fragment_column(lane) + e;
    // Above the diagonal the difference is positive: exp would overflow.
    const float2 since = decays[i] - decays[j];
    const float decay = i >= j ? metal::precise::exp(since.x + since.y) : 0.0f;
    score[e] = decay * queries[n].thread_elements()[e];
    system[i * SYSTEM_STRIDE + j] =
        i > j ? -strengths[i] * decay * keys[n].thread_elements()[e] : 0.0f;
  }
  *(device float2*)(scores + (place * 36 + triangle(r, c)) * 64 + lane * 2) = score;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Inverses of the diagonal blocks by substitution, a thread a column.
threadgroup float* diagonal = system + thread_index / 8 * 8 * (SYSTEM_STRIDE + 1);
float solution[8];
if (thread_index < C) {
#pragma unroll
  for (uint i = 0; i < 8; i++) {
    float sum = i == thread_index % 8 ? 1.0f : 0.0f;
#pragma unroll
    for (uint j = 0; j < i; j++) sum += diagonal[i * SYSTEM_STRIDE + j] * solution[j];
    solution[i] = sum;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (thread_index < C) {
#pragma unroll
  for (uint i = 0; i < 8; i++) diagonal[i * SYSTEM_STRIDE + thread_index % 8] = solution[i];
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Block substitution; a column of blocks needs no other. Simdgroup s owns columns s and 7 - s.
for (uint turn = 0; turn < 2; turn++) {
  const uint column = turn == 0 ? low : high;
  Fragment x[BLOCKS];
#pragma unroll
  for (uint i = 0; i < BLOCKS; i++) {
    x[i] = Fragment(0.0f);
    if (i < column) continue;
    if (i < num_blocks) {
      Fragment factor, sum = Fragment(0.0f);
#pragma unroll
      for (uint j = 0; j < i; j++) {
        if (j < column) continue;
        simdgroup_load(factor, system + i * 8 * SYSTEM_STRIDE + j * 8, SYSTEM_STRIDE);
        simdgroup_multiply_accumulate(sum, factor, x[j], sum);
      }
      simdgroup_load(factor, system + i * 8 * (SYSTEM_STRIDE + 1), SYSTEM_STRIDE);
      if (i == column) x[i] = factor;
      else simdgroup_multiply(x[i], factor, sum);
    }
    float2 pair = float2(x[i].thread_elements()[0], x[i].thread_elements()[1]);
    *(device float2*)(inverse + (place * 36 + triangle(i, column)) * 64 + lane * 2) = pair;
  }
}
