// Linear attention with per-head scalar decay: one token of decoding, in place.
//
//   S' = e^{log_decay} S,  y_r = q_r S' + diagonal sum_rho (q_r . k_rho) v_rho,  S = S' + past sum_rho k_rho v_rho^T
//
// One pass over S (N x P, float): each element is read once, decayed, read by q, updated and
// written, so that memory bandwidth is the bound. Columns go in blocks whose outputs stay in
// registers; 1, 2 and 4 ranks take one pass, other numbers of ranks further reading passes.
#include "linear_attention.h"

namespace seqmodels {

template <class T>
struct LinearAttentionToken {
  const T* q;  // rank r at q + r * query_stride
  const T* k;
  const T* v;
  T* y;
  int64_t query_stride, key_stride, value_stride;
  float decay, past, diagonal;
  float* state;
};

static inline int64_t step_scratch_size(const LinearAttentionShape& s) {
  return s.ranks * (2 * round_up(s.key_dim, 16) + 3 * round_up(s.state_width(), 16)) + 64;
}

// One (sequence, head).
template <class T>
using LinearAttentionStep = void(const LinearAttentionShape&, const LinearAttentionToken<T>&, float* scratch);

SEQMODELS_DECLARE_KERNEL(LinearAttentionStep<float>, linear_attention_step_float)
SEQMODELS_DECLARE_KERNEL(LinearAttentionStep<bfloat16>, linear_attention_step_bfloat16)

namespace SEQMODELS_LEVEL {

template <class T>
static void widen_row(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store(to + i, load(from + i, count - i), count - i);
}

static float dot(const float* a, const float* b, int64_t count) {
  Vec total{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) total += load(a + i) * load(b + i);
  if (i < count) total += load(a + i, count - i) * load(b + i, count - i);
  return sum(total);
}

// A pass over `Vectors` vectors of columns: y of Ranks ranks, and with Update the new state. Single
// says that there are no other ranks, so that their number is known when this is compiled.
template <int Ranks, int Vectors, bool Update, bool Single>
static void pass(const float* q, const float* k, int64_t key_dim, int64_t width, const float* written,
                 int64_t written_stride, int64_t all_ranks, float decay, float* state, float* y) {
  if (Single) all_ranks = Ranks;
  Vec out[Ranks][Vectors] = {};
  for (int64_t n = 0; n < key_dim; ++n, state += width) {
    Vec row[Vectors];
    for (int i = 0; i < Vectors; ++i) row[i] = load(state + i * kLanes) * decay;
    for (int r = 0; r < Ranks; ++r) {
      for (int i = 0; i < Vectors; ++i) out[r][i] += q[r * key_dim + n] * row[i];
    }
    if (!Update) continue;
    for (int64_t r = 0; r < all_ranks; ++r) {
      const float* values = written + r * written_stride;
      for (int i = 0; i < Vectors; ++i) row[i] += k[r * key_dim + n] * load(values + i * kLanes);
    }
    for (int i = 0; i < Vectors; ++i) store(state + i * kLanes, row[i]);
  }
  for (int r = 0; r < Ranks; ++r) {
    for (int i = 0; i < Vectors; ++i) store(y + r * written_stride + i * kLanes, out[r][i]);
  }
}

template <int Ranks, bool Update, bool Single>
static void columns(const float* q, const float* k, int64_t key_dim, int64_t width, const float* written,
                    int64_t stride, int64_t all_ranks, float decay, float* state, float* y) {
#if defined(__AVX512F__)
  constexpr int kWide = 4;
#else
  constexpr int kWide = Ranks == 1 ? 4 : 2;  // Ranks x kWide outputs and kWide of S in 16 registers
#endif
  int64_t column = 0;
  for (; column + kWide * kLanes <= width; column += kWide * kLanes) {
    pass<Ranks, kWide, Update, Single>(q, k, key_dim, width, written + column, stride, all_ranks, decay,
                                       state + column, y + column);
  }
  for (; column + kLanes <= width; column += kLanes) {
    pass<Ranks, 1, Update, Single>(q, k, key_dim, width, written + column, stride, all_ranks, decay, state + column,
                                   y + column);
  }
  for (; column < width; ++column) {  // what is left of a vector, and the normaliser
    float total[Ranks] = {};
    for (int64_t n = 0; n < key_dim; ++n) {
      float& element = state[n * width + column];
      const float decayed = element * decay;
      for (int r = 0; r < Ranks; ++r) total[r] += q[r * key_dim + n] * decayed;
      if (!Update) continue;
      float after = decayed;
      for (int64_t r = 0; r < all_ranks; ++r) after += k[r * key_dim + n] * written[r * stride + column];
      element = after;
    }
    for (int r = 0; r < Ranks; ++r) y[r * stride + column] = total[r];
  }
}

template <class T>
static void step(const LinearAttentionShape& s, const LinearAttentionToken<T>& token, float* scratch) {
  const int64_t ranks = s.ranks, width = s.state_width(), stride = round_up(width, 16);
  Arena arena(scratch);
  float* q = arena.take(ranks * s.key_dim);
  float* k = arena.take(ranks * s.key_dim);
  float* v = arena.take(ranks * stride);
  float* written = arena.take(ranks * stride);
  float* y = arena.take(ranks * stride);
  for (int64_t r = 0; r < ranks; ++r) {
    widen_row(token.q + r * token.query_stride, s.key_dim, q + r * s.key_dim);
    widen_row(token.k + r * token.key_stride, s.key_dim, k + r * s.key_dim);
    widen_row(token.v + r * token.value_stride, s.value_dim, v + r * stride);
    if (s.normalize) v[r * stride + s.value_dim] = 1.0f;
    for (int64_t p = 0; p < width; ++p) written[r * stride + p] = token.past * v[r * stride + p];
  }
  const auto run = [&](auto* columns_of, int64_t r) {
    columns_of(q + r * s.key_dim, k, s.key_dim, width, written, stride, ranks, token.decay, token.state,
               y + r * stride);
  };
  if (ranks == 1) {
    run(columns<1, true, true>, 0);
  } else if (ranks == 2) {
    run(columns<2, true, true>, 0);
  } else if (ranks == 4) {
    run(columns<4, true, true>, 0);
  } else {  // four ranks at a time read S; the last pass, of one rank, writes it
    int64_t r = 0;
    for (; r + 4 < ranks; r += 4) run(columns<4, false, false>, r);
    for (; r + 1 < ranks; ++r) run(columns<1, false, false>, r);
    run(columns<1, true, false>, r);
  }
  for (int64_t r = 0; r < ranks; ++r) {
    float* out = y + r * stride;
    for (int64_t rho = 0; rho < ranks; ++rho) {
      const float own = token.diagonal * dot(q + r * s.key_dim, k + rho * s.key_dim, s.key_dim);
      for (int64_t p = 0; p < width; ++p) out[p] += own * v[rho * stride + p];
    }
    const float divisor = s.normalize ? out[s.value_dim] + s.epsilon : 1.0f;
    T* to = token.y + r * token.value_stride;
    for (int64_t p = 0; p < s.value_dim; p += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, s.value_dim - p);
      n == kLanes ? store(to + p, load(out + p) / divisor) : store(to + p, load(out + p, n) / divisor, n);
    }
  }
}

void linear_attention_step_float(const LinearAttentionShape& s, const LinearAttentionToken<float>& token,
                                 float* scratch) {
  step<float>(s, token, scratch);
}
void linear_attention_step_bfloat16(const LinearAttentionShape& s, const LinearAttentionToken<bfloat16>& token,
                                    float* scratch) {
  step<bfloat16>(s, token, scratch);
}

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels

#if SEQMODELS_LAUNCHERS

#include <cmath>

#include "linear_attention_launch.h"

namespace seqmodels {
namespace {

constexpr int64_t kStepFloats = 16384;  // state elements that are worth a thread

template <class T>
void run_step(const Tensors& tensors, float* state, T* y, LinearAttentionStep<T>* kernel) {
  const LinearAttentionInputs<T> in = tensors.inputs<T>();
  const LinearAttentionShape& s = in.shape;
  const int64_t state_size = s.key_dim * s.state_width(), tasks = tensors.v.size(0) * s.heads;
  const int64_t query_stride = s.query_groups * s.key_dim, key_stride = s.key_groups * s.key_dim;
  const int64_t value_stride = s.heads * s.value_dim;
  const int64_t grain = std::max<int64_t>(1, kStepFloats / state_size);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    Buffer scratch(step_scratch_size(s));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / s.heads, head = task % s.heads;
      const int64_t values = row * s.ranks * value_stride + head * s.value_dim;
      LinearAttentionToken<T> token;
      token.q = in.q + row * s.ranks * query_stride + s.query_group(head) * s.key_dim;
      token.k = in.k + row * s.ranks * key_stride + s.key_group(head) * s.key_dim;
      token.v = in.v + values;
      token.y = y + values;
      token.query_stride = query_stride, token.key_stride = key_stride, token.value_stride = value_stride;
      token.decay = in.log_decay ? std::exp(in.log_decay[task]) : 1.0f;
      token.past = in.past ? in.past[task] : 1.0f;
      token.diagonal = in.diagonal ? in.diagonal[task] : 1.0f;
      token.state = state + task * state_size;
      kernel(s, token, scratch.data());
    }
  });
}

// q, k, v are (batch, 1, R, groups, width): a sequence of one token.
Tensor linear_attention_step_cpu(Tensor q, Tensor k, Tensor v, std::optional<Tensor> log_decay,
                                 std::optional<Tensor> past, std::optional<Tensor> diagonal, Tensor state,
                                 bool normalize, double epsilon) {
  const Tensors tensors(q, k, v, log_decay, past, diagonal, state, normalize, epsilon);
  STD_TORCH_CHECK(v.size(1) == 1, "a step takes one token");
  tensors.check_state(v.size(0));
  Tensor y = torch::stable::empty_like(v);
  float* memory = static_cast<float*>(state.data_ptr());
  if (is_bfloat16(v)) {
    run_step<bfloat16>(tensors, memory, static_cast<bfloat16*>(y.data_ptr()), choose_linear_attention_step_bfloat16());
  } else {
    run_step<float>(tensors, memory, static_cast<float*>(y.data_ptr()), choose_linear_attention_step_float());
  }
  return y;
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cpu, m) {
  m.def(
      "linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? past_weight, "
      "Tensor? diagonal_weight, Tensor(a!) state, bool normalize, float epsilon) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CPU, m) {
  m.impl("linear_attention_step", TORCH_BOX(&seqmodels::linear_attention_step_cpu));
}

#endif
