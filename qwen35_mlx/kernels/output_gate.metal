// Attention's output, head-major, to token-major, times the sigmoid of its gate; one thread each.
// body
const uint i = thread_position_in_grid.x, num_tokens = x_shape[2];
const uint d = i % D, head = i / D % HQ, token = i / (D * HQ);
const size_t from = ((size_t(token / num_tokens) * HQ + head) * num_tokens + token % num_tokens) * D + d;
const size_t gate = (size_t(token) * HQ + head) * 2 * D + D + d;
gated[i] = T(float(x[from]) * sigmoid(float(q_gate[gate])));
