// Mamba-3: backward over whole sequences. Nothing of the forward is kept: it is computed again.
//
// With k = R_phi (n weight + bias), n = b / rms(b), R_phi the rotation of lane pairs, and dk the
// gradient of k from the chunk kernel of linear attention:
//
//   dphi   = sum over ranks of dk_w k_u - dk_u k_w for each pair (u, w) of k, and of q likewise
//   G_t    = sum_{t' >= t} dphi_t',   d phase_step_t = G_t . rate_t,   d rate_t += phase_step_t G_t
//   d(n weight + bias) = R_{-phi} dk,   db = (g - n mean(g n)) / rms(b)  with g = weight R_{-phi} dk
//
// and, with e_r = mimo_o_r dout, g_r = mimo_z_r z, Y_r the normed output (y itself without norm):
//
//   dY_r = e_r silu(g_r),   dz = sum_r mimo_z_r e_r Y_r silu'(g_r),   dy_r = norm's backward of dY_r
//
// Tiling. A document is cut into segments of kSegmentChunks chunks. First, for every head, the state
// and the phase at the start of each segment; then the segments from the last to the first. A task
// takes one segment of one head and does all of it in a near cache. What heads share (the gradients
// of b, c and the rate) each head writes to a buffer of one segment, and the heads are added up, in
// order, before the next segment: the same bits for any number of threads.
#include "mamba3_chunk.h"

namespace seqmodels {

constexpr int64_t kSegmentChunks = 4;

template <class T>
struct Mamba3Gradients {
  const T* grad_out;                                         // (tokens, H, P)
  const float *grad_angle, *grad_ssm, *grad_k;               // of the final states
  T *x, *z;                                                  // (tokens, H, P)
  T *b, *c;                                                  // (tokens, R, G, N)
  float *log_decay, *past, *diagonal, *phase_step;           // (tokens, H)
  float* rate;                                               // (tokens, A)
  float *initial_angle, *initial_state;                      // (documents, ...), or null
};

// Sums over tokens for one head, lanes in the order of the rows of keys.
struct Mamba3Sums {
  int64_t b_bias, c_bias, b_weight, c_weight, mimo_x, mimo_z, mimo_o, norm_weight, skip, size;
  explicit Mamba3Sums(const Mamba3Shape& s) {
    const int64_t keys = s.ranks * s.d_state, mixes = s.ranks * s.head_dim;
    b_bias = 0, c_bias = keys, b_weight = 2 * keys, c_weight = b_weight + s.d_state, mimo_x = c_weight + s.d_state;
    mimo_z = mimo_x + mixes, mimo_o = mimo_z + mixes, norm_weight = mimo_o + mixes, skip = norm_weight + s.head_dim;
    size = skip + 1;
  }
};

// What one head of one document carries from segment to segment.
struct Mamba3Walk {
  Document document;
  int64_t segments;
  float* states;          // at the start of each segment
  double* phases;         // (segments, A), before the segment's first token
  float* grad_state;      // at the current segment's end
  double* grad_phase;     // (A), G of the token behind the current segment
  double* sums;           // Mamba3Sums
  float *b, *c;           // (segment tokens, R, N), this head's part of the gradients
  float* rate;            // (segment tokens, A)
};

static inline int64_t mamba3_segment_tokens(const Mamba3Shape& s) { return kSegmentChunks * (kChunkRows / s.ranks); }

static inline int64_t mamba3_backward_scratch(const Mamba3Shape& s, const LinearAttentionShape& head) {
  const int64_t tokens = mamba3_segment_tokens(s), rows = tokens * s.ranks;
  return head_weights_size(s) + run_size(s, tokens) + 2 * rows * s.head_dim + 3 * tokens +
         (2 * kSegmentChunks + 1) * backward_state_size(head) + forward_state_size(head) + 2 * padded(s.angles) +
         std::max(backward_scratch_size(head), forward_scratch_size(head)) + Mamba3Sums(s).size +
         6 * padded(s.head_dim) + 3 * padded(s.d_state) + 512;
}

// States and phases at the segments' starts, and the gradients of the final ones at the end.
template <class T>
using Mamba3SegmentStates = void(const Mamba3Inputs<T>&, const Mamba3Gradients<T>&, const Mamba3Walk&, int64_t head,
                                 const float* initial_angle, const float* initial_state, float* scratch);
// All gradients of one segment of one head; the segment behind it comes first.
template <class T>
using Mamba3Backward = void(const Mamba3Inputs<T>&, const Mamba3Gradients<T>&, const Mamba3Walk&, int64_t head,
                            int64_t segment, float* scratch);
// Adds up the heads' parts for tokens [begin, end) of a segment; `walks` has one entry for each head.
template <class T>
using Mamba3Join = void(const Mamba3Inputs<T>&, const Mamba3Gradients<T>&, const Mamba3Walk* walks, int64_t segment,
                        int64_t begin, int64_t end, float* scratch);
SEQMODELS_DECLARE_KERNEL(Mamba3SegmentStates<float>, mamba3_segment_states_float)
SEQMODELS_DECLARE_KERNEL(Mamba3SegmentStates<bfloat16>, mamba3_segment_states_bfloat16)
SEQMODELS_DECLARE_KERNEL(Mamba3Backward<float>, mamba3_backward_float)
SEQMODELS_DECLARE_KERNEL(Mamba3Backward<bfloat16>, mamba3_backward_bfloat16)
SEQMODELS_DECLARE_KERNEL(Mamba3Join<float>, mamba3_join_float)
SEQMODELS_DECLARE_KERNEL(Mamba3Join<bfloat16>, mamba3_join_bfloat16)

}  // namespace seqmodels

#include "linear_attention_tile.h"

namespace seqmodels {
namespace SEQMODELS_LEVEL {

// (P, N) of a tensor to a transposed state and back; null is zero.
static void read_state(const Mamba3Shape& s, const LinearAttentionShape& shape, const float* from, float* state) {
  std::fill(state, state + backward_state_size(shape), 0.0f);
  if (!from) return;
  for (int64_t p = 0; p < s.head_dim; ++p) order_lanes(s, from + p * s.d_state, state + p * padded(s.d_state));
}

static void write_state(const Mamba3Shape& s, const float* state, float* to) {
  for (int64_t p = 0; p < s.head_dim; ++p, state += padded(s.d_state), to += s.d_state) {
    for_lanes(s, [=](int64_t n, int64_t lane) { to[lane] = state[n]; });
  }
}

template <class T>
static void segment_states(const Mamba3Inputs<T>& in, const Mamba3Gradients<T>& out, const Mamba3Walk& walk,
                           int64_t head, const float* initial_angle, const float* initial_state, float* scratch) {
  const Mamba3Shape& s = in.shape;
  const LinearAttentionShape shape = in.head_shape();
  const int64_t tokens = mamba3_segment_tokens(s), size = backward_state_size(shape), A = s.angles;
  Arena arena(scratch);
  double* phase = reinterpret_cast<double*>(arena.take(2 * padded(A)));
  const HeadWeights weights = take_head_weights(s, in.weights, head, arena);
  const Run run = take_run(s, tokens, arena);
  float* wide = arena.take(s.d_state + s.head_dim);
  float* states = arena.take((kSegmentChunks + 1) * size);
  float* inner = arena.take(backward_scratch_size(shape));
  const LinearAttentionInputs<float> inputs{shape, run.q, run.k, run.v, run.log_decay, run.past, run.diagonal};
  for (int64_t i = 0; i < A; ++i) phase[i] = initial_angle ? initial_angle[i] : 0.0;
  read_state(s, shape, initial_state, walk.states);
  const int64_t place = walk.document.slot * s.heads + head;
  for (int64_t i = 0; i < A; ++i) walk.grad_phase[i] = out.grad_angle[place * A + i];
  read_state(s, shape, out.grad_ssm + place * s.head_dim * s.d_state, walk.grad_state);
  for (int64_t segment = 0; segment < walk.segments; ++segment) {
    std::copy(phase, phase + A, walk.phases + segment * A);
    if (segment + 1 == walk.segments) break;
    make_run(in, weights, head, walk.document.start + segment * tokens, tokens, false, phase, run, wide);
    std::copy(walk.states + segment * size, walk.states + (segment + 1) * size, states);
    // One token more than there are: the end of the last chunk is a start here.
    linear_attention_start_states_float(inputs, {0, tokens + 1, 0}, 0, 0, round_up(s.head_dim, 8), states, size, inner);
    std::copy(states + kSegmentChunks * size, states + (kSegmentChunks + 1) * size, walk.states + (segment + 1) * size);
  }
}

// The gate's backward for one token: y (R, P) with the skip term becomes dy; dz is returned in `dz`.
static void gate_backward(const Mamba3Shape& s, const Mamba3Weights& w, int64_t head, float* y, const float* z,
                          const float* grad_out, float* dz, float* sums, const Mamba3Sums& at) {
  const int64_t P = s.head_dim;
  for (int64_t r = 0; r < s.ranks; ++r, y += P) {
    const int64_t mix = (head * s.ranks + r) * P;
    const float scale = w.norm_weight ? inverse_rms(y, P, s.epsilon) : 1.0f;
    Vec correlation{};
    for (int64_t p = 0; p < P; p += kLanes) {
      const int64_t left = P - p;
      const Vec normed = load_some(y + p, left) * scale, raw_gate = load_some(z + p, left);
      Vec value = normed, g = raw_gate, e = load_some(grad_out + p, left);
      if (w.norm_weight) value *= load_some(w.norm_weight + head * P + p, left);
      if (w.mimo_z) g *= load_some(w.mimo_z + mix + p, left);
      const Vec open = sigmoid(g), silu = g * open;
      if (w.mimo_o) {
        float* sum = sums + at.mimo_o + r * P + p;
        store_some(sum, load_some(sum, left) + e * value * silu, left);
        e *= load_some(w.mimo_o + mix + p, left);
      }
      Vec dg = e * value * open * (1.0f + g * (1.0f - open));
      if (w.mimo_z) {
        float* sum = sums + at.mimo_z + r * P + p;
        store_some(sum, load_some(sum, left) + dg * raw_gate, left);
        dg *= load_some(w.mimo_z + mix + p, left);
      }
      if (r > 0) dg += load_some(dz + p, left);
      store_some(dz + p, dg, left);
      Vec dy = e * silu;
      if (w.norm_weight) {
        float* sum = sums + at.norm_weight + p;
        store_some(sum, load_some(sum, left) + dy * normed, left);
        dy *= load_some(w.norm_weight + head * P + p, left);
        correlation += dy * normed;
        // Both are needed once the mean is known.
        store_some(y + p, normed, left);
        store_some(dz + padded(P) + p, dy, left);
      } else {
        store_some(y + p, dy, left);
      }
    }
    if (!w.norm_weight) continue;
    const float mean = sum(correlation) / static_cast<float>(P);
    for (int64_t p = 0; p < P; p += kLanes) {
      const int64_t left = P - p;
      store_some(y + p, (load_some(dz + padded(P) + p, left) - load_some(y + p, left) * mean) * scale, left);
    }
  }
}

// Rows of dk (or dq) to the gradient before the rotation, in place; dphi is added to `grad_angle`.
static void unrotate(const Mamba3Shape& s, const float* rows, float* grads, const float* cosine, const float* sine,
                     float* grad_angle) {
  const int64_t N = s.d_state, A = s.angles;
  for (int64_t r = 0; r < s.ranks; ++r, rows += N, grads += N) {
#pragma GCC ivdep
    for (int64_t i = 0; i < A; ++i) {
      const float first = grads[i], second = grads[A + i];
      grad_angle[i] += second * rows[i] - first * rows[A + i];
      grads[i] = first * cosine[i] + second * sine[i];
      grads[A + i] = second * cosine[i] - first * sine[i];
    }
  }
}

// Adds a token's rows of d(n weight + bias) to the sums of bias and weight.
template <class T>
static void add_key_sums(const Mamba3Shape& s, const T* raw, const float* inverse, int64_t group, const float* grads,
                         float* bias_sum, float* weight_sum, float* wide) {
  const int64_t N = s.d_state;
  for (int64_t r = 0; r < s.ranks; ++r, grads += N, bias_sum += N) {
    const int64_t at = r * s.groups + group;
    const float* row = float_row(raw + at * N, N, wide);
    const float scale = inverse[at];
    for_lanes(s, [=](int64_t n, int64_t lane) {
      const float gradient = grads[n];
      bias_sum[n] += gradient;
      weight_sum[n] += gradient * row[lane] * scale;
    });
  }
}

template <class T>
static void backward(const Mamba3Inputs<T>& in, const Mamba3Gradients<T>& out, const Mamba3Walk& walk, int64_t head,
                     int64_t segment, float* scratch) {
  const Mamba3Shape& s = in.shape;
  const Mamba3Weights& w = in.weights;
  const LinearAttentionShape shape = in.head_shape();
  const Mamba3Sums at(s);
  const int64_t N = s.d_state, P = s.head_dim, R = s.ranks, A = s.angles, H = s.heads, group = s.group(head);
  const int64_t most = mamba3_segment_tokens(s), token = walk.document.start + segment * most;
  const int64_t tokens = std::min(most, walk.document.length - segment * most), rows = tokens * R;
  const int64_t size = backward_state_size(shape), chunks = shape.chunks(tokens), height = round_up(P, 8);
  const bool last = segment + 1 == walk.segments;

  Arena arena(scratch);
  double* phase = reinterpret_cast<double*>(arena.take(2 * padded(A)));
  const HeadWeights weights = take_head_weights(s, w, head, arena);
  const Run run = take_run(s, most, arena);
  float *dq = walk.c, *dk = walk.b;  // at first of the rotated rows
  float *y = arena.take(most * R * P), *dv = arena.take(most * R * P);
  float *log_decay = arena.take(most), *past = arena.take(most), *diagonal = arena.take(most);
  float* starts = arena.take(kSegmentChunks * size);
  float* ends = arena.take((kSegmentChunks + 1) * size);
  float* state = arena.take(forward_state_size(shape));
  float* inner = arena.take(std::max(backward_scratch_size(shape), forward_scratch_size(shape)));
  float* sums = arena.take(at.size);
  float* dz = arena.take(2 * padded(P));
  float *z = arena.take(P), *x = arena.take(P), *grad_out = arena.take(P);
  float *grad_angle = arena.take(padded(A)), *wide = arena.take(N + P);
  std::fill(sums, sums + at.size, 0.0f);

  // The forward again: keys, queries and values, states at the chunks' starts, outputs.
  std::copy(walk.phases + segment * A, walk.phases + (segment + 1) * A, phase);
  make_run(in, weights, head, token, tokens, true, phase, run, wide);
  const LinearAttentionInputs<float> inputs{shape, run.q, run.k, run.v, run.log_decay, run.past, run.diagonal};
  std::copy(walk.states + segment * size, walk.states + (segment + 1) * size, starts);
  linear_attention_start_states_float(inputs, {0, tokens, 0}, 0, 0, height, starts, size, inner);
  std::fill(state, state + forward_state_size(shape), 0.0f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t begin = chunk * shape.chunk_tokens, count = std::min(shape.chunk_tokens, tokens - begin);
    prefetch_head(in.z, in.z_stride, token + begin, count, head, P);
    prefetch_head(out.grad_out, H * P, token + begin, count, head, P);
    transpose(starts + chunk * size, padded(N), height, padded(N), state, padded(P));
    linear_attention_forward_float(inputs, {y, nullptr}, begin, count, 0, 1, state, false, inner);
  }

  // The gate: y becomes dy.
  const float skip = w.skip[head];
  for (int64_t t = 0; t < tokens; ++t) {
    float* dy = y + t * R * P;
    const float* v = run.v + t * R * P;
    for (int64_t i = 0; i < R * P; ++i) dy[i] += skip * v[i];
    widen_values(in.z + (token + t) * in.z_stride + head * P, P, z);
    widen_values(out.grad_out + ((token + t) * H + head) * P, P, grad_out);
    gate_backward(s, w, head, dy, z, grad_out, dz, sums, at);
    T* to = out.z + ((token + t) * H + head) * P;
    for (int64_t p = 0; p < P; p += kLanes) store_some(to + p, load_some(dz + p, P - p), P - p);
    Vec total{};
    for (int64_t i = 0; i < R * P; i += kLanes) total += load_some(dy + i, R * P - i) * load_some(v + i, R * P - i);
    sums[at.skip] += sum(total);
  }

  // The recurrence.
  std::copy(walk.grad_state, walk.grad_state + size, ends + chunks * size);
  const LinearAttentionGradients<float> gradients{y,       nullptr, nullptr,   dv,   dq,      dk,
                                                  nullptr, nullptr, log_decay, past, diagonal};
  linear_attention_end_gradients_float(inputs, gradients, {0, tokens, 0}, 0, 0, height, ends, size, inner);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t begin = chunk * shape.chunk_tokens, count = std::min(shape.chunk_tokens, tokens - begin);
    linear_attention_backward_float(inputs, gradients, begin, count, 0, 1, starts + chunk * size,
                                    ends + (chunk + 1) * size, inner);
  }
  std::copy(ends, ends + size, walk.grad_state);
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t to = (token + t) * H + head;
    out.log_decay[to] = log_decay[t], out.past[to] = past[t], out.diagonal[to] = diagonal[t];
  }

  // Values.
  for (int64_t t = 0; t < tokens; ++t) {
    widen_values(in.x + (token + t) * in.x_stride + head * P, P, x);
    float* dx = dz;
    for (int64_t r = 0; r < R; ++r) {
      const float *direct = y + (t * R + r) * P, *through = dv + (t * R + r) * P;
      const float* mix = w.mimo_x ? w.mimo_x + (head * R + r) * P : nullptr;
      for (int64_t p = 0; p < P; p += kLanes) {
        const int64_t left = P - p;
        Vec gradient = load_some(through + p, left) + load_some(direct + p, left) * skip;
        if (mix) {
          float* sum = sums + at.mimo_x + r * P + p;
          store_some(sum, load_some(sum, left) + gradient * load_some(x + p, left), left);
          gradient *= load_some(mix + p, left);
        }
        if (r > 0) gradient += load_some(dx + p, left);
        store_some(dx + p, gradient, left);
      }
    }
    T* to = out.x + ((token + t) * H + head) * P;
    for (int64_t p = 0; p < P; p += kLanes) store_some(to + p, load_some(dx + p, P - p), P - p);
  }

  // Keys and queries; the final state holds the last token's keys.
  if (last) {
    for (int64_t r = 0; r < R; ++r) {
      const float* from = out.grad_k + ((walk.document.slot * R + r) * H + head) * N;
      float* to = dk + (rows - R + r) * N;
      for_lanes(s, [=](int64_t n, int64_t lane) { to[n] += from[lane]; });
    }
  }
  const int64_t norms = R * s.groups;
  for (int64_t t = tokens - 1; t >= 0; --t) {
    const int64_t row = t * R * N;
    const float *cosine = run.cosine + t * padded(A), *sine = run.sine + t * padded(A);
    std::fill(grad_angle, grad_angle + A, 0.0f);
    unrotate(s, run.k + row, dk + row, cosine, sine, grad_angle);
    unrotate(s, run.q + row, dq + row, cosine, sine, grad_angle);
    const int64_t index = token + t;
    const float step = in.phase_step[index * H + head];
    double grad_step = 0;
    for (int64_t i = 0; i < A; ++i) {
      walk.grad_phase[i] += grad_angle[i];
      grad_step += walk.grad_phase[i] * in.rate[index * A + i];
      walk.rate[t * A + i] = static_cast<float>(walk.grad_phase[i] * step);
    }
    out.phase_step[index * H + head] = static_cast<float>(grad_step);
    add_key_sums(s, in.b + index * in.b_stride, in.inverse_b + index * norms, group, dk + row, sums + at.b_bias,
                 sums + at.b_weight, wide);
    add_key_sums(s, in.c + index * in.c_stride, in.inverse_c + index * norms, group, dq + row, sums + at.c_bias,
                 sums + at.c_weight, wide);
  }
  for (int64_t i = 0; i < at.size; ++i) walk.sums[i] += sums[i];

  if (segment > 0) return;
  const int64_t place = walk.document.slot * H + head;
  if (out.initial_angle) {
    for (int64_t i = 0; i < A; ++i) out.initial_angle[place * A + i] = static_cast<float>(walk.grad_phase[i]);
  }
  if (out.initial_state) write_state(s, walk.grad_state, out.initial_state + place * P * N);
}

// db of one row from the heads' sum of d(n weight + bias), in `total`.
template <class T>
static void norm_backward(const Mamba3Shape& s, const T* raw, float inverse, const float* weight, float* total, T* to,
                          float* placed) {
  const int64_t N = s.d_state;  // `placed` is g in the tensor's order of lanes
  for_lanes(s, [=](int64_t n, int64_t lane) { placed[lane] = total[n] * weight[n]; });
  Vec correlation{};
  for (int64_t n = 0; n < N; n += kLanes) {
    correlation += load_some(raw + n, N - n) * load_some(placed + n, N - n);
  }
  const float mean = sum(correlation) * inverse / static_cast<float>(N);
  for (int64_t n = 0; n < N; n += kLanes) {
    const int64_t left = N - n;
    const Vec normed = load_some(raw + n, left) * inverse;
    store_some(to + n, (load_some(placed + n, left) - normed * mean) * inverse, left);
  }
}

// total = sum of the heads' rows at `part`.
static void add_heads(const Mamba3Walk* heads, int64_t count, float* Mamba3Walk::*rows, int64_t part, int64_t n,
                      float* total) {
  std::copy(heads[0].*rows + part, heads[0].*rows + part + n, total);
  for (int64_t h = 1; h < count; ++h) {
    const float* from = heads[h].*rows + part;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) total[i] += from[i];
  }
}

template <class T>
static void join(const Mamba3Inputs<T>& in, const Mamba3Gradients<T>& out, const Mamba3Walk* walks, int64_t segment,
                 int64_t begin, int64_t end, float* scratch) {
  const Mamba3Shape& s = in.shape;
  const int64_t N = s.d_state, R = s.ranks, A = s.angles, of_group = s.heads / s.groups;
  const int64_t first = walks[0].document.start + segment * mamba3_segment_tokens(s);
  Arena arena(scratch);
  float *b_weight = arena.take(N), *c_weight = arena.take(N), *total = arena.take(N), *placed = arena.take(N);
  order_lanes(s, in.weights.b_weight, b_weight);
  order_lanes(s, in.weights.c_weight, c_weight);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t token = first + t;
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t group = 0; group < s.groups; ++group) {
        const int64_t row = r * s.groups + group, norm = token * R * s.groups + row, part = (t * R + r) * N;
        const Mamba3Walk* heads = walks + group * of_group;
        add_heads(heads, of_group, &Mamba3Walk::b, part, N, total);
        norm_backward(s, in.b + token * in.b_stride + row * N, in.inverse_b[norm], b_weight, total, out.b + norm * N, placed);
        add_heads(heads, of_group, &Mamba3Walk::c, part, N, total);
        norm_backward(s, in.c + token * in.c_stride + row * N, in.inverse_c[norm], c_weight, total, out.c + norm * N, placed);
      }
    }
    add_heads(walks, s.heads, &Mamba3Walk::rate, t * A, A, out.rate + token * A);
  }
}

#define SEQMODELS_INSTANTIATE(T)                                                                                      \
  void mamba3_segment_states_##T(const Mamba3Inputs<T>& in, const Mamba3Gradients<T>& out, const Mamba3Walk& walk,    \
                                 int64_t head, const float* initial_angle, const float* initial_state,                \
                                 float* scratch) {                                                                    \
    segment_states<T>(in, out, walk, head, initial_angle, initial_state, scratch);                                    \
  }                                                                                                                   \
  void mamba3_backward_##T(const Mamba3Inputs<T>& in, const Mamba3Gradients<T>& out, const Mamba3Walk& walk,          \
                           int64_t head, int64_t segment, float* scratch) {                                           \
    backward<T>(in, out, walk, head, segment, scratch);                                                               \
  }                                                                                                                   \
  void mamba3_join_##T(const Mamba3Inputs<T>& in, const Mamba3Gradients<T>& out, const Mamba3Walk* walks,             \
                       int64_t segment, int64_t begin, int64_t end, float* scratch) {                                 \
    join<T>(in, out, walks, segment, begin, end, scratch);                                                            \
  }
SEQMODELS_INSTANTIATE(float)
SEQMODELS_INSTANTIATE(bfloat16)
#undef SEQMODELS_INSTANTIATE

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels

#if SEQMODELS_LAUNCHERS

#include "mamba3_chunk_launch.h"

namespace seqmodels {
namespace {

constexpr int64_t kJoinTokens = 32;

template <class T>
struct Kernels {
  Mamba3Norms<T>* norms;
  Mamba3SegmentStates<T>* segment_states;
  Mamba3Backward<T>* backward;
  Mamba3Join<T>* join;
};

// One wave of documents; `sums` (H, Mamba3Sums) grows by theirs, document by document.
template <class T>
void run_wave(const Mamba3Inputs<T>& in, const Mamba3Gradients<T>& out, const std::vector<Document>& documents,
              const float* initial_angle, const float* initial_state, double* sums, const Kernels<T>& kernels) {
  const Mamba3Shape& s = in.shape;
  const LinearAttentionShape shape = in.head_shape();
  const int64_t tokens = mamba3_segment_tokens(s), size = backward_state_size(shape), sum_size = Mamba3Sums(s).size;
  const int64_t H = s.heads, keys = tokens * s.ranks * s.d_state, scratch_size = mamba3_backward_scratch(s, shape);
  const int64_t tensor_state = s.head_dim * s.d_state, tasks = static_cast<int64_t>(documents.size()) * H;
  std::vector<Mamba3Walk> walks;  // [document][head]
  int64_t segments = 0, most = 0;
  for (const Document& document : documents) {
    const int64_t count = (document.length + tokens - 1) / tokens;
    for (int64_t head = 0; head < H; ++head) walks.push_back({document, count, {}, {}, {}, {}, {}, {}, {}, {}});
    segments += count * H, most = std::max(most, count);
  }
  Buffer states(segments * size), grad_states(tasks * size), parts(tasks * (2 * keys + tokens * s.angles));
  std::vector<double> phases(segments * s.angles), grad_phases(tasks * s.angles), wave_sums(tasks * sum_size, 0.0);
  int64_t segment_offset = 0;
  for (int64_t task = 0; task < tasks; ++task) {
    Mamba3Walk& walk = walks[task];
    walk.states = states.data() + segment_offset * size;
    walk.phases = phases.data() + segment_offset * s.angles;
    segment_offset += walk.segments;
    walk.grad_state = grad_states.data() + task * size;
    walk.grad_phase = grad_phases.data() + task * s.angles;
    walk.sums = wave_sums.data() + task * sum_size;
    walk.b = parts.data() + task * (2 * keys + tokens * s.angles);
    walk.c = walk.b + keys;
    walk.rate = walk.c + keys;
  }
  parallel(tasks, [&](int64_t begin, int64_t end) {
    Buffer scratch(scratch_size);
    for (int64_t task = begin; task < end; ++task) {
      const Mamba3Walk& walk = walks[task];
      const int64_t head = task % H, place = walk.document.slot * H + head;
      kernels.segment_states(in, out, walk, head, initial_angle ? initial_angle + place * s.angles : nullptr,
                             initial_state ? initial_state + place * tensor_state : nullptr, scratch.data());
    }
  });
  for (int64_t back = 0; back < most; ++back) {
    parallel(tasks, [&](int64_t begin, int64_t end) {
      Buffer scratch(scratch_size);
      for (int64_t task = begin; task < end; ++task) {
        const Mamba3Walk& walk = walks[task];
        if (walk.segments > back) {
          kernels.backward(in, out, walk, task % H, walk.segments - 1 - back, scratch.data());
        }
      }
    });
    const int64_t blocks = (tokens + kJoinTokens - 1) / kJoinTokens;
    parallel(static_cast<int64_t>(documents.size()) * blocks, [&](int64_t begin, int64_t end) {
      Buffer scratch(scratch_size);
      for (int64_t task = begin; task < end; ++task) {
        const Mamba3Walk* heads = walks.data() + task / blocks * H;
        const int64_t segment = heads[0].segments - 1 - back, first = task % blocks * kJoinTokens;
        if (segment < 0) continue;
        const int64_t count = std::min(tokens, heads[0].document.length - segment * tokens);
        if (first < count) kernels.join(in, out, heads, segment, first, std::min(count, first + kJoinTokens), scratch.data());
      }
    });
  }
  for (int64_t task = 0; task < tasks; ++task) {
    for (int64_t i = 0; i < sum_size; ++i) sums[task % H * sum_size + i] += wave_sums[task * sum_size + i];
  }
}

template <class T>
void run_backward(const Mamba3Tensors& tensors, const Documents& documents, const Mamba3Gradients<T>& out,
                  const float* initial_angle, const float* initial_state, double* sums, const Kernels<T>& kernels) {
  InverseNorms inverse(tensors, kernels.norms);
  const Mamba3Inputs<T> in = tensors.inputs<T>(inverse.b(), inverse.c());
  // As many documents at a time as keep the threads busy. The sums do not depend on it.
  const size_t wave = std::max<int64_t>(1, 2 * torch::stable::get_num_threads() / tensors.shape.heads);
  for (size_t first = 0; first < documents.used.size(); first += wave) {
    const auto begin = documents.used.begin() + first;
    const std::vector<Document> part(begin, begin + std::min(wave, documents.used.size() - first));
    run_wave(in, out, part, initial_angle, initial_state, sums, kernels);
  }
}

using TwelveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

TwelveTensors mamba3_backward_cpu(
    Tensor grad_out, Tensor grad_angle, Tensor grad_ssm, Tensor grad_k, Tensor x, Tensor b, Tensor c, Tensor z,
    Tensor log_decay, Tensor past, Tensor diagonal, Tensor phase_step, Tensor rate, Tensor b_weight, Tensor c_weight,
    Tensor b_bias, Tensor c_bias, Tensor skip, std::optional<Tensor> mimo_x, std::optional<Tensor> mimo_z,
    std::optional<Tensor> mimo_o, std::optional<Tensor> norm_weight, std::optional<Tensor> initial_angle,
    std::optional<Tensor> initial_state, std::optional<Tensor> starts, std::optional<Tensor> lengths, bool half,
    double epsilon) {
  const Mamba3Tensors tensors(x, b, c, z, log_decay, past, diagonal, phase_step, rate, b_weight, c_weight, b_bias,
                              c_bias, skip, mimo_x, mimo_z, mimo_o, norm_weight, half, epsilon);
  const Mamba3Shape& s = tensors.shape;
  const Documents documents(x.size(0), x.size(1), starts, lengths);
  const int64_t angles = documents.slots * s.heads * s.angles, states = documents.slots * s.heads * s.head_dim * s.d_state;
  const float* angle_data = check_floats(initial_angle, "initial_angle", angles);
  const float* state_data = check_floats(initial_state, "initial_state", states);
  check_tensor(grad_out, "grad_out", x.scalar_type());
  STD_TORCH_CHECK(grad_out.numel() == x.numel(), "grad_out and out differ in size");
  check_floats(grad_angle, "grad_angle", angles);
  check_floats(grad_ssm, "grad_ssm", states);
  check_floats(grad_k, "grad_k", documents.slots * s.ranks * s.heads * s.d_state);

  const int64_t B = x.size(0), L = x.size(1);
  const ScalarType wide = ScalarType::Float;
  // Every element of a document is written; padding, if there is any, is zero.
  const auto make = [&](std::vector<int64_t> sizes, ScalarType type) {
    Tensor tensor = torch::stable::new_empty(x, sizes, type);
    if (documents.padding) torch::stable::zero_(tensor);
    return tensor;
  };
  const ScalarType low = x.scalar_type();
  Tensor grad_x = make({B, L, s.heads, s.head_dim}, low), grad_z = make({B, L, s.heads, s.head_dim}, low);
  Tensor grad_b = make({B, L, s.ranks, s.groups, s.d_state}, low), grad_c = make({B, L, s.ranks, s.groups, s.d_state}, low);
  Tensor grad_log_decay = make({B, L, s.heads}, wide), grad_past = make({B, L, s.heads}, wide);
  Tensor grad_diagonal = make({B, L, s.heads}, wide), grad_step = make({B, L, s.heads}, wide);
  Tensor grad_rate = make({B, L, s.angles}, wide);
  const auto make_initial = [&](const std::optional<Tensor>& like) {
    if (!like.has_value()) return torch::stable::new_empty(x, {0}, wide);
    Tensor tensor = torch::stable::empty_like(*like);
    if (!documents.unused.empty()) torch::stable::zero_(tensor);
    return tensor;
  };
  Tensor grad_initial_angle = make_initial(initial_angle), grad_initial_state = make_initial(initial_state);
  const Mamba3Sums at(s);
  std::vector<double> sums(s.heads * at.size, 0.0);
  const auto data = [](const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); };

  const auto run = [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    const auto typed = [](const Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); };
    const Mamba3Gradients<T> out{typed(grad_out),
                                 data(grad_angle),
                                 data(grad_ssm),
                                 data(grad_k),
                                 typed(grad_x),
                                 typed(grad_z),
                                 typed(grad_b),
                                 typed(grad_c),
                                 data(grad_log_decay),
                                 data(grad_past),
                                 data(grad_diagonal),
                                 data(grad_step),
                                 data(grad_rate),
                                 initial_angle.has_value() ? data(grad_initial_angle) : nullptr,
                                 initial_state.has_value() ? data(grad_initial_state) : nullptr};
    run_backward<T>(tensors, documents, out, angle_data, state_data, sums.data(), kernels);
  };
  if (is_bfloat16(x)) {
    run(bfloat16{}, Kernels<bfloat16>{choose_mamba3_norms_bfloat16(), choose_mamba3_segment_states_bfloat16(),
                                      choose_mamba3_backward_bfloat16(), choose_mamba3_join_bfloat16()});
  } else {
    run(0.0f, Kernels<float>{choose_mamba3_norms_float(), choose_mamba3_segment_states_float(),
                             choose_mamba3_backward_float(), choose_mamba3_join_float()});
  }

  // (H, Mamba3Sums) with the lanes of keys where the parameters have them.
  Tensor grad_weights = torch::stable::new_empty(x, {s.heads, at.size}, wide);
  float* to = data(grad_weights);
  for (int64_t head = 0; head < s.heads; ++head) {
    const double* from = sums.data() + head * at.size;
    for (int64_t i = 0; i < at.mimo_x; i += s.d_state) {
      float* row = to + head * at.size + i;
      plain::for_lanes(s, [=](int64_t n, int64_t lane) { row[lane] = static_cast<float>(from[i + n]); });
    }
    for (int64_t i = at.mimo_x; i < at.size; ++i) to[head * at.size + i] = static_cast<float>(from[i]);
  }
  return {grad_x,    grad_b,        grad_c,    grad_z,    grad_log_decay, grad_past,
          grad_diagonal, grad_step, grad_rate, grad_weights, grad_initial_angle, grad_initial_state};
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cpu, m) {
  m.def(
      "mamba3_backward(Tensor grad_out, Tensor grad_angle, Tensor grad_ssm, Tensor grad_k, Tensor x, Tensor b, "
      "Tensor c, Tensor z, Tensor log_decay, Tensor past_weight, Tensor diagonal_weight, Tensor phase_step, "
      "Tensor rate, Tensor b_weight, Tensor c_weight, Tensor b_bias, Tensor c_bias, Tensor skip, Tensor? mimo_x, "
      "Tensor? mimo_z, Tensor? mimo_o, Tensor? norm_weight, Tensor? initial_angle, Tensor? initial_state, "
      "Tensor? starts, Tensor? lengths, bool half, float epsilon) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CPU, m) {
  m.impl("mamba3_backward", TORCH_BOX(&seqmodels::mamba3_backward_cpu));
}

#endif
