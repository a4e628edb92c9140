// One vector or few, times several matrices: each simdgroup makes ROWS rows of one matrix for all
// TOKENS, each row by LANES lanes. A chunk of weights is read once, as a whole, by one lane. If
// NORM, x is not normalised yet.

template <int BITS, int GROUP, int ROWS, int TOKENS, int LANES, bool NORM, typename W, typename S,
          typename X, typename N, typename Y>
METAL_FUNC void project(const device W* w, const device S* scales, const device S* biases,
                        const device X* x, const device N* norm_weight, float eps, device Y* y,
                        int in, int out, int first, int lane) {
  if (first >= out) return;
  constexpr int step = 32 / LANES;
  float acc[ROWS * TOKENS] = {};
  float factor[TOKENS], squares[TOKENS] = {};
  for (int t = 0; t < TOKENS; t++) factor[t] = 1.0f;
  const int row = first + lane / LANES;
  dot_rows<BITS, GROUP, ROWS, TOKENS, LANES, NORM>(w, scales, biases, x, norm_weight, in,
                                                   size_t(row), out - 1 - row, lane, factor, acc,
                                                   squares);
  // The lanes of a row have seen all of x, so the scale of its norm comes with the products.
  if (NORM)
    for (int t = 0; t < TOKENS; t++)
      factor[t] = metal::precise::rsqrt(lane_sum<LANES>(squares[t]) / float(in) + eps);
#pragma unroll
  for (int i = 0; i < ROWS * TOKENS; i++) {
    const float sum = lane_sum<LANES>(acc[i]) * factor[i % TOKENS];
    const int r = row + (i / TOKENS) * step;
    if (lane % LANES == 0 && r < out) y[(i % TOKENS) * out + r] = Y(sum);
  }
}
// body
// What follows is generated: the matrices one after the other, each in whole threadgroups.
constexpr int rows_per_simdgroup = ROWS * (32 / LANES);
constexpr int rows_per_group = SIMDGROUPS * rows_per_simdgroup;
int block = int(threadgroup_position_in_grid.x);
const int in = x_shape[1];
const int offset = int(simdgroup_index_in_threadgroup) * rows_per_simdgroup;
const int lane = int(thread_index_in_simdgroup);
