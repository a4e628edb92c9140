// residual + shared expert + weighted sum of the routed ones: a simdgroup makes ROWS values for all
// TOKENS and adds over the lanes once, at the end.
// body
  constexpr int step = 32 / LANES;
  const int lane = int(thread_index_in_simdgroup);
  const int block =
      int(threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup);
  const int row = block * ROWS * step + lane / LANES;
  const int width = residual_shape[1], last = width - 1 - row;
  if (row - lane / LANES >= width) return;
  float acc[ROWS * TOKENS] = {};
