// What launchers need of torch's stable ABI, and small checks on tensors.
// Include it under `#if SEQMODELS_LAUNCHERS` only: kernels see raw pointers, no torch header.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace seqmodels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_bfloat16(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }

// Refuses a tensor of another dtype or with gaps: kernels index contiguous memory.
inline void check_tensor(const Tensor& tensor, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has dtype code ", static_cast<int>(tensor.scalar_type()),
                  "; expected ", static_cast<int>(dtype));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

}  // namespace seqmodels
