// total = x + delta, and its RMS norm; one threadgroup a row.
// body
constexpr int THREADS = 32 * SIMDGROUPS;
threadgroup float squares[SIMDGROUPS];
const int width = x_shape[1];
const int thread_index = int(thread_index_in_threadgroup);
const size_t at = size_t(threadgroup_position_in_grid.y) * width;
float sum = 0.0f;
for (int i = thread_index; i < width; i += THREADS) {
  const T value = T(float(x[at + i]) + float(delta[at + i]));
  total[at + i] = value;
  sum = metal::fma(float(value), float(value), sum);
}
sum = simd_sum(sum);
if (thread_index_in_simdgroup == 0) squares[simdgroup_index_in_threadgroup] = sum;
threadgroup_barrier(mem_flags::mem_threadgroup);
sum = 0.0f;
for (int i = 0; i < SIMDGROUPS; i++) sum += squares[i];
const float scale = metal::precise::rsqrt(sum / float(width) + eps);
for (int i = thread_index; i < width; i += THREADS) {
  const T value = T(float(x[at + i]) + float(delta[at + i]));
  normed[at + i] = T(float(value) * scale * float(weight[i]));
}
