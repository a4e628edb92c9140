// One vector or few, times several matrices: each simdgroup makes ROWS rows of one matrix for all
// rows of x, each row by LANES lanes. A chunk of weights is read once, as a whole, by one lane. If
// NORM, x is not normalised yet; if RESIDUAL, the product is added to it.

template <int BITS, int GROUP, int ROWS, int TOKENS, int LANES, bool NORM, bool RESIDUAL,
          bool CONVERT, typename W, typename S, typename X, typename N, typename R, typename Y>
METAL_FUNC void project(const device W* w, const device S* scales, const device S* biases,
                        const device X* x, const device N* norm_weight, float eps,
                        const device R* residual, device Y* y, int in, int out, int num_tokens,
                        int first, int lane) {
  if (first >= out) return;
  const int row = first + lane / LANES;
  auto rows = rows_from<BITS, GROUP, ROWS, TOKENS, CONVERT>(w, scales, biases, in, size_t(row),
                                                            32 / LANES, out - 1 - row);
  NoRows none;
  float squares[TOKENS] = {};
  multiply_rows<TOKENS, LANES, NORM>(rows, none, x, norm_weight, in, num_tokens, lane, squares);
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    if (!has_token<TOKENS>(t, num_tokens)) continue;
    const float factor = NORM ? norm_factor<LANES>(squares[t], in, eps) : 1.0f;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float sum = lane_sum<LANES>(rows.sums[r][t]);
      const int to = row + r * (32 / LANES), at = t * out + to;
      if (lane % LANES != 0 || to >= out) continue;
      y[at] = Y(RESIDUAL ? metal::fma(sum, factor, float(residual[at])) : sum * factor);
    }
  }
}
// body
// What follows is generated: the matrices one after the other, each in whole threadgroups.
constexpr int rows_per_simdgroup = ROWS * (32 / LANES);
constexpr int rows_per_group = SIMDGROUPS * rows_per_simdgroup;
int block = int(threadgroup_position_in_grid.x);
const int num_tokens = x_shape[0], in = x_shape[1];
const int offset = int(simdgroup_index_in_threadgroup) * rows_per_simdgroup;
const int lane = int(thread_index_in_simdgroup);
