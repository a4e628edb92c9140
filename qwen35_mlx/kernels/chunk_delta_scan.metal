// The delta rule from chunk to chunk: T / 64 steps, eight columns of Dv a simdgroup.
//
// q, k [B, T, HK, DK]; v [B, T, HV, DV]; beta [B, T, HV]; cumulative, inverse and scores as
// chunk_delta_prepare writes them; state [B, HV, DV, DK]. out [B, T, HV, DV] and new_state, fp32.
// The state stays in registers, transposed. A threadgroup (columns of Dv, value head, sequence).

METAL_FUNC Fragment packed_block(const device float* blocks, uint row, uint column, uint lane) {
  Fragment block;
  float2 pair = *(const device float2*)(blocks + triangle(row, column) * 64 + lane * 2);
  block.thread_elements()[0] = pair.x;
  block.thread_elements()[1] = pair.y;
  return block;
}

// body
constexpr uint C = 64, BLOCKS = 8, THREADS = 32 * SIMDGROUPS;
constexpr uint PANEL = DK % 32 == 0 ? 32 : DK % 16 == 0 ? 16 : 8, STRIDE = PANEL + 4;
// As vectors, so that they are aligned.
threadgroup float4 k_quads[C * STRIDE / 4];
threadgroup float4 q_quads[C * STRIDE / 4];
threadgroup float2 decays[C];
threadgroup float strengths[C];
threadgroup float* k_panel = (threadgroup float*)k_quads;
threadgroup float* q_panel = (threadgroup float*)q_quads;

const uint thread_index = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
const uint head = threadgroup_position_in_grid.y, batch = threadgroup_position_in_grid.z;
const uint column =
    (threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup) * 8;
const uint own_row = fragment_row(lane), own_column = column + fragment_column(lane);
const uint num_tokens = q_shape[1], num_chunks = (num_tokens + C - 1) / C;
const size_t head_place = size_t(batch) * HV + head;
const size_t state_place = (head_place * DV + column) * DK;

Fragment s[DK / 8];
#pragma unroll
for (uint d = 0; d < DK / 8; d++)
  simdgroup_load(s[d], state + state_place + d * 8, DK, ulong2(0), true);

for (uint chunk = 0; chunk < num_chunks; chunk++) {
  const uint start = chunk * C, rows = metal::min(C, num_tokens - start);
  const uint num_blocks = (rows + 7) / 8;
  const size_t place = head_place * num_chunks + chunk;
  const size_t first_token = size_t(batch) * num_tokens + start;
  const size_t first = (first_token * HK + head / (HV / HK)) * DK;
  // Several panels have barriers between the last chunk's decays and these.
  if (DK == PANEL) threadgroup_barrier(mem_flags::mem_threadgroup);
  // Rows behind the last token are zero: no update.
  for (uint t = thread_index; t < C; t += THREADS) {
    decays[t] = ((const device float2*)cumulative)[place * C + t];
    strengths[t] = t < rows ? float(beta[(first_token + t) * HV + head]) : 0.0f;
  }

  Fragment update[BLOCKS], o[BLOCKS];
#pragma unroll
  for (uint i = 0; i < BLOCKS; i++) update[i] = o[i] = Fragment(0.0f);
#pragma unroll
  for (uint p = 0; p < DK / PANEL; p++) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<PANEL, STRIDE>(k_panel, k + first + p * PANEL, HK * DK, rows, num_blocks * 8,
                         thread_index, THREADS);
    stage<PANEL, STRIDE>(q_panel, q + first + p * PANEL, HK * DK, rows, num_blocks * 8,
                         thread_index, THREADS);
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (uint e = 0; e < PANEL / 8; e++) {
#pragma unroll
      for (uint i = 0; i < BLOCKS; i++) {
        if (i >= num_blocks) continue;
        Fragment left;
        simdgroup_load(left, k_panel + i * 8 * STRIDE + e * 8, STRIDE);
        simdgroup_multiply_accumulate(update[i], left, s[p * (PANEL / 8) + e], update[i]);
        simdgroup_load(left, q_panel + i * 8 * STRIDE + e * 8, STRIDE);
        simdgroup_multiply_accumulate(o[i], left, s[p * (PANEL / 8) + e], o[i]);
      }
    }
  }

  // What the state already gives at each key is not learnt again.
#pragma unroll
  for (uint i = 0; i < BLOCKS; i++) {
    const uint t = i * 8 + own_row;
    const float from_start = metal::precise::exp(decays[t].x);
#pragma unroll
    for (uint e = 0; e < 2; e++) {
      float value = t < rows ? float(v[((first_token + t) * HV + head) * DV + own_column + e]) : 0;
      const float known = from_start * update[i].thread_elements()[e];
      update[i].thread_elements()[e] = strengths[t] * (value - known);
      o[i].thread_elements()[e] *= from_start;
    }
  }

  // From the last row of blocks up, each can be replaced in place: those above are still wanted.
  const device float* inverse_blocks = inverse + place * 36 * 64;
  const device float* score_blocks = scores + place * 36 * 64;
#pragma unroll
  for (uint n = 0; n < BLOCKS; n++) {
    const uint i = BLOCKS - 1 - n;
    if (i >= num_blocks) continue;
    Fragment sum = Fragment(0.0f);
#pragma unroll
    for (uint j = 0; j <= i; j++) {
      Fragment left = packed_block(inverse_blocks, i, j, lane);
      simdgroup_multiply_accumulate(sum, left, update[j], sum);
    }
    update[i] = sum;
  }
  const float2 total = decays[C - 1];
#pragma unroll
  for (uint i = 0; i < BLOCKS; i++) {
    if (i >= num_blocks) continue;
#pragma unroll
    for (uint j = 0; j <= i; j++) {
      Fragment left = packed_block(score_blocks, i, j, lane);
      simdgroup_multiply_accumulate(o[i], left, update[j], o[i]);
    }
    const uint t = i * 8 + own_row;
    if (t < rows) {
      float2 pair = float2(o[i].thread_elements()[0], o[i].thread_elements()[1]);
      *(device float2*)(out + ((first_token + t) * HV + head) * DV + own_column) = pair;
    }
  }

  const float keep = metal::precise::exp(total.x);
#pragma unroll
  for (uint d = 0; d < DK / 8; d++) {
    s[d].thread_elements()[0] *= keep;
    s[d].thread_elements()[1] *= keep;
  }
#pragma unroll
  for (uint i = 0; i < BLOCKS; i++) {
    const float2 since = total - decays[i * 8 + own_row];
    const float to_end = metal::precise::exp(since.x + since.y);
    update[i].thread_elements()[0] *= to_end;
    update[i].thread_elements()[1] *= to_end;
  }
#pragma unroll
  for (uint n = 0; n < DK / PANEL; n++) {
    // Backwards: the last panel is still there.
    const uint p = DK / PANEL - 1 - n;
    if (n > 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      stage<PANEL, STRIDE>(k_panel, k + first + p * PANEL, HK * DK, rows, num_blocks * 8,
                           thread_index, THREADS);
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
#pragma unroll
    for (uint e = 0; e < PANEL / 8; e++) {
#pragma unroll
      for (uint i = 0; i < BLOCKS; i++) {
        if (i >= num_blocks) continue;
        Fragment left;
        simdgroup_load(left, k_panel + i * 8 * STRIDE + e * 8, STRIDE, ulong2(0), true);
        simdgroup_multiply_accumulate(s[p * (PANEL / 8) + e], left, update[i],
                                      s[p * (PANEL / 8) + e]);
      }
    }
  }
}
#pragma unroll
for (uint d = 0; d < DK / 8; d++)
  simdgroup_store(s[d], new_state + state_place + d * 8, DK, ulong2(0), true);
