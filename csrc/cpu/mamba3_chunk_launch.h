// What the launchers of Mamba-3's forward and backward share: checked tensors, norms.
// Include it under `#if SEQMODELS_LAUNCHERS` only.
#pragma once

#include "linear_attention_launch.h"
#include "mamba3_chunk.h"
#include "mamba3_launch.h"

namespace seqmodels {
namespace {

// Elements between tokens of a (batch, length, ...) tensor whose trailing axes are dense.
inline int64_t token_stride(const Tensor& tensor, const char* name) {
  int64_t dense = 1;
  for (int64_t axis = tensor.dim() - 1; axis >= 2; --axis) {
    STD_TORCH_CHECK(tensor.size(axis) == 1 || tensor.stride(axis) == dense, name, " is not dense within a token");
    dense *= tensor.size(axis);
  }
  const int64_t length = tensor.size(1), stride = length > 1 ? tensor.stride(1) : tensor.stride(0);
  STD_TORCH_CHECK(tensor.size(0) == 1 || tensor.stride(0) == length * stride, name, " has a gap between rows");
  return stride;
}

// The inputs, checked: a wrong shape must not become a wild pointer.
struct Mamba3Tensors {
  Tensor x, b, c, z, log_decay, past, diagonal, phase_step, rate;
  Mamba3Shape shape;
  Mamba3Weights weights;
  int64_t tokens, x_stride, z_stride, b_stride, c_stride;

  Mamba3Tensors(Tensor x_, Tensor b_, Tensor c_, Tensor z_, Tensor log_decay_, Tensor past_, Tensor diagonal_,
                Tensor phase_step_, Tensor rate_, const Tensor& b_weight, const Tensor& c_weight, const Tensor& b_bias,
                const Tensor& c_bias, const Tensor& skip, const std::optional<Tensor>& mimo_x,
                const std::optional<Tensor>& mimo_z, const std::optional<Tensor>& mimo_o,
                const std::optional<Tensor>& norm_weight, bool half, double epsilon)
      : x(x_), b(b_), c(c_), z(z_), log_decay(log_decay_), past(past_), diagonal(diagonal_), phase_step(phase_step_),
        rate(rate_) {
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "x must be float32 or bfloat16");
    STD_TORCH_CHECK(x.dim() == 4 && z.dim() == 4 && b.dim() == 5 && c.dim() == 5 && rate.dim() == 3,
                    "mamba3: wrong number of dimensions");
    for (const Tensor* tensor : {&b, &c, &z}) {
      STD_TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == type && tensor->size(0) == x.size(0) &&
                          tensor->size(1) == x.size(1),
                      "x, b, c and z must have one dtype, batch and length");
    }
    shape.heads = x.size(2), shape.head_dim = x.size(3), shape.ranks = b.size(2), shape.groups = b.size(3);
    shape.d_state = b.size(4), shape.angles = rate.size(2);
    shape.half = half, shape.epsilon = static_cast<float>(epsilon);
    STD_TORCH_CHECK(z.size(2) == x.size(2) && z.size(3) == x.size(3), "x and z differ in shape");
    for (int axis = 2; axis < 5; ++axis) STD_TORCH_CHECK(b.size(axis) == c.size(axis), "b and c differ in shape");
    weights = checked_weights(shape, b_weight, c_weight, b_bias, c_bias, skip, mimo_x, mimo_z, mimo_o, norm_weight);
    tokens = x.size(0) * x.size(1);
    x_stride = token_stride(x, "x"), z_stride = token_stride(z, "z");
    b_stride = token_stride(b, "b"), c_stride = token_stride(c, "c");
    check_floats(log_decay, "log_decay", tokens * shape.heads);
    check_floats(past, "past_weight", tokens * shape.heads);
    check_floats(diagonal, "diagonal_weight", tokens * shape.heads);
    check_floats(phase_step, "phase_step", tokens * shape.heads);
    check_floats(rate, "rate", tokens * shape.angles);
  }

  template <class T>
  Mamba3Inputs<T> inputs(const float* inverse_b, const float* inverse_c) const {
    const auto data = [](const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); };
    const auto low = [](const Tensor& tensor) { return static_cast<const T*>(tensor.data_ptr()); };
    return {shape,    weights,  low(x),          low(z),          low(b),         low(c),
            x_stride, z_stride, b_stride,        c_stride,        data(log_decay), data(past),
            data(diagonal), data(phase_step), data(rate), inverse_b, inverse_c};
  }
};

// Inverse root mean squares of every row of B and C.
class InverseNorms {
 public:
  template <class T>
  InverseNorms(const Mamba3Tensors& tensors, Mamba3Norms<T>* kernel)
      : b_(tensors.tokens * tensors.shape.ranks * tensors.shape.groups),
        c_(tensors.tokens * tensors.shape.ranks * tensors.shape.groups) {
    const int64_t rows = tensors.shape.ranks * tensors.shape.groups;
    const T *b = static_cast<const T*>(tensors.b.data_ptr()), *c = static_cast<const T*>(tensors.c.data_ptr());
    torch::stable::parallel_for(0, tensors.tokens, 256, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        kernel(b + t * tensors.b_stride, rows, tensors.shape.d_state, tensors.shape.epsilon, b_.data() + t * rows);
        kernel(c + t * tensors.c_stride, rows, tensors.shape.d_state, tensors.shape.epsilon, c_.data() + t * rows);
      }
    });
  }
  const float* b() { return b_.data(); }
  const float* c() { return c_.data(); }

 private:
  Buffer b_, c_;
};

}  // namespace
}  // namespace seqmodels
