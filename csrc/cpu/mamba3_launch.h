// Checks that the launchers of Mamba-3 share. Include it under `#if SEQMODELS_LAUNCHERS` only.
#pragma once

#include "mamba3.h"
#include "stable.h"

namespace seqmodels {
namespace {

constexpr int64_t kMostRanks = 64;

inline const float* check_floats(const Tensor& tensor, const char* name, int64_t count) {
  check_tensor(tensor, name, ScalarType::Float);
  STD_TORCH_CHECK(tensor.numel() == count, name, " has ", tensor.numel(), " elements; expected ", count);
  return static_cast<const float*>(tensor.data_ptr());
}

inline const float* check_floats(const std::optional<Tensor>& tensor, const char* name, int64_t count) {
  return tensor.has_value() ? check_floats(*tensor, name, count) : nullptr;
}

inline Mamba3Weights checked_weights(const Mamba3Shape& s, const Tensor& b_weight, const Tensor& c_weight,
                                     const Tensor& b_bias, const Tensor& c_bias, const Tensor& skip,
                                     const std::optional<Tensor>& mimo_x, const std::optional<Tensor>& mimo_z,
                                     const std::optional<Tensor>& mimo_o, const std::optional<Tensor>& norm_weight) {
  STD_TORCH_CHECK(s.groups > 0 && s.heads > 0 && s.heads % s.groups == 0, s.groups, " groups do not divide ", s.heads, " heads");
  STD_TORCH_CHECK(s.ranks >= 1 && s.ranks <= kMostRanks, s.ranks, " ranks; expected 1 to ", kMostRanks);
  STD_TORCH_CHECK(s.d_state >= 1 && s.head_dim >= 1, "d_state is ", s.d_state, ", head_dim ", s.head_dim, "; expected 1 and more");
  STD_TORCH_CHECK(s.angles <= s.d_state / 2, s.angles, " angles do not fit d_state ", s.d_state);
  STD_TORCH_CHECK(mimo_x.has_value() == mimo_z.has_value() && mimo_x.has_value() == mimo_o.has_value() &&
                      (mimo_x.has_value() || s.ranks == 1),
                  "mimo_x, mimo_z and mimo_o come together, and more than one rank needs them");
  const int64_t bias = s.heads * s.ranks * s.d_state, mix = s.heads * s.ranks * s.head_dim;
  return {check_floats(b_weight, "b_weight", s.d_state),
          check_floats(c_weight, "c_weight", s.d_state),
          check_floats(b_bias, "b_bias", bias),
          check_floats(c_bias, "c_bias", bias),
          check_floats(skip, "skip", s.heads),
          check_floats(mimo_x, "mimo_x", mix),
          check_floats(mimo_z, "mimo_z", mix),
          check_floats(mimo_o, "mimo_o", mix),
          check_floats(norm_weight, "norm_weight", s.heads * s.head_dim)};
}

}  // namespace
}  // namespace seqmodels
