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
#include "linear_attention_kernels.h"

#include "linear_attention_tile.h"

namespace seqmodels {
namespace SEQMODELS_LEVEL {

// V with a column of ones for the normaliser.
template <class T>
static void load_values(const LinearAttentionInputs<T>& in, int64_t row0, int64_t rows, int64_t head, float* v) {
  const LinearAttentionShape& s = in.shape;
  const int64_t stride = s.heads * s.value_dim, width = padded(s.state_width());
  copy_rows(in.v + row0 * stride + head * s.value_dim, stride, rows, s.value_dim, v, width);
  if (!s.normalize) return;
  for (int64_t row = 0; row < rows; ++row) v[row * width + s.value_dim] = 1.0f;
}

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
    const float inverse = 1.0f / out.denominator[(row0 + row) * s.heads + head];
    Vec dot{};
    for (int64_t p = 0; p < s.value_dim; p += kLanes) {
      const Vec scaled = load(gradient + p) * inverse;
      dot += scaled * (p + kLanes <= s.value_dim ? load(y + p) : load(y + p, s.value_dim - p));
      store(gradient + p, scaled);
    }
    gradient[s.value_dim] = -sum(dot);
  }
}

// to[p][n] = carry from[p][n] + sum over rows of weight_row x[row][p] y[row][n], p in [begin, end).
static void advance(const float* x, const float* weights, int64_t width, const float* y, int64_t key_width,
                    int64_t rows, float carry, int64_t begin, int64_t end, const float* from, float* to,
                    float* weighted) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* from_row = x + row * width;
    for (int64_t p = 0; p < width; p += kLanes) store(weighted + row * width + p, load(from_row + p) * weights[row]);
  }
  for_tiles(end - begin, key_width, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
    tile.template add_product<Order::columns>(weighted + begin + row, width, y + column, key_width, 0, rows);
    for_vectors(tile, begin + row, column, [&](int64_t p, int64_t n, Vec value) {
      store(to + p * key_width + n, load(from + p * key_width + n) * carry + value);
    });
  });
}

template <class T>
static void start_states(const LinearAttentionInputs<T>& in, const Document& document, int64_t head, int64_t row_begin,
                         int64_t row_end, float* states, int64_t stride, float* scratch) {
  const LinearAttentionShape& s = in.shape;
  const int64_t key_width = padded(s.key_dim), width = padded(s.state_width()), key_stride = s.key_groups * s.key_dim;
  Arena arena(scratch);
  float* k = arena.take(kChunkRows * key_width);
  float* v = arena.take(kChunkRows * width);
  ChunkWeights w;
  // The last chunk's end is nobody's start.
  for (int64_t begin = 0; begin + s.chunk_tokens < document.length; begin += s.chunk_tokens, states += stride) {
    const int64_t token = document.start + begin, row0 = token * s.ranks, rows = s.chunk_tokens * s.ranks;
    copy_rows(in.k + row0 * key_stride + s.key_group(head) * s.key_dim, key_stride, rows, s.key_dim, k, key_width);
    load_values(in, row0, rows, head, v);
    chunk_weights(in, token, s.chunk_tokens, head, w);
    advance(v, w.stored, width, k, key_width, rows, w.carry, row_begin, row_end, states, states + stride, v);
  }
}

template <class T>
static void end_gradients(const LinearAttentionInputs<T>& in, const LinearAttentionGradients<T>& out,
                          const Document& document, int64_t head, int64_t row_begin, int64_t row_end, float* states,
                          int64_t stride, float* scratch) {
  const LinearAttentionShape& s = in.shape;
  const int64_t key_width = padded(s.key_dim), width = padded(s.state_width()), stride_q = s.query_groups * s.key_dim;
  Arena arena(scratch);
  float* q = arena.take(kChunkRows * key_width);
  float* dy = arena.take(kChunkRows * width);
  ChunkWeights w;
  for (int64_t chunk = s.chunks(document.length) - 1; chunk >= 0; --chunk) {
    const int64_t begin = chunk * s.chunk_tokens, tokens = std::min(s.chunk_tokens, document.length - begin);
    const int64_t token = document.start + begin, row0 = token * s.ranks, rows = tokens * s.ranks;
    copy_rows(in.q + row0 * stride_q + s.query_group(head) * s.key_dim, stride_q, rows, s.key_dim, q, key_width);
    load_gradients(s, out, row0, rows, head, dy);
    chunk_weights(in, token, tokens, head, w);
    float* to = states + chunk * stride;
    advance(dy, w.from_start, width, q, key_width, rows, w.carry, row_begin, row_end, to + stride, to, dy);
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
  float *q, *k, *kt, *dq, *dk, *scores, *dscores;
  int64_t query_group = -1, key_group = -1;
};

// dQ += dC K and dK += dC^T Q, when the last head of a pair of groups is done.
static void finish_pair(const Shared& shared, int64_t rows, int64_t ranks, int64_t key_width) {
  for_tiles(rows, key_width, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
    tile.template add_product<Order::rows>(shared.dscores + row * kChunkRows, kChunkRows, shared.k + column, key_width,
                                           0, visible_end(row, rows, ranks));
    for_vectors(tile, row, column, [&](int64_t r, int64_t n, Vec value) {
      store(shared.dq + r * key_width + n, load(shared.dq + r * key_width + n) + value);
    });
  });
  for_tiles(rows, key_width, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
    tile.template add_product<Order::columns>(shared.dscores + row, kChunkRows, shared.q + column, key_width,
                                              row / ranks * ranks, rows);
    for_vectors(tile, row, column, [&](int64_t r, int64_t n, Vec value) {
      store(shared.dk + r * key_width + n, load(shared.dk + r * key_width + n) + value);
    });
  });
}

// Rows of a gradient to memory: added to `sums` unless this is the group's first block of heads,
// or, where one block is all there is, straight to the tensor.
template <class T>
static void write_rows(const float* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, float* sums,
                       int64_t stride, bool add) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, columns - column), at = row * stride + column;
      Vec value = load(from + row * from_stride + column);
      if (sums) {
        if (add) value += n == kLanes ? load(sums + at) : load(sums + at, n);
        n == kLanes ? store(sums + at, value) : store(sums + at, value, n);
      } else {
        n == kLanes ? store(to + at, value) : store(to + at, value, n);
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
  const int64_t query_stride = s.query_groups * s.key_dim, key_stride = s.key_groups * s.key_dim;
  Arena arena(scratch);
  Shared shared;
  for (float** piece : {&shared.q, &shared.k, &shared.kt, &shared.dq, &shared.dk}) {
    *piece = arena.take(kChunkRows * key_width);
  }
  float* v = arena.take(kChunkRows * width);
  float* vt = arena.take(kChunkRows * width);
  float* dy = arena.take(kChunkRows * width);
  float* dv = arena.take(kChunkRows * width);
  float* dvt = arena.take(kChunkRows * width);
  float* a = arena.take(kChunkRows * kChunkRows);
  float* da = arena.take(kChunkRows * kChunkRows);
  shared.scores = arena.take(kChunkRows * kChunkRows);
  shared.dscores = arena.take(kChunkRows * kChunkRows);
  float* from_state = arena.take(kChunkRows * kLanes);  // t, a vector for each row
  float* into_state = arena.take(kChunkRows);           // k_j . D v_j
  ChunkWeights w;
  PairSums sums;
  double dc[kChunkRows];

  const auto finish = [&](int64_t query_group, int64_t key_group) {
    if (shared.query_group < 0) return;
    finish_pair(shared, rows, s.ranks, key_width);
    if (query_group != shared.query_group) {
      const int64_t at = row0 * query_stride + shared.query_group * s.key_dim;
      write_rows(shared.dq, key_width, rows, s.key_dim, out.grad_q + at, out.sum_q ? out.sum_q + at : nullptr,
                 query_stride, shared.query_group * (s.heads / s.query_groups) < first);
    }
    if (key_group != shared.key_group) {
      const int64_t at = row0 * key_stride + shared.key_group * s.key_dim;
      write_rows(shared.dk, key_width, rows, s.key_dim, out.grad_k + at, out.sum_k ? out.sum_k + at : nullptr,
                 key_stride, shared.key_group * (s.heads / s.key_groups) < first);
    }
  };

  for (int64_t head = first; head < last; ++head) {
    const int64_t query_group = s.query_group(head), key_group = s.key_group(head);
    if (query_group != shared.query_group || key_group != shared.key_group) {
      finish(query_group, key_group);
      if (query_group != shared.query_group) {
        const T* q = in.q + row0 * query_stride + query_group * s.key_dim;
        copy_rows(q, query_stride, rows, s.key_dim, shared.q, key_width);
        std::fill(shared.dq, shared.dq + kChunkRows * key_width, 0.0f);
      }
      if (key_group != shared.key_group) {
        const T* k = in.k + row0 * key_stride + key_group * s.key_dim;
        copy_rows(k, key_stride, rows, s.key_dim, shared.k, key_width);
        transpose(shared.k, key_width, round_up(rows, 8), key_width, shared.kt, kChunkRows);
        std::fill(shared.dk, shared.dk + kChunkRows * key_width, 0.0f);
      }
      shared.query_group = query_group, shared.key_group = key_group;
      lower_scores(shared.q, shared.kt, rows, s.ranks, s.key_dim, key_width, shared.scores);
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
      tile.template add_product<Order::rows>(D + row * key_width, key_width, shared.kt + column, kChunkRows, 0,
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
        store(from_state + r * kLanes, load(from_state + r * kLanes) + value * load(shared.q + at));
        store(shared.dq + at, load(shared.dq + at) + value);
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
  tensors.check_state(documents.slots);
  const LinearAttentionShape& s = tensors.shape;
  check_tensor(grad_y, "grad_y", v.scalar_type());
  check_tensor(grad_final_state, "grad_final_state", ScalarType::Float);
  check_tensor(y, "y", v.scalar_type());
  check_tensor(denominator, "denominator", ScalarType::Float);
  STD_TORCH_CHECK(grad_y.numel() == v.numel() && y.numel() == v.numel() &&
                      (!normalize || denominator.numel() * s.value_dim == v.numel()) &&
                      grad_final_state.numel() == documents.slots * s.heads * s.key_dim * s.state_width(),
                  "gradients do not have the shapes of the outputs");
  // Every element of a document is written; padding, if there is any, is zero.
  const auto make = [&](const Tensor& like) {
    Tensor tensor = torch::stable::empty_like(like);
    if (documents.padding) torch::stable::zero_(tensor);
    return tensor;
  };
  const auto make_optional = [&](const std::optional<Tensor>& like) {
    return like.has_value() ? make(*like) : torch::stable::new_empty(v, {0}, ScalarType::Float);
  };
  Tensor grad_q = make(q), grad_k = make(k), grad_v = make(v);
  Tensor grad_log_decay = make_optional(log_decay), grad_past = make_optional(past);
  Tensor grad_diagonal = make_optional(diagonal);
  Tensor grad_initial = initial_state.has_value() ? torch::stable::empty_like(*initial_state)
                                                  : torch::stable::new_empty(v, {0}, ScalarType::Float);
  const auto data = [](const Tensor& tensor) {
    return tensor.numel() ? static_cast<float*>(tensor.data_ptr()) : nullptr;
  };

  const auto run = [&](auto zero, const auto& kernels) {
    using T = decltype(zero);
    LinearAttentionGradients<T> out{
        static_cast<const T*>(grad_y.data_ptr()), static_cast<const T*>(y.data_ptr()),
        static_cast<const float*>(denominator.data_ptr()), static_cast<T*>(grad_v.data_ptr()),
        static_cast<T*>(grad_q.data_ptr()), static_cast<T*>(grad_k.data_ptr()), nullptr, nullptr,
        data(grad_log_decay), data(grad_past), data(grad_diagonal)};
    // A group that several blocks of heads share is summed in float32 and rounded once.
    const auto shared_by_blocks = [&](int64_t groups) { return s.head_block % (s.heads / groups) != 0; };
    Tensor sum_q = grad_q, sum_k = grad_k;
    const auto sums = [&](Tensor& sum, const Tensor& grad, int64_t groups) -> float* {
      if (!shared_by_blocks(groups)) return nullptr;
      if (is_bfloat16(v)) sum = torch::stable::new_zeros(grad, {grad.numel()}, ScalarType::Float);
      return static_cast<float*>(sum.data_ptr());
    };
    out.sum_q = sums(sum_q, grad_q, s.query_groups);
    out.sum_k = sums(sum_k, grad_k, s.key_groups);
    const float* grad_final = static_cast<const float*>(grad_final_state.data_ptr());
    run_backward(tensors, documents, out, grad_final, data(grad_initial), kernels);
    const auto round = [&](Tensor& grad, const Tensor& sum) {
      torch::stable::copy_(grad, torch::stable::view(sum, grad.sizes()));
    };
    if (is_bfloat16(v) && out.sum_q) round(grad_q, sum_q);
    if (is_bfloat16(v) && out.sum_k) round(grad_k, sum_k);
  };
  if (is_bfloat16(v)) {
    run(bfloat16{}, Kernels<bfloat16>{choose_linear_attention_start_states_bfloat16(),
                                      choose_linear_attention_end_gradients_bfloat16(),
                                      choose_linear_attention_backward_bfloat16()});
  } else {
    run(0.0f, Kernels<float>{choose_linear_attention_start_states_float(),
                             choose_linear_attention_end_gradients_float(), choose_linear_attention_backward_float()});
  }
  return {grad_q, grad_k, grad_v, grad_log_decay, grad_past, grad_diagonal, grad_initial};
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
