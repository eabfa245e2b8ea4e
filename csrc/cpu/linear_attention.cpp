// Linear attention with per-head scalar decay: forward.
//
// For one head and one chunk of T tokens with c the inclusive sums of log_decay, S (N x P) the
// state at the chunk's start and W = past weight (the equation is in ops/linear_attention/op.py):
//
//   A[i][j] = e^{c_i - c_j} W_j (q_i . k_j) below the diagonal, diagonal_i (q_i . k_i) on it
//   Y       = A V + e^{c_i} Q S
//   S      <- e^{c_T} S + K^T (e^{c_T - c_j} W_j V)
//
// Tiling. A task walks the chunks of one document for up to kHeadBlock heads, with their states
// (N x P floats each) and the chunk's q, k and scores in the second-level cache. Q K^T is computed
// once for the heads that share it. The exponentials are taken row by row into A; A V is added to
// the same register tile as Q S, and only for j <= i. Where documents x head blocks would leave
// threads idle, the states at all chunk starts come first (one task for each document, head and
// slice of N), then all chunks run at once. Both ways sum in the same order: same bits.
#include "linear_attention_kernels.h"

#include "linear_attention_operands.h"

namespace seqmodels {
namespace SEQMODELS_LEVEL {

// Row i of A from row i of the scores, for all ranks of a token; zero right of the diagonal.
static void weigh_scores(const ChunkWeights& w, int64_t token, const float* scores, float* a) {
  const int64_t first = token * w.ranks, end = first + w.ranks;
  for (int64_t column = 0; column < kChunkRows; column += kLanes) {
    Vec weight{};
    const VecInt lane = iota() + static_cast<int32_t>(column);
    if (column < end) {
      weight = column < first ? decay_row(w, first, column) * load(w.past + column) : Vec{};
      weight = lane < static_cast<int32_t>(first) ? weight : broadcast(w.diagonal[token]);
    }
    for (int64_t row = first; row < end; ++row) {
      Vec value{};
      if (column < end) {
        const Vec product = weight * load(scores + row * kChunkRows + column);
        value = lane < static_cast<int32_t>(end) ? product : value;  // scores are unset right of here
      }
      store(a + row * kChunkRows + column, value);
    }
  }
}

// S <- e^{c_T} S + K^T values for rows [begin, end) of N, and z likewise.
// With a scale, row n of S is multiplied by kept[n] instead of e^{c_T}: there is no decay beside one.
static void advance_state(const ChunkWeights& w, const float* k, int64_t key_width, const float* values,
                          int64_t value_width, int64_t begin, int64_t end, bool normalize, const float* kept,
                          const float* from, float* to) {
  for_tiles(end - begin, value_width, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
    tile.template add_product<Order::columns>(k + begin + row, key_width, values + column, value_width, 0, w.rows);
    for_vectors(tile, begin + row, column, [&](int64_t n, int64_t p, Vec value) {
      const int64_t at = n * value_width + p;
      store(to + at, load(from + at) * (kept ? kept[n] : w.carry) + value);
    });
  });
  if (!normalize) return;
  const int64_t z = key_width * value_width;
  for (int64_t n = begin; n < end; n += kLanes) {
    Vec sum{};
    for (int64_t row = 0; row < w.rows; ++row) sum += w.stored[row] * load(k + row * key_width + n);
    store(to + z + n, load(from + z + n) * (kept ? load(kept + n) : broadcast(w.carry)) + sum);
  }
}

static void scale_rows(const float* from, const float* factors, int64_t rows, int64_t width, float* to) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < width; column += kLanes) {
      store(to + row * width + column, load(from + row * width + column) * factors[row]);
    }
  }
}

template <class T>
static void forward(const LinearAttentionInputs<T>& in, const LinearAttentionOutputs<T>& out, int64_t token,
                    int64_t tokens, int64_t first, int64_t last, float* states, bool advance, float* scratch) {
  const LinearAttentionShape& s = in.shape;
  const int64_t key_width = padded(s.key_dim), value_width = padded(s.value_dim), rows = tokens * s.ranks;
  const int64_t row0 = token * s.ranks, state_size = forward_state_size(s);
  Arena arena(scratch);
  Operands o(arena, s);
  float* v = arena.take(kChunkRows * value_width);
  float* stored = arena.take(kChunkRows * value_width);
  float* scores = arena.take(kChunkRows * kChunkRows);
  float* a = arena.take(kChunkRows * kChunkRows);
  float* divisor = arena.take(kChunkRows);
  ChunkWeights w;

  int64_t query_group = -1, key_group = -1;
  for (int64_t head = first; head < last; ++head) {
    const int64_t old_query = query_group, old_key = key_group;
    query_group = s.query_group(head), key_group = s.key_group(head);
    float* state = states + (head - first) * state_size;
    if (query_group != old_query) load_queries(in, query_group, row0, rows, o);
    if (key_group != old_key) {
      load_keys(in, key_group, row0, rows, o);
      if (s.scaled()) {  // then every head is a group
        scale_keys(s, state + forward_scale(s), rows, o);
        scale_queries(s, state + forward_scale(s), rows, o, o.kt);
      }
      transpose_keys(s, rows, o);
    }
    if (query_group != old_query || key_group != old_key) chunk_scores(s, rows, o, scores);
    const int64_t stride = s.heads * s.value_dim;
    copy_rows(in.v + row0 * stride + head * s.value_dim, stride, rows, s.value_dim, v, value_width);
    chunk_weights(in, token, tokens, head, w);
    for (int64_t t = 0; t < tokens; ++t) weigh_scores(w, t, scores, a);
    std::fill(a + rows * kChunkRows, a + round_up(rows, 8) * kChunkRows, 0.0f);

    if (s.normalize) {
      const float* z = state + key_width * value_width;
      for (int64_t row = 0; row < rows; ++row) {
        Vec seen{}, inside{};
        for (int64_t n = 0; n < key_width; n += kLanes) seen += load(o.state_q + row * key_width + n) * load(z + n);
        for (int64_t j = 0; j < kChunkRows; j += kLanes) inside += load(a + row * kChunkRows + j);
        const float total = sum(inside) + w.from_start[row] * sum(seen) + s.epsilon;
        out.denominator[(row0 + row) * s.heads + head] = s.scaled() ? o.shift[row] + std::log(total) : total;
        divisor[row] = total;
      }
    }
    T* y = out.y + row0 * stride + head * s.value_dim;
    for_tiles(rows, value_width, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
      tile.template add_product<Order::rows>(o.state_q + row * key_width, key_width, state + column, value_width, 0,
                                             s.key_dim);
      for (int r = 0; r < kTileRows; ++r) {
        for (auto& value : tile.value[r]) value *= w.from_start[row + r];
      }
      tile.template add_product<Order::rows>(a + row * kChunkRows, kChunkRows, v + column, value_width, 0,
                                             visible_end(row, rows, s.ranks));
      for_vectors(tile, row, column, [&](int64_t r, int64_t p, Vec value) {
        if (r >= rows || p >= s.value_dim) return;
        if (s.normalize) value /= divisor[r];
        T* to = y + r * stride + p;
        p + kLanes <= s.value_dim ? store(to, value) : store(to, value, s.value_dim - p);
      });
    });
    if (advance) {
      scale_rows(v, w.stored, rows, value_width, stored);
      advance_state(w, o.k, key_width, stored, value_width, 0, key_width, s.normalize, s.scaled() ? o.kept : nullptr,
                    state, state);
      if (s.scaled()) std::copy(o.scale, o.scale + key_width, state + forward_scale(s));
    }
  }
}

template <class T>
static void states(const LinearAttentionInputs<T>& in, const Document& document, int64_t head, int64_t row_begin,
                   int64_t row_end, float* states, int64_t stride, float* scratch) {
  const LinearAttentionShape& s = in.shape;
  const int64_t key_width = padded(s.key_dim), value_width = padded(s.value_dim);
  const int64_t value_stride = s.heads * s.value_dim;
  Arena arena(scratch);
  Operands o(arena, s);
  float* v = arena.take(kChunkRows * value_width);
  ChunkWeights w;
  for (int64_t begin = 0; begin < document.length; begin += s.chunk_tokens, states += stride) {
    const int64_t token = document.start + begin, tokens = std::min(s.chunk_tokens, document.length - begin);
    const int64_t row0 = token * s.ranks, rows = tokens * s.ranks;
    load_keys(in, s.key_group(head), row0, rows, o);
    if (s.scaled()) scale_keys(s, states + forward_scale(s), rows, o);
    copy_rows(in.v + row0 * value_stride + head * s.value_dim, value_stride, rows, s.value_dim, v, value_width);
    chunk_weights(in, token, tokens, head, w);
    scale_rows(v, w.stored, rows, value_width, v);
    advance_state(w, o.k, key_width, v, value_width, row_begin, row_end, s.normalize, s.scaled() ? o.kept : nullptr,
                  states, states + stride);
    if (s.scaled()) std::copy(o.scale, o.scale + key_width, states + stride + forward_scale(s));
  }
}

#define SEQMODELS_INSTANTIATE(T)                                                                                    \
  void linear_attention_forward_##T(const LinearAttentionInputs<T>& in, const LinearAttentionOutputs<T>& out,       \
                                    int64_t token, int64_t tokens, int64_t first, int64_t last, float* states_,     \
                                    bool advance, float* scratch) {                                                 \
    forward<T>(in, out, token, tokens, first, last, states_, advance, scratch);                                     \
  }                                                                                                                 \
  void linear_attention_states_##T(const LinearAttentionInputs<T>& in, const Document& document, int64_t head,      \
                                   int64_t row_begin, int64_t row_end, float* states_, int64_t stride,              \
                                   float* scratch) {                                                                \
    states<T>(in, document, head, row_begin, row_end, states_, stride, scratch);                                    \
  }
SEQMODELS_INSTANTIATE(float)
SEQMODELS_INSTANTIATE(bfloat16)
#undef SEQMODELS_INSTANTIATE

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels

#if SEQMODELS_LAUNCHERS

#include "linear_attention_forward_launch.h"

namespace seqmodels {
namespace {

std::tuple<Tensor, Tensor, Tensor> linear_attention_cpu(Tensor q, Tensor k, Tensor v, std::optional<Tensor> log_decay,
                                                        std::optional<Tensor> past, std::optional<Tensor> diagonal,
                                                        std::optional<Tensor> initial_state,
                                                        std::optional<Tensor> starts, std::optional<Tensor> lengths,
                                                        bool normalize, double epsilon) {
  const Tensors tensors(q, k, v, log_decay, past, diagonal, initial_state, normalize, epsilon);
  const Documents documents(v.size(0), v.size(1), starts, lengths);
  auto [y, final_state, scale, denominator] = run(tensors, documents);
  return {y, final_state, denominator};
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cpu, m) {
  m.def(
      "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? past_weight, "
      "Tensor? diagonal_weight, Tensor? initial_state, Tensor? starts, Tensor? lengths, bool normalize, "
      "float epsilon) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CPU, m) {
  m.impl("linear_attention", TORCH_BOX(&seqmodels::linear_attention_cpu));
}

#endif
