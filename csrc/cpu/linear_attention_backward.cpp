// Linear attention with per-head scalar decay: backward.
//
// With the forward's names (linear_attention.cpp), D = dL/dS at the chunk's end and dY the
// gradient of the outputs, for one head and one chunk:
//
//   dA = dY V^T on and below the diagonal;  dC[i][j] = dA e^{c_i - c_j} W_j (diagonal_i for j = i)
//   dQ = dC K + e^{c_i} dY S^T              dK = dC^T Q + e^{c_T - c_j} W_j V D^T
//   dV = A^T dY + e^{c_T - c_j} W_j K D     D <- e^{c_T} D + (e^{c_i} Q)^T dY
//
// and with E = A * dA below the diagonal, t_i = e^{c_i} q_i . S dy_i, u_j = e^{c_T-c_j} W_j k_j . D v_j:
//
//   dc_i = sum_j E[i][j] - sum_j E[j][i] + t_i - u_i,   dc_T += sum_j u_j + e^{c_T} <S, D>
//   d log_decay_i = sum_{i' >= i} dc_i'
//
// The normaliser is one more column of V (all ones) and of dY (the gradient of the divisor), so
// that it needs no formula of its own: all sums over P run over P + 1.
//
// Tiling. Nothing of the forward is kept but y and the divisors. For a block of up to kHeadBlock
// heads, first S at every chunk's start and D at every chunk's end (a task each for document, head
// and slice of P), then all chunks at once. S and D are stored transposed (P x N), so that every
// product has its long side along vectors. dC is summed over the heads that share q and k before
// it meets them: two products a group, not a head. Blocks of heads follow one another, which gives
// sums over heads one order for any number of threads.
#include "linear_attention_gradients.h"

namespace seqmodels {
namespace SEQMODELS_LEVEL {

// dY; with the normaliser divided by the divisor, and the divisor's gradient -dY . y / divisor behind it.
template <class T>
static void load_gradients(const LinearAttentionShape& s, const LinearAttentionGradients<T>& out, int64_t row0,
                           int64_t rows, int64_t head, float* dy) {
  const int64_t stride = s.heads * s.value_dim, width = padded(s.state_width());
  copy_rows(out.grad_y + row0 * stride + head * s.value_dim, stride, rows, s.value_dim, dy, width);
  if (!s.normalize) return;
  for (int64_t row = 0; row < rows; ++row) {
    float* gradient = dy + row * width;
    const T* y = out.y + (row0 + row) * stride + head * s.value_dim;
    // With a scale the weights are made to sum to 1, and nothing is left to divide by.
    const float inverse = s.scaled() ? 1.0f : 1.0f / out.denominator[(row0 + row) * s.heads + head];
    Vec dot{};
    for (int64_t p = 0; p < s.value_dim; p += kLanes) {
      const Vec scaled = load(gradient + p) * inverse;
      dot += scaled * (p + kLanes <= s.value_dim ? load(y + p) : load(y + p, s.value_dim - p));
      store(gradient + p, scaled);
    }
    gradient[s.value_dim] = -sum(dot);
  }
}

// to[p][n] = carry from[p][n] + sum over rows of weight_row x[row][p] y[row][n], p in [begin, end). With a scale
// kept[n] takes the place of carry.
static void advance(const float* x, const float* weights, int64_t width, const float* y, int64_t key_width,
                    int64_t rows, float carry, const float* kept, int64_t begin, int64_t end, const float* from,
                    float* to, float* weighted) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* from_row = x + row * width;
    for (int64_t p = 0; p < width; p += kLanes) store(weighted + row * width + p, load(from_row + p) * weights[row]);
  }
  for_tiles(end - begin, key_width, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
    tile.template add_product<Order::columns>(weighted + begin + row, width, y + column, key_width, 0, rows);
    for_vectors(tile, begin + row, column, [&](int64_t p, int64_t n, Vec value) {
      const Vec keep = kept ? load(kept + n) : broadcast(carry);
      store(to + p * key_width + n, load(from + p * key_width + n) * keep + value);
    });
  });
}

template <class T>
static void start_states(const LinearAttentionInputs<T>& in, const Document& document, int64_t head, int64_t row_begin,
                         int64_t row_end, float* states, int64_t stride, float* scratch) {
  const LinearAttentionShape& s = in.shape;
  const int64_t key_width = padded(s.key_dim), width = padded(s.state_width());
  Arena arena(scratch);
  Operands o(arena, s);
  float* v = arena.take(kChunkRows * width);
  ChunkWeights w;
  // The last chunk's end is nobody's start, but its scale is that of the final state.
  const int64_t length = s.scaled() ? document.length : document.length - s.chunk_tokens;
  for (int64_t begin = 0; begin < length; begin += s.chunk_tokens, states += stride) {
    const int64_t token = document.start + begin, tokens = std::min(s.chunk_tokens, document.length - begin);
    const int64_t row0 = token * s.ranks, rows = tokens * s.ranks;
    load_keys(in, s.key_group(head), row0, rows, o);
    if (s.scaled()) {
      scale_keys(s, states + backward_scale(s), rows, o);
      std::copy(o.scale, o.scale + key_width, states + stride + backward_scale(s));
    }
    load_values(in, row0, rows, head, v);
    chunk_weights(in, token, tokens, head, w);
    advance(v, w.stored, width, o.k, key_width, rows, w.carry, s.scaled() ? o.kept : nullptr, row_begin, row_end,
            states, states + stride, v);
  }
}

// What reads the state of a chunk, from the scales at its start and (one stride on) at its end.
template <class T>
static void state_queries(const LinearAttentionInputs<T>& in, const LinearAttentionGradients<T>& out,
                          const float* scale, int64_t stride, int64_t row0, int64_t rows, int64_t head, Operands& o) {
  const LinearAttentionShape& s = in.shape;
  const int64_t key_width = padded(s.key_dim);
  for (int64_t n = 0; n < key_width; n += kLanes) {
    store(o.kept + n, exp(load(scale + n) - load(scale + stride + n)));
  }
  for (int64_t i = 0; i < rows; ++i) {
    relative(o.log_q + i * key_width, scale, 1.0f, out.denominator[(row0 + i) * s.heads + head], key_width,
             o.state_q + i * key_width);
  }
  std::fill(o.state_q + rows * key_width, o.state_q + round_up(rows, 8) * key_width, 0.0f);
}

template <class T>
static void end_gradients(const LinearAttentionInputs<T>& in, const LinearAttentionGradients<T>& out,
                          const Document& document, int64_t head, int64_t row_begin, int64_t row_end, float* states,
                          int64_t stride, float* scratch) {
  const LinearAttentionShape& s = in.shape;
  const int64_t key_width = padded(s.key_dim), width = padded(s.state_width());
  Arena arena(scratch);
  Operands o(arena, s);
  float* dy = arena.take(kChunkRows * width);
  ChunkWeights w;
  for (int64_t chunk = s.chunks(document.length) - 1; chunk >= 0; --chunk) {
    const int64_t begin = chunk * s.chunk_tokens, tokens = std::min(s.chunk_tokens, document.length - begin);
    const int64_t token = document.start + begin, row0 = token * s.ranks, rows = tokens * s.ranks;
    float* to = states + chunk * stride;
    load_queries(in, s.query_group(head), row0, rows, o);
    if (s.scaled()) state_queries(in, out, to + backward_scale(s), stride, row0, rows, head, o);
    load_gradients(s, out, row0, rows, head, dy);
    chunk_weights(in, token, tokens, head, w);
    advance(dy, w.from_start, width, o.state_q, key_width, rows, w.carry, s.scaled() ? o.kept : nullptr, row_begin,
            row_end, to + stride, to, dy);
  }
}

// A and the sums that need every pair of rows of one token's row block of the scores.
struct PairSums {
  float later[kChunkRows];  // for row j: sum_i e^{c_i - c_j} (q_i . k_j) dA[i][j], i > j
  double earlier, own;      // for the token: sum_j E[i][j]; sum of (q_i . k_i) dA[i][i]
};

static void backward_pairs(const ChunkWeights& w, int64_t token, const float* scores, const float* da, float* a,
                           float* dscores, PairSums& sums) {
  const int64_t first = token * w.ranks, end = first + w.ranks;
  Vec earlier{}, own{};
  for (int64_t column = 0; column < kChunkRows; column += kLanes) {
    if (column >= end) {
      for (int64_t row = first; row < end; ++row) store(a + row * kChunkRows + column, Vec{});
      continue;
    }
    const VecInt lane = iota() + static_cast<int32_t>(column);
    const VecInt is_earlier = lane < static_cast<int32_t>(first), is_visible = lane < static_cast<int32_t>(end);
    const Vec decay = is_earlier ? (column < first ? decay_row(w, first, column) : Vec{}) : Vec{};
    const Vec past = load(w.past + column);
    const Vec weight = is_earlier ? decay * past : (is_visible ? broadcast(w.diagonal[token]) : Vec{});
    Vec later = load(sums.later + column);
    for (int64_t row = first; row < end; ++row) {
      const int64_t at = row * kChunkRows + column;
      const Vec score = is_visible ? load(scores + at) : Vec{}, gradient = is_visible ? load(da + at) : Vec{};
      const Vec product = score * gradient, decayed = decay * product;
      later += decayed;
      earlier += decayed * past;
      own += is_earlier ? Vec{} : product;
      store(a + at, weight * score);
      store(dscores + at, load(dscores + at) + weight * gradient);
    }
    store(sums.later + column, later);
  }
  sums.earlier = sum(earlier), sums.own = sum(own);
}

// What one head needs of q and k, and what all heads of a pair of groups share.
struct Shared {
  Operands o;
  float *dq, *dk;                 // of the features; of log phi with a scale
  float *duq, *duk, *raw;         // with a map; raw scores with Taylor
  float *scores, *dscores;
  int64_t query_group = -1, key_group = -1;

  Shared(Arena& arena, const LinearAttentionShape& s) : o(arena, s) {
    dq = arena.take(kChunkRows * padded(s.key_dim) + 16);
    dk = arena.take(kChunkRows * padded(s.key_dim) + 16);
    scores = arena.take(kChunkRows * kChunkRows);
    dscores = arena.take(kChunkRows * kChunkRows);
    if (s.map == FeatureMap::none) return;
    duq = arena.take(kChunkRows * padded(s.map_width) + 16);
    duk = arena.take(kChunkRows * padded(s.map_width) + 16);
    raw = arena.take(kChunkRows * kChunkRows);
  }
};

// dQ += dC K, times `factor` element by element where it is given, and dK += dC^T Q.
static void add_score_gradients(const float* dscores, const float* q, const float* k, int64_t rows, int64_t ranks,
                                int64_t width, const float* factor, float* dq, float* dk) {
  for_tiles(rows, width, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
    tile.template add_product<Order::rows>(dscores + row * kChunkRows, kChunkRows, k + column, width, 0,
                                           visible_end(row, rows, ranks));
    for_vectors(tile, row, column, [&](int64_t r, int64_t n, Vec value) {
      if (factor) value *= load(factor + r * width + n);
      store(dq + r * width + n, load(dq + r * width + n) + value);
    });
  });
  for_tiles(rows, width, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
    tile.template add_product<Order::columns>(dscores + row, kChunkRows, q + column, width, row / ranks * ranks, rows);
    for_vectors(tile, row, column, [&](int64_t r, int64_t n, Vec value) {
      store(dk + r * width + n, load(dk + r * width + n) + value);
    });
  });
}

// Gradients of q and k by way of the scores, when the last head of a pair of groups is done. With Taylor they
// are those of u: d(1 + s + s^2 / 2) = (1 + s) ds.
static void finish_pair(const LinearAttentionShape& s, const Shared& shared, int64_t rows) {
  const Operands& o = shared.o;
  const int64_t key_width = padded(s.key_dim);
  if (s.map == FeatureMap::taylor) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(s.map_width));
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j <= i; j += kLanes) {
        const int64_t at = i * kChunkRows + j;
        const Vec gradient = load(shared.dscores + at) * (load(shared.raw + at) + 1.0f) * scale;
        store(shared.dscores + at, first_lanes(gradient, i + 1 - j));
      }
    }
    return add_score_gradients(shared.dscores, o.uq, o.uk, rows, s.ranks, padded(s.map_width), nullptr, shared.duq,
                               shared.duk);
  }
  add_score_gradients(shared.dscores, o.q, o.k, rows, s.ranks, key_width, s.scaled() ? o.q : nullptr, shared.dq,
                      shared.dk);
  if (!s.scaled()) return;
  for (int64_t at = 0; at < rows * key_width; at += kLanes) {
    store(shared.dk + at, load(shared.dk + at) * load(o.k + at));
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; o.far[i] && j <= i; ++j) {  // what chunk_scores summed directly
      const float gradient = shared.dscores[i * kChunkRows + j];
      for (int64_t n = 0; n < key_width; n += kLanes) {
        float *dq = shared.dq + i * key_width + n, *dk = shared.dk + j * key_width + n;
        const Vec both = load(o.log_q + i * key_width + n) + load(o.log_k + j * key_width + n);
        const Vec term = exp(both - o.shift[i]) * gradient;
        store(dq, load(dq) + term);
        store(dk, load(dk) + term);
      }
    }
  }
}

template <class T>
static void backward(const LinearAttentionInputs<T>& in, const LinearAttentionGradients<T>& out, int64_t token,
                     int64_t tokens, int64_t first, int64_t last, const float* states, const float* grad_states,
                     float* scratch) {
  const LinearAttentionShape& s = in.shape;
  const int64_t key_width = padded(s.key_dim), width = padded(s.state_width()), depth = s.state_width();
  const int64_t rows = tokens * s.ranks, row0 = token * s.ranks, columns = round_up(rows, kLanes);
  const int64_t state_size = backward_state_size(s), value_stride = s.heads * s.value_dim;
  const int64_t gradient_width = s.gradient_width();
  const int64_t query_stride = s.query_groups * gradient_width, key_stride = s.key_groups * gradient_width;
  Arena arena(scratch);
  Shared shared(arena, s);
  Operands& o = shared.o;
  float* v = arena.take(kChunkRows * width);
  float* vt = arena.take(kChunkRows * width);
  float* dy = arena.take(kChunkRows * width);
  float* dv = arena.take(kChunkRows * width);
  float* dvt = arena.take(kChunkRows * width);
  float* a = arena.take(kChunkRows * kChunkRows);
  float* da = arena.take(kChunkRows * kChunkRows);
  float* from_state = arena.take(kChunkRows * kLanes);  // t, a vector for each row
  float* into_state = arena.take(kChunkRows);           // k_j . D v_j
  ChunkWeights w;
  PairSums sums;
  double dc[kChunkRows];

  const auto finish = [&](int64_t query_group, int64_t key_group) {
    if (shared.query_group < 0) return;
    finish_pair(s, shared, rows);
    if (query_group != shared.query_group) {
      const int64_t at = row0 * query_stride + shared.query_group * gradient_width;
      const bool add = shared.query_group * (s.heads / s.query_groups) < first;
      float* sums = out.sum_q ? out.sum_q + at : nullptr;
      finish_group(s, rows, o.uq, o.q, shared.dq, shared.duq, o.row, out.grad_q + at, sums, query_stride, add);
    }
    if (key_group != shared.key_group) {
      const int64_t at = row0 * key_stride + shared.key_group * gradient_width;
      const bool add = shared.key_group * (s.heads / s.key_groups) < first;
      float* sums = out.sum_k ? out.sum_k + at : nullptr;
      finish_group(s, rows, o.uk, o.k, shared.dk, shared.duk, o.row, out.grad_k + at, sums, key_stride, add);
    }
  };

  for (int64_t head = first; head < last; ++head) {
    const int64_t query_group = s.query_group(head), key_group = s.key_group(head);
    if (query_group != shared.query_group || key_group != shared.key_group) {
      finish(query_group, key_group);
      if (query_group != shared.query_group) {
        load_queries(in, query_group, row0, rows, o);
        std::fill(shared.dq, shared.dq + kChunkRows * key_width, 0.0f);
        if (s.map != FeatureMap::none) std::fill(shared.duq, shared.duq + kChunkRows * padded(s.map_width) + 16, 0.0f);
      }
      if (key_group != shared.key_group) {
        load_keys(in, key_group, row0, rows, o);
        std::fill(shared.dk, shared.dk + kChunkRows * key_width, 0.0f);
        if (s.map != FeatureMap::none) std::fill(shared.duk, shared.duk + kChunkRows * padded(s.map_width) + 16, 0.0f);
        if (s.scaled()) {  // then every head is a group
          const float* scale = states + (head - first) * state_size + backward_scale(s);
          scale_keys(s, scale, rows, o);
          normalized_queries(s, scale, rows, out.denominator + row0 * s.heads + head, s.heads, o);
        }
        transpose_keys(s, rows, o);
      }
      shared.query_group = query_group, shared.key_group = key_group;
      chunk_scores(s, rows, o, shared.scores, s.map == FeatureMap::taylor ? shared.raw : nullptr);
      std::fill(shared.dscores, shared.dscores + kChunkRows * kChunkRows, 0.0f);
    }
    const float* S = states + (head - first) * state_size;
    const float* D = grad_states + (head - first) * state_size;
    load_values(in, row0, rows, head, v);
    transpose(v, width, round_up(rows, 8), width, vt, kChunkRows);
    load_gradients(s, out, row0, rows, head, dy);
    chunk_weights(in, token, tokens, head, w);

    // dA, then A and dC row by row.
    for_tiles(rows, columns, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
      if (column >= visible_end(row, rows, s.ranks)) return;
      tile.template add_product<Order::rows>(dy + row * width, width, vt + column, kChunkRows, 0, depth);
      for_vectors(tile, row, column, [&](int64_t r, int64_t j, Vec value) { store(da + r * kChunkRows + j, value); });
    });
    std::fill(sums.later, sums.later + kChunkRows, 0.0f);
    for (int64_t t = 0; t < tokens; ++t) {
      backward_pairs(w, t, shared.scores, da, a, shared.dscores, sums);
      dc[t] = sums.earlier;
      if (out.grad_diagonal) out.grad_diagonal[(token + t) * s.heads + head] = static_cast<float>(sums.own);
    }

    // dV, transposed: rows of P, columns of tokens.
    std::fill(into_state, into_state + kChunkRows, 0.0f);
    for_tiles(depth, columns, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
      tile.template add_product<Order::rows>(D + row * key_width, key_width, o.kt + column, kChunkRows, 0,
                                             s.key_dim);
      for_vectors(tile, row, column, [&](int64_t p, int64_t j, Vec value) {
        store(into_state + j, load(into_state + j) + load(vt + p * kChunkRows + j) * value);
      });
      for (int r = 0; r < kTileRows; ++r) {
        for (int vector = 0; vector < tile.vectors; ++vector) {
          tile.value[r][vector] *= load(w.stored + column + vector * kLanes);
        }
      }
      tile.template add_product<Order::columns>(dy + row, width, a + column, kChunkRows, column / s.ranks * s.ranks,
                                                rows);
      for_vectors(tile, row, column, [&](int64_t p, int64_t j, Vec value) { store(dvt + p * kChunkRows + j, value); });
    });
    transpose(dvt, kChunkRows, round_up(s.value_dim, 8), round_up(rows, 8), dv, width);
    write_rows<T>(dv, width, rows, s.value_dim, out.grad_v + row0 * value_stride + head * s.value_dim, nullptr,
                  value_stride, false);

    // What passes through the states.
    std::fill(from_state, from_state + kChunkRows * kLanes, 0.0f);
    for_tiles(rows, key_width, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
      tile.template add_product<Order::rows>(dy + row * width, width, S + column, key_width, 0, depth);
      for_vectors(tile, row, column, [&](int64_t r, int64_t n, Vec value) {
        value *= w.from_start[r];
        const int64_t at = r * key_width + n;
        const Vec product = value * load(o.state_q + at);
        store(from_state + r * kLanes, load(from_state + r * kLanes) + product);
        store(shared.dq + at, load(shared.dq + at) + (s.scaled() ? product : value));
      });
    });
    for_tiles(rows, key_width, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
      tile.template add_product<Order::rows>(v + row * width, width, D + column, key_width, 0, depth);
      for_vectors(tile, row, column, [&](int64_t r, int64_t n, Vec value) {
        const int64_t at = r * key_width + n;
        store(shared.dk + at, load(shared.dk + at) + value * w.stored[r]);
      });
    });

    double carried = 0;
    for (int64_t p = 0; p < depth; ++p) {
      Vec dot{};
      for (int64_t n = 0; n < key_width; n += kLanes) dot += load(S + p * key_width + n) * load(D + p * key_width + n);
      carried += sum(dot);
    }
    double stored = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      double past = 0;
      for (int64_t row = t * s.ranks; row < (t + 1) * s.ranks; ++row) {
        const double out_of_row = sums.later[row] + double{w.to_end[row]} * into_state[row];
        past += out_of_row;
        dc[t] += sum(load(from_state + row * kLanes)) - w.past[row] * out_of_row;
        stored += double{w.stored[row]} * into_state[row];
      }
      if (out.grad_past) out.grad_past[(token + t) * s.heads + head] = static_cast<float>(past);
    }
    if (out.grad_log_decay) {
      double sum = stored + w.carry * carried;
      for (int64_t t = tokens - 1; t >= 0; --t) {
        sum += dc[t];
        out.grad_log_decay[(token + t) * s.heads + head] = static_cast<float>(sum);
      }
    }
  }
  finish(-1, -1);
}

#define SEQMODELS_INSTANTIATE(T)                                                                                     \
  void linear_attention_start_states_##T(const LinearAttentionInputs<T>& in, const Document& document, int64_t head, \
                                         int64_t row_begin, int64_t row_end, float* states, int64_t stride,          \
                                         float* scratch) {                                                           \
    start_states<T>(in, document, head, row_begin, row_end, states, stride, scratch);                                \
  }                                                                                                                  \
  void linear_attention_end_gradients_##T(const LinearAttentionInputs<T>& in, const LinearAttentionGradients<T>& out,\
                                          const Document& document, int64_t head, int64_t row_begin,                 \
                                          int64_t row_end, float* states, int64_t stride, float* scratch) {          \
    end_gradients<T>(in, out, document, head, row_begin, row_end, states, stride, scratch);                          \
  }                                                                                                                  \
  void linear_attention_backward_##T(const LinearAttentionInputs<T>& in, const LinearAttentionGradients<T>& out,     \
                                     int64_t token, int64_t tokens, int64_t first, int64_t last,                     \
                                     const float* states, const float* grad_states, float* scratch) {                \
    backward<T>(in, out, token, tokens, first, last, states, grad_states, scratch);                                  \
  }
SEQMODELS_INSTANTIATE(float)
SEQMODELS_INSTANTIATE(bfloat16)
#undef SEQMODELS_INSTANTIATE

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels

#if SEQMODELS_LAUNCHERS

#include "linear_attention_backward_launch.h"

namespace seqmodels {
namespace {

using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SevenTensors linear_attention_backward_cpu(Tensor grad_y, Tensor grad_final_state, Tensor q, Tensor k, Tensor v,
                                           std::optional<Tensor> log_decay, std::optional<Tensor> past,
                                           std::optional<Tensor> diagonal, std::optional<Tensor> initial_state,
                                           std::optional<Tensor> starts, std::optional<Tensor> lengths, bool normalize,
                                           double epsilon, Tensor y, Tensor denominator) {
  const Tensors tensors(q, k, v, log_decay, past, diagonal, initial_state, normalize, epsilon);
  const Documents documents(v.size(0), v.size(1), starts, lengths);
  Gradients grad = differentiate(tensors, documents, grad_y, grad_final_state, y, denominator);
  return {grad.q, grad.k, grad.v, grad.log_decay, grad.past, grad.diagonal, grad.initial};
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cpu, m) {
  m.def(
      "linear_attention_backward(Tensor grad_y, Tensor grad_final_state, Tensor q, Tensor k, Tensor v, "
      "Tensor? log_decay, Tensor? past_weight, Tensor? diagonal_weight, Tensor? initial_state, Tensor? starts, "
      "Tensor? lengths, bool normalize, float epsilon, Tensor y, Tensor denominator) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CPU, m) {
  m.impl("linear_attention_backward", TORCH_BOX(&seqmodels::linear_attention_backward_cpu));
}

#endif
