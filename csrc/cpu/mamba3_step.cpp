// One decode token of Mamba-3, from the projected token to the gated output, in place on the state.
//
//   S <- e^{dt a} S + sum_r [(1 - l) dt e^{dt a} v_{t-1},r] k_{t-1},r^T + sum_r [l dt v_t,r] k_t,r^T
//
// Both terms of all ranks are 2R columns times 2R rows. Each row of S is read and written once, and
// multiplied with the R queries while it is in registers. A unit of work is a run of heads of one
// sequence; what heads share (the norms of B and C, the rates) it computes for itself.
#include "mamba3.h"

namespace seqmodels {

struct Mamba3StepArguments {
  Mamba3Shape shape;
  Mamba3Weights weights;
  const float* dt_bias;
  bool heavy_tail;
  float a_floor;
  float *angle, *ssm, *k, *v;  // (B, H, A), (B, H, P, N), (B, R, H, N), (B, H, P)
};

// `projected` and `y` are the row's; heads [first, last).
template <class T>
using Mamba3Step = void(const Mamba3StepArguments&, const T* projected, T* y, int64_t row, int64_t first, int64_t last,
                        float* scratch);
SEQMODELS_DECLARE_KERNEL(Mamba3Step<float>, mamba3_step_float)
SEQMODELS_DECLARE_KERNEL(Mamba3Step<bfloat16>, mamba3_step_bfloat16)

static inline int64_t step_round(int64_t n) { return (n + 15) / 16 * 16; }

static inline int64_t mamba3_step_scratch(const Mamba3Shape& s) {
  const int64_t N = step_round(s.d_state), P = step_round(s.head_dim);
  return 2 * s.ranks * s.groups * N + 3 * step_round(s.angles) + 2 * s.ranks * N + 3 * s.ranks * P + 3 * P;
}

namespace SEQMODELS_LEVEL {

template <class T>
static void widen_row(const T* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += kLanes) store_some(to + i, load_some(from + i, n - i), n - i);
}

// (R G) rows of raw B or C, normed and scaled.
template <class T>
static void norm_rows(const Mamba3Shape& s, const T* raw, const float* weight, float* to) {
  const int64_t N = s.d_state, stride = step_round(N);
  for (int64_t row = 0; row < s.ranks * s.groups; ++row, raw += N, to += stride) {
    const float inverse = inverse_rms(raw, N, s.epsilon);
    for (int64_t n = 0; n < N; n += kLanes) {
      store_some(to + n, load_some(raw + n, N - n) * inverse * load_some(weight + n, N - n), N - n);
    }
  }
}

template <bool half>
static void rotate(float* key, int64_t second, int64_t angles, const float* cosine, const float* sine) {
  constexpr int step = half ? 1 : 2;
#pragma GCC ivdep
  for (int64_t i = 0; i < angles; ++i) {
    const float u = key[step * i], w = key[step * i + second];
    key[step * i] = u * cosine[i] - w * sine[i];
    key[step * i + second] = u * sine[i] + w * cosine[i];
  }
}

// The head's R keys (or queries): bias, then rotation.
static void make_keys(const Mamba3Shape& s, int64_t head, const float* normed, const float* bias, const float* cosine,
                      const float* sine, float* to) {
  const int64_t N = s.d_state, stride = step_round(N);
  for (int64_t r = 0; r < s.ranks; ++r) {
    const float* from = normed + (r * s.groups + s.group(head)) * stride;
    const float* shift = bias + (head * s.ranks + r) * N;
    float* key = to + r * stride;
    for (int64_t n = 0; n < N; n += kLanes) {
      store_some(key + n, load_some(from + n, N - n) + load_some(shift + n, N - n), N - n);
    }
    if (s.half) {
      rotate<true>(key, N / 2, s.angles, cosine, sine);
    } else {
      rotate<false>(key, 1, s.angles, cosine, sine);
    }
  }
}

// `Rows` rows of S, from row p: S <- decay S + columns rows; the lanes of
// totals[r * kLanes + i] add up to S_{p + i} q_r.
template <int Rows, int Ranks>
SEQMODELS_INLINE void update_rows(float* state, int64_t N, float decay, const float* columns, int64_t column_stride,
                                  const float* const* rows, const float* q, int64_t key_stride, int64_t p,
                                  Vec* totals) {
  Vec total[Rows][Ranks] = {};
  const auto part = [&](int64_t n, auto read, auto write) __attribute__((always_inline)) {
    Vec s[Rows];
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) s[i] = read(state + (p + i) * N + n) * decay;
#pragma GCC unroll 8
    for (int m = 0; m < 2 * Ranks; ++m) {
      const Vec row = read(rows[m] + n);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) s[i] += columns[m * column_stride + p + i] * row;
    }
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) write(state + (p + i) * N + n, s[i]);
#pragma GCC unroll 4
    for (int r = 0; r < Ranks; ++r) {
      const Vec query = read(q + r * key_stride + n);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) total[i][r] += s[i] * query;
    }
  };
  int64_t n = 0;
  for (; n + kLanes <= N; n += kLanes) {
    part(n, [](const float* from) { return load(from); }, [](float* to, Vec value) { store(to, value); });
  }
  if (n < N) {
    const int64_t left = N - n;
    part(n, [left](const float* from) { return load(from, left); },
         [left](float* to, Vec value) { store(to, value, left); });
  }
#pragma GCC unroll 4
  for (int r = 0; r < Ranks; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) totals[r * kLanes + i] = total[i][r];
  }
}

// Any number of ranks: one pair of terms after the other, while the row is in the nearest cache.
static void update_row(float* state, int64_t N, float decay, const float* columns, int64_t column_stride,
                       const float* const* rows, const float* q, int64_t key_stride, int64_t p, float* y,
                       int64_t y_stride, int64_t ranks) {
  float* row = state + p * N;
  for (int64_t n = 0; n < N; n += kLanes) {
    const int64_t left = N - n;
    Vec s = load_some(row + n, left) * decay;
    for (int64_t m = 0; m < 2 * ranks; ++m) s += columns[m * column_stride + p] * load_some(rows[m] + n, left);
    store_some(row + n, s, left);
  }
  for (int64_t r = 0; r < ranks; ++r) {
    Vec total{};
    for (int64_t n = 0; n < N; n += kLanes) {
      total += load_some(row + n, N - n) * load_some(q + r * key_stride + n, N - n);
    }
    y[r * y_stride + p] = sum(total);
  }
}

template <int Ranks>
static void update(float* state, int64_t N, int64_t P, float decay, const float* columns, int64_t column_stride,
                   const float* const* rows, const float* q, int64_t key_stride, float* y, int64_t y_stride) {
  Vec totals[Ranks * kLanes];
  int64_t p = 0;
  for (; p + kLanes <= P; p += kLanes) {  // outputs a vector at a time
    for (int i = 0; i < kLanes; i += 4) {
      update_rows<4, Ranks>(state, N, decay, columns, column_stride, rows, q, key_stride, p + i, totals + i);
    }
    for (int r = 0; r < Ranks; ++r) store(y + r * y_stride + p, sum_each<kLanes>(totals + r * kLanes));
  }
  for (; p < P; ++p) {
    update_rows<1, Ranks>(state, N, decay, columns, column_stride, rows, q, key_stride, p, totals);
    for (int r = 0; r < Ranks; ++r) y[r * y_stride + p] = sum(totals[r * kLanes]);
  }
}

// softplus(x) = ln(1 + e^x).
static float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

template <class T>
static void step(const Mamba3StepArguments& a, const T* projected, T* y, int64_t row, int64_t first, int64_t last,
                 float* scratch) {
  const Mamba3Shape& s = a.shape;
  const Mamba3Weights& w = a.weights;
  const int64_t H = s.heads, P = s.head_dim, N = s.d_state, R = s.ranks, A = s.angles;
  const int64_t key_stride = step_round(N), value_stride = step_round(P), keys = R * s.groups * N;
  const T *raw_z = projected, *raw_x = raw_z + H * P, *raw_b = raw_x + H * P, *raw_c = raw_b + keys;
  const T *raw_dt = raw_c + keys, *raw_a = raw_dt + H, *raw_trapezoid = raw_a + H, *raw_theta = raw_trapezoid + H;
  const auto take = [&](int64_t count) {
    float* piece = scratch;
    scratch += count;
    return piece;
  };
  float *b = take(R * s.groups * key_stride), *c = take(R * s.groups * key_stride);
  float *rate = take(step_round(A)), *cosine = take(step_round(A)), *sine = take(step_round(A));
  float *k = take(R * key_stride), *q = take(R * key_stride);
  float* columns = take(2 * R * value_stride);  // R of the previous token, R of this one
  float* outputs = take(R * value_stride);
  float *x = take(value_stride), *z = take(value_stride), *out = take(value_stride);

  norm_rows(s, raw_b, w.b_weight, b);
  norm_rows(s, raw_c, w.c_weight, c);
  widen_row(raw_theta, A, rate);
  for (int64_t i = 0; i < A; ++i) rate[i] = 3.14159265358979f * std::tanh(rate[i]);

  for (int64_t head = first; head < last; ++head) {
    float scalars[3];
    widen_row(raw_dt + head, 1, scalars);
    widen_row(raw_a + head, 1, scalars + 1);
    widen_row(raw_trapezoid + head, 1, scalars + 2);
    const float dt = softplus(scalars[0] + a.dt_bias[head]), u = scalars[1];
    const float activated = a.heavy_tail ? (u >= 0 ? 1 + u : 1 / (1 - u)) : softplus(u);
    const float decay = std::exp(-dt * std::fmax(activated, a.a_floor));
    const float trapezoid = 1 / (1 + std::exp(-scalars[2])), own = trapezoid * dt, before = (dt - own) * decay;

    // In pieces, so that no memory is asked for: a piece's phases are carried in double.
    float* angle = a.angle + (row * H + head) * A;
    for (int64_t begin = 0; begin < A; begin += 64) {
      double phase[64];
      const int64_t count = A - begin < 64 ? A - begin : 64;
      for (int64_t i = 0; i < count; ++i) phase[i] = angle[begin + i];
      advance_phase(phase, dt, rate + begin, count);
      for (int64_t i = 0; i < count; ++i) angle[begin + i] = static_cast<float>(phase[i]);
      sines_of_phases(phase, count, cosine + begin, sine + begin);
    }
    make_keys(s, head, b, w.b_bias, cosine, sine, k);
    make_keys(s, head, c, w.c_bias, cosine, sine, q);

    widen_row(raw_x + head * P, P, x);
    widen_row(raw_z + head * P, P, z);
    float* v = a.v + (row * H + head) * P;
    const float* rows[2 * 64];
    for (int64_t r = 0; r < R; ++r) {
      rows[r] = a.k + ((row * R + r) * H + head) * N;
      rows[R + r] = k + r * key_stride;
      const float* mix = w.mimo_x ? w.mimo_x + (head * R + r) * P : nullptr;
      for (int64_t p = 0; p < P; p += kLanes) {
        const int64_t left = P - p;
        Vec old = load_some(v + p, left) * before, now = load_some(x + p, left) * own;
        if (mix) old *= load_some(mix + p, left), now *= load_some(mix + p, left);
        store_some(columns + r * value_stride + p, old, left);
        store_some(columns + (R + r) * value_stride + p, now, left);
      }
    }
    float* state = a.ssm + (row * H + head) * P * N;
    switch (R) {
#define SEQMODELS_RANKS(count)                                                                                        \
  case count:                                                                                                         \
    update<count>(state, N, P, decay, columns, value_stride, rows, q, key_stride, outputs, value_stride);             \
    break;
      SEQMODELS_RANKS(1) SEQMODELS_RANKS(2) SEQMODELS_RANKS(4)
#undef SEQMODELS_RANKS
      default:
        for (int64_t p = 0; p < P; ++p) {
          update_row(state, N, decay, columns, value_stride, rows, q, key_stride, p, outputs, value_stride, R);
        }
    }
    for (int64_t r = 0; r < R; ++r) {
      const float* mix = w.mimo_x ? w.mimo_x + (head * R + r) * P : nullptr;
      float* to = outputs + r * value_stride;
      for (int64_t p = 0; p < P; p += kLanes) {
        const int64_t left = P - p;
        Vec value = load_some(x + p, left) * w.skip[head];
        if (mix) value *= load_some(mix + p, left);
        store_some(to + p, load_some(to + p, left) + value, left);
      }
      std::memcpy(a.k + ((row * R + r) * H + head) * N, k + r * key_stride, N * sizeof(float));
    }
    std::memcpy(v, x, P * sizeof(float));
    gate(s, w, head, outputs, value_stride, z, out);
    for (int64_t p = 0; p < P; p += kLanes) store_some(y + head * P + p, load_some(out + p, P - p), P - p);
  }
}

void mamba3_step_float(const Mamba3StepArguments& a, const float* projected, float* y, int64_t row, int64_t first,
                       int64_t last, float* scratch) {
  step(a, projected, y, row, first, last, scratch);
}
void mamba3_step_bfloat16(const Mamba3StepArguments& a, const bfloat16* projected, bfloat16* y, int64_t row,
                          int64_t first, int64_t last, float* scratch) {
  step(a, projected, y, row, first, last, scratch);
}

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels

#if SEQMODELS_LAUNCHERS

#include <algorithm>
#include <vector>

#include "mamba3_launch.h"

namespace seqmodels {
namespace {

template <class T>
void run_step(const Mamba3StepArguments& a, const Tensor& projected, Tensor& y, Mamba3Step<T>* kernel) {
  const T* from = static_cast<const T*>(projected.data_ptr());
  T* to = static_cast<T*>(y.data_ptr());
  const int64_t batch = projected.size(0), width = projected.size(1), heads = a.shape.heads;
  const int64_t inner = heads * a.shape.head_dim, scratch_size = mamba3_step_scratch(a.shape);
  const auto work = [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> scratch;  // grows once, so that a step asks for no memory
    if (static_cast<int64_t>(scratch.size()) < scratch_size) scratch.resize(scratch_size);
    while (begin < end) {
      const int64_t row = begin / heads, first = begin % heads, last = std::min(heads, first + end - begin);
      kernel(a, from + row * width, to + row * inner, row, first, last, scratch.data());
      begin += last - first;
    }
  };
  // A thread is worth waking for 64 KiB of state.
  const int64_t state = a.shape.head_dim * a.shape.d_state * static_cast<int64_t>(sizeof(float));
  torch::stable::parallel_for(0, batch * heads, std::max<int64_t>(1, 65536 / state), work);
}

Tensor mamba3_step_cpu(Tensor projected, Tensor dt_bias, Tensor b_weight, Tensor c_weight, Tensor b_bias,
                       Tensor c_bias, Tensor skip, std::optional<Tensor> mimo_x, std::optional<Tensor> mimo_z,
                       std::optional<Tensor> mimo_o, std::optional<Tensor> norm_weight, Tensor angle, Tensor ssm,
                       Tensor k, Tensor v, int64_t groups, bool half, bool heavy_tail, double a_floor, double epsilon) {
  STD_TORCH_CHECK(projected.dim() == 2 && v.dim() == 3 && angle.dim() == 3, "mamba3_step: wrong number of dimensions");
  Mamba3Shape s;
  s.heads = v.size(1), s.head_dim = v.size(2), s.groups = groups;
  STD_TORCH_CHECK(b_bias.dim() == 3, "b_bias must be (heads, ranks, d_state)");
  s.ranks = b_bias.size(1), s.d_state = b_bias.size(2), s.angles = angle.size(2);
  s.half = half, s.epsilon = static_cast<float>(epsilon);
  const Mamba3Weights w =
      checked_weights(s, b_weight, c_weight, b_bias, c_bias, skip, mimo_x, mimo_z, mimo_o, norm_weight);
  const int64_t batch = projected.size(0), inner = s.heads * s.head_dim;
  check_tensor(projected, "projected", is_bfloat16(projected) ? ScalarType::BFloat16 : ScalarType::Float);
  STD_TORCH_CHECK(projected.size(1) == 2 * inner + 2 * s.ranks * groups * s.d_state + 3 * s.heads + s.angles,
                  "projected has ", projected.size(1), " columns, which do not fit the state");
  check_floats(dt_bias, "dt_bias", s.heads);
  check_floats(angle, "angle", batch * s.heads * s.angles);
  check_floats(ssm, "ssm", batch * inner * s.d_state);
  check_floats(k, "k", batch * s.ranks * s.heads * s.d_state);
  check_floats(v, "v", batch * inner);
  const Mamba3StepArguments a{s,
                              w,
                              static_cast<const float*>(dt_bias.data_ptr()),
                              heavy_tail,
                              static_cast<float>(a_floor),
                              static_cast<float*>(angle.data_ptr()),
                              static_cast<float*>(ssm.data_ptr()),
                              static_cast<float*>(k.data_ptr()),
                              static_cast<float*>(v.data_ptr())};
  Tensor y = torch::stable::new_empty(projected, {batch, inner});
  if (is_bfloat16(projected)) {
    run_step<bfloat16>(a, projected, y, choose_mamba3_step_bfloat16());
  } else {
    run_step<float>(a, projected, y, choose_mamba3_step_float());
  }
  return y;
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cpu, m) {
  m.def(
      "mamba3_step(Tensor projected, Tensor dt_bias, Tensor b_weight, Tensor c_weight, Tensor b_bias, Tensor c_bias, "
      "Tensor skip, Tensor? mimo_x, Tensor? mimo_z, Tensor? mimo_o, Tensor? norm_weight, Tensor(a!) angle, "
      "Tensor(b!) ssm, Tensor(c!) k, Tensor(d!) v, int groups, bool half, bool heavy_tail, float a_floor, "
      "float epsilon) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CPU, m) { m.impl("mamba3_step", TORCH_BOX(&seqmodels::mamba3_step_cpu)); }

#endif
