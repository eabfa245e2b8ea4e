// What launchers need of torch's stable ABI, and small checks on tensors.
// Include it under `#if SEQMODELS_LAUNCHERS` only: kernels see raw pointers, no torch header.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
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

// Element i of float32 or bfloat16 memory.
inline float read_float(const void* data, int64_t i, bool bfloat16) {
  if (!bfloat16) return static_cast<const float*>(data)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace seqmodels
