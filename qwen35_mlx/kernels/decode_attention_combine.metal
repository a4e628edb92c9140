// The softmax over all blocks of decode_attention, which left sums and extremes; a threadgroup has
// one query head of one token. Only blocks that the token sees count, so the order of sums depends
// on nothing but their number.
// body
threadgroup float parts[SIMDGROUPS][D], part_totals[SIMDGROUPS], part_largest[SIMDGROUPS];
const int lane = int(thread_index_in_simdgroup), simdgroup = int(simdgroup_index_in_threadgroup);
const int row = int(threadgroup_position_in_grid.y), num_rows = sums_shape[3];
const int num_tokens = num_rows / GROUP, token = row / GROUP, num_blocks = sums_shape[2];
const int seen = num_key_blocks(length - num_tokens + token + 1);
const int head = int(threadgroup_position_in_grid.z);
const size_t first = size_t(head) * num_blocks * num_rows + row;

float most = least_score();
for (int i = int(thread_index_in_threadgroup); i < seen; i += 32 * SIMDGROUPS)
  most = metal::max(most, extremes[(first + size_t(i) * num_rows) * 2]);
most = simd_max(most);
if (lane == 0) part_largest[simdgroup] = most;
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = 0; i < SIMDGROUPS; i++) most = metal::max(most, part_largest[i]);

float total = 0.0f, o[D / 32] = {};
for (int i = simdgroup; i < seen; i += SIMDGROUPS) {
  const size_t place = first + size_t(i) * num_rows;
  const float weight = metal::precise::exp(extremes[place * 2] - most);
  total = metal::fma(weight, extremes[place * 2 + 1], total);
#pragma unroll
  for (int d = 0; d < D / 32; d++)
    o[d] = metal::fma(weight, sums[place * D + lane + d * 32], o[d]);
}
#pragma unroll
for (int d = 0; d < D / 32; d++) parts[simdgroup][lane + d * 32] = o[d];
if (lane == 0) part_totals[simdgroup] = total;
threadgroup_barrier(mem_flags::mem_threadgroup);

const int batch = head / HK, query_head = head % HK * GROUP + row % GROUP;
const size_t to = ((size_t(batch) * HK * GROUP + query_head) * num_tokens + token) * D;
for (int d = int(thread_index_in_threadgroup); d < D; d += 32 * SIMDGROUPS) {
  float sum = parts[0][d], divisor = part_totals[0];
  for (int i = 1; i < SIMDGROUPS; i++) sum += parts[i][d], divisor += part_totals[i];
  out[to + d] = T(sum / divisor);
}
