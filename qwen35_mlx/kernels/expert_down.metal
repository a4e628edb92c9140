// residual + shared expert + weighted sum of the routed ones: a simdgroup makes ROWS values for all
// TOKENS and adds over the lanes once, at the end.
// body
constexpr int step = 32 / LANES;
const int lane = int(thread_index_in_simdgroup);
const int block = int(threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup);
const int row = block * ROWS * step + lane / LANES;
const int width = residual_shape[1], last = width - 1 - row;
if (row - lane / LANES >= width) return;
float acc[ROWS * TOKENS] = {};

// The shared expert for all tokens at once; alone, of weight one.
float factor[TOKENS];
for (int t = 0; t < TOKENS; t++) factor[t] = K > 0 ? float(shared_scores[t]) : 1.0f;
dot_rows<shared_BITS, shared_GROUP, ROWS, TOKENS, LANES, false>(
    shared_w, shared_scales, shared_biases, shared_in, shared_in, shared_in_shape[1],
    size_t(row), last, lane, factor, acc, acc);
const int in = routed_in_shape[routed_in_ndim - 1];
#pragma unroll
for (int t = 0; t < TOKENS; t++) {
  float part[ROWS] = {};
  for (int pair = t * K; pair < (t + 1) * K; pair++) {
    const float score[1] = {float(scores[pair])};
    dot_rows<down_BITS, down_GROUP, ROWS, 1, LANES, false>(
        down_w, down_scales, down_biases, routed_in + pair * in, routed_in, in,
        size_t(indices[pair]) * width + row, last, lane, score, part, part);
  }
  for (int r = 0; r < ROWS; r++) acc[r * TOKENS + t] += part[r];
}
#pragma unroll
for (int i = 0; i < ROWS * TOKENS; i++) {
  const float sum = lane_sum<LANES>(acc[i]);
  const int r = row + (i / TOKENS) * step, at = (i % TOKENS) * width + r;
  if (lane % LANES == 0 && r < width) y[at] = T(float(residual[at]) + sum);
}
