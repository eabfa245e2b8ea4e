// Linear attention with per-head scalar decay: one token of decoding, in place.
//
//   S' = e^{log_decay} S,  y_r = q_r S' + diagonal sum_rho (q_r . k_rho) v_rho,  S = S' + past sum_rho k_rho v_rho^T
//
// One pass over S (N x P, float): each element is read once, decayed, read by q, updated and
// written, so that memory bandwidth is the bound. Columns go in blocks whose outputs stay in
// registers; 1, 2 and 4 ranks take one pass, other numbers of ranks further reading passes.
#include "feature_maps.h"
#include "linear_attention_step.h"

namespace seqmodels {
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

// A pass over `Vectors` vectors of columns: y of Ranks ranks, and with Update the new state. Row n of the state
// is multiplied by kept[n], or by decay where there is none of that. Single says that there are no other ranks,
// so that their number is known when this is compiled; Tail, that one more column follows (the normaliser's).
template <int Ranks, int Vectors, bool Update, bool Single, bool Tail>
static void pass(const float* q, const float* k, int64_t key_dim, int64_t width, const float* written,
                 int64_t written_stride, int64_t all_ranks, float decay, const float* kept, float* state, float* y) {
  constexpr int kTail = Vectors * kLanes;
  if (Single) all_ranks = Ranks;
  Vec out[Ranks][Vectors] = {};
  float tail[Ranks] = {};
  for (int64_t n = 0; n < key_dim; ++n, state += width) {
    Vec row[Vectors];
    const float factor = kept ? kept[n] : decay;
    for (int i = 0; i < Vectors; ++i) row[i] = load(state + i * kLanes) * factor;
    float last = Tail ? state[kTail] * factor : 0.0f;
    for (int r = 0; r < Ranks; ++r) {
      for (int i = 0; i < Vectors; ++i) out[r][i] += q[r * key_dim + n] * row[i];
      if (Tail) tail[r] += q[r * key_dim + n] * last;
    }
    if (!Update) continue;
    for (int64_t r = 0; r < all_ranks; ++r) {
      const float* values = written + r * written_stride;
      for (int i = 0; i < Vectors; ++i) row[i] += k[r * key_dim + n] * load(values + i * kLanes);
      if (Tail) last += k[r * key_dim + n] * values[kTail];
    }
    for (int i = 0; i < Vectors; ++i) store(state + i * kLanes, row[i]);
    if (Tail) state[kTail] = last;
  }
  for (int r = 0; r < Ranks; ++r) {
    for (int i = 0; i < Vectors; ++i) store(y + r * written_stride + i * kLanes, out[r][i]);
    if (Tail) y[r * written_stride + kTail] = tail[r];
  }
}

template <int Ranks, bool Update, bool Single>
static void columns(const float* q, const float* k, int64_t key_dim, int64_t width, const float* written,
                    int64_t stride, int64_t all_ranks, float decay, const float* kept, float* state, float* y) {
#if defined(__AVX512F__)
  constexpr int kWide = 4;
#else
  constexpr int kWide = Ranks == 1 ? 4 : 2;  // Ranks x kWide outputs and kWide of S in 16 registers
#endif
  int64_t column = 0;
  const auto run = [&](auto* pass_of) {
    pass_of(q, k, key_dim, width, written + column, stride, all_ranks, decay, kept, state + column, y + column);
  };
  for (; column + kWide * kLanes <= width; column += kWide * kLanes) {
    if (column + kWide * kLanes + 1 == width) return run(pass<Ranks, kWide, Update, Single, true>);
    run(pass<Ranks, kWide, Update, Single, false>);
  }
  for (; column + kLanes <= width; column += kLanes) {
    if (column + kLanes + 1 == width) return run(pass<Ranks, 1, Update, Single, true>);
    run(pass<Ranks, 1, Update, Single, false>);
  }
  for (; column < width; ++column) {  // what is left of a vector
    float total[Ranks] = {};
    for (int64_t n = 0; n < key_dim; ++n) {
      float& element = state[n * width + column];
      const float decayed = element * (kept ? kept[n] : decay);
      for (int r = 0; r < Ranks; ++r) total[r] += q[r * key_dim + n] * decayed;
      if (!Update) continue;
      float after = decayed;
      for (int64_t r = 0; r < all_ranks; ++r) after += k[r * key_dim + n] * written[r * stride + column];
      element = after;
    }
    for (int r = 0; r < Ranks; ++r) y[r * stride + column] = total[r];
  }
}

// phi(q) and phi(k) of one head. With hedgehog_exp they are relative to the scale, which moves up to this key;
// kept is what is left of each row of the state.
template <class T>
static void map_token(const LinearAttentionShape& s, const LinearAttentionToken<T>& token, Arena& arena, float* q,
                      float* k, float* kept) {
  const int64_t features = padded(s.key_dim), width = padded(s.map_width);
  float* wide = arena.take(padded(s.depth));
  float* u = arena.take(width);
  float* row = arena.take(width + 32);
  if (!s.scaled()) {
    project_row(token.q, s.depth, token.query_weight, s.map_width, wide, u);
    map_row(s.map, u, s.map_width, q, s.key_dim, row);
    project_row(token.k, s.depth, token.key_weight, s.map_width, wide, u);
    return map_row(s.map, u, s.map_width, k, s.key_dim, row);
  }
  float* log_phi = arena.take(features);
  float* scale = arena.take(features);
  std::fill(std::copy(token.scale, token.scale + s.key_dim, scale), scale + features, 0.0f);
  project_row(token.k, s.depth, token.key_weight, s.map_width, wide, u);
  exponents(u, s.map_width, 1, log_phi);
  for (int64_t n = 0; n < features; n += kLanes) {
    const Vec before = load(scale + n), top = maximum(before, load(log_phi + n));
    store(kept + n, exp(before - top));
    store(k + n, exp(load(log_phi + n) - top));
    store(scale + n, top);
  }
  std::copy(scale, scale + s.key_dim, token.scale);
  project_row(token.q, s.depth, token.query_weight, s.map_width, wide, u);
  exponents(u, s.map_width, 1, log_phi);
  relative(log_phi, scale, 1.0f, largest(log_phi, scale, features), features, q);
}

template <class T>
static void step(const LinearAttentionShape& s, const LinearAttentionToken<T>& token, float* scratch) {
  const int64_t ranks = s.ranks, width = s.state_width(), stride = round_up(width, 16);
  Arena arena(scratch);
  float* q = arena.take(ranks * padded(s.key_dim) + 16);
  float* k = arena.take(ranks * padded(s.key_dim) + 16);
  float* v = arena.take(ranks * stride);
  float* written = arena.take(ranks * stride);
  float* y = arena.take(ranks * stride);
  float* kept = nullptr;
  if (s.map != FeatureMap::none) {
    if (s.scaled()) kept = arena.take(padded(s.key_dim));
    map_token(s, token, arena, q, k, kept);
  }
  for (int64_t r = 0; r < ranks; ++r) {
    if (s.map == FeatureMap::none) {
      widen_row(token.q + r * token.query_stride, s.key_dim, q + r * s.key_dim);
      widen_row(token.k + r * token.key_stride, s.key_dim, k + r * s.key_dim);
    }
    widen_row(token.v + r * token.value_stride, s.value_dim, v + r * stride);
    if (s.normalize) v[r * stride + s.value_dim] = 1.0f;
    for (int64_t p = 0; p < width; ++p) written[r * stride + p] = token.past * v[r * stride + p];
  }
  const auto run = [&](auto* columns_of, int64_t r) {
    columns_of(q + r * s.key_dim, k, s.key_dim, width, written, stride, ranks, token.decay, kept, token.state,
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

#include "linear_attention_step_launch.h"

namespace seqmodels {
namespace {

// q, k, v are (batch, 1, R, groups, width): a sequence of one token.
Tensor linear_attention_step_cpu(Tensor q, Tensor k, Tensor v, std::optional<Tensor> log_decay,
                                 std::optional<Tensor> past, std::optional<Tensor> diagonal, Tensor state,
                                 bool normalize, double epsilon) {
  return step_in_place(Tensors(q, k, v, log_decay, past, diagonal, state, normalize, epsilon));
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
