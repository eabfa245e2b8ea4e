// What the forward and backward of Mamba-3 do to a run of tokens of one head before the chunk
// kernels of linear attention take over: phases, keys and queries, values, weights.
//
// Rows of keys stand in an order of lanes of their own: first lanes of all pairs, second lanes, the
// lanes that pass through. Products q . k do not depend on the order, the rotation becomes plain
// vector arithmetic, and the lanes are put back where a state or a gradient is written.
#pragma once

#include "linear_attention_kernels.h"
#include "mamba3.h"

namespace seqmodels {

// All tokens of the batch, flattened; token t of x starts at x + t * x_stride.
template <class T>
struct Mamba3Inputs {
  Mamba3Shape shape;
  Mamba3Weights weights;
  const T *x, *z, *b, *c;
  int64_t x_stride, z_stride, b_stride, c_stride;
  const float *log_decay, *past, *diagonal, *phase_step;  // (tokens, H)
  const float* rate;                                      // (tokens, A)
  const float *inverse_b, *inverse_c;                     // (tokens, R, G), 1 / root mean square

  // One head by itself, its rows dense.
  LinearAttentionShape head_shape() const {
    return {1, 1, 1, shape.ranks, shape.d_state, shape.head_dim, kChunkRows / shape.ranks, 1, false, 0.0f};
  }
};

// Inverse root mean squares of `rows` dense rows of n values.
template <class T>
using Mamba3Norms = void(const T* from, int64_t rows, int64_t n, float epsilon, float* to);
SEQMODELS_DECLARE_KERNEL(Mamba3Norms<float>, mamba3_norms_float)
SEQMODELS_DECLARE_KERNEL(Mamba3Norms<bfloat16>, mamba3_norms_bfloat16)

// A head's parameters, the lanes of keys in their own order.
struct HeadWeights {
  float *b_weight, *c_weight;  // (N)
  float *b_bias, *c_bias;      // (R, N)
};

static inline int64_t head_weights_size(const Mamba3Shape& s) { return (2 + 2 * s.ranks) * padded(s.d_state) + 64; }

// A run of tokens of one head.
struct Run {
  float *q, *k;                       // (tokens R, N)
  float* v;                           // (tokens R, P)
  float *cosine, *sine;               // (tokens, padded A)
  float *log_decay, *past, *diagonal;  // (tokens)
};

static inline int64_t run_size(const Mamba3Shape& s, int64_t tokens) {
  const int64_t rows = tokens * s.ranks;
  return rows * (2 * s.d_state + s.head_dim) + tokens * (2 * padded(s.angles) + 3) + 8 * 16;
}

static inline Run take_run(const Mamba3Shape& s, int64_t tokens, Arena& arena) {
  const int64_t rows = tokens * s.ranks;
  Run run;
  run.q = arena.take(rows * s.d_state), run.k = arena.take(rows * s.d_state), run.v = arena.take(rows * s.head_dim);
  run.cosine = arena.take(tokens * padded(s.angles)), run.sine = arena.take(tokens * padded(s.angles));
  run.log_decay = arena.take(tokens), run.past = arena.take(tokens), run.diagonal = arena.take(tokens);
  return run;
}

}  // namespace seqmodels

namespace seqmodels {
namespace SEQMODELS_LEVEL {

// Calls body(place, lane) for every place n of a row of keys and the lane of a tensor that stands
// there. No two calls may touch the same memory.
template <bool half, class Body>
SEQMODELS_INLINE void for_lanes_of(const Mamba3Shape& s, Body body) {
  const int64_t A = s.angles, N = s.d_state, second = half ? N / 2 : 1;
  constexpr int step = half ? 1 : 2;
#pragma GCC ivdep
  for (int64_t i = 0; i < A; ++i) body(i, step * i);
#pragma GCC ivdep
  for (int64_t i = 0; i < A; ++i) body(A + i, step * i + second);
  // Lanes that pass through: those behind the pairs, and with `half` those between their halves.
  int64_t place = 2 * A;
  if (half) {
#pragma GCC ivdep
    for (int64_t lane = A; lane < second; ++lane) body(lane + A, lane);
    place = A + second;
  }
#pragma GCC ivdep
  for (; place < N; ++place) body(place, place);
}

template <class Body>
SEQMODELS_INLINE void for_lanes(const Mamba3Shape& s, Body body) {
  s.half ? for_lanes_of<true>(s, body) : for_lanes_of<false>(s, body);
}

static void order_lanes(const Mamba3Shape& s, const float* from, float* to) {
  for_lanes(s, [=](int64_t n, int64_t lane) { to[n] = from[lane]; });
}

static HeadWeights take_head_weights(const Mamba3Shape& s, const Mamba3Weights& w, int64_t head, Arena& arena) {
  const int64_t N = s.d_state, R = s.ranks;
  HeadWeights h{arena.take(N), arena.take(N), arena.take(R * N), arena.take(R * N)};
  order_lanes(s, w.b_weight, h.b_weight);
  order_lanes(s, w.c_weight, h.c_weight);
  for (int64_t r = 0; r < R; ++r) {
    order_lanes(s, w.b_bias + (head * R + r) * N, h.b_bias + r * N);
    order_lanes(s, w.c_bias + (head * R + r) * N, h.c_bias + r * N);
  }
  return h;
}

// A row of raw B or C in float, whatever the tensor holds.
template <class T>
static const float* float_row(const T* from, int64_t n, float* wide) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return from;
  } else {
    for (int64_t i = 0; i < n; i += kLanes) store_some(wide + i, load_some(from + i, n - i), n - i);
    return wide;
  }
}

// Rows of keys or queries: norm, weight, bias, rotation. `wide` has N floats.
template <class T>
static void key_rows(const Mamba3Shape& s, const T* raw, int64_t raw_stride, const float* inverse, const float* weight,
                     const float* bias, int64_t group, const float* cosine, const float* sine, int64_t tokens, float* to,
                     float* wide) {
  const int64_t N = s.d_state, A = s.angles, width = padded(A);
  for (int64_t t = 0; t < tokens; ++t, cosine += width, sine += width) {
    for (int64_t r = 0; r < s.ranks; ++r, to += N) {
      const int64_t at = r * s.groups + group;
      const float* row = float_row(raw + t * raw_stride + at * N, N, wide);
      const float* shift = bias + r * N;
      const float scale = inverse[t * s.ranks * s.groups + at];
      for_lanes(s, [=](int64_t n, int64_t lane) { to[n] = row[lane] * scale * weight[n] + shift[n]; });
#pragma GCC ivdep
      for (int64_t i = 0; i < A; ++i) {
        const float first = to[i], second = to[A + i];
        to[i] = first * cosine[i] - second * sine[i];
        to[A + i] = first * sine[i] + second * cosine[i];
      }
    }
  }
}

template <class T>
static void widen_values(const T* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += kLanes) store_some(to + i, load_some(from + i, n - i), n - i);
}

// Asks for a head's part of tokens [token, token + tokens): one short piece in each of many pages,
// which the processor does not foresee.
template <class T>
static void prefetch_head(const T* from, int64_t stride, int64_t token, int64_t tokens, int64_t head, int64_t head_dim) {
  for (int64_t t = 0; t < tokens; ++t) {
    const T* piece = from + (token + t) * stride + head * head_dim;
    for (int64_t p = 0; p < head_dim; p += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(piece + p);
  }
}

// Everything of `run` for tokens [token, token + tokens) of `head`; `phase` moves to the last one.
// Queries are left out when `queries` is false. `wide` has N + P floats.
template <class T>
static void make_run(const Mamba3Inputs<T>& in, const HeadWeights& weights, int64_t head, int64_t token, int64_t tokens,
                     bool queries, double* phase, const Run& run, float* wide) {
  const Mamba3Shape& s = in.shape;
  const int64_t A = s.angles, P = s.head_dim, R = s.ranks, group = s.group(head), norms = R * s.groups;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = (token + t) * s.heads + head;
    run.log_decay[t] = in.log_decay[at], run.past[t] = in.past[at], run.diagonal[t] = in.diagonal[at];
    advance_phase(phase, in.phase_step[at], in.rate + (token + t) * A, A);
    sines_of_phases(phase, A, run.cosine + t * padded(A), run.sine + t * padded(A));
  }
  key_rows(s, in.b + token * in.b_stride, in.b_stride, in.inverse_b + token * norms, weights.b_weight, weights.b_bias,
           group, run.cosine, run.sine, tokens, run.k, wide);
  if (queries) {
    key_rows(s, in.c + token * in.c_stride, in.c_stride, in.inverse_c + token * norms, weights.c_weight,
             weights.c_bias, group, run.cosine, run.sine, tokens, run.q, wide);
  }
  float* x = wide + s.d_state;
  for (int64_t t = 0; t < tokens; ++t) {
    widen_values(in.x + (token + t) * in.x_stride + head * P, P, x);
    for (int64_t r = 0; r < R; ++r) {
      float* v = run.v + (t * R + r) * P;
      if (in.weights.mimo_x) {
        const float* mix = in.weights.mimo_x + (head * R + r) * P;
        for (int64_t p = 0; p < P; ++p) v[p] = x[p] * mix[p];
      } else {
        std::memcpy(v, x, P * sizeof(float));
      }
    }
  }
}

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels
