// Norm and rotation of one head of one token, to its place in head-major q or k; one simdgroup.
// body
threadgroup float values[D];
const int head = int(threadgroup_position_in_grid.y), token = int(threadgroup_position_in_grid.z);
const int lane = int(thread_index_in_simdgroup), half_dim = ROTARY / 2;
const bool is_q = head < HQ;
// A head of the query projection is [query D | output gate D].
const size_t from =
    is_q ? (size_t(token) * HQ + head) * 2 * D : (size_t(token) * HK + head - HQ) * D;
float squares = 0.0f;
for (int d = lane; d < D; d += 32) {
  const float x = is_q ? float(q_gate[from + d]) : float(k[from + d]);
  values[d] = x * (is_q ? float(q_weight[d]) : float(k_weight[d]));
  squares = metal::fma(x, x, squares);
}
const float scale = metal::precise::rsqrt(simd_sum(squares) / D + eps);
threadgroup_barrier(mem_flags::mem_threadgroup);
// Rows of the same positions share the tables' rows.
const size_t angle = size_t(token % (cosines_shape[0] * cosines_shape[1])) * half_dim;
const int num_tokens = q_gate_shape[1], batch = token / num_tokens, t = token % num_tokens;
const size_t to = is_q ? ((size_t(batch) * HQ + head) * num_tokens + t) * D
                       : ((size_t(batch) * HK + head - HQ) * num_tokens + t) * D;
for (int d = lane; d < D; d += 32) {
  float x = values[d];
  if (d < half_dim)
    x = metal::fma(x, cosines[angle + d], -(values[d + half_dim] * sines[angle + d]));
  else if (d < ROTARY)
    x = metal::fma(x, cosines[angle + d - half_dim],
                   values[d - half_dim] * sines[angle + d - half_dim]);
  if (is_q) q_out[to + d] = T(x * scale);
  else k_out[to + d] = T(x * scale);
}
