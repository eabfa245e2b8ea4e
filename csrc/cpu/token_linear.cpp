// y = x W^T + bias for a few rows of x: the projections of a decode step.
//
// Matrix libraries tile for many rows and leave most of the machine idle at a few of them. Here a
// unit of work is kLanes outputs: their weights come from memory once and serve all rows from the
// nearest cache. Each output of each row is a sum over the lanes of one vector, and the vectors of
// kLanes outputs are added up together.
#include <algorithm>

#include "dispatch.h"
#include "vec.h"

namespace seqmodels {

// Outputs [begin, end) of all rows; x is (rows, in), weight (out, in), y (rows, out).
template <class T>
using TokenLinear = void(const T* x, const T* weight, const T* bias, T* y, int64_t rows, int64_t in, int64_t out,
                         int64_t begin, int64_t end);
SEQMODELS_DECLARE_KERNEL(TokenLinear<float>, token_linear_float)
SEQMODELS_DECLARE_KERNEL(TokenLinear<bfloat16>, token_linear_bfloat16)

namespace SEQMODELS_LEVEL {

constexpr int kOutputs = 4;  // outputs and rows whose sums are in registers together
constexpr int kRows = 4;

// sums[r * kLanes + i] gets the lanes of x_r . w_i, for Rows rows and Outputs outputs.
template <int Rows, int Outputs, class T>
SEQMODELS_INLINE void dot(const T* x, const T* weight, int64_t in, Vec* sums) {
  Vec total[Rows][Outputs] = {};
  const auto part = [&](int64_t k, auto read) __attribute__((always_inline)) {
    Vec w[Outputs];
#pragma GCC unroll 4
    for (int i = 0; i < Outputs; ++i) w[i] = read(weight + i * in + k);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const Vec value = read(x + r * in + k);
#pragma GCC unroll 4
      for (int i = 0; i < Outputs; ++i) total[r][i] += value * w[i];
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= in; k += kLanes) part(k, [](const T* from) { return load(from); });
  if (k < in) part(k, [left = in - k](const T* from) { return load(from, left); });
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < Outputs; ++i) sums[r * kLanes + i] = total[r][i];
  }
}

template <int Rows, class T>
static void outputs(const T* x, const T* weight, const T* bias, T* y, int64_t in, int64_t out, int64_t begin,
                    int64_t count) {
  Vec sums[Rows * kLanes] = {};
  int64_t i = 0;
  for (; i + kOutputs <= count; i += kOutputs) dot<Rows, kOutputs>(x, weight + (begin + i) * in, in, sums + i);
  for (; i < count; ++i) dot<Rows, 1>(x, weight + (begin + i) * in, in, sums + i);
  for (int r = 0; r < Rows; ++r) {
    Vec value = sum_each<kLanes>(sums + r * kLanes);
    if (bias) value += count == kLanes ? load(bias + begin) : load(bias + begin, count);
    T* to = y + r * out + begin;
    count == kLanes ? store(to, value) : store(to, value, count);
  }
}

template <class T>
static void run(const T* x, const T* weight, const T* bias, T* y, int64_t rows, int64_t in, int64_t out, int64_t begin,
                int64_t end) {
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, end - first);
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) outputs<kRows>(x + r * in, weight, bias, y + r * out, in, out, first, count);
    switch (rows - r) {
#define SEQMODELS_ROWS(left)                                                             \
  case left:                                                                             \
    outputs<left>(x + r * in, weight, bias, y + r * out, in, out, first, count);         \
    break;
      SEQMODELS_ROWS(1) SEQMODELS_ROWS(2) SEQMODELS_ROWS(3)
#undef SEQMODELS_ROWS
    }
  }
}

void token_linear_float(const float* x, const float* weight, const float* bias, float* y, int64_t rows, int64_t in,
                        int64_t out, int64_t begin, int64_t end) {
  run(x, weight, bias, y, rows, in, out, begin, end);
}
void token_linear_bfloat16(const bfloat16* x, const bfloat16* weight, const bfloat16* bias, bfloat16* y, int64_t rows,
                           int64_t in, int64_t out, int64_t begin, int64_t end) {
  run(x, weight, bias, y, rows, in, out, begin, end);
}

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels

#if SEQMODELS_LAUNCHERS

#include "stable.h"

namespace seqmodels {
namespace {

template <class T>
void run_token_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Tensor& y,
                      TokenLinear<T>* kernel) {
  const int64_t rows = x.size(0), in = x.size(1), out = weight.size(0);
  const T *from = static_cast<const T*>(x.data_ptr()), *matrix = static_cast<const T*>(weight.data_ptr());
  const T* shift = bias.has_value() ? static_cast<const T*>(bias->data_ptr()) : nullptr;
  T* to = static_cast<T*>(y.data_ptr());
  constexpr int64_t kUnit = 16;  // outputs: the widest vector, so that no two threads share one
  // A thread is worth waking for 64 KiB of weights.
  const int64_t grain = std::max<int64_t>(1, 65536 / (kUnit * in * static_cast<int64_t>(sizeof(T)) + 1));
  torch::stable::parallel_for(0, (out + kUnit - 1) / kUnit, grain, [&](int64_t begin, int64_t end) {
    kernel(from, matrix, shift, to, rows, in, out, begin * kUnit, std::min(out, end * kUnit));
  });
}

Tensor token_linear_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const ScalarType type = is_bfloat16(x) ? ScalarType::BFloat16 : ScalarType::Float;
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), "x and weight do not fit together");
  check_tensor(x, "x", type);
  check_tensor(weight, "weight", type);
  if (bias.has_value()) {
    check_tensor(*bias, "bias", type);
    STD_TORCH_CHECK(bias->numel() == weight.size(0), "bias and weight do not fit together");
  }
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  if (is_bfloat16(x)) {
    run_token_linear<bfloat16>(x, weight, bias, y, choose_token_linear_bfloat16());
  } else {
    run_token_linear<float>(x, weight, bias, y, choose_token_linear_float());
  }
  return y;
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cpu, m) {
  m.def("token_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CPU, m) { m.impl("token_linear", TORCH_BOX(&seqmodels::token_linear_cpu)); }

#endif
