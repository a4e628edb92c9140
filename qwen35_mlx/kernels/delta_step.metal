// Up to TOKENS tokens of one linear attention layer between its projections. A threadgroup has one value
// head of one sequence; each simdgroup keeps ROWS rows of its state in registers, from the only
// read to the only write.
// The first num_accepted of up to TAPE tokens come before them, without an output. If KEEP, the
// states written are those between the two: the new tokens can still be taken back.
// body
constexpr int PER_LANE = DK < 32 ? 1 : DK / 32, ROWS = 8, SIMDGROUPS = DV / ROWS;
constexpr int THREADS = 32 * SIMDGROUPS;
constexpr int GROUP = HV / HK, CHANNELS = 2 * HK * DK + HV * DV;
threadgroup float q[TOKENS][DK], k[TAPE + TOKENS][DK], v[TAPE + TOKENS][DV], o[TOKENS][DV];
threadgroup float decays[TAPE + TOKENS], betas[TAPE + TOKENS];
const int num_tokens = qkv_shape[1], first = TAPE ? num_accepted : 0, end = first + num_tokens;
const int written_at = KEEP ? first : end;
const int head = int(threadgroup_position_in_grid.y), batch = int(threadgroup_position_in_grid.z);
const int simdgroup = int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);

// First, so that the state is on its way while the convolution runs.
const size_t state_at =
    ((size_t(batch) * HV + head) * DV + simdgroup * ROWS) * DK + lane * PER_LANE;
// Only heads narrower than a simdgroup leave lanes without a share.
const bool has_share = lane * PER_LANE < DK;
float s[ROWS][PER_LANE] = {};
if (has_share) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) load_lane<PER_LANE>(state + state_at + r * DK, s[r]);
}

for (int i = simdgroup * 32 + lane; i < 2 * DK + DV; i += THREADS) {
  const int key_head = head / GROUP;
  const int channel = i < DK       ? key_head * DK + i
                      : i < 2 * DK ? (HK + key_head) * DK + i - DK
                                   : 2 * HK * DK + head * DV + i - 2 * DK;
  float window[TAPS], taps[TAPS];
  for (int j = 0; j < TAPS; j++) taps[j] = float(conv_weight[channel * TAPS + j]);
  for (int j = 0; j < TAPS - 1; j++)
    window[j] = float(conv_state[(batch * (TAPS - 1) + j) * CHANNELS + channel]);
  for (int t = 0; t <= end; t++) {
    // Heads of a group share q and k; the first of them writes their new window.
    if (t == written_at && (i >= 2 * DK || head % GROUP == 0))
      for (int j = 0; j < TAPS - 1; j++)
        new_conv_state[(batch * (TAPS - 1) + j) * CHANNELS + channel] = T(window[j]);
    if (t == end) break;
    const bool is_new = t >= first;
    const int token = is_new ? batch * num_tokens + t - first : batch * tape_qkv_shape[1] + t;
    const bool pad = MASKED && is_new && !bool(mask[token]);
    const size_t at = size_t(token) * CHANNELS + channel;
    window[TAPS - 1] = pad ? 0.0f : is_new ? float(qkv[at]) : float(tape_qkv[at]);
    float sum = 0.0f;
    for (int j = 0; j < TAPS; j++) sum = metal::fma(window[j], taps[j], sum);
    for (int j = 0; j < TAPS - 1; j++) window[j] = window[j + 1];
    const float mixed = silu(sum);
    if (i >= 2 * DK) v[t][i - 2 * DK] = mixed;
    else if (i >= DK) k[t][i - DK] = mixed;
    else if (is_new) q[t - first][i] = mixed;
  }
}
if (simdgroup == 0 && lane < end) {
  const bool is_new = lane >= first;
  const int token = is_new ? batch * num_tokens + lane - first : batch * tape_qkv_shape[1] + lane;
  const bool pad = MASKED && is_new && !bool(mask[token]);
  const int at = token * HV + head;
  const float dt = softplus((is_new ? float(a[at]) : float(tape_a[at])) + float(dt_bias[head]));
  const float rate = metal::precise::exp(float(A_log[head]));
  // A pad leaves the state as it is.
  decays[lane] = pad ? 1.0f : metal::precise::exp(-rate * dt);
  betas[lane] = pad ? 0.0f : sigmoid(is_new ? float(b[at]) : float(tape_b[at]));
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int row = simdgroup; row < num_tokens + end; row += SIMDGROUPS) {
  const bool is_q = row < num_tokens;
  threadgroup float* x = is_q ? q[row] : k[row - num_tokens];
  float squares = 0.0f;
  for (int i = lane; i < DK; i += 32) squares = metal::fma(x[i], x[i], squares);
  float scale = metal::precise::rsqrt(simd_sum(squares) + 1e-6f);
  if (is_q) scale *= metal::precise::rsqrt(float(DK));
  for (int i = lane; i < DK; i += 32) x[i] *= scale;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int t = 0; t <= end; t++) {
  if (t == written_at && has_share) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) store_lane<PER_LANE>(new_state + state_at + r * DK, s[r]);
  }
  if (t == end) break;
  // Of a token before them, only what it does to the state is wanted.
  const bool is_new = t >= first;
  const float decay = decays[t], beta = betas[t];
  float key[PER_LANE] = {}, query[PER_LANE] = {}, kq = 0.0f;
  for (int i = 0; has_share && i < PER_LANE; i++) {
    key[i] = k[t][lane * PER_LANE + i];
    query[i] = is_new ? q[t - first][lane * PER_LANE + i] : 0.0f;
    kq = metal::fma(key[i], query[i], kq);
  }
  kq = simd_sum(kq);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    float sk = 0.0f, sq = 0.0f;
    for (int i = 0; i < PER_LANE; i++) {
      s[r][i] *= decay;
      sk = metal::fma(s[r][i], key[i], sk);
      sq = metal::fma(s[r][i], query[i], sq);
    }
    sk = simd_sum(sk), sq = simd_sum(sq);
    const float error = beta * (v[t][simdgroup * ROWS + r] - sk);
    for (int i = 0; i < PER_LANE; i++) s[r][i] = metal::fma(error, key[i], s[r][i]);
    // The new state times q, without waiting for the new state.
    if (lane == 0 && is_new) o[t - first][simdgroup * ROWS + r] = metal::fma(error, kq, sq);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int t = simdgroup; t < num_tokens; t += SIMDGROUPS) {
  float squares = 0.0f;
  for (int i = lane; i < DV; i += 32) squares = metal::fma(o[t][i], o[t][i], squares);
  const float scale = metal::precise::rsqrt(simd_sum(squares) / DV + eps);
  const int at = ((batch * num_tokens + t) * HV + head) * DV;
  for (int i = lane; i < DV; i += 32)
    out[at + i] = T(o[t][i] * scale * float(norm_weight[i]) * silu(float(z[at + i])));
}
