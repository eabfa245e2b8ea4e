// y = weight * x / sqrt(mean(x^2) + epsilon) over rows, and its backward.
//
// With r = 1 / sqrt(mean(x^2) + epsilon) and n the width:
//
//   grad_x = r weight grad_y - x (r^3 / n) sum(weight grad_y x),   grad_weight = sum over rows of grad_y x r
//
// Each row is read twice, the second time from the nearest cache; the backward computes r again.
// grad_weight is summed over units of kUnitRows rows and then over units in order, so that it has the
// same bits for any number of threads.
#include <cmath>

#include "dispatch.h"
#include "vec.h"

namespace seqmodels {

constexpr int64_t kUnitRows = 64;

// Rows [begin, end), each of `width`.
template <class T>
using RmsNorm = void(const T* x, const T* weight, T* y, int64_t width, float epsilon, int64_t begin, int64_t end);
// Adds to grad_weight (width), which the caller set to zero.
template <class T>
using RmsNormBackward = void(const T* grad_y, const T* x, const T* weight, T* grad_x, float* grad_weight,
                             int64_t width, float epsilon, int64_t begin, int64_t end);
SEQMODELS_DECLARE_KERNEL(RmsNorm<float>, rms_norm_float)
SEQMODELS_DECLARE_KERNEL(RmsNorm<bfloat16>, rms_norm_bfloat16)
SEQMODELS_DECLARE_KERNEL(RmsNormBackward<float>, rms_norm_backward_float)
SEQMODELS_DECLARE_KERNEL(RmsNormBackward<bfloat16>, rms_norm_backward_bfloat16)

namespace SEQMODELS_LEVEL {

// part(i, read, write) over a row: whole vectors, then the lanes that are left.
template <class Part>
SEQMODELS_INLINE void along(int64_t width, Part part) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    part(i, [](const auto* from) __attribute__((always_inline)) { return load(from); },
         [](auto* to, Vec value) __attribute__((always_inline)) { store(to, value); });
  }
  if (const int64_t left = width - i; left > 0) {
    part(i, [left](const auto* from) __attribute__((always_inline)) { return load(from, left); },
         [left](auto* to, Vec value) __attribute__((always_inline)) { store(to, value, left); });
  }
}

template <class T>
SEQMODELS_INLINE void forward(const T* x, const T* weight, T* y, int64_t width, float epsilon, int64_t begin,
                              int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* from = x + row * width;
    T* to = y + row * width;
    Vec squares{};
    along(width, [&](int64_t i, auto read, auto) __attribute__((always_inline)) {
      const Vec value = read(from + i);
      squares += value * value;
    });
    const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + epsilon);
    along(width, [&](int64_t i, auto read, auto write) __attribute__((always_inline)) {
      write(to + i, read(from + i) * scale * read(weight + i));
    });
  }
}

template <class T>
SEQMODELS_INLINE void backward(const T* grad_y, const T* x, const T* weight, T* grad_x, float* grad_weight,
                               int64_t width, float epsilon, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *from = x + row * width, *grad = grad_y + row * width;
    T* to = grad_x + row * width;
    Vec squares{}, products{};
    along(width, [&](int64_t i, auto read, auto) __attribute__((always_inline)) {
      const Vec value = read(from + i);
      squares += value * value;
      products += value * (read(grad + i) * read(weight + i));
    });
    const float n = static_cast<float>(width);
    const float scale = 1.0f / std::sqrt(sum(squares) / n + epsilon);
    const float along_x = sum(products) / n * scale * scale;
    along(width, [&](int64_t i, auto read, auto write) __attribute__((always_inline)) {
      const Vec value = read(from + i), g = read(grad + i);
      write(to + i, scale * (g * read(weight + i) - value * along_x));
      write(grad_weight + i, read(grad_weight + i) + g * (value * scale));
    });
  }
}

#define SEQMODELS_TYPE(T)                                                                                        \
  void rms_norm_##T(const T* x, const T* weight, T* y, int64_t width, float epsilon, int64_t begin,              \
                    int64_t end) {                                                                               \
    forward(x, weight, y, width, epsilon, begin, end);                                                           \
  }                                                                                                              \
  void rms_norm_backward_##T(const T* grad_y, const T* x, const T* weight, T* grad_x, float* grad_weight,        \
                             int64_t width, float epsilon, int64_t begin, int64_t end) {                         \
    backward(grad_y, x, weight, grad_x, grad_weight, width, epsilon, begin, end);                                \
  }
SEQMODELS_TYPE(float)
SEQMODELS_TYPE(bfloat16)
#undef SEQMODELS_TYPE

}  // namespace SEQMODELS_LEVEL
}  // namespace seqmodels

#if SEQMODELS_LAUNCHERS

#include <algorithm>

#include "stable.h"

namespace seqmodels {
namespace {

template <class T>
void run_rms_norm(const Tensor& x, const Tensor& weight, Tensor& y, float epsilon, RmsNorm<T>* kernel) {
  const T *from = static_cast<const T*>(x.data_ptr()), *factors = static_cast<const T*>(weight.data_ptr());
  T* to = static_cast<T*>(y.data_ptr());
  const int64_t width = x.size(1);
  // A thread is worth waking for 32,000 numbers.
  torch::stable::parallel_for(
      0, x.size(0), std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width)),
      [&](int64_t begin, int64_t end) { kernel(from, factors, to, width, epsilon, begin, end); });
}

template <class T>
void run_rms_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight, Tensor& grad_x,
                           Tensor& grad_weight, float epsilon, RmsNormBackward<T>* kernel) {
  const T *grad = static_cast<const T*>(grad_y.data_ptr()), *from = static_cast<const T*>(x.data_ptr()),
          *factors = static_cast<const T*>(weight.data_ptr());
  T* to = static_cast<T*>(grad_x.data_ptr());
  float* sums = static_cast<float*>(grad_weight.data_ptr());
  const int64_t rows = x.size(0), width = x.size(1);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, kUnitRows * width));
  torch::stable::parallel_for(0, grad_weight.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      kernel(grad, from, factors, to, sums + unit * width, width, epsilon, unit * kUnitRows,
             std::min(rows, (unit + 1) * kUnitRows));
    }
  });
}

ScalarType check_rows(const Tensor& x, const Tensor& weight) {
  const ScalarType type = is_bfloat16(x) ? ScalarType::BFloat16 : ScalarType::Float;
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 1 && x.size(1) == weight.size(0), "x and weight do not fit together");
  check_tensor(x, "x", type);
  check_tensor(weight, "weight", type);
  return type;
}

Tensor rms_norm_cpu(Tensor x, Tensor weight, double epsilon) {
  check_rows(x, weight);
  Tensor y = torch::stable::empty_like(x);
  if (is_bfloat16(x)) {
    run_rms_norm<bfloat16>(x, weight, y, static_cast<float>(epsilon), choose_rms_norm_bfloat16());
  } else {
    run_rms_norm<float>(x, weight, y, static_cast<float>(epsilon), choose_rms_norm_float());
  }
  return y;
}

// grad_x, and the sums of grad_weight over units: (units, width) float32.
std::tuple<Tensor, Tensor> rms_norm_backward_cpu(Tensor grad_y, Tensor x, Tensor weight, double epsilon) {
  check_tensor(grad_y, "grad_y", check_rows(x, weight));
  STD_TORCH_CHECK(grad_y.dim() == 2 && grad_y.size(0) == x.size(0) && grad_y.size(1) == x.size(1),
                  "grad_y and x do not fit together");
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = torch::stable::new_zeros(x, {(x.size(0) + kUnitRows - 1) / kUnitRows, x.size(1)},
                                                ScalarType::Float);
  if (is_bfloat16(x)) {
    run_rms_norm_backward<bfloat16>(grad_y, x, weight, grad_x, grad_weight, static_cast<float>(epsilon),
                                    choose_rms_norm_backward_bfloat16());
  } else {
    run_rms_norm_backward<float>(grad_y, x, weight, grad_x, grad_weight, static_cast<float>(epsilon),
                                 choose_rms_norm_backward_float());
  }
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cpu, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor");
  m.def("rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&seqmodels::rms_norm_cpu));
  m.impl("rms_norm_backward", TORCH_BOX(&seqmodels::rms_norm_backward_cpu));
}

#endif
