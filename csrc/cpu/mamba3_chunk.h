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

// The lane of a tensor that stands at place n of a row of keys.
SEQMODELS_INLINE int64_t lane_at(const Mamba3Shape& s, int64_t n) {
  if (n < s.angles) return s.first_lane(n);
  if (n < 2 * s.angles) return s.second_lane(n - s.angles);
  if (!s.half) return n;
  const int64_t between = s.d_state / 2 - s.angles;  // lanes that pass through in the first half
  return n < 2 * s.angles + between ? n - s.angles : n;
}

static void order_lanes(const Mamba3Shape& s, const float* from, float* to) {
  for (int64_t n = 0; n < s.d_state; ++n) to[n] = from[lane_at(s, n)];
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

// A row of raw B or C with its lanes in order. `Step` and `offset` lead to a pair's second lane.
template <int Step>
static void order_pairs(const float* from, int64_t pairs, int64_t offset, float* to) {
  for (int64_t i = 0; i < pairs; ++i) to[i] = from[Step * i];
  for (int64_t i = 0; i < pairs; ++i) to[pairs + i] = from[Step * i + offset];
}

static void order_row(const Mamba3Shape& s, const float* from, float* to) {
  const int64_t A = s.angles, N = s.d_state;
  if (s.half) {
    order_pairs<1>(from, A, N / 2, to);
    std::memcpy(to + 2 * A, from + A, (N / 2 - A) * sizeof(float));
    std::memcpy(to + N / 2 + A, from + N / 2 + A, (N - N / 2 - A) * sizeof(float));
  } else {
    order_pairs<2>(from, A, 1, to);
    std::memcpy(to + 2 * A, from + 2 * A, (N - 2 * A) * sizeof(float));
  }
}

static void order_row(const Mamba3Shape& s, const bfloat16* from, float* to, float* wide) {
  for (int64_t n = 0; n < s.d_state; n += kLanes) {
    store_some(wide + n, load_some(from + n, s.d_state - n), s.d_state - n);
  }
  order_row(s, wide, to);
}
static void order_row(const Mamba3Shape& s, const float* from, float* to, float*) { order_row(s, from, to); }

// Rows of keys or queries: norm, weight, bias, rotation. `wide` has 2 N floats.
template <class T>
static void key_rows(const Mamba3Shape& s, const T* raw, int64_t raw_stride, const float* inverse, const float* weight,
                     const float* bias, int64_t group, const float* cosine, const float* sine, int64_t tokens, float* to,
                     float* wide) {
  const int64_t N = s.d_state, A = s.angles, width = padded(A);
  float* row = wide + N;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < s.ranks; ++r, to += N) {
      const int64_t at = r * s.groups + group;
      order_row(s, raw + t * raw_stride + at * N, row, wide);
      const float scale = inverse[t * s.ranks * s.groups + at];
      const float* shift = bias + r * N;
      for (int64_t n = 0; n < N; ++n) to[n] = row[n] * scale * weight[n] + shift[n];
      const float *c = cosine + t * width, *d = sine + t * width;
      for (int64_t i = 0; i < A; ++i) {
        const float first = to[i], second = to[A + i];
        to[i] = first * c[i] - second * d[i];
        to[A + i] = first * d[i] + second * c[i];
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
// Queries are left out when `queries` is false. `wide` has 2 N + P floats.
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
  float* x = wide + 2 * s.d_state;
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
