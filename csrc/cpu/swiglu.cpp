// y = silu(gate) * up with gate and up side by side in one row, and its backward.
//
// One pass over memory each way: the backward computes the sigmoid again and writes both gradients
// where the next matrix product reads them, in one row.
#include "dispatch.h"
#include "vec.h"

namespace seqmodels {

// Rows [begin, end): hidden is (rows, 2 width), y and grad_y are (rows, width).
template <class T>
using Swiglu = void(const T* hidden, T* y, int64_t width, int64_t begin, int64_t end);
template <class T>
using SwigluBackward = void(const T* grad_y, const T* hidden, T* grad_hidden, int64_t width, int64_t begin,
                            int64_t end);
SEQMODELS_DECLARE_KERNEL(Swiglu<float>, swiglu_float)
SEQMODELS_DECLARE_KERNEL(Swiglu<bfloat16>, swiglu_bfloat16)
SEQMODELS_DECLARE_KERNEL(SwigluBackward<float>, swiglu_backward_float)
SEQMODELS_DECLARE_KERNEL(SwigluBackward<bfloat16>, swiglu_backward_bfloat16)

namespace SEQMODELS_LEVEL {

template <class T>
SEQMODELS_INLINE void forward(const T* hidden, T* y, int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = hidden + 2 * row * width, *up = gate + width;
    T* to = y + row * width;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      const Vec g = load(gate + i);
      store(to + i, g * sigmoid(g) * load(up + i));
    }
    if (const int64_t left = width - i; left > 0) {
      const Vec g = load(gate + i, left);
      store(to + i, g * sigmoid(g) * load(up + i, left), left);
    }
  }
}

// d silu(g) / dg = s (1 + g (1 - s)) with s = sigmoid(g).
SEQMODELS_INLINE void gradients(Vec grad, Vec g, Vec up, Vec& grad_gate, Vec& grad_up) {
  const Vec s = sigmoid(g);
  grad_up = grad * (g * s);
  grad_gate = grad * up * (s * (1.0f + g * (1.0f - s)));
}

template <class T>
SEQMODELS_INLINE void backward(const T* grad_y, const T* hidden, T* grad_hidden, int64_t width, int64_t begin,
                               int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = hidden + 2 * row * width, *up = gate + width, *grad = grad_y + row * width;
    T *to_gate = grad_hidden + 2 * row * width, *to_up = to_gate + width;
    int64_t i = 0;
    Vec grad_gate, grad_up;
    for (; i + kLanes <= width; i += kLanes) {
      gradients(load(grad + i), load(gate + i), load(up + i), grad_gate, grad_up);
      store(to_gate + i, grad_gate);
      store(to_up + i, grad_up);
    }
    if (const int64_t left = width - i; left > 0) {
      gradients(load(grad + i, left), load(gate + i, left), load(up + i, left), grad_gate, grad_up);
      store(to_gate + i, grad_gate, left);
      store(to_up + i, grad_up, left);
    }
  }
}

#define SEQMODELS_TYPE(T)                                                                                        \
  void swiglu_##T(const T* hidden, T* y, int64_t width, int64_t begin, int64_t end) {                            \
    forward(hidden, y, width, begin, end);                                                                       \
  }                                                                                                              \
  void swiglu_backward_##T(const T* grad_y, const T* hidden, T* grad_hidden, int64_t width, int64_t begin,       \
                           int64_t end) {                                                                        \
    backward(grad_y, hidden, grad_hidden, width, begin, end);                                                    \
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

// Rows a thread is worth waking for: about 16,000 exponentials.
int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

template <class T>
void run_swiglu(const Tensor& hidden, Tensor& y, Swiglu<T>* kernel) {
  const T* from = static_cast<const T*>(hidden.data_ptr());
  T* to = static_cast<T*>(y.data_ptr());
  const int64_t width = y.size(1);
  torch::stable::parallel_for(0, y.size(0), grain(width),
                              [&](int64_t begin, int64_t end) { kernel(from, to, width, begin, end); });
}

template <class T>
void run_swiglu_backward(const Tensor& grad_y, const Tensor& hidden, Tensor& grad_hidden, SwigluBackward<T>* kernel) {
  const T *grad = static_cast<const T*>(grad_y.data_ptr()), *from = static_cast<const T*>(hidden.data_ptr());
  T* to = static_cast<T*>(grad_hidden.data_ptr());
  const int64_t width = grad_y.size(1);
  torch::stable::parallel_for(0, grad_y.size(0), grain(width),
                              [&](int64_t begin, int64_t end) { kernel(grad, from, to, width, begin, end); });
}

Tensor swiglu_cpu(Tensor hidden) {
  STD_TORCH_CHECK(hidden.dim() == 2 && hidden.size(1) % 2 == 0, "hidden must be (rows, 2 width)");
  check_tensor(hidden, "hidden", is_bfloat16(hidden) ? ScalarType::BFloat16 : ScalarType::Float);
  Tensor y = torch::stable::new_empty(hidden, {hidden.size(0), hidden.size(1) / 2});
  if (is_bfloat16(hidden)) {
    run_swiglu<bfloat16>(hidden, y, choose_swiglu_bfloat16());
  } else {
    run_swiglu<float>(hidden, y, choose_swiglu_float());
  }
  return y;
}

Tensor swiglu_backward_cpu(Tensor grad_y, Tensor hidden) {
  const ScalarType type = is_bfloat16(hidden) ? ScalarType::BFloat16 : ScalarType::Float;
  STD_TORCH_CHECK(hidden.dim() == 2 && grad_y.dim() == 2 && hidden.size(0) == grad_y.size(0) &&
                      hidden.size(1) == 2 * grad_y.size(1),
                  "grad_y and hidden do not fit together");
  check_tensor(hidden, "hidden", type);
  check_tensor(grad_y, "grad_y", type);
  Tensor grad_hidden = torch::stable::empty_like(hidden);
  if (is_bfloat16(hidden)) {
    run_swiglu_backward<bfloat16>(grad_y, hidden, grad_hidden, choose_swiglu_backward_bfloat16());
  } else {
    run_swiglu_backward<float>(grad_y, hidden, grad_hidden, choose_swiglu_backward_float());
  }
  return grad_hidden;
}

}  // namespace
}  // namespace seqmodels

STABLE_TORCH_LIBRARY_FRAGMENT(seqmodels_cpu, m) {
  m.def("swiglu(Tensor hidden) -> Tensor");
  m.def("swiglu_backward(Tensor grad_y, Tensor hidden) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&seqmodels::swiglu_cpu));
  m.impl("swiglu_backward", TORCH_BOX(&seqmodels::swiglu_backward_cpu));
}

#endif
