// silu(gate(x)) * up(x). A simdgroup makes ROWS values of a routed expert for its token, or of the
// shared expert for all tokens; LANES lanes share a row.

template <int GATE_BITS, int GATE_GROUP, int UP_BITS, int UP_GROUP, int ROWS, int TOKENS, int LANES,
          bool NORM, bool CONVERT, typename GW, typename GS, typename UW, typename US, typename X,
          typename N, typename Y>
METAL_FUNC void swiglu(const device GW* gate_w, const device GS* gate_scales,
                       const device GS* gate_biases, const device UW* up_w,
                       const device US* up_scales, const device US* up_biases, const device X* x,
                       const device N* norm_weight, float eps, device Y* y, int in, int out, int num_tokens, int expert, int block,
                       int lane) {
  constexpr int step = 32 / LANES;
  const int first = block * ROWS * step;
  if (first >= out) return;
  const int row = first + lane / LANES;
  const size_t at = size_t(expert) * out + row;
  auto gate = rows_from<GATE_BITS, GATE_GROUP, ROWS, TOKENS, CONVERT>(
      gate_w, gate_scales, gate_biases, in, at, step, out - 1 - row);
  auto up = rows_from<UP_BITS, UP_GROUP, ROWS, TOKENS, CONVERT>(up_w, up_scales, up_biases, in, at,
                                                                step, out - 1 - row);
  float squares[TOKENS] = {};
  multiply_rows<TOKENS, LANES, NORM>(gate, up, x, norm_weight, in, num_tokens, lane, squares);
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    if (!has_token<TOKENS>(t, num_tokens)) continue;
    const float factor = NORM ? norm_factor<LANES>(squares[t], in, eps) : 1.0f;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float g = lane_sum<LANES>(gate.sums[r][t]) * factor;
      const float u = lane_sum<LANES>(up.sums[r][t]) * factor;
      const int to = row + r * step;
      if (lane % LANES == 0 && to < out) y[t * out + to] = Y(silu(g) * u);
    }
  }
}
// body
const int pair = int(threadgroup_position_in_grid.y);
const int num_tokens = x_shape[0], in = x_shape[1];
const int lane = int(thread_index_in_simdgroup);
const int block = int(threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup);
// The shared expert, which takes longest, comes first; the routed ones are generated if there are.
if (pair == 0) {
  swiglu<shared_gate_BITS, shared_gate_GROUP, shared_up_BITS, shared_up_GROUP, ROWS, TOKENS, LANES,
         NORM, CONVERT>(shared_gate_w, shared_gate_scales, shared_gate_biases, shared_up_w,
                  shared_up_scales, shared_up_biases, x, norm_weight, eps, shared_out, in, shared_gate_w_shape[0],
                  num_tokens, 0, block, lane);
  return;
}
