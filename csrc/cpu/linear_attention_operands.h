// q and k of one chunk as the kernels of linear attention multiply them: the tensors' rows, or the features
// made of them. Included by kernels only, once per level.
//
// With hedgehog_exp, log phi(q) = [uq, -uq] and log phi(k) meet through a scale m, the largest log phi(k) so
// far: for the state at the chunk's start its own scale, inside the chunk m' = max(m, the chunk's keys):
//
//   q S:    e^{log phi(q) + m - shift} S          q . k:  e^{log phi(q) + m' - shift} . e^{log phi(k) - m'}
//   S <-    e^{m - m'} S + K^T V
//
// m' holds keys that an early query of the chunk does not see. It cancels, but where all keys that the query
// sees lie far below, float32 cannot hold the factors: such a query ("far") is scored directly, one
// exponential for each feature and key.
#pragma once

#include "feature_maps.h"
#include "linear_attention_kernels.h"

namespace seqmodels {
namespace SEQMODELS_LEVEL {

struct Operands {
  float *q, *k, *kt;  // rows of N; kt transposed
  float* state_q;     // what reads the state: q, or with a scale its own rows
  float *x = nullptr, *uq = nullptr, *uk = nullptr, *ukt = nullptr, *row = nullptr;  // with a map
  float *log_q = nullptr, *log_k = nullptr;                                          // with a scale, like these:
  float *scale = nullptr, *kept = nullptr;                                           // m'; e^{m - m'}
  float* shift = nullptr;                                                            // for each row
  bool far[kChunkRows];

  Operands(Arena& arena, const LinearAttentionShape& s) {
    const int64_t key_width = padded(s.key_dim);
    q = arena.take(kChunkRows * key_width + 16);
    k = arena.take(kChunkRows * key_width + 16);
    kt = arena.take(kChunkRows * key_width);
    state_q = q;
    if (s.map == FeatureMap::none) return;
    const int64_t width = padded(s.map_width);
    x = arena.take(kChunkRows * padded(s.depth));
    uq = arena.take(kChunkRows * width);
    uk = arena.take(kChunkRows * width);
    ukt = arena.take(kChunkRows * width);
    row = arena.take(width + 32);
    shift = arena.take(kChunkRows);
    if (!s.scaled()) return;
    log_q = arena.take(kChunkRows * key_width);
    log_k = arena.take(kChunkRows * key_width);
    state_q = arena.take(kChunkRows * key_width);
    scale = arena.take(key_width);
    kept = arena.take(key_width);
  }
};

// u of a group's rows, and its features but for a scale.
template <class T>
static void load_mapped(const LinearAttentionShape& s, const T* tensor, int64_t tensor_groups, const float* weight,
                        int64_t groups, int64_t group, int64_t row0, int64_t rows, const Operands& o, float* u,
                        float* phi, float* log_phi) {
  const int64_t stride = tensor_groups * s.depth;
  const T* from = tensor + row0 * stride + group * tensor_groups / groups * s.depth;
  const float* matrix = weight ? weight + group * s.depth * padded(s.map_width) : nullptr;
  project(from, stride, rows, s.depth, matrix, s.map_width, o.x, u);
  if (s.scaled()) {
    exponents(u, s.map_width, rows, log_phi);
  } else {
    map_rows(s.map, u, s.map_width, rows, phi, s.key_dim, o.row);
  }
}

template <class T>
static void load_queries(const LinearAttentionInputs<T>& in, int64_t group, int64_t row0, int64_t rows, Operands& o) {
  const LinearAttentionShape& s = in.shape;
  if (s.map == FeatureMap::none) {
    const int64_t stride = s.query_groups * s.key_dim;
    return copy_rows(in.q + row0 * stride + group * s.key_dim, stride, rows, s.key_dim, o.q, padded(s.key_dim));
  }
  load_mapped(s, in.q, s.query_tensor_groups, in.query_weight, s.query_groups, group, row0, rows, o, o.uq, o.q,
              o.log_q);
}

template <class T>
static void load_keys(const LinearAttentionInputs<T>& in, int64_t group, int64_t row0, int64_t rows, Operands& o) {
  const LinearAttentionShape& s = in.shape;
  if (s.map == FeatureMap::none) {
    const int64_t stride = s.key_groups * s.key_dim;
    return copy_rows(in.k + row0 * stride + group * s.key_dim, stride, rows, s.key_dim, o.k, padded(s.key_dim));
  }
  load_mapped(s, in.k, s.key_tensor_groups, in.key_weight, s.key_groups, group, row0, rows, o, o.uk, o.k, o.log_k);
}

// k transposed; with Taylor u instead, which is what its scores are made of.
[[maybe_unused]] static void transpose_keys(const LinearAttentionShape& s, int64_t rows, Operands& o) {
  const int64_t key_width = padded(s.key_dim), width = padded(s.map_width);
  transpose(o.k, key_width, round_up(rows, 8), key_width, o.kt, kChunkRows);
  if (s.map == FeatureMap::taylor) transpose(o.uk, width, round_up(rows, 8), width, o.ukt, kChunkRows);
}

// k relative to m', and what is left of the state: from log_k and the scale at the chunk's start.
[[maybe_unused]] static void scale_keys(const LinearAttentionShape& s, const float* scale, int64_t rows, Operands& o) {
  const int64_t key_width = padded(s.key_dim);
  raise_scale(o.log_k, rows, key_width, scale, o.scale);
  for (int64_t n = 0; n < key_width; n += kLanes) store(o.kept + n, exp(load(scale + n) - load(o.scale + n)));
  for (int64_t i = 0; i < rows; ++i) {
    relative(o.log_k + i * key_width, o.scale, -1.0f, 0.0f, key_width, o.k + i * key_width);
  }
  std::fill(o.k + rows * key_width, o.k + round_up(rows, 8) * key_width, 0.0f);
}

// q and state_q of one row from its shift; a far row has no q.
[[maybe_unused]] static void scale_query(const LinearAttentionShape& s, const float* scale, int64_t row, Operands& o) {
  const int64_t key_width = padded(s.key_dim), at = row * key_width;
  if (o.far[row]) {
    std::fill(o.q + at, o.q + at + key_width, 0.0f);
    return relative(o.log_q + at, scale, 1.0f, o.shift[row], key_width, o.state_q + at);
  }
  relative(o.log_q + at, o.scale, 1.0f, o.shift[row], key_width, o.q + at);
  for (int64_t n = 0; n < key_width; n += kLanes) store(o.state_q + at + n, load(o.q + at + n) * load(o.kept + n));
}

// Shifts of all rows, such that the largest feature of each is 1: relative to m', or, for a far row, to the
// maximum of the keys that it sees. `running` is scratch of N floats.
[[maybe_unused]] static void scale_queries(const LinearAttentionShape& s, const float* scale, int64_t rows, Operands& o,
                                           float* running) {
  const int64_t key_width = padded(s.key_dim);
  std::copy(scale, scale + key_width, running);
  for (int64_t i = 0; i < rows; ++i) {
    const float* query = o.log_q + i * key_width;
    raise_scale(o.log_k + i * key_width, 1, key_width, running, running);
    const float seen = largest(query, running, key_width), all = largest(query, o.scale, key_width);
    o.far[i] = all - seen > kTooFarBelow;
    o.shift[i] = o.far[i] ? seen : all;
    scale_query(s, scale, i, o);
  }
  const int64_t end = round_up(rows, 8) * key_width;
  std::fill(o.q + rows * key_width, o.q + end, 0.0f);
  std::fill(o.state_q + rows * key_width, o.state_q + end, 0.0f);
}

// The same from the logarithms of the divisors that the forward kept: weights then sum to 1.
[[maybe_unused]] static void normalized_queries(const LinearAttentionShape& s, const float* scale, int64_t rows,
                                                const float* divisors, int64_t stride, Operands& o) {
  const int64_t key_width = padded(s.key_dim);
  for (int64_t i = 0; i < rows; ++i) {
    o.shift[i] = divisors[i * stride];
    o.far[i] = largest(o.log_q + i * key_width, o.scale, key_width) - o.shift[i] > kTooFarBelow;
    scale_query(s, scale, i, o);
  }
  const int64_t end = round_up(rows, 8) * key_width;
  std::fill(o.q + rows * key_width, o.q + end, 0.0f);
  std::fill(o.state_q + rows * key_width, o.state_q + end, 0.0f);
}

// q . k for all pairs j <= i of the chunk. With Taylor s = u . u / sqrt(f) is kept in `raw` where it is given.
[[maybe_unused]] static void chunk_scores(const LinearAttentionShape& s, int64_t rows, const Operands& o, float* scores,
                                          float* raw = nullptr) {
  const int64_t key_width = padded(s.key_dim);
  if (s.map != FeatureMap::taylor) {
    lower_scores(o.q, o.kt, rows, s.ranks, s.key_dim, key_width, scores);
    if (!s.scaled()) return;
    for (int64_t i = 0; i < rows; ++i) {
      if (!o.far[i]) continue;
      for (int64_t j = 0; j <= i; ++j) {
        scores[i * kChunkRows + j] =
            direct_score(o.log_q + i * key_width, o.log_k + j * key_width, o.shift[i], key_width);
      }
    }
    return;
  }
  lower_scores(o.uq, o.ukt, rows, s.ranks, s.map_width, padded(s.map_width), scores);
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.map_width));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j <= i; j += kLanes) {
      const int64_t at = i * kChunkRows + j;
      const Vec product = load(scores + at) * scale;
      if (raw) store(raw + at, product);
      store(scores + at, product * product * 0.5f + product + 1.0f);
    }
  }
}

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels
