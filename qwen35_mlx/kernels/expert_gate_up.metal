// silu(gate(x)) * up(x). A simdgroup makes ROWS values of a routed expert for its token, or of the
// shared expert for all TOKENS; LANES lanes share a row.

template <int GATE_BITS, int GATE_GROUP, int UP_BITS, int UP_GROUP, int ROWS, int TOKENS, int LANES,
          typename GW, typename GS, typename UW, typename US, typename X, typename Y>
METAL_FUNC void swiglu(const device GW* gate_w, const device GS* gate_scales,
                       const device GS* gate_biases, const device UW* up_w,
                       const device US* up_scales, const device US* up_biases, const device X* x,
                       device Y* y, int in, int out, size_t expert, int first, int lane) {
  if (first >= out) return;
  constexpr int step = 32 / LANES;
  float gate[ROWS * TOKENS] = {}, up[ROWS * TOKENS] = {}, factor[TOKENS];
  for (int t = 0; t < TOKENS; t++) factor[t] = 1.0f;
  const int row = first + lane / LANES, last = out - 1 - row;
  const size_t at = expert * out + row;
  gate_w += at * row_elements<GATE_BITS>(in), up_w += at * row_elements<UP_BITS>(in);
  gate_scales += at * (in / GATE_GROUP), gate_biases += at * (in / GATE_GROUP);
  up_scales += at * (in / UP_GROUP), up_biases += at * (in / UP_GROUP);
  // Side by side, so that x is loaded once for both.
  for (int chunk = lane % LANES; chunk < in / 32; chunk += LANES) {
    dot_chunk<GATE_BITS, GATE_GROUP, ROWS, TOKENS, false>(
        gate_w, gate_scales, gate_biases, x, x, in, chunk, step, last, factor, gate, gate);
    dot_chunk<UP_BITS, UP_GROUP, ROWS, TOKENS, false>(up_w, up_scales, up_biases, x, x, in, chunk,
                                                      step, last, factor, up, up);
  }
#pragma unroll
  for (int i = 0; i < ROWS * TOKENS; i++) {
    const float g = lane_sum<LANES>(gate[i]), u = lane_sum<LANES>(up[i]);
    const int r = row + (i / TOKENS) * step;
    if (lane % LANES == 0 && r < out) y[(i % TOKENS) * out + r] = Y(silu(g) * u);
  }
}
// body
const int pair = int(threadgroup_position_in_grid.y);
const int in = x_shape[1];
const int lane = int(thread_index_in_simdgroup);
const int block = int(threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup);
const int first = block * ROWS * (32 / LANES);
// The shared expert, which takes longest, comes first; the routed ones are generated if there are.
if (pair == 0) {
  swiglu<shared_gate_BITS, shared_gate_GROUP, shared_up_BITS, shared_up_GROUP, ROWS, TOKENS,
         LANES>(shared_gate_w, shared_gate_scales, shared_gate_biases, shared_up_w,
                shared_up_scales, shared_up_biases, x, shared_out, in, shared_gate_w_shape[0], 0,
                first, lane);
  return;
}
