// Experts of a token: the K largest of its logits, softmax over them alone, which is softmax over
// all, renormalised. One simdgroup a token; lane l has the experts l, l + 32, ...
// body
constexpr int PER_LANE = (EXPERTS + 31) / 32;
const int token = int(threadgroup_position_in_grid.y), lane = int(thread_index_in_simdgroup);
float left[PER_LANE];
uint taken = 0;
#pragma unroll
for (int j = 0; j < PER_LANE; j++) {
  const int expert = j * 32 + lane;
  left[j] = expert < EXPERTS ? float(logits[token * EXPERTS + expert]) : 0.0f;
  // NaN, by its bits, whatever the compiler makes of it: an index that exists it still gives.
  if ((as_type<uint>(left[j]) & 0x7fffffffu) > 0x7f800000u) left[j] = -INFINITY;
  if (expert >= EXPERTS) taken |= 1u << j;
}
float largest = 0.0f, sum = 0.0f, mine = 0.0f;
int my_expert = 0;
for (int slot = 0; slot < K; slot++) {
  float best = -INFINITY;
  int expert = EXPERTS;
#pragma unroll
  for (int j = 0; j < PER_LANE; j++)
    if (!(taken >> j & 1) && (expert == EXPERTS || left[j] > best))
      best = left[j], expert = j * 32 + lane;
  const float top = simd_max(best);
  // Of equals, the first.
  const int chosen = simd_min(best == top ? expert : EXPERTS);
  if (chosen % 32 == lane) taken |= 1u << (chosen / 32);
  if (slot == 0) largest = top;
  const float weight = metal::precise::exp(top - largest);
  sum += weight;
  if (lane == slot) mine = weight, my_expert = chosen;
}
if (lane < K) {
  indices[token * K + lane] = uint(my_expert);
  scores[token * K + lane] = mine / sum;
}
if (lane == 0) shared_scores[token] = sigmoid(float(shared_logits[token]));
