// residual + shared expert + weighted sum of the routed ones: a simdgroup makes ROWS values for all
// tokens and adds over the lanes once, at the end.
// body
constexpr int step = 32 / LANES;
const int lane = int(thread_index_in_simdgroup);
const int block = int(threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup);
const int row = block * ROWS * step + lane / LANES;
const int num_tokens = residual_shape[0], width = residual_shape[1];
if (row - lane / LANES >= width) return;

// The shared expert for all tokens at once; alone, of weight one.
NoRows none;
float unused[TOKENS];
auto shared = rows_from<shared_BITS, shared_GROUP, ROWS, TOKENS, CONVERT>(
    shared_w, shared_scales, shared_biases, shared_in_shape[1], size_t(row), step, width - 1 - row);
multiply_rows<TOKENS, LANES, false>(shared, none, shared_in, shared_in, shared_in_shape[1],
                                    num_tokens, lane, unused);
const int in = routed_in_shape[routed_in_ndim - 1];
for (int token = 0; token < num_tokens; token++) {
  float sums[ROWS] = {};
  for (int pair = token * K; pair < (token + 1) * K; pair++) {
    auto rows = rows_from<down_BITS, down_GROUP, ROWS, 1, CONVERT>(
        down_w, down_scales, down_biases, in, size_t(indices[pair]) * width + row, step,
        width - 1 - row);
    multiply_rows<1, LANES, false>(rows, none, routed_in + pair * in, routed_in, in, 1, lane,
                                   unused);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      sums[r] = metal::fma(float(scores[pair]), rows.sums[r][0], sums[r]);
  }
  const float weight = K > 0 ? float(shared_scores[token]) : 1.0f;
  // The index of a register has to be a constant.
#pragma unroll
  for (int t = 0; t < TOKENS; t++)
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      if (t == token) shared.sums[r][t] = metal::fma(weight, shared.sums[r][t], sums[r]);
}
#pragma unroll
for (int t = 0; t < TOKENS; t++) {
  if (!has_token<TOKENS>(t, num_tokens)) continue;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float sum = lane_sum<LANES>(shared.sums[r][t]);
    const int to = row + r * step, at = t * width + to;
    if (lane % LANES == 0 && to < width) y[at] = T(float(residual[at]) + sum);
  }
}
