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

namespace seqmodels {

// The states of one head at the start of every chunk of a document, rows [row_begin, row_end) of
// N: chunk i's at states + i * stride; behind the last chunk the final one. states[0] is given.
template <class T>
using LinearAttentionStates = void(const LinearAttentionInputs<T>&, const Document&, int64_t head, int64_t row_begin,
                                   int64_t row_end, float* states, int64_t stride, float* scratch);

SEQMODELS_DECLARE_KERNEL(LinearAttentionStates<float>, linear_attention_states_float)
SEQMODELS_DECLARE_KERNEL(LinearAttentionStates<bfloat16>, linear_attention_states_bfloat16)

}  // namespace seqmodels

#include "linear_attention_tile.h"

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
static void advance_state(const ChunkWeights& w, const float* k, int64_t key_width, const float* values,
                          int64_t value_width, int64_t begin, int64_t end, bool normalize, const float* from,
                          float* to) {
  for_tiles(end - begin, value_width, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
    tile.template add_product<Order::columns>(k + begin + row, key_width, values + column, value_width, 0, w.rows);
    for_vectors(tile, begin + row, column, [&](int64_t n, int64_t p, Vec value) {
      const int64_t at = n * value_width + p;
      store(to + at, load(from + at) * w.carry + value);
    });
  });
  if (!normalize) return;
  const int64_t z = key_width * value_width;
  for (int64_t n = begin; n < end; n += kLanes) {
    Vec sum{};
    for (int64_t row = 0; row < w.rows; ++row) sum += w.stored[row] * load(k + row * key_width + n);
    store(to + z + n, load(from + z + n) * w.carry + sum);
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
  float* q = arena.take(kChunkRows * key_width);
  float* k = arena.take(kChunkRows * key_width);
  float* kt = arena.take(kChunkRows * key_width);
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
    if (query_group != old_query) {
      const int64_t stride = s.query_groups * s.key_dim;
      copy_rows(in.q + row0 * stride + query_group * s.key_dim, stride, rows, s.key_dim, q, key_width);
    }
    if (key_group != old_key) {
      const int64_t stride = s.key_groups * s.key_dim;
      copy_rows(in.k + row0 * stride + key_group * s.key_dim, stride, rows, s.key_dim, k, key_width);
      transpose(k, key_width, round_up(rows, 8), key_width, kt, kChunkRows);
    }
    if (query_group != old_query || key_group != old_key) {
      lower_scores(q, kt, rows, s.ranks, s.key_dim, key_width, scores);
    }
    const int64_t stride = s.heads * s.value_dim;
    copy_rows(in.v + row0 * stride + head * s.value_dim, stride, rows, s.value_dim, v, value_width);
    chunk_weights(in, token, tokens, head, w);
    for (int64_t t = 0; t < tokens; ++t) weigh_scores(w, t, scores, a);
    std::fill(a + rows * kChunkRows, a + round_up(rows, 8) * kChunkRows, 0.0f);

    float* state = states + (head - first) * state_size;
    if (s.normalize) {
      const float* z = state + key_width * value_width;
      for (int64_t row = 0; row < rows; ++row) {
        Vec seen{}, inside{};
        for (int64_t n = 0; n < key_width; n += kLanes) seen += load(q + row * key_width + n) * load(z + n);
        for (int64_t j = 0; j < kChunkRows; j += kLanes) inside += load(a + row * kChunkRows + j);
        const float total = sum(inside) + w.from_start[row] * sum(seen) + s.epsilon;
        out.denominator[(row0 + row) * s.heads + head] = total;
        divisor[row] = total;
      }
    }
    T* y = out.y + row0 * stride + head * s.value_dim;
    for_tiles(rows, value_width, [&](auto tile, int64_t row, int64_t column) __attribute__((always_inline)) {
      tile.template add_product<Order::rows>(q + row * key_width, key_width, state + column, value_width, 0, s.key_dim);
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
      advance_state(w, k, key_width, stored, value_width, 0, key_width, s.normalize, state, state);
    }
  }
}

template <class T>
static void states(const LinearAttentionInputs<T>& in, const Document& document, int64_t head, int64_t row_begin,
                   int64_t row_end, float* states, int64_t stride, float* scratch) {
  const LinearAttentionShape& s = in.shape;
  const int64_t key_width = padded(s.key_dim), value_width = padded(s.value_dim);
  const int64_t key_stride = s.key_groups * s.key_dim, value_stride = s.heads * s.value_dim;
  Arena arena(scratch);
  float* k = arena.take(kChunkRows * key_width);
  float* v = arena.take(kChunkRows * value_width);
  ChunkWeights w;
  for (int64_t begin = 0; begin < document.length; begin += s.chunk_tokens, states += stride) {
    const int64_t token = document.start + begin, tokens = std::min(s.chunk_tokens, document.length - begin);
    const int64_t row0 = token * s.ranks, rows = tokens * s.ranks;
    copy_rows(in.k + row0 * key_stride + s.key_group(head) * s.key_dim, key_stride, rows, s.key_dim, k, key_width);
    copy_rows(in.v + row0 * value_stride + head * s.value_dim, value_stride, rows, s.value_dim, v, value_width);
    chunk_weights(in, token, tokens, head, w);
    scale_rows(v, w.stored, rows, value_width, v);
    advance_state(w, k, key_width, v, value_width, row_begin, row_end, s.normalize, states, states + stride);
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

#include "linear_attention_launch.h"

namespace seqmodels {
namespace {

// (N, W) of a tensor to S (N x padded P) and z; a null source is the zero state.
void read_state(const LinearAttentionShape& s, const float* from, float* state) {
  const int64_t value_width = padded(s.value_dim), width = s.state_width();
  std::fill(state, state + forward_state_size(s), 0.0f);
  if (!from) return;
  for (int64_t n = 0; n < s.key_dim; ++n) {
    std::copy(from + n * width, from + n * width + s.value_dim, state + n * value_width);
    if (s.normalize) state[padded(s.key_dim) * value_width + n] = from[n * width + s.value_dim];
  }
}

void write_state(const LinearAttentionShape& s, const float* state, float* to) {
  const int64_t value_width = padded(s.value_dim), width = s.state_width();
  for (int64_t n = 0; n < s.key_dim; ++n) {
    std::copy(state + n * value_width, state + n * value_width + s.value_dim, to + n * width);
    if (s.normalize) to[n * width + s.value_dim] = state[padded(s.key_dim) * value_width + n];
  }
}

template <class T>
void run_forward(const Tensors& tensors, const Documents& documents, T* y, float* denominator, float* final_state,
                 LinearAttentionForward<T>* chunk, LinearAttentionStates<T>* chunk_states) {
  const LinearAttentionInputs<T> in = tensors.inputs<T>();
  const LinearAttentionOutputs<T> out{y, denominator};
  const LinearAttentionShape& s = in.shape;
  const float* initial = float_data(tensors.initial_state);
  const int64_t state_size = forward_state_size(s), scratch_size = forward_scratch_size(s);
  const int64_t tensor_state = s.key_dim * s.state_width(), block = s.head_block, blocks = s.heads / block;
  const auto state_of = [&](const float* base, int64_t slot, int64_t head) {
    return base ? base + (slot * s.heads + head) * tensor_state : nullptr;
  };
  const auto final_of = [&](int64_t slot, int64_t head) {
    return final_state + (slot * s.heads + head) * tensor_state;
  };
  const auto read_block = [&](const Document& document, int64_t first, float* states) {
    for (int64_t h = 0; h < block; ++h) {
      read_state(s, state_of(initial, document.slot, first + h), states + h * state_size);
    }
  };
  const auto write_block = [&](const Document& document, int64_t first, const float* states) {
    for (int64_t h = 0; h < block; ++h) {
      write_state(s, states + h * state_size, final_of(document.slot, first + h));
    }
  };

  for (const Document& document : documents.unused) {
    for (int64_t head = 0; head < s.heads; ++head) {
      const float* from = state_of(initial, document.slot, head);
      float* to = final_of(document.slot, head);
      from ? static_cast<void>(std::copy(from, from + tensor_state, to)) : std::fill(to, to + tensor_state, 0.0f);
    }
  }

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tasks = static_cast<int64_t>(documents.used.size()) * blocks;
  // Tasks that threads cannot share evenly: the busiest thread has a sixth more than its share.
  const bool by_chunk = threads > 1 && 6 * round_up(tasks, threads) > 7 * tasks;
  if (!by_chunk) {
    parallel(tasks, [&](int64_t begin, int64_t end) {
      Buffer scratch(scratch_size + block * state_size);
      float* states = scratch.data() + scratch_size;
      for (int64_t task = begin; task < end; ++task) {
        const Document& document = documents.used[task / blocks];
        const int64_t first = task % blocks * block;
        read_block(document, first, states);
        for (int64_t at = 0; at < document.length; at += s.chunk_tokens) {
          chunk(in, out, document.start + at, std::min(s.chunk_tokens, document.length - at), first, first + block,
                states, true, scratch.data());
        }
        write_block(document, first, states);
      }
    });
    return;
  }

  // All chunk states of one (document, head block) at a time, then all its chunks.
  const int64_t slices = std::max<int64_t>(1, std::min(padded(s.key_dim) / 16, threads / block));
  const int64_t slice_rows = round_up((padded(s.key_dim) + slices - 1) / slices, 16);
  for (const Document& document : documents.used) {
    const int64_t chunks = s.chunks(document.length), stride = block * state_size;
    Buffer states((chunks + 1) * stride);  // [chunk][head of the block][state]
    states.check();
    for (int64_t first = 0; first < s.heads; first += block) {
      read_block(document, first, states.data());
      parallel(block * slices, [&](int64_t begin, int64_t end) {
        Buffer scratch(scratch_size);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t h = task / slices, row = task % slices * slice_rows;
          if (row >= padded(s.key_dim)) continue;
          chunk_states(in, document, first + h, row, std::min(padded(s.key_dim), row + slice_rows),
                       states.data() + h * state_size, stride, scratch.data());
        }
      });
      parallel(chunks, [&](int64_t begin, int64_t end) {
        Buffer scratch(scratch_size);
        for (int64_t index = begin; index < end; ++index) {
          const int64_t at = index * s.chunk_tokens;
          chunk(in, out, document.start + at, std::min(s.chunk_tokens, document.length - at), first, first + block,
                states.data() + index * stride, false, scratch.data());
        }
      });
      write_block(document, first, states.data() + chunks * stride);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> linear_attention_cpu(Tensor q, Tensor k, Tensor v, std::optional<Tensor> log_decay,
                                                        std::optional<Tensor> past, std::optional<Tensor> diagonal,
                                                        std::optional<Tensor> initial_state,
                                                        std::optional<Tensor> starts, std::optional<Tensor> lengths,
                                                        bool normalize, double epsilon) {
  const Tensors tensors(q, k, v, log_decay, past, diagonal, initial_state, normalize, epsilon);
  const Documents documents(v.size(0), v.size(1), starts, lengths);
  tensors.check_state(documents.slots);
  const LinearAttentionShape& s = tensors.shape;
  Tensor y = torch::stable::empty_like(v);
  const ScalarType state_type = ScalarType::Float;
  std::vector<int64_t> divisors{0};
  if (normalize) divisors = {v.size(0), v.size(1), s.ranks, s.heads};
  Tensor denominator = torch::stable::new_empty(v, divisors, state_type);
  Tensor final_state = torch::stable::new_empty(v, {documents.slots, s.heads, s.key_dim, s.state_width()}, state_type);
  if (documents.padding) {
    torch::stable::zero_(y);
    torch::stable::fill_(denominator, 1.0);
  }
  float* divisor = static_cast<float*>(denominator.data_ptr());
  float* final_data = static_cast<float*>(final_state.data_ptr());
  if (is_bfloat16(v)) {
    run_forward<bfloat16>(tensors, documents, static_cast<bfloat16*>(y.data_ptr()), divisor, final_data,
                          choose_linear_attention_forward_bfloat16(), choose_linear_attention_states_bfloat16());
  } else {
    run_forward<float>(tensors, documents, static_cast<float*>(y.data_ptr()), divisor, final_data,
                       choose_linear_attention_forward_float(), choose_linear_attention_states_float());
  }
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
